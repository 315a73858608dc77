import dataclasses

import pytest
import torch
from diffusers import UNetMotionModel

from avdm2_nodes.diffusion.interchange import export_animatediff
from avdm2_nodes.diffusion.motion_file import load_motion_file
from avdm2_nodes.diffusion.recognise import read_layout, recognise
from avdm2_nodes.diffusion.student_file import Student, StudentFileError, StudentInfo, student_unet, unet_config, weights_hash


@pytest.fixture
def students(stack):
    """A student of each kind, its changes large enough to see."""
    unet, generator = stack.teacher, torch.Generator().manual_seed(0)
    motion = {k: v + 0.01 for k, v in unet.named_parameters() if "motion_modules" in k}
    lora = {}
    for name in ("down_blocks.0.resnets.0.conv1", "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"):
        weight = unet.get_parameter(f"{name}.weight")
        lora[f"{name}.lora_A.weight"] = torch.randn(2, *weight.shape[1:], generator=generator)
        ones = (1,) * (weight.ndim - 2)
        lora[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], 2, *ones, generator=generator)

    def make(holds, tensors, **more):
        info = StudentInfo(
            holds=holds, timesteps=(999, 499), frames=8, height=64, width=64, unet_config=unet_config(unet), base_name="tiny",
            base_hash=weights_hash(stack.image_unet), updates=1, training_config="", title="t", date="2026-01-01", license="x", **more,
        )  # fmt: skip
        return Student(info, tensors)

    return {
        "all": make("all", dict(unet.named_parameters())),
        "motion": make("motion", motion),
        "motion+lora": make("motion+lora", motion | lora, lora_rank=2, lora_alpha=4.0),
    }


def test_the_files_hold_the_student(stack, students, tmp_path):
    motion_path, lora_path = export_animatediff(students["motion+lora"], tmp_path, "sub/mine")
    assert (motion_path, lora_path) == (tmp_path / "sub/mine_motion.safetensors", tmp_path / "sub/mine_lora.safetensors")
    assert recognise(read_layout(motion_path)).id.startswith("motion-") and recognise(read_layout(lora_path)).id == "lora"
    assert "modelspec.title" in read_layout(lora_path).metadata
    # The way that others go: the motion modules into a video UNet, then the LoRA by diffusers' own loader.
    motion = load_motion_file(motion_path, norm_groups=8)
    assert motion.config.motion_num_attention_heads == 2  # noted in the metadata, for the shapes do not tell
    theirs = UNetMotionModel.from_unet2d(stack.image_unet, motion)
    from diffusers import AnimateDiffPipeline, DDIMScheduler

    pipeline = AnimateDiffPipeline(stack.vae, stack.text_encoder, stack.tokenizer, theirs, None, DDIMScheduler())
    pipeline.load_lora_weights(str(lora_path))
    ours = student_unet(students["motion+lora"], stack.image_unet)
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 3, 8, 8, generator=generator), torch.randn(3, 32, 32, generator=generator)
    with torch.no_grad():
        expected = ours(x, 500, text).sample
        torch.testing.assert_close(pipeline.unet(x, 500, text).sample, expected, rtol=1e-2, atol=1e-2)
        plain = UNetMotionModel.from_unet2d(stack.image_unet, motion)(x, 500, text).sample
    assert (plain - expected).abs().max() > 0.05  # the LoRA is in it


def test_motion_alone_is_one_file(students, tmp_path):
    assert export_animatediff(students["motion"], tmp_path, "m") == [tmp_path / "m_motion.safetensors"]


def test_the_lora_goes_where_it_is_told(students, tmp_path):
    folders = tmp_path / "motion", tmp_path / "loras"
    paths = export_animatediff(students["motion+lora"], folders[0], "a/m", folders[1])
    assert paths == [folders[0] / "a/m_motion.safetensors", folders[1] / "a/m_lora.safetensors"]
    assert all(path.is_file() for path in paths)
    export_animatediff(students["motion"], folders[0], "b/m", folders[1])
    assert not (folders[1] / "b").exists(), "no LoRA, no folder"


def test_what_these_formats_have_no_place_for_is_refused(students, tmp_path):
    with pytest.raises(StudentFileError, match="found one that holds all its weights"):
        export_animatediff(students["all"], tmp_path, "m")
    with pytest.raises(StudentFileError, match="leave out"):
        export_animatediff(students["motion"], tmp_path, "../m")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_no_half_is_left(students, tmp_path, monkeypatch):
    (tmp_path / "m_lora.safetensors").write_text("mine")
    with pytest.raises(StudentFileError, match=r"found m_lora\.safetensors there already"):
        export_animatediff(students["motion+lora"], tmp_path, "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m_lora.safetensors"]
    broken = dataclasses.replace(students["motion+lora"], tensors={**students["motion"].tensors})
    with pytest.raises(ValueError, match="found none"):
        export_animatediff(broken, tmp_path, "n")
    assert [p.name for p in tmp_path.iterdir()] == ["m_lora.safetensors"]
