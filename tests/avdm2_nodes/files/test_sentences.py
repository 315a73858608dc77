import pytest

from avdm2_nodes.files.sentences import FileError, FileFormatError, one_line, reason, told, told_writing, whole_number


def test_a_message_is_one_line_of_bounded_length():
    message = str(FileError("Expected a – b, found 'x\ny\ud800\x1b[31m'; choose another."))
    assert message == r"Expected a – b, found 'x\ny\ud800\x1b[31m'; choose another."
    long = str(FileFormatError("Expected a file, found " + "x\n" * 5_000_000 + "; choose another."))
    assert len(long) < 1600 and long.startswith("Expected a file, found x") and long.endswith("; choose another.")
    assert long.isprintable() and isinstance(FileFormatError(""), ValueError)


def test_a_path_stays_whole():
    path = "/a folder/" + "n" * 200 + "/  two spaces.safetensors"
    assert path in str(FileFormatError(f"Expected a model file at {path}, found nothing; check the path."))


def test_reasons():
    assert reason(OSError(36, "File name too long", "x" * 300)) == "File name too long"
    assert reason(RecursionError("maximum recursion depth exceeded")) == "it is nested too deep"
    assert reason(MemoryError()) == "it asks for more memory than there is"
    assert reason(ValueError("first.\nsecond")) == "first"
    assert reason(ValueError()) == "ValueError"
    assert len(one_line("x" * 10_000)) <= 210


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), OverflowError("x")]
)
def test_what_reading_and_writing_raise_is_told(error):
    with (
        pytest.raises(FileFormatError, match=r"Expected a file at here, found: .*; check or replace it"),
        told("here", "a file"),
    ):
        raise error
    with pytest.raises(FileError) as caught, told_writing("here", FileError):
        raise error if not isinstance(error, OverflowError) else ValueError("embedded null byte")
    assert type(caught.value) is FileError and "room and the right to write here" in str(caught.value)


def test_a_sentence_passes_as_it_is():
    own = FileFormatError("Expected a, found b; do c.")
    for context in (told("x", "y"), told_writing("x")):
        with pytest.raises(FileFormatError) as caught, context:
            raise own
        assert caught.value is own


def test_whole_numbers():
    assert whole_number("32") == 32 and whole_number("0") == 0
    assert all(whole_number(text) is None for text in ("", "-1", "1.5", "٣", "²", "9" * 5000))
