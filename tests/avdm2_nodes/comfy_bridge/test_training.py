"""What surrounds a training in ComfyUI: what is refused before it starts, and what is written, whole or not at all."""

import contextlib
import resource
from pathlib import Path

import pytest
import yaml

PROMPTS = "a red circle\na blue square\n"


@pytest.fixture
def room(comfyui):
    return comfyui.pack("comfy_bridge.training")


@pytest.fixture
def training(room, tmp_path):
    """training(section={...}, prompts=...): one of a style named `ink`, its settings over a few of a file's."""
    config = tmp_path / "config.yaml"
    config.write_text("run: {updates: 0, batch: 8}\nwarmup: {updates: 40}\nmodel: {train: style}\n")

    def make(prompts="", **settings):
        file, folder = tmp_path / "models" / "ink.safetensors", tmp_path / "runs" / "ink"
        inputs = {"style": ("model.score_unet", "style.images"), "prompts": ("data.prompts",), "student": ("model.student",)}
        return room.Training("style.safetensors", file, folder, config, settings, inputs, prompts)

    return make


def begun(training, step: int, **settings) -> None:
    """Leaves what a training leaves that has done so many updates: its settings and a checkpoint."""
    (training.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (training.folder / "checkpoints" / f"step-{step:08d}.safetensors").touch()
    sections = {"run": {"updates": 0}, "warmup": {"updates": 40}, "model": {"train": "style"}} | settings
    (training.folder / "config.yaml").write_text(yaml.safe_dump(sections))


def refusal(act, *arguments, error=RuntimeError) -> str:
    with pytest.raises(error) as caught:
        act(*arguments)
    text = str(caught.value)
    assert text.startswith("Expected ") and "\n" not in text and "--" not in text
    return text


@contextlib.contextmanager
def full_disk():
    """Files may grow to 4 KiB: stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---- names ----


def test_a_name_says_where_the_file_and_the_folder_are(comfyui, room):
    file, folder = room.places("of nobody yet/v1.5 ink")
    assert file == comfyui.base / "models" / "avdm2" / "of nobody yet" / "v1.5 ink.safetensors"
    assert folder == comfyui.base / "output" / "AVDM2" / "of nobody yet" / "v1.5 ink"
    assert not file.parent.exists() and not folder.exists()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "", r"C:\x", "a\0b"])
def test_a_name_that_leaves_its_folder_is_refused(room, name):
    assert "below its folder, found" in refusal(room.places, name, error=ValueError)


def test_a_name_that_no_file_can_have_is_refused(room, model_folders):
    assert "found one of 240; choose a shorter one." in refusal(room.places, "x" * 240, error=ValueError)
    assert "found one of 302; choose a shorter one." in refusal(room.places, "x" * 300 + "/y", error=ValueError)
    assert "found: signs that are no text; choose another name." in refusal(room.places, "a\ud800b")
    (model_folders / "avdm2" / "taken").write_text("a file")
    assert "found a file in its place; choose another name." in refusal(room.places, "taken/x")
    (model_folders / "avdm2" / "taken").unlink()


# ---- refused before anything starts ----


def test_missing_packages_are_told_with_the_command_that_installs_them(room, monkeypatch, tmp_path):
    room.require_training()
    lines = "# a comment\n-r requirements.txt\ntorch\nno-such-package-1\nno_such_package_2>=1\n"
    (tmp_path / "requirements.txt").write_text(lines)
    monkeypatch.setattr(room, "REQUIREMENTS", tmp_path / "requirements.txt")
    with pytest.raises(
        RuntimeError, match=r'found no no-such-package-1, no_such_package_2; run ".*python.*" -m pip install -r ".*"'
    ):
        room.require_training()


def test_a_file_of_the_same_run_is_replaced_whole_and_no_other(room, training):
    made = training()
    made.folder.mkdir(parents=True)
    for content in (b"first", b"second"):
        room.require_own(made)
        (made.folder / made.made).write_bytes(content)
        room.install(made)
        assert made.file.read_bytes() == content and list(made.file.parent.iterdir()) == [made.file]
    made.file.write_bytes(b"a person")
    assert "Expected a new name, found ink.safetensors there already" in refusal(room.require_own, made)


def test_a_first_training_and_one_stopped_before_its_first_checkpoint_may_have_any_inputs(room, training):
    made = training(model={"score_unet": "/models/neon"})
    room.require_same_inputs(made)
    begun(made, 5, model={"train": "style", "score_unet": "/models/other"})
    (made.folder / "checkpoints" / "step-00000005.safetensors").unlink()
    room.require_same_inputs(made)


def test_the_same_inputs_go_on(room, training):
    """Paths inside the pack are written relative to it, and mean the same."""
    made = training(
        model={"score_unet": str(room.ROOT / "miniature" / "unet"), "student": "/x.safetensors"}, warmup={"updates": 40}
    )
    begun(made, 5, model={"train": "style", "score_unet": "miniature/unet", "student": "/x.safetensors"})
    room.require_same_inputs(made)


def test_other_inputs_are_named_as_the_node_names_them(room, training):
    made = training(PROMPTS, style={"images": "/input/ink"}, data={"prompts": "/a.txt"}, warmup={"updates": 7})
    begun(made, 5, model={"train": "style", "score_unet": "/m/neon.safetensors"}, data={"prompts": "/b.txt"})
    assert (
        "found style ink, was neon.safetensors; other prompts; updates 7, was 40; set that back to go on with it, or choose "
        "another name." in refusal(room.require_same_inputs, made)
    )
    begun(made, 5, model={"train": "style", "student": 5}, style={"images": "/input/ink"})
    assert "student nothing, was 5" in refusal(room.require_same_inputs, made), "whatever is there"
    begun(made, 5, model={"train": "all"})
    assert "found one under which a student was trained" in refusal(room.require_same_inputs, made)


def test_more_updates_of_the_same_kind_go_on_and_fewer_than_done_are_refused(room, training):
    begun(training(), 60, run={"updates": 30})
    room.require_same_inputs(training(run={"updates": 300}))
    assert "updates of at least 60, which this training has done already, found 50" in refusal(
        room.require_same_inputs, training(run={"updates": 10})
    )


@pytest.mark.parametrize("content", ["", "5", "run: 5", "run: {updates: x}", "[", "run: {updates: 3}", "a: " + "[" * 3000])
def test_spoilt_settings_of_an_earlier_run_are_one_sentence(room, training, content):
    made = training()
    begun(made, 5)
    (made.folder / "config.yaml").write_text(content)
    assert f"found them spoilt; choose another name, or delete {made.folder}" in refusal(room.require_same_inputs, made)


# ---- written whole or not at all ----


def test_a_run_folder_that_cannot_be_made_is_one_sentence(room, training):
    made = training()
    made.folder.parent.mkdir()
    made.folder.write_text("a file")
    assert f"can be made and written at {made.folder}, found: File exists" in refusal(room.train, made)


def test_prompts_onto_a_full_disk_leave_nothing(room, training):
    made = training("a red circle\n" * 1000)
    with full_disk():
        assert "found: File too large; make room, or choose another name." in refusal(room.train, made)
    assert not list(made.folder.iterdir())


def test_prompts_of_one_name_are_the_same_prompts(room, tmp_path):
    one, other = room.prompts_file(tmp_path, PROMPTS), room.prompts_file(tmp_path, PROMPTS + "more")
    assert one != other and one == room.prompts_file(tmp_path, PROMPTS)
    assert "a lone surrogate" in refusal(room.prompts_file, tmp_path, "a \ud800 circle")


def test_a_full_models_folder_is_named_and_left_as_it_was(room, training):
    made = training()
    made.folder.mkdir(parents=True)
    (made.folder / made.made).write_bytes(b"first")
    room.install(made)
    (made.folder / made.made).write_bytes(bytes(2**13))
    with full_disk():
        text = refusal(room.install, made)
    assert f"write {made.file}, found: File too large" in text and "the training is kept" in text
    assert made.file.read_bytes() == b"first" and list(made.file.parent.iterdir()) == [made.file]


# ---- what it starts from ----


def test_the_files_of_a_teacher_and_of_a_student(room, loaded, student, model_folders):
    tiny = model_folders / "diffusers" / "tiny"
    assert room.base_of(loaded.teacher, "the model's own") == room.Base(tiny, tiny / "motion_adapter", 5)
    assert room.base_of(student, "the model's own") == room.Base(tiny, tiny / "motion_adapter", 4)


def test_a_student_straight_on_a_base_has_its_stack_s_motion_or_the_one_chosen(comfyui, room, model_folders):
    model, _, _ = comfyui.run("AVDM2StackLoader", stack="tiny")
    (student,) = comfyui.run("AVDM2StudentLoader", student="all.safetensors", teacher=model)
    for wired in (model, student):
        assert room.base_of(wired, "the model's own").motion == model_folders / "diffusers" / "tiny" / "motion_adapter"
    chosen = model_folders / "animatediff_models" / "chosen.safetensors"
    chosen.touch()
    assert room.base_of(student, "chosen.safetensors").motion == chosen
    chosen.unlink()
    assert "found no such file" in refusal(room.base_of, student, "chosen.safetensors", error=ValueError)


def test_a_model_whose_file_is_not_known_is_refused(comfyui, room, model_folders):
    model, _, _ = comfyui.run("AVDM2StackLoader", stack="tiny")
    model.cached_patcher_init = None
    assert "found one that does not say it; wire it from Load Checkpoint" in refusal(room.base_of, model, "the model's own")


def test_weights_that_no_file_holds_are_noticed(comfyui, room, loaded, load_student):
    assert not room.changed_weights(loaded.teacher)
    for model in (loaded.teacher, *map(load_student, ("all", "motion", "motion+lora"))):
        assert not room.changed_weights(model)
        key, weight = next(
            (f"diffusion_model.{name}", p) for name, p in model.model.diffusion_model.named_parameters() if p.ndim == 2
        )
        patched = model.clone()
        patched.add_patches({key: ("diff", (weight.detach().clone(),))}, 0.5)
        assert room.changed_weights(patched) and not room.changed_weights(model)


def test_the_settings_are_a_file_s_with_the_node_s_over_them(room, training):
    said = room.settings_of(training(run={"updates": 3}, data={"frames": 4}))
    assert said == {
        "run": {"updates": 3, "batch": 8},
        "warmup": {"updates": 40},
        "model": {"train": "style"},
        "data": {"frames": 4},
    }
    assert Path(room.SCRIPT).is_file()
