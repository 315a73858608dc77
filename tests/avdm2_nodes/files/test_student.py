import json
import os
import resource
import stat
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from avdm2_nodes.files.student import read_student, student_path, write_student
from avdm2_nodes.files.student_unet import student_unet
from tests.avdm2_nodes.files.students import RANK, edited, refusal

torch.set_num_threads(1)


# ---- what is written is what is read ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_bitwise(path, info, unet, dtype):
    tensors = {name: p.to(dtype) for name, p in unet.named_parameters()}
    write_student(path, tensors, info)
    student = read_student(path)
    assert student.info == info
    assert student.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert student.tensors[name].dtype == dtype
        assert torch.equal(student.tensors[name].view(torch.uint8), tensor.view(torch.uint8))
    assert os.listdir(path.parent) == [path.name]
    built = student_unet(student).state_dict()
    assert all(torch.equal(built[name], tensor.float()) for name, tensor in tensors.items())


def test_the_file_has_the_mode_that_the_umask_gives(path, info, motion_tensors):
    ordinary = path.with_name("ordinary")
    ordinary.touch()
    write_student(path, motion_tensors, replace(info, holds="motion"))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_truncated_files(whole):
    content = whole.read_bytes()
    for length in (0, 4, 500, len(content) // 2, len(content) - 1):
        whole.write_bytes(content[:length])
        said = "truncated" if length else "an empty file"
        assert said in (message := refusal(read_student, whole)) and str(whole) in message


def test_missing_file_and_folder(path):
    assert "found nothing" in refusal(read_student, path)
    path.mkdir()
    assert "found a folder" in refusal(read_student, path)


def test_a_file_that_is_no_safetensors(path):
    torch.save({"a": torch.zeros(2)}, path)
    assert "found a PyTorch pickle" in refusal(read_student, path)


def test_safetensors_that_are_no_student(path):
    lora = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"
    for metadata in (None, {"format": "pt"}):
        for name, said in (("a", "an unknown file with keys such as 'a'"), (lora, "an SD LoRA (kohya keys)")):
            save_file({name: torch.zeros(2, 2)}, path, metadata)
            assert refusal(read_student, path) == f"Expected a student file at {path}, found {said}; choose a student."


def test_missing_unexpected_and_misshaped_tensors(whole):
    tensors = load_file(whole)
    name = "conv_in.weight"
    changes = {
        "1 missing (such as conv_in.weight)": {k: t for k, t in tensors.items() if k != name},
        "1 unexpected (such as other)": tensors | {"other": torch.zeros(1)},
        "1 of another shape or kind (such as conv_in.weight)": tensors | {name: tensors[name][:, :1].contiguous()},
        "1 of another shape": tensors | {name: tensors[name].int()},
    }
    for said, changed in changes.items():
        assert said in refusal(read_student, edited(whole, changed))


def test_settings_of_another_width_than_the_tensors(whole, info):
    config = json.dumps(info.unet_config | {"block_out_channels": [64, 64]})
    assert "another shape" in refusal(read_student, edited(whole, unet_config=config))


def test_tensors_that_contradict_their_info_are_not_written(path, info, lora_info, unet, motion_tensors, lora_tensors):
    whole = dict(unet.named_parameters())
    half_a_layer = {k: t for k, t in lora_tensors.items() if not k.endswith("conv1.lora_B.weight")}
    for tensors, one, said in [
        (whole, replace(info, holds="motion"), "unexpected"),
        (motion_tensors, info, "missing"),
        (motion_tensors, lora_info, "LoRA"),
        (motion_tensors | half_a_layer, lora_info, "missing"),
        (motion_tensors | lora_tensors, replace(lora_info, lora_rank=RANK + 1), "another shape"),
        (motion_tensors | lora_tensors | {"conv_act.lora_A.weight": torch.zeros(RANK, 1)}, lora_info, "unexpected"),
    ]:
        assert said in refusal(write_student, path, tensors, one)
    assert not os.listdir(path.parent)


def test_nothing_is_left_where_nothing_can_be_written(path, info, unet):
    tensors = dict(unet.named_parameters())
    write_student(path, tensors, info)
    old = path.read_bytes()

    folder = path.with_name("folder.safetensors")
    folder.mkdir()
    for place in (path.parent / "no such" / "s.safetensors", path / "s.safetensors", folder):
        assert str(place) in refusal(write_student, place, tensors, info)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # stands for a full disk
    try:
        assert "make room" in refusal(write_student, path, tensors, replace(info, updates=151))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert sorted(os.listdir(path.parent)) == sorted([path.name, folder.name])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_right_to_write(path, info, unet):
    path.parent.chmod(0o500)
    assert "Permission denied" in refusal(write_student, path, dict(unet.named_parameters()), info)


def test_tensors_that_are_no_numbers_are_not_read(whole):
    tensors = load_file(whole)
    for value in (float("nan"), float("inf"), float("-inf")):
        broken = tensors["conv_in.weight"].clone()
        broken[0, 0, 0, 0] = value
        message = refusal(read_student, edited(whole, tensors | {"conv_in.weight": broken}))
        assert "NaN or infinite numbers in 1 of its tensors (such as conv_in.weight)" in message


def test_bytes_behind_the_last_tensor_are_told(whole):
    whole.write_bytes(whole.read_bytes() + bytes(24))
    assert "found 24 bytes behind the last of its tensors" in refusal(read_student, whole)


# ---- names ----


def test_names_that_no_file_can_have(tmp_path):
    for name in ("n" * 300, "n" * 5000, "é" * 150, "a/" * 600 + "a", "n" * 221):
        assert "choose a shorter one" in refusal(student_path, tmp_path, name)
    refusal(student_path, tmp_path, "a\ud800")
    assert student_path(tmp_path, "n" * 220).name == "n" * 220 + ".safetensors"


def test_student_path(tmp_path):
    assert student_path(tmp_path, "a v1.5") == tmp_path / "a v1.5.safetensors"
    assert student_path(tmp_path, "a.safetensors") == tmp_path / "a.safetensors"
    assert student_path(tmp_path, "deep/a") == student_path(tmp_path, "deep\\a") == tmp_path / "deep" / "a.safetensors"
    for name in (
        "",
        ".",
        "..",
        "../a",
        "a/../../b",
        "..\\a",
        "/a",
        "\\a",
        "//host/share/a",
        "C:a",
        "C:\\a",
        "a:b",
        "a\0b",
        "a\nb",
    ):
        refusal(student_path, tmp_path, name)


def test_a_file_of_another_suffix(path, info, motion_tensors, whole):
    """Neither written nor read, and told by a student's own error."""
    other = path.with_suffix(".ckpt")
    assert f"found {other}" in refusal(write_student, other, motion_tensors, replace(info, holds="motion"))
    save_file({"a": torch.zeros(2)}, other)
    assert "rename it to .safetensors" in refusal(read_student, other)
    assert sorted(os.listdir(path.parent)) == sorted([whole.name, other.name])
