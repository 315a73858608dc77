"""The pack in a running ComfyUI, seen as a browser sees it: over HTTP and the websocket, with the bundled miniature."""

import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import torch
from PIL import Image

from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.stack import load_stack
from avdm2_nodes.files.student import read_student, write_student
from avdm2_nodes.files.student_info import StudentInfo
from avdm2_nodes.files.student_unet import student_unet
from tests.avdm2_nodes.conftest import HOW_TO_RUN, PROMPT, ROOT
from tests.avdm2_nodes.live import RUN, Client, Server
from training.evaluation.sampling import generate, student_sampler

pytestmark = pytest.mark.slow

NODES = {
    "AVDM2StackLoader", "AVDM2TeacherLoader", "AVDM2MotionModule", "AVDM2StudentLoader", "AVDM2StudentSampler",
    "AVDM2TeacherSampler", "AVDM2Steps", "AVDM2PromptTravel", "AVDM2SparseControlLoader", "AVDM2StyleTransfer",
    "AVDM2StyleTraining", "AVDM2Distillation", "AVDM2SaveStudent",
}  # fmt: skip
GROWTH = 30  # MB that 50 prompts may add to what the server holds


@pytest.fixture(scope="module")
def server(comfyui_dir, tmp_path_factory):
    """A server with this repository in its custom_nodes and a student of the miniature in its models."""
    if importlib.util.find_spec("aiohttp") is None:
        pytest.skip(f"expected this Python to have ComfyUI's requirements, found no aiohttp: {HOW_TO_RUN}")
    base = tmp_path_factory.mktemp("server")
    (base / "models" / "avdm2").mkdir(parents=True)
    stack = load_stack(ROOT / "miniature")
    info = StudentInfo(
        holds="all", timesteps=(999, 749, 499, 249), frames=8, height=64, width=64, unet_config=unet_config(stack.teacher),
        base_name="miniature", base_hash=weights_hash(stack.image_unet), updates=0, training_config="", title="a test's",
        date="2026-01-31", license="Apache-2.0",
    )  # fmt: skip
    weights = {name: 1.01 * p for name, p in stack.teacher.named_parameters()}
    write_student(base / "models" / "avdm2" / "near the teacher.safetensors", weights, info)
    with Server(comfyui_dir, base) as running:
        yield running


@pytest.fixture
def client(server):
    listening = Client(server.port)
    yield listening
    listening.close()


def graph(
    *samplers: dict, frames: int = 3, width: int = 64, height: int = 64, file: str = "near the teacher.safetensors"
) -> dict:
    """A graph in the API's format: one loader, one prompt, and from each sampler a video, "video 0" and so on.

    As graphs were saved when teacher and student were wires of their own: without an input that came later.
    """
    loader = {"checkpoint": "miniature (bundled)", "motion_module": "the checkpoint's own"}
    nodes = {
        "teacher": {"class_type": "AVDM2TeacherLoader", "inputs": loader},
        "student": {
            "class_type": "AVDM2StudentLoader",
            "inputs": {"student": file, "teacher": ["teacher", 0]},
        },
        "prompt": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["teacher", 1], "text": PROMPT}},
        "size": {"class_type": "EmptyLatentImage", "inputs": {"width": width, "height": height, "batch_size": frames}},
    }
    for i, sampler in enumerate(samplers):
        wires = {"positive": ["prompt", 0], "latent": ["size", 0]}
        wires |= {"student": ["student", 0]} if sampler["class_type"] == "AVDM2StudentSampler" else {"teacher": ["teacher", 0]}
        nodes[f"sampler {i}"] = {"class_type": sampler["class_type"], "inputs": sampler["inputs"] | wires}
        nodes[f"frames {i}"] = {"class_type": "VAEDecode", "inputs": {"samples": [f"sampler {i}", 0], "vae": ["teacher", 2]}}
        nodes[f"clip {i}"] = {"class_type": "CreateVideo", "inputs": {"images": [f"frames {i}", 0], "fps": 8.0}}
        saving = {"video": [f"clip {i}", 0], "filename_prefix": "video/clip", "format": "auto", "codec": "auto"}
        nodes[f"video {i}"] = {"class_type": "SaveVideo", "inputs": saving}
    return nodes


def students(server) -> list[str]:
    """The students that the loader offers."""
    choices = server.get("/object_info/AVDM2StudentLoader")["AVDM2StudentLoader"]["input"]["required"]["student"]
    return choices[0] if isinstance(choices[0], list) else choices[1]["options"]


def student(seed: int, steps: int = 4) -> dict:
    return {"class_type": "AVDM2StudentSampler", "inputs": {"seed": seed, "steps": steps, "denoise": 1.0}}


def teacher(seed: int, steps: int) -> dict:
    return {"class_type": "AVDM2TeacherSampler", "inputs": {"seed": seed, "steps": steps, "cfg": 3.0, "denoise": 1.0}}


def test_the_pack_loads_without_a_word(server):
    found = server.get("/object_info")
    assert {name for name in found if "avdm2" in name.lower()} == NODES
    assert found["AVDM2StudentLoader"]["input"]["required"]["teacher"][0] == "MODEL"
    log = server.log()
    assert "IMPORT FAILED" not in log and "Traceback" not in log
    about_us = [line for line in log.splitlines() if "avdm2" in line.lower().replace(str(server.base).lower(), "")]
    (timing,) = (line for line in about_us if "seconds" in line)
    assert re.search(r"\d+\.\d+ seconds: .*AVDM2$", timing), timing
    assert about_us == [timing], "all that the log says of the pack is how long it took"


def test_a_clip_with_progress_previews_and_its_workflow_inside(server, client):
    prompt_id = server.submit(graph(student(seed=1)), client.id)
    ended = server.wait_for(prompt_id)
    assert ended["status"]["status_str"] == "success", ended["status"]["messages"]
    (video,) = (server.base / "output" / "video").glob("clip*.mp4")
    with av.open(video) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3
        said = {key: json.loads(container.metadata[key]) for key in ("workflow", "prompt")}
    assert said["workflow"] == {"drawn": "by a person"}
    assert said["prompt"]["sampler 0"]["class_type"] == "AVDM2StudentSampler"
    steps = [data["value"] for _, data in client.wait_for("progress", 4) if data["node"] == "sampler 0" and data["max"] == 4]
    # Twice each: core's preview, and ours behind it.
    assert [step for step, _ in itertools.groupby(steps) if step] == [1, 2, 3, 4]
    previews = [data for _, data in client.wait_for("binary", 8)]
    assert len(previews) == 8, "core's still and then the clip, in each step"
    for still in previews[::2]:
        assert still[:8] == (1).to_bytes(4, "big") + (1).to_bytes(4, "big"), "a preview, as JPEG"
    for preview in previews[1::2]:
        assert preview[:8] == (1).to_bytes(4, "big") + (2).to_bytes(4, "big"), "a preview, as PNG"
        picture = Image.open(io.BytesIO(preview[8:]))
        assert picture.format == "PNG" and max(picture.size) == 320
        assert picture.is_animated and picture.n_frames == 1 + 3, "a still of all frames, then the frames"


def test_teacher_and_student_in_one_graph(server):
    assert server.run(graph(student(seed=5, steps=2), teacher(seed=5, steps=2))).keys() >= {"video 0", "video 1"}


def test_the_nodes_of_core_s_own_kind_of_graph(server):
    """The miniature as an image model, motion by a node, core's sampler, a prompt a frame."""
    nodes = {
        "base": {"class_type": "AVDM2StackLoader", "inputs": {"stack": "miniature (bundled)"}},
        "student": {"class_type": "AVDM2StudentLoader", "inputs": {"student": "miniature (bundled)", "teacher": ["base", 0]}},
        "prompt": {
            "class_type": "AVDM2PromptTravel",
            "inputs": {"clip": ["base", 1], "prompts": "0: a small red circle\n3: a large blue square", "frames": 4},
        },
        "none": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["base", 1], "text": ""}},
        "size": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 4}},
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["student", 0], "positive": ["prompt", 0], "negative": ["none", 0], "latent_image": ["size", 0], "seed": 1,
                "steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "frames": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["base", 2]}},
        "stills": {"class_type": "SaveImage", "inputs": {"images": ["frames", 0], "filename_prefix": "core"}},
    }  # fmt: skip
    assert len(server.run(nodes)["stills"]["images"]) == 4


def test_what_does_not_fit_is_told_on_the_node(server, client):
    """One frame, in words on the sampler while it runs."""
    prompt_id = server.submit(graph(student(seed=1), frames=1), client.id)
    assert server.wait_for(prompt_id)["status"]["status_str"] == "success"
    texts = [data for _, data in client.of("binary") if data[:4] == (3).to_bytes(4, "big")]
    (told,) = (data for data in texts if b"sampler 0" in data)
    assert told.endswith(b"One frame only: for a clip set batch_size of the latent to the number of frames.")


def test_an_error_is_told_in_our_words(server):
    wrong = student(seed=1)
    wrong["inputs"]["cfg"] = 2.0
    ended = server.wait_for(server.submit(graph(wrong)))
    assert ended["status"]["status_str"] == "error"
    ((_, told),) = (message for message in ended["status"]["messages"] if message[0] == "execution_error")
    assert told["node_type"] == "AVDM2StudentSampler"
    assert re.fullmatch(
        r"Expected a negative prompt with cfg 2, found none; wire one, or set cfg to 1\.\s*", told["exception_message"]
    )


def test_a_student_is_saved_where_the_loader_finds_it(server):
    saving = graph() | {
        "save": {"class_type": "AVDM2SaveStudent", "inputs": {"student": ["student", 0], "name": "saved/again"}}
    }
    path = server.base / "models" / "avdm2" / "saved" / "again.safetensors"
    assert server.run(saving)["save"]["text"] == [str(path)]
    saved, own = read_student(path), read_student(server.base / "models" / "avdm2" / "near the teacher.safetensors")
    assert saved.info == own.info and all(torch.equal(tensor, own.tensors[name]) for name, tensor in saved.tensors.items())
    assert os.path.join("saved", "again.safetensors") in students(server)


def test_where_a_student_was_saved_is_shown_on_the_node(server, client):
    inputs = {"student": ["student", 0], "name": "shown"}
    saving = graph() | {"save": {"class_type": "AVDM2SaveStudent", "inputs": inputs}}
    assert server.wait_for(server.submit(saving, client.id))["status"]["status_str"] == "success"
    path = str(server.base / "models" / "avdm2" / "shown.safetensors")
    texts = [data for _, data in client.wait_for("binary") if data[:4] == (3).to_bytes(4, "big")]
    assert texts == [(3).to_bytes(4, "big") + (4).to_bytes(4, "big") + b"save" + path.encode()]


def test_a_student_made_while_the_server_runs_samples_there(server, tmp_path):
    """Distilled by the command from the shipped teacher, in a few large updates, and copied to where a person would put it."""
    settings = {
        "run.folder": tmp_path / "run", "run.updates": 3, "run.batch": 2, "run.device": "cpu", "run.threads": 1,
        "data.folder": tmp_path / "clips", "data.render": 8, "student.lr": 1e-3, "student.warmup": 0, "student.ema": 0,
        "warmup.updates": 1, "evaluation.clips": 6, "evaluation.teacher_steps": 2,
    }  # fmt: skip
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, str(ROOT / "training" / "distill.py"), *arguments]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=RUN)
    assert made.returncode == 0, made.stdout + made.stderr
    file = tmp_path / "run" / "student.safetensors"
    assert "fresh.safetensors" not in students(server)
    shutil.copy(file, server.base / "models" / "avdm2" / "fresh.safetensors")
    assert "fresh.safetensors" in students(server)

    def frames(name: str) -> torch.Tensor:
        saving = {"images": ["frames 0", 0], "filename_prefix": name}
        stills = {"stills": {"class_type": "SaveImage", "inputs": saving}}
        saved = server.run(graph(student(seed=6, steps=0), frames=8, file=f"{name}.safetensors") | stills)["stills"]["images"]
        pictures = [np.asarray(Image.open(server.base / "output" / each["filename"])) for each in saved]
        return torch.from_numpy(np.stack(pictures)).float()

    stack, made = load_stack(ROOT / "miniature", with_motion=False), read_student(file)
    network = student_unet(made, stack.image_unet)
    sampler = student_sampler(network, made.info.timesteps, made.info.frames)
    expected = generate(sampler, stack, [PROMPT], [6], 8, 64, 64)[0].float()
    assert (frames("fresh") - expected).abs().max() <= 1
    assert (frames("near the teacher") - expected).abs().mean() > 2, "another student's clip is another"


def test_an_interrupt_stops_a_long_run_within_a_step(server, client, record_property):
    prompt_id = server.submit(graph(teacher(seed=2, steps=500)), client.id)
    client.wait_for("progress", 4)
    pressed = time.monotonic()
    server.post("/interrupt", {})
    ((stopped, told),) = client.wait_for("execution_interrupted")
    assert told["node_type"] == "AVDM2TeacherSampler"
    moved = [when for when, data in client.of("progress") if data["max"] == 500]
    after = [when for when in moved if when > pressed]
    step = max(b - a for a, b in itertools.pairwise(moved[1:]))
    record_property("interrupt_latency_s", round(stopped - pressed, 3))
    record_property("longest_step_s", round(step, 3))
    print(f"\ninterrupt after {len(moved)} steps, stopped in {stopped - pressed:.3f} s; the longest step took {step:.3f} s")
    assert len(after) <= 1, "the step under way may end, no other begins"
    assert server.wait_for(prompt_id)["status"]["status_str"] == "error"
    assert server.run(graph(student(seed=3)))["video 0"], "the next prompt works"


def test_fifty_prompts_leave_memory_where_it_was(server, record_property):
    for seed in range(10):
        server.run(graph(student(100 + seed, steps=2), frames=2))
    before = server.rss()
    for seed in range(50):
        server.run(graph(student(200 + seed, steps=2), frames=2))
    after = server.rss()
    record_property("rss_mb", [round(before), round(after)])
    print(f"\nRSS {before:.1f} MB after 10 prompts, {after:.1f} MB after 60")
    assert after - before < GROWTH


def test_after_unloading_the_next_prompt_works(server, record_property):
    loaded = server.rss()
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(5)  # the server frees between two prompts
    freed = server.rss()
    print(f"\nRSS {loaded:.1f} MB, {freed:.1f} MB after unloading")
    assert freed < loaded, "gigabytes at full size: see test_server_sd15.py"
    assert server.run(graph(student(seed=77)))["video 0"]
    assert "leak" not in server.log().lower()
