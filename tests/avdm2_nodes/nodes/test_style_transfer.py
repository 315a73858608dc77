import pytest
import torch

from avdm2_nodes.diffusion.guidance import pulled
from avdm2_nodes.diffusion.samplers import draw_noise, sample_student
from avdm2_nodes.diffusion.stack import load_image_unet
from avdm2_nodes.diffusion.unets import image_predictor, video_predictor
from tests.avdm2_nodes.conftest import as_latent, in_sampling_dtype

OTHER, SAME = "other of tiny", "same of tiny"


@pytest.fixture
def styled(comfyui, student):
    """styled((style, strength), ...): the student of all weights, with these styles one after the other."""

    def add(*styles):
        out = student
        for style, strength in styles:
            (out,) = comfyui.run("AVDM2StyleTransfer", student=out, style=style, strength=strength)
        return out

    return add


@pytest.fixture
def sample(comfyui, loaded):
    common = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(2), "steps": 2, "denoise": 1.0}
    return lambda student, seed=9: comfyui.run("AVDM2StudentSampler", student=student, seed=seed, **common)[0]["samples"]


@pytest.fixture
def reference(student_network, node_stack_folder):
    """reference(text, empty_text, styles): the student's chain with a pull of each style after each step, put together from `diffusion`."""

    def unet(folder):
        return image_predictor(in_sampling_dtype(load_image_unet(folder)))

    source = unet(node_stack_folder)
    style_of = {style: unet(node_stack_folder / "styles" / style.split()[0]) for style in (OTHER, SAME)}

    @torch.no_grad()
    def chain(text, empty_text, styles, seed=9):
        pulls = [
            pulled(style_of[style], source, text, empty_text, strength, torch.Generator().manual_seed(seed + 1 + i))
            for i, (style, strength) in enumerate(styles)
        ]

        def refine(x0, step):
            for pull in pulls:
                x0 = pull(x0, step)
            return x0

        generator = torch.Generator().manual_seed(seed)
        noise = draw_noise((1, 4, 2, 4, 8), generator)
        predict = video_predictor(student_network("all"))
        return as_latent(sample_student(predict, noise, text, (999, 499), generator, refine=refine))

    return chain


def test_no_strength_is_no_style_and_the_source_pulls_nothing(sample, student, styled):
    plain = sample(student)
    assert torch.equal(sample(styled((OTHER, 0.0))), plain)
    assert torch.equal(sample(styled((SAME, 2.0))), plain)
    assert not torch.equal(sample(styled((OTHER, 0.5))), plain)
    assert torch.equal(sample(student), plain), "the student on the other wire is as it was"


def test_styles_add_up(comfyui, loaded, sample, styled, reference, node_stack):
    ((text, _),) = comfyui.prompt(loaded.clip)
    clips = []
    for styles in ([(OTHER, 0.5)], [(OTHER, 0.5), (OTHER, 0.25)], [(SAME, 1.0), (OTHER, 0.5)]):
        clips.append(sample(styled(*styles)))
        assert torch.equal(clips[-1], reference(text, node_stack.encode_text([""]), styles))
    assert not torch.equal(clips[0], clips[1])


def test_the_same_seed_gives_the_same_clip(sample, styled):
    student = styled((OTHER, 0.5))
    clips = [sample(student, seed) for seed in (0, 0, 2**64 - 1, 2**64 - 1)]
    assert torch.equal(clips[0], clips[1]) and torch.equal(clips[2], clips[3]) and not torch.equal(clips[0], clips[2])


def test_the_student_shares_its_source_between_styles(styled):
    one, two = styled((OTHER, 0.5), (SAME, 0.5)).styles
    assert one.source is two.source and one.patcher is not two.patcher


def test_an_unknown_style_is_refused(comfyui, student):
    with pytest.raises(ValueError, match=r"Expected gone.safetensors in .*checkpoints.*, found no such file"):
        comfyui.run("AVDM2StyleTransfer", student=student, style="gone.safetensors", strength=1.0)
