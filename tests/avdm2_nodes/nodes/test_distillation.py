"""AVDM2 Distillation at work: real runs of the tiny stack, each a process of its own."""

import importlib
import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.student import read_student
from training.data.clips import write_clips
from training.world import scenes

VIDEOS, QUICK = "videos in input/clips", "quick"
PROMPTS = (
    "a small red circle standing still on a plain background\na large blue square moving left fast on a plain background\n"
)
SETTINGS = """
run: {updates: 1, batch: 2, precision: float32, threads: 1, save_every: 100, sample_every: 2}
data: {height: 32, width: 64, clips: 2}
model: {train: all}
student: {steps: [999, 499]}
warmup: {updates: 2, substeps: 1}
sdm: {frames: 1, updates_per_student: 1}
adm: {updates_per_student: 1}
evaluation: {teacher_steps: 1}
"""


@pytest.fixture
def distil(comfyui, loaded, monkeypatch, tmp_path):
    """distil(name, updates=..., videos=...): the node's student, by settings of a run that takes moments."""
    (tmp_path / "quick.yaml").write_text(SETTINGS)
    monkeypatch.setitem(comfyui.pack("comfy_bridge.folders").SETTINGS, QUICK, tmp_path / "quick.yaml")

    def run(name, updates=0, videos=VIDEOS, teacher=loaded.teacher, **more):
        inputs = {"teacher": teacher, "videos": videos, "name": name, "updates": updates, "settings": QUICK}
        return comfyui.run("AVDM2Distillation", **inputs | more)[0]

    return run


@pytest.fixture(scope="session", autouse=True)
def clips(comfyui):
    """A folder of captioned videos in ComfyUI's input folder."""
    shown = scenes.render_split(4, style="plain", held_out=False, seed=0)
    write_clips(comfyui.base / "input" / "clips", ((clip.frames, clip.content.caption) for clip in shown), scenes.FPS)


def folder_of(comfyui, name: str) -> Path:
    return comfyui.base / "output" / "AVDM2" / name


def stats(comfyui, name: str) -> list[dict]:
    path = folder_of(comfyui, name) / "stats.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def jobs(comfyui) -> list[int]:
    """The processes that train in this ComfyUI's folders."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            zombie = b"\nState:\tZ" in (process / "status").read_bytes()
        except OSError:
            continue
        if b"distill.py" in command and str(comfyui.base).encode() in command and not zombie:
            found.append(int(process.name))
    return found


def once(condition, act) -> threading.Thread:
    """Does something, once it is time for it, beside the node that is being run."""

    def wait():
        until = time.monotonic() + 600
        while not condition() and time.monotonic() < until:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def refusal(act, *arguments, **more) -> str:
    with pytest.raises(Exception, match=r"^Expected ") as caught:
        act(*arguments, **more)
    text = str(caught.value)
    assert "\n" not in text and "--" not in text and "Traceback" not in text
    return text


def test_a_student_is_distilled_handed_on_and_taken_further(comfyui, distil, node_stack, model_folders, progress, loaded):
    student = distil("mine/quick")
    assert progress and progress[-1][:2] == (3, 3)
    file = model_folders / "avdm2" / "mine" / "quick.safetensors"
    read = read_student(file)
    assert (read.info.holds, read.info.timesteps, read.info.frames, read.info.height) == ("all", (999, 499), 5, 32)
    assert read.info.base_hash == weights_hash(node_stack.image_unet) and read.info.updates == 1
    facts = comfyui.pack("comfy_bridge.facts").student_facts(student)
    assert facts.base == model_folders / "diffusers" / "tiny" and facts.motion == facts.base / "motion_adapter"
    (latent,) = comfyui.run(
        "AVDM2StudentSampler", student=student, positive=comfyui.prompt(loaded.clip), latent=comfyui.empty(), seed=1, steps=0,
        denoise=1.0,
    )  # fmt: skip
    (again,) = comfyui.run("AVDM2StudentLoader", student=os.path.join("mine", "quick.safetensors"), teacher=loaded.teacher)
    (same,) = comfyui.run(
        "AVDM2StudentSampler", student=again, positive=comfyui.prompt(loaded.clip), latent=comfyui.empty(), seed=1, steps=0,
        denoise=1.0,
    )  # fmt: skip
    assert torch.equal(latent["samples"], same["samples"]) and latent["samples"].isfinite().all()
    folder = folder_of(comfyui, "mine/quick")
    assert [line["update"] for line in stats(comfyui, "mine/quick")] == [1, 2, 3]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["update-000002.png", "update-000003.png"]
    assert not (folder / "clips.png").exists(), "a report that nobody asked for"
    first = stats(comfyui, "mine/quick")
    distil("mine/quick", updates=4)
    assert stats(comfyui, "mine/quick")[:3] == first and len(stats(comfyui, "mine/quick")) == 4
    assert read_student(file).info.updates == 2 and not list(comfyui.base.rglob("*.tmp"))
    assert "updates of at least 4, which this training has done already, found 3" in refusal(distil, "mine/quick")
    assert "updates 1, was 4" in refusal(distil, "mine/quick", updates=1)
    assert "other prompts" in refusal(
        distil, "mine/quick", 4, comfyui.pack("comfy_bridge.folders").TEACHER_CLIPS, prompts=PROMPTS
    )
    assert len(stats(comfyui, "mine/quick")) == 4, "refused before anything starts"


def test_videos_without_captions_are_told_in_a_sentence(comfyui, distil):
    folder = comfyui.base / "input" / "bare"
    folder.mkdir()
    (folder / "a.mp4").write_bytes((comfyui.base / "input" / "clips" / "00000.mp4").read_bytes())
    text = refusal(distil, "bare", videos="videos in input/bare")
    assert f"Expected captioned videos (.mp4, .mov, .mkv, .webm, .avi) in {folder}, found 1 that cannot be used" in text
    assert not (comfyui.base / "models" / "avdm2" / "bare.safetensors").exists()


@pytest.mark.slow
def test_without_videos_the_teacher_makes_clips_of_the_prompts(comfyui, distil):
    distil("own", 1, comfyui.pack("comfy_bridge.folders").TEACHER_CLIPS, prompts=PROMPTS)
    assert (folder_of(comfyui, "own") / "clips" / "cache.json").is_file()
    assert (comfyui.base / "models" / "avdm2" / "own.safetensors").is_file()


@pytest.mark.slow
def test_an_interrupt_keeps_a_checkpoint_and_the_same_inputs_go_on_to_the_same_student(comfyui, distil, model_folders):
    management = importlib.import_module("comfy.model_management")
    distil("unbroken", 12)
    asked = once(lambda: len(stats(comfyui, "broken")) >= 4, lambda: management.interrupt_current_processing(True))
    with pytest.raises(management.InterruptProcessingException):
        distil("broken", 12)
    asked.join()
    done = len(stats(comfyui, "broken"))
    checkpoints = [path.name for path in (folder_of(comfyui, "broken") / "checkpoints").iterdir()]
    assert 4 <= done < 12 and checkpoints == [f"step-{done:08d}.safetensors"]
    assert not jobs(comfyui) and not (model_folders / "avdm2" / "broken.safetensors").exists()
    distil("broken", 12)
    one, other = (load_file(model_folders / "avdm2" / f"{name}.safetensors") for name in ("unbroken", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_killed_process_is_told_and_the_same_inputs_go_on(comfyui, distil, model_folders):
    killing = once(lambda: len(stats(comfyui, "killed")) >= 1, lambda: [os.kill(job, signal.SIGKILL) for job in jobs(comfyui)])
    text = refusal(distil, "killed", 40)
    killing.join()
    assert "found it killed by SIGKILL" in text and "the same inputs go on from the last checkpoint" in text
    assert not (model_folders / "avdm2" / "killed.safetensors").exists()
    distil("killed", 3)
    assert (model_folders / "avdm2" / "killed.safetensors").is_file()


@pytest.mark.slow
def test_a_full_disk_ends_it_in_a_sentence_and_with_room_it_goes_on(comfyui, distil, model_folders):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))  # the process inherits it: no checkpoint is so small
    try:
        text = refusal(distil, "full", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Expected room and the right to write" in text and text.endswith("run the same inputs again: they go on.")
    assert not list(comfyui.base.rglob("*.tmp")) and not (model_folders / "avdm2" / "full.safetensors").exists()
    distil("full", 3)
    assert (model_folders / "avdm2" / "full.safetensors").is_file()


@pytest.mark.slow
def test_the_miniature_distils_itself(comfyui):
    teacher, _, _ = comfyui.run("AVDM2TeacherLoader", checkpoint="miniature (bundled)", motion_module="the checkpoint's own")
    files = comfyui.pack("comfy_bridge.folders")
    (student,) = comfyui.run(
        "AVDM2Distillation", teacher=teacher, videos=files.RENDERED, name="small", updates=2, settings="fits 24 GB"
    )
    assert comfyui.pack("comfy_bridge.facts").student_facts(student).student.info.holds == "all"
    assert len(list((folder_of(comfyui, "small") / "videos").glob("*.mp4"))) == 512
