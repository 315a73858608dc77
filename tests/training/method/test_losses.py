import math

import pytest
import torch

from training.method.losses import (
    adm_discriminator_loss,
    adm_student_loss,
    approximate_r1,
    denoising_loss,
    guidance_loss,
    scale_gradient,
    sdm_loss,
    with_gradient,
)


def test_adversarial_losses_are_their_closed_forms():
    fake, real = torch.tensor([[-1.0, 0.5], [2.0, 0.0]]), torch.tensor([[3.0, -0.25], [0.0, 1.0]])
    minus_log_sigmoid = [-math.log(1 / (1 + math.exp(-x))) for x in fake.flatten().tolist()]
    assert adm_student_loss(fake).item() == pytest.approx(sum(minus_log_sigmoid) / 4, rel=1e-5)
    of_fake = sum(-math.log(1 - 1 / (1 + math.exp(-x))) for x in fake.flatten().tolist()) / 4
    of_real = sum(-math.log(1 / (1 + math.exp(-x))) for x in real.flatten().tolist()) / 4
    assert adm_discriminator_loss(fake, real).item() == pytest.approx(of_fake + of_real, rel=1e-5)
    assert adm_discriminator_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(2 * math.log(2))


def test_relativistic_losses_are_their_closed_forms_and_mirror_each_other():
    fake, real = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([3.0, 0.25, 2.0])
    of_pairs = [math.log(1 + math.exp(f - r)) for f, r in zip(fake.tolist(), real.tolist(), strict=True)]
    assert adm_discriminator_loss(fake, real, relativistic=True).item() == pytest.approx(sum(of_pairs) / 3, rel=1e-5)
    assert adm_student_loss(real, fake).item() == pytest.approx(sum(of_pairs) / 3, rel=1e-5)
    assert adm_discriminator_loss(fake, fake, relativistic=True).item() == pytest.approx(math.log(2))


def test_a_value_may_be_given_another_gradient():
    x, gradient = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    value = with_gradient(torch.tensor(5.0), x, gradient)
    (2 * value).backward()
    assert value.item() == pytest.approx(5.0)
    torch.testing.assert_close(x.grad, 2 * gradient)


def test_adversarial_losses_are_finite_where_a_sigmoid_is_not():
    far = torch.tensor([-1e4, 1e4])
    assert adm_student_loss(far).item() == pytest.approx(5000)
    assert adm_discriminator_loss(far, far).item() == pytest.approx(10000)


def test_the_student_is_pulled_to_higher_logits_and_the_discriminator_apart():
    fake, real = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    adm_student_loss(fake).backward()
    torch.testing.assert_close(fake.grad, torch.full((4,), -0.5 / 4))
    fake.grad = None
    adm_discriminator_loss(fake, real).backward()
    torch.testing.assert_close(fake.grad, torch.full((4,), 0.5 / 4))
    torch.testing.assert_close(real.grad, torch.full((4,), -0.5 / 4))


def test_denoising_loss_is_a_mean_square_in_float32():
    eps, noise = torch.randn(2, 3, 4, 5, 5).half()
    loss = denoising_loss(eps, noise)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (eps.float() - noise.float()).square().mean())


def test_sdm_loss_is_half_the_mean_square_of_its_gradient():
    gradient = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(sdm_loss(torch.randn_like(gradient), gradient), 0.5 * gradient.square().mean())


@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
def test_approximate_r1_of_a_linear_discriminator_is_its_squared_slope(sigma):
    """D(x) = w x, so |grad D|^2 = |w|^2, and (w sigma n)^2 / sigma^2 has that mean."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, generator=generator, dtype=torch.float64)
    x, noise = torch.randn(2, 40_000, 6, generator=generator, dtype=torch.float64)
    penalty = approximate_r1(x @ weight, (x + sigma * noise) @ weight, sigma).item()
    assert penalty == pytest.approx(weight.square().sum().item(), rel=0.03)


def test_the_guidance_loss_is_half_the_mean_square():
    x0, guided = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[0.0, 5.0]])
    loss = guidance_loss(x0, guided)
    loss.backward()
    assert loss.item() == pytest.approx((1 + 9) / 4) and x0.grad.tolist() == [[0.5, -1.5]]


def test_scale_gradient_changes_nothing_but_the_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    y = scale_gradient(x, torch.tensor(0.25))
    assert torch.equal(x, y)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 0.25 * 2 * x.detach())
