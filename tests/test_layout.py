"""Who may import whom: arrows go down only, and none in circles. Read from the source, so that imports within functions count too."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each may import those of lower numbers, and its own kind.
TRAINING = {"world": 0, "run": 0, "data": 1, "method": 2, "cost": 3, "evaluation": 3, "miniature": 4}
NODES = {"diffusion": 0, "files": 1, "comfy_bridge": 2, "nodes": 3}
ERRORS = "avdm2_nodes.errors"  # what all errors of the pack have in common: below every room, it imports nothing
COMMANDS_IN_COMMANDS = {("compare", "distill")}  # its rows are whole runs
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview", "node_helpers",
           "nodes", "server"}  # fmt: skip


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for top in ("training", "avdm2_nodes") for path in sorted((ROOT / top).rglob("*.py"))}


@cache
def statements(module: str) -> list[ast.Import | ast.ImportFrom]:
    return [n for n in ast.walk(ast.parse(FILES[module].read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]


def imports(module: str) -> set[str]:
    """The modules that a module imports, by their full names; of `from package import name` the module if `name` is one."""
    package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for statement in statements(module):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        start = package[: len(package) - statement.level + 1] if statement.level else []
        source = ".".join([*start, *([statement.module] if statement.module else [])])
        whole = (f"{source}.{alias.name}" for alias in statement.names)
        found |= {name if name in FILES else source for name in whole}
    return found


def room(module: str) -> str:
    """The package within training or avdm2_nodes that a module belongs to; "" for a module at its top."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (module in FILES and FILES[module].name == "__init__.py" and len(parts) == 2) else ""


def inside(top: str) -> list[str]:
    return [module for module in FILES if module.split(".")[0] == top]


def test_the_reader_of_imports_sees_all_forms():
    assert "avdm2_nodes.diffusion.schedules" in imports("avdm2_nodes.files.peers")  # from ..diffusion.schedules import …
    assert "training.world.scenes" in imports("training.evaluation.rows")  # from training.world import scenes
    assert "diffusers" in imports("avdm2_nodes.files.interchange") and "training.data" in imports("training.data.tars")
    assert room("training.data.tars") == room("training.data") == "data" and room("training.sample") == room("training") == ""


def test_every_room_has_its_place():
    assert {room(module) for module in inside("training")} == {"", *TRAINING}
    assert {room(module) for module in inside("avdm2_nodes")} == {"", *NODES}


@pytest.mark.parametrize("module", [module for module in FILES if room(module)])
def test_arrows_go_down_only(module):
    top, places = module.split(".")[0], TRAINING if module.startswith("training.") else NODES
    for other in imports(module):
        if other.split(".")[0] == top and other != ERRORS:
            assert room(other), f"{module} imports {other}: a command, or the top, is for nobody to import"
            below = places[room(other)] < places[room(module)]
            assert below or room(other) == room(module), f"{module} imports {other}, which is not below it"


@pytest.mark.parametrize("top", ["training", "avdm2_nodes"])
def test_nothing_goes_in_circles(top):
    graph = {module: [o for o in imports(module) if o in FILES and o != module] for module in inside(top)}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_commands_import_no_other_command():
    commands = [module for module in inside("training") if module.count(".") == 1 and not room(module)]
    assert {"training.distill", "training.sample", "training.evaluate"} <= set(commands)
    crossing = {(m.split(".")[1], o.split(".")[1]) for m in commands for o in imports(m) if o in commands}
    assert crossing == COMMANDS_IN_COMMANDS


@pytest.mark.parametrize("module", inside("avdm2_nodes"))
def test_the_nodes_know_nothing_of_training_and_themselves_by_relative_imports_only(module):
    """ComfyUI loads the pack under the name of whatever folder it lies in."""
    assert "training" not in {name.split(".")[0] for name in imports(module)}
    for statement in statements(module):
        names = [a.name for a in statement.names] if isinstance(statement, ast.Import) else [statement.module or ""]
        absolute = isinstance(statement, ast.Import) or not statement.level
        assert not (absolute and any(name.split(".")[0] == "avdm2_nodes" for name in names))


@pytest.mark.parametrize("module", [m for m in inside("avdm2_nodes") if room(m) in ("diffusion", "files")])
def test_mathematics_and_files_know_nothing_of_comfyui(module):
    assert not COMFYUI & {name.split(".")[0] for name in imports(module)}
