import json
import logging

import pytest

from tests.training.data.conftest import beside, found
from training.data import DataError
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
    assert "b.mp4" in caplog.text and "c.mp4" in caplog.text and "1 clips are used, 2 skipped" in caplog.text


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
