import pytest
import torch
from diffusers import DDIMScheduler

from tests.avdm2_nodes.conftest import SCALE, TEACHER_WINDOW
from tests.avdm2_nodes.native import GUIDED, difference


@pytest.fixture
def sample(comfyui, loaded):
    """sample(latent, ...): the samples of AVDM2 Teacher Sampler, for the common prompt."""
    common = {
        "teacher": loaded.teacher,
        "positive": comfyui.prompt(loaded.clip),
        "seed": 9,
        "steps": 4,
        "cfg": 3.0,
        "denoise": 1.0,
    }
    return lambda latent, **inputs: comfyui.run("AVDM2TeacherSampler", latent=latent, **common | inputs)[0]["samples"]


def same(clip, expected):
    return difference(clip, expected) < GUIDED


@pytest.mark.parametrize("frames, cfg", [(3, 3.0), (3, 1.0), (9, 2.0)])
def test_the_latent_is_that_of_the_command_line(
    comfyui, loaded, sample, teacher_reference, node_stack, frames, cfg, evaluations
):
    ((text, _),) = comfyui.prompt(loaded.clip)
    clip = sample(comfyui.empty(frames), cfg=cfg)
    assert same(clip, teacher_reference(text, node_stack.encode_text([""]), clip.shape, 9, 4, cfg))
    windows, copies = (3 if frames == 9 else 1), (1 if cfg == 1 else 2)
    assert [len(x_t) for x_t, _ in evaluations] == [copies * min(frames, TEACHER_WINDOW)] * 4 * windows


def test_a_negative_prompt_takes_the_empty_ones_place(comfyui, loaded, sample, teacher_reference):
    ((text, _),), negative = comfyui.prompt(loaded.clip), comfyui.prompt(loaded.clip, "a small red square")
    clip = sample(comfyui.empty(), negative=negative)
    assert same(clip, teacher_reference(text, negative[0][0], clip.shape, 9, 4, 3.0))
    assert not same(clip, sample(comfyui.empty()))
    assert torch.equal(sample(comfyui.empty(), negative=comfyui.prompt(loaded.clip, "")), sample(comfyui.empty()))


def test_joined_and_long_prompts_are_read_beside_shorter_ones(comfyui, loaded, sample, teacher_reference, node_stack):
    one, other = comfyui.prompt(loaded.clip), comfyui.prompt(loaded.clip, "a small red square standing still")
    (joined,) = comfyui.run("ConditioningConcat", conditioning_to=one, conditioning_from=other)
    clip = sample(comfyui.empty(), positive=joined)
    empty = node_stack.encode_text([""])
    text = torch.cat([one[0][0], other[0][0]], 1)
    assert same(clip, teacher_reference(text, torch.cat([empty, empty], 1), clip.shape, 9, 4, 3.0))


@pytest.mark.parametrize("name", ["cfg", "denoise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(comfyui, sample, evaluations, name, value):
    with pytest.raises(ValueError, match=rf"^Expected a finite number for {name}, found {value}; set it anew\.$"):
        sample(comfyui.empty(), **{name: value})
    assert not evaluations


def test_the_first_noise_is_the_students(comfyui, loaded, sample, student, evaluations):
    sample(comfyui.empty())
    options = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(), "seed": 9, "steps": 4, "denoise": 1.0}
    comfyui.run("AVDM2StudentSampler", student=student, **options)
    assert difference(evaluations[0][0][:3], evaluations[4][0]) < 1e-5


def test_frames_of_a_longer_clip_get_that_clips_noise(comfyui, sample, evaluations):
    from comfy.sample import prepare_noise

    whole = comfyui.empty(6)
    (part,) = comfyui.run("LatentFromBatch", samples=whole, batch_index=2, length=3)
    sample(part)
    assert difference(evaluations[0][0][:3], prepare_noise(whole["samples"], 9)[2:5]) < 1e-5


def test_video_to_video_starts_at_the_first_step_that_is_low_enough(comfyui, sample, evaluations):
    latent = {"samples": torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(2))}
    sample(latent, steps=4, denoise=0.5)
    assert [t for _, t in evaluations] == [499, 249]
    noise = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(9))
    schedule = DDIMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
    expected = schedule.add_noise(SCALE * latent["samples"], noise, torch.tensor(499))
    torch.testing.assert_close(evaluations[0][0][:3], expected, rtol=1e-5, atol=1e-4)


def test_a_denoise_that_leaves_no_step_is_refused(comfyui, sample, evaluations):
    with pytest.raises(ValueError, match=r"Expected denoise of at least 0\.25 with the steps 999, 749, 499, 249, found 0\.10"):
        sample(comfyui.empty(), steps=4, denoise=0.1)
    assert not evaluations


def test_a_motion_module_without_a_clip_wants_a_negative_prompt(comfyui, loaded, sample, evaluations, model_folders):
    image = comfyui.pack("comfy_bridge.facts").facts_of(loaded.teacher).image_model
    with pytest.raises(ValueError, match=r"Expected a teacher, found a MODEL without motion; put AVDM2 Motion Module or"):
        sample(comfyui.empty(), teacher=image)
    (stack, _, _) = comfyui.run("AVDM2StackLoader", stack="miniature (bundled)")
    (plain,) = comfyui.run("AVDM2MotionModule", model=stack, motion_module="miniature (bundled)")
    with pytest.raises(ValueError, match=r"Expected a negative prompt, found none; wire CLIP Text Encode with an empty text"):
        sample(comfyui.empty(), teacher=plain)
    assert not evaluations
