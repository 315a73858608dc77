"""What an update of a distillation costs in operations, counted on the meta device: shapes without numbers, at any size, in seconds.

An operation is a multiplication or an addition, of matrix products, convolutions and attention. Every part is run once with the roles'
own functions and checkpointing; how often an update takes each follows from the settings.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from diffusers import MotionAdapter, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from avdm2_nodes.diffusion.schedules import IMAGE, VIDEO
from avdm2_nodes.diffusion.unets import video_unet
from avdm2_nodes.files.stack import Stack
from training.method.adm import kinds_judged
from training.method.discriminator import DiscriminatorHeads, heads_for
from training.method.loop import Phase, phase_of, student_learns
from training.method.roles import Roles, build_roles
from training.run.config import DistillConfig
from training.run.meter import Operations

SD15 = {"sample_size": 64, "cross_attention_dim": 768}  # of diffusers' UNet2DConditionModel, whose defaults are SD1.5's
V3 = {"use_motion_mid_block": False, "motion_max_seq_length": 32}  # likewise, AnimateDiff's motion modules
TOKENS = 77


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within the block attention keeps no matrix of queries by keys on the meta device either.

    (A TorchFunctionMode would not reach layers that are computed again in the backward pass.)
    """
    plain = F.scaled_dot_product_attention

    def flash(query, key, value, *args, **kwargs):
        if not query.is_meta:
            return plain(query, key, value, *args, **kwargs)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    with mock.patch.object(F, "scaled_dot_product_attention", flash):
        yield


def meta_stack(unet: dict, motion: dict) -> Stack:
    """A stack of these configurations on the meta device, without VAE and texts."""
    with torch.device("meta"):
        return Stack(None, None, None, None, UNet2DConditionModel.from_config(unet), MotionAdapter.from_config(motion))


def meta_roles(
    config: DistillConfig, unet: dict = SD15, motion: dict = V3, half: bool = False
) -> tuple[Roles, DiscriminatorHeads]:
    """The roles of a run's settings, and the heads for their encoder, on the meta device; `half` as `build_roles` has it.

    A finished student, where a style is trained for one, is a video UNet like the teacher.
    """
    model, stack, style = config.model, meta_stack(unet, motion), meta_stack(unet, motion).image_unet
    of_numbers = {  # what a style does to weights leaves no tensor behind
        "student_unet": lambda *_: video_unet(stack.image_unet, stack.motion).requires_grad_(False),
        "StyleChange": lambda *_: {}, "add_change": lambda *_: None, "begin_with": lambda *_: None,
    }  # fmt: skip
    with torch.device("meta"), mock.patch.multiple("training.method.roles", **of_numbers):
        roles = build_roles(
            stack,
            train=model.train,
            share_base=model.share_base,
            lora_rank=model.lora_rank,
            gradient_checkpointing=model.gradient_checkpointing,
            half=half,
            score_unet=style if model.train == "style" else None,
        )
        return roles, heads_for([*stack.image_unet.config.block_out_channels[-3:]], config)


@dataclass(frozen=True)
class Inputs:
    """Of clips: x (B, C, F, h, w), text (B, L, D)."""

    x: Tensor
    text: Tensor

    @property
    def t(self) -> Tensor:
        return torch.zeros(len(self.x), dtype=torch.long, device=self.x.device)

    def frames(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """What an image UNet takes, of the first `count` frames of each clip."""
        frames = self.x.transpose(1, 2)[:, :count].flatten(0, 1)
        return frames, self.t.repeat_interleave(count), self.text.repeat_interleave(count, 0)


def meta_inputs(config: DistillConfig, unet: dict = SD15, tokens: int = TOKENS, clips: int = 1) -> Inputs:
    """Clips and their texts of a run's settings."""
    data, width = config.data, unet["cross_attention_dim"]
    shape = clips, unet.get("in_channels", 4), data.frames, data.height // 8, data.width // 8
    return Inputs(torch.empty(shape, device="meta"), torch.empty(clips, tokens, width, device="meta"))


@dataclass(frozen=True)
class Parts:
    """Operations of one pass through a role: of a clip, but of a frame through the scores."""

    student: int
    student_learns: int  # forward, backward, and forward again where activations are not kept
    teacher: int
    encoder: int
    encoder_through: int  # forward and backward to the clip
    heads: int
    heads_learn: int
    score: int
    fake_learns: int


def count_parts(roles: Roles, heads: DiscriminatorHeads, inputs: Inputs) -> Parts:
    """Counts each pass on the meta device, where roles, heads and inputs are."""
    x, t, text = inputs.x, inputs.t, inputs.text
    through = x.clone().requires_grad_()
    features = [feature.detach() for feature in roles.encoder(x, t, text)]
    frame = inputs.frames(1)
    with torch.no_grad():
        student, teacher = (operations(lambda role=role: role(x, t, text)) for role in (roles.student, roles.teacher))
        encoder, judged = operations(lambda: roles.encoder(x, t, text)), operations(lambda: heads(features))
        score = operations(lambda: roles.real_score(*frame))
    return Parts(
        student=student,
        student_learns=learning(lambda: roles.student(x, t, text).sum()),
        teacher=teacher,
        encoder=encoder,
        encoder_through=learning(lambda: sum(f.sum() for f in roles.encoder(through, t, text))),
        heads=judged,
        heads_learn=learning(lambda: heads(features).sum()),
        score=score,
        fake_learns=learning(lambda: roles.fake_score(*frame).sum()),
    )


def learning(loss: Callable[[], Tensor]) -> int:
    """Operations of a loss and of its backward pass."""
    return operations(lambda: loss().backward())


def operations(function: Callable[[], object]) -> int:
    """Operations of what `function` runs."""
    with as_on_a_gpu(), Operations() as operations:
        function()
    return operations.count


def update_cost(config: DistillConfig, parts: Parts, phase: Phase) -> dict[str, float]:
    """Operations for a clip of one update of a phase, by what they are for.

    The mean over the student's chain, each of whose steps a batch has equally often.
    """
    student, sdm, adm, warmup, kind = config.student, config.sdm, config.adm, config.warmup, config.method.kind
    frames = sdm.frames
    sdm_share, adm_share = _judged(config, IMAGE, sdm.t_max), _judged(config, VIDEO, adm.t_max)
    learns = parts.student_learns if student_learns(config, phase) else parts.student
    before = (len(student.steps) - 1) / 2 * parts.student
    if kind == "avdm2":
        cost = {"clips: steps before the one that learns": before, "student": learns}
        taught, substeps = not phase.matching and warmup.guidance != 1, warmup.substeps
    else:  # from the data; motion consistency takes half of its states from the student's chain, the step at hand with it
        own = {"clips: steps before the one that learns": (before + parts.student) / 2} if kind == "motion-consistency" else {}
        averaged = {} if kind == "progressive" else {"averaged student": parts.student}
        cost = own | {"student": learns} | averaged
        taught, substeps = True, warmup.substeps if kind == "progressive" else 1
    if taught:
        cost["guided teacher"] = substeps * (1 if warmup.guidance == 1 else 2) * parts.teacher
    if phase.matching and config.matches_frames:
        real = 1 if sdm.guidance == 1 else 2
        cost["SDM"] = sdm_share * frames * (1 + real) * parts.score
    if phase.adm:
        beside = parts.encoder + parts.heads if adm.relativistic else 0
        cost["ADM"] = adm_share * (parts.encoder_through + parts.heads_learn + beside)
    if phase.critics and config.matches_frames:
        cost["fake score"] = sdm_share * sdm.updates_per_student * frames * parts.fake_learns
    if phase.critics and config.has_heads:
        looks = 1 if adm.pool else adm.updates_per_student
        cost["heads"] = adm_share * kinds_judged(config) * (looks * parts.encoder + adm.updates_per_student * parts.heads_learn)
    return cost


def phases(config: DistillConfig) -> Counter[Phase]:
    """The number of a run's updates of each phase, in their order."""
    return Counter(phase_of(config, step) for step in range(config.warmup.updates + config.run.updates))


def _judged(config: DistillConfig, schedule, t_max: int) -> float:
    """The share of clips that a loss judges, as `Distillation.judged` does."""
    steps = config.student.steps
    if not config.student.phased or config.method.kind != "avdm2":
        return 1.0
    next_t = torch.tensor([*steps[1:], 0])
    return (schedule.timestep_of(VIDEO.alphas_cumprod[next_t]) < t_max).double().mean().item()
