"""The workflows in ComfyUI's page, in headless Chromium: needs a `chromium` on the path and `pip install playwright`."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.avdm2_nodes.conftest import ROOT
from tests.avdm2_nodes.live import Server

pytestmark = pytest.mark.slow

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
each_of_the_miniature = pytest.mark.parametrize(
    "path", [path for path in WORKFLOWS if path.stem.startswith("miniature")], ids=lambda path: path.stem
)


def place_models(base: Path) -> None:
    """Files, empty, under the names that the workflows give, for the page only looks whether they are there."""
    for needs in yaml.safe_load((ROOT / "workflows" / "models.yaml").read_text(encoding="utf-8")).values():
        for kind, names in needs.items():
            (base / "models" / kind).mkdir(parents=True, exist_ok=True)
            for name in names:
                (base / "models" / kind / name).touch()


@pytest.fixture(scope="module")
def page(comfyui_dir, tmp_path_factory):
    pytest.importorskip("playwright", reason="needs playwright: pip install playwright")
    from tests.avdm2_nodes.page import CHROMIUM, Page

    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    base = tmp_path_factory.mktemp("page")
    place_models(base)
    with Server(comfyui_dir, base) as server, Page(server) as opened:
        yield opened


@each_workflow
def test_no_node_is_red(page, path):
    page.load(path)
    assert page.red_nodes() == []


def test_a_node_that_nobody_has_would_be_red(page, tmp_path):
    unknown = tmp_path / "unknown.json"
    unknown.write_text(WORKFLOWS[0].read_text(encoding="utf-8").replace("AVDM2StudentSampler", "AVDM2OfTomorrow"))
    page.load(unknown)
    assert set(page.red_nodes()) == {"AVDM2OfTomorrow"}


@each_of_the_miniature
def test_run_makes_a_clip_that_the_page_shows(page, path):
    page.load(path)
    ended = page.run()
    assert ended["status"]["status_str"] == "success", ended["status"]["messages"]
    assert page.tab.locator("video").count(), "the page plays what was saved"
    shutil.rmtree(page.server.base / "output")
    (page.server.base / "output").mkdir()
