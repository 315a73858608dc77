import json
import re

import pytest
import torch
from diffusers import MotionAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avdm2_nodes.diffusion.unets import video_unet
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.containers import FileFormatError, read_layout
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.motion import export_motion_file, load_motion_file, to_diffusers_keys, to_original_keys
from avdm2_nodes.files.recognise import recognise
from avdm2_nodes.files.student import read_student, write_student
from avdm2_nodes.files.student_info import StudentInfo
from tests.avdm2_nodes.files.original_layouts import SD15, original_checkpoint, original_motion, sinusoid, values

torch.set_num_threads(1)

WIDTHS = (32, 32, 64, 64)
# What the published kinds look like: position encoding of how many frames, modules in the mid block or not, how many keys.
KINDS = {"v1": (24, False, 560), "v2": (32, True, 588), "v3": (32, False, 560), "animatelcm": (None, True, 546)}


def refusal(function, *args, **options):
    with pytest.raises(FileFormatError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and message.startswith("Expected")
    return message


def original_tensors(kind, dtype=torch.float32):
    frames, mid, _ = KINDS[kind]
    return values(original_motion(WIDTHS, frames, mid), dtype=dtype)


def diffusers_config(kind):
    """Written out, as the configuration of the diffusers repository of such a module has it."""
    frames, mid, _ = KINDS[kind]
    return {
        "_class_name": "MotionAdapter",
        "block_out_channels": list(WIDTHS),
        "motion_layers_per_block": 2,
        "motion_mid_block_layers_per_block": 1,
        "motion_num_attention_heads": 8,
        "motion_norm_num_groups": 32,
        "motion_max_seq_length": frames or 64,
        "use_motion_mid_block": mid,
    }


@pytest.fixture(scope="module")
def originals():
    return {kind: original_tensors(kind) for kind in KINDS}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mm.safetensors"


# ---- reading ----


@pytest.mark.parametrize("kind", ["v1", "v2", "v3"])
def test_a_module_is_what_diffusers_makes_of_it(originals, kind, tmp_path, path):
    save_file(originals[kind], path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(diffusers_config(kind)))
    theirs = MotionAdapter.from_single_file(str(path), config=str(tmp_path / "config"), local_files_only=True)
    mine = load_motion_file(path)
    expected, found = theirs.state_dict(), mine.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # The sinusoid of the test and diffusers' own are the same up to the last bit of float32.
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6 if name.endswith(".pe") else 0)
    said = {key: value for key, value in mine.config.items() if key in diffusers_config(kind)}
    assert said | {"_class_name": "MotionAdapter"} == diffusers_config(kind) | {"block_out_channels": WIDTHS}
    assert not mine.training and all(p.dtype == torch.float32 and not p.requires_grad for p in mine.parameters())
    assert not any(t.is_meta for t in found.values())


def test_animatelcm_gets_the_sinusoid_of_64_frames(originals, path):
    save_file(originals["animatelcm"], path)
    motion = load_motion_file(path)
    assert motion.config.motion_max_seq_length == 64 and motion.config.use_motion_mid_block
    expected = MotionAdapter(block_out_channels=WIDTHS, motion_max_seq_length=64).state_dict()
    found = motion.state_dict()
    assert found.keys() == expected.keys()
    positions = [name for name in found if name.endswith(".pe")]
    assert len(positions) == 21 and all(torch.equal(found[name], expected[name]) for name in positions)
    for name in positions:
        torch.testing.assert_close(found[name], sinusoid(*found[name].shape[1:]), rtol=0, atol=1e-5)


def test_the_position_encoding_of_the_file_is_kept(originals, path):
    """diffusers drops it: a module that was trained with another would lose it there."""
    tensors = dict(originals["v3"])
    generator = torch.Generator().manual_seed(1)
    for name in tensors:
        if name.endswith("blocks.0.pos_encoder.pe"):
            own = torch.randn(tensors[name].shape, generator=generator)
            tensors[name] = own
            tensors[name.replace("blocks.0.pos", "blocks.1.pos")] = own.clone()
    save_file(tensors, path)
    found = load_motion_file(path).state_dict()
    name = "up_blocks.1.motion_modules.2.{}transformer_blocks.0.{}"
    mine = found[name.format("", "pos_embed.pe")]
    assert torch.equal(mine, tensors[name.format("temporal_transformer.", "attention_blocks.1.pos_encoder.pe")])
    assert not torch.allclose(mine, sinusoid(*mine.shape[1:]), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(path, dtype):
    tensors = original_tensors("v1", dtype)
    save_file(tensors, path)
    found = load_motion_file(path).state_dict()
    name = "down_blocks.0.motion_modules.0.{}proj_in.weight"
    assert torch.equal(found[name.format("")], tensors[name.format("temporal_transformer.")].float())
    assert all(t.dtype == torch.float32 for t in found.values())


def test_a_checkpoint_of_the_authors_training(originals, path):
    save_file(originals["v1"], path)
    expected = load_motion_file(path).state_dict()
    ckpt = path.with_suffix(".ckpt")
    torch.save({"epoch": 1, "global_step": 2, "state_dict": {f"module.{k}": t for k, t in originals["v1"].items()}}, ckpt)
    found = load_motion_file(ckpt).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_diffusers_twin_of_a_file(originals, path):
    """AnimateDiff-Lightning has both; the twin is a MotionAdapter's state_dict."""
    save_file(originals["v2"], path)
    motion = load_motion_file(path)
    twin = path.with_name("lightning_diffusers.safetensors")
    save_file(motion.state_dict(), twin)
    found = load_motion_file(twin)
    assert found.config == motion.config
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), motion.state_dict().values(), strict=True))


def test_the_weights_do_not_hang_on_the_file(originals, path):
    save_file(originals["v1"], path)
    motion = load_motion_file(path)
    with path.open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\xff" * 4096)
    assert all(torch.isfinite(t).all() for t in motion.state_dict().values())


def test_other_heads_and_norm_groups_may_be_named(make_motion, path):
    """Those of a small module, as the miniature's: three blocks, one layer each."""
    motion = make_motion((40, 48, 48))
    export_motion_file(motion.state_dict(), path, {}, torch.float32)
    assert "8 heads and 32 norm groups" in refusal(load_motion_file, path)
    found = load_motion_file(path, heads=2, norm_groups=8)
    said = {key: value for key, value in found.config.items() if not key.startswith("_")}
    assert said == {key: value for key, value in motion.config.items() if not key.startswith("_")}
    assert all(torch.equal(found.state_dict()[name], t) for name, t in motion.state_dict().items())


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "unet.", "module.unet.", "model.", "motion_module.", "state_dict."]
)
def test_prefixes_of_training_code_are_taken_off(originals, path, prefix):
    save_file(originals["v3"], path)
    expected = load_motion_file(path).state_dict()
    save_file({prefix + name: tensor for name, tensor in originals["v3"].items()}, path)
    found = load_motion_file(path).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_of_a_whole_video_unet_the_motion_modules_are_taken(originals, path):
    """As AnimateDiff's own training saves it."""
    spatial = {
        "conv_in.weight": (32, 4, 3, 3),
        "time_embedding.linear_1.weight": (128, 32),
        "down_blocks.0.resnets.0.conv1.weight": (32, 32, 3, 3),
    }
    for kind in ("v1", "v2"):
        save_file(originals[kind], path)
        expected = load_motion_file(path).state_dict()
        whole = {f"module.{name}": tensor for name, tensor in (originals[kind] | values(spatial)).items()}
        torch.save({"epoch": 1, "global_step": 5, "state_dict": whole}, path.with_suffix(".ckpt"))
        found = load_motion_file(path.with_suffix(".ckpt")).state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- names ----


@pytest.mark.parametrize("kind", ["v1", "v2", "v3"])
def test_names_there_and_back(originals, kind):
    original = originals[kind]
    assert len(original) == KINDS[kind][2]
    converted = to_diffusers_keys(original)
    with torch.device("meta"):
        motion = MotionAdapter.from_config({k: v for k, v in diffusers_config(kind).items() if k != "_class_name"})
    assert {k: t.shape for k, t in converted.items()} == {k: t.shape for k, t in motion.state_dict().items()}
    assert to_diffusers_keys(converted).keys() == converted.keys()
    back = to_original_keys(converted)
    assert len(back) == KINDS[kind][2] and back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


# ---- writing ----


@pytest.mark.parametrize("kind", ["v1", "v2", "v3"])
def test_exported_and_loaded_again(originals, kind, path, tmp_path):
    """In float16 only the position encoding loses anything where the weights are representable."""
    original = {name: t if name.endswith(".pe") else t.half().float() for name, t in originals[kind].items()}
    save_file(original, path)
    motion, exported = load_motion_file(path), tmp_path / "exported.safetensors"
    export_motion_file(motion.state_dict(), exported, {"modelspec.title": "mine"})
    written = load_file(exported)
    assert written.keys() == original.keys() and len(written) == KINDS[kind][2]
    assert all(tensor.dtype == torch.float16 for tensor in written.values())
    worst = max((written[n].float() - t).abs().max().item() for n, t in original.items() if n.endswith(".pe"))
    assert 0 < worst <= 2**-12  # half a unit in the last place of float16 below 1
    assert all(torch.equal(written[n].float(), t) for n, t in original.items() if not n.endswith(".pe"))
    layout = read_layout(exported)
    assert layout.metadata == {"modelspec.title": "mine"} and recognise(layout).id == f"motion-{kind}"
    again, found = load_motion_file(exported), motion.state_dict()
    assert again.config == motion.config
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, found[name].half().float()), name


def test_of_a_video_unet_the_motion_modules_are_written(stack, path):
    export_motion_file(stack.teacher.state_dict(), path, {}, torch.float32)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert names == set(to_original_keys(stack.motion.state_dict()))
    found = load_motion_file(path, heads=2, norm_groups=8)
    assert weights_hash(found) == weights_hash(stack.motion)
    assert weights_hash(video_unet(stack.image_unet, found)) == weights_hash(stack.teacher)


def test_of_a_student_the_motion_modules_are_written(stack, path):
    info = StudentInfo(
        holds="motion", timesteps=(999,), frames=8, height=64, width=64, unet_config=unet_config(stack.teacher), base_name="a base",
        base_hash=weights_hash(stack.image_unet), updates=1, training_config="", title="", date="2025-01-31", license="Apache-2.0",
    )  # fmt: skip
    motion = {name: tensor for name, tensor in stack.teacher.state_dict().items() if "motion_modules" in name}
    write_student(path, motion, info)
    assert "found an AVDM2 student" in refusal(load_motion_file, path)
    exported = path.with_name("exported.safetensors")
    export_motion_file(read_student(path).tensors, exported, {}, torch.float32)
    found = load_motion_file(exported, heads=2, norm_groups=8).state_dict()
    assert found.keys() == motion.keys() and all(torch.equal(found[name], tensor) for name, tensor in motion.items())


def test_what_cannot_be_exported(originals, path):
    tensors = to_diffusers_keys(originals["v1"])
    one = "up_blocks.3.motion_modules.1.transformer_blocks.0.pos_embed.pe"
    assert "found none of up_blocks.3.motion_modules.1" in refusal(
        export_motion_file, {k: t for k, t in tensors.items() if k != one}, path, {}
    )
    assert "found none of" in refusal(export_motion_file, to_diffusers_keys(originals["animatelcm"]), path, {})
    assert "found no motion module" in refusal(export_motion_file, {"conv_in.weight": torch.ones(1)}, path, {})
    assert ".safetensors" in refusal(export_motion_file, tensors, path.with_suffix(".ckpt"), {})
    assert not path.exists()


# ---- what is refused ----


def test_other_files_are_refused_by_what_they_are(path):
    lora = "lora_unet_down_blocks_0_attentions_0_proj_in"
    for tensors, found in (
        (
            {f"{lora}.lora_down.weight": (4, 32), f"{lora}.lora_up.weight": (32, 4), f"{lora}.alpha": ()},
            "an SD LoRA (kohya keys)",
        ),
        (original_checkpoint((32,) * 4, 16, (32,) * 4, 1, 10), "an SD1.5 checkpoint"),
        (original_motion((320, 640, 1280)), "an SDXL motion module"),
        (original_motion(WIDTHS, None), "a motion module without position encodings"),
        (original_motion(WIDTHS) | {"conv_in.weight": (32, 9, 3, 3)}, "a motion module with layers that AnimateDiff has not"),
    ):
        save_file({name: torch.zeros(shape, dtype=torch.uint8) for name, shape in tensors.items()}, path)
        message = refusal(load_motion_file, path)
        assert message.startswith(f"Expected an AnimateDiff motion module for SD1.5 at {path}, found {found}")


def without(tensors, pattern):
    return {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}


def test_damaged_modules_are_refused(originals, path):
    original = originals["v1"]
    name = "down_blocks.1.motion_modules.0.temporal_transformer.{}"
    second = name.format("transformer_blocks.0.attention_blocks.1.pos_encoder.pe")
    for tensors, said in (
        (without(original, r"up_blocks\.2.*to_q"), "up_blocks.2.motion_modules.0.transformer_blocks.0.attn1.to_q.weight"),
        (without(original, r"up_blocks\.3"), "up_blocks.3"),
        (without(original, r"down_blocks\.0\.motion_modules\.0"), "widths (32, 64, 64)"),
        (without(original, r"down_blocks\.1.*pos_encoder"), "down_blocks.1.motion_modules.0.transformer_blocks.0.pos_embed.pe"),
        (without(original, re.escape(second)), "unlike that of the other attention block"),
        (original | {second: original[second] + 0.1}, "unlike that of the other attention block"),
        (original | {name.format("transformer_blocks.0.attention_blocks.2.to_q.weight"): torch.ones(2)}, "attention_blocks.2"),
        (original | {name.format("proj_in.weight"): torch.ones(32, 16)}, "down_blocks.1.motion_modules.0.proj_in.weight"),
    ):
        save_file(tensors, path)
        assert said in refusal(load_motion_file, path)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("proj_in.weight", lambda t: t.to(torch.int8), "no floating numbers in 1 of its tensors"),
        ("proj_in.weight", lambda t: t.bool(), "no floating numbers"),
        ("proj_in.weight", lambda t: t.to(torch.complex64), "no floating numbers"),
        ("proj_in.weight", lambda t: torch.zeros(0, 32), "no floating numbers"),
        ("norm.weight", lambda t: torch.zeros(5 * 10**8, 0), "no floating numbers"),
        ("proj_in.weight", lambda t: t.index_fill(0, torch.tensor([3]), float("nan")), "NaN or infinite numbers"),
        ("proj_in.weight", lambda t: t.index_fill(0, torch.tensor([3]), float("-inf")), "NaN or infinite numbers"),
        ("proj_in.weight", lambda t: t.double().index_fill(0, torch.tensor([3]), 1e300), "NaN or infinite numbers"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(originals, path, name, change, said):
    key = f"down_blocks.1.motion_modules.0.temporal_transformer.{name}"
    save_file(originals["v2"] | {key: change(originals["v2"][key])}, path)
    message = refusal(load_motion_file, path)
    assert said in message and f"such as {key}" in message


def test_sizes_are_looked_at_before_a_network_is_made(originals, path):
    norm = "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"
    lcm, v2 = originals["animatelcm"], originals["v2"]
    blocks = {norm.replace("0", str(i), 1): torch.ones(32) for i in range(3000)}
    layers = {norm.replace("modules.0", f"modules.{i}"): torch.ones(32) for i in range(3000)}
    flat = {key: tensor.flatten() if key.endswith(".pe") else tensor for key, tensor in v2.items()}
    for tensors, said in (
        (lcm | {norm: torch.ones(33)}, "widths (33, 32, 64, 64)"),
        (lcm | {norm: torch.tensor(1.0)}, "widths (32, 64, 64)"),
        (
            lcm | {norm.replace("norm", "transformer_blocks.0.norms.0"): torch.ones(33)},
            "1 layers unlike those of one of widths",
        ),
        (v2 | blocks, "3000 blocks"),
        (v2 | layers, "of 3000 layers"),
        (flat, "without position encodings"),
    ):
        save_file(tensors, path)
        assert said in refusal(load_motion_file, path)


def test_a_noted_number_of_heads_that_is_none(originals, path):
    for noted in ("9" * 5000, "", "0", "-3", "x"):
        save_file(originals["v1"], path, {"avdm2.motion_heads": noted})
        assert load_motion_file(path).config.motion_num_attention_heads == 8


def test_the_layout_at_full_size():
    """Keys and shapes alone, on the meta device."""
    with torch.device("meta"):
        motion = MotionAdapter(motion_max_seq_length=32, use_motion_mid_block=True)
    found = {name: tuple(tensor.shape) for name, tensor in to_original_keys(motion.state_dict()).items()}
    assert found == original_motion(SD15["widths"], 32, True) and len(found) == 588
