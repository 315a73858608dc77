"""What AVDM2 Distillation asks of the training command."""

import pytest
import yaml

from training.data.video import VIDEO_SUFFIXES
from training.run.command_line import load_config

OWN, FITS_24GB, ALL = "the model's own", "fits 24 GB", "all weights (80 GB)"
PROMPTS = "a red circle\na blue square\n"


@pytest.fixture
def room(comfyui):
    return comfyui.pack("comfy_bridge.distillation")


@pytest.fixture
def files(comfyui):
    return comfyui.pack("comfy_bridge.folders")


@pytest.fixture
def videos(comfyui):
    folder = comfyui.base / "input" / "my clips"
    folder.mkdir(exist_ok=True)
    (folder / "one.MP4").touch()
    return folder


@pytest.fixture
def config_of(comfyui, room, tmp_path):
    """config_of(teacher, videos, updates, settings, prompts): the settings as the command reads them."""
    start = comfyui.pack("comfy_bridge.training")

    def read(teacher, videos, updates=0, settings=FITS_24GB, prompts=""):
        file, folder = tmp_path / "mine.safetensors", tmp_path / "mine"
        made = room.distillation(start.base_of(teacher, OWN), videos, file, folder, updates, settings, prompts)
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(start.settings_of(made)))
        return load_config(["--config", str(path)])

    return read


@pytest.fixture(scope="session")
def miniature(comfyui):
    return comfyui.run("AVDM2TeacherLoader", checkpoint="miniature (bundled)", motion_module="the checkpoint's own")[0]


def test_folders_of_videos_are_offered_and_no_others(comfyui, files, videos):
    for name in ("of shards", "prepared", "of notes"):
        (comfyui.base / "input" / name).mkdir(exist_ok=True)
    (comfyui.base / "input" / "of shards" / "train-0.tar").touch()
    (comfyui.base / "input" / "prepared" / "cache.json").touch()
    (comfyui.base / "input" / "of notes" / "a.txt").touch()
    offered = files.video_sources()
    assert {"videos in input/my clips", "videos in input/of shards", "videos in input/prepared"} <= set(offered)
    assert "videos in input/of notes" not in offered and offered[0] == files.RENDERED and offered[-1] == files.TEACHER_CLIPS
    assert files.video_folder("videos in input/my clips") == videos
    assert set(VIDEO_SUFFIXES) < set(files._VIDEOS), "all that training reads"
    with pytest.raises(ValueError, match="Expected a folder videos in input/gone, found none"):
        files.video_folder("videos in input/gone")


@pytest.mark.parametrize(("settings", "train"), [(FITS_24GB, "motion+lora"), (ALL, "all")])
def test_a_teacher_of_sd15_s_kind_learns_from_videos(config_of, loaded, model_folders, videos, tmp_path, settings, train):
    config, tiny = config_of(loaded.teacher, "videos in input/my clips", 0, settings), model_folders / "diffusers" / "tiny"
    assert (config.model.teacher, config.model.motion) == (tiny, tiny / "motion_adapter")
    assert config.model.train == train and config.data.folder == videos
    assert config.data.prompts is None and config.data.render is None
    assert config.data.frames == 5, "as many as the teacher knows"
    assert config.run.folder == tmp_path / "mine" and config.run.attached and not config.evaluation.report
    assert (config.warmup.updates, config.run.updates) == (200, 2000), "as the settings say"


def test_the_miniature_has_settings_of_its_own(config_of, miniature, files, tmp_path):
    for settings in (FITS_24GB, ALL):
        config = config_of(miniature, files.RENDERED, 0, settings)
        assert config.model.teacher == files.BUNDLED and config.model.train == "all" and config.data.frames == 8
        assert config.data.render == 512 and config.data.folder == tmp_path / "mine" / "videos"
        assert (config.warmup.updates, config.run.updates) == (80, 50)


@pytest.mark.parametrize(("updates", "parts"), [(3, (3, 0)), (80, (80, 0)), (81, (80, 1)), (1000, (80, 920))])
def test_updates_are_all_of_them_the_warm_up_first(config_of, miniature, files, updates, parts):
    config = config_of(miniature, files.RENDERED, updates)
    assert (config.warmup.updates, config.run.updates) == parts


def test_without_videos_the_teacher_makes_clips_of_the_prompts(config_of, loaded, miniature, files, tmp_path):
    assert config_of(loaded.teacher, files.TEACHER_CLIPS, prompts=PROMPTS).data.prompts.parent == tmp_path / "mine"
    assert config_of(miniature, files.TEACHER_CLIPS).data.prompts == files.BUNDLED / "prompts.txt"
    assert config_of(miniature, files.TEACHER_CLIPS, prompts=PROMPTS).data.prompts.parent == tmp_path / "mine"


def test_what_does_not_go_together_is_refused(config_of, loaded, videos, files):
    for arguments, found in {
        (files.TEACHER_CLIPS, 0, ALL, " \n"): "to make clips of, found none",
        ("videos in input/my clips", 0, ALL, PROMPTS): "Expected no prompts beside videos",
        (files.RENDERED, 0, ALL): "found the clips of the miniature's world",
    }.items():
        with pytest.raises(RuntimeError, match=found):
            config_of(loaded.teacher, *arguments)


def test_what_is_no_teacher_as_its_file_holds_it_is_refused(comfyui, student, loaded, files):
    inputs = {"videos": files.TEACHER_CLIPS, "name": "x", "updates": 1, "settings": ALL, "prompts": PROMPTS}
    with pytest.raises(RuntimeError, match="Expected a teacher, found a student"):
        comfyui.run("AVDM2Distillation", teacher=student, **inputs)
    patched = loaded.teacher.clone()
    name, weight = next((n, p) for n, p in patched.model.diffusion_model.named_parameters() if p.ndim == 2)
    patched.add_patches({f"diffusion_model.{name}": ("diff", (weight.detach().clone(),))}, 0.5)
    with pytest.raises(RuntimeError, match="found one with LoRAs or merges in it"):
        comfyui.run("AVDM2Distillation", teacher=patched, **inputs)
    with pytest.raises(RuntimeError, match=r"found all\.safetensors there already"):
        comfyui.run("AVDM2Distillation", teacher=loaded.teacher, **inputs | {"name": "all"})
    assert not (comfyui.base / "output" / "AVDM2" / "x").exists()
