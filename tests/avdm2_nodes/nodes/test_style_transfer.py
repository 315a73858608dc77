import pytest
import torch
from torch import nn

from avdm2_nodes.diffusion.guidance import pulled
from avdm2_nodes.diffusion.precision import sampling_dtype
from avdm2_nodes.diffusion.samplers import draw_noise, sample_student
from avdm2_nodes.diffusion.unets import image_predictor, video_predictor
from avdm2_nodes.files.stack import load_image_unet
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_unet import student_unet
from tests.avdm2_nodes.conftest import as_latent, in_sampling_dtype

OTHER, SAME = "other of tiny", "same of tiny"
TRANSPLANT = "transplant"


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
    def chain(text, empty_text, styles, seed=9, **options):
        pulls = [
            pulled(style_of[style], source, text, empty_text, strength, torch.Generator().manual_seed(seed + 1 + i), **options)
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


def close(one, other):
    """Equal within the rounding of the weights to what they are sampled in."""
    error, size = (one - other).square().mean().sqrt(), other.square().mean().sqrt()
    return error < 10 * torch.finfo(sampling_dtype(torch.device("cpu"))).eps * size


# ---- every mode ----


def test_at_strength_0_and_with_its_own_base_as_style_a_student_is_itself_to_the_bit(sample, student, styled, write_style_file):
    plain = sample(student)
    learnt = write_style_file(student.file, "learnt").name
    for style in ((OTHER, 0.0), (OTHER, 0.0, TRANSPLANT), (learnt, 0.0), (SAME, 2.0), (SAME, 2.0, TRANSPLANT)):
        assert torch.equal(sample(styled(style)), plain), style
    for style in ((OTHER, 0.5), (OTHER, 0.5, TRANSPLANT), (learnt, 0.5)):
        assert not torch.equal(sample(styled(style)), plain), style
    assert torch.equal(sample(student), plain), "the student on the other wire is as it was"


def test_at_strength_0_nothing_is_evaluated_nor_kept(student, styled, write_style_file):
    learnt = write_style_file(student.file, "learnt").name
    for style in ((OTHER, 0.0), (OTHER, 0.0, TRANSPLANT), (learnt, 0.0)):
        assert styled(style) is student


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_an_unknown_style_is_refused_at_any_strength(comfyui, student, strength):
    with pytest.raises(ValueError, match=r"Expected gone.safetensors in .*checkpoints.*, found no such file"):
        comfyui.run("AVDM2StyleTransfer", student=student, style="gone.safetensors", strength=strength)


# ---- guidance ----


def test_guiding_styles_add_up(comfyui, loaded, sample, styled, reference, node_stack):
    ((text, _),) = comfyui.prompt(loaded.clip)
    clips = []
    for styles in ([(OTHER, 0.5)], [(OTHER, 0.5), (OTHER, 0.25)], [(SAME, 1.0), (OTHER, 0.5)]):
        clips.append(sample(styled(*styles)))
        assert torch.equal(clips[-1], reference(text, node_stack.encode_text([""]), styles))
    assert not torch.equal(clips[0], clips[1])


def test_a_style_may_read_a_prompt_of_its_own_and_pull_more_than_once(comfyui, loaded, sample, styled, reference, node_stack):
    ((text, _),) = comfyui.prompt(loaded.clip)
    empty, other = node_stack.encode_text([""]), comfyui.prompt(loaded.clip, "a small red square")
    found = sample(styled((OTHER, 0.5), prompt=other, pulls=2))
    assert torch.equal(found, reference(text, empty, [(OTHER, 0.5)], style_texts=(other[0][0], empty), pulls=2))
    assert not torch.equal(found, sample(styled((OTHER, 0.5), pulls=2)))
    assert not torch.equal(found, sample(styled((OTHER, 0.5), prompt=other)))


def test_a_prompt_of_another_width_is_refused(styled):
    with pytest.raises(ValueError, match=r"Expected text embeddings of width 32 at prompt, found 48"):
        styled((OTHER, 0.5), prompt=[[torch.zeros(1, 8, 48), {}]])


def test_the_same_seed_gives_the_same_clip(sample, styled):
    student = styled((OTHER, 0.5))
    clips = [sample(student, seed) for seed in (0, 0, 2**64 - 1, 2**64 - 1)]
    assert torch.equal(clips[0], clips[1]) and torch.equal(clips[2], clips[3]) and not torch.equal(clips[0], clips[2])


def test_the_student_shares_its_source_between_guides(styled):
    one, two = styled((OTHER, 0.5), (SAME, 0.5)).guides
    assert one.source is two.source and one.patcher is not two.patcher


# ---- in the weights ----


@pytest.mark.parametrize("holds", ["all", "motion", "motion+lora"])
def test_a_transplant_is_the_student_s_change_on_the_style_s_weights(
    sample, styled, load_student, students, node_stack, node_stack_folder, student_network, holds
):
    """base + strength (style - base) + what the student learnt, by weights put together here."""
    base, other = (
        dict(u.named_parameters()) for u in (node_stack.image_unet, load_image_unet(node_stack_folder / "styles/other"))
    )
    unet = student_unet(read_student(students[holds]), node_stack.image_unet)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name in base:
                weight += 0.7 * (other[name] - base[name])
    student = load_student(holds)
    expected = sample(nodes_student(student, unet))
    assert close(sample(styled((OTHER, 0.7, TRANSPLANT), student=student)), expected)
    assert not close(sample(student), expected)
    twice = styled((OTHER, 0.3, TRANSPLANT), (OTHER, 0.4, TRANSPLANT), student=student)
    assert close(sample(twice), expected), "several add up"


def nodes_student(student, unet):
    """The student with a network of its own in place of patches."""
    from dataclasses import replace

    from comfy.model_patcher import ModelPatcher

    holder = type(student.patcher.model)
    nn.Module.to(unet, student.patcher.model.get_dtype())
    patcher = ModelPatcher(
        holder(unet, student.teacher.latent_format), student.patcher.load_device, student.patcher.offload_device
    )
    return replace(student, patcher=patcher)


def test_a_style_file_is_laid_on_the_student(sample, styled, student, students, node_stack, write_style_file):
    from avdm2_nodes.files.style import lora_change, read_style

    file = write_style_file(student.file, "learnt")
    unet = student_unet(read_student(students["all"]))
    with torch.no_grad():
        for name, change in lora_change(read_style(file)).items():
            unet.get_parameter(name).add_(0.5 * change)
    expected = sample(nodes_student(student, unet))
    assert close(sample(styled((file.name, 0.5))), expected)
    assert torch.equal(sample(styled((file.name, 0.5, TRANSPLANT))), sample(styled((file.name, 0.5)))), "it needs no mode"


def test_a_style_file_of_another_student_is_refused(styled, load_student, write_style_file):
    file = write_style_file(load_student("motion").file, "learnt")
    with pytest.raises(
        ValueError, match=r"Expected the student .* for the style .*learnt.safetensors, found .*; load the student"
    ):
        styled((file.name, 0.5))


def test_style_files_are_styles_and_no_students(comfyui, student, write_style_file):
    def choices(node_id, name):
        kind, options = comfyui.nodes.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()["required"][name]
        return kind if isinstance(kind, list) else options["options"]

    file = write_style_file(student.file, "learnt")
    assert file.name in choices("AVDM2StyleTransfer", "style") and file.name not in choices("AVDM2StudentLoader", "student")
    assert "all.safetensors" not in choices("AVDM2StyleTransfer", "style")
    assert "all.safetensors" in choices("AVDM2StudentLoader", "student")


def test_all_kinds_chain(sample, styled, student, write_style_file):
    learnt = write_style_file(student.file, "learnt").name
    chained = styled((OTHER, 0.5), (learnt, 0.5), (OTHER, 0.2, TRANSPLANT))
    assert len(chained.guides) == 1 and [c.use.mode for c in chained.changes] == ["fine-tuned", "transplant"]
    assert torch.equal(sample(chained), sample(styled((learnt, 0.5), (OTHER, 0.2, TRANSPLANT), (OTHER, 0.5))))
