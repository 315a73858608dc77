"""What surrounds the training of a style in ComfyUI: the command, what is refused before it, and what its folder says meanwhile."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from training.run.command_line import load_config

STYLE, PROMPTS = "other of tiny", "a red circle\na blue square\n"


@pytest.fixture
def room(comfyui):
    return comfyui.pack("comfy_bridge.training")


@pytest.fixture
def pictures(comfyui):
    """A folder of pictures and one without, in ComfyUI's input folder."""
    for name in ("paintings", "notes"):
        (comfyui.base / "input" / name).mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(comfyui.base / "input" / "paintings" / "one.PNG")
    return comfyui.base / "input" / "paintings"


@pytest.fixture
def command(comfyui, room, student, tmp_path):
    """command(...): the arguments of the training, for the student of all weights."""

    def make(style=STYLE, folder=tmp_path, updates=7, prompts=PROMPTS, student=student, **changes):
        facts = comfyui.pack("comfy_bridge.facts").student_facts(student)
        return room.style_command(replace(facts, **changes), style, folder, updates, prompts)

    return make


def settings(arguments):
    return {key.removeprefix("--"): value for key, value in zip(arguments[::2], arguments[1::2], strict=True)}


# ---- the command ----


def test_the_command_names_what_the_nodes_have_loaded(command, model_folders, tmp_path):
    said = settings(command(folder=tmp_path / "mine"))
    tiny = model_folders / "diffusers" / "tiny"
    assert said["model.teacher"] == str(tiny) and said["model.motion"] == str(tiny / "motion_adapter")
    assert said["model.student"] == str(model_folders / "avdm2" / "all.safetensors")
    assert said["model.score_unet"] == str(tiny / "styles" / "other") and "style.images" not in said
    assert said["run.folder"] == str(tmp_path / "mine") and said["style.name"] == "mine"
    assert (said["run.attached"], said["run.device"], said["warmup.updates"]) == ("true", "cpu", "7")
    assert said["student.steps"] == "999,800,600,300", "the student's own, as are frames and size"
    assert (said["data.frames"], said["data.height"], said["data.width"]) == ("4", "32", "64")
    assert Path(said["data.prompts"]).parent == tmp_path / "mine"


def test_its_settings_are_ones_that_the_command_has(command, model_folders, pictures, tmp_path):
    for style in (STYLE, "images in input/paintings"):
        config = load_config(command(style, tmp_path / "mine"))
        assert config.model.train == "style" and config.run.attached
        assert config.warmup.updates == 7 and config.run.updates == 0
        assert (config.style.images, config.model.score_unet is None) == ((None, False) if style == STYLE else (pictures, True))


def test_other_prompts_make_another_run_and_0_updates_are_the_settings_own(command):
    one, other = (settings(command(updates=0, prompts=prompts)) for prompts in (PROMPTS, PROMPTS + "more"))
    assert one["data.prompts"] != other["data.prompts"] and "warmup.updates" not in one


def test_the_bundled_student_needs_no_prompts(command, comfyui, tmp_path):
    loader = {"checkpoint": "miniature (bundled)", "motion_module": "the checkpoint's own"}
    teacher, _, _ = comfyui.run("AVDM2TeacherLoader", **loader)
    (student,) = comfyui.run("AVDM2StudentLoader", student="miniature (bundled)", teacher=teacher)
    said = settings(command("neon of miniature (bundled)", updates=0, prompts="", student=student))
    assert "data.prompts" not in said and Path(said["config"]).name == "style.yaml"


# ---- refused before anything starts ----


def test_refusals(command, comfyui, loaded, styled, tmp_path):
    def refused(style=STYLE, **inputs):
        with pytest.raises(ValueError if style == "gone" else RuntimeError) as caught:
            command(style, **inputs)
        return str(caught.value)

    assert "found none; write some" in refused(prompts=" \n")
    assert "found some on it; wire the student from" in refused(student=styled((STYLE, 1.0)))
    assert "found some on it; wire the student from" in refused(student=styled((STYLE, 1.0, "transplant")))
    assert "found one on a MODEL that does not say its file" in refused(base=None)
    image = comfyui.pack("comfy_bridge.facts").facts_of(loaded.teacher).image_model
    (alone,) = comfyui.run("AVDM2StudentLoader", student="all.safetensors", teacher=image)
    assert "found none; put AVDM2 Teacher Loader or AVDM2 Motion Module" in refused(student=alone, base=tmp_path)
    assert "found no such file" in refused(style="gone")
    assert not list(tmp_path.iterdir())


def test_what_is_no_student_is_refused(comfyui, loaded):
    inputs = {"student": loaded.teacher, "style": STYLE, "name": "x", "updates": 1, "prompts": PROMPTS}
    with pytest.raises(ValueError, match=r"Expected a student, found a MODEL without one; put AVDM2 Student Loader before"):
        comfyui.run("AVDM2StyleTraining", **inputs)


def test_missing_packages_are_told_with_the_command_that_installs_them(room, monkeypatch, tmp_path):
    room.require_training()
    lines = "# a comment\n-r requirements.txt\ntorch\nno-such-package-1\nno_such_package_2>=1\n"
    (tmp_path / "requirements.txt").write_text(lines)
    monkeypatch.setattr(room, "REQUIREMENTS", tmp_path / "requirements.txt")
    with pytest.raises(
        RuntimeError, match=r'found no no-such-package-1, no_such_package_2; run ".*python.*" -m pip install -r ".*"'
    ):
        room.require_training()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "", r"C:\x"])
def test_a_name_that_leaves_its_folder_is_refused(comfyui, student, name):
    before = set(comfyui.base.rglob("*"))
    with pytest.raises(ValueError, match=r"below its folder, found"):
        comfyui.run("AVDM2StyleTraining", student=student, style=STYLE, name=name, updates=1, prompts=PROMPTS)
    assert set(comfyui.base.rglob("*")) == before


def test_a_file_of_something_else_is_not_written_over(comfyui, room, student, model_folders):
    with pytest.raises(RuntimeError, match=r"Expected a new name for the style, found motion.safetensors there already"):
        comfyui.run("AVDM2StyleTraining", student=student, style=STYLE, name="motion", updates=1, prompts=PROMPTS)


def test_a_file_of_the_same_run_is_replaced_whole(room, tmp_path):
    made, file = tmp_path / "run" / room.MADE, tmp_path / "models" / "new" / "style.safetensors"
    made.parent.mkdir()
    for content in (b"first", b"second"):
        room.require_own(file, made.parent)
        made.write_bytes(content)
        room.install(made, file)
        assert file.read_bytes() == content and list(file.parent.iterdir()) == [file]
    file.write_bytes(b"a person's")
    with pytest.raises(RuntimeError, match="Expected a new name"):
        room.require_own(file, made.parent)


# ---- what the folder says ----


def test_folders_of_pictures_are_offered(comfyui, pictures):
    files = comfyui.pack("comfy_bridge.folders")
    assert files.image_folders()["images in input/paintings"] == pictures
    assert "images in input/notes" not in files.style_sources() and STYLE in files.style_sources()


def test_a_run_is_told_in_words(room):
    lines = [{"update": i, "seconds": 10.0 * i, "sdm": 0.5, "fake": 0.01 * i} for i in range(1, 11)]
    assert room.in_words(lines, 40) == "update 10 of 40, about 5 min to go\nsdm 0.500\nfake 0.100"
    assert room.in_words(lines[:1], 40) == "update 1 of 40\nsdm 0.500\nfake 0.010"
    assert room.in_words([{"update": 40, "seconds": 1.0, "sdm": None}], 40) == "update 40 of 40"


def test_a_look_at_a_folder_takes_whole_lines_only(room, tmp_path):
    empty = room.Look(tmp_path)
    assert (empty.lines, empty.total, empty.sheet) == ([], None, None)
    (tmp_path / "config.yaml").write_text("run: {updates: 30}\nwarmup: {updates: 12}\n")
    (tmp_path / "stats.jsonl").write_text(json.dumps({"update": 1}) + '\n{"update": 2, "sd')
    (tmp_path / "samples").mkdir()
    for step in (50, 100):
        Image.new("RGB", (9, 9)).save(tmp_path / "samples" / f"update-{step:06d}.png")
    look = room.Look(tmp_path)
    assert (look.lines, look.total, look.sheet.name) == ([{"update": 1}], 42, "update-000100.png")
    assert room.picture(look.sheet)[1].size == (9, 9)
    look.sheet.write_bytes(look.sheet.read_bytes()[:20])
    assert room.picture(look.sheet) is None
