"""The workflows in ComfyUI's page, in headless Chromium: needs a `chromium` on the path and `pip install playwright`.

With IPADAPTER_PLUS_DIR, a checkout of ComfyUI_IPAdapter_plus, the nodes of that pack are there too.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.avdm2_nodes.conftest import ROOT
from tests.avdm2_nodes.live import Server

pytestmark = pytest.mark.slow

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
each_of_the_miniature = pytest.mark.parametrize(
    "path", [path for path in WORKFLOWS if "(miniature)" in path.stem], ids=lambda path: path.stem
)


PREVIEWS = ("--preview-method", "auto")
IPADAPTER = os.environ.get("IPADAPTER_PLUS_DIR")


def place_files(base: Path) -> None:
    """Files, empty, under the names that the workflows give, for the page only looks whether they are there; and a picture."""
    for needs in yaml.safe_load((ROOT / "workflows" / "models.yaml").read_text(encoding="utf-8")).values():
        for kind, names in needs.items():
            (base / "models" / kind).mkdir(parents=True, exist_ok=True)
            for name in names:
                (base / "models" / kind / name).touch()
    (base / "input").mkdir(exist_ok=True)
    Image.linear_gradient("L").save(base / "input" / "example.png")
    if IPADAPTER:
        (base / "custom_nodes").mkdir(exist_ok=True)
        (base / "custom_nodes" / "ComfyUI_IPAdapter_plus").symlink_to(Path(IPADAPTER).resolve(), target_is_directory=True)


@pytest.fixture(scope="module")
def page(comfyui_dir, tmp_path_factory):
    pytest.importorskip("playwright", reason="needs playwright: pip install playwright")
    from tests.avdm2_nodes.page import CHROMIUM, Page

    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    base = tmp_path_factory.mktemp("page")
    place_files(base)
    with Server(comfyui_dir, base, options=PREVIEWS) as server, Page(server) as opened:
        yield opened


@each_workflow
def test_no_node_is_red(page, path):
    page.load(path)
    assert [kind for kind in page.red_nodes() if IPADAPTER or not kind.startswith("IPAdapter")] == []


def test_a_node_that_nobody_has_would_be_red(page, tmp_path):
    unknown = tmp_path / "unknown.json"
    unknown.write_text(WORKFLOWS[0].read_text(encoding="utf-8").replace("AVDM2StudentLoader", "AVDM2OfTomorrow"))
    page.load(unknown)
    assert set(page.red_nodes()) == {"AVDM2OfTomorrow"}


@each_workflow
def test_nodes_are_as_large_as_the_page_needs_them(page, path):
    """Else they grow when the workflow is opened, and lie over others."""
    page.load(path)
    small = (
        "app.graph.nodes.filter(node => node.computeSize().some((size, k) => node.size[k] < size - 1)).map(node => node.type)"
    )
    assert [kind for kind in page.tab.evaluate(small) if kind != "MarkdownNote"] == []


def edited(tmp_path, edit):
    """The first workflow with its nodes edited, by their type."""
    workflow = json.loads(WORKFLOWS[0].read_text(encoding="utf-8"))
    edit({node["type"]: node for node in workflow["nodes"]})
    changed = tmp_path / "edited.json"
    changed.write_text(json.dumps(workflow), encoding="utf-8")
    return changed


def test_a_warning_is_read_on_the_node(page, tmp_path):
    """All of it, on core's KSampler too."""

    def burn(nodes):
        nodes["KSampler"]["widgets_values"][3] = 5.0

    page.load(edited(tmp_path, burn))
    assert page.run()["status"]["status_str"] == "success"
    box = page.wait_for("""() => {
      const node = app.graph.nodes.find(node => node.type === "KSampler")
      const box = node.widgets.find(widget => widget.name === "$$node-text-preview")
      return box?.value && [box.value, box.computedHeight ?? box.height]
    }""")
    assert "cfg 5 burns colours" in box[0] and box[1] >= 16 + 17 * (len(box[0]) // 40)


def test_the_preview_of_a_clip_moves_on_core_s_sampler(page, tmp_path):
    def slow(nodes):
        nodes["KSampler"]["widgets_values"][2] = 20

    page.load(edited(tmp_path, slow))
    before = page.start()
    page.tab.wait_for_function(
        """async () => {
          const said = Object.values(app.nodeOutputs).some(output => output.animated && output.images[0].filename === "preview.png")
          const image = document.querySelector("img[src^='blob:']")
          return said && image && (await (await fetch(image.src)).blob().then(blob => blob.slice(0, 64).text())).includes("acTL")
        }""",
        timeout=300_000,
    )
    assert page.ended(before)["status"]["status_str"] == "success"


def test_an_error_begins_with_the_pack_s_name(page):
    graph = {
        "1": {"class_type": "AVDM2StackLoader", "inputs": {"stack": "miniature (bundled)"}},
        "2": {"class_type": "AVDM2PromptTravel", "inputs": {"clip": ["1", 1], "prompts": "a cat", "frames": 8}},
        "3": {"class_type": "AVDM2StudentLoader", "inputs": {"student": "miniature (bundled)", "teacher": ["1", 0]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 8}},
        "5": {
            "class_type": "AVDM2StudentSampler",
            "inputs": {"student": ["3", 0], "positive": ["2", 0], "latent": ["4", 0], "seed": 1, "steps": 0, "denoise": 1.0},
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }
    ended = page.server.wait_for(page.server.submit(graph))
    ((_, error),) = [message for message in ended["status"]["messages"] if message[0] == "execution_error"]
    assert error["exception_type"] == "AVDM2.PromptError" and error["exception_message"].startswith("Expected a frame, a colon")


def trained_shortly(path, folder):
    """The workflow of a file, its training, where it has one, of a few updates."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] in ("AVDM2StyleTraining", "AVDM2Distillation"):
            node["widgets_values"][2] = 6
    short = folder / path.name
    short.write_text(json.dumps(workflow), encoding="utf-8")
    return short


@each_of_the_miniature
def test_run_makes_a_clip_that_the_page_shows(page, path, tmp_path):
    page.load(trained_shortly(path, tmp_path))
    ended = page.run()
    assert ended["status"]["status_str"] == "success", ended["status"]["messages"]
    ((saved,),) = [output["images"] for output in ended["outputs"].values() if "images" in output]
    page.wait_for_video(saved["filename"])
    shutil.rmtree(page.server.base / "output")
    (page.server.base / "output").mkdir()
