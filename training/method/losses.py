"""The losses of distillation: pure functions from tensors to scalars."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sdm_loss(frames: Tensor, gradient: Tensor) -> Tensor:
    """1/2 mean((y - stopgrad(y - g))^2) over frames (B, C, h, w) (DMD, equation 7): its derivative by y is g / numel."""
    frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
    return 0.5 * F.mse_loss(frames, (frames - gradient).detach())


def guidance_loss(x0: Tensor, guided_x0: Tensor) -> Tensor:
    """1/2 mean((x0 - the guided teacher's)^2), any one shape (Meng et al., arXiv 2210.03142, stage one)."""
    return 0.5 * F.mse_loss(x0.float(), guided_x0.float())


def pseudo_huber(x: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """mean(sqrt((x - target)^2 + c^2) - c), any one shape (LCM's, arXiv 2310.04378: huber_c of its public code)."""
    return (((x - target).float().square() + c**2).sqrt() - c).mean()


def denoising_loss(eps: Tensor, noise: Tensor) -> Tensor:
    """Epsilon-MSE (Ho et al., arXiv 2006.11239, L_simple); both of one shape."""
    return F.mse_loss(eps.float(), noise.float())


def adm_student_loss(fake_logits: Tensor, real_logits: Tensor | float = 0.0) -> Tensor:
    """softplus(D(x_t^real) - D(x_t^fake)), logits of any shape.

    Without the real ones it is the non-saturating loss (Goodfellow et al., 2014), with them the relativistic one of pairs (R3GAN,
    arXiv 2501.05441, equation 2).
    """
    return F.softplus((real_logits - fake_logits).float()).mean()


def adm_discriminator_loss(fake_logits: Tensor, real_logits: Tensor, relativistic: bool = False) -> Tensor:
    """softplus(D(x_t^fake)) + softplus(-D(x_t^real)); 2 ln 2 = 1.386 where it cannot tell them apart.

    Or of pairs, softplus(D(x_t^fake) - D(x_t^real)) (R3GAN, arXiv 2501.05441, equation 2), then ln 2 = 0.693.
    """
    if relativistic:
        return F.softplus((fake_logits - real_logits).float()).mean()
    return F.softplus(fake_logits.float()).mean() + F.softplus(-real_logits.float()).mean()


def approximate_r1(logits: Tensor, perturbed_logits: Tensor, sigma: float) -> Tensor:
    """Finite-difference R1 (APT, arXiv 2501.08316, section 3.4): mean((D(x_t) - D(x_t + sigma n))^2) / sigma^2."""
    return (logits.float() - perturbed_logits.float()).square().mean() / sigma**2


def with_gradient(value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar of this value whose derivative by x is `gradient`, of x's shape."""
    pull = (x * gradient).sum()
    return value.detach() + pull - pull.detach()


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient * ctx.saved_tensors[0], None


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x itself; the gradient that comes back through it is multiplied by `factor`, which broadcasts to x."""
    return _ScaledGradient.apply(x, factor)
