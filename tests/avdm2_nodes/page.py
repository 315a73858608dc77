"""ComfyUI's page in headless Chromium: what a person sees of the workflows and nodes."""

import io
import json
import shutil
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.avdm2_nodes.live import RUN, Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SETTINGS = {  # nothing that lies over a graph
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
SIZE = {"width": 1700, "height": 1100}
WAIT = 120_000  # ms for what the page does by itself, on a busy machine
TITLE = 30  # the height of a node's title, which lies above its position


class Page:
    """The page of a server; a context."""

    def __init__(self, server: Server):
        self.server = server

    def __enter__(self):
        self.server.post("/settings", SETTINGS)
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        self.tab = self._browser.new_page(viewport=SIZE)
        self.tab.goto(f"http://127.0.0.1:{self.server.port}")
        self.tab.wait_for_function("window.app?.extensionManager && window.app.graph", timeout=WAIT)
        self.tab.wait_for_timeout(2000)
        return self

    def __exit__(self, *_):
        self._browser.close()
        self._playwright.stop()

    def load(self, path: Path) -> None:
        """Opens a workflow, as dropping its file onto the page does, with all of it in view: what is not, the page does not load."""
        workflow = json.loads(path.read_text(encoding="utf-8"))
        self.tab.evaluate("([workflow, name]) => app.loadGraphData(workflow, true, true, name)", [workflow, path.stem])
        self.tab.wait_for_timeout(1500)
        self.tab.set_viewport_size(SIZE)
        graph = self.boxes()["graph"]
        self.show(graph, min(1400 / graph[2], 900 / graph[3]), 150, 130)

    def red_nodes(self) -> list[str]:
        """The nodes of the graph that the page does not know or finds a fault in."""
        red = "node => !LiteGraph.registered_node_types[node.type] || node.has_errors"
        return self.tab.evaluate(f"app.graph.nodes.filter({red}).map(node => node.type)")

    def run(self) -> dict:
        """Presses the keys for Run; what the history says of the prompt once it has ended."""
        return self.ended(self.start())

    def start(self) -> set[str]:
        """Presses the keys for Run; the prompts that had ended before."""
        before = set(self.server.get("/history"))
        self.tab.locator("body").press("Control+Enter")
        return before

    def ended(self, before: set[str]) -> dict:
        """What the history says of the first prompt to end that is not among these."""
        until = time.monotonic() + RUN
        while time.monotonic() < until:
            self.tab.wait_for_timeout(200)
            history = self.server.get("/history")
            if new := set(history) - before:
                self.tab.wait_for_timeout(2500)  # the page hears of it, loads the video, and takes its messages away
                return history[new.pop()]
        raise AssertionError(f"the prompt did not end in {RUN} s:\n{self.server.log()[-4000:]}")

    def wait_for(self, function: str):
        """What a function of the page gives once that is something; playwright's TimeoutError where it never is."""
        return self.tab.wait_for_function(function, timeout=WAIT).json_value()

    def wait_for_video(self, name: str) -> None:
        """Returns when the page can play the video of this file name; playwright's TimeoutError where it never does."""
        plays = """name => [...document.querySelectorAll("video")].some(video => video.currentSrc && video.readyState >= 2
          && new URL(video.currentSrc).searchParams.get("filename") === name)"""
        self.tab.wait_for_function(plays, arg=name, timeout=WAIT)

    # ---- pictures ----

    def boxes(self) -> dict[str, tuple[float, float, float, float]]:
        """(x, y, width, height) of each node by its type, titles included, and of the whole graph as "graph"; in the graph's units."""
        said = self.tab.evaluate(
            "[app.graph.nodes.map(n => [n.type, ...n.pos, ...n.size]), [...app.graph.groups.map(g => ['', ...g.pos, ...g.size]),"
            " ...[...app.graph.reroutes.values()].map(r => ['', ...r.pos, 0, 0])]]"
        )
        nodes = [(kind, x, y - TITLE, w, h + TITLE) for kind, x, y, w, h in said[0]]
        everything = [*nodes, *said[1]]
        left, top = (min(box[i] for box in everything) for i in (1, 2))
        right, bottom = (max(box[i] + box[i + 2] for box in everything) for i in (1, 2))
        return {kind: tuple(box) for kind, *box in reversed(nodes)} | {"graph": (left, top, right - left, bottom - top)}

    def show(self, box, scale: float, left: int, top: int) -> dict:
        """Moves the graph so that a box of it lies there on the page; its place on the page."""
        x, y, width, height = box
        self.tab.evaluate(
            "([scale, x, y]) => { app.canvas.ds.scale = scale; app.canvas.ds.offset = [x, y]; app.canvas.setDirty(true, true) }",
            [scale, left / scale - x, top / scale - y],
        )
        for_stills = (
            "for (const v of document.querySelectorAll('video')) { v.pause(); v.controls = false; v.currentTime = 0.4 }"
        )
        self.tab.evaluate(for_stills)
        self.tab.wait_for_timeout(1000)
        return {"x": left, "y": top, "width": round(width * scale), "height": round(height * scale)}

    def picture(self, path: Path, clip: dict | None = None, width: int | None = None) -> None:
        """Saves the page, or what is at a place on it, as JPEG; made smaller to `width` pixels."""
        picture = Image.open(io.BytesIO(self.tab.screenshot(**({"clip": clip} if clip else {})))).convert("RGB")
        if width is not None:
            picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
        picture.save(path, quality=85)
