"""What people drag, read and install: workflows, help pages, texts and the registry's entry, held against the nodes' sources."""

import ast
import json
import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
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
    "Canny": ({"image": "IMAGE"}, ["IMAGE"], 2),
    "CheckpointLoaderSimple": ({}, ["MODEL", "CLIP", "VAE"], 1),
    "ContextWindowsManual": ({"model": "MODEL"}, ["MODEL"], 12),  # 0.8 has eight of them and leaves the others out
    "ControlNetApplyAdvanced": (
        {"positive": "CONDITIONING", "negative": "CONDITIONING", "control_net": "CONTROL_NET", "image": "IMAGE", "vae": "VAE"},
        ["CONDITIONING", "CONDITIONING"],
        3,
    ),
    "ControlNetLoader": ({}, ["CONTROL_NET"], 1),
    "CreateVideo": ({"images": "IMAGE", "audio": "AUDIO"}, ["VIDEO"], 1),
    "EmptyLatentImage": ({}, ["LATENT"], 3),
    "GetVideoComponents": ({"video": "VIDEO"}, ["IMAGE", "AUDIO", "FLOAT"], 0),
    "ImageFromBatch": ({"image": "IMAGE"}, ["IMAGE"], 2),
    "ImageScale": ({"image": "IMAGE"}, ["IMAGE"], 4),
    "ImageStitch": ({"image1": "IMAGE", "image2": "IMAGE"}, ["IMAGE"], 4),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ["LATENT"],
        7,
    ),
    "LoadImage": ({}, ["IMAGE", "MASK"], 2),
    "LoadVideo": ({}, ["VIDEO"], 1),
    "LoraLoader": ({"model": "MODEL", "clip": "CLIP"}, ["MODEL", "CLIP"], 3),
    "MarkdownNote": ({}, [], 1),
    "MaskComposite": ({"destination": "MASK", "source": "MASK"}, ["MASK"], 3),
    "PrimitiveInt": ({}, ["INT"], 2),
    "RepeatLatentBatch": ({"samples": "LATENT"}, ["LATENT"], 1),
    "SamplerCustom": (
        {
            "model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "sampler": "SAMPLER", "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        ["LATENT", "LATENT"],
        4,
    ),
    "SaveVideo": ({"video": "VIDEO"}, [], 3),
    "SetLatentNoiseMask": ({"samples": "LATENT", "mask": "MASK"}, ["LATENT"], 0),
    "SolidMask": ({}, ["MASK"], 3),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"], 0),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, ["LATENT"], 0),
}  # fmt: skip
PEERS = {  # nodes of another pack, by its name in the registry
    "IPAdapter": ({"model": "MODEL", "ipadapter": "IPADAPTER", "image": "IMAGE", "attn_mask": "MASK"}, ["MODEL"], 4),
    "IPAdapterUnifiedLoader": ({"model": "MODEL", "ipadapter": "IPADAPTER"}, ["MODEL", "IPADAPTER"], 1),
}
PEER = "comfyui_ipadapter_plus"
WIDGETS = {"COMBO", "STRING", "INT", "FLOAT", "BOOLEAN"}
CONTROL = ("fixed", "increment", "decrement", "randomize")  # the value that control_after_generate adds behind a widget's
WIRES = {"ControlNet": "CONTROL_NET"}  # wires whose name is not their class's
BUNDLED = "(bundled)"
FILES = (".safetensors", ".ckpt")
OWN_STUDENT = "avdm2_sd15_4step.safetensors"  # which a person has to distil first
SOURCES = ("https://huggingface.co/", "https://civitai.com/")  # that ComfyUI's dialog of missing models trusts


@dataclass
class Input:
    name: str
    type: str
    said: dict  # the schema's constants: tooltip, default, min, max, optional, control_after_generate

    @property
    def shown(self) -> str:
        """Its name in the page."""
        return self.said.get("display_name", self.name)


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


def read_nodes() -> dict[str, Node]:
    """The nodes by id, in the order in which the pack lists them, without ComfyUI."""
    nodes, files = {}, ROOT / "avdm2_nodes" / "nodes"
    shared = {
        f.name: f for f in ast.parse((files / "category.py").read_text(encoding="utf-8")).body if isinstance(f, ast.FunctionDef)
    }
    for file in sorted(files.glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", None) == "Schema":
                parts = {k.arg: k.value for k in call.keywords}
                node = Node(constants(call)["node_id"], constants(call))
                for item in parts["inputs"].elts:
                    item, said = declared(item, shared)
                    node.inputs.append(
                        Input(ast.literal_eval(item.args[0]), item.func.value.attr.upper(), constants(item) | said)
                    )
                for item in parts["outputs"].elts:
                    node.outputs.append(
                        (constants(item)["display_name"], WIRES.get(item.func.value.attr, item.func.value.attr.upper()))
                    )
                nodes[node.id] = node
    return nodes


def declared(item: ast.Call, shared: dict[str, ast.FunctionDef]) -> tuple[ast.Call, dict]:
    """`io.Int.Input(…)` itself, or the one that `seed_input()` of category.py returns; and what the caller gave it."""
    if isinstance(item.func, ast.Attribute):
        return item, {}
    function = shared[item.func.id]
    given = {a.arg: ast.literal_eval(value) for a, value in zip(function.args.args, item.args, strict=True)}
    return function.body[-1].value, given


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


def models_of(node: dict) -> dict[str, dict]:
    """What a node tells ComfyUI's dialog of missing models: {name: {url, directory}}."""
    return {model["name"]: model for model in node["properties"].get("models", [])}


def named(node: dict) -> list[str]:
    """The model files that a node's widgets name."""
    loads = node["type"] != "MarkdownNote"
    return [value for value in node["widgets_values"] if loads and isinstance(value, str) and value.endswith(FILES)]


def files_named(workflow: dict) -> dict[str, list[str]]:
    """The model files that the nodes need, by their folder."""
    found: dict[str, list[str]] = {}
    for node in workflow["nodes"]:
        files = [(model["directory"], name) for name, model in models_of(node).items()]
        files += [("avdm2", name) for name in named(node) if name == OWN_STUDENT]
        for folder, name in files:
            if name not in found.setdefault(folder, []):
                found[folder].append(name)
    return found


each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
each_node = pytest.mark.parametrize("node", NODES.values(), ids=lambda node: node.id)


def test_the_sources_are_read():
    assert len(NODES) == len(list((ROOT / "avdm2_nodes" / "nodes").glob("*.py"))) - 2  # __init__ and category
    loader = NODES["AVDM2StudentLoader"]
    assert [(i.name, i.type) for i in loader.inputs] == [("student", "COMBO"), ("teacher", "MODEL"), ("clips", "INT")]
    assert loader.inputs[1].shown == "model" and loader.outputs == [("student", "MODEL")]


def test_the_template_to_start_with_comes_first_and_names_can_be_read():
    """The browser shows the files' names, and sorts them by these where a person asks for it or the file system does."""
    names = [path.stem for path in WORKFLOWS]
    assert names[0] == "01 Text to video (miniature)" and names[0] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(re.fullmatch(r"[01]\d [A-Z][\w -]+ \((miniature|SD1\.5)\)", name) for name in names)
    assert len({name[:2] for name in names}) == len(names) and list(MANIFEST) == names


@each_workflow
def test_nodes_are_ours_the_core_s_or_of_a_pack_that_is_named(path):
    workflow = load(path)
    for node in workflow["nodes"]:
        if node["type"] in PEERS:
            assert node["properties"]["cnr_id"] == PEER and "IP-Adapter" in path.stem
        else:
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
        if node["type"] in CORE | PEERS:
            inputs, outputs, count = (CORE | PEERS)[node["type"]]
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
        assert node["mode"] == 0, f"{node['type']} is switched off"
        for widget, value in values(node) if node["type"] in NODES else []:
            assert isinstance(value, kinds[widget.type]), f"{widget.name} of {node['type']}: {value!r}"
            if widget.type in ("INT", "FLOAT"):
                assert widget.said["min"] <= value <= widget.said["max"], f"{widget.name} of {node['type']}: {value}"


@each_workflow
def test_the_manifest_lists_the_files_that_the_widgets_name(path):
    assert files_named(load(path)) == MANIFEST[path.stem]
    if "(miniature)" in path.stem:
        assert MANIFEST[path.stem] == {}
        assert BUNDLED in str(load(path)["nodes"])


@each_workflow
def test_a_person_is_told_where_missing_files_are_published(path):
    """By ComfyUI's dialog, and by the note."""
    workflow = load(path)
    note = next(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    for node in workflow["nodes"]:
        models = models_of(node)
        assert set(named(node)) - {OWN_STUDENT} <= set(models), f"{node['type']} does not say where its file is"
        for name, model in models.items():
            assert model["url"].startswith(SOURCES) and model["url"] in note and model["directory"] in note and name in note
    assert OWN_STUDENT not in str(workflow["nodes"]) or "distillation" in note


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


@each_workflow
def test_no_wire_runs_behind_a_node(path):
    workflow = load(path)
    boxes = [(node["type"], *node["pos"], *node["size"]) for node in workflow["nodes"]]
    for link in workflow["links"]:
        for x, y in wire(workflow, link):
            behind = [kind for kind, a, b, w, h in boxes if a + 2 < x < a + w - 2 and b - 28 < y < b + h - 2]
            assert not behind, f"the wire {link} runs behind {behind}"


def wire(workflow: dict, link: list) -> list[tuple[float, float]]:
    """Points of a wire as the canvas draws it: Bézier curves at its ends, straight between its reroutes."""
    _, source, out, target, slot, _ = link
    nodes = {node["id"]: node for node in workflow["nodes"]}
    (x, y), width = nodes[source]["pos"], nodes[source]["size"][0]
    points = [(x + width, y + 20 * out + 14), *reroutes(workflow, link[0]), socket(nodes[target], slot)]
    found = []
    for k, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        bend = math.dist((x0, y0), (x1, y1)) / 4
        c0, c1 = x0 + bend * (k == 0), x1 - bend * (k == len(points) - 2)
        for t in (i / 60 for i in range(1, 60)):
            s = 1 - t
            px = s**3 * x0 + 3 * s * s * t * c0 + 3 * s * t * t * c1 + t**3 * x1
            found.append((px, (s**3 + 3 * s * s * t) * y0 + (3 * s * t * t + t**3) * y1))
    return found


def reroutes(workflow: dict, link: int) -> list[tuple[float, float]]:
    extra = workflow["extra"]
    known = {point["id"]: point for point in extra.get("reroutes", [])}
    last = {item["id"]: item["parentId"] for item in extra.get("linkExtensions", [])}.get(link)
    found = []
    while last is not None:
        found.insert(0, tuple(known[last]["pos"]))
        last = known[last].get("parentId")
    return found


def socket(node: dict, slot: int) -> tuple[float, float]:
    """Where an input is; one that stands in a widget's place, beside it."""
    (x, y), sockets = node["pos"], [i for i in node["inputs"] if "widget" not in i]
    if "widget" not in node["inputs"][slot]:
        return x, y + 20 * slot + 14
    return x, y + 20 * max(len(sockets), len(node["outputs"])) + 16


def _overlap(box, other: dict) -> bool:
    x, y, w, h = box
    a, b, c, d = other["pos"][0], other["pos"][1] - 30, other["size"][0], other["size"][1] + 30
    return x < a + c and a < x + w and y < b + d and b < y + h


@each_workflow
def test_each_workflow_has_its_picture(path):
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 200_000
    with Image.open(picture) as image:
        assert image.format == "JPEG" and image.width == image.height >= 400  # the browser shows squares


def test_nothing_else_shows_up_in_the_template_browser():
    """It lists every .json of the folder as a workflow."""
    assert all({"nodes", "links"} <= set(load(path)) for path in WORKFLOWS)


@each_node
def test_each_node_has_a_help_page(node):
    page = (PAGES / f"{node.id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {node.said['display_name']}\n")
    for name in [i.shown for i in node.inputs] + [name for name, _ in node.outputs]:
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
    inputs = {i.name: {"name": i.shown, "tooltip": i.said["tooltip"]} for i in node.inputs}
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
