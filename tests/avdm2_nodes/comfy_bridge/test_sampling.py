"""The steps of a student in core's terms, and what a person is told of what does not fit."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from avdm2_nodes.files.student import read_student, write_student
from tests.avdm2_nodes.conftest import TIMESTEPS

ABAR = DDPMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.double()
TRAILING = (999, 749, 499, 249)


@pytest.fixture(scope="module")
def room(comfyui):
    return comfyui.pack("comfy_bridge.sampling")


@pytest.fixture(scope="module")
def make_student(comfyui, model_folders, students, loaded):
    """make_student(timesteps=..., chain=...): a student of motion modules with other facts."""
    made = []

    def make(**changes):
        read = read_student(students["motion"])
        made.append(model_folders / "avdm2" / f"made {len(made)}.safetensors")
        write_student(made[-1], read.tensors, replace(read.info, **changes))
        return comfyui.run("AVDM2StudentLoader", student=made[-1].name, teacher=loaded.teacher)[0]

    yield make
    for path in made:
        path.unlink()


@pytest.fixture(scope="module")
def trailing(make_student):
    return make_student(timesteps=TRAILING)


def sigmas(timesteps):
    return [math.sqrt((1 - ABAR[t]) / ABAR[t]) for t in timesteps]


# ---- the schedule and the steps ----


def test_the_schedule_is_animatediffs(loaded, student, comfyui):
    for model in (loaded.teacher, student, student.clone()):
        found = model.get_model_object("model_sampling").sigmas
        torch.testing.assert_close(found.double(), torch.tensor(sigmas(range(1000)), dtype=torch.float64), rtol=2e-5, atol=1e-6)
    image = comfyui.pack("comfy_bridge.facts").facts_of(student).image_model
    assert image.get_model_object("model_sampling").sigmas[-1] != found[-1], "images keep their own"


@pytest.mark.parametrize(
    "steps, denoise, kept",
    [
        (0, 1.0, TIMESTEPS),
        (4, 1.0, TIMESTEPS),
        (2, 1.0, (999, 499)),
        (0, 0.6, (600, 300)),
        (5, 0.6, (599, 399, 199)),
        (1, 1.0, (999,)),
    ],
)
def test_avdm2_steps_are_the_students(comfyui, student, steps, denoise, kept):
    found, sampler = comfyui.run("AVDM2Steps", student=student, steps=steps, denoise=denoise)
    assert found.dtype == torch.float32 and found[-1] == 0
    assert found.tolist()[:-1] == pytest.approx(sigmas(kept), rel=2e-5)
    assert callable(sampler.sample)


def test_avdm2_steps_refuses_what_leaves_none_and_what_is_no_student(comfyui, student, loaded):
    with pytest.raises(ValueError, match=r"Expected denoise of at least 0\.30 with the steps 999, 800, 600, 300, found 0\.20"):
        comfyui.run("AVDM2Steps", student=student, steps=0, denoise=0.2)
    with pytest.raises(ValueError, match=r"Expected a student, found a MODEL without one; put AVDM2 Student Loader before"):
        comfyui.run("AVDM2Steps", student=loaded.teacher, steps=0, denoise=1.0)


def test_core_s_simple_scheduler_samples_a_student_of_trailing_steps_where_it_was_trained(
    comfyui, trailing, evaluations, loaded
):
    prompt = comfyui.prompt(loaded.clip)
    inputs = {"positive": prompt, "negative": prompt, "latent_image": comfyui.empty(2), "seed": 1, "cfg": 1.0, "steps": 4}
    for scheduler, expected in (("simple", [999, 749, 499, 249]), ("sgm_uniform", [999, 749, 499, 250])):
        evaluations.clear()
        comfyui.run("KSampler", model=trailing, sampler_name="lcm", scheduler=scheduler, denoise=1.0, **inputs)
        assert [t for _, t in evaluations] == expected


def test_the_noise_of_later_steps_goes_on_where_the_first_ended(comfyui, trailing, loaded, evaluations):
    """Core's own would begin anew with the seed, and draw it on the device."""
    prompt, shape = comfyui.prompt(loaded.clip), (2, 4, 4, 8)
    inputs = {"positive": prompt, "negative": prompt, "latent_image": comfyui.empty(2), "seed": 1, "cfg": 1.0, "denoise": 1.0}
    (latent,) = comfyui.run("KSampler", model=trailing, sampler_name="lcm", scheduler="simple", steps=2, **inputs)
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(*shape, generator=generator) for _ in range(2))
    torch.testing.assert_close(evaluations[0][0], first, rtol=0, atol=1e-5)
    assert evaluations[0][1] == 999
    x_t = evaluations[1][0].double()
    x0 = (x_t - (1 - ABAR[499]).sqrt() * second.double()) / ABAR[499].sqrt()
    evaluations.clear()
    (one,) = comfyui.run("KSampler", model=trailing, sampler_name="lcm", scheduler="simple", steps=1, **inputs)
    torch.testing.assert_close(2 * one["samples"].double(), x0, rtol=0, atol=1e-4)
    assert latent["samples"].shape == shape


def test_a_sampler_that_a_person_has_set_otherwise_is_left_alone(room, trailing, student, loaded, make_student):
    import comfy.samplers

    lcm, euler = (comfy.samplers.sampler_object(name) for name in ("lcm", "euler"))
    assert room.with_own_noise(trailing, lcm).sampler_function is room.sample_chain
    assert room.with_own_noise(trailing, euler) is euler
    assert room.with_own_noise(loaded.teacher, lcm) is lcm
    assert room.with_own_noise(make_student(chain="euler"), lcm) is lcm
    other = comfy.samplers.ksampler("lcm", {"noise_sampler": object()})
    assert room.with_own_noise(student, other) is other


def test_inpainting_options_of_a_sampler_are_kept(room, student):
    import comfy.samplers

    lcm = comfy.samplers.ksampler("lcm", {}, {"random": True})
    assert room.with_own_noise(student, lcm).inpaint_options == {"random": True}


# ---- what a person is told ----


def told(room, model, timesteps, frames=8, cfg=1.0):
    return room.warnings_of(model, room.sigmas_of(model, timesteps), frames, cfg)


@pytest.mark.parametrize(
    "timesteps", [TRAILING, (999, 749, 499, 250), (499, 249), (999, 499), (999,), (999, 666, 332), (749, 499, 249)]
)
def test_of_steps_that_fit_nothing_is_told(room, trailing, timesteps):
    assert told(room, trailing, timesteps) == []


@pytest.mark.parametrize("timesteps", [(999, 900, 700, 100), (960, 700, 400, 0), (999, 740, 480, 220)])
def test_of_steps_that_do_not_fit_it_is_told_which_do(room, trailing, timesteps):
    found = ", ".join(map(str, timesteps))
    (sentence,) = told(room, trailing, timesteps)
    assert sentence == (
        f"The student was trained at the timesteps 999, 749, 499, 249, this scheduler samples at {found}; take the scheduler simple with "
        "4 steps, or AVDM2 Steps."
    )


def test_of_a_teacher_steps_and_guidance_are_free(room, loaded):
    assert told(room, loaded.teacher, (981, 500, 3), cfg=12.0) == []


def test_of_much_guidance_on_a_student_it_is_told(room, trailing):
    assert told(room, trailing, TRAILING, cfg=3.0) == []
    (sentence,) = told(room, trailing, TRAILING, cfg=7.5)
    assert sentence.startswith("The student has its guidance in it: cfg 7.5 burns colours; 1 is what it was trained for")


def test_of_one_frame_it_is_told_to_student_and_teacher(room, trailing, loaded):
    for model in (trailing, loaded.teacher):
        (sentence,) = told(room, model, TRAILING, frames=1)
        assert sentence == "One frame only: for a clip set batch_size of the latent to the number of frames."


def test_it_is_told_in_the_log_when_core_s_sampler_runs(comfyui, trailing, loaded, caplog):
    prompt = comfyui.prompt(loaded.clip)
    inputs = {"positive": prompt, "negative": prompt, "latent_image": comfyui.empty(2), "seed": 1, "denoise": 1.0}
    comfyui.run("KSampler", model=trailing, sampler_name="lcm", scheduler="karras", steps=4, cfg=7.0, **inputs)
    (message,) = (m for m in caplog.messages if m.startswith("AVDM2: "))
    assert "this scheduler samples at" in message and "cfg 7 burns colours" in message
