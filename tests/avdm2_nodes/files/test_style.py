from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avdm2_nodes.diffusion.style import add_change
from avdm2_nodes.diffusion.unets import video_predictor, video_unet
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.student import Student
from avdm2_nodes.files.student_info import StudentInfo
from avdm2_nodes.files.style import (
    STYLE_VERSION,
    StyleFileError,
    StyleInfo,
    lora_change,
    read_style,
    require_student,
    student_hash,
    write_style,
)


@pytest.fixture
def student(stack):
    tensors = dict(stack.teacher.named_parameters()) | dict(stack.teacher.named_buffers())
    info = StudentInfo(
        holds="all", timesteps=(999, 499), frames=8, height=64, width=64, unet_config=unet_config(stack.teacher), base_name="tiny",
        base_hash=weights_hash(stack.image_unet), updates=1, training_config="", title="A student", date="2026-01-31",
        license="Apache-2.0",
    )  # fmt: skip
    return Student(info, {name: t.detach().half() for name, t in tensors.items()}, "student.safetensors")


@pytest.fixture
def info(student):
    return StyleInfo(
        name="ink – wash", hash="0" * 64, student_name="A student", student_hash=student_hash(student), lora_rank=3, lora_alpha=6.0,
        updates=40, training_config="run: {seed: 1}\n", title="Ink", date="2026-02-01", license="Apache-2.0",
    )  # fmt: skip


@pytest.fixture
def adapted(stack):
    """A video UNet with LoRA by peft on layers of each kind, and the LoRA's tensors."""
    torch.manual_seed(3)
    unet = video_unet(stack.image_unet, stack.motion).eval().requires_grad_(False)
    targets = r".*\.(to_q|ff\.net\.2|conv1)"
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6.0, target_modules=targets, init_lora_weights=False), unet)
    return unet, {n.replace(".default.", "."): p for n, p in unet.named_parameters() if ".lora_" in n}


@pytest.fixture
def tensors(adapted):
    return {name: tensor.detach().half() for name, tensor in adapted[1].items()}


def test_what_is_written_is_read(tmp_path, tensors, info):
    write_style(tmp_path / "ink.safetensors", tensors, info)
    read = read_style(tmp_path / "ink.safetensors")
    assert read.info == info and read.tensors.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in read.tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["ink.safetensors"]
    with safe_open(tmp_path / "ink.safetensors", framework="pt") as file:
        assert file.metadata()["avdm2.style_version"] == str(STYLE_VERSION)
        assert file.metadata()["modelspec.title"] == "Ink"


def test_laid_on_the_weights_it_is_peft_s_adapter(stack, adapted, tmp_path, info):
    unet, lora = adapted
    write_style(tmp_path / "ink.safetensors", lora, info)
    x, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 32, 32)
    plain = video_unet(stack.image_unet, stack.motion).eval()
    with torch.no_grad():
        expected, before = (video_predictor(u)(x, torch.tensor([500]), text) for u in (unet, plain))
        add_change(plain, lora_change(read_style(tmp_path / "ink.safetensors")), 1.0)
        found = video_predictor(plain)(x, torch.tensor([500]), text)
    size = (expected - before).abs().max()
    assert (found - expected).abs().max() < 1e-3 * size and size > 0


def test_another_student_is_refused(student, info, tensors, tmp_path):
    write_style(tmp_path / "ink.safetensors", tensors, info)
    style = read_style(tmp_path / "ink.safetensors")
    require_student(style, student)
    other = dict(student.tensors)
    other["conv_in.bias"] = other["conv_in.bias"] + 1
    with pytest.raises(
        StyleFileError, match=r"Expected the student A student .* for the style .*ink.safetensors, found student.*; load"
    ):
        require_student(style, replace(student, tensors=other))


def test_position_encodings_do_not_make_another_student(student):
    bare = {name: t for name, t in student.tensors.items() if not name.endswith(".pe")}
    assert len(bare) < len(student.tensors) and student_hash(replace(student, tensors=bare)) == student_hash(student)


def test_layers_that_the_student_does_not_have_are_refused(student, info, tmp_path):
    foreign = {"conv_in.lora_A.weight": torch.zeros(3, 5, 3, 3), "conv_in.lora_B.weight": torch.zeros(32, 3, 1, 1)}
    write_style(tmp_path / "ink.safetensors", foreign, info)
    with pytest.raises(StyleFileError, match=r"found 1 tensors of others \(such as conv_in.lora_A.weight\)"):
        require_student(read_style(tmp_path / "ink.safetensors"), student)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.pop(min(t)), "missing or of another kind"),
        (lambda t: t.update(extra=torch.zeros(2)), "missing or of another kind"),
        (lambda t: t.update({min(t): t[min(t)][:2]}), "missing or of another kind"),
        (lambda t: t.update({min(t): t[min(t)] * torch.nan}), "missing or of another kind"),
        (lambda t: t.update({min(t): t[min(t)].int()}), "missing or of another kind"),
        (lambda t: t.clear(), "found none"),
    ],
)
def test_tensors_that_are_no_lora_are_neither_written_nor_read(tmp_path, tensors, info, spoil, said):
    spoil(tensors)
    path = tmp_path / "ink.safetensors"
    with pytest.raises(StyleFileError, match=rf"Expected LoRA of rank 3 in .*{said}"):
        write_style(path, tensors, info)
    assert not list(tmp_path.iterdir())
    save_file(tensors, path, info.to_metadata())
    with pytest.raises(StyleFileError, match=rf"Expected LoRA of rank 3 in .*{said}"):
        read_style(path)


def test_files_that_are_no_styles_are_refused(tmp_path, tensors, info):
    path = tmp_path / "ink.safetensors"
    with pytest.raises(StyleFileError, match="found nothing; check the path"):
        read_style(path)
    with pytest.raises(StyleFileError, match="found a folder; check the path"):
        read_style(tmp_path)
    path.write_bytes(b"no tensors")
    with pytest.raises(
        StyleFileError, match=r"truncated or damaged \(it announces a header of 8030883942550761326 bytes and has 10 in all"
    ):
        read_style(path)
    write_style(path, tensors, info)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(StyleFileError, match=r"truncated or damaged \(\d+ bytes in place of \d+\)"):
        read_style(path)
    path.write_bytes(whole)
    loaded = load_file(path)
    for metadata, said in (
        ({}, "tensors of another kind; choose a style"),
        ({"avdm2.format_version": "1"}, "tensors of another kind; choose a style"),
        (info.to_metadata() | {"avdm2.style_version": "2"}, "version 1 or older in .*, found 2; update"),
        (info.to_metadata() | {"avdm2.lora_rank": "many"}, "found its lora_rank wrong"),
        ({k: v for k, v in info.to_metadata().items() if k != "avdm2.hash"}, "found its hash wrong"),
    ):
        save_file(loaded, path, metadata)
        with pytest.raises(StyleFileError, match=said):
            read_style(path)


def test_no_folder_to_write_to_is_told(tmp_path, tensors, info):
    with pytest.raises(StyleFileError, match=r"Expected room and the right to write .*; name another place"):
        write_style(tmp_path / "gone" / "ink.safetensors", tensors, info)
