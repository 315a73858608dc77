import os
import shutil

import pytest


@pytest.fixture
def files(comfyui, model_folders):
    return comfyui.pack("comfy_bridge.folders")


@pytest.fixture
def elsewhere(comfyui, tmp_path):
    """A second folder of students, as extra_model_paths.yaml names one."""
    import folder_paths

    folder_paths.add_model_folder_path("avdm2", str(tmp_path))
    yield tmp_path
    folder_paths.folder_names_and_paths["avdm2"][0].remove(str(tmp_path))


def test_models_are_offered_by_name(files, comfyui):
    assert files.checkpoint_choices()[:2] == ["miniature (bundled)", "tiny"]
    assert files.motion_choices()[0] == "the checkpoint's own"
    assert files.module_choices()[-1] == "miniature (bundled)" and "the checkpoint's own" not in files.module_choices()
    assert list(files.stack_folders())[:2] == ["miniature (bundled)", "tiny"]
    assert {"all.safetensors", "motion.safetensors", "motion+lora.safetensors"} <= set(files.student_choices())
    assert [name for name in files.style_choices() if name.endswith("of tiny")] == ["other of tiny", "same of tiny"]
    for kind in ("avdm2", "animatediff_models", "loras"):
        assert files.saving_folder(kind) == comfyui.base / "models" / kind


def test_all_kinds_of_model_file_are_found_and_nothing_else(files, model_folders):
    import folder_paths

    for kind in ("avdm2", "animatediff_models"):
        extensions = folder_paths.folder_names_and_paths[kind][1]
        assert folder_paths.supported_pt_extensions <= set(extensions)
    (model_folders / "animatediff_models" / "readme.txt").touch()
    assert "readme.txt" not in files.motion_choices()


def test_other_folders_are_honoured_and_registering_again_changes_nothing(files, elsewhere, students, model_folders):
    import folder_paths

    shutil.copy(students["motion"], elsewhere / "theirs.safetensors")
    assert "theirs.safetensors" in files.student_choices()
    assert files.student_file("theirs.safetensors") == elsewhere / "theirs.safetensors"
    before = [list(folder_paths.get_folder_paths(kind)) for kind in ("avdm2", "animatediff_models")]
    files.register_folders()
    assert before == [folder_paths.get_folder_paths(kind) for kind in ("avdm2", "animatediff_models")]
    assert files.saving_folder("avdm2") == model_folders / "avdm2", "new students go to the first"


def test_nothing_is_saved_inside_another_pack(files, comfyui, monkeypatch):
    """Where AnimateDiff-Evolved keeps motion modules beside its code, that folder comes first."""
    import folder_paths

    paths, extensions = folder_paths.folder_names_and_paths["animatediff_models"]
    theirs = str(comfyui.base / "custom_nodes" / "theirs" / "models")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "animatediff_models", ([theirs, *paths], extensions))
    assert files.saving_folder("animatediff_models") == comfyui.base / "models" / "animatediff_models"


def test_a_students_subfolders_are_part_of_its_name(files, model_folders, students):
    (model_folders / "avdm2" / "mine").mkdir(exist_ok=True)
    shutil.copy(students["motion"], model_folders / "avdm2" / "mine" / "one.safetensors")
    assert "mine/one.safetensors" in {name.replace("\\", "/") for name in files.student_choices()}
    assert files.student_file("mine/one.safetensors") == model_folders / "avdm2" / "mine" / "one.safetensors"


@pytest.mark.parametrize(
    "leave", ["../../outside.safetensors", "mine/../../../outside.safetensors", "{base}/outside.safetensors"]
)
def test_a_name_never_leaves_its_folders(files, comfyui, students, loaded, leave):
    shutil.copy(students["all"], comfyui.base / "outside.safetensors")
    name = leave.format(base=comfyui.base)
    with pytest.raises(files.ModelFileError, match=r"^Expected .*outside.safetensors in .*avdm2, found no such file; "):
        files.student_file(name)
    with pytest.raises(ValueError, match="found no such file"):
        comfyui.run("AVDM2StudentLoader", student=name, teacher=loaded.teacher)


def test_a_file_that_is_gone_is_said_so(files, comfyui):
    with pytest.raises(files.ModelFileError, match=r"gone.safetensors in .*checkpoints.*, found no such file; put it there"):
        files.model_file("checkpoints", "gone.safetensors")
    with pytest.raises(ValueError, match=r"gone.safetensors in .*animatediff_models, found no such file"):
        comfyui.run("AVDM2TeacherLoader", checkpoint="tiny", motion_module="gone.safetensors")
    with pytest.raises(ValueError, match=r"Expected a stack gone, found none; put it into models/diffusers, or refresh"):
        comfyui.run("AVDM2StackLoader", stack="gone")
    with pytest.raises(ValueError, match=r"gone.safetensors in .*animatediff_models, found no such file"):
        model = comfyui.run("AVDM2StackLoader", stack="tiny")[0]
        comfyui.run("AVDM2MotionModule", model=model, motion_module="gone.safetensors")


def test_links_to_nothing_loops_and_pipes_take_no_node_away(files, comfyui, elsewhere):
    before = files.style_files().keys()
    (elsewhere / "gone.safetensors").symlink_to(elsewhere / "nowhere")
    (elsewhere / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(elsewhere / "pipe.safetensors")
    (elsewhere / "folder.safetensors").mkdir()
    assert files.style_files().keys() == before
    for name in ("gone", "loop", "pipe", "folder"):
        assert not files.is_style_file(elsewhere / f"{name}.safetensors")
    for node in ("AVDM2StudentLoader", "AVDM2StyleTransfer"):
        assert comfyui.nodes.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
    for name in ("gone.safetensors", "loop.safetensors", "pipe.safetensors"):
        with pytest.raises(ValueError, match=r"^Expected .*found"):
            files.student_file(name)
