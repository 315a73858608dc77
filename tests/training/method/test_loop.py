import copy
import json
import math
from operator import eq

import pytest
import torch
from torch.nn.functional import softplus

from avdm2_nodes.diffusion.samplers import predict_x0
from avdm2_nodes.diffusion.schedules import IMAGE, VIDEO
from training.method.learner import MAX_BAD_STEPS, DivergedError
from training.method.loop import train
from training.method.made import make_clips
from training.run.checkpoint import Checkpoints
from training.run.folder import RunFolder, RunFolderError
from training.run.meter import MEASURED
from training.run.randomness import chain_steps

HEADS = "critic", "critic_auc", "critic_norm"  # figures of an update in which they learn


class Stopped(BaseException):
    """Stands for a kill."""


def flat(node, place=()):
    """{place: leaf} of a nested state, the tensors copied."""
    if isinstance(node, dict):
        return {k: v for key, part in node.items() for k, v in flat(part, (*place, str(key))).items()}
    if isinstance(node, (list, tuple)):
        return {k: v for i, part in enumerate(node) for k, v in flat(part, (*place, str(i))).items()}
    return {".".join(place): node.detach().clone() if isinstance(node, torch.Tensor) else node}


def differing(a, b):
    """The places where two states are not bitwise the same."""
    a, b = flat(a), flat(b)
    same = {k for k in a.keys() & b.keys() if (torch.equal if isinstance(a[k], torch.Tensor) else eq)(a[k], b[k])}
    return sorted((a.keys() | b.keys()) - same)


def moved(weights, before):
    return [name for name, p in weights.items() if not torch.equal(p.detach(), before[name])]


@pytest.fixture
def go(stack, make_distillation, random_clips):
    """go(config, folder, stop_after=None): trains as `train` does, up to a kill after so many steps."""

    def inner(config, folder, stop_after=None, poison=None):
        run = make_distillation(stack, config)
        if poison:
            poison(run)

        def log(done, figures):
            if stop_after is not None and done > stop_after:
                raise Stopped

        with RunFolder(folder) as held:
            train(run, random_clips, held, log, lambda step: None)
        return run

    return inner


def stats(folder):
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", *MEASURED)} for line in lines]


# ---- exact resume ----


@pytest.mark.parametrize(
    ("model", "adm"),
    [({"train": "all"}, {}), ({"train": "motion+lora", "share_base": True}, {"pool": 2, "updates_per_student": 3})],
    ids=["all", "adapters on a shared base, and a pool"],
)
def test_a_run_that_was_stopped_and_resumed_ends_bitwise_as_one_that_was_not(go, make_config, tmp_path, model, adm):
    config = make_config(
        run={"updates": 3, "save_every": 1, "sample_every": 2},
        model=model,
        adm=adm,
        student={"steps": [999, 499]},
        warmup={"updates": 2},
    )
    straight = go(config, tmp_path / "straight")
    # One after another in the same run: within the critics' warm-up, before and after the student's first update.
    for k in (1, 2, 4):
        with pytest.raises(Stopped):
            go(config, tmp_path / "stopped", stop_after=k)
        assert Checkpoints(tmp_path / "stopped" / "checkpoints", 3).latest()[0] == k
    resumed = go(config, tmp_path / "stopped")
    assert differing(straight.state_dict(), resumed.state_dict()) == []
    assert stats(tmp_path / "straight") == stats(tmp_path / "stopped")
    assert [line["update"] for line in stats(tmp_path / "stopped")] == [1, 2, 3, 4, 5]


def test_a_run_is_resumed_from_an_older_checkpoint_when_it_was_stopped_between_two(go, make_config, tmp_path):
    config = make_config(run={"updates": 4, "save_every": 2}, student={"steps": [499]})
    straight = go(config, tmp_path / "straight")
    with pytest.raises(Stopped):
        go(config, tmp_path / "stopped", stop_after=2)
    assert [line["update"] for line in stats(tmp_path / "stopped")] == [1, 2, 3]
    newest = Checkpoints(tmp_path / "stopped" / "checkpoints", 3).paths()[-1]
    assert newest.name == "step-00000002.safetensors"
    resumed = go(config, tmp_path / "stopped")
    assert differing(straight.state_dict(), resumed.state_dict()) == []
    assert stats(tmp_path / "straight") == stats(tmp_path / "stopped")


def test_a_run_may_be_made_longer(go, make_config, tmp_path):
    long = make_config(run={"updates": 3}, student={"steps": [499]})
    straight = go(long, tmp_path / "straight")
    go(make_config(run={"updates": 1}, student={"steps": [499]}), tmp_path / "two")
    assert differing(straight.state_dict(), go(long, tmp_path / "two").state_dict()) == []


@pytest.mark.parametrize("changes", [{"student": {"lr": 1e-4}}, {"model": {"train": "motion"}}, {"run": {"batch": 3}}])
def test_other_settings_are_refused_with_a_sentence_and_change_nothing(go, make_config, tmp_path, changes):
    go(make_config(run={"updates": 1}, student={"steps": [499]}), tmp_path)
    before = sorted((p.name, p.stat().st_size) for p in tmp_path.rglob("*"))
    sections = {"run": {"updates": 1}, "student": {"steps": [499]}}
    other = make_config(**{name: sections.get(name, {}) | changes.get(name, {}) for name in sections | changes})
    with pytest.raises(RunFolderError, match="found"):
        go(other, tmp_path)
    assert sorted((p.name, p.stat().st_size) for p in tmp_path.rglob("*")) == before


def test_after_training_the_averaged_weights_are_in_the_student(go, make_config, tmp_path):
    run = go(make_config(run={"updates": 2}, student={"steps": [499], "ema": 0.5}), tmp_path)
    _, state = Checkpoints(tmp_path / "checkpoints", 3).latest()
    average, live = state["ema"]["shadow"], state["student"]["weights"]
    assert all(torch.equal(p, average[name]) for name, p in run.roles.student_weights.items())
    assert any(not torch.equal(average[name], live[name]) for name in live)


def test_samples_are_shown_with_the_averaged_weights(stack, make_distillation, make_config, random_clips, tmp_path):
    run, seen = make_distillation(stack, make_config(run={"updates": 4, "sample_every": 2}, student={"steps": [499]})), {}
    weights, shadow = run.roles.student_weights, run.ema.shadow
    name = next(iter(weights))

    def log(step, figures):
        seen[step] = shadow[name].clone()

    def show(step):
        assert torch.equal(weights[name], seen[step])
        seen["shown"] = [*seen.get("shown", []), step]

    with RunFolder(tmp_path) as held:
        assert train(run, random_clips, held, log, show) == 4
    assert seen["shown"] == [2]


# ---- what is not finite ----


def poison(steps):
    """Makes the student's adversarial loss NaN at the given calls."""

    def apply(run):
        healthy, calls = run.adm.student_loss, []

        def adm(made, clips):
            calls.append(None)
            loss = healthy(made, clips)
            return loss * math.nan if len(calls) - 1 in steps else loss

        run.adm.student_loss = adm

    return apply


def test_a_step_that_is_not_finite_is_skipped_and_counted(stack, make_distillation, make_config, random_clips):
    run = make_distillation(stack, make_config(student={"steps": [499]}))
    poison({1})(run)
    run.update(0, random_clips)
    before, state = flat(dict(run.roles.student_weights)), flat(run.student.optimiser.state_dict())
    figures = run.update(1, random_clips)
    assert math.isnan(figures["adm"]) and math.isnan(figures["student_norm"])
    assert not moved(run.roles.student_weights, before)
    assert differing(state, run.student.optimiser.state_dict()) == []
    assert (run.student.skipped, run.student.skipped_in_a_row, run.student.steps) == (1, 1, 1)
    assert run.fake.skipped == run.critic.skipped == 0 and run.fake.steps == run.critic.steps == 2
    run.update(2, random_clips)
    assert moved(run.roles.student_weights, before)
    assert (run.student.skipped, run.student.skipped_in_a_row) == (1, 0)


def test_after_several_in_a_row_the_run_stops_and_the_last_checkpoint_stands(go, make_config, tmp_path):
    config = make_config(run={"updates": 12}, student={"steps": [499]})
    with pytest.raises(DivergedError, match="student in a row") as caught:
        go(config, tmp_path, poison=poison({0, 2, 3, 4, 5, 6}))
    assert "\n" not in str(caught.value)
    assert len(stats(tmp_path)) == 6  # the fifth in a row is the seventh update
    assert [line.get("student skipped") for line in stats(tmp_path)] == [1, 1, 2, 3, 4, 5]
    assert stats(tmp_path)[0]["adm"] is None
    step, state = Checkpoints(tmp_path / "checkpoints", 3).latest()
    assert step == 6 and MAX_BAD_STEPS == 5
    leaves = [leaf for leaf in flat(state).values() if isinstance(leaf, torch.Tensor)]
    assert all(leaf.isfinite().all() for leaf in leaves)


def test_an_infinite_gradient_behind_a_finite_loss_is_skipped_too(stack, make_distillation, make_config, random_clips):
    run = make_distillation(stack, make_config(student={"steps": [499]}))
    name, weight = next(iter(run.roles.student_weights.items()))
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = flat(dict(run.roles.student_weights))
    run.update(0, random_clips)
    assert run.student.skipped == 1 and not moved(run.roles.student_weights, before) and name


# ---- who moves when ----


@pytest.mark.parametrize("steps", [[499], [999, 749]])
def test_accumulating_gradients_changes_nothing(stack, make_distillation, make_config, random_clips, steps):
    """Not where ADM leaves one of the two clips, that of step 999, unjudged either."""
    runs = []
    for accumulate in (1, 2):
        config = make_config(run={"accumulate": accumulate}, student={"steps": steps}, adm={"t_max": 700})
        run = make_distillation(stack, config)
        for learner in (run.student, run.fake, run.critic):  # Adam blows noise about zero up to whole steps
            learner.optimiser = torch.optim.SGD(learner.weights.values(), lr=0.1)
            learner.lr = 0.1
        figures = [run.update(step, random_clips) for step in range(2)]
        runs.append((run, figures))
    (whole, a), (cut, b) = runs
    for part in ("student", "fake", "critic"):
        mine, theirs = getattr(whole, part).weights, getattr(cut, part).weights
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-6)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and all(x[key] == pytest.approx(y[key], rel=1e-3) for key in x)


def test_in_a_warm_up_without_guidance_the_student_stands_still(stack, make_distillation, make_config, random_clips):
    run = make_distillation(stack, make_config(warmup={"updates": 1, "guidance": 1.0}, student={"steps": [499]}))
    before = flat(run.state_dict())
    figures = run.update(0, random_clips)
    assert set(figures) == {"fake", "fake_norm", *HEADS}
    changed = differing(before, run.state_dict())
    assert changed and {name.split(".")[0] for name in changed} == {"fake", "critic"}
    assert {"sdm", "adm", "student_norm"} < run.update(1, random_clips).keys()
    assert moved(run.roles.student_weights, {k.removeprefix("student.weights."): v for k, v in before.items()})


def test_in_the_warm_up_the_student_learns_what_the_guided_teacher_makes_of_its_states(
    stack, make_distillation, make_config, random_clips
):
    warmup = {"updates": 60, "guidance": 4.0, "substeps": 2, "lr": 1e-4}
    run = make_distillation(stack, make_config(warmup=warmup, student={"steps": [499]}))
    run.empty_text = torch.randn(run.empty_text.shape, generator=torch.Generator().manual_seed(3))
    real, text = random_clips.batch([0, 1, 2, 3, 4])

    def distance():
        """From the student's x0 to the teacher's after two guided DDIM steps, 499 and 250, from noise that was not trained on."""
        x_t = torch.randn(real.shape, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            y = x_t
            for t, after in ((499, 250), (250, None)):
                unguided, plain = (run.roles.teacher(y, torch.full((5,), t), c) for c in (run.empty_text.expand_as(text), text))
                eps = unguided + 4.0 * (plain - unguided)
                abar = VIDEO.alphas_cumprod[t].item()
                x0 = (y - (1 - abar) ** 0.5 * eps) / abar**0.5
                if after:
                    abar = VIDEO.alphas_cumprod[after].item()
                    y = abar**0.5 * x0 + (1 - abar) ** 0.5 * eps
            return (predict_x0(run.roles.student, x_t, 499, text) - x0).norm()

    before = distance()
    figures = [run.update(step, random_clips) for step in range(60)]
    assert all(set(f) == {"guidance", "student_norm", "fake", "fake_norm", *HEADS} for f in figures)
    assert distance() < 0.75 * before


@pytest.mark.parametrize(("off", "idle"), [("adm", "critic"), ("sdm", "fake")])
def test_either_loss_alone(stack, make_distillation, make_config, random_clips, off, idle):
    run = make_distillation(stack, make_config(**{off: {"weight": 0}}, student={"steps": [499]}))
    before = flat(run.state_dict())
    figures = run.update(0, random_clips)
    other = {"adm": "sdm", "sdm": "adm"}[off]
    busy = {"critic": "fake", "fake": "critic"}[idle]
    assert set(figures) == {other, "student_norm", *(HEADS if busy == "critic" else ("fake", "fake_norm"))}
    changed = {name.split(".")[0] for name in differing(before, run.state_dict())}
    assert changed == {"student", "ema", busy}


def test_adm_may_start_later_for_the_student_while_its_critic_learns(stack, make_distillation, make_config, random_clips):
    run = make_distillation(stack, make_config(adm={"start_update": 1}, warmup={"updates": 1}, student={"steps": [499]}))
    figures = [run.update(step, random_clips) for step in range(3)]
    assert ["adm" in f for f in figures] == [False, False, True]
    assert ["sdm" in f for f in figures] == [False, True, True]
    assert all("critic" in f for f in figures)


def test_until_adm_begins_a_student_without_another_loss_waits(stack, make_distillation, make_config, random_clips):
    run = make_distillation(stack, make_config(adm={"start_update": 1}, sdm={"weight": 0}, student={"steps": [499]}))
    before = flat(run.state_dict())
    assert set(run.update(0, random_clips)) == {*HEADS}
    assert {name.split(".")[0] for name in differing(before, run.state_dict())} == {"critic"}
    assert {"adm", "student_norm"} < run.update(1, random_clips).keys()


def test_the_critics_may_begin_late_in_the_warm_up(stack, make_distillation, make_config, random_clips):
    run = make_distillation(stack, make_config(warmup={"updates": 2, "critics_from": 1}, student={"steps": [499]}))
    before = flat(run.state_dict())
    assert set(run.update(0, random_clips)) == {"guidance", "student_norm"}
    assert {name.split(".")[0] for name in differing(before, run.state_dict())} == {"student", "ema"}
    assert {"guidance", "fake", "critic"} < run.update(1, random_clips).keys()


def test_clips_of_the_data_are_asked_for_where_a_critic_looks_at_them(stack, make_distillation, make_config, random_clips):
    warmup, asked = {"updates": 2, "critics_from": 1}, []
    for adm in (0.1, 0):
        run = make_distillation(stack, make_config(warmup=warmup, adm={"weight": adm}, student={"steps": [499]}))
        data = type("Data", (), {"__len__": lambda _: len(random_clips)})()
        data.batch = lambda indices, clips=True: asked.append(clips) or random_clips.batch(indices, clips)
        for step in range(3):
            run.update(step, data)
    assert asked == [False, True, True] + [False] * 3


def test_distribution_matching_begins_from_the_averaged_weights(stack, make_distillation, make_config, random_clips):
    run = make_distillation(stack, make_config(warmup={"updates": 3, "lr": 1e-2}, student={"steps": [499]}))
    for step in range(3):
        run.update(step, random_clips)
    averaged = {name: tensor.clone() for name, tensor in run.ema.shadow.items()}
    assert moved(run.roles.student_weights, averaged)
    run.student.step = lambda losses, lr: ({}, 0.0)  # what the update begins from is still there after it
    run.update(3, random_clips)
    assert not moved(run.roles.student_weights, averaged)


def test_the_critics_learn_as_often_as_asked_and_on_fresh_noise(stack, make_distillation, make_config, random_clips):
    updates = {"updates_per_student": 3}
    run = make_distillation(stack, make_config(sdm=updates, adm=updates | {"r1_weight": 0.1}, student={"steps": [499]}))
    losses = []
    fake_loss, head_loss = run.sdm.fake_loss, run.adm.head_loss

    def of_heads(look):
        found = head_loss(look)
        losses.append(found[0])
        return found

    run.sdm.fake_loss = lambda made, turn: losses.append(fake_loss(made, turn)) or losses[-1]
    run.adm.head_loss = of_heads
    run.update(0, random_clips)
    assert (run.student.steps, run.fake.steps, run.critic.steps) == (1, 3, 3)
    assert len({loss.item() for loss in losses}) == 6 and all(loss.isfinite() for loss in losses)


def test_the_students_learning_rate_rises_in_each_phase(stack, make_distillation, make_config, random_clips):
    student = {"steps": [499], "warmup": 2, "lr": 1e-3}
    run = make_distillation(stack, make_config(student=student, warmup={"updates": 3, "lr": 4e-3}))
    rates = []
    for step in range(6):
        run.update(step, random_clips)
        rates.append(run.student.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([2e-3, 4e-3, 4e-3, 0.5e-3, 1e-3, 1e-3])


def test_every_step_of_the_chain_is_trained_equally(stack, make_distillation, make_config, random_clips):
    run, trained = make_distillation(stack, make_config()), []
    real, text = random_clips.batch([0, 1])

    def student(x_t, t, text):
        if torch.is_grad_enabled():
            trained.extend(t.tolist())
        return x_t

    for first in range(0, 16, 2):
        make_clips(student, real, text, range(first, first + 2), run.config)
    assert {t: trained.count(t) for t in trained} == {999: 4, 749: 4, 499: 4, 249: 4}


@pytest.mark.parametrize("phased", [True, False])
def test_a_step_is_judged_from_the_noise_of_the_next_on(stack, make_distillation, make_config, random_clips, phased):
    """Those of the video schedule for ADM, and on the image schedule for SDM the timesteps with as much noise."""
    config = make_config(student={"steps": [999, 749, 499, 249], "phased": phased}, sdm={"guidance": 2.0})
    run = make_distillation(stack, config)
    video, image = [], []
    encoder, real_score = run.roles.encoder, run.roles.real_score
    run.roles.encoder = lambda x_t, t, text: video.append(t) or encoder(x_t, t, text)
    run.roles.real_score = lambda x_t, t, text: image.append(t[: len(t) // 2]) or real_score(x_t, t, text)
    real, text = random_clips.batch([0, 1])
    nexts = []
    for first in range(0, 40, 2):
        samples = range(first, first + 2)
        nexts.append(torch.tensor([749, 499, 249, 0])[chain_steps(samples, 4, run.config.run.seed)])
        with torch.no_grad():
            made, clips = make_clips(run.roles.student, real, text, samples, config)
            run.sdm.student_loss(made, clips), run.adm.student_loss(made, clips)
    t, frames_t, least = torch.cat(video), torch.cat(image), torch.cat(nexts)
    noisy_enough = t >= least
    frames_noisy_enough = IMAGE.alphas_cumprod[frames_t] <= VIDEO.alphas_cumprod[least.repeat_interleave(len(frames_t) // 40)]
    assert (noisy_enough.all() and frames_noisy_enough.all()) == phased
    assert t[least == 0].min() < 249  # the last step's are judged at all


def test_adm_leaves_out_the_clips_that_it_could_judge_above_its_range_only(stack, make_distillation, make_config, random_clips):
    config = make_config(student={"steps": [999, 749, 499, 249]}, adm={"t_min": 100, "t_max": 400})
    run, seen = make_distillation(stack, config), []
    encoder = run.roles.encoder
    run.roles.encoder = lambda x_t, t, text: seen.append(t) or encoder(x_t, t, text)
    real, text = random_clips.batch([0, 1, 2, 3])
    for first in range(0, 40, 4):
        with torch.no_grad():
            made, clips = make_clips(run.roles.student, real, text, range(first, first + 4), config)
            run.adm.student_loss(made, clips)
            kept = (made.next_t < 400).tolist()
            one_by_one = [run.adm.student_loss(made[[i]], clips[[i]]).item() for i in range(4)]
            assert [value != 0 for value in one_by_one] == kept
            assert run.adm.student_loss(made, clips).item() == pytest.approx(sum(one_by_one) / 4, rel=1e-4)
            run.adm.begin([made], random_clips)
            run.adm.head_loss(*run.adm.turn(0, 0))
    t = torch.cat(seen)
    assert t.min() >= 100 and t.max() <= 400 and t.min() < 249


@pytest.mark.parametrize(("t", "factor"), [(999, 0.0402), (749, 0.155), (249, 1.0)])
def test_the_gradient_into_x0_is_damped_by_alpha_over_sigma(stack, make_distillation, make_config, random_clips, t, factor):
    """Without it the gradient of eps would be magnified by sigma / alpha."""
    run = make_distillation(stack, make_config(student={"steps": [t]}))
    scale = torch.ones((), requires_grad=True)
    run.roles.student = lambda x_t, t, text: scale * x_t
    real, text = random_clips.batch([0])
    _, clips = make_clips(run.roles.student, real, text, range(1), run.config)
    clips.sum().backward()
    alpha, sigma = {999: (0.0402, 0.99919), 749: (0.1533, 0.98818), 249: (0.75556, 0.65508)}[t]
    x_t = clips.detach().sum() / ((1 - sigma) / alpha)
    assert scale.grad.item() == pytest.approx((-sigma / alpha * x_t * factor).item(), rel=0.05)


def test_bf16_keeps_the_gradient_of_a_later_step(stack, make_distillation, make_config, random_clips):
    """The copies that the steps without gradient compute with are those that the last one learns by."""
    norms = []
    for precision in ("float32", "bf16"):
        config = make_config(run={"precision": precision}, student={"steps": [999, 499]})
        run = make_distillation(stack, config)
        real, text = random_clips.batch([0, 1])
        made, clips = make_clips(run.roles.student, real, text, range(2), config)  # one sample at each of the two steps
        run.student.backward(run.adm.student_loss(made, clips))
        norms.append({name: p.grad.norm().item() for name, p in run.roles.student_weights.items()})
    exact, half = norms
    assert sum(half.values()) == pytest.approx(sum(exact.values()), rel=0.2)
    assert all(half[name] > 0 for name in exact if exact[name] > 1e-3 * max(exact.values()))


def test_in_bf16_a_state_holds_float32_masters_and_goes_on_bitwise(stack, make_distillation, make_config, random_clips):
    """So a run that was begun with float32 networks, or under autocast, goes on too: a state has the same names for all."""
    model = {"train": "motion+lora", "share_base": True}
    runs = []
    for _ in range(2):
        config = make_config(run={"precision": "bf16", "batch": 1}, model=model, student={"steps": [499]}, adm={"r1_weight": 0})
        runs.append(make_distillation(stack, config))
    straight, resumed = runs
    straight.update(0, random_clips)
    state = copy.deepcopy(straight.state_dict())
    whole = make_distillation(stack, make_config(model=model))
    assert flat(state).keys() > flat(whole.state_dict()).keys()  # it has the optimisers' states beside
    assert all(x.dtype == torch.float32 for name in ("student", "fake", "critic") for x in state[name]["weights"].values())
    resumed.load_state_dict(state)
    for run in runs:
        run.update(1, random_clips)
    assert differing(straight.state_dict(), resumed.state_dict()) == []
    for learner in (resumed.student, resumed.fake):
        assert learner.steps == 2
        assert all(torch.equal(learner.copies[name], weight.bfloat16()) for name, weight in learner.weights.items())
    average = {name: tensor.clone() for name, tensor in resumed.ema.shadow.items()}
    resumed.swap()
    assert all(torch.equal(weight, average[name].bfloat16()) for name, weight in resumed.student.copies.items())


# ---- what a GPU is given to do ----


@pytest.mark.parametrize(
    ("accumulate", "r1_weight", "expected"), [(1, 0.0, [8]), (2, 0.0, [8]), (1, 0.1, [6, 6]), (2, 0.1, [6, 6])]
)
def test_what_the_critics_judge_is_encoded_in_one_batch(
    stack, make_distillation, make_config, random_clips, accumulate, r1_weight, expected
):
    """Of two turns, of two parts, or both, as long as it is of no more than eight clips; each clip's judgement is its own."""
    updates = {"updates_per_student": 2}
    config = make_config(run={"accumulate": accumulate}, adm=updates | {"r1_weight": r1_weight}, student={"steps": [499]})
    run, batches, losses = make_distillation(stack, config), [], {}
    encoder = run.roles.encoder

    def seen(x_t, t, text):
        if not torch.is_grad_enabled():
            batches.append(len(x_t))
        return encoder(x_t, t, text)

    run.roles.encoder = seen
    original, begun = run.adm.head_loss, copy.deepcopy(run.heads.state_dict())

    def head_loss(look):
        found = original(look)
        losses[look.made.samples[0], look.number] = look.made, found[0]
        return found

    run.adm.head_loss = head_loss
    run.update(0, random_clips)
    assert batches == expected
    run.heads.load_state_dict(begun)
    for (_, turn), (made, loss) in losses.items():
        if turn == 0:  # in the next the heads have learnt
            x_t, t, text = run.adm.inputs(made, turn)
            singly = [run.heads(encoder(*(y[i : i + 1] for y in (x_t, t, text)))) for i in range(len(x_t))]
            fake, real, *near = torch.cat(singly).chunk(run.adm.kinds)
            by_hand = softplus(fake).mean() + softplus(-real).mean()
            if near:
                by_hand = by_hand + r1_weight * (real - near[0]).square().mean() / 0.1**2
            assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_an_update_waits_for_the_device_where_losses_are_checked_only(
    stack, make_distillation, make_config, random_clips, monkeypatch
):
    """Timesteps and places in a batch, which are whole numbers, lie on the CPU and may be read there."""
    run = make_distillation(stack, make_config(warmup={"updates": 1}, student={"steps": [999, 499]}, adm={"t_max": 700}))
    inside, waits = [], []
    original = torch.Tensor.tolist

    def recorded(name, wait):
        def method(tensor, *args):
            if tensor.is_floating_point() and not inside:
                waits.append(name)
            return wait(tensor, *args)

        return method

    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, recorded(name, getattr(torch.Tensor, name)))
    assert torch.Tensor.tolist is not original
    steps = 0
    for learner in (run.student, run.fake, run.critic):
        for optimiser in (learner.optimiser,):
            step = optimiser.step
            optimiser.step = lambda step=step: (inside.append(1), step(), inside.pop())
    for update in range(3):
        steps += 3
        run.update(update, random_clips)
    assert waits == ["tolist"] * steps
