"""A stage of supervised training, such as an image model's: a plain loop that resumes exactly where it stopped."""

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.method.ema import EMA
from training.run.checkpoint import Checkpoints
from training.run.parent import Stop, StoppedError, never
from training.run.randomness import keyed_generator

logger = logging.getLogger(__name__)


class KernelMuon(torch.optim.Muon):
    """Muon (K. Jordan, github.com/KellerJordan/Muon) for convolution kernels, each taken as a matrix (out, in * height * width)."""

    def __init__(self, kernels: list[nn.Parameter], lr: float):
        self.kernels = kernels
        matrices = [nn.Parameter(k.detach().view(k.shape[0], -1)) for k in kernels]  # views: a step on them moves the kernels
        super().__init__(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step(self, closure=None):
        for matrix, kernel in zip(self.param_groups[0]["params"], self.kernels, strict=True):
            matrix.grad = kernel.grad.reshape(matrix.shape)
        return super().step(closure)


def adamw(parameters, lr: float, weight_decay: float = 0.01) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)


def warmup_cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def run_stage(
    name: str,
    folder: Path,
    module: nn.Module,
    loss_of: Callable[[int, torch.Generator], dict[str, Tensor]],
    *,
    optimisers: list[torch.optim.Optimizer],
    steps: int,
    seed: int,
    ema_decay: float,
    clip: float = 1.0,
    save_every: int = 200,
    log_every: int = 50,
    stop: Stop = never,
) -> dict:
    """Trains the parameters of `module` that require a gradient; leaves the averaged weights in it and returns the run's figures.

    `loss_of(step, generator)` gives the losses of one step, the first of which is minimised. Every learning rate is warmed up to
    the one that its optimiser was made with, then follows a cosine. Figures go to `folder/NAME/log.jsonl`, checkpoints beside them.
    StoppedError, with a checkpoint, after the first step at whose end `stop` says so.
    """
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    trained = [p for p in module.parameters() if p.requires_grad]
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    ema = EMA({name: p for name, p in module.named_parameters() if p.requires_grad}, ema_decay)
    checkpoints = Checkpoints(folder, keep=2)
    start, seconds = 0, 0.0
    if found := checkpoints.latest(("trained", "optimisers", "ema", "seconds")):
        start, state = found
        with torch.no_grad():
            for parameter, saved in zip(trained, state["trained"], strict=True):
                parameter.copy_(saved)
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        ema.load_state_dict(state["ema"])
        seconds = state["seconds"]
        logger.info("Stage %s goes on at step %d.", name, start)

    def save(step: int) -> None:
        state = {"trained": trained, "optimisers": [o.state_dict() for o in optimisers], "ema": ema.state_dict()}
        checkpoints.save(step, state | {"seconds": seconds + time.time() - began})

    began = time.time()
    sums: dict[str, float] = {}
    with open(folder / "log.jsonl", "a") as log, tqdm(total=steps, initial=start, desc=name, mininterval=5) as bar:
        for step in range(start, steps):
            for optimiser, lrs in zip(optimisers, peaks, strict=True):
                for group, lr in zip(optimiser.param_groups, lrs, strict=True):
                    group["lr"] = lr * warmup_cosine(step, steps)
            losses = loss_of(step, keyed_generator(seed, name, step))
            next(iter(losses.values())).backward()
            torch.nn.utils.clip_grad_norm_(trained, clip)
            for optimiser in optimisers:
                optimiser.step()
            module.zero_grad(set_to_none=True)
            ema.update()
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach())
            bar.update()
            if (step + 1) % log_every == 0:
                means = {key: round(total / log_every, 5) for key, total in sums.items()}
                sums = {}
                log.write(json.dumps({"step": step + 1, "seconds": round(seconds + time.time() - began, 1), **means}) + "\n")
                log.flush()
                bar.set_postfix(means)
            stopping = step + 1 < steps and stop()
            if (step + 1) % save_every == 0 or step + 1 == steps or stopping:
                save(step + 1)
            if stopping:
                raise StoppedError(f"Stopped after step {step + 1} of {steps} of {name}; the same command goes on from there.")
    ema.swap()
    return {"steps": steps, "seconds": round(seconds + time.time() - began, 1)}
