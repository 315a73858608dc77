import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, MotionAdapter, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from avdm2_nodes.diffusion.layers import MotionLayer, Residual
from avdm2_nodes.diffusion.samplers import draw_noise, sample_student
from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.containers import write_tensors
from avdm2_nodes.files.motion import to_original_keys
from avdm2_nodes.files.peers import load_peer
from avdm2_nodes.files.stack import load_stack
from avdm2_nodes.files.student_unet import student_unet
from training import sample
from training.data.video import read_video
from training.evaluation import sampling
from training.miniature.models import new_image_unet, new_motion_adapter
from training.run.config import ROOT

torch.set_num_threads(1)


@pytest.fixture
def command(model, tmp_path):
    """Runs the command in this process; arguments overlay those of a short clip."""

    def run(*arguments, student="student.safetensors"):
        common = ["--model", str(model), "--prompt", "a red circle", "--out", str(tmp_path / "clip.mp4")]
        return sample.main([*common, *([] if student is None else ["--student", str(model / student)]), *arguments])

    return run


def script(folder, *arguments):
    """The script as a user starts it, in `folder`, with nothing of ours on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    python = [sys.executable, str(ROOT / "training" / "sample.py"), *arguments]
    return subprocess.run(python, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_from_another_folder(model, tmp_path, command):
    student = os.path.relpath(model / "student.safetensors", tmp_path)
    prompts = "--prompt", "a red circle", "--prompt", "a blue square"
    done = script(tmp_path, "--student", student, "--model", str(model), *prompts, "--seed", "7", "--out", "two.mp4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["two-1.mp4", "two-2.mp4"]
    assert all("student:" in line for line in done.stderr.splitlines() if line.strip()), done.stderr
    assert sorted(os.listdir(tmp_path)) == ["two-1.mp4", "two-2.mp4"]
    one, two = (read_video(tmp_path / f"two-{i}.mp4", 3) for i in (1, 2))
    assert one.shape == two.shape == (3, 32, 48, 3)
    # A clip is its prompt's and its seed's, whatever else was asked for.
    assert command("--seed", "7", "--out", str(tmp_path / "alone.mp4")) == 0
    assert (tmp_path / "alone.mp4").read_bytes() == (tmp_path / "two-1.mp4").read_bytes()
    assert command("--seed", "8") == 0
    assert (tmp_path / "clip.mp4").read_bytes() != (tmp_path / "two-1.mp4").read_bytes()


def test_an_error_is_one_sentence_from_another_folder(model, tmp_path):
    done = script(tmp_path, "--student", "none.safetensors", "--model", str(model), "--prompt", "a red circle")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["Expected a student file at none.safetensors, found nothing; check the path."]
    assert not os.listdir(tmp_path)


def test_teacher(command, tmp_path):
    assert command("--teacher", "--steps", "2", "--frames", "5", "--height", "16", "--width", "24", student=None) == 0
    assert read_video(tmp_path / "clip.mp4", 5).shape == (5, 16, 24, 3)


def test_taesd_decodes_and_the_unet_may_be_compiled(command, tmp_path, monkeypatch):
    taesd = AutoencoderTiny()
    taesd.save_pretrained(tmp_path / "taesd")
    weights = str(tmp_path / "taesd" / "diffusion_pytorch_model.safetensors")
    assert command("--taesd", weights) == 0
    frames = read_video(tmp_path / "clip.mp4", 3)
    assert command() == 0
    assert (read_video(tmp_path / "clip.mp4", 3) != frames).any()
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, backend, dynamic: compiled.append((function, backend)) or function)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert command("--compile") == command("--compile", "--teacher", "--steps", "1", student=None) == 0
    kinds = [Residual.forward, Transformer2DModel.forward, MotionLayer.over_time]
    assert compiled == 2 * [(kind, "inductor") for kind in kinds]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "caches" / "avdm2" / "compiled")


def test_other_steps_and_sizes_and_a_partial_student(command, tmp_path):
    assert command("--steps", "3", "--frames", "2", "--height", "40", "--width", "24", student="motion.safetensors") == 0
    assert read_video(tmp_path / "clip.mp4", 2).shape == (2, 40, 24, 3)


def test_a_peer_is_sampled_by_its_own_chain(command, model, tmp_path, capsys):
    """A Lightning module as it is published, on this base."""
    stack = load_stack(model, with_motion=False)
    motion = MotionAdapter.from_config(dict(new_motion_adapter().config) | {"use_motion_mid_block": True})
    path = tmp_path / "animatediff_lightning_2step_comfyui.safetensors"
    write_tensors(path, to_original_keys(motion.state_dict()), {})
    size = "--frames", "3", "--height", "16", "--width", "24"
    assert command("--student", str(path), *size, "--out", str(tmp_path / "own.mp4"), student=None) == 0
    assert command("--student", str(path), *size, "--steps", "2", student=None) == 0
    assert (tmp_path / "own.mp4").read_bytes() == (tmp_path / "clip.mp4").read_bytes()

    student = load_peer(path, stack.image_unet)
    unet = student_unet(student, stack.image_unet)
    sampler = sampling.student_sampler(unet, (999, 499), 16, "euler")
    frames = sampling.generate(sampler, stack, ["a red circle"], [0], 3, 16, 24)[0]
    generator = torch.Generator().manual_seed(0)
    noise = draw_noise((1, 4, 3, 2, 3), generator)
    with torch.no_grad():
        clip = sample_student(
            video_predictor(unet), noise, stack.encode_text(["a red circle"]), (999, 499), generator, chain="euler"
        )
    assert torch.equal(stack.decode_clips(clip)[0], frames)
    path.rename(tmp_path / "mm_sd_v15_v2.safetensors")
    assert command("--student", str(tmp_path / "mm_sd_v15_v2.safetensors"), student=None) == 1
    assert "Expected a number of steps in the name of mm_sd_v15_v2.safetensors" in capsys.readouterr().err


def test_more_frames_than_the_motion_modules_know(command, tmp_path):
    assert command("--frames", "40", "--height", "16", "--width", "16", "--steps", "1") == 0
    assert read_video(tmp_path / "clip.mp4", 40).shape == (40, 16, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--height", "36"], "multiples of 8"),
        (["--model", "nowhere"], "nowhere"),
        (["--out", "nowhere/clip.mp4"], "nowhere"),
        (["--out", "clip.txt"], "clip.txt"),
        (["--student", str(ROOT / "training" / "sample.py")], "sample.py"),
    ],
)
def test_errors(command, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("Expected") and said in message
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("out", ["folder", "nowhere/clip.mp4", "clip.txt", "file/clip.mp4", "c" * 249 + ".mp4"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(command, tmp_path, monkeypatch, capsys, out):
    def read(*_, **__):
        raise AssertionError("read before the place was looked at")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "load_stack", read)
    monkeypatch.setattr(sample, "read_student", read)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert command("--out", out) == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("Expected") and message.endswith(".")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_base_of_another_architecture(command, model, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for part in ("tokenizer", "text_encoder", "vae"):
        (other / part).symlink_to(model / part)
    config = dict(new_image_unet().config) | {"attention_head_dim": 8}
    type(new_image_unet()).from_config(config).save_pretrained(other / "unet")
    assert command("--model", str(other)) == 1
    assert "num_attention_heads" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["other"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--steps", "1001"],
        ["--seed", "-1"],
        ["--seed", str(2**64)],
        ["--guidance", "2"],
        ["--guidance", "nan", "--teacher"],
        ["--student", "a.safetensors", "--teacher"],
        ["--style", "a.safetensors", "--teacher"],
        ["--style", "a", "--style", "b", "--style-strength", "1"],
        ["--style-strength", "1"],
        ["--style", "a", "--style-mode", "other"],
    ],
)
def test_arguments_that_cannot_be(command, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command(*arguments, student=None)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def clip_bytes(command, folder, *arguments, **kind):
    assert command(*arguments, **kind) == 0
    return (folder / "clip.mp4").read_bytes()


def test_styles_change_the_clip_and_at_strength_0_do_not(command, styles, tmp_path):
    plain = clip_bytes(command, tmp_path)
    ways = ["--style", str(styles / "other")], ["--style", str(styles / "other"), "--style-mode", "transplant"]
    for way in (*ways, ["--style", str(styles / "student.safetensors")]):
        assert clip_bytes(command, tmp_path, *way) != plain
        assert clip_bytes(command, tmp_path, *way, "--style-strength", "0") == plain
    two = "--style", str(styles / "student.safetensors"), "--style", str(styles / "other")
    second = clip_bytes(command, tmp_path, *two, "--style-strength", "0", "--style-strength", "1")
    assert second == clip_bytes(command, tmp_path, *ways[0])


def test_a_style_that_does_not_fit(command, model, styles, tmp_path, capsys):
    assert command("--style", str(styles / "motion.safetensors")) == 1  # of the other student
    assert capsys.readouterr().err.startswith("Expected the student motion (hash ")
    narrow = UNet2DConditionModel.from_config(dict(new_image_unet().config) | {"cross_attention_dim": 24})
    narrow.save_pretrained(tmp_path / "narrow")
    for mode in sampling.STYLE_MODES:
        assert command("--style", str(tmp_path / "narrow"), "--style-mode", mode) == 1
        assert capsys.readouterr().err.startswith("Expected a style of the student's family")
    assert command("--style", str(tmp_path / "none.safetensors")) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"Expected a model file at {tmp_path / 'none.safetensors'}, found nothing; check the path."
    ]
    assert os.listdir(tmp_path) == ["narrow"]


def test_a_prompt_is_required():
    with pytest.raises(SystemExit) as caught:
        sample.parse([])
    assert caught.value.code == 2


def test_numbered():
    assert sample.numbered(Path("a/b.mp4"), 1) == [Path("a/b.mp4")]
    assert sample.numbered(Path("a/b.mp4"), 12)[::11] == [Path("a/b-01.mp4"), Path("a/b-12.mp4")]
