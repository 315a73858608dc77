"""The graph that a server runs, seen from the node that is being run: here one that the test puts into the server's queue."""

from types import SimpleNamespace

import pytest

GRAPH = {
    "base": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "lcm-dreamshaper.safetensors"}},
    "style": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["base", 0], "lora_name": "ink style.safetensors"}},
    "steps": {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["style", 0], "lora_name": "Hyper-SD15-8steps-lora.safetensors"},
    },
    "student": {"class_type": "AVDM2StudentLoader", "inputs": {"student": "mine.safetensors", "teacher": ["steps", 0]}},
    "sampler": {"class_type": "KSampler", "inputs": {"model": ["student", 0], "steps": 4}},
    "beside": {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["base", 0], "lora_name": "lcm-lora-sdv1-5.safetensors"},
    },
    "loop": {"class_type": "X", "inputs": {"a": ["loop", 0], "b": [], "c": ["gone", 0]}},
}


@pytest.fixture
def room(comfyui):
    return comfyui.pack("comfy_bridge.prompt_graph")


@pytest.fixture
def running(comfyui, room, monkeypatch):
    """running(node): the server runs that node of the graph."""
    import server
    from comfy_execution.utils import CurrentNodeContext

    queue = SimpleNamespace(get_current_queue_volatile=lambda: ([(0, "id", GRAPH, {}, [])], []))
    monkeypatch.setattr(server.PromptServer, "instance", SimpleNamespace(prompt_queue=queue), raising=False)
    return lambda node: CurrentNodeContext("id", node)


def test_without_a_server_there_is_no_graph(room):
    assert room.upstream() == [] and room.step_loras() == []


def test_what_a_node_hangs_on_is_found_and_what_lies_beside_is_not(room, running):
    with running("sampler"):
        assert {node["inputs"].get("lora_name") for node in room.upstream()} == {
            None, "ink style.safetensors", "Hyper-SD15-8steps-lora.safetensors",
        }  # fmt: skip
        assert room.step_loras() == ["Hyper-SD15-8steps-lora.safetensors"], "a checkpoint of such a name is no LoRA"
    with running("beside"):
        assert room.step_loras() == ["lcm-lora-sdv1-5.safetensors"]
    with running("style"):
        assert room.step_loras() == []
    with running("loop"):
        assert room.upstream() == [GRAPH["loop"]]
    with running("elsewhere"):
        assert room.upstream() == []


def test_of_a_step_lora_under_a_student_it_is_told(comfyui, room, running, student, loaded):
    sampling = comfyui.pack("comfy_bridge.sampling")
    sigmas = sampling.sigmas_of(student, (999, 800, 600, 300))
    with running("sampler"):
        (sentence,) = sampling.warnings_of(student, sigmas, 8, 1.0)
        assert sampling.warnings_of(loaded.teacher, sigmas, 8, 1.0) == []
    assert sentence == (
        "Hyper-SD15-8steps-lora.safetensors also shortens sampling: on a student, which needs 4 steps as it is, it washes colours out; "
        "take it out."
    )
