"""One network on the device for a teacher and all its students; patches that come and go; memory that is given back."""

import gc
import weakref

import pytest
import torch
from torch import nn

from avdm2_nodes.diffusion.precision import sampling_dtype

OPTIONS = {"seed": 11, "steps": 4, "denoise": 1.0}


@pytest.fixture
def management(comfyui):
    import comfy.model_management

    return comfy.model_management


@pytest.fixture
def sample(comfyui, loaded):
    """sample(student or None for the teacher): its clip."""
    inputs = {"positive": comfyui.prompt(loaded.clip), "latent": comfyui.empty(), **OPTIONS}

    def clip(student=None):
        if student is None:
            return comfyui.run("AVDM2TeacherSampler", teacher=loaded.teacher, cfg=2.0, **inputs)[0]["samples"]
        return comfyui.run("AVDM2StudentSampler", student=student, **inputs)[0]["samples"]

    return clip


def weights(teacher):
    network = teacher.patcher.model.diffusion_model
    return {name: tensor.clone() for name, tensor in [*network.named_parameters(), *network.named_buffers()]}


def teachers_own(node_stack):
    unet, dtype = node_stack.teacher, sampling_dtype(torch.device("cpu"))
    return {name: tensor.to(dtype) for name, tensor in [*unet.named_parameters(), *unet.named_buffers()]}


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def test_teacher_and_students_take_turns_on_one_network(sample, load_student, loaded):
    students = [load_student(holds) for holds in ("all", "motion", "motion+lora")]
    networks = {id(s.patcher.model) for s in [*students, loaded.teacher]}
    assert len(networks) == 1, "they share their memory"
    first = [sample(student) for student in (None, *students)]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    for i in (1, 0, 2, 3, 1, 0):
        assert torch.equal(sample((None, *students)[i]), first[i]), "a patch of another's is left"


def test_after_unloading_the_weights_are_the_teachers_again(sample, load_student, loaded, management, node_stack):
    for holds in ("motion+lora", "all"):
        student = load_student(holds)
        clip = sample(student)
        assert not same(weights(loaded.teacher), teachers_own(node_stack))
        management.unload_all_models()
        assert same(weights(loaded.teacher), teachers_own(node_stack))
        assert not management.current_loaded_models
        assert torch.equal(sample(student), clip)


def test_a_student_that_goes_away_leaves_the_teacher_whole(comfyui, sample, loaded):
    clip = sample()
    (student,) = comfyui.run("AVDM2StudentLoader", student="all.safetensors", teacher=loaded.teacher)
    sample(student)
    weak = weakref.ref(student.patcher)
    del student
    gc.collect()
    assert weak() is None
    assert torch.equal(sample(), clip)


def test_after_an_interrupt_the_weights_are_the_teachers_again(sample, load_student, loaded, management, node_stack):
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        sample(load_student("motion+lora"))
    management.unload_all_models()
    assert same(weights(loaded.teacher), teachers_own(node_stack))


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
        networks = [
            p.model for p in (teacher.patcher, clip.patcher, vae.patcher, *(styled.guides[0].patcher, styled.guides[0].source))
        ]
        kept = [*networks, teacher.patcher, student.patcher, next(iter(student.file.tensors.values())), teacher.empty_text]
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
    gc.collect()
    gc.disable()
    try:
        weak = weakref.ref(sample(student))
        gone = weak() is None
        patcher = weakref.ref(student.patcher)
        del student
        assert gone and patcher() is None
    finally:
        gc.enable()


def test_what_a_network_leaves_is_given_back_when_garbage_is_collected(comfyui, monkeypatch):
    """As ComfyUI does after it has unloaded models; and once, not with every collection."""
    memory, given_back = comfyui.pack("comfy_bridge.memory"), []
    monkeypatch.setattr(memory, "_malloc_trim", given_back.append)
    holder = memory.Holder(nn.Linear(2, 2))
    gc.collect()
    given_back.clear()  # of tests before this one
    gc.collect()
    assert not given_back
    del holder
    gc.collect(1)
    assert not given_back
    gc.collect()
    gc.collect()
    assert given_back == [0]


@pytest.fixture
def in_float32(loaded, management):
    """The shared network's weights in float32, so that a test does not see the order of roundings."""
    management.unload_all_models()
    holder = loaded.teacher.patcher.model
    dtype = holder.get_dtype()
    nn.Module.to(holder.diffusion_model, torch.float32)
    yield
    management.unload_all_models()
    nn.Module.to(holder.diffusion_model, dtype)  # and are again what they were, for float32 rounds nothing


@pytest.mark.parametrize("holds", ["all", "motion", "motion+lora"])
def test_partly_loaded_is_the_same_network(load_student, loaded, management, in_float32, holds):
    """As on a GPU with too little room: some layers stay where they are and are patched and cast when they are used."""
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(6)
    x, text = torch.randn(1, 4, 3, 4, 8, generator=generator), torch.randn(3, 32, 32, generator=generator)
    network = loaded.teacher.patcher.model.diffusion_model

    def evaluate(patcher):
        assert patcher.model.diffusion_model is network
        with torch.inference_mode():
            return network(x, torch.tensor(700), text, return_dict=False)[0]

    alone = evaluate(loaded.teacher.patcher)
    patcher = load_student(holds).patcher
    management.load_models_gpu([patcher])
    whole = evaluate(patcher)
    assert (whole - alone).abs().max() > 0.1 * whole.std()
    management.unload_all_models()
    size = patcher.model_size()
    for share in (0.0, 0.3, 0.6):
        patcher.partially_load(cpu, extra_memory=share * size + 1)
        assert patcher.model.model_lowvram and patcher.lowvram_patch_counter() > 0
        assert patcher.loaded_size() <= share * size + 1
        torch.testing.assert_close(evaluate(patcher), whole, rtol=0, atol=1e-5 * float(whole.std()))
        patcher.detach()
        assert torch.equal(evaluate(loaded.teacher.patcher), alone), "nothing of the student is left"


def test_layers_are_comfyuis_own(loaded, student):
    """All that has weights can stay where it is in a partial load."""
    for patcher in (loaded.teacher.patcher, loaded.clip.patcher):
        for name, module in patcher.model.named_modules():
            if list(module.parameters(recurse=False)):
                assert hasattr(module, "comfy_cast_weights"), name
