"""CLIP's tokenizer, which a checkpoint in one file does not hold (CLIP, arXiv 2103.00020)."""

import gzip
import importlib.util
import json
import tempfile
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .paths import is_file
from .sentences import FileFormatError, reason

_TOKENS = 49408
_LENGTH = 77


def clip_tokenizer(folder: Path | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer as SD1.5 uses it: 49,408 tokens, prompts of 77, padded with the end token.

    From `folder`, which holds vocab.json and merges.txt, else from the vocabulary in the installed package open_clip.
    FileFormatError where there is neither, or the vocabulary is another.
    """
    if folder is not None:
        missing = [name for name in ("vocab.json", "merges.txt") if not is_file(Path(folder) / name)]
        if missing:
            raise FileFormatError(
                f"Expected CLIP's vocabulary (vocab.json and merges.txt) in {folder}, found no {missing[0]}; name another folder."
            )
        return _tokenizer(Path(folder))
    package = importlib.util.find_spec("open_clip")
    places = package.submodule_search_locations or [] if package else []
    packed = next((p for p in (Path(place) / "bpe_simple_vocab_16e6.txt.gz" for place in places) if p.is_file()), None)
    if packed is None:
        raise FileFormatError(
            "Expected CLIP's vocabulary, which a checkpoint in one file does not hold, found neither a folder with vocab.json and "
            "merges.txt nor the package open_clip; name such a folder or run: pip install open_clip_torch."
        )
    with tempfile.TemporaryDirectory() as unpacked:
        _unpack_vocabulary(packed, Path(unpacked))
        return _tokenizer(Path(unpacked), packed)


def _unpack_vocabulary(packed: Path, folder: Path) -> None:
    """Writes vocab.json and merges.txt from CLIP's list of merges: every byte, every byte at a word's end, each merge, start and end."""
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1:]
    merges = merges[: _TOKENS - 2 * 256 - 2]  # the list goes on: CLIP took this many
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _tokenizer(folder: Path, source: Path | None = None) -> CLIPTokenizer:
    end = "<|endoftext|>"
    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            folder, local_files_only=True, model_max_length=_LENGTH, bos_token="<|startoftext|>",
            eos_token=end, unk_token=end, pad_token=end,
        )  # fmt: skip
        found = f"one of {len(tokenizer)} tokens, the end at {tokenizer.eos_token_id}"
    except Exception as error:  # transformers and tokenizers raise a dozen kinds for one cause
        tokenizer, found = None, reason(error)
    if tokenizer is None or len(tokenizer) != _TOKENS or tokenizer.eos_token_id != _TOKENS - 1:
        raise FileFormatError(
            f"Expected CLIP's vocabulary of {_TOKENS} tokens in {source or folder}, found {found}; name another folder."
        )
    return tokenizer
