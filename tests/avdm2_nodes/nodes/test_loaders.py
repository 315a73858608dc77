import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch

from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.stack import load_image_unet
from avdm2_nodes.files.student_unet import student_unet
from tests.avdm2_nodes.conftest import TEACHER_WINDOW
from tests.avdm2_nodes.native import CLIP, chain, difference
from tests.conftest import new_image_unet, new_motion


@pytest.fixture(scope="module")
def load_other(comfyui, model_folders, node_stack_folder):
    """load_other(name): the teacher of a stack of other widths (`wide`), or of the tiny one's widths with other weights (`twin`)."""
    widths = {"wide": (32, 64, 64), "twin": (32, 32, 64)}
    for name in widths:
        folder = node_stack_folder.parent / name
        (model_folders / "diffusers" / name).symlink_to(folder, target_is_directory=True)
        shutil.copytree(node_stack_folder, folder, ignore=shutil.ignore_patterns("unet", "styles", "motion_adapter"))
        new_image_unet(widths[name]).save_pretrained(folder / "unet")
        new_motion(widths[name]).save_pretrained(folder / "motion_adapter")
    yield cache(lambda name: comfyui.run("AVDM2TeacherLoader", checkpoint=name, motion_module="the checkpoint's own")[0])
    for name in widths:
        (model_folders / "diffusers" / name).unlink()
        shutil.rmtree(node_stack_folder.parent / name)


def load(comfyui, file, teacher):
    return comfyui.run("AVDM2StudentLoader", student=file, teacher=teacher)[0]


def test_the_teacher_knows_what_its_students_need(comfyui, loaded, node_stack, model_folders):
    facts = comfyui.pack("comfy_bridge.facts").facts_of(loaded.teacher)
    assert comfyui.pack("comfy_bridge.models").base_hash(loaded.teacher) == weights_hash(node_stack.image_unet)
    torch.testing.assert_close(facts.empty_text, node_stack.encode_text([""]), rtol=0, atol=1e-5)
    assert facts.frames == TEACHER_WINDOW and facts.student is None
    assert facts.base == model_folders / "diffusers" / "tiny" and facts.motion == facts.base / "motion_adapter"
    assert comfyui.pack("comfy_bridge.facts").facts_of(loaded.teacher.clone()) is facts, "clones keep it"


def test_a_students_weights_and_positions_are_those_of_its_file(comfyui, load_student, student_network):
    import comfy.model_management as management
    from comfy.utils import unet_to_diffusers

    for holds in ("all", "motion"):
        student = load_student(holds)
        (motion,) = student.get_nested_additional_models()
        management.load_models_gpu([student, motion])
        found = dict(student.model.diffusion_model.named_parameters())
        names = unet_to_diffusers(student.model.model_config.unet_config)
        places = [f"{block}.motion_modules.{number}" for block, number in motion.model.places]
        modules = {
            f"{place}.{name}": tensor
            for place, module in zip(places, motion.model.modules_at, strict=True)
            for name, tensor in module.state_dict().items()
        }
        expected = student_network(holds).state_dict()
        assert {name for name in expected if "motion_modules" in name} == modules.keys()
        for name, tensor in expected.items():
            ours = modules[name] if name in modules else found[names[name]]
            torch.testing.assert_close(ours, tensor, rtol=1e-6, atol=1e-6)
    management.unload_all_models()


def test_a_student_of_all_weights_runs_on_any_base_of_its_shape(comfyui, load_other, student, loaded):
    inputs = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(2), "seed": 0, "steps": 1, "denoise": 1.0}
    elsewhere = load(comfyui, "all.safetensors", load_other("twin"))
    clips = [comfyui.run("AVDM2StudentSampler", student=s, **inputs)[0]["samples"] for s in (student, elsewhere)]
    assert torch.equal(*clips)


def test_a_partial_student_on_another_base_takes_on_its_look_and_says_so(
    comfyui, load_other, loaded, node_stack_folder, caplog
):
    """Its changes on the other base's weights, as in diffusers."""
    inputs = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(2), "seed": 0, "steps": 1, "denoise": 1.0}
    base = load_image_unet(node_stack_folder.parent / "twin")
    for holds in ("motion", "motion+lora"):
        caplog.clear()
        student = load(comfyui, f"{holds}.safetensors", load_other("twin"))
        assert [m for m in caplog.messages if "The student was made from tiny, this checkpoint is another" in m]
        (latent,) = comfyui.run("AVDM2StudentSampler", student=student, **inputs)
        read = comfyui.student_of(student)
        unet = student_unet(replace(read, info=replace(read.info, base_hash=weights_hash(base))), base)
        expected = chain(video_predictor(unet), inputs["positive"][0][0], (2, 4, 4, 8), 0, [999])
        assert difference(latent["samples"], expected) < CLIP
    caplog.clear()
    load(comfyui, "all.safetensors", load_other("twin"))
    load(comfyui, "motion.safetensors", loaded.teacher)
    assert not [m for m in caplog.messages if "AVDM2" in m]


@pytest.mark.parametrize("holds", ["all", "motion", "motion+lora"])
def test_a_student_for_another_width_is_refused(comfyui, load_other, holds):
    with pytest.raises(
        ValueError, match=r"base with block_out_channels \[32, 32, 64\], found \[32, 64, 64\]; it is of another"
    ):
        load(comfyui, f"{holds}.safetensors", load_other("wide"))


def test_a_file_that_is_no_student_is_refused(comfyui, loaded, model_folders, node_stack_folder):
    file = model_folders / "avdm2" / "no student.safetensors"
    shutil.copy(node_stack_folder / "motion_adapter" / "diffusion_pytorch_model.safetensors", file)
    with pytest.raises(
        ValueError, match=r"Expected a student file, or .* at .*no student.safetensors, found an AnimateDiff motion module v3"
    ):
        load(comfyui, file.name, loaded.teacher)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"Expected a whole model file at .*no student.safetensors, found it truncated"):
        load(comfyui, file.name, loaded.teacher)
    file.unlink()


def test_a_teacher_wants_a_motion_module_for_a_checkpoint(comfyui, model_folders):
    with pytest.raises(ValueError, match=r"Expected a motion module for this checkpoint, found none chosen; choose one from"):
        comfyui.run("AVDM2TeacherLoader", checkpoint="some.safetensors", motion_module="the checkpoint's own")


def test_files_of_another_kind_are_refused_as_motion_modules(comfyui, model_folders, students):
    shutil.copy(students["all"], model_folders / "animatediff_models" / "student.safetensors")
    with pytest.raises(
        ValueError, match=r"Expected an AnimateDiff motion module for SD1.5 .*student.safetensors, found a.*student"
    ):
        comfyui.run("AVDM2TeacherLoader", checkpoint="tiny", motion_module="student.safetensors")
    (model_folders / "animatediff_models" / "student.safetensors").unlink()


def test_files_of_another_kind_are_refused_as_checkpoints(comfyui, model_folders, students, node_stack_folder):
    from safetensors.torch import save_file

    from tests.avdm2_nodes.files.original_layouts import original_motion, values

    motion = values(original_motion((32, 32, 64, 64)))
    save_file(motion, model_folders / "animatediff_models" / "motion.safetensors")
    shutil.copy(students["all"], model_folders / "checkpoints" / "student.safetensors")
    with pytest.raises(ValueError, match=r"Expected an SD1.5 checkpoint .*student.safetensors, found a.*student"):
        comfyui.run("AVDM2TeacherLoader", checkpoint="student.safetensors", motion_module="motion.safetensors")
    (model_folders / "checkpoints" / "student.safetensors").unlink()
    (model_folders / "animatediff_models" / "motion.safetensors").unlink()
