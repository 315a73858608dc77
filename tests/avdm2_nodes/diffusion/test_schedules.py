import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from avdm2_nodes.diffusion.schedules import IMAGE, VIDEO, Schedule, classifier_free_guidance, trailing_timesteps

BOTH = pytest.mark.parametrize("schedule", [VIDEO, IMAGE], ids=["video", "image"])


def test_the_schedules_are_those_of_animatediff_and_sd15():
    at = [249, 499, 749, 999]
    assert [f"{VIDEO.alphas_cumprod[t]:.{d}f}" for t, d in zip(at, (3, 3, 3, 4), strict=True)] == [
        "0.571", "0.162", "0.023", "0.0016",
    ]  # fmt: skip
    assert [f"{IMAGE.alphas_cumprod[t]:.{d}f}" for t, d in zip(at, (3, 3, 3, 4), strict=True)] == [
        "0.675", "0.278", "0.057", "0.0047",
    ]  # fmt: skip


@BOTH
def test_abar_is_that_of_diffusers(schedule):
    theirs = DDPMScheduler(beta_schedule=schedule.beta_schedule, beta_start=0.00085, beta_end=0.012).alphas_cumprod
    assert schedule.alphas_cumprod.shape == (1000,) and schedule.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(schedule.alphas_cumprod.float(), theirs, rtol=2e-5, atol=0)


@BOTH
def test_diffuse_is_that_of_diffusers_and_is_undone(schedule):
    x0, noise = torch.randn(2, 5, 4, 3, 6, 6)
    t = torch.tensor([0, 10, 400, 900, 999])
    scheduler = DDPMScheduler(beta_schedule=schedule.beta_schedule, beta_start=0.00085, beta_end=0.012)
    x_t = schedule.diffuse(x0, noise, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(schedule.x0_from_eps(x_t, noise, t), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(schedule.eps_from_x0(x_t, x0, t)[1:], noise[1:], rtol=1e-4, atol=1e-4)


def test_the_same_noise_lies_at_other_timesteps_of_the_other_schedule():
    t = torch.tensor([0, 249, 499, 749, 999])
    theirs = IMAGE.timestep_of(VIDEO.alphas_cumprod[t])
    brute = [min((i for i in range(1000) if IMAGE.alphas_cumprod[i] <= VIDEO.alphas_cumprod[j]), default=999) for j in t]
    assert theirs.tolist() == brute and torch.equal(VIDEO.timestep_of(VIDEO.alphas_cumprod[t]), t)


@BOTH
def test_one_timestep_serves_the_whole_batch(schedule):
    x0, noise = torch.randn(2, 3, 4, 6, 6)
    many = schedule.diffuse(x0, noise, torch.full((3,), 321))
    assert torch.equal(schedule.diffuse(x0, noise, 321), many)
    assert torch.equal(schedule.diffuse(x0, noise, torch.tensor(321)), many)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_left_behind(half):
    x_t, eps = torch.randn(2, 3, 4, 6, 6).to(half)
    for function in (VIDEO.x0_from_eps, VIDEO.eps_from_x0, VIDEO.diffuse):
        result = function(x_t, eps, torch.tensor([999, 749, 20]))
        assert result.dtype == torch.float32
        assert torch.equal(result, function(x_t.float(), eps.float(), torch.tensor([999, 749, 20])))
    assert VIDEO.x0_from_eps(x_t.double(), eps.double(), 999).dtype == torch.float64


def test_another_schedule_is_refused():
    with pytest.raises(ValueError, match="found 'squaredcos_cap_v2'"):
        _ = Schedule("squaredcos_cap_v2").alphas_cumprod


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25, 1000])
def test_trailing_timesteps_are_those_of_diffusers(steps):
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert trailing_timesteps(steps) == scheduler.timesteps.tolist()


def test_trailing_timesteps_of_four_steps():
    assert trailing_timesteps(4) == [999, 749, 499, 249]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_cannot_be_is_refused(steps):
    with pytest.raises(ValueError, match=f"found {steps}"):
        trailing_timesteps(steps)


def test_guidance_convention():
    uncond, cond = torch.randn(2, 3, 4)
    torch.testing.assert_close(classifier_free_guidance(uncond, cond, 1.0), cond)
    torch.testing.assert_close(classifier_free_guidance(uncond, cond, 0.0), uncond)
    expected = -2 * uncond.numpy() + 3 * cond.numpy()
    np.testing.assert_allclose(classifier_free_guidance(uncond, cond, 3.0).numpy(), expected, rtol=1e-4, atol=1e-5)
