"""What people drag, read and install: workflows, help pages, texts and the registry's entry, held against the nodes' sources."""

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tomllib
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
MANIFEST = yaml.safe_load((ROOT / "workflows" / "models.yaml").read_text(encoding="utf-8"))
PAGES = ROOT / "web" / "docs"
TEXTS = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))

# The wires and the number of widget values of the core nodes that the workflows use, as ComfyUI 0.8 and 0.33 both read them.
CORE = {
    "CLIPTextEncode": ({"clip": "CLIP"}, ["CONDITIONING"], 1),
    "CreateVideo": ({"images": "IMAGE", "audio": "AUDIO"}, ["VIDEO"], 1),
    "EmptyLatentImage": ({}, ["LATENT"], 3),
    "GetVideoComponents": ({"video": "VIDEO"}, ["IMAGE", "AUDIO", "FLOAT"], 0),
    "ImageScale": ({"image": "IMAGE"}, ["IMAGE"], 4),
    "ImageStitch": ({"image1": "IMAGE", "image2": "IMAGE"}, ["IMAGE"], 4),
    "LoadVideo": ({}, ["VIDEO"], 1),
    "MarkdownNote": ({}, [], 1),
    "PrimitiveInt": ({}, ["INT"], 2),
    "SaveVideo": ({"video": "VIDEO"}, [], 3),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"], 0),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, ["LATENT"], 0),
}
WIDGETS = {"COMBO", "STRING", "INT", "FLOAT", "BOOLEAN"}
CONTROL = ("fixed", "increment", "decrement", "randomize")  # the value that control_after_generate adds behind a widget's
BUNDLED = "(bundled)"
FOLDERS = {  # our widgets that name a file of ComfyUI's models folder
    ("AVDM2TeacherLoader", "checkpoint"): "checkpoints",
    ("AVDM2TeacherLoader", "motion_module"): "animatediff_models",
    ("AVDM2StudentLoader", "student"): "avdm2",
    ("AVDM2StyleTraining", "style"): "checkpoints",
    ("AVDM2StyleTransfer", "style"): "checkpoints",
}


@dataclass
class Input:
    name: str
    type: str
    said: dict  # the schema's constants: tooltip, default, min, max, optional, control_after_generate


@dataclass
class Node:
    """A node's schema, as its source says it."""

    id: str
    said: dict
    inputs: list[Input] = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)  # (name, type)

    @property
    def widgets(self) -> list[Input]:
        return [i for i in self.inputs if i.type in WIDGETS]


def constants(call: ast.Call) -> dict:
    """The keywords of a call whose values are written out."""
    found = {}
    for keyword in call.keywords:
        try:
            found[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            continue
    return found


def own_wires() -> dict[str, str]:
    """{"TeacherWire": "AVDM2_TEACHER", …} of nodes/types.py."""
    tree = ast.parse((ROOT / "avdm2_nodes" / "nodes" / "types.py").read_text(encoding="utf-8"))
    custom = [n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Call)]
    return {n.targets[0].id: ast.literal_eval(n.value.args[0]) for n in custom}


def kind_of(call: ast.Call, wires: dict[str, str]) -> str:
    """The type of `io.Int.Input(…)` is INT, of `TeacherWire.Input(…)` AVDM2_TEACHER."""
    owner = call.func.value
    return wires[owner.id] if isinstance(owner, ast.Name) else owner.attr.upper()


def read_nodes() -> dict[str, Node]:
    """The nodes by id, in the order in which the pack lists them, without ComfyUI."""
    wires, nodes, files = own_wires(), {}, ROOT / "avdm2_nodes" / "nodes"
    for file in sorted(files.glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", None) == "Schema":
                parts = {k.arg: k.value for k in call.keywords}
                node = Node(constants(call)["node_id"], constants(call))
                for item in parts["inputs"].elts:
                    node.inputs.append(Input(ast.literal_eval(item.args[0]), kind_of(item, wires), constants(item)))
                for item in parts["outputs"].elts:
                    node.outputs.append((constants(item)["display_name"], kind_of(item, wires)))
                nodes[node.id] = node
    return nodes


NODES = read_nodes()


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def values(node: dict) -> list[tuple[Input, object]]:
    """Our node's widgets with the values that a workflow gives them."""
    given, found = list(node["widgets_values"]), []
    for widget in NODES[node["type"]].widgets:
        assert given, f"{node['type']} lacks a value for {widget.name}"
        found.append((widget, given.pop(0)))
        if widget.said.get("control_after_generate"):
            assert given and given.pop(0) in CONTROL, f"{node['type']} lacks what to do with {widget.name} after a run"
    assert not given, f"{node['type']} has values too many: {given}"
    return found


def files_named(workflow: dict) -> dict[str, list[str]]:
    """The model files that our nodes' widgets name, by their folder."""
    found: dict[str, list[str]] = {}
    for node in workflow["nodes"]:
        for widget, value in values(node) if node["type"] in NODES else []:
            folder = FOLDERS.get((node["type"], widget.name))
            if folder and Path(value).suffix and value not in found.setdefault(folder, []):
                found[folder].append(value)
    return found


each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
each_node = pytest.mark.parametrize("node", NODES.values(), ids=lambda node: node.id)


def test_the_sources_are_read():
    assert len(NODES) == len(list((ROOT / "avdm2_nodes" / "nodes").glob("*.py"))) - 2  # __init__ and types
    loader = NODES["AVDM2TeacherLoader"]
    assert {("checkpoint", "COMBO"), ("model", "MODEL")} <= {(i.name, i.type) for i in loader.inputs}
    assert loader.outputs == [("teacher", "AVDM2_TEACHER"), ("clip", "CLIP"), ("vae", "VAE")]


def test_each_task_is_there_for_the_miniature_and_for_sd15():
    tasks = ["text_to_video", "teacher_and_student", "video_to_video", "style_transfer", "style_transplant", "style_training"]
    assert {path.stem for path in WORKFLOWS} == {f"{models}_{task}" for models in ("miniature", "sd15") for task in tasks}
    assert list(MANIFEST) == sorted(path.stem for path in WORKFLOWS)


@each_workflow
def test_nodes_are_ours_or_the_core_s(path):
    for node in load(path)["nodes"]:
        assert node["type"] in NODES or node["type"] in CORE, f"{node['type']} comes from another pack"


@each_workflow
def test_wires_join_slots_of_one_type(path):
    workflow = load(path)
    nodes, joined = {n["id"]: n for n in workflow["nodes"]}, set()
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    for link, source, out, target, slot, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][out]["links"] and nodes[target]["inputs"][slot]["link"] == link
        assert nodes[source]["outputs"][out]["type"] == kind == nodes[target]["inputs"][slot]["type"]
        joined.add(link)
    assert len(joined) == len(workflow["links"]) and max(joined) == workflow["last_link_id"]
    for node in workflow["nodes"]:
        ends = [i["link"] for i in node["inputs"] if i["link"]] + [link for o in node["outputs"] for link in o["links"]]
        assert set(ends) <= joined, f"{node['type']} has a wire that goes nowhere"


@each_workflow
def test_slots_are_those_of_the_nodes(path):
    for node in load(path)["nodes"]:
        sockets = {i["name"]: i["type"] for i in node["inputs"] if "widget" not in i}
        made = [o["type"] for o in node["outputs"]]
        if node["type"] in CORE:
            inputs, outputs, count = CORE[node["type"]]
            assert (sockets, made, len(node["widgets_values"])) == (inputs, outputs, count), node["type"]
        else:
            schema = NODES[node["type"]]
            assert sockets == {i.name: i.type for i in schema.inputs if i.type not in WIDGETS}
            assert [(o["name"], o["type"]) for o in node["outputs"]] == schema.outputs
            wired = {i["name"]: i["type"] for i in node["inputs"] if "widget" in i}
            assert wired.items() <= {i.name: i.type for i in schema.widgets}.items()
            needed = [i.name for i in schema.inputs if i.type not in WIDGETS and not i.said.get("optional")]
            assert not [i["name"] for i in node["inputs"] if i["name"] in needed and not i["link"]], node["type"]


@each_workflow
def test_widget_values_fit_the_schemas(path):
    kinds = {"COMBO": str, "STRING": str, "INT": int, "FLOAT": (int, float)}
    for node in load(path)["nodes"]:
        for widget, value in values(node) if node["type"] in NODES else []:
            assert isinstance(value, kinds[widget.type]), f"{widget.name} of {node['type']}: {value!r}"
            if widget.type in ("INT", "FLOAT"):
                assert widget.said["min"] <= value <= widget.said["max"], f"{widget.name} of {node['type']}: {value}"


@each_workflow
def test_the_manifest_lists_the_files_that_the_widgets_name(path):
    assert files_named(load(path)) == MANIFEST[path.stem]
    if path.stem.startswith("miniature"):
        assert MANIFEST[path.stem] == {}
        assert BUNDLED in str(load(path)["nodes"])


@each_workflow
def test_a_person_finds_groups_and_a_note(path):
    workflow = load(path)
    titles = [group["title"] for group in workflow["groups"]]
    assert len(titles) >= 3 and len(set(titles)) == len(titles)
    assert [n["type"] for n in workflow["nodes"]].count("MarkdownNote") >= 1
    for node in workflow["nodes"]:
        x, y, w, h = *node["pos"], *node["size"]
        over = [o["type"] for o in workflow["nodes"] if o is not node and _overlap((x, y - 30, w, h + 30), o)]
        assert not over, f"{node['type']} lies over {over}"


def _overlap(box, other: dict) -> bool:
    x, y, w, h = box
    a, b, c, d = other["pos"][0], other["pos"][1] - 30, other["size"][0], other["size"][1] + 30
    return x < a + c and a < x + w and y < b + d and b < y + h


@each_workflow
def test_each_workflow_has_its_picture(path):
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 200_000
    with Image.open(picture) as image:
        assert image.format == "JPEG" and image.width >= 600


def test_nothing_else_shows_up_in_the_template_browser():
    """It lists every .json of the folder as a workflow."""
    assert all({"nodes", "links"} <= set(load(path)) for path in WORKFLOWS)


@each_node
def test_each_node_has_a_help_page(node):
    page = (PAGES / f"{node.id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {node.said['display_name']}\n")
    for name in [i.name for i in node.inputs] + [name for name, _ in node.outputs]:
        assert f"| {name} |" in page, f"the page of {node.id} says nothing of {name}"
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert pictures, f"the page of {node.id} has no picture"
    for picture in pictures:
        assert (PAGES / picture).stat().st_size < 200_000


def test_no_help_page_is_of_a_node_that_is_gone():
    assert {page.stem for page in PAGES.glob("*.md")} == set(NODES)


@each_node
def test_the_texts_are_the_schema_s(node):
    """ComfyUI shows the texts of `locales` in place of the schema's, so they must not drift apart."""
    inputs = {i.name: {"name": i.name, "tooltip": i.said["tooltip"]} for i in node.inputs}
    outputs = {str(k): {"name": name} for k, (name, _) in enumerate(node.outputs)}
    expected = {key: node.said[key] for key in ("display_name", "description")} | {"inputs": inputs}
    if outputs:
        expected["outputs"] = outputs
    assert TEXTS[node.id] == expected, f"copy the schema's texts of {node.id} to locales/en/nodeDefs.json"


def test_no_text_is_of_a_node_that_is_gone():
    assert set(TEXTS) == set(NODES)


@pytest.mark.parametrize("text", ["{", "}", "|", "@"])
def test_texts_have_no_sign_that_the_page_would_interpret(text):
    """vue-i18n reads these as placeholders, plurals and links."""
    assert text not in "".join(_leaves(TEXTS))


def test_the_registry_is_told_the_requirements():
    """It reads a list in pyproject.toml only, a manual installation requirements.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert project["dependencies"] == [line for line in lines if line and not line.startswith("#")]


def test_the_registry_s_icon_is_small():
    icon = ROOT / "assets" / "icon.png"
    assert icon.stat().st_size < 50_000
    with Image.open(icon) as image:
        assert image.width == image.height <= 400


def _leaves(texts) -> list[str]:
    return [texts] if isinstance(texts, str) else [leaf for value in texts.values() for leaf in _leaves(value)]
