import pytest
import torch

from avdm2_nodes.diffusion.student_file import read_student


@pytest.fixture
def saved(comfyui, model_folders):
    """saved(student, name): the file that AVDM2 Save Student writes; the test's own files are taken away again."""
    before = {file for file in comfyui.base.rglob("*") if file.is_file()}

    def save(student, name):
        result = comfyui.nodes.NODE_CLASS_MAPPINGS["AVDM2SaveStudent"].execute(student, name)
        (text,) = result.ui["text"]
        return text

    yield save
    for file in {file for file in comfyui.base.rglob("*") if file.is_file()} - before:
        file.unlink()


@pytest.mark.parametrize("holds", ["all", "motion", "motion+lora"])
def test_a_saved_student_is_the_one_that_was_loaded(comfyui, loaded, load_student, saved, students, model_folders, holds):
    path = saved(load_student(holds), f"mine/{holds} again")
    assert path == str(model_folders / "avdm2" / "mine" / f"{holds} again.safetensors")
    one, other = read_student(students[holds]), read_student(path)
    assert one.info == other.info and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    (again,) = comfyui.run("AVDM2StudentLoader", student=f"mine/{holds} again.safetensors", teacher=loaded.teacher)
    inputs = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(2), "seed": 0, "steps": 1, "denoise": 1.0}
    clips = [comfyui.run("AVDM2StudentSampler", student=s, **inputs)[0]["samples"] for s in (load_student(holds), again)]
    assert torch.equal(*clips)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "{base}/x", r"..\x", r"C:\x", "", ".", "a/..", "/x"])
def test_a_name_that_leaves_the_folder_is_refused(comfyui, student, saved, name):
    before = set(comfyui.base.rglob("*"))
    with pytest.raises(ValueError, match=r"^Expected .* found .*[;:] "):
        saved(student, name.format(base=comfyui.base))
    assert set(comfyui.base.rglob("*")) == before


def test_a_name_that_is_taken_is_refused_and_its_file_untouched(student, saved, model_folders):
    file = model_folders / "avdm2" / "motion.safetensors"
    before = file.read_bytes()
    for name in ("motion", "motion.safetensors"):
        with pytest.raises(ValueError, match=r"Expected a new name, found motion.safetensors there already; choose another"):
            saved(student, name)
    assert file.read_bytes() == before


def test_a_styled_students_file_is_without_the_style(comfyui, student, saved, students):
    (styled,) = comfyui.run("AVDM2StyleTransfer", student=student, style="other of tiny", strength=1.0)
    path = saved(styled, "styled")
    assert read_student(path).tensors.keys() == read_student(students["all"]).tensors.keys()
