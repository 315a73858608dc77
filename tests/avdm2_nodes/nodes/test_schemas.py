"""What shared graphs lean on: node ids, the names, kinds, order and defaults of inputs and outputs. Change none of it lightly.

Inputs that came later are at the end and optional: graphs that were saved before them run.
"""

import asyncio

import pytest

FILES = "COMBO"  # whose choices are the files that are there
TEACHER = STUDENT = "MODEL"
CLIPS = ("clips", "INT", {"default": 1, "min": 1, "max": 64, "advanced": True})
MODULE = ("motion_module", FILES, {})
SEED = ("seed", "INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True})
DENOISE = ("denoise", "FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01})

# id: (inputs in order, how many of them are required, outputs)
NODES = {
    "AVDM2TeacherLoader": (
        [("checkpoint", FILES, {}), ("motion_module", FILES, {}), ("model", "MODEL", {})],
        2,
        [("teacher", TEACHER), ("clip", "CLIP"), ("vae", "VAE")],
    ),
    "AVDM2StackLoader": ([("stack", FILES, {})], 1, [("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE")]),
    "AVDM2MotionModule": (
        [
            ("model", "MODEL", {}),
            ("motion_module", FILES, {}),
            ("strength", "FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05}),
            CLIPS,
        ],
        2,
        [("model", "MODEL")],
    ),
    "AVDM2Steps": (
        [("student", STUDENT, {}), ("steps", "INT", {"default": 0, "min": 0, "max": 50}), DENOISE],
        3,
        [("sigmas", "SIGMAS"), ("sampler", "SAMPLER")],
    ),
    "AVDM2PromptTravel": (
        [
            ("clip", "CLIP", {}),
            ("prompts", "STRING", {"default": "0: a red circle\n8: a blue circle"}),
            ("frames", "INT", {"default": 16, "min": 1, "max": 4096}),
        ],
        3,
        [("conditioning", "CONDITIONING")],
    ),
    "AVDM2StudentLoader": ([("student", FILES, {}), ("teacher", TEACHER, {}), CLIPS], 2, [("student", STUDENT)]),
    "AVDM2StudentSampler": (
        [
            ("student", STUDENT, {}),
            ("positive", "CONDITIONING", {}),
            ("latent", "LATENT", {}),
            SEED,
            ("steps", "INT", {"default": 0, "min": 0, "max": 50}),
            DENOISE,
            ("cfg", "FLOAT", {"default": 1.0, "min": 0.0, "max": 30.0, "step": 0.1}),
            ("negative", "CONDITIONING", {}),
        ],
        6,
        [("latent", "LATENT")],
    ),
    "AVDM2TeacherSampler": (
        [
            ("teacher", TEACHER, {}),
            ("positive", "CONDITIONING", {}),
            ("latent", "LATENT", {}),
            SEED,
            ("steps", "INT", {"default": 25, "min": 1, "max": 1000}),
            ("cfg", "FLOAT", {"default": 3.0, "min": 0.0, "max": 30.0, "step": 0.1}),
            DENOISE,
            ("negative", "CONDITIONING", {}),
        ],
        7,
        [("latent", "LATENT")],
    ),
    "AVDM2StyleTransfer": (
        [
            ("student", STUDENT, {}),
            ("style", FILES, {}),
            ("strength", "FLOAT", {"default": 1.0, "min": 0.0, "max": 4.0, "step": 0.05}),
            ("model", "MODEL", {}),
            ("mode", ["guidance", "transplant"], {"default": "guidance"}),
            ("prompt", "CONDITIONING", {}),
            ("pulls", "INT", {"default": 1, "min": 1, "max": 8}),
        ],
        3,
        [("student", STUDENT)],
    ),
    "AVDM2StyleTraining": (
        [
            ("student", STUDENT, {}),
            ("style", FILES, {}),
            ("name", "STRING", {"default": "my style"}),
            ("updates", "INT", {"default": 0, "min": 0, "max": 100000}),
            ("prompts", "STRING", {"default": ""}),
            MODULE,
        ],
        4,
        [("student", STUDENT)],
    ),
    "AVDM2Distillation": (
        [
            ("teacher", TEACHER, {}),
            ("videos", FILES, {}),
            ("name", "STRING", {"default": "my student"}),
            ("updates", "INT", {"default": 0, "min": 0, "max": 100000}),
            ("settings", FILES, {}),
            ("prompts", "STRING", {"default": ""}),
            MODULE,
        ],
        5,
        [("student", STUDENT)],
    ),
    "AVDM2SparseControlLoader": (
        [("control_net", FILES, {}), ("frames", "STRING", {"default": "0"})],
        2,
        [("control_net", "CONTROL_NET")],
    ),
    "AVDM2SaveStudent": (
        [
            ("student", STUDENT, {}),
            ("name", "STRING", {"default": "student"}),
            ("format", ["student file", "AnimateDiff files"], {"default": "student file"}),
        ],
        2,
        [],
    ),
}


@pytest.fixture
def ours(comfyui):
    """Our node classes by id, as ComfyUI has them."""
    return {name: node for name, node in comfyui.nodes.NODE_CLASS_MAPPINGS.items() if name in NODES or "avdm2" in name.lower()}


def test_these_are_the_nodes(ours):
    assert ours.keys() == NODES.keys()


@pytest.mark.parametrize("node_id", NODES)
def test_inputs_and_outputs_are_pinned(ours, node_id):
    inputs, required, outputs = NODES[node_id]
    node = ours[node_id]
    said = node.INPUT_TYPES()
    assert said.keys() <= {"required", "optional", "hidden"}
    found = [*said["required"].items(), *said.get("optional", {}).items()]
    assert [name for name, _ in found] == [name for name, _, _ in inputs]
    assert len(said["required"]) == required
    for (name, kind, options), (_, (found_kind, found_options)) in zip(inputs, found, strict=True):
        if kind == FILES:
            assert found_kind == FILES or isinstance(found_kind, list), name
        else:
            choices = found_kind if isinstance(found_kind, list) else found_options.get("options", found_kind)
            assert choices == kind, name
            texts = {"tooltip", "multiline", "options", "multiselect", "display_name"}
            assert {key: value for key, value in found_options.items() if key not in texts} == options, name
    assert list(zip(node.RETURN_NAMES or (), node.RETURN_TYPES, strict=True)) == outputs
    assert (node_id in ("AVDM2SaveStudent", "AVDM2StyleTraining", "AVDM2Distillation")) == node.OUTPUT_NODE


@pytest.mark.parametrize("node_id", NODES)
def test_everything_is_explained(ours, node_id):
    node = ours[node_id]
    assert len(node.DESCRIPTION) > 40 and node.CATEGORY == "AVDM2"
    assert node.GET_SCHEMA().display_name.startswith("AVDM2 ")
    said = node.INPUT_TYPES()
    for name, (kind, options) in [*said["required"].items(), *said.get("optional", {}).items()]:
        assert kind == "CLIP" or options["tooltip"].endswith("."), name


def test_choices_follow_the_folders(comfyui, ours, model_folders):
    def choices(node_id, name):
        kind, options = ours[node_id].INPUT_TYPES()["required"][name]
        return kind if isinstance(kind, list) else options["options"]

    assert "tiny" in choices("AVDM2TeacherLoader", "checkpoint")
    new = model_folders / "avdm2" / "just now.safetensors"
    assert new.name not in choices("AVDM2StudentLoader", "student")
    new.touch()
    assert new.name in choices("AVDM2StudentLoader", "student")
    new.unlink()


def test_loading_the_pack_adds_models_folders_and_no_more(comfyui):
    import folder_paths

    for kind in ("avdm2", "animatediff_models"):
        assert folder_paths.get_folder_paths(kind)[0] == str(comfyui.base / "models" / kind)


# As the page saved a graph for the API when teacher and student were wires of their own.
SAVED = {
    "1": {
        "class_type": "AVDM2TeacherLoader",
        "inputs": {"checkpoint": "tiny", "motion_module": "the checkpoint's own"},
    },
    "2": {"class_type": "AVDM2StudentLoader", "inputs": {"student": "all.safetensors", "teacher": ["1", 0]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red circle"}},
    "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 32, "batch_size": 4}},
    "5": {
        "class_type": "AVDM2StyleTransfer",
        "inputs": {"student": ["2", 0], "style": "other of tiny", "strength": 0.5, "mode": "guidance", "pulls": 1},
    },
    "6": {
        "class_type": "AVDM2StudentSampler",
        "inputs": {"student": ["5", 0], "positive": ["3", 0], "latent": ["4", 0], "seed": 1, "steps": 0, "denoise": 1.0},
    },
    "7": {
        "class_type": "AVDM2TeacherSampler",
        "inputs": {
            "teacher": ["1", 0], "positive": ["3", 0], "negative": ["3", 0], "latent": ["6", 0], "seed": 1, "steps": 2, "cfg": 3.0,
            "denoise": 0.5,
        },
    },
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["1", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "clip"}},
    "10": {"class_type": "AVDM2SaveStudent", "inputs": {"student": ["2", 0], "name": "again", "format": "student file"}},
    "11": {
        "class_type": "AVDM2StyleTraining",
        "inputs": {"student": ["2", 0], "style": "other of tiny", "name": "ink", "updates": 3, "prompts": "a red circle"},
    },
}  # fmt: skip


def test_a_graph_that_was_saved_before_is_one_that_comfyui_takes_and_runs(comfyui, model_folders):
    """Its validation first, with the types of the wires, then its nodes in their order."""
    import execution

    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("id", SAVED, None))
    assert valid and not error and not node_errors and set(outputs) == {"9", "10", "11"}
    made = {}
    for name in "12345678":
        node = SAVED[name]
        inputs = {key: made[value[0]][value[1]] if isinstance(value, list) else value for key, value in node["inputs"].items()}
        made[name] = comfyui.run(node["class_type"], **inputs)
    assert made["8"][0].shape == (4, 32, 64, 3) and made["8"][0].std() > 0.01
