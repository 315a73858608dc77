import os

import pytest

from training.data.folders import files_below


def touched(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_files_of_subfolders_but_no_hidden_ones(tmp_path):
    touched(tmp_path, "a.mp4", "x/b.mp4", "x/y/c.png", ".d.mp4", ".thumbs/e.mp4", "x/.Trash-1000/files/f.mp4", "x/.g")
    found = files_below(tmp_path)
    assert set(found) == {"a.mp4", "x/b.mp4", "x/y/c.png"}
    assert all(path == tmp_path / name for name, path in found.items())


def test_a_hidden_folder_may_be_named_itself(tmp_path):
    assert set(files_below(touched(tmp_path / ".data", "a.mp4"))) == {"a.mp4"}


def test_linked_subfolders_are_followed_once(tmp_path):
    touched(tmp_path / "elsewhere", "b.mp4", "deep/c.mp4")
    folder = touched(tmp_path / "set", "a.mp4")
    (folder / "one").symlink_to(tmp_path / "elsewhere")
    (folder / "two").symlink_to(tmp_path / "elsewhere")
    assert set(files_below(folder)) == {"a.mp4", "one/b.mp4", "one/deep/c.mp4"}
    assert all(path.is_file() for path in files_below(folder).values())


def test_a_link_to_a_neighbour_adds_nothing(tmp_path):
    touched(tmp_path, "real/a.mp4")
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    assert set(files_below(tmp_path)) == {"real/a.mp4"}


def test_loops_end(tmp_path):
    touched(tmp_path, "x/a.mp4", "y/b.mp4")
    (tmp_path / "x" / "up").symlink_to(tmp_path)
    (tmp_path / "x" / "self").symlink_to(tmp_path / "x")
    (tmp_path / "y" / "other").symlink_to(tmp_path / "x")
    assert set(files_below(tmp_path)) == {"x/a.mp4", "y/b.mp4"}
    around = touched(tmp_path / "far", "c.mp4")
    (around / "back").symlink_to(tmp_path / "x")  # a link that is found beyond a link
    (tmp_path / "x" / "far").symlink_to(around)
    assert set(files_below(tmp_path / "x")) == {"a.mp4", "far/c.mp4"} | {"up/y/b.mp4"}


def test_a_link_that_leads_nowhere_and_linked_files(tmp_path):
    touched(tmp_path, "a.mp4")
    (tmp_path / "b.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "c.mp4").symlink_to("a.mp4")
    assert set(files_below(tmp_path)) == {"a.mp4", "b.mp4", "c.mp4"}


def test_a_name_that_is_no_utf8_can_be_written_down(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    try:
        open(path, "w").close()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (name,) = files_below(tmp_path)
    assert name == "caf\\xe9.mp4" and name.encode()
