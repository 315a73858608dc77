import math

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, LCMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from avdm2_nodes.diffusion.samplers import (
    backward_simulation,
    boundary_scaling,
    draw_noise,
    kept_timesteps,
    sample_student,
    sample_teacher,
    student_timesteps,
    teacher_x0,
)
from avdm2_nodes.diffusion.schedules import lcm_timesteps, trailing_timesteps
from avdm2_nodes.diffusion.unets import video_predictor, video_unet
from avdm2_nodes.diffusion.windows import windowed

ABAR = DDPMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.double()
SHAPE = (3, 4, 5, 8, 8)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def text():
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def unet(stack):
    return stack.teacher


def toy(x_t, t, text):
    """A predictor that depends on everything it is given."""
    assert t.shape == (len(x_t),)
    return torch.tanh(x_t) * 0.5 + (t.float() / 1000).view(-1, 1, 1, 1, 1) + text.mean((1, 2)).view(-1, 1, 1, 1, 1)


class Arrivals(TorchDispatchMode):
    """How many tensors of the CPU are copied to another device."""

    def __enter__(self):
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        came = [t for t in args if isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.ndim]
        self.count += isinstance(out, torch.Tensor) and out.device.type != "cpu" and len(came)
        return out


@pytest.mark.parametrize("frames", [5, 9])
def test_between_steps_nothing_but_noise_goes_to_the_device_and_nothing_comes_back(frames):
    """On a device that has shapes and no numbers: reading one there would fail."""
    noise, text = torch.empty(1, 4, frames, 8, 8, device="meta"), torch.empty(1, 32, 32, device="meta")
    predict = windowed(lambda x_t, t, text: x_t * t.view(-1, 1, 1, 1, 1) + text.mean(), 5)
    for steps in (4, 4):  # the first run takes the schedule there
        with Arrivals() as arrivals:
            sample_student(predict, noise, text, trailing_timesteps(steps), torch.Generator())
    assert arrivals.count == steps - 1
    with Arrivals() as arrivals:
        sample_teacher(predict, noise, text, text, 5, 3.0)
    assert arrivals.count == 0


# ---- the student ----


@pytest.mark.parametrize("timesteps", [[999], [999, 499], [999, 749, 499, 249], [800, 3, 0]])
def test_the_students_chain_is_the_formula(text, timesteps):
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    clip = sample_student(toy, noise, text, timesteps, torch.Generator().manual_seed(2))

    generator, x = torch.Generator().manual_seed(2), noise.double()
    for i, t in enumerate(timesteps):
        abar = ABAR[t]
        x0 = (x - math.sqrt(1 - abar) * toy(x, torch.full((3,), t), text)) / math.sqrt(abar)
        if i + 1 < len(timesteps):
            following = ABAR[timesteps[i + 1]]
            fresh = torch.randn(3, 5, 4, 8, 8, generator=generator).transpose(1, 2).double()
            x = math.sqrt(following) * x0 + math.sqrt(1 - following) * fresh
    torch.testing.assert_close(clip.double(), x0, rtol=1e-4, atol=1e-4)


def test_a_sample_is_the_same_alone_and_in_a_batch(unet, text):
    def sample(rows, seeds):
        generators = seeded(*seeds)
        noise = draw_noise((len(seeds), *SHAPE[1:]), generators)
        return sample_student(video_predictor(unet), noise, text[rows], [999, 499], generators)

    with torch.no_grad():
        together = sample([0, 1, 2], [7, 8, 9])
        apart = torch.cat([sample([i], [7 + i]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_noise_is_drawn_frame_by_frame():
    noise = draw_noise((1, 4, 5, 8, 8), torch.Generator().manual_seed(3))
    frames = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3))  # as ComfyUI draws it for a batch of frames
    assert torch.equal(noise[0].transpose(0, 1), frames) and noise.dtype == torch.float32
    longer = draw_noise((1, 4, 9, 8, 8), torch.Generator().manual_seed(3))
    assert torch.equal(longer[:, :, :5], noise)


def test_images_and_whole_batches_have_noise_of_one_generator():
    images = draw_noise((3, 4, 8, 8), torch.Generator().manual_seed(3))
    assert torch.equal(images, torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3)))
    together = draw_noise(SHAPE, torch.Generator().manual_seed(3))
    assert together.shape == SHAPE and len(together.flatten().unique()) == together.numel()


def test_frames_of_a_longer_clip_have_its_noise(text):
    whole = draw_noise((1, 4, 9, 8, 8), torch.Generator().manual_seed(3))
    assert torch.equal(draw_noise((1, 4, 3, 8, 8), torch.Generator().manual_seed(3), index=[2, 7, 2]), whole[:, :, [2, 7, 2]])

    # In every step: a predictor without motion makes of a frame the same alone and in its clip, up to its own index.
    def sample(noise, index):
        return sample_student(toy, noise, text[:1], [999, 499], torch.Generator().manual_seed(8), index=index)

    clip = sample(whole[:, :, :6], None)
    torch.testing.assert_close(sample(whole[:, :, [1, 5]], [1, 5]), clip[:, :, [1, 5]])


def test_video_to_video_begins_at_the_first_timestep_within_denoise():
    timesteps = [999, 749, 499, 249]
    assert kept_timesteps(timesteps, 1.0) == timesteps
    for denoise, kept in [(0.99, [749, 499, 249]), (0.749, [749, 499, 249]), (0.7489, [499, 249]), (0.25, [249])]:
        assert kept_timesteps(timesteps, denoise) == kept
    with pytest.raises(ValueError, match=r"Expected denoise of at least 0\.25 with the steps 999, 749, 499, 249, found 0\.20"):
        kept_timesteps(timesteps, 0.2)


def test_refine_changes_what_goes_on(text):
    noise, seen = draw_noise(SHAPE, seeded(1, 2, 3)), []

    def refine(x0, step):
        seen.append((step, x0))
        return x0 * 0 + step

    clip = sample_student(toy, noise, text, [999, 499], seeded(1, 2, 3), refine=refine)
    assert [step for step, _ in seen] == [0, 1] and torch.equal(clip, torch.ones(SHAPE))
    fresh = seeded(1, 2, 3)
    x_t = (1 - ABAR[499]).sqrt().float() * draw_noise(SHAPE, fresh)  # the first x0 became 0
    x0 = (x_t - (1 - ABAR[499]).sqrt().float() * toy(x_t, torch.full((3,), 499), text)) / ABAR[499].sqrt().float()
    torch.testing.assert_close(seen[1][1], x0, rtol=1e-4, atol=1e-4)


def test_the_callback_sees_each_x0(text):
    seen = []
    noise = draw_noise(SHAPE, torch.Generator().manual_seed(1))
    clip = sample_student(toy, noise, text, [999, 749, 499], seeded(1, 2, 3), lambda done, x0: seen.append((done, x0)))
    assert [done for done, _ in seen] == [1, 2, 3] and torch.equal(seen[-1][1], clip)


VIDEO_BETAS = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_euler_chain_is_diffusers_own(text, steps):
    scheduler = EulerDiscreteScheduler(**VIDEO_BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.long().tolist() == trailing_timesteps(steps)
    noise = draw_noise(SHAPE, seeded(1, 2, 3))
    x = noise * (1 + scheduler.sigmas[0] ** 2).sqrt()  # so that its first model input is the noise itself
    for t in scheduler.timesteps:
        eps = toy(scheduler.scale_model_input(x, t), t.expand(3), text)
        x = scheduler.step(eps, t, x).prev_sample
    generator = torch.Generator().manual_seed(0)
    clip = sample_student(toy, noise, text, trailing_timesteps(steps), generator, chain="euler")
    torch.testing.assert_close(clip, x, rtol=1e-3, atol=1e-3)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())  # it draws nothing


@pytest.mark.parametrize("timesteps", [[999], [999, 499], [999, 749, 499, 249], [999, 39, 9]])
def test_the_lcm_chain_is_diffusers_own(text, timesteps, monkeypatch):
    monkeypatch.setattr(  # their noise in our order, frame by frame
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda shape, generator, **_: draw_noise(shape, generator)
    )
    scheduler = LCMScheduler(**VIDEO_BETAS, original_inference_steps=100)
    scheduler.set_timesteps(timesteps=timesteps)
    x = noise = draw_noise(SHAPE, seeded(1, 2, 3))
    generator = torch.Generator().manual_seed(4)
    for t in scheduler.timesteps:
        x = scheduler.step(toy(x, t.expand(3), text), t, x, generator).prev_sample
    clip = sample_student(toy, noise, text, timesteps, torch.Generator().manual_seed(4), chain="lcm")
    torch.testing.assert_close(clip, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("t", [0, 1, 9, 249, 999])
def test_boundary_scaling_is_diffusers_own(t):
    assert boundary_scaling(t) == pytest.approx(LCMScheduler().get_scalings_for_boundary_condition_discrete(t), rel=1e-12)


def test_lcm_timesteps_are_diffusers_own():
    scheduler = LCMScheduler(original_inference_steps=100)
    for steps in range(1, 101):
        scheduler.set_timesteps(steps)
        assert lcm_timesteps(steps) == scheduler.timesteps.tolist()
    for steps in (0, 101):
        with pytest.raises(ValueError, match="Expected 1 to 100 steps of a latent consistency model"):
            lcm_timesteps(steps)


def test_boundary_scaling_matters_only_near_zero(text):
    """At AnimateLCM's timesteps the scaling is far below rounding: what differs from our own students is which noise they saw."""
    noise, chains = draw_noise(SHAPE, seeded(1, 2, 3)), []
    for chain in ("renoise", "lcm"):
        chains.append(
            [sample_student(toy, noise, text, steps, seeded(1, 2, 3), chain=chain) for steps in ([999, 249], [999, 0])]
        )
    torch.testing.assert_close(chains[0][0], chains[1][0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(chains[0][1], chains[1][1], atol=1e-2)


@pytest.mark.parametrize("steps", [(0, 0, 0), (3, 3, 3), (1, 3, 0), (2, 0, 1)])
def test_backward_simulation_is_the_sampling_up_to_each_sample_s_step(unet, text, steps):
    timesteps, states = [999, 749, 499, 249], {}
    noise = draw_noise(SHAPE, seeded(1, 2, 3))

    def student(x_t, t, text):
        states[t[0].item()] = x_t
        return video_predictor(unet)(x_t, t, text)

    x0s = []
    with torch.no_grad():
        sample_student(student, noise, text, timesteps, seeded(4, 5, 6), lambda done, x0: x0s.append(x0))
    x_t, x0 = backward_simulation(video_predictor(unet), noise, text, timesteps, torch.tensor(steps), seeded(4, 5, 6))
    expected = torch.stack([states[timesteps[k]][i] for i, k in enumerate(steps)])
    torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x0.detach(), torch.stack([x0s[k][i] for i, k in enumerate(steps)]), rtol=1e-3, atol=1e-3)


def test_only_the_last_evaluation_of_backward_simulation_has_a_gradient(text):
    scale, calls = torch.ones((), requires_grad=True), []

    def student(x_t, t, text):
        calls.append((t.tolist(), torch.is_grad_enabled(), x_t.requires_grad))
        return scale * x_t

    noise = draw_noise(SHAPE, seeded(1, 2, 3))
    x_t, x0 = backward_simulation(student, noise, text, [999, 749, 499, 249], torch.tensor([2, 0, 1]), seeded(4, 5, 6))
    assert calls == [([999, 999], False, False), ([749], False, False), ([499, 999, 749], True, False)]
    x0.sum().backward()
    # x0 = (x_t - sigma s x_t) / alpha, so d x0 / d s = -sigma x_t / alpha.
    expected = -sum(math.sqrt((1 - ABAR[t]) / ABAR[t]) * x_t[i].sum() for i, t in enumerate([499, 999, 749]))
    torch.testing.assert_close(scale.grad, expected.float(), rtol=1e-4, atol=1e-2)


# ---- the teacher ----


def ddim(eps_of, x, timesteps, guidance, text, empty):
    """DDIM with eta 0 and guidance, written out; the last step goes to abar = 1."""
    x = x.double()
    for i, t in enumerate(timesteps):
        ts = torch.full((len(x),), t)
        cond, uncond = eps_of(x.float(), ts, text).double(), eps_of(x.float(), ts, empty.expand_as(text)).double()
        eps = uncond + guidance * (cond - uncond)
        x0 = (x - (1 - ABAR[t]).sqrt() * eps) / ABAR[t].sqrt()
        following = ABAR[timesteps[i + 1]] if i + 1 < len(timesteps) else torch.ones((), dtype=torch.float64)
        x = following.sqrt() * x0 + (1 - following).sqrt() * eps
    return x


@pytest.mark.parametrize(("steps", "guidance"), [(4, 3.0), (5, 1.0), (2, 0.0)])
def test_the_teachers_steps_are_ddim_with_guidance(unet, text, steps, guidance):
    noise, empty = draw_noise(SHAPE, seeded(1, 2, 3)), text.flip(0)[:1] * 0.3
    calls = []

    def teacher(x_t, t, text):
        calls.append(len(x_t))
        return video_predictor(unet)(x_t, t, text)

    seen = []
    clip = sample_teacher(teacher, noise, text, empty, steps, guidance, callback=lambda done, x0: seen.append((done, x0)))
    assert calls == [3 if guidance == 1 else 6] * steps
    timesteps = [1000 - 1000 * i // steps - 1 for i in range(steps)]
    with torch.no_grad():
        expected = ddim(video_predictor(unet), noise, timesteps, guidance, text, empty)
    torch.testing.assert_close(clip.double(), expected, rtol=1e-3, atol=1e-3)
    assert [done for done, _ in seen] == list(range(1, steps + 1))
    torch.testing.assert_close(seen[-1][1], clip, rtol=1e-4, atol=1e-4)  # the last step ends at its x0


def test_what_the_teacher_makes_of_a_state_is_where_its_ddim_steps_lead(unet, text):
    x_t, empty = draw_noise(SHAPE, seeded(1, 2, 3)), text.flip(0)[:1] * 0.3
    t, until = torch.tensor([999, 749, 249]), torch.tensor([749, 499, 0])
    found = teacher_x0(video_predictor(unet), x_t, t, until, text, empty, 3.0, 2)
    with torch.no_grad():
        for i, timesteps in enumerate([(999, 874), (749, 624), (249, 124)]):  # the half between is rounded to the even one
            expected = ddim(video_predictor(unet), x_t[i : i + 1], timesteps, 3.0, text[i : i + 1], empty)
            torch.testing.assert_close(found[i : i + 1].double(), expected, rtol=1e-3, atol=1e-3)


def test_the_teacher_goes_on_from_a_later_step(text):
    noise, empty, x_ts = draw_noise(SHAPE, seeded(1, 2, 3)), text[:1] * 0, []

    def teacher(x_t, t, text):
        x_ts.append(x_t[3:])
        return toy(x_t, t, text)

    clip = sample_teacher(teacher, noise, text, empty, 5, 3.0)
    again = sample_teacher(toy, x_ts[2], text, empty, 5, 3.0, timesteps=[599, 399, 199])
    torch.testing.assert_close(again, clip)


@pytest.mark.parametrize(("spacing", "timesteps"), [("leading", [751, 501, 251, 1]), ("linspace", [999, 666, 333, 0])])
def test_other_spacings_are_diffusers_own(text, spacing, timesteps):
    seen = []

    def teacher(x_t, t, text):
        seen.append(t[0].item())
        return toy(x_t, t, text)

    sample_teacher(teacher, draw_noise(SHAPE, seeded(1, 2, 3)), text, text[:1], 4, 1.0, spacing=spacing)
    assert seen == timesteps


def test_the_teacher_is_the_animatediff_pipeline(stack):
    from diffusers import AnimateDiffPipeline, DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, timestep_spacing="trailing",
        steps_offset=0,
    )  # fmt: skip
    unet = video_unet(stack.image_unet, stack.motion)
    pipeline = AnimateDiffPipeline(stack.vae, stack.text_encoder, stack.tokenizer, unet, None, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    prompt = "a small red circle standing still on a plain background"
    noise = torch.randn(1, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        prompt, num_frames=5, height=64, width=64, num_inference_steps=3, guidance_scale=3.0, latents=noise.clone(),
        output_type="latent",
    ).frames  # fmt: skip
    text, empty = stack.encode_text([prompt]), stack.encode_text([""])
    ours = sample_teacher(video_predictor(stack.teacher), noise, text, empty, 3, 3.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_student_timesteps():
    own = (900, 700, 400, 100)
    assert student_timesteps(own, 4) == list(own)
    assert student_timesteps(own, 2) == [999, 499]
    with pytest.raises(ValueError):
        student_timesteps(own, 0)
