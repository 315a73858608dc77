"""SD1.5 with a motion module of v3's size, random weights: 1.3 billion parameters, 17 GB of memory, six minutes of one core."""

import multiprocessing
import resource
import time

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel

from avdm2_nodes.diffusion.samplers import draw_noise
from avdm2_nodes.files.stack import Stack
from training.method.discriminator import DiscriminatorHeads
from training.method.loop import Distillation
from training.method.roles import build_roles
from training.run.config import from_yaml

pytestmark = pytest.mark.slow

FRAMES, SIDE = 8, 256 // 8
MEMORY = 17 * 2**30  # bytes; 15.6 * 2**30 were measured
SETTINGS = """
run: {batch: 1, accumulate: 1, precision: float32, device: cpu}
model: {train: motion+lora, share_base: true, lora_rank: 8, gradient_checkpointing: true}
sdm: {frames: 2, updates_per_student: 1}
adm: {updates_per_student: 1}
warmup: {updates: 0}
"""


class OneClip:
    """Stands for LatentClips: one clip of 8 frames of 256x256 pixels, and a prompt of 77 tokens."""

    def __init__(self):
        self.clip = draw_noise((1, 4, FRAMES, SIDE, SIDE), torch.Generator().manual_seed(0))
        self.text = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 1

    def batch(self, indices, clips=True):
        return self.clip, self.text


def one_step(results):
    """A forward and a training step; puts what was seen of them into the queue."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config, data = from_yaml(SETTINGS), OneClip()
    image_unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    motion = MotionAdapter(use_motion_mid_block=False)
    parameters = sum(p.numel() for module in (image_unet, motion) for p in module.parameters())
    stack = Stack(None, None, None, None, image_unet, motion)
    model = config.model
    roles = build_roles(
        stack,
        train=model.train,
        share_base=True,
        lora_rank=model.lora_rank,
        gradient_checkpointing=model.gradient_checkpointing,
    )
    stack.image_unet = stack.motion = image_unet = motion = None  # the roles have copies
    began = time.monotonic()
    with torch.no_grad():
        eps = roles.teacher(data.clip, torch.tensor([999]), data.text)
    forward = time.monotonic() - began

    run = Distillation(config, roles, DiscriminatorHeads([640, 1280, 1280]), torch.zeros(1, 77, 768), torch.device("cpu"))
    trained = {id(p) for p in (*roles.student_weights.values(), *roles.fake_weights.values())}
    frozen = {name: p for name, p in roles.modules[0].named_parameters() if id(p) not in trained}
    watched = [*roles.student_weights.values(), *roles.fake_weights.values(), *run.heads.parameters(), *frozen.values()]
    before = [p.detach().flatten()[:100].clone() for p in watched]
    began = time.monotonic()
    figures = run.update(0, data)
    moved = [not torch.equal(p.detach().flatten()[:100], old) for p, old in zip(watched, before, strict=True)]
    results.put(
        {
            "parameters": parameters,
            "finite": bool(eps.isfinite().all()),
            "forward": forward,
            "step": time.monotonic() - began,
            "figures": figures,
            "moved": sum(moved[: -len(frozen)]),
            "trained": len(moved) - len(frozen),
            "frozen moved": sum(moved[-len(frozen) :]),
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )


def test_one_step_with_all_roles_on_one_base(record_property):
    """In a process of its own, whose memory is measured from its start to its end."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=one_step, args=(results,))
    process.start()
    process.join()
    assert process.exitcode == 0
    seen = results.get()
    print(f"\n{seen}")
    for name in ("forward", "step", "memory"):
        record_property(name, seen[name])
    assert seen["parameters"] > 1.27e9 and seen["finite"]
    assert {"sdm", "adm", "fake", "critic"} <= seen["figures"].keys()
    assert all(abs(value) < float("inf") for value in seen["figures"].values())
    # LoRA's second factor starts at zero, so in the first step its first factor has no gradient.
    assert seen["moved"] >= 0.6 * seen["trained"] and seen["frozen moved"] == 0
    assert seen["memory"] < MEMORY
