import copy
import hashlib
import json
import os
import re
import resource
import stat
from dataclasses import replace

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avdm2_nodes.diffusion.samplers import student_timesteps
from avdm2_nodes.diffusion.unets import video_unet
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.student import read_student, student_path, write_student
from avdm2_nodes.files.student_info import FORMAT_VERSION, StudentFileError, StudentInfo, StyleUse
from avdm2_nodes.files.student_unet import student_unet

torch.set_num_threads(1)


def image_unet(widths=(32, 64), **settings):
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    settings = {"sample_size": 8, "layers_per_block": 1, "attention_head_dim": 4, "cross_attention_dim": 16} | kinds | settings
    torch.manual_seed(0)
    return UNet2DConditionModel(block_out_channels=widths, **settings).eval().requires_grad_(False)


def motion_adapter(widths=(32, 64)):
    torch.manual_seed(1)
    return MotionAdapter(
        block_out_channels=widths, motion_layers_per_block=1, motion_num_attention_heads=4, use_motion_mid_block=False
    )


@pytest.fixture(scope="module")
def base():
    return image_unet()


@pytest.fixture(scope="module")
def unet(base):
    return video_unet(base, motion_adapter()).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def info(base, unet):
    return StudentInfo(
        holds="all",
        timesteps=(999, 749, 499, 249),
        frames=8,
        height=64,
        width=48,
        unet_config=unet_config(unet),
        base_name="a base",
        base_hash=weights_hash(base),
        score_name="a style – neon",
        score_hash="0" * 64,
        updates=150,
        training_config="run: {seed: 1}\nsdm:\n  weight: 0.5\n",
        title="A student",
        date="2025-01-31",
        license="Apache-2.0",
    )


@pytest.fixture(scope="module")
def motion_tensors(unet):
    return {name: p for name, p in unet.named_parameters() if "motion_modules" in name}


TARGETS = r".*\.(to_q|ff\.net\.2|conv1|conv_shortcut|proj_in|time_emb_proj)"
RANK, ALPHA = 3, 7.5


@pytest.fixture(scope="module")
def adapted(unet):
    """The video UNet with peft's LoRA on spatial layers, linear and convolutional, nothing of it zero."""
    adapted = copy.deepcopy(unet)
    spatial = [name for name, _ in adapted.named_modules() if "motion_modules" not in name]
    targets = [name for name in spatial if re.fullmatch(TARGETS, name)]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), adapted, adapter_name="s")
    torch.manual_seed(2)
    for name, p in adapted.named_parameters():
        if ".lora_" in name:
            p.data = torch.randn(p.shape) * 0.05
    return adapted.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def lora_tensors(adapted):
    return {n.replace(".s.weight", ".weight"): p for n, p in adapted.named_parameters() if n.endswith(".s.weight")}


@pytest.fixture(scope="module")
def lora_info(info):
    return replace(info, holds="motion+lora", lora_rank=RANK, lora_alpha=ALPHA)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a student.safetensors"


def predictions(*unets):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 3, 8, 8, generator=generator)
    text = torch.randn(3, 5, 16, generator=generator)
    with torch.no_grad():
        return [unet(x, torch.tensor([500]), text, return_dict=False)[0] for unet in unets]


def refusal(function, *args):
    with pytest.raises(StudentFileError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def edited(path, tensors=None, **metadata):
    """The file at `path` with other tensors or metadata (None: left out)."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
    new = old | {f"avdm2.{key}": value for key, value in metadata.items()}
    save_file(load_file(path) if tensors is None else tensors, path, {k: v for k, v in new.items() if v is not None})
    return path


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


def test_metadata_round_trip_without_what_is_optional(info, lora_info):
    for one in (info, lora_info, replace(info, score_name=None, score_hash=None)):
        metadata = one.to_metadata()
        assert all(isinstance(value, str) for value in metadata.values())
        assert StudentInfo.from_metadata(metadata, "x") == one


def test_metadata_has_the_modelspec_keys(info):
    metadata = info.to_metadata()
    keys = "sai_model_spec", "architecture", "implementation", "title", "date", "license", "usage_hint"
    assert all(metadata[f"modelspec.{key}"] for key in keys)
    assert metadata["modelspec.license"] == "Apache-2.0"
    assert "999, 749, 499, 249" in metadata["modelspec.usage_hint"]
    assert metadata["avdm2.training_config"] == info.training_config


def test_the_file_has_the_mode_that_the_umask_gives(path, info, motion_tensors):
    ordinary = path.with_name("ordinary")
    ordinary.touch()
    write_student(path, motion_tensors, replace(info, holds="motion"))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_whole_student_is_the_unet_without_any_base(path, info, unet, base):
    write_student(path, dict(unet.named_parameters()), info)
    built, checked = student_unet(read_student(path)), student_unet(read_student(path), base)
    assert not built.training and not any(p.requires_grad for p in built.parameters())
    assert all(p.dtype == torch.float32 for p in built.parameters())
    want, *got = predictions(unet, built, checked)
    assert all(torch.equal(want, g) for g in got)


def test_motion_student_is_the_unet_on_its_base(path, info, unet, base, motion_tensors):
    write_student(path, motion_tensors, replace(info, holds="motion"))
    want, got = predictions(unet, student_unet(read_student(path), base))
    assert torch.equal(want, got)


def test_a_half_precision_base_of_the_same_weights_serves(path, info, base):
    half = copy.deepcopy(base).half()
    unet = video_unet(copy.deepcopy(half).float(), motion_adapter()).eval().requires_grad_(False)
    tensors = {name: p for name, p in unet.named_parameters() if "motion_modules" in name}
    write_student(path, tensors, replace(info, holds="motion", base_hash=weights_hash(half)))
    built = student_unet(read_student(path), half)
    want, got = predictions(unet, built)
    assert torch.equal(want, got) and built.dtype == torch.float32 and half.dtype == torch.float16


def test_lora_student_equals_pefts_forward(path, lora_info, adapted, unet, base, motion_tensors, lora_tensors):
    assert {t.ndim for t in lora_tensors.values()} == {2, 4}
    before = weights_hash(base)
    write_student(path, motion_tensors | lora_tensors, lora_info)
    want, plain, got = predictions(adapted, unet, student_unet(read_student(path), base))
    assert (want - plain).abs().max() > 0.01
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert weights_hash(base) == before


def test_position_encodings_in_the_file_are_used(path, info, unet):
    state = unet.state_dict()
    encodings = {name: tensor.half() for name, tensor in state.items() if name.endswith("pos_embed.pe")}
    assert encodings
    write_student(path, state | encodings, info)
    built = student_unet(read_student(path)).state_dict()
    assert all(torch.equal(built[name], tensor.float()) for name, tensor in encodings.items())


# ---- what is refused ----


@pytest.fixture
def whole(path, info, unet):
    write_student(path, dict(unet.named_parameters()), info)
    return path


def test_truncated_files(whole):
    content = whole.read_bytes()
    for length in (0, 4, 500, len(content) // 2, len(content) - 1):
        whole.write_bytes(content[:length])
        assert "truncated" in (message := refusal(read_student, whole)) and str(whole) in message


def test_missing_file_and_folder(path):
    assert "found nothing" in refusal(read_student, path)
    path.mkdir()
    assert "found a folder" in refusal(read_student, path)


def test_a_file_that_is_no_safetensors(path):
    torch.save({"a": torch.zeros(2)}, path)
    assert "of another kind" in refusal(read_student, path)


def test_safetensors_that_are_no_student(path):
    lora = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"
    for metadata in (None, {"format": "pt"}):
        for name, said in (("a", "an unknown file with keys such as 'a'"), (lora, "an SD LoRA (kohya keys)")):
            save_file({name: torch.zeros(2, 2)}, path, metadata)
            assert refusal(read_student, path) == f"Expected a student file at {path}, found {said}; choose a student."


def test_styles_in_its_weights_are_on_record(whole, info, path):
    """Without any, the file is as before there were styles."""
    uses = tuple(StyleUse(name=f"style – {i}", hash=f"{i}" * 64, mode="transplant", strength=0.5 * i) for i in range(3))
    styled = replace(info, styles=uses)
    assert StudentInfo.from_metadata(styled.to_metadata(), path) == styled
    assert "avdm2.styles" not in info.to_metadata()
    said = json.dumps([{"name": "a", "hash": "0" * 64, "mode": "by magic", "strength": 1.0}])
    assert "styles.0.mode 'by magic'" in refusal(read_student, edited(whole, styles=said))


def test_newer_format(whole):
    message = refusal(read_student, edited(whole, format_version=str(FORMAT_VERSION + 1), holds="what is not known yet"))
    assert f"found {FORMAT_VERSION + 1}" in message and "update" in message


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("holds", "half", "holds 'half'"),
        ("holds", None, "no holds"),
        ("format_version", "one", "format_version 'one'"),
        ("timesteps", "[1, 2]", "descending"),
        ("timesteps", "[]", "descending"),
        ("timesteps", "[1000]", "timesteps.0"),
        ("timesteps", "[999", "JSON"),
        ("unet_config", "[" * 100_000, "JSON"),
        ("unet_config", "{}", "another architecture"),
        ("unet_config", '{"depth": 3}', "another architecture"),
        ("beta_schedule", "scaled_linear", "beta_schedule"),
        ("prediction_type", "v_prediction", "prediction_type"),
        ("frames", "0", "frames '0'"),
        ("base_hash", "ab", "base_hash"),
        ("lora_rank", "4", "LoRA rank"),
    ],
)
def test_wrong_metadata(whole, key, value, said):
    message = refusal(read_student, edited(whole, **{key: value}))
    assert said in message and str(whole) in message


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


def test_info_that_contradicts_itself(info):
    for changes in (
        {"holds": "motion+lora"},
        {"lora_rank": 4},
        {"timesteps": (249, 499)},
        {"format_version": FORMAT_VERSION + 1},
    ):
        with pytest.raises(ValueError):
            replace(info, **changes)


def test_base_of_another_architecture(whole, base):
    student = read_student(whole)
    assert "block_out_channels" in refusal(student_unet, student, image_unet((64, 64)))
    assert "num_attention_heads" in refusal(student_unet, student, image_unet(attention_head_dim=8))
    assert "cross_attention_dim" in refusal(student_unet, student, image_unet(cross_attention_dim=32))
    extra = copy.deepcopy(base)
    extra.class_embedding = torch.nn.Linear(2, 2)
    assert "class_embedding.bias" in refusal(student_unet, student, extra)
    # Written once a block, and made for another size of picture, it is the same architecture.
    student_unet(student, image_unet(attention_head_dim=[4, 4], sample_size=16))


def test_partial_student_wants_its_base(path, info, base, motion_tensors):
    write_student(path, motion_tensors, replace(info, holds="motion"))
    student = read_student(path)
    assert "found none" in refusal(student_unet, student)
    other = copy.deepcopy(base)
    other.conv_in.weight.data += 0.01
    message = refusal(student_unet, student, other)
    assert info.base_hash[:12] in message and weights_hash(other)[:12] in message and str(path) in message


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


# ---- names, timesteps, hashes ----


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


def test_student_timesteps():
    own = (900, 700, 400, 100)
    assert student_timesteps(own, 4) == list(own)
    assert student_timesteps(own, 2) == [999, 499]
    with pytest.raises(ValueError):
        student_timesteps(own, 0)


def test_weights_hash_is_of_the_weights_alone(base, tmp_path):
    rounded = copy.deepcopy(base).half()
    assert weights_hash(rounded) == weights_hash(copy.deepcopy(rounded).float()) == weights_hash(base)
    rounded.save_pretrained(tmp_path)
    assert weights_hash(UNet2DConditionModel.from_pretrained(tmp_path)) == weights_hash(base)
    assert weights_hash(copy.deepcopy(base).to(memory_format=torch.channels_last)) == weights_hash(base)
    changed = copy.deepcopy(base)
    changed.conv_out.bias.data[0] += 1e-2
    assert weights_hash(changed) != weights_hash(base)


def test_weights_hash_stays_what_it_was():
    module = torch.nn.Linear(2, 1)
    module.load_state_dict({"weight": torch.tensor([[0.5, -2.0]]), "bias": torch.tensor([1.0])})
    told = b"bias [1]\n\x00\x3cweight [1, 2]\n\x00\x38\x00\xc0"
    assert weights_hash(module) == hashlib.sha256(told).hexdigest()
