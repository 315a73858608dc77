import os

import pytest

from training.run.reading import UnreadableError, decoded, parsed, printable, read_bytes, read_json, read_text, require_path


@pytest.mark.parametrize("text", ["", "plain", "Äpfel 犬 🍎", "tabs\tand\r\nlines\f"])
def test_utf8_with_and_without_its_mark(tmp_path, text):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "x").write_bytes(text.encode(encoding))
        assert read_text(tmp_path / "x") == decoded(text.encode(encoding)) == text


@pytest.mark.parametrize(
    "encoding", ["cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "shift-jis", "iso-2022-jp"]
)
def test_other_encodings_are_named_so(encoding):
    text = "café – größer" if encoding == "cp1252" else "犬 dog"
    with pytest.raises(UnreadableError, match="another encoding than UTF-8"):
        decoded(text.encode(encoding))


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, word in (
        (tmp_path, "a folder"), (tmp_path / "pipe", "neither"), (tmp_path / "gone", "No such file"), (tmp_path / "loop", "symbolic"),
        (tmp_path / ("x" * 300), "too long"), (tmp_path / "a\0b", "no file can have"), (tmp_path / "\ud800", "no file can have"),
    ):  # fmt: skip
        with pytest.raises(UnreadableError, match=word) as caught:
            read_bytes(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "no JSON"), ("", "no JSON"), ("[" * 100_000, "too deep"), ("1" * 5000, "too long"), ('"\\ud800"', "half a character"),
        ('{"a": {"b": 1, "b": 2}}', "'b' twice"), ('{"\\ud800": 1}', "half a character"),
    ],
)  # fmt: skip
def test_what_is_no_json(tmp_path, text, word):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UnreadableError, match=word) as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_json():
    assert (
        parsed('{"a": [1, null, "\\ud83c\\udf4e"]}')
        == parsed(b'\xef\xbb\xbf{"a": [1, null, "\xf0\x9f\x8d\x8e"]}')
        == {"a": [1, None, "🍎"]}
    )


def test_paths_that_files_can_have():
    assert str(require_path("a/é" + "x" * 253)) == "a/é" + "x" * 253
    for path in ("", "x" * 256, "é" * 128, "a\0b", "a/" * 3000, "\ud800"):
        with pytest.raises(ValueError, match="expected a path"):
            require_path(path)


def test_names_that_are_no_utf8_are_written_down():
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9" and printable("café") == "café"
