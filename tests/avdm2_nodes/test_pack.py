"""The pack without ComfyUI: what importing it costs, and that its floors know only those below them."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / "avdm2_nodes"
FILES = sorted(PACK.rglob("*.py"))
# ComfyUI's own top-level modules that a pack might import.
COMFYUI = {
    "api_server", "app", "comfy", "comfy_api", "comfy_api_nodes", "comfy_config", "comfy_execution", "comfy_extras",
    "cuda_malloc", "execution", "folder_paths", "latent_preview", "main", "middleware", "node_helpers", "nodes", "protocol",
    "server", "utils",
}  # fmt: skip


def room_of(file: Path) -> str:
    """nodes, comfy_bridge, files or diffusion; "" for the files beside them."""
    return file.relative_to(PACK).parts[0] if file.parent != PACK else ""


def imports(file: Path) -> list[tuple[int, str]]:
    """(level, module) of every import, also of those within functions; `from . import a` is (1, "a")."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module)] if node.module else [(node.level, alias.name) for alias in node.names]
    return found


def rooms_read(file: Path) -> set[str]:
    """The rooms that a file imports from, its own left out."""
    here = file.relative_to(PACK).parent.parts
    found = set()
    for level, module in imports(file):
        if level:
            target = (*here[: len(here) - level + 1], *module.split("."))
            assert level <= len(here) + 1, f"{file.name} imports from outside the pack"
            if target[0] != room_of(file):
                found.add(target[0])
    return found


def fresh_python(code: str):
    """What `code` prints as JSON, in a Python that has imported nothing; the repository is not on its path."""
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=ROOT.anchor, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_door_opens_without_comfyui_and_imports_nothing_of_weight():
    code = f"""
import importlib.util, json, sys
before, path = set(sys.modules), list(sys.path)
spec = importlib.util.spec_from_file_location("some.pack", {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}])
pack = importlib.util.module_from_spec(spec)
sys.modules["some.pack"] = pack
spec.loader.exec_module(pack)
import inspect
print(json.dumps([
    sorted(set(sys.modules) - before), inspect.iscoroutinefunction(pack.comfy_entrypoint), sys.path == path,
    hasattr(pack, "NODE_CLASS_MAPPINGS"),
]))
"""
    imported, is_door, path_kept, mappings = fresh_python(code)
    ours = {name for name in imported if name.startswith("some.pack")}
    assert ours == {"some.pack", "some.pack.avdm2_nodes"}
    heavy = {"torch", "numpy", "diffusers", "transformers", "safetensors", "PIL", "pydantic", *COMFYUI}
    assert not {name.split(".")[0] for name in imported} & heavy
    assert is_door and path_kept and not mappings


def test_every_file_is_seen():
    assert {room_of(file) for file in FILES} == {"", "nodes", "comfy_bridge", "files", "diffusion"}
    assert imports(PACK / "__init__.py") == [(0, "comfy_api.latest"), (1, "nodes")]
    assert rooms_read(PACK / "nodes" / "student_loader.py") == {"comfy_bridge"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACK)))
def test_arrows_go_down_only(file):
    tops = {module.split(".")[0] for level, module in imports(file) if not level}
    assert not tops & {"training", "tests"}, "the nodes never need the training"
    assert "avdm2_nodes" not in tops, "the pack is loaded under any name: imports of its own are relative"
    if room_of(file) in ("files", "diffusion"):
        assert not tops & COMFYUI
    below = {
        "": {"nodes"},
        "nodes": {"comfy_bridge"},
        "comfy_bridge": {"files", "diffusion", "errors"},
        "files": {"diffusion", "errors"},
        "diffusion": {"errors"},
    }
    assert rooms_read(file) <= below[room_of(file)]


@pytest.mark.parametrize("file", [ROOT / "__init__.py", *FILES], ids=lambda file: str(file.relative_to(ROOT)))
def test_old_style_mappings_are_nowhere(file):
    assert "NODE_CLASS_MAPPINGS" not in file.read_text(encoding="utf-8"), "with them, ComfyUI ignores the entrypoint"


def test_no_node_imports_torch_diffusers_or_transformers_at_start_up():
    """What a file imports outside of its functions; the nodes' own files and, of the bridge, those that they import so."""
    for file in [PACK / "__init__.py", *(PACK / "nodes").glob("*.py"), PACK / "comfy_bridge" / "folders.py"]:
        body = ast.Module(ast.parse(file.read_text(encoding="utf-8")).body, [])
        names = set()
        for node in body.body:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" if node.module else alias.name for alias in node.names}
        assert not {name.split(".")[0] for name in names} & {"torch", "diffusers", "transformers", "comfy", "PIL"}, file
        assert {name for name in names if name.startswith("comfy_bridge")} <= {"comfy_bridge.folders"}, file


def test_the_tests_run_whatever_the_folder_is_called(tmp_path):
    """The root is a package of ComfyUI's, which pytest must not take for one of the tests'."""
    folder = tmp_path / "ComfyUI-AVDM2 1.0"
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "test_one.py").write_text("def test_one():\n    import avdm2_nodes\n")
    for name in ("__init__.py", "pyproject.toml", "avdm2_nodes/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    done = subprocess.run([sys.executable, "-m", "pytest"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
