import gzip
import importlib.machinery
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from avdm2_nodes.files.clip import clip_tokenizer
from avdm2_nodes.files.containers import FileFormatError
from tests.avdm2_nodes.files.comfyui_names import COMFYUI, needs_comfyui

torch.set_num_threads(1)


def refusal(function, *args, **options):
    with pytest.raises(FileFormatError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and message.startswith("Expected")
    return message


def packed_vocabulary(folder, merges):
    """The package open_clip, as far as a tokenizer needs it: a title, then merges by rank, more of them than CLIP took."""
    folder.mkdir()
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *(f"{a} {b}" for a, b in merges), "zz zz", "yy yy</w>", ""]
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "__init__.py").write_text("raise ImportError('the package must be found, never imported')")


@pytest.fixture(scope="session")
def merges():
    """As many merges as CLIP has, in an order in which each has what it merges: letters, then pairs with a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(a, b + end) for end in ("", "</w>") for a in letters for b in letters]
    words = [(a + b, c + end) for end in ("</w>", "") for a in letters for b in letters for c in letters]
    longer = [(a + b + c, d + "</w>") for a in letters for b in letters for c in letters for d in letters]
    found = list(dict.fromkeys(pairs + words + longer))[:48894]
    assert len(found) == 48894
    return found


@pytest.fixture
def open_clip(tmp_path, merges, monkeypatch):
    packed_vocabulary(tmp_path / "open_clip", merges)
    place = importlib.machinery.PathFinder.find_spec("open_clip", [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: place if name == "open_clip" else None)
    return tmp_path / "open_clip"


def test_the_tokenizer_from_the_package(open_clip):
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    # 256 bytes, 256 bytes at a word's end, then the merges: "ab" is the 2nd, "ab</w>" the 26 * 26 + 2nd.
    assert tokenizer.convert_tokens_to_ids(["!", "!</w>", "ab", "ab</w>"]) == [0, 256, 512 + 1, 512 + 26 * 26 + 1]
    ids = tokenizer(["AB", "a" * 400], padding="max_length", truncation=True).input_ids
    assert ids[0] == [49406, 512 + 26 * 26 + 1] + [49407] * 75
    assert len(ids[1]) == 77 and ids[1][-1] == 49407


def test_the_tokenizer_from_a_folder(open_clip, tmp_path):
    folder = tmp_path / "tokenizer"
    clip_tokenizer().save_pretrained(folder)
    packed = clip_tokenizer()
    files = {name for name in os.listdir(folder) if name not in ("vocab.json", "merges.txt")}
    for name in files:
        (folder / name).unlink()
    if not (folder / "vocab.json").exists():  # transformers 5 saves one file of its own
        tokens = packed.get_vocab()
        (folder / "vocab.json").write_text(json.dumps(tokens))
        with gzip.open(open_clip / "bpe_simple_vocab_16e6.txt.gz", "rt") as file:
            lines = file.read().split("\n")[1:48895]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "!", "model_max_length": 8192})
    )  # as SD 2.x' and ComfyUI's
    found = clip_tokenizer(folder)
    text = ["a small cat", "ünïcode 12 <|endoftext|>", ""]
    assert found(text, padding="max_length").input_ids == packed(text, padding="max_length").input_ids


@needs_comfyui
def test_the_vocabulary_is_clips_own(tmp_path, monkeypatch):
    folder = Path(COMFYUI) / "comfy" / "sd1_tokenizer"
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:48895]
    packed_vocabulary(tmp_path / "open_clip", [line.split(" ") for line in lines])
    place = importlib.machinery.PathFinder.find_spec("open_clip", [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: place)
    found = clip_tokenizer()
    assert found.get_vocab() == json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert found("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert clip_tokenizer(folder)("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_no_vocabulary(tmp_path, monkeypatch, stack_folder, open_clip):
    assert "49408 tokens" in refusal(clip_tokenizer, stack_folder / "tokenizer")  # of the miniature's kind
    assert "found no vocab.json" in refusal(clip_tokenizer, tmp_path / "gone")
    (tmp_path / "vocab.json").write_text("{")
    assert "found no merges.txt" in refusal(clip_tokenizer, tmp_path)
    (tmp_path / "merges.txt").write_text("")
    assert str(tmp_path) in refusal(clip_tokenizer, tmp_path)
    (open_clip / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(b"title\na b\n"))
    assert "49408 tokens" in refusal(clip_tokenizer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install open_clip_torch" in refusal(clip_tokenizer)
