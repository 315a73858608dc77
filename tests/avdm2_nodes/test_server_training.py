"""The nodes that train in a running ComfyUI: shown, stopped, resumed, and ended with the server, on the tiny stack."""

import importlib.util
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.style import read_style, require_student
from tests.avdm2_nodes.conftest import HOW_TO_RUN, ROOT
from tests.avdm2_nodes.files.original_layouts import SD15, original_checkpoint
from tests.avdm2_nodes.live import RUN, Client, Server
from training.data.clips import write_clips
from training.world import scenes

pytestmark = pytest.mark.slow

PROMPTS = (
    "a small red circle standing still on a plain background\na large blue square moving left fast on a plain background\n"
)
STYLE, IMAGES = "other of tiny", "images in input/paintings"
VIDEOS = "videos in input/clips"  # in place of a style: a student is distilled
SETTINGS = """
run: {updates: 0, batch: 2, precision: float32, threads: 1, save_every: 100, sample_every: 2}
data: {clips: 2}
model: {train: style, lora_rank: 2}
warmup: {substeps: 1}
sdm: {frames: 1, updates_per_student: 1}
adm: {weight: 0}
style: {image_steps: 2, image_batch: 2}
evaluation: {teacher_steps: 1}
"""
DISTILLATION = """
run: {updates: 1, batch: 2, precision: float32, threads: 1, save_every: 100, sample_every: 2}
data: {height: 32, width: 64}
model: {train: all}
student: {steps: [999, 499]}
warmup: {updates: 2, substeps: 1}
sdm: {frames: 1, updates_per_student: 1}
adm: {updates_per_student: 1}
"""


@pytest.fixture
def base(tmp_path, node_stack_folder, students):
    (tmp_path / "models" / "diffusers").mkdir(parents=True)
    (tmp_path / "models" / "diffusers" / "tiny").symlink_to(node_stack_folder, target_is_directory=True)
    (tmp_path / "models" / "avdm2").mkdir()
    shutil.copy(students["all"], tmp_path / "models" / "avdm2" / "all.safetensors")
    (tmp_path / "input" / "paintings").mkdir(parents=True)
    for i, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (80, 40), colour).save(tmp_path / "input" / "paintings" / f"{i}.png")
    shown = scenes.render_split(4, style="plain", held_out=False, seed=0)
    write_clips(tmp_path / "input" / "clips", ((clip.frames, clip.content.caption) for clip in shown), scenes.FPS)
    return tmp_path


@pytest.fixture
def pack(tmp_path):
    """The pack as it is, with settings of a run that takes moments."""
    folder = tmp_path / "pack"
    folder.mkdir()
    for part in ("avdm2_nodes", "training", "web"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("__init__.py", "requirements-training.txt"):
        shutil.copy(ROOT / file, folder / file)
    (folder / "training" / "configs" / "style_sd15.yaml").write_text(SETTINGS)
    (folder / "training" / "configs" / "sd15.yaml").write_text(DISTILLATION)
    return folder


@pytest.fixture
def server(comfyui_dir, base, pack):
    """A server of the test's own, which it may kill."""
    if importlib.util.find_spec("aiohttp") is None:
        pytest.skip(f"expected this Python to have ComfyUI's requirements, found no aiohttp: {HOW_TO_RUN}")
    running = Server(comfyui_dir, base, pack)
    try:
        running.wait_until_up()
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


@pytest.fixture
def client(server):
    listening = Client(server.port)
    yield listening
    if server.process.poll() is None:
        listening.close()


def graph(style: str, updates: int) -> dict:
    """A style is trained, or a student distilled, and a clip made with it."""
    loader = {"checkpoint": "tiny", "motion_module": "the checkpoint's own"}
    training = {"student": ["student", 0], "style": style, "name": "mine/ink", "updates": updates, "prompts": PROMPTS}
    kind = "AVDM2StyleTraining"
    if style == VIDEOS:
        training = {"teacher": ["teacher", 0], "videos": VIDEOS, "settings": "all weights (80 GB)"} | {
            key: training[key] for key in ("name", "updates")
        }
        kind = "AVDM2Distillation"
    sampling = {
        "student": ["training", 0],
        "positive": ["prompt", 0],
        "latent": ["size", 0],
        "seed": 1,
        "steps": 2,
        "denoise": 1.0,
    }
    return {
        "teacher": {"class_type": "AVDM2TeacherLoader", "inputs": loader},
        "student": {
            "class_type": "AVDM2StudentLoader",
            "inputs": {"student": "all.safetensors", "teacher": ["teacher", 0]},
        },
        "training": {"class_type": kind, "inputs": training},
        "prompt": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["teacher", 1], "text": "a circle"}},
        "size": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 32, "batch_size": 2}},
        "sampler": {"class_type": "AVDM2StudentSampler", "inputs": sampling},
        "frames": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["teacher", 2]}},
        "stills": {"class_type": "SaveImage", "inputs": {"images": ["frames", 0], "filename_prefix": "still"}},
    }


def jobs(base: Path) -> list[int]:
    """The processes that train in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            zombie = b"\nState:\tZ" in (process / "status").read_bytes()
        except OSError:
            continue
        if b"distill.py" in command and str(base).encode() in command and not zombie:
            found.append(int(process.name))
    return found


def wait_until(condition, limit=RUN):
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until, f"not in {limit} s"
        time.sleep(0.05)


def stats(base: Path) -> list[dict]:
    path = base / "output" / "AVDM2" / "mine" / "ink" / "stats.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )


def left_over(base: Path) -> list[Path]:
    return [path for folder in ("output", "models/avdm2") for path in (base / folder).rglob("*.tmp")]


@pytest.mark.parametrize("style", [STYLE, IMAGES])
def test_a_style_is_trained_before_one_s_eyes_and_handed_on(server, client, base, students, node_stack, style):
    ended = server.wait_for(server.submit(graph(style, 3), client.id))
    assert ended["status"]["status_str"] == "success", (ended["status"]["messages"], server.log()[-2000:])
    file = base / "models" / "avdm2" / "mine" / "ink.safetensors"
    learnt = read_style(file)
    require_student(learnt, read_student(students["all"]))
    assert learnt.info.name == "ink" and learnt.info.updates == 3
    assert learnt.info.hash != weights_hash(node_stack.image_unet)
    assert ended["outputs"]["training"]["text"] == [str(file)] and len(ended["outputs"]["stills"]["images"]) == 2
    steps = [data for _, data in client.of("progress") if data["node"] == "training"]
    assert steps and steps[-1]["max"] >= 3
    said = b"".join(data for _, data in client.of("binary") if data[:4] == (3).to_bytes(4, "big"))
    assert (b"update 3 of 3" in said or b"update 2 of 3" in said) and str(file).encode() in said
    shown = ended["outputs"]["training"]["images"]
    assert [each["filename"] for each in shown] == ["update-000003.png"], "the finished student's clips"
    for each in shown:
        assert Image.open(base / "output" / each["subfolder"] / each["filename"]).format == "PNG"
    previews = [data for _, data in client.of("binary") if data[:4] == (1).to_bytes(4, "big")]
    assert all(Image.open(io.BytesIO(preview[8:])).size for preview in previews)
    choices = server.get("/object_info/AVDM2StyleTransfer")["AVDM2StyleTransfer"]["input"]["required"]["style"]
    assert os.path.join("mine", "ink.safetensors") in (choices[0] if isinstance(choices[0], list) else choices[1]["options"])
    assert not jobs(base) and not left_over(base)


@pytest.mark.parametrize("style", [STYLE, VIDEOS])
def test_an_interrupt_stops_it_with_a_checkpoint_and_the_same_settings_go_on(server, client, base, style):
    long = server.submit(graph(style, 5000), client.id)
    wait_until(lambda: len(stats(base)) >= 2)
    server.post("/interrupt", {})
    ((_, told),) = client.wait_for("execution_interrupted")
    assert told["node_type"] == ("AVDM2Distillation" if style == VIDEOS else "AVDM2StyleTraining")
    assert server.wait_for(long)["status"]["status_str"] == "error"
    assert not jobs(base) and not (base / "models" / "avdm2" / "mine").exists()
    done = stats(base)
    checkpoints = [path.name for path in (base / "output" / "AVDM2" / "mine" / "ink" / "checkpoints").iterdir()]
    assert f"step-{done[-1]['update']:08d}.safetensors" in checkpoints
    other = server.wait_for(server.submit(graph(style, 4000 if style == STYLE else 1), client.id))
    ((_, told),) = (message for message in other["status"]["messages"] if message[0] == "execution_error")
    assert "updates " in told["exception_message"] and "--" not in told["exception_message"], "in the words of the node"
    again = server.submit(graph(style, 5000), client.id)
    wait_until(lambda: len(stats(base)) >= len(done) + 2)
    server.post("/interrupt", {})
    server.wait_for(again)
    assert stats(base)[: len(done)] == done and stats(base)[len(done)]["update"] == done[-1]["update"] + 1
    assert not jobs(base) and not left_over(base)


def test_a_student_is_distilled_before_one_s_eyes_and_handed_on(server, client, base, node_stack):
    ended = server.wait_for(server.submit(graph(VIDEOS, 3), client.id))
    assert ended["status"]["status_str"] == "success", (ended["status"]["messages"], server.log()[-2000:])
    file = base / "models" / "avdm2" / "mine" / "ink.safetensors"
    assert read_student(file).info.base_hash == weights_hash(node_stack.image_unet)
    shown = ended["outputs"]["training"]
    assert shown["text"] == [str(file)] and len(ended["outputs"]["stills"]["images"]) == 2
    assert [each["filename"] for each in shown["images"]] == ["update-000003.png"], "the finished student's clips"
    steps = [data for _, data in client.of("progress") if data["node"] == "training"]
    assert steps and steps[-1]["max"] == 3
    said = b"".join(data for _, data in client.of("binary") if data[:4] == (3).to_bytes(4, "big"))
    assert b"critic" in said and str(file).encode() in said
    choices = server.get("/object_info/AVDM2StudentLoader")["AVDM2StudentLoader"]["input"]["required"]["student"]
    assert os.path.join("mine", "ink.safetensors") in (choices[0] if isinstance(choices[0], list) else choices[1]["options"])
    assert not jobs(base) and not left_over(base)


def test_a_base_that_core_does_not_remember_is_found_in_the_graph(server, base):
    """ComfyUI 0.8 forgets a MODEL's file with the first clone."""
    nodes = graph(STYLE, 2) | {
        "teacher": {"class_type": "AVDM2StackLoader", "inputs": {"stack": "tiny"}},
        "free": {"class_type": "FreeU", "inputs": {"model": ["teacher", 0], "b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}},
    }
    nodes["student"]["inputs"]["teacher"] = ["free", 0]
    ended = server.wait_for(server.submit(nodes))
    assert ended["status"]["status_str"] == "success", (ended["status"]["messages"], server.log()[-2000:])
    assert len(ended["outputs"]["stills"]["images"]) == 2


def test_core_s_load_checkpoint_says_which_file_training_reads(server, client, base):
    """An SD1.5 checkpoint of full size; the process is stopped as soon as it has been told. 3 GB of memory, 2 GB of disk."""
    checkpoint, motion = (
        base / "models" / kind for kind in ("checkpoints/zeros.safetensors", "animatediff_models/motion.ckpt")
    )
    for file in (checkpoint, motion):
        file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(shape).half() for name, shape in original_checkpoint(**SD15).items()}, checkpoint)
    motion.touch()
    nodes = graph(VIDEOS, 3) | {
        "core": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint.name}},
        "free": {"class_type": "FreeU", "inputs": {"model": ["core", 0], "b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}},
    }
    nodes["training"]["inputs"] |= {"teacher": ["free", 0], "motion_module": motion.name}
    running = server.submit(nodes, client.id)
    settings = base / "output" / "AVDM2" / "mine" / "ink" / "settings.yaml"
    wait_until(settings.exists)
    server.post("/interrupt", {})
    assert server.wait_for(running)["status"]["status_str"] == "error"
    model = yaml.safe_load(settings.read_text())["model"]
    assert (model["teacher"], model["motion"]) == (str(checkpoint), str(motion)) and Path(model["tokenizer"]).is_dir()
    assert not jobs(base)


@pytest.mark.parametrize("moment", ["loading", "training"])
def test_a_killed_server_takes_it_along_and_nothing_is_half_written(server, client, base, moment):
    server.submit(graph(STYLE, 5000))
    wait_until(lambda: jobs(base) and (moment == "loading" or len(stats(base)) >= 2))
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    wait_until(lambda: not jobs(base), 150)
    assert not left_over(base) and not (base / "models" / "avdm2" / "mine").exists()
    if moment == "training":
        folder = base / "output" / "AVDM2" / "mine" / "ink"
        assert f"step-{stats(base)[-1]['update']:08d}.safetensors" in [path.name for path in (folder / "checkpoints").iterdir()]
        assert "the same command goes on" in (folder / "training.log").read_text()


def test_what_goes_wrong_there_is_told_on_the_node_in_its_words(server, base):
    (base / "input" / "paintings" / "0.png").write_bytes(b"no picture")
    for i in (1, 2, 3):
        (base / "input" / "paintings" / f"{i}.png").unlink()
    ended = server.wait_for(server.submit(graph(IMAGES, 3)))
    ((_, told),) = (message for message in ended["status"]["messages"] if message[0] == "execution_error")
    assert told["node_type"] == "AVDM2StyleTraining" and told["exception_message"].startswith("Expected ")
    assert "Traceback" not in told["exception_message"] and not jobs(base)
