"""Core's own nodes around a student and a teacher, each against diffusers' networks with the same inputs."""

from dataclasses import replace

import pytest
import torch

from avdm2_nodes.diffusion.samplers import sample_teacher
from avdm2_nodes.diffusion.unets import guided, video_predictor
from avdm2_nodes.files.containers import write_tensors
from avdm2_nodes.files.hashes import weights_hash
from avdm2_nodes.files.stack import load_image_unet
from avdm2_nodes.files.student import read_student, write_student
from avdm2_nodes.files.student_unet import student_unet
from tests.avdm2_nodes.conftest import TIMESTEPS, WINDOW, as_latent
from tests.avdm2_nodes.native import CLIP, GUIDED, chain, difference, in_windows, random_weights, rms, with_residuals

SEED, TRAILING = 9, (999, 749, 499, 249)
OTHER = "a small red square standing still on a plain background"
HANDED_ON = {"sampler_name": "lcm", "scheduler": "simple", "steps": 4, "cfg": 1.0, "denoise": 1.0}


@pytest.fixture(scope="module")
def prompt(comfyui, loaded):
    return comfyui.prompt(loaded.clip)


@pytest.fixture(scope="module")
def other(comfyui, loaded):
    return comfyui.prompt(loaded.clip, OTHER)


@pytest.fixture(scope="module")
def text(prompt):
    return prompt[0][0]


@pytest.fixture
def sample(comfyui, student, prompt):
    """sample(...): the samples of AVDM2 Student Sampler, of the student of all weights unless told otherwise."""
    common = {"student": student, "positive": prompt, "seed": SEED, "steps": 0, "denoise": 1.0}

    def clip(frames=3, latent=None, **inputs):
        latent = comfyui.empty(frames) if latent is None else latent
        return comfyui.run("AVDM2StudentSampler", latent=latent, **common | inputs)[0]["samples"]

    return clip


@pytest.fixture
def predict(student_network):
    return video_predictor(student_network("all"))


def reference(predict, text, frames=3, seed=SEED, timesteps=TIMESTEPS, **options):
    return chain(predict, text, (frames, 4, 4, 8), seed, timesteps, **options)


@pytest.fixture(scope="module")
def trailing(comfyui, model_folders, students, loaded):
    """A student that was trained at the timesteps at which core's simple scheduler samples."""
    read, path = read_student(students["all"]), model_folders / "avdm2" / "trailing.safetensors"
    write_student(path, read.tensors, replace(read.info, timesteps=TRAILING))
    yield comfyui.run("AVDM2StudentLoader", student=path.name, teacher=loaded.teacher)[0]
    path.unlink()


# ---- samplers ----


@pytest.mark.parametrize("frames", [3, 7])
def test_every_sampler_makes_the_same_clip_of_a_student(comfyui, trailing, prompt, other, predict, text, frames):
    comfyui.extras("nodes_custom_sampler")
    latent = comfyui.empty(frames)
    ours = {"student": trailing, "positive": prompt, "latent": latent, "seed": SEED, "steps": 0, "denoise": 1.0}
    (one,) = comfyui.run("AVDM2StudentSampler", **ours)
    ksampler = {"model": trailing, "positive": prompt, "negative": other, "latent_image": latent, "seed": SEED}
    (two,) = comfyui.run("KSampler", **ksampler, **HANDED_ON)
    sigmas, sampler = comfyui.run("AVDM2Steps", student=trailing, steps=0, denoise=1.0)
    (noise,), (guider,) = (
        comfyui.run("RandomNoise", noise_seed=SEED),
        comfyui.run("BasicGuider", model=trailing, conditioning=prompt),
    )
    advanced = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
    three, denoised = comfyui.run("SamplerCustomAdvanced", **advanced)
    assert torch.equal(one["samples"], two["samples"]) and torch.equal(one["samples"], three["samples"])
    if frames <= WINDOW:
        assert difference(one["samples"], reference(predict, text, frames, timesteps=TRAILING)) < CLIP
    assert denoised["samples"].shape == one["samples"].shape


def test_guidance_of_a_student_is_core_s(comfyui, sample, predict, prompt, other, text):
    clip = sample(cfg=7.5, negative=other)
    assert difference(clip, reference(guided(predict, other[0][0], 7.5), text)) < GUIDED
    assert difference(clip, sample()) > 0.1


@pytest.mark.parametrize("steps, cfg", [(25, 3.0), (10, 7.5)])
def test_a_teacher_by_ksampler_and_euler_is_ddim(comfyui, loaded, node_stack, prompt, other, text, steps, cfg):
    inputs = {"positive": prompt, "negative": other, "latent_image": comfyui.empty(3), "seed": SEED, "denoise": 1.0}
    options = {"sampler_name": "euler", "scheduler": "simple", "steps": steps, "cfg": cfg}
    (latent,) = comfyui.run("KSampler", model=loaded.teacher, **inputs, **options)
    noise = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(SEED)).transpose(0, 1)[None]
    expected = as_latent(sample_teacher(video_predictor(node_stack.teacher), noise, text, other[0][0], steps, cfg))
    assert difference(latent["samples"], expected) < GUIDED
    (ours,) = comfyui.run(
        "AVDM2TeacherSampler", teacher=loaded.teacher, positive=prompt, negative=other, latent=comfyui.empty(3), seed=SEED,
        steps=steps, cfg=cfg, denoise=1.0,
    )  # fmt: skip
    assert difference(ours["samples"], latent["samples"]) < GUIDED


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "heun", "uni_pc", "euler_ancestral", "ddim", "dpmpp_sde"])
def test_core_s_other_samplers_run(comfyui, loaded, prompt, other, name):
    inputs = {"positive": prompt, "negative": other, "latent_image": comfyui.empty(2), "seed": SEED, "denoise": 1.0}
    options = {"sampler_name": name, "scheduler": "normal", "steps": 3, "cfg": 2.0}
    (latent,) = comfyui.run("KSampler", model=loaded.teacher, **inputs, **options)
    assert latent["samples"].isfinite().all() and rms(latent["samples"]) > 0.1


def test_three_prompts_in_one_batch(comfyui, loaded, node_stack, prompt, other, text):
    """Dual guidance, as core has it: middle against negative, positive against middle."""
    comfyui.extras("nodes_custom_sampler")
    empty = comfyui.prompt(loaded.clip, "")
    (guider,) = comfyui.run(
        "DualCFGGuider", model=loaded.teacher, cond1=prompt, cond2=other, negative=empty, cfg_conds=3.0, cfg_cond2_negative=1.5,
        style="regular",
    )  # fmt: skip
    (noise,), (sampler,) = comfyui.run("RandomNoise", noise_seed=SEED), comfyui.run("KSamplerSelect", sampler_name="euler")
    (sigmas,) = comfyui.run("BasicScheduler", model=loaded.teacher, scheduler="simple", steps=5, denoise=1.0)
    found, _ = comfyui.run(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=comfyui.empty(3)
    )
    unet = video_predictor(node_stack.teacher)

    def predict(x_t, t, words):
        one, two, none = (unet(x_t, t, cond[0][0]) for cond in (prompt, other, empty))
        return none + 1.5 * (two - none) + 3.0 * (one - two)

    first = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(SEED)).transpose(0, 1)[None]
    expected = as_latent(sample_teacher(predict, first, text, text, 5, 1.0))
    assert difference(found["samples"], expected) < GUIDED


# ---- windows ----

PYRAMID = [1.0, 2.0, 2.0, 1.0]
OURS = [[0, 1, 2, 3], [2, 3, 4, 5], [3, 4, 5, 6]]  # of 7 frames, without a node for windows


def core_windows(comfyui, model, **options):
    comfyui.extras("nodes_context_windows")
    values = {
        "context_length": WINDOW, "context_overlap": 2, "context_schedule": "standard_static", "context_stride": 1,
        "closed_loop": False, "fuse_method": "pyramid", "dim": 0, "freenoise": False,
    }  # fmt: skip
    node = comfyui.nodes.NODE_CLASS_MAPPINGS["ContextWindowsManual"]
    if "causal_window_fix" in {**node.INPUT_TYPES()["required"], **node.INPUT_TYPES().get("optional", {})}:
        values |= {"causal_window_fix": False}
    return comfyui.run("ContextWindowsManual", model=model, **values | options)[0]


def halved(i):
    """i's binary digits behind the point in reverse: 0, 1/2, 1/4, 3/4, ..."""
    return sum(((i >> k) & 1) / 2 ** (k + 1) for k in range(8))


def looped_windows(frames, length, overlap, closed):
    """Uniform windows that start elsewhere in each step and run over the end (animatediff-cli)."""

    def windows(step):
        pad = round(frames * halved(step))
        starts = range(int(halved(step)) + pad, frames + pad - (0 if closed else overlap), length - overlap)
        return [[(start + k) % frames for k in range(length)] for start in starts]

    return windows


def static_windows(frames, length, overlap):
    starts = range(0, frames - length, length - overlap)
    return lambda step: [[*range(start, start + length)] for start in (*starts, frames - length)]


@pytest.mark.parametrize(
    "schedule, closed, overlap, frames",
    [
        ("standard_static", False, 2, 8),
        ("standard_static", False, 1, 9),
        ("looped_uniform", False, 2, 8),
        ("looped_uniform", True, 1, 9),
    ],
)
@pytest.mark.parametrize("fuse", ["pyramid", "flat"])
def test_a_clip_in_core_s_windows(comfyui, sample, student, predict, text, schedule, closed, overlap, frames, fuse):
    model = core_windows(
        comfyui, student, context_schedule=schedule, context_overlap=overlap, closed_loop=closed, fuse_method=fuse
    )
    windows = (
        static_windows(frames, WINDOW, overlap)
        if schedule == "standard_static"
        else looped_windows(frames, WINDOW, overlap, closed)
    )
    weights = PYRAMID if fuse == "pyramid" else [1.0] * WINDOW
    windowed = in_windows(lambda x_t, t, y, window: predict(x_t, t, y), windows, lambda window: weights)
    assert difference(sample(frames, student=model), reference(windowed, text, frames)) < CLIP


@pytest.mark.parametrize("schedule", ["standard_uniform", "batched"])
@pytest.mark.parametrize("fuse", ["pyramid", "relative", "overlap-linear"])
def test_core_s_other_windows_run(comfyui, sample, student, schedule, fuse):
    frames = 8
    clip = sample(frames, student=core_windows(comfyui, student, context_schedule=schedule, fuse_method=fuse))
    assert clip.isfinite().all() and len(clip) == frames


def test_a_batched_window_of_the_rest_is_a_clip_of_its_own(comfyui, sample, student, predict, text):
    clip = sample(8, student=core_windows(comfyui, student, context_schedule="batched", fuse_method="flat"))
    windowed = in_windows(
        lambda x_t, t, y, window: predict(x_t, t, y), lambda step: [[0, 1, 2, 3], [4, 5, 6, 7]], lambda window: [1.0] * 4
    )
    assert difference(clip, reference(windowed, text, 8)) < CLIP


def test_relative_weights_are_a_mean_of_the_windows(comfyui, sample, student, predict, text):
    """Each window weighs by a frame's distance from its middle."""
    clip = sample(8, student=core_windows(comfyui, student, fuse_method="relative"))

    def weights(window):
        first, last = window[0], window[-1]
        return [max(1e-2, 1 - abs(i - (first + last) / 2) / ((last - first + 1e-2) / 2)) for i in window]

    windowed = in_windows(lambda x_t, t, y, window: predict(x_t, t, y), static_windows(8, WINDOW, 2), weights)
    assert difference(clip, reference(windowed, text, 8)) < CLIP


def test_a_closed_loop_joins_its_ends(comfyui, sample, student, evaluations):
    sample(9, student=core_windows(comfyui, student, context_schedule="looped_uniform", closed_loop=True, context_overlap=1))
    assert len(evaluations) == 4 * 3, "three windows a step, one of them over the end"


# ---- ControlNets ----


class Control:
    """A small random ControlNet of the tiny stack's shape, as core has one."""

    def __init__(self, seed=4):
        import comfy.cldm.cldm
        import comfy.controlnet
        import comfy.ops

        self.network = comfy.cldm.cldm.ControlNet(
            image_size=32, in_channels=4, model_channels=32, hint_channels=3, num_res_blocks=[1, 1, 1], channel_mult=(1, 1, 2),
            num_heads=2, use_spatial_transformer=True, transformer_depth=[1, 1, 0], transformer_depth_middle=1, context_dim=32,
            legacy=False, operations=comfy.ops.disable_weight_init,
        )  # fmt: skip
        random_weights(self.network, seed)
        for module in self.network.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.num_groups = 8
        self.network.eval().requires_grad_(False)
        self.model = comfy.controlnet.ControlNet(self.network, load_device=torch.device("cpu"))

    def residuals(self, hints, strength=1.0):
        """`with_residuals`'s, of these hints (1 or F, 3, H, W)."""

        def of(x, t, text):
            hint = hints if len(hints) == len(x) else hints.expand(len(x), -1, -1, -1)
            words = text if len(text) == len(x) else text.expand(len(x), -1, -1)
            found = self.network(x=x, hint=hint, timesteps=torch.full((len(x),), float(t)), context=words)
            return [strength * r for r in found["output"]], strength * found["middle"][0]

        return of


@pytest.fixture(scope="module")
def control(comfyui):
    return Control()


def hints(frames):
    return torch.rand(frames, 32, 64, 3, generator=torch.Generator().manual_seed(frames))


@pytest.fixture
def controlled(comfyui, control, prompt, other):
    """controlled(hints, ...): positive and negative with the ControlNet."""

    def apply(image, positive=prompt, negative=other, strength=0.7, network=control, start=0.0, end=1.0):
        return comfyui.run(
            "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=network.model, image=image, strength=strength,
            start_percent=start, end_percent=end,
        )  # fmt: skip

    return apply


@pytest.mark.parametrize("frames", [1, 3])
def test_a_controlnet_with_one_hint_and_one_a_frame(sample, controlled, control, student_network, text, frames):
    positive, _ = controlled(hints(frames))
    expected = with_residuals(student_network("all"), control.residuals(hints(frames).movedim(-1, 1), 0.7))
    clip = sample(3, positive=positive)
    assert difference(clip, reference(expected, text)) < CLIP
    assert difference(clip, sample(3)) > 0.01


def test_a_controlnet_with_guidance(sample, controlled, control, student_network, text, other):
    positive, negative = controlled(hints(3))
    expected = with_residuals(student_network("all"), control.residuals(hints(3).movedim(-1, 1), 0.7))

    def predict(x_t, t, words):
        one, none = expected(x_t, t, words), expected(x_t, t, other[0][0])
        return none + 2.0 * (one - none)

    assert difference(sample(3, positive=positive, negative=negative, cfg=2.0), reference(predict, text)) < GUIDED


def test_one_hint_alone_moves_its_frame_alone_in_the_first_residuals(control):
    one, two = hints(3).movedim(-1, 1), hints(3).movedim(-1, 1).clone()
    two[1] = 1 - two[1]
    x, words = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(1)), torch.randn(1, 32, 32)
    a, b = (control.residuals(hint)(x, 500, words) for hint in (one, two))
    for before, after in zip([*a[0], a[1]], [*b[0], b[1]], strict=True):
        moved = (before - after).abs().amax((1, 2, 3)) > 1e-6
        assert moved.tolist() == [False, True, False]


@pytest.mark.parametrize("count", [1, 7, 3])
def test_in_windows_each_gets_the_hints_of_its_frames(sample, controlled, control, student_network, text, count):
    """Fewer hints than frames repeat, as without windows."""
    positive, _ = controlled(hints(count))
    image = hints(count).movedim(-1, 1)

    def predict(x_t, t, words, window):
        of_window = image[[i % count for i in window]]
        return with_residuals(student_network("all"), control.residuals(of_window, 0.7))(x_t, t, words)

    expected = in_windows(predict, lambda step: OURS, lambda window: PYRAMID)
    clip = sample(7, positive=positive)
    assert difference(clip, reference(expected, text, 7)) < CLIP
    if count == 7:
        wrong, _ = controlled(hints(count)[[0, 1, 2, 3, 2, 3, 3]])
        assert difference(clip, sample(7, positive=wrong)) > 0.001, "the last window's hints are not the first's"


def test_two_controlnets_in_windows(sample, controlled, control, student_network, text, other):
    second = Control(seed=8)
    positive, _ = controlled(hints(7))
    positive, _ = controlled(hints(1), positive=positive, negative=other, strength=0.4, network=second)
    one, two = hints(7).movedim(-1, 1), hints(1).movedim(-1, 1)

    def predict(x_t, t, words, window):
        def both(x, t, y):
            (down, middle), (more, added) = control.residuals(one[window], 0.7)(x, t, y), second.residuals(two, 0.4)(x, t, y)
            return [a + b for a, b in zip(down, more, strict=True)], middle + added

        return with_residuals(student_network("all"), both)(x_t, t, words)

    expected = in_windows(predict, lambda step: OURS, lambda window: PYRAMID)
    assert difference(sample(7, positive=positive), reference(expected, text, 7)) < CLIP


def test_in_core_s_windows_too_with_the_frame_in_front_that_core_may_add(
    comfyui, sample, student, controlled, control, student_network, text, evaluations
):
    """0.33 evaluates a window with the frame before it, unless told not to."""
    positive, _ = controlled(hints(6))
    image = hints(6).movedim(-1, 1)
    model = core_windows(comfyui, student, context_length=3, context_overlap=1, fuse_method="flat")
    node = comfyui.nodes.NODE_CLASS_MAPPINGS["ContextWindowsManual"]
    fixes = "causal_window_fix" in {**node.INPUT_TYPES()["required"], **node.INPUT_TYPES().get("optional", {})}
    if fixes:
        model = core_windows(comfyui, student, context_length=3, context_overlap=1, fuse_method="flat", causal_window_fix=True)

    def predict(x_t, t, words, window):
        network = student_network("all")
        return with_residuals(network, control.residuals(image[window], 0.7))(x_t, t, words)

    def windows(step):
        return [[0, 1, 2], [2, 3, 4], [3, 4, 5]]

    if not fixes:
        expected = in_windows(predict, windows, lambda window: [1.0] * 3)
    else:

        def anchored(x_t, t, words):
            total, share = torch.zeros_like(x_t), torch.zeros(x_t.shape[2])
            for window in windows(0):
                front = [window[0] - 1] if window[0] else []
                found = predict(x_t[:, :, front + window], t, words, front + window)[:, :, len(front) :]
                total[:, :, window] += found
                share[window] += 1
            return total / share[:, None, None]

        expected = anchored
    assert difference(sample(6, student=model, positive=positive), reference(expected, text, 6)) < CLIP


# ---- prompts, areas, masks ----

LINES = f"0: {OTHER}\n2: a large blue circle moving left fast on a checked background\n6: a small green triangle"


def test_each_frame_has_its_prompt(comfyui, loaded, sample, predict, text, node_stack):
    (cond,) = comfyui.run("AVDM2PromptTravel", clip=loaded.clip, prompts=LINES, frames=4)
    first, second, third = (node_stack.encode_text([line.split(": ")[1]]) for line in LINES.splitlines())
    words = torch.cat([first, (first + second) / 2, second, second + 0.25 * (third - second)])
    assert difference(cond[0][0], words) < CLIP
    assert difference(sample(4, positive=cond), reference(predict, words, 4)) < CLIP
    assert difference(sample(4, positive=cond), sample(4)) > 0.01


def test_each_frame_has_its_prompt_in_windows_and_with_guidance(comfyui, loaded, sample, predict, other):
    (cond,) = comfyui.run("AVDM2PromptTravel", clip=loaded.clip, prompts=LINES, frames=7)
    words = cond[0][0]

    def one(x_t, t, y, window):
        return predict(x_t, t, y[window] if len(y) > 1 else y)

    def windowed():
        return in_windows(one, lambda step: OURS, lambda window: PYRAMID)

    assert difference(sample(7, positive=cond), reference(windowed(), words, 7)) < CLIP
    positive, negative = windowed(), windowed()

    def predicted(x_t, t, y):
        none = negative(x_t, t, other[0][0])
        return none + 2.0 * (positive(x_t, t, y) - none)

    assert difference(sample(7, positive=cond, negative=other, cfg=2.0), reference(predicted, words, 7)) < GUIDED


def test_a_prompt_for_some_of_the_timesteps(comfyui, sample, predict, prompt, other, text):
    (early,) = comfyui.run("ConditioningSetTimestepRange", conditioning=prompt, start=0.0, end=0.5)
    (late,) = comfyui.run("ConditioningSetTimestepRange", conditioning=other, start=0.5, end=1.0)
    (both,) = comfyui.run("ConditioningCombine", conditioning_1=early, conditioning_2=late)
    expected = reference(lambda x_t, t, y: predict(x_t, t, y if t >= 500 else other[0][0]), text)
    assert difference(sample(3, positive=both), expected) < CLIP
    assert difference(expected, reference(predict, text)) > 10 * CLIP


def test_prompts_under_masks(comfyui, sample, predict, prompt, other, text):
    mask = torch.zeros(1, 4, 8)
    mask[:, :, :3] = 1
    mask[:, 0] = 0.25
    masked = []
    for cond, where in ((prompt, mask), (other, 1 - mask)):
        options = {"conditioning": cond, "mask": where, "strength": 1.0, "set_cond_area": "default"}
        masked += comfyui.run("ConditioningSetMask", **options)
    (both,) = comfyui.run("ConditioningCombine", conditioning_1=masked[0], conditioning_2=masked[1])

    def predicted(x_t, t, y):
        return mask * predict(x_t, t, y) + (1 - mask) * predict(x_t, t, other[0][0])

    assert difference(sample(3, positive=both), reference(predicted, text)) < CLIP


def test_prompts_in_areas(comfyui, sample, predict, prompt, other, text):
    """Each half is a clip of its own, as core has it."""
    halves = []
    for cond, x in ((prompt, 0), (other, 32)):
        options = {"conditioning": cond, "width": 32, "height": 32, "x": x, "y": 0, "strength": 1.0}
        halves += comfyui.run("ConditioningSetArea", **options)
    (both,) = comfyui.run("ConditioningCombine", conditioning_1=halves[0], conditioning_2=halves[1])

    def predicted(x_t, t, y):
        left, right = (half.contiguous() for half in x_t.chunk(2, -1))
        return torch.cat([predict(left, t, y), predict(right, t, other[0][0])], -1)

    assert difference(sample(3, positive=both), reference(predicted, text)) < CLIP


@pytest.mark.parametrize("frames", [3, 7])
def test_outside_a_noise_mask_the_latent_is_untouched(comfyui, sample, frames):
    """One mask, and one a frame."""
    samples = torch.randn(frames, 4, 4, 8, generator=torch.Generator().manual_seed(2))
    for count in (1, frames):
        mask = (torch.rand(count, 32, 64, generator=torch.Generator().manual_seed(count)) > 0.5).float()
        mask = torch.nn.functional.interpolate(mask[:, None, ::8, ::8], scale_factor=8)[:, 0]
        (latent,) = comfyui.run("SetLatentNoiseMask", samples={"samples": samples}, mask=mask)
        clip = sample(latent=latent)
        inside = mask[:, None, ::8, ::8].expand(frames, 4, -1, -1) > 0.5
        assert torch.equal(clip[~inside], samples[~inside])
        assert (clip - samples)[inside].abs().min() > 0


# ---- LoRAs ----

LAYERS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": ((32,), (32,)),
    "lora_unet_up_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k": ((32,), (32,)),
    "lora_unet_mid_block_resnets_0_conv1": ((64, 1, 1), (64, 3, 3)),
}


@pytest.fixture(scope="module")
def lora(model_folders):
    """A LoRA of kohya's names in models/loras, and what it adds to each weight of diffusers' names at strength 1."""
    generator, tensors, change = torch.Generator().manual_seed(2), {}, {}
    for name, ((out, *one), into) in LAYERS.items():
        up, down = torch.randn(out, 2, *one, generator=generator), 0.2 * torch.randn(2, *into, generator=generator)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(1.0)}
        key = name.removeprefix("lora_unet_").replace("_", ".")
        for whole in ("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k"):
            key = key.replace(whole.replace("_", "."), whole)
        change[f"{key}.weight"] = 0.5 * (up.flatten(1) @ down.flatten(1)).view(out, *into)
    path = model_folders / "loras" / "a style.safetensors"
    write_tensors(path, tensors, {})
    yield path.name, change
    path.unlink()


def with_lora(comfyui, model, lora, strength=0.8):
    return comfyui.run("LoraLoaderModelOnly", model=model, lora_name=lora[0], strength_model=strength)[0]


@pytest.mark.parametrize("holds", ["all", "motion", "motion+lora"])
def test_a_lora_before_and_after_a_student_is_the_same_and_is_merged_in_diffusers(
    comfyui, loaded, sample, load_student, students, node_stack, model_folders, lora, holds, text
):
    """Also under a student of whole weights, which would else write over it."""
    image = comfyui.pack("comfy_bridge.facts").facts_of(loaded.teacher).image_model
    (before,) = comfyui.run("AVDM2StudentLoader", student=f"{holds}.safetensors", teacher=with_lora(comfyui, image, lora))
    student = load_student(holds)
    one, two = sample(student=before), sample(student=with_lora(comfyui, student, lora))
    assert torch.equal(one, two) or (holds == "motion+lora" and difference(one, two) < CLIP)  # two LoRAs, added in either order
    unet = student_unet(read_student(students[holds]), node_stack.image_unet)
    with torch.no_grad():
        for name, change in lora[1].items():
            unet.get_parameter(name).add_(0.8 * change)
    expected = reference(video_predictor(unet), text)
    assert difference(two, expected) < CLIP
    assert difference(expected, sample(student=student)) > 0.01


def test_a_lora_by_hooks_is_one_by_the_loader(comfyui, sample, student, prompt, other, lora):
    comfyui.extras("nodes_hooks")
    (hooks,) = comfyui.run("CreateHookLora", lora_name=lora[0], strength_model=0.8, strength_clip=0.0)
    (hooked,) = comfyui.run("ConditioningSetProperties", cond_NEW=prompt, strength=1.0, set_cond_area="default", hooks=hooks)
    expected = sample(student=with_lora(comfyui, student, lora))
    assert difference(sample(positive=hooked), expected) < CLIP
    assert difference(expected, sample()) > 0.01


@pytest.mark.parametrize("holds", ["all", "motion"])
def test_a_lora_by_hooks_does_not_change_what_a_style_pulls_against(comfyui, sample, load_student, prompt, lora, holds):
    comfyui.extras("nodes_hooks")
    (hooks,) = comfyui.run("CreateHookLora", lora_name=lora[0], strength_model=0.8, strength_clip=0.0)
    (hooked,) = comfyui.run("ConditioningSetProperties", cond_NEW=prompt, strength=1.0, set_cond_area="default", hooks=hooks)
    (guided,) = comfyui.run("AVDM2StyleTransfer", student=load_student(holds), style="other of tiny", strength=2.0)
    assert difference(sample(student=guided, positive=hooked), sample(student=with_lora(comfyui, guided, lora))) < GUIDED


# ---- patches ----


def patched(comfyui, name, model):
    files = {"FreeU": "freelunch", "FreeU_V2": "freelunch", "TomePatchModel": "tomesd", "HyperTile": "hypertile"}
    comfyui.extras(f"nodes_{files.get(name, 'pag')}")
    options = {
        "FreeU": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
        "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
        "PerturbedAttentionGuidance": {"scale": 3.0},
        "TomePatchModel": {"ratio": 0.5},
        "HyperTile": {"tile_size": 32, "swap_size": 1, "max_depth": 1, "scale_depth": False},
    }
    return comfyui.run(name, model=model, **options[name])[0]


@pytest.mark.parametrize("name", ["FreeU", "FreeU_V2", "PerturbedAttentionGuidance", "TomePatchModel", "HyperTile"])
@pytest.mark.parametrize("frames", [3, 7])
def test_core_s_patches_run_and_act(comfyui, loaded, sample, student, name, frames):
    """Before the student and after it."""
    latent = comfyui.empty(frames, 64, 64)
    plain = sample(latent=latent)
    after = sample(latent=latent, student=patched(comfyui, name, student))
    assert rms(after - plain) > 0.001 and after.isfinite().all()
    image = comfyui.pack("comfy_bridge.facts").facts_of(loaded.teacher).image_model
    inputs = {"student": "all.safetensors", "teacher": patched(comfyui, name, image)}
    before = sample(latent=latent, student=comfyui.run("AVDM2StudentLoader", **inputs)[0])
    assert rms(before - plain) > 0.001
    if name in ("FreeU", "FreeU_V2", "PerturbedAttentionGuidance"):  # the others draw at random
        assert difference(before, after) < CLIP
    assert torch.equal(sample(latent=latent), plain)


def test_a_merge_of_two_bases_is_merged_in_diffusers(comfyui, loaded, node_stack, node_stack_folder, sample, students, text):
    comfyui.extras("nodes_model_merging")
    native, other = comfyui.pack("comfy_bridge.native"), load_image_unet(node_stack_folder / "styles" / "other")
    image = comfyui.pack("comfy_bridge.facts").facts_of(loaded.teacher).image_model
    (merged,) = comfyui.run(
        "ModelMergeSimple", model1=image, model2=native.image_model(other, image.model.latent_format), ratio=0.6
    )
    (student,) = comfyui.run("AVDM2StudentLoader", student="motion.safetensors", teacher=merged)
    between = load_image_unet(node_stack_folder)
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, weight in between.named_parameters():
            weight.copy_(0.6 * weight + 0.4 * theirs[name])
    read = read_student(students["motion"])
    unet = student_unet(replace(read, info=replace(read.info, base_hash=weights_hash(between))), between)
    predict = video_predictor(unet)
    assert difference(sample(student=student), reference(predict, text)) < CLIP


# ---- what does not fit is told ----


def test_another_noise_schedule_after_the_motion_is_told(comfyui, sample, student, loaded, caplog):
    comfyui.extras("nodes_model_advanced")
    (model,) = comfyui.run("ModelSamplingDiscrete", model=student, sampling="eps", zsnr=False)
    sample(student=model)
    assert [m for m in caplog.messages if "changed the noise schedule (ModelSamplingDiscrete?)" in m]
    caplog.clear()
    sample()
    assert not [m for m in caplog.messages if "AVDM2" in m]


@pytest.mark.slow
def test_a_compiled_student_and_the_image_model_after_it(comfyui, loaded, sample, student, prompt):
    """As TorchCompileModel does it, without the minutes of a C++ compiler; the network that is shared goes on without motion."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    image_model = comfyui.pack("comfy_bridge.facts").facts_of(student).image_model
    still = {
        "model": image_model, "positive": prompt, "negative": prompt, "latent_image": comfyui.empty(1), "seed": SEED, "cfg": 1.0,
        "denoise": 1.0, "sampler_name": "euler", "scheduler": "simple", "steps": 1,
    }  # fmt: skip
    before = comfyui.run("KSampler", **still)[0]["samples"]
    compiled = student.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    assert difference(sample(student=compiled), sample()) < CLIP
    assert torch.equal(comfyui.run("KSampler", **still)[0]["samples"], before)


def test_on_a_cpu_every_attention_is_torch_s_own(sample):
    """Core's sub-quadratic one, its choice there, multiplies and takes the softmax by itself."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function._overloadpacket._qualified_op_name)
            return function(*args, **(kwargs or {}))

    with Seen():
        sample()
    assert any("scaled_dot_product" in name for name in names)
    assert not {"aten::baddbmm", "aten::_softmax"} & names
