"""What shared graphs lean on: node ids, the names, kinds, order and defaults of inputs and outputs. Change none of it lightly."""

import pytest

FILES = "COMBO"  # whose choices are the files that are there
TEACHER, STUDENT = "AVDM2_TEACHER", "AVDM2_STUDENT"
SEED = ("seed", "INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True})
DENOISE = ("denoise", "FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01})

# id: (inputs in order, how many of them are required, outputs)
NODES = {
    "AVDM2TeacherLoader": (
        [("checkpoint", FILES, {}), ("motion_module", FILES, {}), ("model", "MODEL", {})],
        2,
        [("teacher", TEACHER), ("clip", "CLIP"), ("vae", "VAE")],
    ),
    "AVDM2StudentLoader": ([("student", FILES, {}), ("teacher", TEACHER, {})], 2, [("student", STUDENT)]),
    "AVDM2StudentSampler": (
        [
            ("student", STUDENT, {}),
            ("positive", "CONDITIONING", {}),
            ("latent", "LATENT", {}),
            SEED,
            ("steps", "INT", {"default": 0, "min": 0, "max": 50}),
            DENOISE,
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
        ],
        4,
        [("student", STUDENT)],
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
            texts = {"tooltip", "multiline", "options", "multiselect"}
            assert {key: value for key, value in found_options.items() if key not in texts} == options, name
    assert list(zip(node.RETURN_NAMES or (), node.RETURN_TYPES, strict=True)) == outputs
    assert (node_id in ("AVDM2SaveStudent", "AVDM2StyleTraining")) == node.OUTPUT_NODE


@pytest.mark.parametrize("node_id", NODES)
def test_everything_is_explained(ours, node_id):
    node = ours[node_id]
    assert len(node.DESCRIPTION) > 40 and node.CATEGORY == "AVDM2"
    assert node.GET_SCHEMA().display_name.startswith("AVDM2 ")
    said = node.INPUT_TYPES()
    for name, (_, options) in [*said["required"].items(), *said.get("optional", {}).items()]:
        assert options["tooltip"].endswith("."), name


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
