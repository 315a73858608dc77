import shutil
from functools import cache

import pytest
import torch

from avdm2_nodes.diffusion.precision import sampling_dtype
from avdm2_nodes.files.hashes import weights_hash
from tests.avdm2_nodes.conftest import TEACHER_WINDOW
from tests.conftest import new_image_unet, new_motion


@pytest.fixture(scope="module")
def load_other(comfyui, model_folders, node_stack_folder):
    """load_other(name): the teacher of a stack of other widths (`wide`), or of the tiny one's widths with other weights (`twin`)."""
    widths = {"wide": (32, 64, 64), "twin": (32, 32, 64)}
    for name in widths:
        folder = model_folders / "diffusers" / name
        shutil.copytree(node_stack_folder, folder, ignore=shutil.ignore_patterns("unet", "styles", "motion_adapter"))
        new_image_unet(widths[name]).save_pretrained(folder / "unet")
        new_motion(widths[name]).save_pretrained(folder / "motion_adapter")
    yield cache(lambda name: comfyui.run("AVDM2TeacherLoader", checkpoint=name, motion_module="the checkpoint's own")[0])
    for name in widths:
        shutil.rmtree(model_folders / "diffusers" / name)


def load(comfyui, file, teacher):
    return comfyui.run("AVDM2StudentLoader", student=file, teacher=teacher)[0]


def test_the_teacher_knows_what_its_students_need(loaded, node_stack):
    teacher = loaded.teacher
    assert teacher.base_hash == weights_hash(node_stack.image_unet)
    assert torch.equal(teacher.empty_text, node_stack.encode_text([""]))
    assert teacher.frames == TEACHER_WINDOW
    assert teacher.patcher.model.get_dtype() == sampling_dtype(torch.device("cpu"))
    assert {p.device.type for p in teacher.architecture.parameters()} == {"meta"}


def test_a_students_weights_and_positions_are_those_of_its_file(load_student, student_network):
    import comfy.model_management as management

    for holds in ("all", "motion"):
        student = load_student(holds)
        management.load_models_gpu([student.patcher])
        unet = student_network(holds)
        network = student.patcher.model.diffusion_model
        expected = dict(unet.named_parameters()) | dict(unet.named_buffers())
        found = dict(network.named_parameters()) | dict(network.named_buffers())
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_a_student_of_all_weights_runs_on_any_base_of_its_shape(comfyui, load_other, student, loaded):
    inputs = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(2), "seed": 0, "steps": 1, "denoise": 1.0}
    elsewhere = load(comfyui, "all.safetensors", load_other("twin"))
    clips = [comfyui.run("AVDM2StudentSampler", student=s, **inputs)[0]["samples"] for s in (student, elsewhere)]
    assert torch.equal(*clips)


def test_a_partial_student_needs_its_own_base(comfyui, load_other, node_stack):
    own, twin = weights_hash(node_stack.image_unet), load_other("twin")
    words = rf"Expected the base tiny \(hash {own[:12]}\) .*found one of hash {twin.base_hash[:12]}; load"
    for holds in ("motion", "motion+lora"):
        with pytest.raises(ValueError, match=words):
            load(comfyui, f"{holds}.safetensors", twin)


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
    with pytest.raises(ValueError, match=r"Expected a readable student file at .*no student.safetensors, found it truncated"):
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
