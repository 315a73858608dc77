"""The SD1.5 workflows in a running ComfyUI, through comfy-cli, with files of random weights: 14 GB of memory, 7 GB of disk."""

import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.motion import to_diffusers_keys
from avdm2_nodes.files.stack import load_image_unet
from avdm2_nodes.files.student import write_student
from avdm2_nodes.files.student_info import StudentInfo
from tests.avdm2_nodes.conftest import ROOT
from tests.avdm2_nodes.files.original_layouts import SD15, original_checkpoint, original_motion, values
from tests.avdm2_nodes.live import Client, Server
from training.data.video import write_video

pytestmark = pytest.mark.slow

COMFY = Path(sys.executable).with_name("comfy")
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
MINIATURE = [path for path in WORKFLOWS if "(miniature)" in path.stem]
# At this size training is for a GPU; IP-Adapter and SparseCtrl have tests of their own, of their published layouts.
FULL_SIZE = [path for path in WORKFLOWS if path not in MINIATURE and not path.stem.startswith(("15", "17", "18", "19"))]
CHECKPOINT, MOTION, STUDENT = "v1-5-pruned-emaonly-fp16.safetensors", "v3_sd15_mm.ckpt", "avdm2_sd15_4step.safetensors"
LIGHTNING = "animatediff_lightning_4step_comfyui.safetensors"
LEFT = 300  # MB that may stay when all models of full size are unloaded: allocator, caches of libraries
SMALL = {  # so that a CPU does it in minutes
    "EmptyLatentImage": [64, 64, 2],
    "PrimitiveInt": [18, "fixed"],  # frames of a long clip: more than a window; elsewhere a seed
    "ImageFromBatch": [0, 2],
    "ImageScale": ["lanczos", 64, 64, "center"],
    "LoadVideo": ["clip.mp4", "image"],
    "AVDM2TeacherSampler": [1, "fixed", 2, 7.5, 1.0],
    "AVDM2StyleTraining": ["neon of miniature (bundled)", "neon", 6, "", "the model's own"],
    "AVDM2Distillation": ["rendered clips (for the miniature)", "short", 6, "fits 24 GB", "", "the model's own"],
}


def write_models(base: Path) -> None:
    """Random weights under the names that the workflows give, in the original layouts."""
    manifest = yaml.safe_load((ROOT / "workflows" / "models.yaml").read_text(encoding="utf-8"))
    needs = {(kind, name) for files in manifest.values() for kind, names in files.items() for name in names}
    models = base / "models"
    needs = {(kind, name) for kind, name in needs if kind not in ("ipadapter", "clip_vision") and "sparsectrl" not in name} | {
        ("avdm2", STUDENT)
    }
    for kind, _ in needs:
        (models / kind).mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(sorted(name for kind, name in needs if kind == "checkpoints")):
        save_file(values(original_checkpoint(**SD15), seed, torch.float16), models / "checkpoints" / name)
    motion = values(original_motion(), dtype=torch.float16)
    torch.save(motion, models / "animatediff_models" / MOTION)
    save_file(values(original_motion(mid=True), 1, torch.float16), models / "animatediff_models" / LIGHTNING)
    write_lora(next(models / kind / name for kind, name in needs if kind == "loras"))
    write_controlnet(next(models / kind / name for kind, name in needs if "canny" in name))
    (base / "input").mkdir(exist_ok=True)
    write_video(base / "input" / "clip.mp4", np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8), 8)
    student = {key: 0.9 * tensor for key, tensor in to_diffusers_keys(motion).items()}
    base_hash = weights_hash(load_image_unet(models / "checkpoints" / CHECKPOINT))
    info = StudentInfo(
        holds="motion", timesteps=(999, 749, 499, 249), frames=16, height=512, width=512, unet_config=student_config(),
        base_name=CHECKPOINT, base_hash=base_hash, updates=0, training_config="", title="random", date="2026-01-31",
        license="CreativeML OpenRAIL-M",
    )  # fmt: skip
    write_student(models / "avdm2" / STUDENT, student, info)
    assert {(path.parent.name, path.name) for path in models.glob("*/*.*")} == needs


def write_lora(path: Path) -> None:
    """A LoRA of one layer, in the names of kohya's scripts."""
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    up, down = torch.randn(320, 4) / 8, torch.randn(4, 320) / 8
    save_file({f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down, f"{layer}.alpha": torch.tensor(4.0)}, path)


def write_controlnet(path: Path) -> None:
    """A ControlNet of SD1.5's size in diffusers' names."""
    from diffusers import ControlNetModel

    with torch.device("meta"):
        shapes = ControlNetModel(cross_attention_dim=768).state_dict()
    save_file({name: torch.randn(tensor.shape).mul(0.02).half() for name, tensor in shapes.items()}, path)


def student_config() -> dict:
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    from avdm2_nodes.files.architecture import unet_config

    with torch.device("meta"):
        image = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        motion = MotionAdapter(motion_max_seq_length=32, use_motion_mid_block=False)
        return unet_config(UNetMotionModel.from_unet2d(image, motion, load_weights=False))


@pytest.fixture(scope="module")
def server(comfyui_dir, tmp_path_factory):
    if not COMFY.is_file():
        pytest.skip("needs comfy-cli: pip install comfy-cli")
    base = tmp_path_factory.mktemp("sd15")
    try:
        write_models(base)
        with Server(comfyui_dir, base) as running:
            yield running
    finally:
        shutil.rmtree(base / "models", ignore_errors=True)


def comfy_run(server: Server, path: Path) -> None:
    """`comfy run --workflow`, as a person types it."""
    command = [COMFY, "--skip-prompt", "--no-enable-telemetry", "run", "--workflow", path, "--wait", "--timeout", "900"]
    done = subprocess.run(
        [*command, "--host", "127.0.0.1", "--port", str(server.port)], capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stdout + done.stderr + server.log()[-4000:]


def made_small(path: Path, folder: Path) -> Path:
    """The workflow of a file with the few values replaced that make it slow."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        node["widgets_values"] = SMALL.get(node["type"], node["widgets_values"])
    small = folder / path.name
    small.write_text(json.dumps(workflow), encoding="utf-8")
    return small


def unload(server: Server, least: float) -> float:
    """Presses "unload models"; MB held as soon as that is no more than `least`, or after a minute.

    It is pressed again every few seconds: ComfyUI's worker sleeps through a press in the moment between its last look and its
    waiting for work, as one that follows an interrupt at once, until something else wakes it.
    """
    for _ in range(12):
        server.post("/free", {"unload_models": True, "free_memory": True})
        until = time.monotonic() + 5
        while (held := server.rss()) > least and time.monotonic() < until:
            time.sleep(0.5)
        if held <= least:
            break
    return held


def test_every_workflow_is_run_by_one_of_these_tests():
    assert MINIATURE and {path.stem[:2] for path in FULL_SIZE} == {"11", "12", "13", "14", "16"}


@pytest.mark.parametrize("path", MINIATURE, ids=lambda path: path.stem)
def test_comfy_run_passes_for_the_miniature(server, tmp_path, path):
    trains = "training" in path.stem or "Distillation" in path.stem
    comfy_run(server, made_small(path, tmp_path) if trains else path)


def test_each_sd15_workflow_passes_and_unloading_gives_its_memory_back(server, tmp_path, record_property):
    before, held = unload(server, 0), {}  # with all libraries imported, by the workflows of the miniature
    for path in FULL_SIZE:
        comfy_run(server, made_small(path, tmp_path))
        held[path.stem] = server.rss()
    after = unload(server, before + LEFT)
    record_property("rss_mb", {"before": before, **held, "after": after})
    print(f"\nRSS {before:.0f} MB before, {held} after each workflow, {after:.0f} MB after unloading")
    assert min(held.values()) > before + 2000, "a network of 1.3 billion parameters is held"
    assert after < before + LEFT


def test_an_interrupt_stops_within_an_evaluation_and_leaves_nothing(server, tmp_path, record_property):
    before, listening = unload(server, 0), Client(server.port)
    loader = {"checkpoint": CHECKPOINT, "motion_module": MOTION}
    sampler = {
        "teacher": ["teacher", 0], "positive": ["text", 0], "latent": ["size", 0], "seed": 1, "steps": 50, "cfg": 7.5, "denoise": 1.0,
    }  # fmt: skip
    graph = {
        "teacher": {"class_type": "AVDM2TeacherLoader", "inputs": loader},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["teacher", 1], "text": "a boat"}},
        "size": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 4}},
        "sampler": {"class_type": "AVDM2TeacherSampler", "inputs": sampler},
        "frames": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["teacher", 2]}},
        "shown": {"class_type": "PreviewImage", "inputs": {"images": ["frames", 0]}},
    }
    prompt_id = server.submit(graph, listening.id)
    until = time.monotonic() + 600
    while len(listening.of("progress")) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    pressed = time.monotonic()
    server.post("/interrupt", {})
    ((stopped, told),) = listening.wait_for("execution_interrupted")
    assert told["node_type"] == "AVDM2TeacherSampler"
    moved = [when for when, data in listening.of("progress") if data["max"] == 50]
    step = max(b - a for a, b in itertools.pairwise(moved[1:]))
    assert server.wait_for(prompt_id)["status"]["status_str"] == "error"
    listening.close()
    after = unload(server, before + LEFT)
    record_property("interrupt", {"latency_s": stopped - pressed, "longest_step_s": step, "rss_mb": [before, after]})
    print(
        f"\nstopped {stopped - pressed:.2f} s after the interrupt, steps of up to {step:.2f} s; RSS {before:.0f} and {after:.0f} MB"
    )
    assert sum(when > pressed for when in moved) <= 1, "the step under way may end, no other begins"
    assert after < before + LEFT
    comfy_run(server, made_small(FULL_SIZE[0], tmp_path))
