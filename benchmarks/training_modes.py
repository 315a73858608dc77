"""What an update of each way of training costs: in a process of its own each, so that its memory is its own."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from training.cost.operations import TOKENS, operations

MODES = {
    "all weights": ["--model.train", "all"],
    "all weights, checkpointing": ["--model.train", "all", "--model.gradient_checkpointing", "true"],
    "motion modules": ["--model.train", "motion"],
    "motion modules and LoRA": ["--model.train", "motion+lora"],
    "motion modules and LoRA, one base": ["--model.train", "motion+lora", "--model.share_base", "true"],
    "the same, checkpointing": [
        "--model.train", "motion+lora", "--model.share_base", "true", "--model.gradient_checkpointing", "true",
    ],
}  # fmt: skip


class Noise:
    """Clips of noise in place of data: an update costs the same, whatever they show."""

    def __init__(self, clip: tuple[int, ...], text: Tensor):
        self.shape, self.text = clip[1:], text

    def __len__(self) -> int:
        return 1024

    def batch(self, indices: list[int], clips: bool = True) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(indices[0])
        clips = torch.randn(len(indices), *self.shape, generator=generator)
        return clips.to(self.text.device), self.text.expand(len(indices), -1, -1)


def measure(teacher: Path | None, options: list[str], threads: int, repetitions: int) -> dict:
    """Times, operations and peak memory (bytes above those before networks were built) of an update; in a new process.

    `teacher` is a stack's folder, None for SD1.5's shape with random weights; `options` are those of training/distill.py.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, teacher, options, threads, repetitions).result()


def _measure(teacher: Path | None, options: list[str], threads: int, repetitions: int) -> dict:
    from avdm2_nodes.files.stack import load_stack
    from benchmarks.subjects import random_stack
    from training.method.loop import Distillation
    from training.method.setup import new_heads, new_roles
    from training.run.command_line import load_config
    from training.run.precision import pick_device, uses_bf16
    from training.run.timing import interleaved, peak_bytes, resident_bytes

    torch.set_num_threads(threads)
    device = pick_device()
    config = load_config(["--warmup.updates", "0", *options])
    before = 0 if device.type == "cuda" else resident_bytes()
    stack = load_stack(teacher) if teacher else random_stack()
    image_unet = stack.image_unet.config
    roles = new_roles(config, stack, None, half=uses_bf16(device, config.run.precision), device=device)
    text, empty = torch.randn(2, TOKENS, image_unet.cross_attention_dim).to(device).split(1)
    clip = (1, image_unet.in_channels, config.data.frames, config.data.height // 8, config.data.width // 8)
    data, number = Noise(clip, text), iter(range(10**6))
    run = Distillation(config, roles, new_heads(config, roles, data).to(device), empty, device)

    def update() -> None:
        run.update(next(number), data)

    times = interleaved({"update": update}, repetitions, device)["update"]
    peak = peak_bytes(device)  # before the counting, which keeps more
    return {
        "seconds": times.wall,
        "CPU seconds": times.cpu,
        "operations": operations(update),
        "peak bytes": None if peak is None or before is None else peak - before,
        "batch": config.run.batch,
        "frames": config.data.frames,
        "side": config.data.height,
    }
