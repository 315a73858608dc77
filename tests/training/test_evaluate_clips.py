import json

import numpy as np
import pytest
import scipy.linalg
import torch

from tests.training.conftest import FRAMES, SIDE
from training import evaluate_clips
from training.data.clips import write_clips
from training.data.video import read_video


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Real clips, and others of another brightness and fewer."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for name, count, low in (("real", 12, 0), ("made", 9, 100)):
        colours = rng.integers(low, 256, (count, 1, 1, 1, 3))
        clips = np.clip(colours + rng.integers(-20, 20, (count, FRAMES + 1, SIDE, SIDE, 1)), 0, 255).astype(np.uint8)
        write_clips(folder / name, ((clip, ["a red circle", "a blue square"][i % 2]) for i, clip in enumerate(clips)), 8)
    return folder


@pytest.fixture
def command(folders, tmp_path):
    size = ["--frames", str(FRAMES), "--height", str(SIDE), "--width", str(SIDE), "--out", str(tmp_path / "out")]
    return lambda *arguments: evaluate_clips.main(["--generated", str(folders / "made"), *size, *map(str, arguments)])


def test_every_figure_is_its_formula(folders, command, networks, tmp_path, capsys):
    arguments = ["--real", folders / "real", "--i3d", networks / "i3d.pt", "--videomae", networks / "videomae"]
    assert command(*arguments, "--clip", networks / "clip") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    figures = report["rows"]["made"]
    assert figures.keys() == {"FVD", "VideoMAE distance", "CLIPScore"}
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures.values())
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(figures)

    net = torch.jit.load(str(networks / "i3d.pt"))
    sets = []
    for name in ("real", "made"):  # the first nine of both
        clips = np.stack([read_video(folders / name / f"{i:05d}.mp4", FRAMES) for i in range(9)])
        sets.append(net(torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float(), True, True, True).double().numpy())
    means, covariances = [s.mean(0) for s in sets], [np.cov(s, rowvar=False) for s in sets]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert figures["FVD"]["value"] == pytest.approx(expected, rel=1e-3) and expected > 0.1

    assert report["clips"].startswith("9 of ") and "the first 9" in report["clips"]
    assert report["frames"] == f"{FRAMES} of {SIDE}x{SIDE}, stride 1" and "sha256" in report["clip"]
    assert "FVD ↓" in (tmp_path / "out" / "report.md").read_text()


def test_clipscore_alone_needs_no_real_clips(command, networks, tmp_path):
    assert command("--clip", networks / "clip") == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"]["made"].keys() == {"CLIPScore"}


def test_the_same_clips_are_at_no_distance(folders, command, networks, tmp_path):
    assert command("--real", folders / "made", "--i3d", networks / "i3d.pt") == 0
    row = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]["made"]
    assert row["FVD"]["value"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--clip", "nowhere"], "Expected a folder with CLIP in transformers' layout at nowhere, found none"),
        (
            ["--i3d", "nowhere.pt", "--real", "REAL"],
            "Expected I3D's TorchScript file (i3d_torchscript.pt) at nowhere.pt, found none",
        ),
        (["--videomae", "nowhere", "--real", "REAL"], "Expected a folder with VideoMAE in transformers' layout at nowhere"),
        (["--i3d", "I3D", "--real", "nowhere"], "Expected a folder of videos at nowhere, found nothing"),
        (["--videomae", "MAE", "--real", "REAL", "--frames", "3"], "Expected clips of 4 frames for VideoMAE"),
    ],
)
def test_errors_are_one_sentence(folders, command, networks, tmp_path, capsys, arguments, said):
    paths = {"REAL": folders / "real", "I3D": networks / "i3d.pt", "MAE": networks / "videomae"}
    assert command(*[paths.get(a, a) for a in arguments]) == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Expected")]  # beside bars
    assert said in message and message.endswith(".")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command("--clip", "nowhere", "--out", tmp_path / "file" / "out") == 1
    (message,) = capsys.readouterr().err.splitlines()
    assert message.endswith("file/out, found: Not a directory; name another with --out.")


@pytest.mark.parametrize("arguments", [[], ["--i3d", "a.pt"], ["--videomae", "a"], ["--clip", "a", "--frames", "0"]])
def test_arguments_that_cannot_be(command, arguments):
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert caught.value.code == 2
