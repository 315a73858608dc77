import torch

from avdm2_nodes.diffusion.guidance import pulled
from avdm2_nodes.diffusion.samplers import draw_noise, sample_student
from avdm2_nodes.diffusion.unets import image_predictor, video_predictor, video_unet
from avdm2_nodes.files.stack import load_image_unet, load_stack
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_unet import student_unet
from tests.training.conftest import TIMESTEPS
from training.evaluation import sampling


def test_teacher_size_is_the_image_unets(model):
    stack = load_stack(model, with_motion=False)
    assert sampling.teacher_size(stack) == (64, 64)


def test_clips_are_those_of_the_chain(model):
    stack = load_stack(model, with_motion=False)
    unet = student_unet(read_student(model / "motion.safetensors"), stack.image_unet)
    prompts, seeds = ["a red circle", "a blue square"], [3, 4]
    steps = []
    sampler = sampling.student_sampler(unet, TIMESTEPS, 8)
    clips = sampling.generate(sampler, stack, prompts, seeds, 3, 16, 24, lambda done, x0: steps.append((done, x0.dtype)))
    assert clips.shape == (2, 3, 16, 24, 3) and clips.dtype == torch.uint8
    assert steps == [(1, torch.float32), (2, torch.float32)]
    for i in range(2):
        generator = torch.Generator().manual_seed(seeds[i])
        noise = draw_noise((1, 4, 3, 2, 3), generator)
        with torch.no_grad():
            clip = sample_student(video_predictor(unet), noise, stack.encode_text(prompts[i : i + 1]), TIMESTEPS, generator)
        assert (stack.decode_clips(clip)[0].int() - clips[i].int()).abs().max() <= 3  # a batch sums in another order


def test_a_guided_clip_is_that_of_the_pulled_chain(model, styles):
    stack, other = load_stack(model, with_motion=False), load_image_unet(styles / "other")
    unet = student_unet(read_student(model / "motion.safetensors"), stack.image_unet)
    empty, text = stack.encode_text([""]), stack.encode_text(["a red circle"])
    guides = [sampling.style_guide(other, stack.image_unet, empty, s, i) for i, s in enumerate((0.5, 0.25))]
    clip = sampling.generate(
        sampling.student_sampler(unet, TIMESTEPS, 8, guides=guides), stack, ["a red circle"], [7], 3, 16, 24
    )
    generator = torch.Generator().manual_seed(7)
    noise = draw_noise((1, 4, 3, 2, 3), generator)
    pair = image_predictor(other), image_predictor(stack.image_unet)
    first, second = (  # the seeds after the clip's own
        pulled(*pair, text, empty, s, torch.Generator().manual_seed(seed)) for s, seed in ((0.5, 8), (0.25, 9))
    )
    with torch.no_grad():
        expected = sample_student(
            video_predictor(unet), noise, text, TIMESTEPS, generator, refine=lambda x0, i: second(first(x0, i), i)
        )
    assert torch.equal(stack.decode_clips(expected), clip)


def test_a_transplant_at_strength_1_is_the_student_on_the_other_base(model, styles):
    stack, student = load_stack(model), read_student(model / "motion.safetensors")
    unet = student_unet(student, stack.image_unet)
    assert sampling.add_styles([(styles / "other", 1.0)], "transplant", student, unet, stack) == []
    expected = dict(video_unet(load_image_unet(styles / "other"), stack.motion).named_parameters())
    for name, weight in unet.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)
