import json
import logging
import os
import unicodedata

import pytest

from tests.training.data.conftest import beside, found
from training.data import DataError
from training.data.captions import cut_by
from training.data.clips import ClipFolder, find_clips


@pytest.mark.parametrize("header", ["file,caption", "path,text", "video,caption", "caption,file"])
def test_csv(folder, header):
    row = '"one, two",{}.mp4' if header.startswith("caption") else '{}.mp4,"one, two"'
    (folder / "captions.csv").write_text("\n".join([header, *(row.format(n) for n in "cab")]), encoding="utf-8")
    assert found(folder) == {f"{n}.mp4": "one, two" for n in "abc"}
    assert [entry.path.name for entry in find_clips(folder)] == ["a.mp4", "b.mp4", "c.mp4"]


def test_csv_saved_by_a_spreadsheet(folder):
    (folder / "captions.csv").write_bytes("file,caption\r\na.mp4,Äpfel\r\nb.mp4,b\r\nc.mp4,c\r\n".encode("utf-8-sig"))
    assert found(folder)["a.mp4"] == "Äpfel"


@pytest.mark.parametrize(("file", "caption"), [("file", "caption"), ("video", "text"), ("path", "caption")])
def test_jsonl(folder, file, caption):
    lines = [json.dumps({file: f"{n}.mp4", caption: f"clip {n}"}) for n in "abc"]
    (folder / "captions.jsonl").write_text("\n\n".join(lines))
    assert found(folder) == {f"{n}.mp4": f"clip {n}" for n in "abc"}


def test_text_beside_and_subfolders(folder):
    beside(folder, a=" first\nline ", b="b")
    (folder / "more").mkdir()
    (folder / "c.mp4").rename(folder / "more" / "c.MP4")
    beside(folder / "more", c="c")
    assert found(folder) == {"a.mp4": "first line", "b.mp4": "b", "c.MP4": "c"}


def test_a_missing_caption_is_named_skipped_and_counted(folder, caplog):
    beside(folder, a="a", b=" ")
    with caplog.at_level(logging.WARNING):
        clips = ClipFolder(folder, 8, 64, 64)
    assert clips.captions == ["a"] and len(clips) == 1
    assert [name for name, _ in clips.skipped] == ["b.mp4", "c.mp4"]
    assert "b.mp4" in caplog.text and "c.mp4" in caplog.text and "1 clip is used, 2 skipped" in caplog.text


def test_hidden_files_and_other_files_are_no_clips(folder):
    beside(folder, a="a", b="b", c="c")
    (folder / "._a.mp4").write_bytes(b"resource fork")
    (folder / "notes.md").write_text("notes")
    assert len(found(folder)) == 3 and not ClipFolder(folder, 8, 64, 64).skipped


@pytest.mark.parametrize("name", ["../a.mp4", "x/../../a.mp4", "/etc/a.mp4", "C:/a.mp4", "..\\\\a.mp4"])
@pytest.mark.parametrize("table", ["captions.csv", "captions.jsonl"])
def test_a_table_that_leaves_the_folder_is_refused(folder, name, table):
    text = f"file,caption\n{name},x\n" if table.endswith("csv") else json.dumps({"file": name, "caption": "x"})
    (folder / table).write_text(text)
    with pytest.raises(DataError, match=f"inside .*{table}"):
        find_clips(folder)


@pytest.mark.parametrize(
    ("table", "text", "word"),
    [
        ("captions.csv", "", "columns file,caption"),
        ("captions.csv", "a.mp4,hello\n", "columns file,caption"),
        ("captions.csv", "file,caption\n,hello\n", "line 2"),
        ("captions.csv", "file,caption\na.mp4,x\na.mp4,y\n", "again in line 3"),
        ("captions.csv", b"file,caption\na.mp4,\xff\xfe\n", "UTF-8"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": "x"}\n{"file": ', "line 2"),
        ("captions.jsonl", "[1]", "line 1"),
        ("captions.jsonl", '{"file": 3, "caption": "x"}', "line 1"),
        (
            "captions.csv",
            "file,caption\na.mp4,a red circle, moving left fast, on white\nb.mp4,x\n",
            "2 columns in line 2.*found 4",
        ),
        ("captions.csv", "file,caption\nb.mp4,x\na.mp4,one, two\n", "line 3"),
        (
            "captions.csv",
            'file,caption\na.mp4,"a dog runs\nb.mp4,a cat\nc.mp4,a bird\n',
            "in line 2: a quote that is not closed",
        ),
        ("captions.csv", 'file,caption\nb.mp4,x\na.mp4,"a 5\n\nc.mp4,a bird\n', "in line 3: a quote that is not closed"),
        ("captions.csv", 'file,caption\na.mp4,"a dog" runs\n', "in line 2: text after a closing quote"),
        ("captions.csv", 'file,caption\na.mp4,"a dog\nb.mp4,"a cat"\n', "in line 2: text after a closing quote"),
        ("captions.csv", 'file,caption\na.mp4,"a dog\nb.mp4,a cat 7"\nc.mp4,x\n', "line 2 .*goes on over the next rows"),
        ("captions.csv", 'caption,file\n"a dog,a.mp4\na cat 7",b.mp4\n', "line 2 .*goes on over the next rows"),
        ("captions.csv", "file,caption,caption\na.mp4,x,y\n", "'caption' twice"),
        ("captions.csv", "file,file,caption\na.mp4,b.mp4,y\n", "'file' twice"),
        ("captions.csv", "file,caption\na.mp4,dog\n".encode("utf-16"), "UTF-16"),
        ("captions.csv", "file,caption\na.mp4,dog\n".encode("utf-16-le"), "UTF-16"),
        ("captions.csv", "file,caption\na.mp4,犬\n".encode("iso-2022-jp"), "another encoding"),
        ("captions.csv", "file,caption\na.mp4,café\n".encode("cp1252"), "another encoding"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": "\\ud800"}', "line 1: half a character"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": "x", "caption": "y"}', "line 1: 'caption' twice"),
        ("captions.jsonl", '{"file": "a.mp4", "x": ' + "[" * 100_000, "line 1: JSON that is nested too deep"),
        ("captions.jsonl", '{"file": "a.mp4", "x": ' + "1" * 5000 + "}", "line 1: a number that is too long"),
    ],
)
def test_a_broken_table_is_refused(folder, table, text, word):
    (folder / table).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=word) as caught:
        find_clips(folder)
    assert table in str(caught.value) and "\n" not in str(caught.value)


def test_two_tables_are_refused(folder):
    (folder / "captions.csv").write_text("file,caption\n")
    (folder / "captions.jsonl").write_text("")
    with pytest.raises(DataError, match="keep one"):
        find_clips(folder)


def test_a_caption_may_have_lines_commas_and_quotes_where_they_are_quoted(folder):
    (folder / "captions.csv").write_text('file,caption\na.mp4,"one,\ntwo, three"\nb.mp4,"a 5"" screen"\nc.mp4,a 7" screen\n')
    assert found(folder) == {"a.mp4": "one, two, three", "b.mp4": 'a 5" screen', "c.mp4": 'a 7" screen'}


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-32", "shift-jis", "iso-2022-jp", "big5"])
def test_a_text_in_another_encoding_is_named_skipped_and_counted(folder, caplog, encoding):
    beside(folder, a="a", c="c")
    text = {"cp1252": "a man’s café", "big5": "狗"}.get(encoding, "犬 a dog" if "utf" in encoding else "犬")
    (folder / "b.txt").write_bytes(text.encode(encoding))
    clips = ClipFolder(folder, 8, 64, 64)
    assert clips.captions == ["a", "c"]
    assert [(one.name, one.kind) for one in clips.left_out] == [("b.mp4", "with a caption that cannot be read")]
    assert "another encoding than UTF-8" in clips.left_out[0].reason and "b.txt" in clips.left_out[0].reason
    with pytest.raises(DataError, match=r"data\.strict"):
        ClipFolder(folder, 8, 64, 64, strict=True)


@pytest.mark.parametrize(("disk", "table"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFC", "NFC")])
@pytest.mark.parametrize("beside_it", [False, True])
def test_a_name_is_the_same_in_both_spellings(folder, caplog, disk, table, beside_it):
    name = "café"
    (folder / "a.mp4").rename(folder / unicodedata.normalize(disk, f"{name}.mp4"))
    if beside_it:
        (folder / unicodedata.normalize(table, f"{name}.txt")).write_text("a cup")
    else:
        text = unicodedata.normalize(table, f"file,caption\n{name}.mp4,a cup\n")
        (folder / "captions.csv").write_text(text, encoding="utf-8")
    clips = ClipFolder(folder, 8, 64, 64)
    assert clips.captions == ["a cup"] and name not in caplog.text
    assert [name for name, _ in clips.skipped] == ["b.mp4", "c.mp4"]


def test_two_files_whose_names_differ_in_spelling_alone_are_two(folder):
    names = [unicodedata.normalize(form, "café.mp4") for form in ("NFC", "NFD")]
    for old, name in zip("ab", names, strict=True):
        (folder / f"{old}.mp4").rename(folder / name)
    (folder / "captions.csv").write_text(f"file,caption\n{names[0]},one\n{names[1]},two\n", encoding="utf-8")
    assert found(folder) == {names[0]: "one", names[1]: "two"}
    (folder / names[0]).unlink()
    with pytest.raises(DataError, match="in two spellings"):
        find_clips(folder)


def test_a_pipe_in_the_place_of_a_table_is_refused(folder):
    os.mkfifo(folder / "captions.jsonl")
    with pytest.raises(DataError, match=r"captions\.jsonl, found neither a file nor a folder"):
        find_clips(folder)


def test_captions_that_the_text_encoder_cuts(stack):
    most = stack.tokenizer.model_max_length
    fits, long = " ".join(["red"] * (most - 2)), " ".join(["red"] * (most - 1))
    assert cut_by(stack.tokenizer, ["a red circle", fits, long, long]) == [long]


@pytest.mark.parametrize("name", ["n" * 300 + ".mp4", "n/" * 3000 + "a.mp4", "a\0.mp4"])
@pytest.mark.parametrize("caption", ["a dog", ""])
def test_names_that_no_file_can_have_are_refused_with_their_line(folder, name, caption):
    (folder / "captions.jsonl").write_text("\n" + json.dumps({"file": name, "caption": caption}))
    with pytest.raises(DataError, match=r"in line 2 of .*captions\.jsonl") as caught:
        find_clips(folder)
    assert len(str(caught.value)) < 600
