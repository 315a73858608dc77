import pytest
import torch

from avdm2_nodes.diffusion.schedules import IMAGE
from avdm2_nodes.diffusion.sdm import score_pair, sdm_difference, sdm_gradient
from training.method.losses import sdm_loss

SHAPE = (5, 4, 8, 8)
T = torch.tensor([20, 200, 500, 800, 980])


def column(values):
    return values.view(-1, 1, 1, 1)


def gaussian(mean, variance):
    """The exact noise predictor and the exact score of data ~ N(mean, variance), diffused with the image schedule."""

    def score(x_t, t):
        abar = column(IMAGE.alphas_cumprod[t])
        return -(x_t - abar.sqrt() * mean) / (abar * variance + 1 - abar)

    def eps(x_t, t, text):
        return -column((1 - IMAGE.alphas_cumprod[t]).sqrt()) * score(x_t, t)

    return eps, score


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)


def test_the_difference_is_that_of_the_scores_of_two_gaussians(drawn):
    frames, noise = drawn
    real, real_score = gaussian(0.7, 0.4)
    fake, fake_score = gaussian(-0.2, 1.3)
    text = torch.zeros(5, 3, 2)
    fake_x0, real_x0 = score_pair(frames, noise, T, text, text[:1], real, fake, guidance=1.0)
    abar = column(IMAGE.alphas_cumprod[T])
    x_t = abar.sqrt() * frames + (1 - abar).sqrt() * noise
    expected = (1 - abar) / abar.sqrt() * (fake_score(x_t, T) - real_score(x_t, T))
    torch.testing.assert_close(sdm_difference(fake_x0, real_x0), expected, rtol=1e-9, atol=1e-9)


def test_the_real_score_is_guided_and_the_fake_is_not(drawn):
    frames, noise = drawn
    text, empty = torch.ones(5, 3, 2), torch.zeros(1, 3, 2)
    calls = []

    def predictor(x_t, t, text):
        calls.append((len(x_t), t.shape))
        return column(text.mean((1, 2)).double()) + 0.1 * x_t

    fake_x0, real_x0 = score_pair(frames, noise, T, text, empty, predictor, predictor, guidance=4.0)
    assert calls == [(5, (5,)), (10, (10,))]
    x_t = IMAGE.diffuse(frames, noise, T)
    # The empty prompt gives 0, the caption 1: guided 0 + 4 (1 - 0) = 4.
    torch.testing.assert_close(fake_x0, IMAGE.x0_from_eps(x_t, 0.1 * x_t + 1, T))
    torch.testing.assert_close(real_x0, IMAGE.x0_from_eps(x_t, 0.1 * x_t + 4, T))


def test_without_guidance_the_real_score_is_evaluated_once(drawn):
    frames, noise = drawn
    rows = []

    def predictor(x_t, t, text):
        rows.append(len(x_t))
        return x_t

    fake_x0, real_x0 = score_pair(frames, noise, T, torch.ones(5, 3, 2), torch.zeros(1, 3, 2), predictor, predictor, 1.0)
    assert rows == [5, 5] and torch.equal(fake_x0, real_x0)


def test_the_scores_have_no_gradient(drawn):
    weight = torch.ones((), requires_grad=True, dtype=torch.float64)
    frames, noise = drawn[0].clone().requires_grad_(True), drawn[1]
    text = torch.zeros(5, 3, 2)
    pair = score_pair(frames, noise, T, text, text[:1], lambda x, t, c: weight * x, lambda x, t, c: weight * x, 2.0)
    assert not any(x0.requires_grad for x0 in pair)


def test_each_sample_has_its_own_normaliser(drawn):
    frames, fake_x0 = drawn
    real_x0 = torch.randn(SHAPE, dtype=torch.float64) * column(torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0]))
    gradient = sdm_gradient(frames, fake_x0, real_x0)
    for i in range(5):
        size = sum((frames[i] - real_x0[i]).abs().flatten().tolist()) / frames[i].numel()
        torch.testing.assert_close(gradient[i], (fake_x0[i] - real_x0[i]) / size)
        torch.testing.assert_close(sdm_gradient(frames[i : i + 1], fake_x0[i : i + 1], real_x0[i : i + 1])[0], gradient[i])


def test_what_is_not_finite_becomes_zero():
    frames = torch.ones(3, 1, 2, 2)
    real_x0 = torch.stack([frames[0], frames[1], frames[2] + 2])
    fake_x0 = torch.stack([frames[0], frames[1] + 1, frames[2] + 3])
    fake_x0[2, 0, 0, 0] = torch.nan
    gradient = sdm_gradient(frames, fake_x0, real_x0)
    assert gradient[:2].eq(0).all()  # 0 / 0 and 1 / 0
    assert gradient[2].flatten().tolist() == [0.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arithmetic_is_float32_or_wider(dtype):
    frames, fake_x0, real_x0 = torch.randn(3, 2, 4, 8, 8).to(dtype)
    gradient = sdm_gradient(frames, fake_x0, real_x0)
    assert gradient.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(gradient, sdm_gradient(frames.to(gradient.dtype), fake_x0, real_x0))
    assert sdm_loss(frames, gradient).dtype == gradient.dtype


def test_the_losss_derivative_is_the_gradient_over_the_number_of_values():
    frames = torch.randn(2, 4, 8, 8, requires_grad=True)
    gradient = torch.randn(2, 4, 8, 8)
    loss = sdm_loss(frames, gradient)
    loss.backward()
    torch.testing.assert_close(frames.grad, gradient / gradient.numel(), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(loss, gradient.square().mean() / 2, rtol=1e-4, atol=1e-6)
