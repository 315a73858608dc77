"""What is known of a MODEL's base, whatever core has made of its file."""

import pytest
import torch

from avdm2_nodes.files.containers import write_tensors
from avdm2_nodes.files.hashes import weights_hash


@pytest.fixture
def room(comfyui):
    return comfyui.pack("comfy_bridge.models")


@pytest.fixture
def model(comfyui, model_folders):
    """The tiny stack's MODEL, of a network of its own."""
    return comfyui.run("AVDM2StackLoader", stack="tiny")[0]


@pytest.fixture
def checkpoint(model, tmp_path):
    """The MODEL's weights in a checkpoint's file, as float16."""
    path = tmp_path / "tiny.safetensors"
    weights = {f"model.diffusion_model.{name}": t.half() for name, t in model.model.diffusion_model.state_dict().items()}
    write_tensors(path, weights, {})
    return path


@pytest.fixture
def expected(node_stack):
    return weights_hash(node_stack.image_unet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_base_s_hash_is_the_file_s(room, model, expected, dtype):
    with torch.inference_mode():
        model.model.diffusion_model.to(dtype)
        assert room.base_hash(model) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_of_coarser_weights_it_is_read_from_the_file(room, model, expected, checkpoint, dtype):
    model.model.diffusion_model.to(dtype)
    model.cached_patcher_init = (None, (str(checkpoint),))  # as core remembers where it was loaded from
    assert room.checkpoint_of(model) == checkpoint
    assert room.base_hash(model) == expected


def test_of_coarser_weights_without_a_file_it_cannot_be_told(comfyui, room, model, students, caplog):
    model.model.diffusion_model.to(torch.bfloat16)
    model.cached_patcher_init = None
    assert room.checkpoint_of(model) is None and room.base_hash(model) is None
    comfyui.run("AVDM2StudentLoader", student="motion.safetensors", teacher=model)
    assert [
        m for m in caplog.messages if "Whether this checkpoint is tiny, which the student was made from, cannot be told" in m
    ]
    caplog.clear()
    comfyui.run("AVDM2StudentLoader", student="all.safetensors", teacher=model)
    assert not [m for m in caplog.messages if "AVDM2" in m], "it replaces the base"


def test_loras_and_being_loaded_do_not_change_it(comfyui, room, model, expected):
    import comfy.model_management as management

    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    patched = model.clone()
    assert patched.add_patches({name: ("diff", (torch.ones(32, 32),))}, 0.5) == [name]
    management.load_models_gpu([patched])
    assert room.base_hash(patched) == expected
    management.unload_all_models()


def test_a_teacher_in_place_of_a_student_and_another_student_start_from_the_image_model(comfyui, student, load_student, loaded):
    facts = comfyui.pack("comfy_bridge.facts")
    image = facts.facts_of(loaded.teacher).image_model
    (again,) = comfyui.run("AVDM2StudentLoader", student="motion.safetensors", teacher=student)
    assert facts.student_facts(again).image_model is image and again.patches == image.patches
    assert facts.student_facts(again).base == facts.facts_of(loaded.teacher).base
    assert facts.student_facts(again).motion == facts.facts_of(loaded.teacher).motion, "which a style is trained with"
    inputs = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(2), "seed": 0, "steps": 1, "denoise": 1.0}
    clips = [comfyui.run("AVDM2StudentSampler", student=s, **inputs)[0]["samples"] for s in (again, load_student("motion"))]
    assert torch.equal(*clips)


def test_weights_of_layers_that_a_model_lacks_are_refused(room, model):
    tensors = {"up_blocks.0.attentions.0.proj_in.weight": torch.zeros(64, 64, 1, 1)}
    with pytest.raises(ValueError, match=r"Expected a MODEL with the layers that this file changes, found none at up_blocks.0"):
        room.with_weights(model, tensors, None)
