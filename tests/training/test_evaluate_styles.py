import json

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from avdm2_nodes.diffusion.guidance import pull_evaluations
from avdm2_nodes.diffusion.samplers import ddim_scheduler
from avdm2_nodes.diffusion.schedules import IMAGE, VIDEO
from avdm2_nodes.diffusion.style import style_change
from avdm2_nodes.diffusion.unets import image_predictor, video_unet
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.stack import load_image_unet
from avdm2_nodes.files.student import read_student, write_student
from avdm2_nodes.files.student_info import StudentInfo
from avdm2_nodes.files.style import StyleFileError, StyleInfo, student_hash, write_style
from training import evaluate_styles
from training.evaluate_styles import FRAMES, MODES, STRENGTHS, TEACHER, UNSWAPPED, guided_method, restyled, student_method
from training.evaluation.rows import Bench
from training.run.folder import RunFolderError


@pytest.fixture(scope="module")
def files(_loaded_stack, tmp_path_factory):
    """(student, style file): the teacher itself as a student of two steps, and a random LoRA for it."""
    stack, folder = _loaded_stack, tmp_path_factory.mktemp("student")
    said = {"title": "tiny", "date": "2026-01-01", "license": "Apache-2.0", "updates": 0, "training_config": "{}"}
    info = StudentInfo(
        holds="all", timesteps=(999, 499), frames=8, height=64, width=64, unet_config=unet_config(stack.teacher), base_name="tiny",
        base_hash=weights_hash(stack.image_unet), **said,
    )  # fmt: skip
    write_student(folder / "student.safetensors", dict(stack.teacher.named_parameters()), info)
    student = read_student(folder / "student.safetensors")
    torch.manual_seed(0)
    unet = video_unet(stack.image_unet, stack.motion)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=r".*to_q", init_lora_weights=False), unet)
    tensors = {n.replace(".default.", "."): p.detach().half() for n, p in unet.named_parameters() if ".lora_" in n}
    own = {"name": "other", "hash": "0" * 64, "student_name": "tiny", "student_hash": student_hash(student)}
    write_style(folder / "other.safetensors", tensors, StyleInfo(**own, lora_rank=2, lora_alpha=2.0, **said))
    return folder / "student.safetensors", folder / "other.safetensors"


@pytest.fixture
def command(stack_folder, files, tmp_path, monkeypatch):
    """command(options): the command on six clips a row, with two steps in place of 25; the folder that it leaves."""
    for name in ("teacher_method", "frames_method"):
        full = getattr(evaluate_styles, name)
        monkeypatch.setattr(evaluate_styles, name, lambda n, p, s, steps, g, full=full: full(n, p, s, 2, g))

    def inner(*options):
        style = stack_folder / "styles" / "other"
        given = {"--model": stack_folder, "--student": files[0], "--style": style, "--clips": 6, "--out": tmp_path / "out"}
        evaluate_styles.main([str(x) for pair in given.items() for x in pair] + [str(o) for o in options])
        return next(path.parent for path in tmp_path.glob("out/*/report.json"))

    return inner


def test_the_table_has_every_mode_at_every_strength_and_goes_into_a_page(command, files, tmp_path):
    page = tmp_path / "styles.md"
    page.write_text("before\n<!-- styles -->\nold\n<!-- end of styles -->\nafter\n")
    folder = command("--style-file", files[1], "--page", page)
    rows = json.loads((folder / "report.json").read_text())["rows"]
    modes = [f"{mode} {strength:g}" for mode in MODES for strength in STRENGTHS]
    assert list(rows) == ["real clips (VAE)", UNSWAPPED, *modes, FRAMES, TEACHER]
    assert rows["guidance 1"]["image evaluations"] == pull_evaluations(2) and "image evaluations" not in rows["transplant 1"]
    assert all("style" in row for row in rows.values())
    assert "motion" not in rows[FRAMES] and "Fréchet distance" not in rows[FRAMES] and "frame accuracy" in rows[FRAMES]
    assert all((folder / name).stat().st_size > 0 for name in ("report.md", "styles.jpg", "strength.jpg"))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "| guidance 0.5 |" in text


def test_it_goes_on_where_it_stopped_and_a_style_file_adds_its_rows(command, files, monkeypatch):
    without = json.loads((command() / "report.json").read_text())["rows"]
    assert not any(name.startswith("fine-tuned") for name in without)
    full, sampled = Bench.sample, []
    monkeypatch.setattr(Bench, "sample", lambda self, method: (sampled.append(method.name), full(self, method))[1])
    rows = json.loads((command("--style-file", files[1]) / "report.json").read_text())["rows"]
    assert sampled == [f"fine-tuned {strength:g}" for strength in STRENGTHS]
    assert {name: rows[name] for name in without} == without


def test_at_strength_0_and_with_its_own_base_as_style_each_mode_is_the_student_to_the_bit(stack, stack_folder, files):
    student, other = read_student(files[0]), load_image_unet(stack_folder / "styles" / "other")
    noise, text, empty = torch.randn(2, 4, 8, 8, 8), stack.encode_text(["a red circle"] * 2), stack.encode_text([""])

    @torch.no_grad()
    def sampled(method):
        return method.sample(noise, text, [torch.Generator().manual_seed(i) for i in range(2)])

    def transplanted(style, strength):
        predict = restyled(student, stack, style_change(stack.image_unet, style), strength)
        return sampled(student_method("", predict, student.info.timesteps))

    def pulled_by(style, strength):
        plain = restyled(student, stack, {}, 0.0)
        pair = image_predictor(style), image_predictor(stack.image_unet)
        return sampled(guided_method("", plain, *pair, empty, student.info, strength))

    plain = sampled(student_method("", restyled(student, stack, {}, 0.0), student.info.timesteps))
    for mode in (transplanted, pulled_by):
        assert torch.equal(mode(other, 0.0), plain) and torch.equal(mode(stack.image_unet, 1.0), plain)
        away = [(mode(other, strength) - plain).abs().mean() for strength in STRENGTHS]
        assert 0 < away[0] < away[1] < away[2] < away[3]
    assert guided_method("", None, None, None, empty, student.info, 0.0).image_evaluations == 0


def test_a_style_file_of_another_student_is_refused(stack, files, stack_folder):
    student, style = read_student(files[0]), load_image_unet(stack_folder / "styles" / "other")
    first = next(name for name in student.tensors if not name.endswith(".pe"))
    student.tensors[first] = student.tensors[first] + 1
    with pytest.raises(StyleFileError, match="load the student that it was trained on"):
        list(evaluate_styles.methods(stack, student, style, files[1], 3.0))


def test_single_frames_are_sampled_on_the_image_schedule():
    for schedule in (IMAGE, VIDEO):
        ours = ddim_scheduler(25, schedule=schedule)
        torch.testing.assert_close(ours.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_places_that_cannot_be_written_are_told_before_anything_is_measured(command, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_styles, "load_stack", lambda *_, **__: pytest.fail("read before the places were looked at"))
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"file/below, found: Not a directory; name another with --out"):
        command("--out", str(tmp_path / "file" / "below"))
    with pytest.raises(
        RunFolderError, match=r"Expected a page for the tables at .*gone\.md, found nothing; name another with --page"
    ):
        command("--page", str(tmp_path / "gone.md"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
