"""The networks of a distillation as the losses see them: functions, not modules.

One constructor decides what stands behind them: separate copies of the weights, or adapters (LoRA, arXiv 2106.09685, by peft) on one
frozen base. The numbers are the same; the memory is not.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avdm2_nodes.diffusion.stack import Stack, StackError
from avdm2_nodes.diffusion.student_file import unet_config
from avdm2_nodes.diffusion.unets import (
    Predictor,
    encoder_features,
    image_predictor,
    share_spatial_layers,
    video_predictor,
    video_unet,
    with_own_motion,
)
from training.randomness import keyed_generator

Encoder = Callable[[Tensor, Tensor, Tensor], list[Tensor]]

# Every spatial layer with a weight matrix but the first and last convolution, which the image and the video UNet hold apart.
_LORA_TARGETS = (
    r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2|conv_shortcut|conv|time_emb_proj)"
)


@dataclass
class Roles:
    """What the losses call, and what the optimisers move (`trained`, by name, of the student and of the fake score)."""

    teacher: Predictor
    student: Predictor
    encoder: Encoder
    real_score: Predictor
    fake_score: Predictor
    student_weights: dict[str, nn.Parameter]
    fake_weights: dict[str, nn.Parameter]
    student_positions: dict[str, Tensor]  # position encodings of the student's motion modules: buffers, never trained
    student_config: dict  # what builds its UNet again
    modules: list[nn.Module] = field(repr=False)  # everything that has to be on the device

    def to(self, device: torch.device) -> "Roles":
        for module in self.modules:
            module.to(device)
        return self


class Adapters:
    """The LoRA layers of one base and which of its adapters acts now; none acts unless `active` says so."""

    def __init__(self):
        self.layers: list[LoraLayer] = []
        self.name: str | None = None

    def add(self, unet: UNet2DConditionModel, name: str, rank: int, seed: int) -> dict[str, nn.Parameter]:
        """Injects adapter `name` into the layers of an image UNet (and of whichever UNet shares them); its weights by name."""
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_LORA_TARGETS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is what is wanted
            inject_adapter_in_model(config, unet, adapter_name=name)
        self.layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
        marker, generator = f".{name}.weight", keyed_generator(seed, "lora", name)
        weights = {key.replace(marker, ".weight"): p for key, p in unet.named_parameters() if key.endswith(marker)}
        for key, weight in weights.items():
            if ".lora_A." in key:  # lora_B is zero, so that the adapter adds nothing yet
                bound = weight[0].numel() ** -0.5
                weight.data.uniform_(-bound, bound, generator=generator)
        self._set(None)
        return weights

    @contextlib.contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Within the context adapter `name` acts, or with None the bare base."""
        before = self.name
        self._set(name)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, name: str | None) -> None:
        self.name = name
        for layer in self.layers:
            # peft's own setter also switches requires_grad, under the feet of a graph that still has to run backward.
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]

    def bind(self, name: str | None, function: Callable) -> Callable:
        """`function`, with adapter `name` active while it runs."""

        def bound(*args):
            with self.active(name):
                return function(*args)

        return bound


def build_roles(
    stack: Stack,
    *,
    train: str,
    score_unet: UNet2DConditionModel | None = None,
    share_base: bool = False,
    lora_rank: int = 16,
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> Roles:
    """The roles of a run, from frozen float32 weights in `stack` (the teacher) and `score_unet` (the real score, if another).

    `train`: "all" weights of student and fake score, each a copy; "motion" modules only, or "motion+lora": motion modules and
    LoRA on the spatial layers; with both the fake score is a LoRA on the real score. `share_base` puts those adapters on one copy of
    the spatial weights. Raises ValueError for share_base with "all", StackError for a score UNet of other latents or texts.
    """
    score_unet = score_unet or stack.image_unet
    for key in ("in_channels", "cross_attention_dim"):
        expected, found = stack.image_unet.config[key], score_unet.config[key]
        if expected != found:
            raise StackError(
                f"Expected a score UNet with {key} {expected}, as the teacher's image UNet has, found {found}; "
                "choose one of the same latent space and text encoder."
            )
    if train == "all":
        if share_base:
            raise ValueError(
                "Expected adapters on a shared base, found train: all; train motion+lora or motion, or share no base."
            )
        return _copies(stack, score_unet, gradient_checkpointing)

    teacher = video_unet(stack.image_unet, stack.motion).requires_grad_(False).eval()
    base = teacher if share_base else copy.deepcopy(teacher)
    student = with_own_motion(base, stack.motion).eval()
    spatial = share_spatial_layers(student, stack.image_unet)
    video_adapters = Adapters()
    student_weights = {name: p for name, p in student.named_parameters() if "motion_modules" in name}
    if train == "motion+lora":
        student_weights |= video_adapters.add(spatial, "student", lora_rank, seed)

    if share_base and score_unet is stack.image_unet:
        real, score_adapters = spatial, video_adapters
    else:
        real, score_adapters = copy.deepcopy(score_unet), Adapters()
    fake = real if share_base else copy.deepcopy(score_unet)
    fake_weights = score_adapters.add(fake, "fake", lora_rank, seed)

    for module in (teacher, student, spatial, real, fake):
        module.requires_grad_(False)
    for parameter in (*student_weights.values(), *fake_weights.values()):
        parameter.requires_grad_(True)
    if gradient_checkpointing:
        checkpoint_layers([teacher, student, real, fake], [video_adapters, score_adapters])

    student_adapter = "student" if train == "motion+lora" else None
    return Roles(
        teacher=video_adapters.bind(None, video_predictor(teacher)),
        student=video_adapters.bind(student_adapter, video_predictor(student)),
        encoder=video_adapters.bind(None, lambda x_t, t, text: encoder_features(teacher, x_t, t, text)),
        real_score=score_adapters.bind(None, image_predictor(real)),
        fake_score=score_adapters.bind("fake", image_predictor(fake)),
        student_weights=student_weights,
        fake_weights=fake_weights,
        student_positions=_positions(student),
        student_config=unet_config(student),
        modules=[teacher, student, real, fake],
    )


def _copies(stack: Stack, score_unet: UNet2DConditionModel, gradient_checkpointing: bool) -> Roles:
    teacher = video_unet(stack.image_unet, stack.motion).requires_grad_(False).eval()
    student = copy.deepcopy(teacher).requires_grad_(True)
    real, fake = copy.deepcopy(score_unet).requires_grad_(False), copy.deepcopy(score_unet).requires_grad_(True)
    if gradient_checkpointing:
        checkpoint_layers([teacher, student, real, fake], [])
    return Roles(
        teacher=video_predictor(teacher),
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


def _positions(unet: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in unet.named_buffers() if name.endswith(".pe")}


def checkpoint_layers(unets: list[nn.Module], adapters: list[Adapters]) -> None:
    """Gradient checkpointing (Chen et al., arXiv 1604.06174) of every residual, attention and motion layer of some UNets.

    diffusers' own leaves the attention and motion modules of the video UNet's down blocks out. A layer is computed again during
    the backward pass, when another role may be active: the adapters of its first pass are put back for it.
    """
    layers = {
        id(layer): layer
        for unet in unets
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
        for kind in ("resnets", "attentions", "motion_modules")
        for layer in (getattr(block, kind, None) or ())
    }
    for layer in layers.values():
        layer.forward = _checkpointed(layer.forward, adapters)


def _checkpointed(forward: Callable, adapters: list[Adapters]) -> Callable:
    def wrapped(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        names = [a.name for a in adapters]

        def again(*args, **kwargs):
            with contextlib.ExitStack() as actives:
                for adapter, name in zip(adapters, names, strict=True):
                    actives.enter_context(adapter.active(name))
                return forward(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)

    return wrapped
