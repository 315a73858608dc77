import gc

import pytest
import torch

from avdm2_nodes.diffusion.guidance import pulled
from avdm2_nodes.diffusion.unets import image_predictor, video_predictor
from avdm2_nodes.files.stack import load_image_unet
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_unet import student_unet
from tests.avdm2_nodes.native import CLIP, GUIDED, chain, difference
from training.evaluation.sampling import style_guide

OTHER, SAME = "other of tiny", "same of tiny"
TRANSPLANT = "transplant"
SHAPE, STEPS = (2, 4, 4, 8), (999, 499)


@pytest.fixture
def sample(comfyui, loaded):
    common = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(2), "steps": 2, "denoise": 1.0}
    return lambda student, seed=9: comfyui.run("AVDM2StudentSampler", student=student, seed=seed, **common)[0]["samples"]


@pytest.fixture(scope="module")
def image_unets(node_stack_folder):
    """(the base's, by style the style's) image UNets of the tiny stack."""
    style_of = {style: load_image_unet(node_stack_folder / "styles" / style.split()[0]) for style in (OTHER, SAME)}
    return load_image_unet(node_stack_folder), style_of


@pytest.fixture
def reference(student_network, image_unets):
    """reference(text, empty_text, styles): the student's chain with a pull of each style after each step, put together from `diffusion`."""
    source, style_of = image_unets

    def clip(text, empty_text, styles, seed=9, **options):
        pulls = [
            pulled(
                image_predictor(style_of[style]), image_predictor(source), text, empty_text, strength,
                torch.Generator().manual_seed(seed + 1 + i), **options,
            )
            for i, (style, strength) in enumerate(styles)
        ]  # fmt: skip

        def refine(x0, step):
            for pull in pulls:
                x0 = pull(x0, step)
            return x0

        return chain(video_predictor(student_network("all")), text, SHAPE, seed, STEPS, refine=refine)

    return clip


# ---- every mode ----


def test_at_strength_0_and_with_its_own_base_as_style_a_student_is_itself_to_the_bit(
    comfyui, sample, student, styled, write_style_file
):
    plain = sample(student)
    learnt = write_style_file(comfyui.student_of(student), "learnt").name
    for style in ((OTHER, 0.0), (OTHER, 0.0, TRANSPLANT), (learnt, 0.0), (SAME, 2.0), (SAME, 2.0, TRANSPLANT)):
        assert torch.equal(sample(styled(style)), plain), style
    for style in ((OTHER, 0.5), (OTHER, 0.5, TRANSPLANT), (learnt, 0.5)):
        assert not torch.equal(sample(styled(style)), plain), style
    assert torch.equal(sample(student), plain), "the student on the other wire is as it was"


def test_at_strength_0_nothing_is_evaluated_nor_kept(comfyui, student, styled, write_style_file):
    learnt = write_style_file(comfyui.student_of(student), "learnt").name
    for style in ((OTHER, 0.0), (OTHER, 0.0, TRANSPLANT), (learnt, 0.0)):
        assert styled(style) is student


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_an_unknown_style_is_refused_at_any_strength(comfyui, student, strength):
    with pytest.raises(ValueError, match=r"Expected gone.safetensors in .*checkpoints.*, found no such file"):
        comfyui.run("AVDM2StyleTransfer", student=student, style="gone.safetensors", strength=strength)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(comfyui, student, styled, write_style_file, strength):
    learnt = write_style_file(comfyui.student_of(student), "learnt").name
    for style in ((OTHER, strength), (OTHER, strength, TRANSPLANT), (learnt, strength)):
        with pytest.raises(ValueError, match=r"^Expected a finite number for strength, found (nan|inf); set it anew\.$"):
            styled(style)


# ---- guidance ----


def held() -> int:
    """Bytes of all tensors that are alive, storages that several share counted once."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("holds", ["motion", "motion+lora", "all"])
def test_guidance_holds_the_style_s_weights_and_no_others(sample, load_student, styled, loaded, image_unets, holds):
    """Those that it pulls against are the base's own, in every guide; a MODEL that is wired keeps its own too."""
    student = load_student(holds)
    before = len(sample(student)) and held()
    guided = styled((OTHER, 0.5), student=student)
    clip, size = sample(guided), sum(parameter.nbytes for parameter in image_unets[1][OTHER].parameters())
    assert size <= held() - before < 1.02 * size
    one = held()
    twice = styled((SAME, 0.5), student=guided, model=loaded.teacher)
    assert sample(twice).isfinite().all() and clip.isfinite().all()
    assert held() - one < 0.02 * size


def test_guiding_styles_add_up(comfyui, loaded, sample, styled, reference, node_stack):
    ((text, _),) = comfyui.prompt(loaded.clip)
    clips = []
    for styles in ([(OTHER, 0.5)], [(OTHER, 0.5), (OTHER, 0.25)], [(SAME, 1.0), (OTHER, 0.5)]):
        clips.append(sample(styled(*styles)))
        assert difference(clips[-1], reference(text, node_stack.encode_text([""]), styles)) < GUIDED
    assert difference(clips[0], clips[1]) > 0.01


def test_guidance_is_that_of_the_command_line(comfyui, loaded, sample, styled, node_stack, image_unets, student_network):
    ((text, _),) = comfyui.prompt(loaded.clip)
    source, style_of = image_unets
    guide = style_guide(style_of[OTHER], source, node_stack.encode_text([""]), 0.5)(text, torch.Generator().manual_seed(9))
    expected = chain(video_predictor(student_network("all")), text, SHAPE, 9, STEPS, refine=guide)
    assert difference(sample(styled((OTHER, 0.5))), expected) < GUIDED
    assert difference(sample(styled()), expected) > 0.01


def test_a_guided_student_by_ksampler_and_in_windows(comfyui, loaded, styled, student):
    """Whatever samples it: the pull follows the step, and frames of all windows are pulled together."""
    prompt, latent = comfyui.prompt(loaded.clip), comfyui.empty(7)
    guided = styled((OTHER, 0.5))
    options = {"seed": 9, "steps": 2, "denoise": 1.0}
    (ours,) = comfyui.run("AVDM2StudentSampler", student=guided, positive=prompt, latent=latent, **options)
    core = {"sampler_name": "lcm", "scheduler": "simple", "cfg": 1.0, "positive": prompt, "negative": prompt}
    (theirs,) = comfyui.run("KSampler", model=guided, latent_image=latent, **core, **options)
    assert torch.equal(ours["samples"], theirs["samples"])


def test_a_style_may_read_a_prompt_of_its_own_and_pull_more_than_once(comfyui, loaded, sample, styled, reference, node_stack):
    ((text, _),) = comfyui.prompt(loaded.clip)
    empty, other = node_stack.encode_text([""]), comfyui.prompt(loaded.clip, "a small red square")
    found = sample(styled((OTHER, 0.5), prompt=other, pulls=2))
    expected = reference(text, empty, [(OTHER, 0.5)], style_texts=(other[0][0], empty), pulls=2)
    assert difference(found, expected) < GUIDED
    assert not torch.equal(found, sample(styled((OTHER, 0.5), pulls=2)))
    assert not torch.equal(found, sample(styled((OTHER, 0.5), prompt=other)))


def test_several_prompts_for_a_style_are_refused(comfyui, loaded, styled):
    one = comfyui.prompt(loaded.clip)
    with pytest.raises(ValueError, match=r"Expected one prompt for the style, found 2; wire one CLIP Text Encode"):
        styled((OTHER, 0.5), prompt=[*one, *one])


def test_a_prompt_of_another_width_is_refused(styled):
    with pytest.raises(ValueError, match=r"Expected text embeddings of width 32 .*, found 48; "):
        styled((OTHER, 0.5), prompt=[[torch.zeros(1, 8, 48), {}]])


def test_the_same_seed_gives_the_same_clip(sample, styled):
    student = styled((OTHER, 0.5))
    clips = [sample(student, seed) for seed in (0, 0, 2**64 - 1, 2**64 - 1)]
    assert torch.equal(clips[0], clips[1]) and torch.equal(clips[2], clips[3]) and not torch.equal(clips[0], clips[2])


# ---- in the weights ----


@pytest.mark.parametrize("holds", ["all", "motion", "motion+lora"])
def test_a_transplant_is_the_student_s_change_on_the_style_s_weights(
    comfyui, loaded, sample, styled, load_student, students, node_stack, image_unets, holds
):
    """base + strength (style - base) + what the student learnt, by weights put together here."""
    base, other = dict(node_stack.image_unet.named_parameters()), dict(image_unets[1][OTHER].named_parameters())
    unet = student_unet(read_student(students[holds]), node_stack.image_unet)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name in base:
                weight += 0.7 * (other[name] - base[name]).half().float()  # as student files have theirs
    ((text, _),) = comfyui.prompt(loaded.clip)
    expected, student = chain(video_predictor(unet), text, SHAPE, 9, STEPS), load_student(holds)
    assert difference(sample(styled((OTHER, 0.7, TRANSPLANT), student=student)), expected) < CLIP
    assert difference(sample(student), expected) > 0.01
    twice = styled((OTHER, 0.3, TRANSPLANT), (OTHER, 0.4, TRANSPLANT), student=student)
    assert difference(sample(twice), expected) < CLIP, "several add up"


def test_a_style_file_is_laid_on_the_student(comfyui, loaded, sample, styled, student, students, write_style_file):
    from avdm2_nodes.files.style import lora_change, read_style

    file = write_style_file(comfyui.student_of(student), "learnt")
    unet = student_unet(read_student(students["all"]))
    with torch.no_grad():
        for name, change in lora_change(read_style(file)).items():
            unet.get_parameter(name).add_(0.5 * change)
    ((text, _),) = comfyui.prompt(loaded.clip)
    expected = chain(video_predictor(unet), text, SHAPE, 9, STEPS)
    assert difference(sample(styled((file.name, 0.5))), expected) < CLIP
    assert torch.equal(sample(styled((file.name, 0.5, TRANSPLANT))), sample(styled((file.name, 0.5)))), "it needs no mode"


def test_a_style_file_of_another_student_is_refused(comfyui, styled, load_student, write_style_file):
    file = write_style_file(comfyui.student_of(load_student("motion")), "learnt")
    with pytest.raises(
        ValueError, match=r"Expected the student .* for the style .*learnt.safetensors, found .*; load the student"
    ):
        styled((file.name, 0.5))


def test_style_files_are_styles_and_no_students(comfyui, student, write_style_file):
    def choices(node_id, name):
        kind, options = comfyui.nodes.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()["required"][name]
        return kind if isinstance(kind, list) else options["options"]

    file = write_style_file(comfyui.student_of(student), "learnt")
    assert file.name in choices("AVDM2StyleTransfer", "style") and file.name not in choices("AVDM2StudentLoader", "student")
    assert "all.safetensors" not in choices("AVDM2StyleTransfer", "style")
    assert "all.safetensors" in choices("AVDM2StudentLoader", "student")


def test_all_kinds_chain(comfyui, sample, styled, student, write_style_file):
    learnt = write_style_file(comfyui.student_of(student), "learnt").name
    chained = styled((OTHER, 0.5), (learnt, 0.5), (OTHER, 0.2, TRANSPLANT))
    facts = comfyui.pack("comfy_bridge.facts").student_facts(chained)
    assert facts.guides == (OTHER,) and [c.use.mode for c in facts.changes] == ["fine-tuned", "transplant"]
    assert torch.equal(sample(chained), sample(styled((learnt, 0.5), (OTHER, 0.2, TRANSPLANT), (OTHER, 0.5))))
