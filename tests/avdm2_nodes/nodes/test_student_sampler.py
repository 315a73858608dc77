import pytest
import torch
from diffusers import DDIMScheduler

from avdm2_nodes.diffusion.samplers import draw_noise, sample_student
from avdm2_nodes.diffusion.unets import video_predictor
from tests.avdm2_nodes.conftest import PROMPT, SCALE, TIMESTEPS, as_latent
from tests.avdm2_nodes.native import CLIP, difference, rms


@pytest.fixture
def sample(comfyui, loaded, student):
    """sample(latent, ...): the samples of AVDM2 Student Sampler, for the common prompt by the student of all weights."""
    common = {"student": student, "positive": comfyui.prompt(loaded.clip), "seed": 9, "steps": 4, "denoise": 1.0}
    return lambda latent, **inputs: comfyui.run("AVDM2StudentSampler", latent=latent, **common | inputs)[0]["samples"]


@pytest.mark.parametrize("holds", ["all", "motion", "motion+lora"])
@pytest.mark.parametrize("frames, seed, steps", [(3, 9, 4), (7, 0, 4), (2, 2**63 + 5, 3)])
def test_the_latent_is_that_of_the_command_line(
    comfyui, loaded, sample, load_student, student_reference, holds, frames, seed, steps
):
    """Also in windows, where there are more frames than the student knows, and at the trailing timesteps of another number."""
    ((text, _),) = comfyui.prompt(loaded.clip)
    clip = sample(comfyui.empty(frames), student=load_student(holds), seed=seed, steps=steps)
    assert clip.shape == (frames, 4, 4, 8) and clip.dtype == torch.float32
    assert difference(clip, student_reference(holds, text, clip.shape, seed, steps)) < CLIP and rms(clip) > 0.3


def test_the_students_differ(comfyui, sample, load_student):
    clips = [sample(comfyui.empty(), student=load_student(holds)) for holds in ("all", "motion", "motion+lora")]
    assert min(difference(clips[i], clips[i - 1]) for i in range(3)) > 0.01


def test_the_evaluations_are_at_the_students_own_timesteps(comfyui, sample, evaluations):
    sample(comfyui.empty())
    assert [t for _, t in evaluations] == list(TIMESTEPS)
    evaluations.clear()
    sample(comfyui.empty(), steps=2)
    assert [t for _, t in evaluations] == [999, 499]
    evaluations.clear()
    sample(comfyui.empty(), steps=0)
    assert [t for _, t in evaluations] == list(TIMESTEPS), "0 is the student's own number"


def test_the_first_noise_is_comfyuis_own(comfyui, sample, evaluations):
    from comfy.sample import prepare_noise

    latent = comfyui.empty(3)
    sample(latent, seed=1234)
    noise = prepare_noise(latent["samples"], 1234)
    assert difference(evaluations[0][0], noise) < CLIP


def test_frames_of_a_longer_clip_get_that_clips_noise(comfyui, loaded, sample, evaluations, student_network):
    from comfy.sample import prepare_noise

    whole = comfyui.empty(6)
    (part,) = comfyui.run("LatentFromBatch", samples=whole, batch_index=3, length=2)
    assert part["batch_index"] == [3, 4]
    clip = sample(part)
    noise = prepare_noise(whole["samples"], 9)
    assert difference(evaluations[0][0], noise[3:5]) < CLIP
    # The noise of later steps too.
    predict = video_predictor(student_network("all"))
    ((text, _),) = comfyui.prompt(loaded.clip)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        noise = draw_noise((1, 4, 2, 4, 8), generator, index=[3, 4])
        expected = sample_student(predict, noise, text, TIMESTEPS, generator, index=[3, 4])
    assert difference(clip, as_latent(expected)) < CLIP
    assert difference(clip, sample(comfyui.empty(2))) > 0.01


def test_a_batch_index_of_another_length_is_refused(comfyui, sample, evaluations):
    with pytest.raises(
        ValueError, match=r"Expected a batch_index for each of 3 frames in the latent, found 2; make the latent"
    ):
        sample(comfyui.empty(3) | {"batch_index": [0, 1]})
    assert not evaluations


@pytest.mark.parametrize("denoise, kept", [(0.5, [300]), (0.6, [600, 300]), (0.85, [800, 600, 300]), (0.3, [300])])
def test_video_to_video_starts_at_the_first_step_that_is_low_enough(comfyui, sample, evaluations, denoise, kept):
    generator = torch.Generator().manual_seed(2)
    latent = {"samples": torch.randn(3, 4, 4, 8, generator=generator)}
    clip = sample(latent, denoise=denoise)
    assert [t for _, t in evaluations] == kept
    noise = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(9))
    schedule = DDIMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
    expected = schedule.add_noise(SCALE * latent["samples"], noise, torch.tensor(kept[0]))
    torch.testing.assert_close(evaluations[0][0], expected, rtol=1e-5, atol=1e-4)
    assert clip.isfinite().all()


def test_at_full_denoise_a_latent_stays_under_the_noise_as_in_core(comfyui, sample, evaluations):
    """Core adds it to the noise, of which there is 25 times as much: frames of VAE Encode are not wholly without effect."""
    random = {"samples": torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(2))}
    sample(random)
    noise = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(9))
    alpha = DDIMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod[999].sqrt()
    torch.testing.assert_close(evaluations[0][0], noise + alpha * SCALE * random["samples"], rtol=0, atol=1e-5)


def test_a_denoise_that_leaves_no_step_is_refused(comfyui, sample, evaluations):
    with pytest.raises(
        ValueError, match=r"Expected denoise of at least 0\.30 with the steps .*999, 800, 600, 300.*found 0\.29"
    ):
        sample(comfyui.empty(), denoise=0.29)
    with pytest.raises(ValueError, match=r"^Expected denoise .*found 0\.00, which leaves none; raise it"):
        sample(comfyui.empty(), denoise=0.0)
    assert not evaluations


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_denoise_that_is_not_finite_is_refused(comfyui, student, sample, evaluations, value):
    said = rf"^Expected a finite number for denoise, found {value}; set it anew\.$"
    with pytest.raises(ValueError, match=said):
        sample(comfyui.empty(), denoise=value)
    with pytest.raises(ValueError, match=said):
        comfyui.run("AVDM2Steps", student=student, steps=0, denoise=value)
    assert not evaluations


def test_joined_prompts_are_read(comfyui, loaded, sample, student_reference):
    one, other = comfyui.prompt(loaded.clip), comfyui.prompt(loaded.clip, "a small red square standing still")
    (joined,) = comfyui.run("ConditioningConcat", conditioning_to=one, conditioning_from=other)
    clip = sample(comfyui.empty(), positive=joined)
    text = torch.cat([one[0][0], other[0][0]], 1)
    assert difference(clip, student_reference("all", text, clip.shape, 9)) < CLIP
    assert difference(clip, sample(comfyui.empty())) > 0.001


def test_guidance_wants_a_negative_prompt(comfyui, loaded, sample, evaluations):
    with pytest.raises(ValueError, match=r"Expected a negative prompt with cfg 2, found none; wire one, or set cfg to 1"):
        sample(comfyui.empty(), cfg=2.0)
    with pytest.raises(ValueError, match=r"Expected a finite number for cfg, found nan; set it anew"):
        sample(comfyui.empty(), cfg=float("nan"), negative=comfyui.prompt(loaded.clip))
    assert not evaluations
    negative = comfyui.prompt(loaded.clip, "")
    assert torch.equal(sample(comfyui.empty(), negative=negative), sample(comfyui.empty())), "at cfg 1 it does nothing"


def test_what_is_no_student_is_refused(comfyui, loaded, sample, evaluations):
    image = comfyui.pack("comfy_bridge.facts").facts_of(loaded.teacher).image_model
    for model in (loaded.teacher, image):
        with pytest.raises(ValueError, match=r"Expected a student, found a MODEL without one; put AVDM2 Student Loader before"):
            sample(comfyui.empty(), student=model)
    assert not evaluations


@pytest.mark.parametrize("width, height", [(72, 64), (64, 40)])
def test_sides_that_halves_do_not_divide_are_sampled(comfyui, loaded, sample, student_reference, width, height):
    """As core's image models do it, and diffusers."""
    ((text, _),) = comfyui.prompt(loaded.clip)
    clip = sample(comfyui.empty(2, height, width))
    assert clip.shape == (2, 4, height // 8, width // 8)
    assert difference(clip, student_reference("all", text, clip.shape, 9)) < CLIP


def test_other_keys_of_the_latent_are_kept_and_it_is_not_changed(comfyui, loaded, student):
    latent = comfyui.empty(2) | {"theirs": object()}
    given, before = dict(latent), latent["samples"].clone()
    inputs = {"student": student, "positive": comfyui.prompt(loaded.clip), "seed": 0, "steps": 1, "denoise": 1.0}
    (out,) = comfyui.run("AVDM2StudentSampler", latent=latent, **inputs)
    assert out.keys() == given.keys() and out["theirs"] is given["theirs"]
    assert latent == given and torch.equal(latent["samples"], before)


def test_one_frame_is_warned_of_and_sampled(comfyui, sample, caplog):
    clip = sample(comfyui.empty(1))
    assert clip.shape == (1, 4, 4, 8)
    (told,) = (message for message in caplog.messages if "AVDM2" in message)
    assert "One frame only: for a clip set batch_size" in told


@pytest.mark.parametrize("shape", [(2, 16, 4, 8), (1, 4, 2, 4, 8), (4, 4, 8)])
def test_latents_of_another_kind_are_refused(comfyui, sample, evaluations, shape):
    with pytest.raises(
        ValueError, match=r"^Expected a latent of \(frames, 4, height, width\), found .*; use Empty Latent Image"
    ):
        sample({"samples": torch.ones(shape)})
    assert not evaluations


def test_frames_are_those_of_the_command_line(comfyui, loaded, sample, node_stack):
    latent = {"samples": sample(comfyui.empty(2, 32, 32))}
    (images,) = comfyui.run("VAEDecode", samples=latent, vae=loaded.vae)
    frames = node_stack.decode_clips(SCALE * latent["samples"].transpose(0, 1)[None])[0]
    assert images.shape == frames.shape == (2, 32, 32, 3)
    assert ((images * 255).round() - frames.float()).abs().max() <= 1
    assert frames.float().std() > 10


def test_frames_are_encoded_as_by_the_command_line(comfyui, loaded, node_stack):
    frames = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (latent,) = comfyui.run("VAEEncode", pixels=frames / 255, vae=loaded.vae)
    clip = node_stack.encode_clips(frames[None])
    torch.testing.assert_close(SCALE * latent["samples"], clip[0].transpose(0, 1), rtol=0, atol=1e-4)
    assert clip.std() > 0.01


def test_the_prompt_matters(comfyui, loaded, sample):
    other = comfyui.prompt(loaded.clip, "a small red square standing still on a plain background")
    assert PROMPT and not torch.equal(sample(comfyui.empty()), sample(comfyui.empty(), positive=other))
