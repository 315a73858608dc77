"""What AVDM2 Style Training asks of the training command."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from training.run.command_line import load_config

STYLE, PROMPTS = "other of tiny", "a red circle\na blue square\n"
OWN = "the model's own"
PAGE = Path(__file__).resolve().parents[3] / "web" / "docs" / "AVDM2StyleTraining.md"


@pytest.fixture
def room(comfyui):
    return comfyui.pack("comfy_bridge.style_training")


@pytest.fixture
def training(comfyui, room, tmp_path):
    """training(student, style=..., updates=..., prompts=...): what the node would run."""
    start = comfyui.pack("comfy_bridge.training")

    def make(student, style=STYLE, updates=7, prompts=PROMPTS):
        facts = comfyui.pack("comfy_bridge.facts").student_facts(student)
        base = start.base_of(student, OWN)
        return room.style_training(facts, base, style, tmp_path / "mine.safetensors", tmp_path / "mine", updates, prompts)

    return make


@pytest.fixture
def config_of(comfyui, tmp_path):
    """The settings of a training as the command reads them."""
    start = comfyui.pack("comfy_bridge.training")

    def read(training):
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(start.settings_of(training)))
        return load_config(["--config", str(file)])

    return read


@pytest.fixture
def pictures(comfyui):
    """A folder of pictures and one without, in ComfyUI's input folder."""
    for name in ("paintings", "notes"):
        (comfyui.base / "input" / name).mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(comfyui.base / "input" / "paintings" / "one.PNG")
    return comfyui.base / "input" / "paintings"


def test_it_names_what_the_nodes_have_loaded(training, config_of, student, model_folders, tmp_path):
    config, tiny = config_of(training(student)), model_folders / "diffusers" / "tiny"
    assert (config.model.teacher, config.model.motion) == (tiny, tiny / "motion_adapter")
    assert config.model.student == model_folders / "avdm2" / "all.safetensors" and config.model.train == "style"
    assert config.model.score_unet == tiny / "styles" / "other" and config.style.images is None
    assert config.run.folder == tmp_path / "mine" and config.style.name == "mine"
    assert config.run.attached and config.run.device == "cpu" and not config.evaluation.report
    assert config.warmup.updates == 7 and config.run.updates == 0
    assert config.student.steps == (999, 800, 600, 300), "the student's own, as are frames and size"
    assert (config.data.frames, config.data.height, config.data.width) == (4, 32, 64)
    assert config.data.prompts.parent == tmp_path / "mine"


def test_a_folder_of_pictures_is_a_style(comfyui, training, config_of, student, pictures):
    config = config_of(training(student, "images in input/paintings"))
    assert config.style.images == pictures and config.model.score_unet is None
    files = comfyui.pack("comfy_bridge.folders")
    assert files.image_folders()["images in input/paintings"] == pictures
    assert "images in input/notes" not in files.style_sources() and STYLE in files.style_sources()


def test_other_prompts_make_another_run_and_0_updates_are_the_settings_own(training, student):
    one, other = (training(student, updates=0, prompts=prompts).settings for prompts in (PROMPTS, PROMPTS + "more"))
    assert one["data"]["prompts"] != other["data"]["prompts"] and "warmup" not in one


def test_the_bundled_student_needs_no_prompts_and_its_page_says_how_long_it_learns(comfyui, training, config_of):
    loader = {"checkpoint": "miniature (bundled)", "motion_module": "the checkpoint's own"}
    teacher, _, _ = comfyui.run("AVDM2TeacherLoader", **loader)
    (student,) = comfyui.run("AVDM2StudentLoader", student="miniature (bundled)", teacher=teacher)
    made = training(student, "neon of miniature (bundled)", 0, "")
    assert "prompts" not in made.settings["data"] and made.config.name == "style.yaml"
    config = config_of(made)
    assert f"{config.warmup.updates + config.run.updates} for the miniature" in PAGE.read_text(encoding="utf-8")


def test_refusals(training, student, styled, tmp_path):
    def refused(student=student, style=STYLE, prompts=PROMPTS):
        with pytest.raises(ValueError if style == "gone" else RuntimeError) as caught:
            training(student, style, 0, prompts)
        return str(caught.value)

    assert "found none; write some" in refused(prompts=" \n")
    assert "found some on it; wire the student from" in refused(styled((STYLE, 1.0)))
    assert "found some on it; wire the student from" in refused(styled((STYLE, 1.0, "transplant")))
    assert "found no such file" in refused(style="gone")
    assert "a lone surrogate" in refused(prompts="\ud800")
    assert not list(tmp_path.iterdir())


def test_a_teacher_is_no_student(comfyui, loaded):
    with pytest.raises(ValueError, match="Expected a student, found a MODEL without one"):
        comfyui.run("AVDM2StyleTraining", student=loaded.teacher, style=STYLE, name="x", updates=1, prompts=PROMPTS)


def test_a_file_of_something_else_is_not_written_over(comfyui, student, model_folders):
    with pytest.raises(RuntimeError, match=r"Expected a new name, found motion.safetensors there already"):
        comfyui.run("AVDM2StyleTraining", student=student, style=STYLE, name="motion", updates=1, prompts=PROMPTS)
