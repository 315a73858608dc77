import subprocess
import sys

import pytest

from training.run.config import MODEL, ROOT
from training.run.packages import MissingPackageError, needs

OPTIONAL = ("accelerate", "av", "matplotlib", "peft", "scipy", "tensorboard", "webdataset")
# Python as it is where those packages are not installed: nobody finds them.
BLOCKED = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.path.insert(0, {str(ROOT)!r})
"""


def without_packages(code, *arguments, folder=None):
    python = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    return subprocess.run(python, capture_output=True, text=True, timeout=300, cwd=folder)


def test_a_package_that_is_there_is_imported():
    assert needs("json.decoder", "to read").JSONDecoder and needs("av", "to read videos").open


def test_a_missing_package_is_named_with_its_pip_line():
    with pytest.raises(MissingPackageError, match=r"no_such_package to read dreams, .* pip install no_such_package$"):
        needs("no_such_package.part", "to read dreams")


def test_a_package_that_is_broken_within_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_within.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package") as caught:
        needs("broken_within", "to read")
    assert not isinstance(caught.value, MissingPackageError)


def test_the_block_blocks():
    code = f"""
for package in {OPTIONAL}:
    try:
        __import__(package)
    except ModuleNotFoundError as error:
        print(error.name)
"""
    assert without_packages(code).stdout.split() == list(OPTIONAL)


def test_all_rooms_and_commands_are_imported_without_them():
    files = [path for top in ("training", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    done = without_packages("\n".join(f"import {module}" for module in modules))
    assert done.returncode == 0, done.stderr


def test_clips_are_sampled_without_them():
    code = f"""
import torch
from pathlib import Path
from avdm2_nodes.files.stack import load_stack
from avdm2_nodes.diffusion.samplers import student_timesteps
from avdm2_nodes.files.student import read_student
from avdm2_nodes.files.student_unet import student_unet
from training.evaluation.sampling import generate, student_sampler

folder = Path({str(MODEL)!r})
stack, student = load_stack(folder, with_motion=False), read_student(folder / "student.safetensors")
sampler = student_sampler(student_unet(student, stack.image_unet), student_timesteps(student.info.timesteps, 1), 8)
print(tuple(generate(sampler, stack, ["a large red circle"], [0], 8, 64, 64).shape))
"""
    done = without_packages(code)
    assert done.returncode == 0 and done.stdout.strip() == "(1, 8, 64, 64, 3)", done.stderr


def test_a_student_is_exported_without_them(tmp_path):
    code = "import sys; from training.export import main; sys.exit(main(sys.argv[1:]))"
    student, out = MODEL / "student.safetensors", tmp_path / "out"
    done = without_packages(code, "--student", student, "--format", "diffusers", "--out", out)
    assert done.returncode == 0 and (out / "model_index.json").exists(), done.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "package"),
    [
        ("sample", ["--prompt", "a large red circle"], "av"),
        ("distill", ["--run.folder", "run"], "accelerate"),
        ("evaluate", ["--clips", "6"], "matplotlib"),
    ],
)
def test_a_command_that_needs_one_says_so_before_its_work(command, arguments, package, tmp_path):
    run = f"import runpy, sys; sys.argv[0] = {str(ROOT / 'training' / f'{command}.py')!r}; sys.path[:0] = ['']"
    done = without_packages(f"{run}; runpy.run_path(sys.argv[0], run_name='__main__')", *arguments, folder=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"pip install {package}" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("*.mp4"))
