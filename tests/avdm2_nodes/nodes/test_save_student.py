import os

import pytest
import torch

from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.stack import load_image_unet
from avdm2_nodes.files.student import read_student
from tests.avdm2_nodes.native import CLIP, difference

ANIMATEDIFF = "AnimateDiff files"


@pytest.fixture
def saved(comfyui, model_folders):
    """saved(student, name, ...): the files that AVDM2 Save Student writes; the test's own files are taken away again."""
    before = {file for file in comfyui.base.rglob("*") if file.is_file()}

    def save(student, name, *format):
        result = comfyui.nodes.NODE_CLASS_MAPPINGS["AVDM2SaveStudent"].execute(student, name, *format)
        return result.ui["text"]

    yield save
    for file in {file for file in comfyui.base.rglob("*") if file.is_file()} - before:
        file.unlink()


@pytest.mark.parametrize("holds", ["all", "motion", "motion+lora"])
def test_a_saved_student_is_the_one_that_was_loaded(comfyui, loaded, load_student, saved, students, model_folders, holds):
    (path,) = saved(load_student(holds), f"mine/{holds} again")
    assert path == str(model_folders / "avdm2" / "mine" / f"{holds} again.safetensors")
    one, other = read_student(students[holds]), read_student(path)
    assert one.info == other.info and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    (again,) = comfyui.run("AVDM2StudentLoader", student=f"mine/{holds} again.safetensors", teacher=loaded.teacher)
    inputs = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(2), "seed": 0, "steps": 1, "denoise": 1.0}
    clips = [comfyui.run("AVDM2StudentSampler", student=s, **inputs)[0]["samples"] for s in (load_student(holds), again)]
    assert torch.equal(*clips)


def test_animatediff_files_lie_where_other_packs_look_and_are_the_student(comfyui, loaded, load_student, saved, model_folders):
    """The motion module by the loader's own list, the LoRA by ComfyUI's own reader of LoRA files."""
    import folder_paths
    from comfy.lora import load_lora, model_lora_keys_unet
    from comfy.utils import load_torch_file

    student = load_student("motion+lora")
    paths = saved(student, "mine/both", ANIMATEDIFF)
    motion, lora = (model_folders / kind / "mine" for kind in ("animatediff_models", "loras"))
    assert paths == [str(motion / "both_motion.safetensors"), str(lora / "both_lora.safetensors")]
    assert os.path.join("mine", "both_lora.safetensors") in folder_paths.get_filename_list("loras")
    name = os.path.join("mine", "both_motion.safetensors")
    teacher, _, _ = comfyui.run("AVDM2TeacherLoader", checkpoint="tiny", motion_module=name)
    patches = load_lora(load_torch_file(paths[1]), model_lora_keys_unet(teacher.model, {}))
    assert len(patches) == sum(key.endswith("lora_A.weight") for key in comfyui.student_of(student).tensors) > 0
    (made,) = comfyui.run(
        "LoraLoaderModelOnly", model=teacher, lora_name=os.path.join("mine", "both_lora.safetensors"), strength_model=1.0
    )
    inputs = {"positive": comfyui.prompt(loaded.clip), "latent_image": comfyui.empty(2), "seed": 0, "steps": 1, "cfg": 1.0}
    inputs |= {"negative": inputs["positive"], "sampler_name": "lcm", "scheduler": "simple", "denoise": 1.0}
    expected, without, found = (
        comfyui.run("KSampler", model=m, **inputs)[0]["samples"] for m in (student, load_student("motion"), made)
    )
    assert difference(found, expected) < CLIP and difference(without, expected) > 100 * CLIP, "the LoRA shows"


def test_motion_modules_alone_are_one_animatediff_file(load_student, saved, model_folders):
    path = model_folders / "animatediff_models" / "alone_motion.safetensors"
    assert saved(load_student("motion"), "alone", ANIMATEDIFF) == [str(path)]


def test_a_student_of_all_weights_is_no_animatediff_file(comfyui, load_student, saved):
    before = set(comfyui.base.rglob("*"))
    with pytest.raises(ValueError, match=r"found one that holds all its weights; save it as a student file"):
        saved(load_student("all"), "whole", ANIMATEDIFF)
    assert set(comfyui.base.rglob("*")) == before


@pytest.mark.parametrize("format", ["student file", ANIMATEDIFF])
@pytest.mark.parametrize("name", ["../x", "a/../../x", "{base}/x", r"..\x", r"C:\x", "", ".", "a/..", "/x"])
def test_a_name_that_leaves_the_folder_is_refused(comfyui, load_student, saved, name, format):
    before = set(comfyui.base.rglob("*"))
    with pytest.raises(ValueError, match=r"^Expected the name .* found .*[;:] "):
        saved(load_student("motion"), name.format(base=comfyui.base), format)
    assert set(comfyui.base.rglob("*")) == before


@pytest.mark.parametrize("format", ["student file", ANIMATEDIFF])
@pytest.mark.parametrize("name", ["n" * 250, "n" * 300, "n" * 6000, "n/" * 3000 + "x", "file/x", "a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_refused(comfyui, load_student, saved, model_folders, name, format):
    places = [model_folders / kind / "file" for kind in ("avdm2", "animatediff_models", "loras")]
    for place in places:
        place.write_text("a file, no folder")
    before = set(comfyui.base.rglob("*"))
    try:
        with pytest.raises(ValueError, match=r"^Expected .* found.*[;:] ") as caught:
            saved(load_student("motion"), name, format)
        assert "\n" not in str(caught.value) and set(comfyui.base.rglob("*")) == before
    finally:
        for place in places:
            place.unlink()


def test_a_name_that_is_taken_is_refused_and_its_file_untouched(student, saved, model_folders):
    file = model_folders / "avdm2" / "motion.safetensors"
    before = file.read_bytes()
    for name in ("motion", "motion.safetensors"):
        with pytest.raises(ValueError, match=r"Expected a new name, found motion.safetensors there already; choose another"):
            saved(student, name)
    assert file.read_bytes() == before


@pytest.mark.parametrize("holds", ["all", "motion+lora"])
def test_styles_in_the_weights_are_merged_into_the_file_and_named_there(
    comfyui, loaded, load_student, saved, styled, write_style_file, node_stack_folder, holds
):
    file = write_style_file(comfyui.student_of(load_student(holds)), "learnt")
    styles = (("other of tiny", 0.5, "transplant"), (file.name, 0.25))
    student = styled(*styles, student=load_student(holds))
    (path,) = saved(student, "styled")
    info = read_student(path).info
    assert info.holds == "all" and [(u.mode, u.strength) for u in info.styles] == [("transplant", 0.5), ("fine-tuned", 0.25)]
    assert [u.name for u in info.styles] == ["other of tiny", "learnt"]
    assert info.styles[0].hash == weights_hash(load_image_unet(node_stack_folder / "styles" / "other"))
    (again,) = comfyui.run("AVDM2StudentLoader", student="styled.safetensors", teacher=loaded.teacher)
    inputs = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(2), "seed": 0, "steps": 1, "denoise": 1.0}
    expected, found, plain = (
        comfyui.run("AVDM2StudentSampler", student=s, **inputs)[0]["samples"] for s in (student, again, load_student(holds))
    )
    error, shift = (difference(other, expected) for other in (found, plain))
    assert error < 1e-2 and shift > 20 * error  # the file has its weights in float16
    (twice,) = saved(styled(("other of tiny", 0.1, "transplant"), student=again), "twice")
    assert len(read_student(twice).info.styles) == 3, "styles that were there already stay on the list"


def test_a_style_that_guides_the_sampling_is_refused(comfyui, saved, styled, load_student):
    before = set(comfyui.base.rglob("*"))
    student = styled(("other of tiny", 1.0), student=load_student("motion+lora"))
    for format in ("student file", ANIMATEDIFF):
        with pytest.raises(ValueError, match=r"found other of tiny, which guides the sampling and which no file can hold; use"):
            saved(student, "guided", format)
    assert set(comfyui.base.rglob("*")) == before


def test_animatediff_files_have_no_place_for_a_style(saved, styled, load_student):
    student = styled(("other of tiny", 1.0, "transplant"), student=load_student("motion+lora"))
    with pytest.raises(ValueError, match=r"found one with other of tiny in its weights, .*; save it as a student file"):
        saved(student, "styled", ANIMATEDIFF)


def test_at_strength_0_the_file_is_the_student_s(saved, styled, student, students):
    (path,) = saved(styled(("other of tiny", 0.0, "transplant"), ("other of tiny", 0.0)), "none")
    one, other = read_student(path), read_student(students["all"])
    assert one.info == other.info and all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())
