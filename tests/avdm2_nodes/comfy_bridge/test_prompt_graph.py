"""What the running graph says of the node that is being run."""

import importlib
from types import SimpleNamespace

import pytest


@pytest.fixture
def running(comfyui, comfyui_dir, monkeypatch):
    """running(graph, node): that prompt is in core's own queue as the running one, and that node is being run."""
    monkeypatch.syspath_prepend(str(comfyui_dir))  # 0.8 has put comfy/, which has a `utils` too, before it
    server, execution = importlib.import_module("server"), importlib.import_module("execution")
    utils = importlib.import_module("comfy_execution.utils")
    entered = []

    def run(graph, node):
        queue = execution.PromptQueue(SimpleNamespace(queue_updated=lambda: None))
        queue.put((0, "prompt", graph, {}, []))
        queue.get()
        monkeypatch.setattr(server.PromptServer, "instance", SimpleNamespace(prompt_queue=queue), raising=False)
        entered.append(utils.CurrentNodeContext("prompt", node))
        entered[-1].__enter__()

    yield run
    for context in reversed(entered):
        context.__exit__(None, None, None)


@pytest.fixture
def room(comfyui):
    return comfyui.pack("comfy_bridge.prompt_graph")


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


LOADERS = {
    "one": node("CheckpointLoaderSimple", ckpt_name="one.safetensors"),
    "two": node("CheckpointLoaderSimple", ckpt_name="two.safetensors"),
    "small": node("AVDM2StackLoader", stack="tiny"),
    "lora": node("LoraLoader", lora_name="lcm_lora.safetensors", model=["one", 0], clip=["two", 1]),
}


def test_where_nothing_runs_nothing_is_known(room):
    assert room.upstream() == {} and room.model_loaders() == set() and room.step_loras() == []


def test_the_loader_of_the_model_is_found_behind_what_lies_between(room, running):
    graph = LOADERS | {
        "student": node("AVDM2StudentLoader", teacher=["lora", 0], student="x"),
        "vae": node("VAEDecode", vae=["two", 2]),
    }
    running(graph, "student")
    assert room.model_loaders() == {("CheckpointLoaderSimple", "one.safetensors")}, "the CLIP's loader is not the model's"
    assert room.upstream().keys() == {"student", "lora", "one", "two"} and room.step_loras() == ["lcm_lora.safetensors"]


def test_all_loaders_behind_a_merge_are_found(room, running):
    running(LOADERS | {"merge": node("ModelMergeSimple", model1=["one", 0], model2=["small", 0])}, "merge")
    assert room.model_loaders() == {("CheckpointLoaderSimple", "one.safetensors"), ("AVDM2StackLoader", "tiny")}


def test_a_model_s_file_is_found_by_the_graph_where_core_does_not_remember_it(comfyui, model_folders, running):
    models = comfyui.pack("comfy_bridge.models")
    model, _, _ = comfyui.run("AVDM2StackLoader", stack="tiny")
    model.cached_patcher_init = None
    checkpoint = model_folders / "checkpoints" / "one.safetensors"
    try:
        running(LOADERS | {"student": node("AVDM2StudentLoader", teacher=["lora", 0])}, "student")
        assert models.checkpoint_of(model) is None, "no such file"
        checkpoint.touch()
        assert models.checkpoint_of(model) == checkpoint
        running(LOADERS | {"student": node("AVDM2StudentLoader", teacher=["small", 0])}, "student")
        assert models.checkpoint_of(model) == model_folders / "diffusers" / "tiny"
        running(LOADERS | {"merge": node("ModelMergeSimple", model1=["one", 0], model2=["two", 0])}, "merge")
        assert models.checkpoint_of(model) is None, "either could be it"
    finally:
        checkpoint.unlink(missing_ok=True)


def test_of_a_step_lora_under_a_student_it_is_told(comfyui, running, student, loaded):
    sampling = comfyui.pack("comfy_bridge.sampling")
    sigmas = sampling.sigmas_of(student, (999, 800, 600, 300))
    hyper = {"hyper": node("LoraLoaderModelOnly", lora_name="Hyper-SD15-8steps-lora.safetensors", model=["one", 0])}
    running(LOADERS | hyper | {"sampler": node("KSampler", model=["hyper", 0], steps=4)}, "sampler")
    (sentence,) = sampling.warnings_of(student, sigmas, 8, 1.0)
    assert sampling.warnings_of(loaded.teacher, sigmas, 8, 1.0) == []
    assert sentence == (
        "Hyper-SD15-8steps-lora.safetensors also shortens sampling: on a student, which needs 4 steps as it is, it washes colours out; "
        "take it out."
    )


def test_what_lies_beside_or_in_a_circle_is_no_matter(room, running):
    running(LOADERS | {"loop": node("X", a=["loop", 0], b=[], c=["gone", 0])}, "loop")
    assert room.upstream().keys() == {"loop"} and room.step_loras() == []
