import os
from pathlib import Path

import pytest

from avdm2_nodes.files.paths import is_file, is_folder, lies_at, read_json, read_text, require_file
from avdm2_nodes.files.sentences import FileFormatError


@pytest.fixture
def places(tmp_path):
    """What is no file, by what is said of it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        tmp_path / "gone": "nothing",
        tmp_path: "a folder",
        tmp_path / "pipe": "a pipe or a device",
        Path("/dev/zero"): "a pipe or a device",
        tmp_path / "dangling": "a link to nothing",
        tmp_path / "loop": "none (Too many levels of symbolic links)",
        tmp_path / ("n" * 300): "none (File name too long)",
        Path(f"{tmp_path}/a\0b"): "none (",
        Path(f"{tmp_path}/a\ud800"): "none (",
    }


def test_what_is_no_file_is_told_without_waiting_for_it(places):
    for path, said in places.items():
        assert not is_file(path) and is_folder(path) == (said == "a folder")
        assert lies_at(path).startswith(said)
        with pytest.raises(FileFormatError) as caught:
            require_file(path)
        assert f"found {said}" in str(caught.value) and str(caught.value).isprintable()


def test_a_link_to_a_file_is_one(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert is_file(tmp_path / "link") and lies_at(tmp_path / "link") == "a file"
    require_file(tmp_path / "link")


def test_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')  # as Windows' editors save it
    assert read_json(path) == {"a": "é"}
    for contents, said in (
        (b"[" * 100_000, "nested too deep"),
        (b"9" * 5000, "4300 digits"),
        (b"\xff\xfe", "can't decode"),
        (b"{", "Expecting"),
        (b"", "Expecting"),
    ):
        path.write_bytes(contents)
        with pytest.raises(FileFormatError, match=f"Expected JSON at .*{said}"):
            read_json(path)


def test_a_text_that_is_none(tmp_path, places):
    for path in places:
        with pytest.raises(FileFormatError):
            read_text(path)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FileFormatError, match=f"found a file of {2**40} bytes"):
        read_text(tmp_path / "large")
