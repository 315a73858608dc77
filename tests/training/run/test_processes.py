"""Real processes on this machine, by gloo: forked, so that they need not load everything again."""

import multiprocessing
import os
import queue
import signal
import socket
import time

import pytest
import torch
from accelerate import PartialState

from training.data.order import epoch_order
from training.method.learner import MAX_BAD_STEPS, DivergedError
from training.method.loop import train
from training.run.checkpoint import Checkpoints
from training.run.config import ConfigError
from training.run.folder import RunFolder
from training.run.parent import StoppedError
from training.run.processes import LostProcessError, Processes, require_equal_parts


def _process(rank, count, port, job, results):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    PartialState._reset_state()  # what was forked with the tests' own process
    try:
        processes = Processes("cpu", timeout=120)
        outcome = job(processes)
        processes.end()
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    results.put((rank, outcome))


def together(job, count=2, lost=()):
    """What `job(processes)` returns in each of `count` processes, or its error in words; those in `lost` are not waited for."""
    context = multiprocessing.get_context("fork")
    results, outcomes = context.Queue(), {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = [context.Process(target=_process, args=(rank, count, port, job, results)) for rank in range(count)]
    for member in members:
        member.start()
    try:
        while len(outcomes) < count - len(lost):
            rank, outcome = results.get(timeout=300)
            outcomes[rank] = outcome
    except queue.Empty:
        pytest.fail(f"only {sorted(outcomes)} of {count} processes came to an end")
    finally:
        for member in members:
            member.join(10)
            member.kill()
    return [outcomes.get(rank) for rank in range(count)]


def test_gradients_and_figures_are_averaged_and_missing_ones_count_as_zero():
    def job(processes):
        weights = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 3, 4)]
        weights[0].grad = torch.full((2,), 1.0 + processes.rank)
        if processes.rank == 1:
            weights[1].grad = torch.ones(3)
        figures = processes.average(weights, torch.tensor([float(processes.rank), 4.0]))
        return figures.tolist(), [None if w.grad is None else w.grad.tolist() for w in weights]

    assert together(job) == [([0.5, 4.0], [[1.5, 1.5], [0.5, 0.5, 0.5], None])] * 2


def test_one_process_is_left_as_it_is():
    weight, alone = torch.nn.Parameter(torch.zeros(2)), Processes("cpu")
    assert alone.average([weight], torch.ones(1)).tolist() == [1.0] and weight.grad is None
    assert (alone.rank, alone.count, alone.main, alone.any(False), alone.any(True)) == (0, 1, True, False, True)


def test_processes_that_see_different_files_are_told_apart():
    outcomes = together(lambda processes: processes.require_same("clips", ["a", processes.rank]))
    assert all(outcome.startswith("LostProcessError: Expected the same clips in all 2 processes") for outcome in outcomes)


def test_a_batch_that_cannot_be_shared_equally_is_refused(make_config):
    run = make_config(run={"batch": 6, "accumulate": 2}).run
    require_equal_parts(run, type("Three", (), {"count": 3}))
    with pytest.raises(ConfigError, match=r"a multiple of 2 processes times run.accumulate \(2\), found 6;"):
        require_equal_parts(run, type("Two", (), {"count": 2}))
    open_yet = make_config(run={"batch": 6, "accumulate": "auto"}).run
    require_equal_parts(open_yet, type("Two", (), {"count": 2}))
    with pytest.raises(ConfigError, match="a multiple of 4 processes, found 6;"):
        require_equal_parts(open_yet, type("Four", (), {"count": 4}))


# ---- a run of several ----


class Watched:
    """Clips, and which of them were asked for."""

    def __init__(self, clips):
        self.clips, self.asked = clips, []

    def __len__(self):
        return len(self.clips)

    def batch(self, indices, clips=True):
        self.asked += indices
        return self.clips.batch(indices, clips)


@pytest.fixture
def go(stack, make_distillation, random_clips):
    """go(config, folder, processes, before_update): a run of `train` by SGD, which unlike Adam leaves rounding errors as small as they
    are; its weights, figures and the clips that it asked for."""

    def inner(config, folder, processes=None, before_update=None, stop=lambda: False):
        run = make_distillation(stack, config, processes=processes)
        for learner in (run.student, run.fake, run.critic):
            learner.optimiser = torch.optim.SGD(learner.weights.values(), lr=0.1)
        run.student_lr = lambda step: 0.1
        update, data, figures = run.update, Watched(random_clips), []

        def watched(step, data):
            if before_update:
                before_update(run, step)
            figures.append(update(step, data))
            return dict(figures[-1])

        run.update = watched
        with RunFolder(folder, hold=run.processes.main) as held:
            train(run, data, held, lambda *_: None, lambda *_: None, stop)
        weights = [w.detach().clone() for x in (run.student, run.fake, run.critic) for w in x.weights.values()]
        return {"weights": weights, "figures": figures, "asked": data.asked}

    return inner


def config_of(make_config, **run):
    return make_config(
        run={"updates": 2, "batch": 4, "save_every": 1, "sample_every": 100} | run,
        student={"steps": [999, 499]},
        warmup={"updates": 1},
        adm={"t_max": 400, "pool": 1},  # half of the clips are not judged: one process may have none that is
    )


def written(result, path):
    torch.save(result, path)
    return "written"


def assert_alike(a, b):
    for x, y in zip(a["weights"], b["weights"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for x, y in zip(a["figures"][-len(b["figures"]) :], b["figures"], strict=True):
        assert x.keys() == y.keys() and all(x[key] == pytest.approx(y[key], rel=1e-3, abs=1e-5) for key in x)


def test_two_processes_end_as_one_and_never_see_the_same_clip_in_a_pass(go, make_config, tmp_path):
    one = go(config_of(make_config), tmp_path / "one")
    config = config_of(make_config)

    def job(processes):
        return written(go(config, tmp_path / "two", processes), tmp_path / f"{processes.rank}.pt")

    assert together(job) == ["written"] * 2
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(x, y) for x, y in zip(first["weights"], second["weights"], strict=True))
    assert first["figures"] == second["figures"]
    assert_alike(one, first)
    asked = [clip for i in range(0, 6, 2) for clip in first["asked"][i : i + 2] + second["asked"][i : i + 2]]
    assert asked == one["asked"] and sorted(asked[:5]) == sorted(epoch_order(5, 0, 0))


def test_what_is_not_finite_in_one_is_skipped_by_all_and_ends_all(go, make_config, tmp_path):
    config, seen = config_of(make_config, updates=8), []

    def job(processes):
        def poison(run, step):
            healthy = run.sdm.student_loss
            if processes.rank == 1 and step == 1:
                run.sdm.student_loss = lambda made, clips: healthy(made, clips) * float("nan")
            seen.append(run)

        try:
            go(config, tmp_path / "run", processes, poison)
        except DivergedError:
            return seen[0].student.skipped, seen[0].fake.skipped
        return "went on"

    assert together(job) == [(MAX_BAD_STEPS, 0)] * 2


def test_a_stop_asked_of_one_stops_all_and_one_alone_goes_on_from_there(go, make_config, tmp_path):
    config = config_of(make_config)
    one = go(config, tmp_path / "one")

    def job(processes):
        asked = iter([False, processes.rank == 1, False])
        return go(config, tmp_path / "two", processes, stop=lambda: next(asked))

    outcomes = together(job)
    assert outcomes == [f"{StoppedError.__name__}: Stopped after update 1 of 3; the same command goes on from there."] * 2
    assert_alike(one, go(config, tmp_path / "two"))


def test_a_process_that_is_lost_ends_the_other_with_a_sentence_and_the_run_goes_on(go, make_config, tmp_path):
    config = config_of(make_config)
    one = go(config, tmp_path / "one")

    def job(processes):
        def kill(run, step):
            if step == 2 and processes.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        return go(config, tmp_path / "two", processes, kill)

    began = time.monotonic()
    said, _ = together(job, lost=(1,))
    assert said.startswith(f"{LostProcessError.__name__}: Expected an answer of all 2 processes of this run, found one lost (")
    assert said.endswith("); the same command goes on from the last checkpoint.") and "\n" not in said
    assert time.monotonic() - began < 120
    assert Checkpoints(tmp_path / "two" / "checkpoints", 3).latest()[0] == 2
    assert_alike(one, go(config, tmp_path / "two"))
