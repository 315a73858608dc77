"""A style for a finished student: training goes on from its file, and leaves a small one of its own."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from avdm2_nodes.diffusion.style import StyleError, add_change, style_change
from avdm2_nodes.diffusion.unets import image_predictor, video_predictor
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.lora import lora_products
from avdm2_nodes.files.stack import load_image_unet
from avdm2_nodes.files.student import read_student, write_student
from avdm2_nodes.files.student_info import StudentFileError
from avdm2_nodes.files.student_unet import student_unet
from avdm2_nodes.files.style import StyleFileError, lora_change, read_style, require_student
from training import distill
from training.cost.memory_plan import plan_of
from training.cost.operations import Inputs, meta_inputs, meta_roles
from training.data import DataError
from training.evaluation import run_report
from training.evaluation.rows import student_method
from training.method.discriminator import heads_for
from training.method.export import export
from training.method.roles import begin_with, build_roles
from training.method.setup import new_roles
from training.run.command_line import load_config
from training.run.config import ConfigError, to_yaml
from training.run.folder import RunFolder, RunFolderError
from training.run.parent import StoppedError


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("style")
    (folder / "prompts.txt").write_text("a large red circle\na small blue square\n")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i, size in enumerate([(64, 64), (80, 100), (70, 64)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / "images" / f"{i}.png")
    (folder / "images" / "1.txt").write_text("a red circle")
    return folder


@pytest.fixture(scope="module")
def settings(work, stack_folder, make_config):
    """settings(section={...}): a YAML file of a tiny style run on the tiny stack."""

    def write(**changes):
        sections = {
            "run": {"updates": 2, "folder": str(work / "run"), "sample_every": 9},
            "data": {"prompts": str(work / "prompts.txt"), "clips": 3, "height": 64, "width": 64},
            "model": {
                "teacher": str(stack_folder), "train": "style", "student": str(work / "student.safetensors"),
                "score_unet": str(stack_folder / "styles" / "other"),
            },
            "student": {"steps": [999, 499]},
            "warmup": {"updates": 1, "substeps": 1},
            "adm": {"weight": 0},
            "evaluation": {"teacher_steps": 2, "world": None},
        }  # fmt: skip
        for name, values in changes.items():
            sections[name] = sections.get(name, {}) | values
        path = work / f"{len(list(work.iterdir()))}.yaml"
        path.write_text(to_yaml(make_config(**sections)))
        return path

    return write


@pytest.fixture(scope="module")
def student(work, stack_folder, make_config, _loaded_stack, make_distillation, random_clips):
    """A finished student of the tiny stack, in its file."""
    config = make_config(model={"teacher": str(stack_folder)}, student={"steps": [999, 499]})
    run = make_distillation(_loaded_stack, config)
    run.update(0, random_clips)
    (work / "first").mkdir()
    with RunFolder(work / "first") as folder:
        path = export(config, folder, _loaded_stack, run.roles, None)
    path.rename(work / "student.safetensors")
    return read_student(work / "student.safetensors")


def train(config, folder, *arguments, stop=lambda: False):
    """A style run in `folder`; its style file as read."""
    config = load_config(["--config", str(config), "--run.folder", str(folder), *map(str, arguments)])
    with RunFolder(config.run.folder) as run:
        return read_style(distill.distil(config, run, report=False, stop=stop))


def stop_after(asked):
    """Says stop from the next time on that it is asked; the first time is before training."""
    times = iter(range(1, 1000))
    return lambda: next(times) > asked


@pytest.fixture(scope="module")
def finished(settings, student, work):
    return train(settings(), work / "finished")


# ---- what a run leaves ----


def test_its_pictures_show_the_student_without_and_with_the_style(finished, settings, student, stack, work, monkeypatch):
    config, device = load_config(["--config", str(settings())]), torch.device("cpu")
    gallery, shown = run_report.new_gallery(config, stack, ["a large red circle"], device), {}
    monkeypatch.setattr(run_report, "contact_sheet", lambda rows, *_: shown.update(rows))
    run_report.write_run_report(
        config, work / "finished" / "style.safetensors", stack, video_predictor(stack.teacher), gallery, student
    )
    first, *others, last = shown
    assert (first, len(others), last) == ("student 2 steps, unstyled", 4, "student 2 steps")
    plain, styled = (student_unet(student, stack.image_unet) for _ in range(2))
    add_change(styled, lora_change(finished), 1.0)
    for name, unet in ((first, plain), (last, styled)):
        clips, _ = gallery.sample(student_method("by hand", video_predictor(unet), [999, 499]))
        np.testing.assert_array_equal(shown[name], list(clips))
    assert not np.array_equal(shown[first], shown[last])


def test_the_style_is_a_change_of_that_student_and_none_at_strength_0(finished, student, stack, stack_folder):
    other = load_image_unet(stack_folder / "styles" / "other")
    require_student(finished, student)
    assert finished.info.name == "other" and finished.info.hash == weights_hash(other) and finished.info.updates == 3
    unet, kept = student_unet(student, stack.image_unet), student_unet(student, stack.image_unet)
    add_change(unet, lora_change(finished), 0.0)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), kept.parameters(), strict=True))
    add_change(unet, lora_change(finished), 1.0)
    changed = {name for (name, a), b in zip(unet.named_parameters(), kept.parameters(), strict=True) if not torch.equal(a, b)}
    assert changed == lora_change(finished).keys() and not [name for name in changed if "motion_modules" in name]


def test_a_stopped_run_goes_on_bitwise(finished, settings, work):
    config = settings()
    for _ in range(2):
        with pytest.raises(StoppedError, match="Stopped after update"):
            train(config, work / "stopped", stop=stop_after(1))
    again = train(config, work / "stopped")
    assert finished.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(finished.tensors[name], again.tensors[name]) for name in again.tensors)


def test_with_adm_the_teacher_makes_the_real_clips_and_a_stopped_run_has_the_same(settings, student, work):
    config = settings(adm={"weight": 0.1})
    whole = train(config, work / "adm")
    assert (work / "adm" / "clips" / "cache.json").exists()
    with pytest.raises(StoppedError):
        train(config, work / "adm-stopped", stop=stop_after(1))
    again = train(config, work / "adm-stopped")
    assert all(torch.equal(whole.tensors[name], again.tensors[name]) for name in again.tensors)


def test_a_file_may_hold_back_some_of_what_was_learnt(settings, student, work):
    whole, part = (train(settings(style={"strength": strength}), work / f"strength-{strength}") for strength in (1.0, 0.75))
    assert part.info.lora_alpha == 1.5 and whole.info.lora_alpha == 2.0
    ours, theirs = lora_change(part), lora_change(whole)
    assert max(delta.abs().max() for delta in theirs.values()) > 0
    for name, delta in theirs.items():
        torch.testing.assert_close(ours[name], 0.75 * delta)


# ---- what it begins with ----


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_the_memory_of_a_style_is_planned(stack, student, stack_folder, settings, share, half):
    config = load_config(["--config", str(settings(model={"share_base": share}))])
    unet, motion = dict(stack.image_unet.config), dict(stack.motion.config)
    inputs = meta_inputs(config, unet, 32)
    planned = plan_of(config, *meta_roles(config, unet, motion, half), inputs)
    style = load_image_unet(stack_folder / "styles" / "other")
    real = new_roles(config, stack, style, student, half)
    widths = unet["block_out_channels"]
    given = Inputs(torch.randn(inputs.x.shape), torch.randn(inputs.text.shape))
    found = plan_of(config, real, heads_for([*widths[-3:-1], widths[-1]], config), given)
    assert planned.standing == found.standing
    for name, size in planned.turns.items():
        assert found.turns[name] == pytest.approx(size, rel=0.1), name


def test_the_roles_of_a_style(stack, student, stack_folder):
    other = load_image_unet(stack_folder / "styles" / "other")
    x, t, text = torch.randn(1, 4, 4, 8, 8), torch.tensor([300]), torch.randn(1, 32, 32)
    said = []
    for share in (False, True):
        roles = build_roles(stack, train="style", score_unet=other, student=student, lora_rank=64, share_base=share)
        with torch.no_grad():
            said.append([roles.teacher(x, t, text), roles.real_score(x[:, :, 0], t, text), roles.student(x, t, text)])
            torch.testing.assert_close(roles.fake_score(x[:, :, 0], t, text), said[-1][1])
        assert all(".lora_" in name and "motion_modules" not in name for name in roles.student_weights)
    for a, b in zip(*said, strict=True):
        torch.testing.assert_close(a, b)
    # A rank that holds all of a layer: the student begins as the transplant, but for the weights that LoRA leaves alone.
    unet = student_unet(student, stack.image_unet)
    layers = {name.rpartition(".lora_")[0] + ".weight" for name in roles.student_weights}
    change = {name: delta for name, delta in style_change(stack.image_unet, other).items() if name in layers}
    add_change(unet, change, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(said[0][2], video_predictor(unet)(x, t, text), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(said[0][1], image_predictor(other)(x[:, :, 0], t, text))


def test_lora_begins_as_the_nearest_of_its_rank():
    torch.manual_seed(0)
    shapes = {"a": (6, 5), "b": (4, 3, 3, 3)}
    change = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()} | {"c.weight": torch.zeros(4, 4)}
    lora = {}
    for name, (out, *rest) in (shapes | {"c": (4, 4)}).items():
        lora[f"{name}.lora_A.weight"] = torch.nn.Parameter(torch.ones(2, *rest))
        lora[f"{name}.lora_B.weight"] = torch.nn.Parameter(torch.zeros(out, 2, *(1 for _ in rest[1:])))
    begin_with(lora, change)
    products = lora_products({name: p.detach() for name, p in lora.items()})
    for name in shapes:
        u, s, v = torch.linalg.svd(change[f"{name}.weight"].flatten(1), full_matrices=False)
        torch.testing.assert_close(products[f"{name}.weight"].flatten(1), u[:, :2] * s[:2] @ v[:2], rtol=1e-4, atol=1e-5)
    assert torch.equal(lora["c.lora_A.weight"], torch.ones(2, 4))  # no change to begin with: as LoRA begins anywhere


@pytest.mark.parametrize("train_mode", ["all", "motion+lora"])
def test_distillation_goes_on_from_a_student(stack, make_distillation, make_config, random_clips, tmp_path, train_mode):
    config = make_config(model={"train": train_mode})
    run = make_distillation(stack, config)
    for step in range(2):
        run.update(step, random_clips)
    with RunFolder(tmp_path) as folder:
        student = read_student(export(config, folder, stack, run.roles, None))
    roles = new_roles(config, stack, None, student)
    x, t, text = torch.randn(1, 4, 4, 8, 8), torch.tensor([300]), torch.randn(1, 32, 32)
    with torch.no_grad():
        want = video_predictor(student_unet(student, stack.image_unet))(x, t, text)
        torch.testing.assert_close(roles.student(x, t, text), want, rtol=1e-4, atol=1e-4)
        assert (want - roles.teacher(x, t, text)).abs().max() > 1e-3


# ---- from images ----


def test_from_images_alone_stopped_and_resumed(settings, student, work):
    config, arguments = settings(), ("--model.score_unet", "null", "--style.images", work / "images")
    whole = train(config, work / "from-images", *arguments)
    assert whole.info.name == "images"
    assert json.loads((work / "from-images" / "images" / "settings.json").read_text())["steps"] == 4
    with pytest.raises(StoppedError, match="step 2 of 4 of images"):
        train(config, work / "images-stopped", *arguments, stop=stop_after(1))
    again = train(config, work / "images-stopped", *arguments)
    assert all(torch.equal(whole.tensors[name], again.tensors[name]) for name in again.tensors)
    with pytest.raises(RunFolderError, match="begun with another lr"):
        train(config, work / "images-stopped", *arguments, "--style.image_lr", "0.5")


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.student", "null"], "model.student: expected a student file"),
        (["--model.score_unet", "null"], "found neither"),
        (["--style.images", "some"], "found both"),
        (["--model.train", "motion", "--style.images", "some"], "style.images: expected null"),
    ],
)
def test_settings_that_do_not_agree(settings, arguments, said):
    with pytest.raises(ConfigError, match=said):
        load_config(["--config", str(settings()), *arguments])


def test_what_does_not_fit_is_refused_in_words(settings, student, stack, work, make_image_unet, tmp_path):
    make_image_unet((32, 64, 64)).save_pretrained(tmp_path / "wide")
    write_student(tmp_path / "peer.safetensors", student.tensors, replace(student.info, chain="euler"))
    for kind, said, *arguments in (
        (StyleError, "another|unlike", "--model.score_unet", tmp_path / "wide"),
        (StudentFileError, "leaves them as they are", "--student.steps", "999,749"),
        (StudentFileError, "found nothing", "--model.student", tmp_path / "gone"),
        (StudentFileError, r"of another method \(chain euler\)", "--model.student", tmp_path / "peer.safetensors"),
        (DataError, "found nothing", "--model.score_unet", "null", "--style.images", tmp_path / "gone"),
        (DataError, "Expected images", "--model.score_unet", "null", "--style.images", tmp_path / "wide"),
    ):
        with pytest.raises(kind, match=said):
            train(settings(), tmp_path / "refused", *arguments)
        assert not (tmp_path / "refused" / "style.safetensors").exists()
    with pytest.raises(StudentFileError, match=r"set model\.train all"):
        build_roles(stack, train="motion", student=student)


def test_a_style_of_another_student_is_refused(finished, work):
    other = read_student(work / "student.safetensors")
    name = next(name for name in other.tensors if name.endswith("weight"))
    other.tensors[name] = other.tensors[name] + 1
    with pytest.raises(StyleFileError, match="load the student that it was trained on"):
        require_student(finished, other)
