"""The networks of a distillation as the losses see them: functions, not modules.

One constructor decides what stands behind them: separate copies of the weights, or adapters (LoRA, arXiv 2106.09685) on one frozen
base. The numbers are the same; the memory is not.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from torch import Tensor, nn

from avdm2_nodes.diffusion.layers import without_waste
from avdm2_nodes.diffusion.style import StyleChange, add_change
from avdm2_nodes.diffusion.unets import (
    Predictor,
    encoder_features,
    image_predictor,
    share_spatial_layers,
    video_predictor,
    video_unet,
    with_own_motion,
)
from avdm2_nodes.files.architecture import unet_config
from avdm2_nodes.files.stack import Stack, StackError
from avdm2_nodes.files.student import Student
from avdm2_nodes.files.student_info import StudentFileError
from avdm2_nodes.files.student_unet import require_base, student_unet
from training.method.adapters import Adapters, checkpoint_layers
from training.method.masters import Weights, masters_of

Encoder = Callable[[Tensor, Tensor, Tensor], list[Tensor]]
Place = Callable[[nn.Module], nn.Module]  # takes a network to where it stays, and gives it back


@dataclass
class Roles:
    """What the losses call, and what the optimisers move (`trained`, by name, of the student and of the fake score)."""

    teacher: Predictor
    guide: Predictor  # whose guided x0 the student learns in the warm-up: the teacher, or for a style a better one
    student: Predictor
    encoder: Encoder
    real_score: Predictor
    fake_score: Predictor
    student_weights: Weights
    fake_weights: Weights
    student_positions: dict[str, Tensor]  # position encodings of the student's motion modules: buffers, never trained
    student_config: dict  # what builds its UNet again
    modules: list[nn.Module] = field(repr=False)  # all that they are made of
    student_copies: Weights | None = None  # in bf16, what the networks compute with, where the weights above are their masters
    fake_copies: Weights | None = None


def build_roles(
    stack: Stack,
    *,
    train: str,
    score_unet: UNet2DConditionModel | None = None,
    share_base: bool = False,
    lora_rank: int = 16,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    student: Student | None = None,
    half: bool = False,
    device: torch.device | None = None,
) -> Roles:
    """The roles of a run, from frozen float32 weights in `stack` (the teacher) and `score_unet` (the real score, if another).

    `train`: "all" weights of student and fake score, each a copy; "motion" modules only, or "motion+lora": motion modules and
    LoRA on the spatial layers; with both the fake score is a LoRA on the real score. `share_base` puts those adapters on one copy of
    the spatial weights. The student begins as the teacher, or as a finished `student`; with "style" it is that one, frozen, with
    LoRA on its spatial layers (see `_restyled`). With `half` all networks are in bf16, and what is trained has float32 masters. All
    go to `device`, one network after another, for together they may be more than a computer's memory holds; the stack stays where it is.
    Raises ValueError for share_base with "all", StackError for a score UNet of other latents or texts, StudentFileError for a
    student of another base or of weights that are not those to be trained.
    """
    score_unet = score_unet or stack.image_unet
    for key in ("in_channels", "cross_attention_dim"):
        expected, found = stack.image_unet.config[key], score_unet.config[key]
        if expected != found:
            raise StackError(
                f"Expected a score UNet with {key} {expected}, as the teacher's image UNet has, found {found}; "
                "choose one of the same latent space and text encoder."
            )
    if share_base and train == "all":
        raise ValueError("Expected adapters on a shared base, found train: all; train motion+lora or motion, or share no base.")

    def place(network: nn.Module) -> nn.Module:
        """Of a network in its place no frozen weight is changed any more."""
        if half:
            halve(network)
        return network if device is None else network.to(device)

    if train == "style":
        roles = _restyled(student, stack, score_unet, share_base, lora_rank, gradient_checkpointing, seed, place)
    elif train == "all":
        roles = _copies(stack, score_unet, gradient_checkpointing, place)
    else:
        roles = _adapted(train, stack, score_unet, share_base, lora_rank, gradient_checkpointing, seed, place)
    if student is not None and train != "style":
        _begin_as(student, roles, stack, train)
    for network in roles.modules:
        place(network)
    if not half:
        return roles
    for network in roles.modules:
        for layer in network.modules():
            layer._buffers |= {name: buffer.bfloat16() for name, buffer in layer._buffers.items() if buffer is not None}
    student, fake = roles.student_weights, roles.fake_weights
    return replace(
        roles, student_weights=masters_of(student), fake_weights=masters_of(fake), student_copies=student, fake_copies=fake
    )


@torch.no_grad()
def halve(network: nn.Module) -> None:
    """Puts all frozen weights of a network into bf16, in place."""
    for weight in network.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()


def _adapted(
    train: str,
    stack: Stack,
    score_unet: UNet2DConditionModel,
    share_base: bool,
    lora_rank: int,
    gradient_checkpointing: bool,
    seed: int,
    place: Place,
) -> Roles:
    """ "motion" and "motion+lora"."""
    teacher = base = video_unet(stack.image_unet, stack.motion).requires_grad_(False).eval()
    if not share_base:
        teacher, base = place(teacher), video_unet(stack.image_unet, stack.motion).requires_grad_(False)
    student = with_own_motion(base, stack.motion).eval()
    spatial = share_spatial_layers(student, stack.image_unet)
    video_adapters = Adapters()
    student_weights = {name: p for name, p in student.named_parameters() if "motion_modules" in name}
    if train == "motion+lora":
        student_weights |= video_adapters.add(spatial, "student", lora_rank, seed)

    on_the_base = share_base and score_unet is stack.image_unet
    score_adapters = video_adapters if on_the_base else Adapters()
    if share_base:
        real = fake = spatial if on_the_base else without_waste(copy.deepcopy(score_unet))
    else:
        real, fake = place(without_waste(copy.deepcopy(score_unet))), without_waste(copy.deepcopy(score_unet))
    fake_weights = score_adapters.add(fake, "fake", lora_rank, seed)

    adapter = "student" if train == "motion+lora" else None
    return _with_adapters(
        (teacher, video_adapters), (student, video_adapters, adapter), (real, score_adapters), fake,
        student_weights, fake_weights, gradient_checkpointing,
    )  # fmt: skip


def _with_adapters(
    teacher: tuple[UNetMotionModel, Adapters],
    student: tuple[UNetMotionModel, Adapters, str | None],
    real: tuple[UNet2DConditionModel, Adapters],
    fake: UNet2DConditionModel,
    student_weights: dict[str, nn.Parameter],
    fake_weights: dict[str, nn.Parameter],
    gradient_checkpointing: bool,
) -> Roles:
    """Roles of UNets, each with the adapters in its layers: none acts in teacher, encoder and real score."""
    (teacher, teacher_adapters), (student, student_adapters, adapter), (real, score_adapters) = teacher, student, real
    modules = [teacher, student, real, fake]
    for module in modules:
        module.requires_grad_(False)
    for parameter in (*student_weights.values(), *fake_weights.values()):
        parameter.requires_grad_(True)
    if gradient_checkpointing:
        checkpoint_layers(modules, [student_adapters, score_adapters])
    return Roles(
        teacher=teacher_adapters.bind(None, video_predictor(teacher)),
        guide=teacher_adapters.bind(None, video_predictor(teacher)),
        student=student_adapters.bind(adapter, video_predictor(student)),
        encoder=teacher_adapters.bind(None, lambda x_t, t, text: encoder_features(teacher, x_t, t, text)),
        real_score=score_adapters.bind(None, image_predictor(real)),
        fake_score=score_adapters.bind("fake", image_predictor(fake)),
        student_weights=student_weights,
        fake_weights=fake_weights,
        student_positions=_positions(student),
        student_config=unet_config(student),
        modules=modules,
    )


def _restyled(
    student: Student,
    stack: Stack,
    style: UNet2DConditionModel,
    share_base: bool,
    lora_rank: int,
    gradient_checkpointing: bool,
    seed: int,
    place: Place,
) -> Roles:
    """ "style": LoRA on a finished student's spatial layers; teacher and both scores stand on the style backbone.

    The guide is the student transplanted onto that backbone: its motion modules move things better there than the teacher's own. The
    LoRA begins as what it can hold of the transplant.
    """
    change, guide = StyleChange(stack.image_unet, style), student_unet(student, stack.image_unet)
    add_change(guide, change, 1.0)
    place(guide)
    adapters, score_adapters, own = Adapters(), Adapters(), student_unet(student, stack.image_unet)
    student_weights = adapters.add(share_spatial_layers(own, stack.image_unet), "student", lora_rank, seed)
    begin_with(student_weights, change)
    place(own)
    teacher = video_unet(style, stack.motion).requires_grad_(False).eval()
    if share_base:
        real = fake = share_spatial_layers(teacher, style)
    else:
        teacher, real, fake = place(teacher), place(without_waste(copy.deepcopy(style))), without_waste(copy.deepcopy(style))
    fake_weights = score_adapters.add(fake, "fake", lora_rank, seed)
    roles = _with_adapters(
        (teacher, score_adapters), (own, adapters, "student"), (real, score_adapters), fake,
        student_weights, fake_weights, gradient_checkpointing,
    )  # fmt: skip
    return replace(roles, guide=video_predictor(guide), modules=[*roles.modules, guide])


@torch.no_grad()
def begin_with(lora: dict[str, nn.Parameter], change: Mapping[str, Tensor]) -> None:
    """Sets LoRA (alpha = rank) to the nearest to a change of the weights that its rank can hold (Eckart & Young, 1936)."""
    for key, down in lora.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            matrix = change[f"{module}.weight"].flatten(1).double()
            if not matrix.any():
                continue
            # The largest singular pairs by the smaller Gram matrix: an SVD takes longer, and the larger one, of a layer with
            # many inputs or outputs, a hundred times as long.
            wide = matrix.shape[0] <= matrix.shape[1]
            squares, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
            squares, vectors = squares[-len(down) :].clamp(min=0), vectors[:, -len(down) :]
            root = squares.sqrt().sqrt().clamp(min=1e-12)
            left = vectors * root if wide else matrix @ vectors / root
            right = (vectors / root).T @ matrix if wide else (vectors * root).T
            rank = left.shape[1]  # of a layer with fewer outputs or inputs than the LoRA's rank, these
            lora[f"{module}.lora_B.weight"].flatten(1)[:, :rank] = left
            down.flatten(1)[:rank] = right


def _copies(stack: Stack, score_unet: UNet2DConditionModel, gradient_checkpointing: bool, place: Place) -> Roles:
    teacher = place(video_unet(stack.image_unet, stack.motion).requires_grad_(False).eval())
    student = place(video_unet(stack.image_unet, stack.motion).requires_grad_(True).eval())
    real, fake = (place(without_waste(copy.deepcopy(score_unet)).requires_grad_(trained)) for trained in (False, True))
    if gradient_checkpointing:
        checkpoint_layers([teacher, student, real, fake], [])
    return Roles(
        teacher=video_predictor(teacher),
        guide=video_predictor(teacher),
        student=video_predictor(student),
        encoder=lambda x_t, t, text: encoder_features(teacher, x_t, t, text),
        real_score=image_predictor(real),
        fake_score=image_predictor(fake),
        student_weights=dict(student.named_parameters()),
        fake_weights=dict(fake.named_parameters()),
        student_positions=_positions(student),
        student_config=unet_config(student),
        modules=[teacher, student, real, fake],
    )


def _begin_as(student: Student, roles: Roles, stack: Stack, train: str) -> None:
    """Puts a finished student's weights into those that are trained. StudentFileError where they are not the same ones."""
    require_base(student, stack.image_unet)
    info, ours = student.info, roles.student_weights | roles.student_positions
    if train == "all":
        unet = student_unet(student, stack.image_unet)
        begin = dict(unet.named_parameters()) | _positions(unet)
    else:
        if info.holds not in (train, "motion"):
            raise StudentFileError(
                f"Expected in {student.name} the weights that model.train {train} trains, found {info.holds}; set model.train {info.holds}."
            )
        begin = dict(student.tensors)
        for name, tensor in student.tensors.items():
            if ".lora_B." in name:  # the adapters' alpha is their rank
                begin[name] = tensor * (info.lora_alpha / info.lora_rank)
    wrong = [name for name, tensor in begin.items() if name not in ours or ours[name].shape != tensor.shape]
    if wrong:
        raise StudentFileError(
            f"Expected in {student.name} weights of this run's student, found {len(wrong)} of others (such as {min(wrong)}); "
            f"use its motion modules and, where it has LoRA, model.lora_rank {info.lora_rank}."
        )
    with torch.no_grad():
        for name, tensor in begin.items():
            ours[name].copy_(tensor)


def _positions(unet: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in unet.named_buffers() if name.endswith(".pe")}
