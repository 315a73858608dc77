"""The process's own errors, as the training rooms raise them, in the words of a node."""

from pathlib import Path

import pytest

from training.method.learner import MAX_BAD_STEPS
from training.run.config import from_yaml
from training.run.folder import RunFolder, RunFolderError

LOG = Path("/out/ink/training.log")
INPUTS = {"style": ("model.score_unet", "style.images"), "student": ("model.student",)}


@pytest.fixture
def said(comfyui):
    room = comfyui.pack("comfy_bridge.training_words")
    return lambda words: room.in_node_words(words, LOG, INPUTS)


def run_folder_error(path, text, update=0) -> str:
    with pytest.raises(RunFolderError) as caught, RunFolder(path) as run:
        run.start(from_yaml(text), update)
    return str(caught.value)


def test_a_run_folder_s_sentences(said, tmp_path):
    with RunFolder(tmp_path) as run:
        run.start(from_yaml("warmup: {updates: 40}"))
        assert said(run_folder_error(tmp_path, "")).endswith("; wait for that, or choose another name.")
    text = said(run_folder_error(tmp_path, "warmup: {updates: 7}\nmodel: {student: /s.safetensors}", update=3))
    assert "student '/s.safetensors', was null" in text and "updates 7, was 40" in text
    assert text.endswith("; set them back, or choose another name.") and "--" not in text and "model.student" not in text
    (tmp_path / "file").write_text("")
    assert said(run_folder_error(tmp_path / "file", "")).endswith("; choose another name.")


def test_other_sentences_are_left_as_they_are(said):
    for words in (
        "Expected captioned videos (.mp4) in /in/clips, found no videos; put clips there with a captions.csv beside each.",
        "Expected a text of prompts at /p.txt, found: No such file or directory; name another.",
    ):
        assert said(words) == words


def test_what_to_do_again_is_the_node_s(said):
    assert said("Stopped after update 5 of 10; the same command goes on from there.").endswith(
        "the same inputs go on from there."
    )
    assert said("found: x; make room and give the command again: it goes on.").endswith("make room and the same inputs go on.")
    assert said("found: x; make room and start again: the run goes on.").endswith("run the same inputs again: they go on.")
    diverged = f"found NaN or Inf in {MAX_BAD_STEPS} updates of the student in a row; lower x and start anew in another folder."
    assert said(diverged).endswith("start anew under another name.")


def test_a_traceback_is_one_sentence(said):
    for line, expected in {
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB": "Expected enough memory",
        "MemoryError": "Expected enough memory",
        "OSError: [Errno 28] No space left on device": "found its disk full; make room, and the same inputs go on.",
        "KeyError: 'x'": f"Expected the training to end well, found KeyError: 'x'; more is in {LOG}.",
    }.items():
        assert said(line).startswith("Expected ") and expected in said(line)
