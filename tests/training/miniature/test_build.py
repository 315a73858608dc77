import json

import pytest
import torch
from safetensors.torch import load_file

from avdm2_nodes.files.stack import load_stack
from training.evaluation.feature_net import load_features
from training.miniature import build


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(build, "CLIPS", {"plain": 6, "neon": 4})


def run(tmp_path, *stages, steps=2):
    rounds = {stage: (make, [(steps, lr) for _, lr in rounds]) for stage, (make, rounds) in build.STAGES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "STAGES", rounds)
        build.main(["--work", str(tmp_path / "work"), "--stack", str(tmp_path / "stack"), "--stages", *stages])
    return tmp_path / "stack"


@pytest.mark.slow
def test_every_stage_runs_and_the_stack_loads_whole(tmp_path, small, monkeypatch):
    render_split = build.scenes.render_split
    monkeypatch.setattr(build.scenes, "render_split", lambda count, **options: render_split(min(count, 16), **options))
    monkeypatch.setattr(build, "FEATURE_CLIPS", {False: 12, True: 4})
    stack = run(tmp_path, *build.STAGES)
    loaded = load_stack(stack)
    assert loaded.teacher.config.motion_max_seq_length == 32
    assert not loaded.teacher.config.use_motion_mid_block
    assert load_features(stack / "feature_net.safetensors").config.features == 96
    assert (stack / "styles" / "neon" / "config.json").exists()
    rounds = {f"{stage}-{i + 1}" for stage, (_, rounds) in build.STAGES.items() for i in range(len(rounds))}
    assert set(json.loads((stack / "build.json").read_text())) == rounds
    assert {path.stem for path in (stack / "logs").iterdir()} == rounds
    halves = [f for f in stack.rglob("*.safetensors") if any(t.dtype == torch.float32 for t in load_file(f).values())]
    assert not halves, "weights ship in half precision"
    assert not [f for f in stack.rglob("*.json") if str(tmp_path) in f.read_text()], "no path of a machine ships"


@pytest.mark.slow
def test_a_stage_that_stopped_goes_on_to_the_same_weights(tmp_path, small, monkeypatch):
    unbroken = load_file(run(tmp_path / "a", "vae", steps=4) / "vae" / "diffusion_pytorch_model.safetensors")
    run_stage = build.run_stage

    def stopped(*args, **options):
        losses = args[3]

        def until_the_third(step, generator):
            if step == 2:
                raise KeyboardInterrupt
            return losses(step, generator)

        return run_stage(*args[:3], until_the_third, **options, save_every=1)

    monkeypatch.setattr(build, "run_stage", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", "vae", steps=4)
    monkeypatch.setattr(build, "run_stage", run_stage)
    resumed = load_file(run(tmp_path / "b", "vae", steps=4) / "vae" / "diffusion_pytorch_model.safetensors")
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_a_stage_that_is_done_is_passed_over(tmp_path, small, monkeypatch):
    run(tmp_path, "vae", steps=1)
    monkeypatch.setitem(build.STAGES, "vae", (lambda *_: pytest.fail("the stage ran again"), [(1, 1e-3)]))
    run(tmp_path, "vae", steps=1)


def test_captions_are_dropped_at_about_ten_percent():
    kept = build.dropped(["x"] * 20_000, torch.Generator().manual_seed(0))
    assert kept.count("") / len(kept) == pytest.approx(0.1, abs=0.01)
