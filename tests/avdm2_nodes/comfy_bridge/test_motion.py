"""Motion modules in a native MODEL against diffusers' video UNet, and what stays in the network that MODELs share: nothing."""

import copy
import gc
import weakref

import pytest
import torch
from diffusers import MotionAdapter
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

from avdm2_nodes.diffusion.unets import image_predictor, video_unet
from avdm2_nodes.files.containers import write_tensors
from avdm2_nodes.files.motion import to_original_keys
from avdm2_nodes.files.stack import load_motion
from tests.avdm2_nodes.conftest import TEACHER_WINDOW
from tests.avdm2_nodes.native import EVALUATION, difference, diffusers_eps, evaluate, random_weights, rms
from tests.conftest import WIDTHS

OPTIONS = {"seed": 11, "steps": 4, "denoise": 1.0}
TIMESTEPS = (999, 749, 249)


@pytest.fixture(scope="module")
def room(comfyui):
    return comfyui.pack("comfy_bridge.motion")


@pytest.fixture
def management(comfyui):
    import comfy.model_management

    yield comfy.model_management
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def image_model(comfyui, model_folders):
    """The tiny stack's MODEL without motion, of a network of its own."""
    return comfyui.run("AVDM2StackLoader", stack="tiny")[0]


@pytest.fixture
def x():
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(6))


@pytest.fixture
def text(node_stack):
    return node_stack.encode_text(["a large blue circle moving left fast"])


@pytest.fixture(scope="module")
def from_file(model_folders, node_stack):
    """The tiny stack's motion module as a file in models/animatediff_models, and the video UNet that training/sample.py makes of it.

    Such a file says neither its heads, which are AnimateDiff's 8, nor its groups, which are the base's.
    """
    path = model_folders / "animatediff_models" / "tiny_motion.safetensors"
    write_tensors(path, to_original_keys(node_stack.motion.state_dict()), {})
    yield video_unet(node_stack.image_unet, load_motion(path))
    path.unlink()


def weights_of(room, motion, **changes):
    config = motion.config
    values = {"heads": config.motion_num_attention_heads, "groups": config.motion_norm_num_groups} | changes
    return room.MotionWeights(motion.state_dict(), **values)


# ---- one module ----


def test_weights_are_held_once_unless_they_are_computed_in_another_dtype(room, node_stack):
    weights = weights_of(room, node_stack.motion)
    file = {tensor.data_ptr() for tensor in weights.tensors.values()}
    for dtype, shared in ((torch.float32, True), (torch.bfloat16, False)):
        tensors = room.motion_patcher(weights, dtype).model.state_dict().values()
        assert [(tensor.dtype, tensor.data_ptr() in file) for tensor in tensors] == [(dtype, shared)] * len(weights.tensors)


@pytest.mark.parametrize("heads, blocks, groups", [(1, 1, 8), (2, 1, 32), (8, 2, 4), (4, 3, 16)])
@torch.no_grad()
def test_a_module_is_diffusers_own(room, heads, blocks, groups):
    import comfy.ops

    theirs = AnimateDiffTransformer3D(
        num_attention_heads=heads, attention_head_dim=32 // heads, in_channels=32, num_layers=blocks, norm_num_groups=groups,
        cross_attention_dim=None, activation_fn="geglu", attention_bias=False, positional_embeddings="sinusoidal",
        num_positional_embeddings=24, double_self_attention=True,
    )  # fmt: skip
    random_weights(theirs)
    like = {"dtype": torch.float32, "device": torch.device("cpu")}
    ours = room.TemporalTransformer(32, heads, groups, 24, blocks, 2, comfy.ops.manual_cast, **like)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(10, 32, 4, 6, generator=torch.Generator().manual_seed(1))
    for frames in (1, 2, 5, 10):
        ours.frames = frames
        expected = theirs(x, num_frames=frames)
        expected = expected if isinstance(expected, torch.Tensor) else expected.sample
        assert difference(ours(x), expected) < EVALUATION
        assert rms(expected - x) > 0.1
    ours.strength = 0.0
    assert torch.equal(ours(x), x)
    ours.strength = 0.5
    torch.testing.assert_close(ours(x) - x, 0.5 * (expected - x), rtol=1e-4, atol=1e-5)


# ---- in the UNet ----


@pytest.mark.parametrize("t", [999, 499, 1])
def test_the_image_model_is_diffusers_own(image_model, node_stack, x, text, t):
    with torch.no_grad():
        expected = image_predictor(node_stack.image_unet)(x, torch.tensor(t), text.expand(len(x), -1, -1))
    assert difference(evaluate(image_model, x, t, text), expected) < EVALUATION


@pytest.mark.parametrize("t", TIMESTEPS)
def test_the_video_model_is_diffusers_own(loaded, node_stack, x, text, t):
    expected = diffusers_eps(node_stack.teacher, x, t, text)
    assert difference(evaluate(loaded.teacher, x, t, text), expected) < EVALUATION
    with torch.no_grad():
        without = image_predictor(node_stack.image_unet)(x, torch.tensor(t), text.expand(len(x), -1, -1))
    assert difference(expected, without) > 100 * EVALUATION, "motion shows"


def test_motion_in_the_middle_several_blocks_and_heads_of_each_level(room, image_model, node_stack, x, text):
    torch.manual_seed(7)
    changes = {"use_motion_mid_block": True, "motion_transformer_layers_per_block": 2, "motion_num_attention_heads": 4}
    motion = MotionAdapter(block_out_channels=WIDTHS, motion_layers_per_block=1, motion_norm_num_groups=8, **changes)
    unet = video_unet(node_stack.image_unet, motion)
    plain = room.with_motion(image_model, weights_of(room, motion))
    levelled = room.with_motion(image_model, weights_of(room, motion, heads=(2, 8, 4)))
    heads = {"down_blocks": (2, 8, 4), "up_blocks": (4, 8, 2)}
    for t in TIMESTEPS:
        assert difference(evaluate(plain, x, t, text), diffusers_eps(unet, x, t, text)) < EVALUATION
    other = copy.deepcopy(unet)
    for kind, counts in heads.items():
        for block, count in zip(getattr(other, kind), counts, strict=True):
            for module in block.motion_modules.modules():
                if hasattr(module, "heads"):
                    module.heads = count
    for t in TIMESTEPS:
        expected = diffusers_eps(other, x, t, text)
        assert difference(evaluate(levelled, x, t, text), expected) < EVALUATION
    assert difference(expected, diffusers_eps(unet, x, t, text)) > 10 * EVALUATION


@pytest.mark.parametrize("frames", [1, 3])
def test_several_clips_in_one_batch_do_not_see_each_other(comfyui, image_model, from_file, text, frames):
    """As many as `clips` says, once for each prompt."""
    (model,) = comfyui.run("AVDM2MotionModule", model=image_model, motion_module="tiny_motion.safetensors", clips=2)
    x = torch.randn(4 * frames, 4, 4, 8, generator=torch.Generator().manual_seed(3))
    found = evaluate(model, x, 749, text, copies=2)
    for i in range(4):
        clip = x[i * frames : (i + 1) * frames]
        assert difference(found[i * frames : (i + 1) * frames], diffusers_eps(from_file, clip, 749, text)) < EVALUATION


def test_strength_scales_what_motion_adds(comfyui, image_model, from_file, x, text):
    def model(strength):
        inputs = {"model": image_model, "motion_module": "tiny_motion.safetensors", "strength": strength}
        return comfyui.run("AVDM2MotionModule", **inputs)[0]

    assert difference(evaluate(model(0.0), x, 749, text), evaluate(image_model, x, 749, text)) < EVALUATION
    unet = copy.deepcopy(from_file)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".motion_modules." in name and ".proj_out." in name:
                parameter *= 0.6
    assert difference(evaluate(model(0.6), x, 749, text), diffusers_eps(unet, x, 749, text)) < EVALUATION
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"^Expected a finite number for strength, found {value}; set it anew\.$"):
            model(value)


def test_a_batch_that_is_no_clips_is_refused(comfyui, image_model, from_file, loaded):
    (model,) = comfyui.run("AVDM2MotionModule", model=image_model, motion_module="tiny_motion.safetensors", clips=2)
    inputs = {"positive": comfyui.prompt(loaded.clip), "negative": comfyui.prompt(loaded.clip, ""), "cfg": 1.0, "steps": 1}
    with pytest.raises(ValueError, match=r"batch is 2 clips of the same number of frames, found 3 frames; change the batch"):
        comfyui.run("AVDM2TeacherSampler", teacher=model, latent=comfyui.empty(3), seed=0, denoise=1.0, **inputs)


def test_more_frames_than_positions_are_refused_where_a_person_set_longer_windows(comfyui, loaded, node_stack):
    """Also in core's own words for a network that was given too much: never by an index error."""
    comfyui.extras("nodes_context_windows")
    positions = node_stack.motion.config.motion_max_seq_length
    windows = {
        "context_length": positions + 8,
        "context_overlap": 4,
        "context_schedule": "standard_static",
        "context_stride": 1,
    }
    windows |= {"closed_loop": False, "fuse_method": "pyramid", "dim": 0, "freenoise": False}
    (model,) = comfyui.run("ContextWindowsManual", model=loaded.teacher, **windows)
    inputs = {"positive": comfyui.prompt(loaded.clip), "cfg": 1.0, "steps": 1, "seed": 0, "denoise": 1.0}
    with pytest.raises(ValueError, match=rf"Expected at most {positions} frames at once .* found {positions + 1}; add Context"):
        comfyui.run("AVDM2TeacherSampler", teacher=model, latent=comfyui.empty(positions + 1, 32, 32), **inputs)


def test_a_module_for_other_widths_is_refused(room, image_model, make_motion):
    for widths in ((32, 64, 64), (32, 32, 64, 64)):
        with pytest.raises(ValueError, match=r"motion module for a base of widths \[32, 32, 64\], found one of widths .*; use"):
            room.with_motion(image_model, weights_of(room, make_motion(widths)))


# ---- the network that MODELs share ----


@pytest.fixture
def sample(comfyui, loaded):
    """sample(student or None for the teacher): its clip."""
    inputs = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(), **OPTIONS}

    def clip(student=None):
        if student is None:
            return comfyui.run("AVDM2TeacherSampler", teacher=loaded.teacher, cfg=2.0, **inputs)[0]["samples"]
        return comfyui.run("AVDM2StudentSampler", student=student, **inputs)[0]["samples"]

    return clip


@pytest.fixture
def image(comfyui, loaded):
    """image(): what core's KSampler makes with the MODEL without motion that teacher and students share their network with."""
    model = comfyui.pack("comfy_bridge.facts").facts_of(loaded.teacher).image_model
    prompts = {"positive": comfyui.prompt(loaded.clip), "negative": comfyui.prompt(loaded.clip, "")}
    options = {"seed": 3, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return lambda: comfyui.run("KSampler", model=model, latent_image=comfyui.empty(2), **prompts, **options)[0]["samples"]


def state(network):
    """Everything by which a network could be told from itself before: modules in their order, tensors, hooks."""
    modules = [(name, id(module), len(module._forward_pre_hooks)) for name, module in network.named_modules()]
    return modules, {name: tensor.clone() for name, tensor in [*network.named_parameters(), *network.named_buffers()]}


def same(one, other):
    return (
        one[0] == other[0] and one[1].keys() == other[1].keys() and all(torch.equal(t, other[1][k]) for k, t in one[1].items())
    )


def test_teacher_and_students_take_turns_on_one_network(sample, load_student, loaded):
    students = [load_student(holds) for holds in ("all", "motion", "motion+lora")]
    assert len({id(s.model) for s in [*students, loaded.teacher]}) == 1, "they share their memory"
    first = [sample(student) for student in (None, *students)]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    for i in (1, 0, 2, 3, 1, 0):
        assert torch.equal(sample((None, *students)[i]), first[i]), "a patch of another's is left"


def test_the_image_model_makes_the_same_image_after_a_clip(sample, image, load_student):
    before = image()
    for holds in ("all", "motion+lora"):
        sample(load_student(holds))
        assert torch.equal(image(), before)
    sample()
    assert torch.equal(image(), before)


def test_after_a_clip_and_unloading_the_network_is_what_it_was(sample, load_student, loaded, management):
    network = loaded.teacher.model.diffusion_model
    management.unload_all_models()
    before = state(network)
    for holds in ("motion+lora", "all", "motion"):
        sample(load_student(holds))
        assert state(network)[0] == before[0]
        assert same(state(network), before) == (holds == "motion"), "only weights of its own are there while it is loaded"
        management.unload_all_models()
        assert same(state(network), before)
        assert not management.current_loaded_models


@pytest.mark.parametrize("kind", ["error", "interrupt"])
def test_after_an_error_in_the_middle_of_a_network_it_is_what_it_was(sample, student, loaded, management, kind, image):
    network = loaded.teacher.model.diffusion_model
    expected, clip = image(), sample(student)
    management.unload_all_models()
    before, count = state(network), []

    def fail(module, inputs):
        count.append(1)
        if len(count) > 2:
            if kind == "error":
                raise ArithmeticError("in the middle")
            management.interrupt_current_processing(True)
            management.throw_exception_if_processing_interrupted()

    handle = network.middle_block[1].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError if kind == "error" else management.InterruptProcessingException):
        sample(student)
    handle.remove()
    assert len(count) == 3
    assert torch.equal(image(), expected) and torch.equal(sample(student), clip)
    management.unload_all_models()
    assert same(state(network), before)


def test_a_clone_that_goes_away_while_another_samples_takes_nothing_along(comfyui, sample, student, loaded):
    clip, clones, seen = sample(student), [student.clone(), loaded.teacher.clone()], []

    def free(network, inputs):
        seen.append(1)
        if len(seen) == 2:
            clones.clear()
            gc.collect()

    handle = loaded.teacher.model.diffusion_model.register_forward_pre_hook(free)
    assert torch.equal(sample(student), clip)
    handle.remove()
    assert len(seen) == 4 and not clones


def test_a_student_that_goes_away_leaves_the_teacher_whole(comfyui, sample, loaded):
    clip = sample()
    (student,) = comfyui.run("AVDM2StudentLoader", student="all.safetensors", teacher=loaded.teacher)
    sample(student)
    weak = weakref.ref(student)
    del student
    gc.collect()
    assert weak() is None
    assert torch.equal(sample(), clip)


def test_nothing_stays_behind(comfyui, model_folders, management, caplog):
    """All of a graph, from the loader to frames, leaves no tensor of its own once its wires are gone."""

    def graph():
        teacher, clip, vae = comfyui.run("AVDM2TeacherLoader", checkpoint="tiny", motion_module="the checkpoint's own")
        (student,) = comfyui.run("AVDM2StudentLoader", student="motion+lora.safetensors", teacher=teacher)
        (styled,) = comfyui.run("AVDM2StyleTransfer", student=student, style="other of tiny", strength=0.5)
        inputs = {"positive": comfyui.prompt(clip), "latent": comfyui.empty(2, 32, 32), "seed": 0, "denoise": 1.0}
        (latent,) = comfyui.run("AVDM2StudentSampler", student=styled, steps=1, **inputs)
        (again,) = comfyui.run("AVDM2TeacherSampler", teacher=teacher, steps=1, cfg=2.0, **inputs)
        (images,) = comfyui.run("VAEDecode", samples=latent, vae=vae)
        patchers = [teacher, student, styled, *styled.get_nested_additional_models(), *student.get_nested_additional_models()]
        networks = [p.model for p in (*patchers, clip.patcher, vae.patcher)]
        file = comfyui.student_of(student)
        kept = [*networks, *patchers, next(iter(file.tensors.values()))]
        return [weakref.ref(thing) for thing in [*kept, latent["samples"], again["samples"], images]]

    left = graph()
    gc.collect()
    assert [thing() for thing in left if thing() is not None] == []
    management.cleanup_models_gc()
    assert not [message for message in caplog.messages if "leak" in message]


def test_a_student_leaves_no_cycles_to_collect(comfyui, sample, loaded):
    """Its tensors go when its wires go: memory does not wait for the garbage collector."""
    (student,) = comfyui.run("AVDM2StudentLoader", student="all.safetensors", teacher=loaded.teacher)
    sample(student)
    sample()  # which takes the student from the device
    gc.collect()
    gc.disable()
    try:
        weak = weakref.ref(sample())
        assert weak() is None
        patcher = weakref.ref(student)
        del student
        assert patcher() is None
    finally:
        gc.enable()


# ---- loaded in part, in other dtypes ----


@pytest.mark.parametrize("holds", ["all", "motion", "motion+lora"])
def test_partly_loaded_is_the_same_network(load_student, loaded, management, x, text, holds):
    """As on a GPU with too little room: some layers stay where they are and are patched and cast when they are used."""
    student = load_student(holds)
    (motion,) = student.get_nested_additional_models()
    whole = evaluate(student, x, 749, text)
    assert difference(whole, evaluate(loaded.teacher, x, 749, text)) > 0.1 * rms(whole)
    management.unload_all_models()
    for share in (0.0, 0.5):
        for patcher in (student, motion):
            patcher.model_patches_to(torch.device("cpu"))
            patcher.partially_load(torch.device("cpu"), extra_memory=share * patcher.model_size() + 1)
            assert patcher.model.model_lowvram and patcher.loaded_size() <= share * patcher.model_size() + 1
        student.pre_run()
        found = evaluate_as_it_is(student, x, 749, text)
        assert difference(found, whole) < EVALUATION
        for patcher in (student, motion):
            patcher.detach()


@torch.inference_mode()
def evaluate_as_it_is(model, x, t, text):
    """`evaluate` without loading the rest."""
    sigma = model.get_model_object("model_sampling").sigmas[t].float()
    options = {**model.model_options["transformer_options"], "wrappers": dict(model.wrappers), "cond_or_uncond": [0]}
    scaled = x * (sigma**2 + 1).sqrt()
    words = text.expand(len(x), -1, -1)
    x0 = model.model.apply_model(scaled, sigma.expand(len(x)), c_crossattn=words, transformer_options=options)
    return (scaled - x0) / sigma


def test_layers_are_comfyuis_own(loaded):
    """All that has weights can stay where it is in a partial load; position encodings are cast where they are used."""
    for patcher in (loaded.teacher, *loaded.teacher.get_nested_additional_models()):
        for name, module in patcher.model.named_modules():
            if list(module.parameters(recurse=False)) and not name.endswith("pos_embed"):
                assert hasattr(module, "comfy_cast_weights"), name


@torch.inference_mode()
def test_in_bfloat16_it_is_diffusers_own_in_bfloat16(room, comfyui, node_stack, x, text, management):
    """A MODEL that computes in bfloat16, as core loads one on a GPU: both within bfloat16's rounding of float32."""
    model = comfyui.run("AVDM2StackLoader", stack="tiny")[0]
    model.model.diffusion_model.to(torch.bfloat16)
    model.model.diffusion_model.dtype = torch.bfloat16
    model.model.manual_cast_dtype = None
    model.model.get_dtype = lambda: torch.bfloat16
    model = room.with_motion(model, weights_of(room, node_stack.motion))
    (motion,) = model.get_nested_additional_models()
    assert {p.dtype for p in motion.model.parameters()} == {torch.bfloat16}
    exact = diffusers_eps(node_stack.teacher, x, 749, text)
    unet = copy.deepcopy(node_stack.teacher)
    torch.nn.Module.to(unet, torch.bfloat16)
    theirs = diffusers_eps(unet, x.bfloat16(), 749, text.bfloat16())
    ours = evaluate(model, x, 749, text)
    assert 0 < rms(ours - exact) < 2 * rms(theirs - exact) < 0.1 * rms(exact)


@torch.inference_mode()
def test_fp8_weights_are_diffusers_own_with_these_weights(room, comfyui, node_stack, model_folders, x, text, management):
    """As core's Load Diffusion Model makes of weight_dtype fp8_e4m3fn: weights in 8 bits, cast one by one to what is computed in."""
    fp8 = torch.float8_e4m3fn
    model = comfyui.run("AVDM2StackLoader", stack="tiny")[0]
    model.model.diffusion_model.to(fp8)
    model.model.diffusion_model.dtype = torch.float32
    model.model.manual_cast_dtype = torch.float32
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    model = room.with_motion(model, weights_of(room, node_stack.motion))
    image = copy.deepcopy(node_stack.image_unet)
    for parameter in image.parameters():
        parameter.copy_(parameter.to(fp8).float())
    unet = video_unet(image, node_stack.motion)
    expected = diffusers_eps(unet, x, 749, text)
    assert difference(evaluate(model, x, 749, text), expected) < EVALUATION
    assert difference(expected, diffusers_eps(node_stack.teacher, x, 749, text)) > 10 * EVALUATION


def test_fewer_frames_than_a_window(loaded, node_stack, text):
    """One frame is a clip too."""
    for frames in (1, TEACHER_WINDOW):
        x = torch.randn(frames, 4, 4, 8, generator=torch.Generator().manual_seed(frames))
        assert difference(evaluate(loaded.teacher, x, 499, text), diffusers_eps(node_stack.teacher, x, 499, text)) < EVALUATION
