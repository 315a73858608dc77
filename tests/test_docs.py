"""README and pages, held against the tree: what they name is there, links lead somewhere, and the README stays short."""

import ast
import hashlib
import json
import re
from functools import cache
from pathlib import Path

import pytest

from training.run.config import DistillConfig

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
LAYOUT = ROOT / "docs" / "contributing.md"  # its first code block is the tree

PYTHON = re.compile(r"(?<![\w/.-])((?:[\w-]+/)*[\w-]+\.py)\b(?::([A-Za-z_]\w*(?:\.\w+)*))?")
TOP = "avdm2_nodes|training|tests|benchmarks|docs|workflows|web|locales|miniature"
PATH = re.compile(rf"(?<![\w/.-])(?:{TOP})/[\w./-]*")
SECTIONS = "|".join(DistillConfig.model_fields)
SETTING = re.compile(rf"(?:--|`)({SECTIONS})\.(?!safetensors|yaml)(\w+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)


@cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the page's code blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def said(page: Path) -> str:
    """The page without the tree of the layout, whose names are not whole paths."""
    return read(page).replace(blocks(page)[0][1], "") if page == LAYOUT else read(page)


def defined(file: Path) -> set[str]:
    """The functions and classes of a file, and the methods as Class.method."""
    functions, names = (ast.FunctionDef, ast.AsyncFunctionDef), set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, functions):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {node.name} | {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, functions)}
    return names


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = sum(re.sub(r"-\d+$", "", one) == slug for one in found)
        found.append(f"{slug}-{count}" if count else slug)
    return set(found)


def tables(page: Path) -> list[list[int]]:
    """Columns of every row, table by table."""
    rows = re.findall(r"(?:^\|.*\|$\n?)+", prose(page), re.MULTILINE)
    return [[len(line.split("|")) - 2 for line in table.splitlines()] for table in rows]


def test_pages_are_read():
    assert {"method.md", "results.md"} <= {page.name for page in PAGES}
    assert ("avdm2_nodes/diffusion/sdm.py", "sdm_gradient") in PYTHON.findall(said(README))
    assert len(PYTHON.findall(said(ROOT / "docs" / "method.md"))) > 30
    assert {"Schedule", "Schedule.diffuse", "trailing_timesteps"} <= defined(
        ROOT / "avdm2_nodes" / "diffusion" / "schedules.py"
    )


@each_page
def test_every_room_and_function_that_it_names_is_there(page):
    for name, function in PYTHON.findall(said(page)):
        assert (ROOT / name).is_file(), f"{page.name} names {name}, which is not there"
        assert not function or function in defined(ROOT / name), f"{page.name} names {function} of {name}, which has none"


@each_page
def test_every_path_that_it_names_is_there(page):
    for path in PATH.findall(said(page)):
        assert (ROOT / path.rstrip(".")).exists(), f"{page.name} names {path}, which is not there"


@each_page
def test_every_setting_that_it_names_is_one(page):
    for section, key in SETTING.findall(read(page)):
        fields = DistillConfig.model_fields[section].annotation.model_fields
        assert key in fields, f"{page.name} names {section}.{key}, which is no setting"


@each_page
def test_links_resolve(page):
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_relative_to(ROOT) and target.is_file(), f"{page.name} links to {link}, which is not there"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}, which has no such heading"


@each_page
def test_tables_fit_a_screen(page):
    for columns in tables(page):
        assert len(set(columns)) == 1, f"{page.name} has a table whose rows are of {sorted(set(columns))} columns"
        assert columns[0] <= (6 if page == README else 8), f"{page.name} has a table of {columns[0]} columns"


def test_the_readme_is_short_and_names_every_page():
    assert len(read(README).splitlines()) <= 150
    named = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(prose(README)) if "://" not in link}
    assert not set(PAGES) - named


def test_every_picture_of_the_pages_is_shown():
    shown = {(page.parent / link).resolve() for page in (README, *PAGES) for link in LINK.findall(read(page))}
    assert not {path for path in (ROOT / "docs").iterdir() if path.suffix != ".md"} - shown


def test_the_readme_begins_with_the_main_job_and_the_tests():
    """CI runs the second."""
    job, tests = [text for language, text in blocks(README) if language == "bash"][:2]
    assert job.splitlines()[-1] == "python training/distill.py"
    assert tests.splitlines()[-1] == "python -m pytest -n 2"


def test_the_readme_lists_the_nodes():
    table = read(README).partition("<!-- nodes -->\n")[2].partition("<!-- end of nodes -->")[0]
    texts = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert {line.split("|")[1].strip() for line in table.splitlines()[2:]} == {node["display_name"] for node in texts.values()}


def cells(text: str) -> list[list[str]]:
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_readme_s_figures_are_those_of_the_results():
    """Rounded, and of the student that ships."""
    named = {
        "right in every attribute": "accuracy ↑", "motion error (px a frame)": "motion error ↓",
        "Fréchet distance": "Fréchet distance ↓",
    }  # fmt: skip
    rows = {
        "real clips through the VAE": "real clips (VAE)", "teacher, 25 steps, guided": "teacher 25 steps, guided",
        "student": "student 4 steps",
    }  # fmt: skip
    text = read(ROOT / "docs" / "results.md").partition("<!-- results -->")[2].partition("<!-- end of results -->")[0]
    full: dict[tuple[str, str], str] = {}
    for table in text.split("### ")[1:]:
        head, _, *body = cells(table)
        full |= {(row[0], key): cell.split(" ")[0] for row in body for key, cell in zip(head, row, strict=True)}
    (head, _, *body) = cells(next(table for table in read(README).split("\n\n") if "motion error (px a frame)" in table))
    compared = 0
    for row in body:
        for key, cell in zip(head[1:], row[1:], strict=True):
            if row[0] in rows and cell:
                exact, said = (x.removesuffix("%") for x in (full[rows[row[0]], named.get(key, key)], cell))
                digits = len(said.partition(".")[2])
                assert f"{float(exact):.{digits}f}" == said, f"{key} of {row[0]}: {cell}, and {exact} in docs/results.md"
                compared += 1
    assert compared == 14
    student = hashlib.sha256((ROOT / "miniature" / "student.safetensors").read_bytes()).hexdigest()[:12]
    assert f"sha256 {student}" in read(README) and f"student: student.safetensors, sha256 {student}" in text


@pytest.mark.parametrize(("page", "section"), [("results", "results"), ("results", "comparison own"), ("styles", "styles")])
def test_the_commands_find_where_their_tables_go(page, section):
    text = read(ROOT / "docs" / f"{page}.md")
    assert text.count(f"<!-- {section} -->\n") == text.count(f"<!-- end of {section} -->\n") == 1
    assert text.index(f"<!-- {section} -->") < text.index(f"<!-- end of {section} -->")


def test_the_layout_is_the_tree():
    """A folder ends in a slash; what lies in it is indented by two spaces more."""
    folders: list[tuple[int, Path]] = [(-1, ROOT)]
    listed = set()
    for line in blocks(LAYOUT)[0][1].splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        while folders[-1][0] >= depth:
            folders.pop()
        path = folders[-1][1] / name
        listed.add(path)
        assert path.is_dir() if name.endswith("/") else path.is_file(), f"the layout names {path.relative_to(ROOT)}"
        if name.endswith("/"):
            folders.append((depth, path))
    for room in ("avdm2_nodes", "training"):
        there = {path for path in (ROOT / room).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
        missing = {path.name for path in there - listed if path.name != "__init__.py"}
        assert not missing, f"the layout leaves out {missing} of {room}"
