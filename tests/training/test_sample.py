import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, MotionAdapter, UNet2DConditionModel
from torch import nn

from avdm2_nodes.diffusion.guidance import pulled
from avdm2_nodes.diffusion.samplers import draw_noise, sample_student
from avdm2_nodes.diffusion.unets import image_predictor, video_predictor, video_unet
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.containers import write_tensors
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.motion import to_original_keys
from avdm2_nodes.files.peers import load_peer
from avdm2_nodes.files.stack import load_image_unet, load_stack
from avdm2_nodes.files.student import read_student, write_student
from avdm2_nodes.files.student_info import StudentInfo
from avdm2_nodes.files.student_unet import student_unet
from avdm2_nodes.files.style import StyleInfo, student_hash, write_style
from training import sample
from training.data.video import read_video
from training.evaluation import sampling
from training.miniature.models import new_image_unet, new_motion_adapter, new_text_encoder, write_tokenizer
from training.miniature.vae import new_vae
from training.run.config import ROOT

torch.set_num_threads(1)

TIMESTEPS = (999, 600)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained stack on disk, with a student of all weights and one of the motion modules."""
    folder = tmp_path_factory.mktemp("stack")
    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder / "tokenizer", ["a red circle", "a blue square"])
    new_text_encoder(tokenizer).save_pretrained(folder / "text_encoder")
    new_vae().save_pretrained(folder / "vae")
    image_unet, motion = new_image_unet(), new_motion_adapter()
    for name, parameter in motion.named_parameters():
        if name.endswith("proj_out.weight"):
            nn.init.normal_(parameter, std=0.05)
    image_unet.save_pretrained(folder / "unet")
    motion.save_pretrained(folder / "motion_adapter")
    unet = video_unet(image_unet, motion)
    common = {
        "timesteps": TIMESTEPS,
        "frames": 3,
        "height": 32,
        "width": 48,
        "unet_config": unet_config(unet),
        "base_name": "untrained",
        "base_hash": weights_hash(image_unet),
        "updates": 0,
        "training_config": "",
        "title": "untrained",
        "date": "2025-01-31",
        "license": "Apache-2.0",
    }
    weights = dict(unet.named_parameters())
    write_student(folder / "student.safetensors", weights, StudentInfo(holds="all", **common))
    weights = {name: p for name, p in weights.items() if "motion_modules" in name}
    write_student(folder / "motion.safetensors", weights, StudentInfo(holds="motion", **common))
    return folder


@pytest.fixture(scope="module")
def styles(model):
    """Another image model of the family, and a style file of each student."""
    torch.manual_seed(1)
    new_image_unet().save_pretrained(model / "styles" / "other")
    for name in ("student", "motion"):
        student = read_student(model / f"{name}.safetensors")
        weights = dict(student_unet(student, load_image_unet(model / "unet")).named_parameters())
        layers = [key.removesuffix(".weight") for key in weights if key.endswith("attn2.to_k.weight")]
        pairs = {f"{layer}.lora_A.weight": torch.randn(2, weights[f"{layer}.weight"].shape[1]) for layer in layers}
        pairs |= {f"{layer}.lora_B.weight": torch.randn(len(weights[f"{layer}.weight"]), 2) for layer in layers}
        common = {"title": "other", "date": "2025-01-31", "license": "Apache-2.0", "updates": 1, "training_config": ""}
        hashes = {"hash": weights_hash(load_image_unet(model / "styles" / "other")), "student_hash": student_hash(student)}
        info = StyleInfo(name="other", student_name=name, lora_rank=2, lora_alpha=2.0, **hashes, **common)
        write_style(model / "styles" / f"{name}.safetensors", pairs, info)
    return model / "styles"


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
    backends = []
    monkeypatch.setattr(torch, "compile", lambda unet, backend: backends.append(backend) or unet)
    assert command("--compile") == command("--compile", "--teacher", "--steps", "1", student=None) == 0
    assert backends == ["inductor", "inductor"]


def test_teacher_size_is_the_image_unets(model):
    stack = load_stack(model, with_motion=False)
    assert sampling.teacher_size(stack) == (64, 64)


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


def test_clips_are_those_of_the_chain(model):
    stack = load_stack(model, with_motion=False)
    unet = student_unet(read_student(model / "motion.safetensors"), stack.image_unet)
    prompts, seeds = ["a red circle", "a blue square"], [3, 4]
    steps = []
    sampler = sampling.student_sampler(unet, TIMESTEPS, 8)
    clips = sampling.generate(sampler, stack, prompts, seeds, 3, 16, 24, lambda done, x0: steps.append((done, x0.dtype)))
    assert clips.shape == (2, 3, 16, 24, 3) and clips.dtype == torch.uint8
    assert steps == [(1, torch.float32), (2, torch.float32)]
    for i in range(2):
        generator = torch.Generator().manual_seed(seeds[i])
        noise = draw_noise((1, 4, 3, 2, 3), generator)
        with torch.no_grad():
            clip = sample_student(video_predictor(unet), noise, stack.encode_text(prompts[i : i + 1]), TIMESTEPS, generator)
        assert (stack.decode_clips(clip)[0].int() - clips[i].int()).abs().max() <= 3  # a batch sums in another order


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


def test_a_guided_clip_is_that_of_the_pulled_chain(model, styles):
    stack, other = load_stack(model, with_motion=False), load_image_unet(styles / "other")
    unet = student_unet(read_student(model / "motion.safetensors"), stack.image_unet)
    empty, text = stack.encode_text([""]), stack.encode_text(["a red circle"])
    guides = [sampling.style_guide(other, stack.image_unet, empty, s, i) for i, s in enumerate((0.5, 0.25))]
    clip = sampling.generate(
        sampling.student_sampler(unet, TIMESTEPS, 8, guides=guides), stack, ["a red circle"], [7], 3, 16, 24
    )
    generator = torch.Generator().manual_seed(7)
    noise = draw_noise((1, 4, 3, 2, 3), generator)
    pair = image_predictor(other), image_predictor(stack.image_unet)
    first, second = (  # the seeds after the clip's own
        pulled(*pair, text, empty, s, torch.Generator().manual_seed(seed)) for s, seed in ((0.5, 8), (0.25, 9))
    )
    with torch.no_grad():
        expected = sample_student(
            video_predictor(unet), noise, text, TIMESTEPS, generator, refine=lambda x0, i: second(first(x0, i), i)
        )
    assert torch.equal(stack.decode_clips(expected), clip)


def test_a_transplant_at_strength_1_is_the_student_on_the_other_base(model, styles):
    stack, student = load_stack(model), read_student(model / "motion.safetensors")
    unet = student_unet(student, stack.image_unet)
    assert sampling.add_styles([(styles / "other", 1.0)], "transplant", student, unet, stack) == []
    expected = dict(video_unet(load_image_unet(styles / "other"), stack.motion).named_parameters())
    for name, weight in unet.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


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
