"""Takes the pictures of workflows and nodes anew, in the page that a running ComfyUI shows: `COMFYUI_DIR=… python tests/take_pictures.py`.

Needs what the tests of the page need (tests/avdm2_nodes/test_page.py). Numbers of workflows as arguments (01): only their pictures.
"""

import math
import os
import sys
import tempfile
from pathlib import Path

import av
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from tests.avdm2_nodes.live import Server
from tests.avdm2_nodes.page import Page
from tests.avdm2_nodes.test_page import PREVIEWS, WORKFLOWS, place_files

ASSETS = ROOT / "web" / "docs" / "assets"
NODES = {  # from which workflow the picture of a node on its help page is
    "AVDM2StackLoader": ("01", "stack_loader"),
    "AVDM2StudentLoader": ("01", "student_loader"),
    "AVDM2MotionModule": ("01", "motion_module"),
    "AVDM2Steps": ("01", "steps"),
    "AVDM2SaveStudent": ("01", "save_student"),
    "AVDM2TeacherLoader": ("02", "teacher_loader"),
    "AVDM2StudentSampler": ("02", "student_sampler"),
    "AVDM2TeacherSampler": ("02", "teacher_sampler"),
    "AVDM2PromptTravel": ("03", "prompt_travel"),
    "AVDM2StyleTransfer": ("06", "style_transfer"),
    "AVDM2StyleTraining": ("07", "style_training"),
    "AVDM2Distillation": ("08", "distillation"),
    "AVDM2SparseControlLoader": ("19", "sparse_control_loader"),
}
ADDED = {  # nodes that the workflow lacks: the input that takes its model
    "AVDM2MotionModule": "model",
    "AVDM2Steps": "student",
    "AVDM2SaveStudent": "student",
}
MIDDLE = {  # the node that stands for a workflow whose clip nobody has made
    "11": "LoraLoader",
    "12": "AVDM2StudentLoader",
    "13": "ContextWindowsManual",
    "14": "ControlNetApplyAdvanced",
    "15": "IPAdapter",
    "16": "AVDM2StyleTransfer",
    "17": "AVDM2StyleTraining",
    "18": "AVDM2Distillation",
    "19": "AVDM2SparseControlLoader",
}
IN_DOCS = {"01": ("text_to_video", 720), "02": ("teacher_and_student", 900)}  # the page's height
SQUARE = 480  # pixels of a picture in the template browser
PART = 620  # of the graph that is in it
ADD = """([kind, input]) => {
  const node = LiteGraph.createNode(kind)
  app.graph.add(node)
  node.pos = [370, 2000]
  if (kind === "AVDM2MotionModule") node.widgets[0].value = "v3_sd15_mm.ckpt"
  const from = kind === "AVDM2MotionModule" ? "AVDM2StackLoader" : "AVDM2StudentLoader"
  app.graph.nodes.find(other => other.type === from).connect(0, node, node.findInputSlot(input))
}"""


def around(box, by: float):
    x, y, width, height = box
    return x - by, y - by, width + 2 * by, height + 2 * by


def square_of(clip: Path) -> Image.Image:
    """Frames of a clip, evenly chosen, on a square sheet: 4 of a short one, 16 of a long one, half of them where they are wide."""
    with av.open(str(clip)) as file:
        frames = [frame.to_image() for frame in file.decode(video=0)]
    width, height = frames[0].size
    rows = 2 if len(frames) <= 16 else 4
    columns = max(1, round(rows * height / width))
    chosen = [frames[round(k * (len(frames) - 1) / max(1, rows * columns - 1))] for k in range(rows * columns)]
    scale = min((SQUARE - 4 * (columns + 1)) / (columns * width), (SQUARE - 4 * (rows + 1)) / (rows * height))
    cell = math.floor(width * scale), math.floor(height * scale)
    sheet = Image.new("RGB", (SQUARE, SQUARE), "#202020")
    left, top = ((SQUARE - n * (size + 4) + 4) // 2 for n, size in ((columns, cell[0]), (rows, cell[1])))
    for k, frame in enumerate(chosen):
        place = left + k % columns * (cell[0] + 4), top + k // columns * (cell[1] + 4)
        sheet.paste(frame.resize(cell, Image.Resampling.LANCZOS), place)
    return sheet


def take(page: Page, path: Path) -> None:
    """The pictures of one workflow: the miniature's after a run."""
    number = path.stem[:2]
    page.load(path)
    assert not page.red_nodes(), page.red_nodes()
    if number not in MIDDLE:
        status = page.run()["status"]
        assert status["status_str"] == "success", status
        clip = max((page.server.base / "output").rglob("*.mp4"), key=lambda file: file.stat().st_mtime)
        square_of(clip).save(path.with_suffix(".jpg"), quality=88)
    else:
        x, y, width, height = page.boxes()[MIDDLE[number]]
        page.tab.set_viewport_size({"width": 1300, "height": 1100})
        part = (x + width / 2 - PART / 2, y + height / 2 - PART / 2, PART, PART)
        page.picture(path.with_suffix(".jpg"), page.show(part, 1.2, 200, 150), SQUARE)
    if number in IN_DOCS:
        name, height = IN_DOCS[number]
        graph = around(page.boxes()["graph"], 15)
        page.tab.set_viewport_size({"width": 1800, "height": height})
        page.show(graph, min(1690 / graph[2], (height - 110) / graph[3]), 85, 105)
        page.picture(ROOT / "docs" / f"graph_{name}.jpg")
    for node, (workflow, name) in NODES.items():
        if workflow == number:
            if node in ADDED:
                page.tab.evaluate(ADD, [node, ADDED[node]])
            page.tab.set_viewport_size({"width": 1400, "height": 1100})
            page.picture(ASSETS / f"{name}.jpg", page.show(around(page.boxes()[node], 30), 1.5, 200, 150))
            if node in ADDED:
                page.tab.evaluate("kind => app.graph.remove(app.graph.nodes.find(node => node.type === kind))", node)


def main() -> None:
    chosen = [path for path in WORKFLOWS if path.stem[:2] in (sys.argv[1:] or [p.stem[:2] for p in WORKFLOWS])]
    with tempfile.TemporaryDirectory() as folder:
        place_files(Path(folder))
        comfyui = Path(os.environ["COMFYUI_DIR"]).resolve()
        with Server(comfyui, Path(folder), options=PREVIEWS) as server, Page(server) as page:
            for path in chosen:
                take(page, path)


if __name__ == "__main__":
    main()
