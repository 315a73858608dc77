import pytest
import torch
from diffusers import DDIMScheduler

from avdm2_nodes.diffusion.precision import sampling_dtype
from avdm2_nodes.diffusion.samplers import draw_noise, sample_student
from avdm2_nodes.diffusion.unets import video_predictor
from tests.avdm2_nodes.conftest import PROMPT, SCALE, TIMESTEPS, as_latent

DTYPE = sampling_dtype(torch.device("cpu"))


@pytest.fixture
def sample(comfyui, loaded, student):
    """sample(latent, ...): the samples of AVDM2 Student Sampler, for the common prompt by the student of all weights."""
    common = {"student": student, "positive": comfyui.prompt(loaded.clip), "seed": 9, "steps": 4, "denoise": 1.0}
    return lambda latent, **inputs: comfyui.run("AVDM2StudentSampler", latent=latent, **common | inputs)[0]["samples"]


@pytest.mark.parametrize("frames, seed, steps", [(3, 9, 4), (7, 0, 4), (2, 2**63 + 5, 3)])
def test_the_latent_is_bitwise_that_of_the_command_line(comfyui, loaded, sample, student_reference, frames, seed, steps):
    """Also in windows, where there are more frames than the student knows, and at the trailing timesteps of another number."""
    ((text, _),) = comfyui.prompt(loaded.clip)
    clip = sample(comfyui.empty(frames), seed=seed, steps=steps)
    assert clip.shape == (frames, 4, 4, 8) and clip.dtype == torch.float32
    assert torch.equal(clip, student_reference("all", text, clip.shape, seed, steps))


def test_so_is_that_of_motion_modules_alone(comfyui, loaded, sample, load_student, student_reference):
    ((text, _),) = comfyui.prompt(loaded.clip)
    clip = sample(comfyui.empty(), student=load_student("motion"))
    assert torch.equal(clip, student_reference("motion", text, clip.shape, 9))


def test_lora_is_merged_to_rounding(comfyui, loaded, sample, load_student, student_reference):
    """ComfyUI rounds the base before a LoRA is added to it, the command line after: a unit in the last place of some weights."""
    ((text, _),) = comfyui.prompt(loaded.clip)
    clip = sample(comfyui.empty(), student=load_student("motion+lora"), steps=1)
    reference = student_reference("motion+lora", text, clip.shape, 9, 1)
    tolerance = 10 * torch.finfo(DTYPE).eps
    error, size = (clip - reference).square().mean().sqrt(), reference.square().mean().sqrt()
    assert error < tolerance * size
    without = sample(comfyui.empty(), student=load_student("motion"), steps=1)
    assert (without - reference).square().mean().sqrt() > 2 * tolerance * size


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
    assert torch.equal(evaluations[0][0][0].transpose(0, 1), noise.to(DTYPE))


def test_frames_of_a_longer_clip_get_that_clips_noise(comfyui, loaded, sample, evaluations, student_network):
    from comfy.sample import prepare_noise

    whole = comfyui.empty(6)
    (part,) = comfyui.run("LatentFromBatch", samples=whole, batch_index=3, length=2)
    assert part["batch_index"] == [3, 4]
    clip = sample(part)
    noise = prepare_noise(whole["samples"], 9)
    assert torch.equal(evaluations[0][0][0].transpose(0, 1), noise[3:5].to(DTYPE))
    # The noise of later steps too.
    predict = video_predictor(student_network("all"))
    ((text, _),) = comfyui.prompt(loaded.clip)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        noise = draw_noise((1, 4, 2, 4, 8), generator, index=[3, 4])
        expected = sample_student(predict, noise, text, TIMESTEPS, generator, index=[3, 4])
    assert torch.equal(clip, as_latent(expected))
    assert not torch.equal(clip, sample(comfyui.empty(2)))


@pytest.mark.parametrize("denoise, kept", [(0.5, [300]), (0.6, [600, 300]), (0.85, [800, 600, 300]), (0.3, [300])])
def test_video_to_video_starts_at_the_first_step_that_is_low_enough(comfyui, sample, evaluations, denoise, kept):
    generator = torch.Generator().manual_seed(2)
    latent = {"samples": torch.randn(3, 4, 4, 8, generator=generator)}
    clip = sample(latent, denoise=denoise)
    assert [t for _, t in evaluations] == kept
    noise = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(9))
    schedule = DDIMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
    expected = schedule.add_noise(SCALE * latent["samples"], noise, torch.tensor(kept[0]))
    x_t = evaluations[0][0][0].transpose(0, 1).float()
    torch.testing.assert_close(x_t, expected, rtol=2 * torch.finfo(DTYPE).eps, atol=1e-4)
    assert clip.isfinite().all()


def test_at_full_denoise_the_latent_does_not_matter(comfyui, sample):
    random = {"samples": torch.randn(3, 4, 4, 8)}
    assert torch.equal(sample(random), sample(comfyui.empty()))
    assert not torch.equal(sample(random, denoise=0.6), sample(comfyui.empty(), denoise=0.6))


def test_a_denoise_that_leaves_no_step_is_refused(comfyui, sample, evaluations):
    with pytest.raises(
        ValueError, match=r"Expected denoise of at least 0\.30 with the steps .*999, 800, 600, 300.*found 0\.29"
    ):
        sample(comfyui.empty(), denoise=0.29)
    with pytest.raises(ValueError, match=r"^Expected denoise .*found 0\.00, which leaves none; raise it"):
        sample(comfyui.empty(), denoise=0.0)
    assert not evaluations


def test_joined_prompts_are_read(comfyui, loaded, sample, student_reference):
    one, other = comfyui.prompt(loaded.clip), comfyui.prompt(loaded.clip, "a small red square standing still")
    (joined,) = comfyui.run("ConditioningConcat", conditioning_to=one, conditioning_from=other)
    clip = sample(comfyui.empty(), positive=joined)
    text = torch.cat([one[0][0], other[0][0]], 1)
    assert torch.equal(clip, student_reference("all", text, clip.shape, 9))
    assert not torch.equal(clip, sample(comfyui.empty()))


def test_other_keys_of_the_latent_are_kept_and_it_is_not_changed(comfyui, loaded, student):
    latent = comfyui.empty(2) | {"theirs": object()}
    given, before = dict(latent), latent["samples"].clone()
    inputs = {"student": student, "positive": comfyui.prompt(loaded.clip), "seed": 0, "steps": 1, "denoise": 1.0}
    (out,) = comfyui.run("AVDM2StudentSampler", latent=latent, **inputs)
    assert out.keys() == given.keys() and out["theirs"] is given["theirs"]
    assert latent == given and torch.equal(latent["samples"], before)


def test_one_frame_and_a_mask_are_warned_of_and_sampled(comfyui, sample, caplog):
    (masked,) = comfyui.run("SetLatentNoiseMask", samples=comfyui.empty(1), mask=torch.zeros(1, 32, 64))
    clip = sample(masked)
    assert clip.shape == (1, 4, 4, 8)
    assert sum("AVDM2" in message for message in caplog.messages) == 2
    assert torch.equal(clip, sample(comfyui.empty(1)))


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
