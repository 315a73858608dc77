import json
import os
import pickle
import re
import resource
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from avdm2_nodes.files.containers import FileFormatError, Layout, read_layout, read_tensors, write_tensors
from avdm2_nodes.files.recognise import recognise

torch.set_num_threads(1)


SAVED = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2, dtype=torch.float16)}
SHAPES = {"weight": (2, 3), "bias": (2,)}


def refusal(function, *args):
    with pytest.raises(FileFormatError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and message.startswith("Expected") and ", found" in message
    return message


def refused(path):
    """Both readers refuse a file, with the same sentence."""
    assert refusal(read_layout, path) == refusal(read_tensors, path)
    assert str(path) in refusal(read_layout, path)
    return refusal(read_layout, path)


@pytest.fixture
def safetensors_file(tmp_path):
    save_file(SAVED, tmp_path / "a.safetensors", {"title": "a – b"})
    return tmp_path / "a.safetensors"


# ---- what can be read ----


def test_a_safetensors_file(safetensors_file):
    assert read_layout(safetensors_file) == Layout(SHAPES, {"title": "a – b"})
    tensors = read_tensors(safetensors_file)
    assert all(torch.equal(tensors[name], SAVED[name]) and tensors[name].dtype == SAVED[name].dtype for name in SAVED)
    upper = safetensors_file.rename(safetensors_file.with_suffix(".SAFETENSORS"))
    assert read_layout(upper).shapes == SHAPES


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize(
    "saved",
    [
        SAVED,
        {"state_dict": SAVED, "epoch": 3, "animatediff_config": "", "optimizer_states": [{"exp_avg": torch.ones(1)}]},
        {"state_dict": {f"module.{name}": tensor for name, tensor in SAVED.items()}, "global_step": 7},
    ],
    ids=["flat", "wrapped", "distributed"],
)
def test_a_pickle(tmp_path, saved, suffix, zipped):
    path = tmp_path / f"a{suffix}"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    assert read_layout(path) == Layout(SHAPES)
    tensors = read_tensors(path)
    assert tensors.keys() == SAVED.keys() and all(torch.equal(tensors[name], SAVED[name]) for name in SAVED)


def test_a_pickle_of_dicts_in_a_dict(tmp_path):
    torch.save(
        {"image_proj": {"norm.weight": torch.ones(4)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(2, 2)}}, tmp_path / "a.bin"
    )
    layout = read_layout(tmp_path / "a.bin")
    assert layout.shapes == {"image_proj.norm.weight": (4,), "ip_adapter.1.to_k_ip.weight": (2, 2)}
    assert recognise(layout).phrase == "an IP-Adapter"


def test_the_first_checkpoints_with_their_lightning_callback(tmp_path, monkeypatch):
    """As sd-v1-4.ckpt and v1-5-pruned.ckpt: a class and a numpy scalar beside the weights, of which neither is run."""
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint = callback
    old_numpy = types.ModuleType("numpy.core.multiarray")
    old_numpy.scalar = type("scalar", (), {"__module__": "numpy.core.multiarray"})
    monkeypatch.setitem(sys.modules, "numpy.core.multiarray", old_numpy)

    class Score:
        def __reduce__(self):
            return old_numpy.scalar, (np.dtype("float64"), "8 bytes")

    path = tmp_path / "sd-v1-4.ckpt"
    torch.save({"state_dict": SAVED, "callbacks": {callback: {"monitor": "val", "best_model_score": Score()}}}, path)
    monkeypatch.undo()

    def scalar(*_):  # as others in the process allow it, ComfyUI too
        raise AssertionError("this ran")

    scalar.__module__, scalar.__qualname__ = "numpy.core.multiarray", "scalar"
    with torch.serialization.safe_globals([scalar]):
        assert read_layout(path) == Layout(SHAPES)
        assert torch.equal(read_tensors(path)["weight"], SAVED["weight"])
        assert scalar in torch.serialization.get_safe_globals()


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    for length in range(100, 300, 8):
        save_file(SAVED, tmp_path / "a.safetensors", {"x": "x" * length})
        if (tmp_path / "a.safetensors").read_bytes()[0] == 0x80:
            break
    assert (tmp_path / "a.safetensors").read_bytes()[0] == 0x80
    assert read_layout(tmp_path / "a.safetensors").shapes == SHAPES


# ---- what cannot ----


def test_missing_folder_and_other_suffixes(tmp_path):
    assert "found nothing" in refused(tmp_path / "gone.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert "found a folder" in refused(tmp_path / "folder.safetensors")
    for name in ("a.gguf", "a.zip", "a", "a.safetensors.part"):
        (tmp_path / name).write_bytes(b"x" * 100)
        assert ".safetensors, .sft, .ckpt" in refused(tmp_path / name)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1817888431\n"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    "contents, said",
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page"),
        (b"\n  <html lang='en'>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
        (POINTER.encode(), "a Git LFS pointer"),
        (b"404: Not Found", "truncated or damaged"),
        (b'{"error": "Invalid username or password."}', "truncated or damaged"),
        (bytes(range(1, 256)) * 8, "truncated or damaged"),
        (b"\0" * 4096, "truncated or damaged"),
        (b"abc", "truncated or damaged"),
    ],
    ids=["empty", "page", "page with spaces", "xml", "pointer", "404", "json", "noise", "zeros", "short"],
)
def test_what_downloads_leave_behind(tmp_path, suffix, contents, said):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(contents)
    assert said in refused(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_suffix_of_the_other_kind(tmp_path, safetensors_file, zipped):
    torch.save(SAVED, tmp_path / "b.safetensors", _use_new_zipfile_serialization=zipped)
    assert "rename it to .ckpt" in refused(tmp_path / "b.safetensors")
    assert "rename it to .safetensors" in refused(safetensors_file.rename(tmp_path / "a.ckpt"))


def test_a_truncated_safetensors_file(safetensors_file):
    whole = safetensors_file.read_bytes()
    for size in (4, 8, 40, len(whole) - 5, len(whole) - 1):
        safetensors_file.write_bytes(whole[:size])
        assert "truncated or damaged" in refused(safetensors_file)
    safetensors_file.write_bytes(whole + b"\0" * 3)
    assert "found 3 bytes behind the last of its tensors" in refused(safetensors_file)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_truncated_pickle(tmp_path, zipped):
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in (3, 100, 1500, len(whole) - 5):
        path.write_bytes(whole[:size])
        message = refused(path)
        assert "truncated or damaged" in message or "needs code to run" in message
    assert "truncated or damaged" in message


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"3",
        {"a": 3},
        {"a": {"dtype": "F32"}},
        {"a": entry(shape=[-2])},
        {"a": entry(shape=["2"])},
        {"a": entry(shape=[True])},
        {"a": entry(shape=None)},
        {"a": entry(data_offsets=[0])},
        {"a": entry(data_offsets=[0, 2**62])},
        {"a": entry(), "__metadata__": ["x"]},
        {"a": entry(), "__metadata__": {"x": 3}},
    ],
)
def test_a_damaged_header(tmp_path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    assert "truncated or damaged" in refused(path)


def test_a_header_that_claims_more_than_there_is(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in (17, 2**32, 2**63):
        path.write_bytes(struct.pack("<Q", length) + b'{"a":0}'.ljust(16))
        assert f"a header of {length} bytes" in refused(path)


@pytest.mark.parametrize("shape, dtype", [([3], "F32"), ([2], "F64"), ([5], "BF16"), ([7], "F8_E4M3"), ([2**62], "I64")])
def test_a_shape_that_its_tensor_has_no_room_for(tmp_path, shape, dtype):
    """Found in the header, before anything is loaded."""
    path = tmp_path / "a.safetensors"
    for given, said in (([8 * 8 // int(re.search(r"\d+", dtype)[0])], None), (shape, f"a tensor of shape {shape} in 8 bytes")):
        text = json.dumps({"a": entry(shape=given, dtype=dtype)}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
        if said is None:
            assert read_layout(path).shapes == {"a": tuple(given)}
        else:
            assert f"truncated or damaged (its header: {said})" in refused(path)


class Code:
    def __reduce__(self):
        return os.system, ("touch /nonexistent/should-not-run",)


def test_a_pickle_that_needs_code(tmp_path):
    for zipped in (True, False):
        torch.save({"a": torch.ones(3), "b": Code()}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
        message = refused(tmp_path / "a.ckpt")
        assert "needs code to run" in message and ".system" in message
        torch.save(torch.nn.Linear(2, 2), tmp_path / "b.pt", _use_new_zipfile_serialization=zipped)
        assert "torch.nn.modules.linear.Linear" in refused(tmp_path / "b.pt")
    (tmp_path / "c.bin").write_bytes(pickle.dumps({"a": Code()}, protocol=2))
    assert "needs code to run" in refused(tmp_path / "c.bin")


def test_a_pickle_of_something_else(tmp_path):
    torch.save(torch.ones(3), tmp_path / "a.pt")
    assert "found a Tensor" in refused(tmp_path / "a.pt")
    torch.save({"a": 3}, tmp_path / "b.pt")
    assert recognise(read_layout(tmp_path / "b.pt")).phrase == "a file without tensors"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_no_right_to_read(safetensors_file):
    safetensors_file.chmod(0)
    assert "Permission denied" in refused(safetensors_file)


# ---- what training code and writers put around ----


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "motion_module", "module"])
def test_weights_below_a_wrappers_name(tmp_path, wrapper):
    for saved in (
        {wrapper: SAVED, "epoch": 1},
        {"state_dict": {wrapper: SAVED}},
        {wrapper: {"_orig_mod.module." + n: t for n, t in SAVED.items()}},
    ):
        torch.save(saved, tmp_path / "a.pt")
        assert read_layout(tmp_path / "a.pt").shapes == SHAPES


def test_prefixes_that_are_a_part_of_other_models_names_stay(tmp_path):
    """`model.` is a language model's own, and a Stable Diffusion checkpoint's; around motion modules it is a wrapper."""
    for prefix, name, kept in (
        ("model.", "diffusion_model.x", "model.diffusion_model.x"),
        ("unet.", "down_blocks.0.lora", "unet.down_blocks.0.lora"),
        ("model.", "down_blocks.0.motion_modules.0.x", "down_blocks.0.motion_modules.0.x"),
        ("module.unet.", "mid_block.motion_modules.0.x", "mid_block.motion_modules.0.x"),
        ("_orig_mod.module.", "x", "x"),
    ):
        save_file({prefix + name: torch.ones(1)}, tmp_path / "a.safetensors")
        assert [*read_layout(tmp_path / "a.safetensors").shapes] == [*read_tensors(tmp_path / "a.safetensors")] == [kept]


def test_tensors_that_are_one_and_the_same_are_put_back(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 2)
            self.b = self.a

    save_model(Tied(), str(tmp_path / "a.safetensors"))
    assert len(load_file(tmp_path / "a.safetensors")) == 2
    tensors = read_tensors(tmp_path / "a.safetensors")
    assert tensors.keys() == read_layout(tmp_path / "a.safetensors").shapes.keys() == Tied().state_dict().keys()
    assert torch.equal(tensors["a.weight"], tensors["b.weight"])


# ---- what asks for more than it has ----


def test_more_and_longer_names_than_a_model_has(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x" * 300: torch.ones(1)}, path)
    assert "a name of 300 letters" in refused(path)
    save_file({f"a{i}": torch.ones(1) for i in range(50_001)}, path)
    assert "found 50001 tensors" in refused(path)
    torch.save({f"k{i}": SAVED for i in range(30_000)}, tmp_path / "a.ckpt")
    assert "found 90000 entries" in refused(tmp_path / "a.ckpt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_tensors_that_are_more_than_their_bytes(tmp_path, zipped):
    path = tmp_path / "a.ckpt"
    for tensor in (torch.zeros(1).expand(10**8, 128), torch.zeros(1).expand(3, 2)):
        torch.save({"a": tensor}, path, _use_new_zipfile_serialization=zipped)
        assert f"a tensor of shape {tuple(tensor.shape)} that has not as many bytes" in refused(path)
    torch.save(
        {"a": torch.arange(6.0).reshape(3, 2).T, "b": torch.arange(9.0)[3:5]}, path, _use_new_zipfile_serialization=zipped
    )
    assert torch.equal(read_tensors(path)["b"], torch.tensor([3.0, 4.0]))  # views are no more than they were made of


def test_pickled_tensors_of_other_kinds(tmp_path):
    path = tmp_path / "a.ckpt"
    kinds = (
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.ones(2, device="meta"),
    )
    for tensor in kinds:
        torch.save({"a": tensor}, path)
        assert "another kind of tensor under a;" in refusal(read_tensors, path)
    torch.save({"a": kinds[0]}, path)
    assert "another kind of tensor under a;" in refused(path)
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, path)
    assert read_tensors(path)["a"].shape == (2,)


def test_a_pickle_that_asks_for_memory_by_a_number(tmp_path):
    path = tmp_path / "a.ckpt"
    for module, name in (("builtins", "bytearray"), ("__builtin__", "bytearray"), ("torch", "FloatTensor")):
        path.write_bytes(b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"\x8a\x05\x00\x28\x6b\xee\x00\x85R.")
        assert f"needs code to run ({name})" in refused(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_more_tensors_than_any_model_is_not_unpickled(tmp_path, zipped):
    """Each takes 0.2 ms, every time that the file is looked at: a small file took a minute."""
    path = tmp_path / "many.ckpt"
    torch.save({f"layer{i}.weight": torch.zeros(1) for i in range(12_000)}, path, _use_new_zipfile_serialization=zipped)
    assert re.search(r"found a pickle of some 1[2-5]\d{3} tensors, more than any has; choose another file\.$", refused(path))


def test_a_compressed_zip_is_not_unpacked(tmp_path):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data.pkl", "w") as entry:
        for _ in range(64):
            entry.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    assert f"a compressed one that unpacks to {64 * 2**20} bytes" in refused(path)


def test_only_names_that_are_texts_are_names(tmp_path):
    torch.save({"a": torch.ones(1), 3: torch.ones(1), ("b", 1): torch.ones(1), "c": {3: torch.ones(1)}}, tmp_path / "a.pt")
    assert read_layout(tmp_path / "a.pt").shapes == {"a": (1,)}


# ---- writing ----


def test_written_tensors_are_read_again_and_others_may_read_them(tmp_path):
    path = tmp_path / "a.safetensors"
    shared = torch.randn(4, 4)
    write_tensors(path, {"a": shared, "b": shared, "c": shared.t()}, {"k": "v"})
    found = load_file(path)
    assert torch.equal(found["a"], shared) and torch.equal(found["b"], shared) and torch.equal(found["c"], shared.t())
    assert read_layout(path).metadata == {"k": "v"}
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "plain"]


def test_nothing_is_left_where_nothing_can_be_written(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, SAVED, {})
    old = path.read_bytes()
    (tmp_path / "folder.safetensors").mkdir()
    for place in (tmp_path / "no such" / "a.safetensors", path / "a.safetensors", tmp_path / "folder.safetensors"):
        assert str(place) in refusal(write_tensors, place, SAVED, {})
    assert "ends in .safetensors" in refusal(write_tensors, tmp_path / "a.ckpt", SAVED, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))  # stands for a full disk
    try:
        assert "make room" in refusal(write_tensors, path, {"a": torch.ones(2**12)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == [path.name, "folder.safetensors"]
