"""Takes the pictures of workflows and nodes anew, in the page that a running ComfyUI shows: `COMFYUI_DIR=… python tests/take_pictures.py`.

Needs what the tests of the page need (tests/avdm2_nodes/test_page.py). Names of workflows as arguments: only the pictures of these.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from tests.avdm2_nodes.live import Server
from tests.avdm2_nodes.page import Page
from tests.avdm2_nodes.test_page import WORKFLOWS, place_models

ASSETS = ROOT / "web" / "docs" / "assets"
NODES = {  # from which workflow the picture of a node on its help page is
    "AVDM2TeacherLoader": ("miniature_text_to_video", "teacher_loader"),
    "AVDM2StudentLoader": ("miniature_text_to_video", "student_loader"),
    "AVDM2StudentSampler": ("miniature_text_to_video", "student_sampler"),
    "AVDM2SaveStudent": ("miniature_text_to_video", "save_student"),
    "AVDM2TeacherSampler": ("miniature_teacher_and_student", "teacher_sampler"),
    "AVDM2StyleTransfer": ("miniature_style_transfer", "style_transfer"),
    "AVDM2StyleTraining": ("miniature_style_training", "style_training"),
}
IN_DOCS = {"miniature_text_to_video": 640, "miniature_teacher_and_student": 820}  # the page's height
WIDTH, MARGIN = 1200, 15  # of a workflow's picture in the template browser
ADD_SAVE = """() => {
  const save = LiteGraph.createNode("AVDM2SaveStudent")
  app.graph.add(save)
  save.pos = [360, 1000]
  app.graph.nodes.find(node => node.type === "AVDM2StudentLoader").connect(0, save, 0)
}"""


def around(box, by: float):
    x, y, width, height = box
    return x - by, y - by, width + 2 * by, height + 2 * by


def take(page: Page, path: Path) -> None:
    """The pictures of one workflow: the miniature's after a run."""
    page.load(path)
    assert not page.red_nodes(), page.red_nodes()
    if path.stem.startswith("miniature"):
        status = page.run()["status"]
        assert status["status_str"] == "success", status
    graph = around(page.boxes()["graph"], MARGIN)
    page.tab.set_viewport_size({"width": 2100, "height": 1300})  # at a smaller scale the page draws no texts
    page.picture(path.with_suffix(".jpg"), page.show(graph, 1.5 * WIDTH / graph[2], 150, 130), WIDTH)
    if path.stem in IN_DOCS:
        page.tab.set_viewport_size({"width": 1600, "height": IN_DOCS[path.stem]})
        page.show(graph, 1490 / graph[2], 85, 105)
        page.picture(ROOT / "docs" / f"graph_{path.stem.removeprefix('miniature_')}.jpg")
    for node, (workflow, name) in NODES.items():
        if workflow == path.stem:
            if node == "AVDM2SaveStudent":
                page.tab.evaluate(ADD_SAVE)
            page.tab.set_viewport_size({"width": 1200, "height": 1100})
            page.picture(ASSETS / f"{name}.jpg", page.show(around(page.boxes()[node], 30), 1.5, 200, 150))


def main() -> None:
    chosen = [path for path in WORKFLOWS if path.stem in (sys.argv[1:] or [p.stem for p in WORKFLOWS])]
    with tempfile.TemporaryDirectory() as folder:
        place_models(Path(folder))
        with Server(Path(os.environ["COMFYUI_DIR"]).resolve(), Path(folder)) as server, Page(server) as page:
            for path in chosen:
                take(page, path)


if __name__ == "__main__":
    main()
