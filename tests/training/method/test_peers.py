from itertools import pairwise

import pytest
import torch

from avdm2_nodes.diffusion.schedules import VIDEO
from avdm2_nodes.diffusion.unets import encoder_features
from training.method.discriminator import frame_by_frame, heads_for
from training.method.losses import pseudo_huber
from training.method.peers import consistent_x0, peer_losses, teacher_step
from training.run.config import ConfigError

KINDS = ["consistency", "progressive", "motion-consistency"]


@pytest.fixture
def new_run(stack, make_distillation, make_config):
    def make(kind, **changes):
        run = make_distillation(stack, make_config(method={"kind": kind}, run={"batch": 4} | changes.pop("run", {}), **changes))
        run.empty_text = torch.randn(run.empty_text.shape, generator=torch.Generator().manual_seed(3))
        return run

    return make


def snapshot(weights):
    return {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.mark.parametrize(("kind", "figures"), list(zip(KINDS, [{"consistency"}, {"adm"}, {"consistency", "adm"}], strict=True)))
def test_each_moves_the_student_and_only_its_own_critic(new_run, random_clips, kind, figures):
    run = new_run(kind, warmup={"updates": 0, "substeps": 2})
    student, fake, heads = (snapshot(x.weights) for x in (run.student, run.fake, run.critic))
    found = run.update(0, random_clips)
    heads_learn = {"critic", "critic_auc", "critic_norm"} if kind != "consistency" else set()
    assert set(found) == figures | heads_learn | {"student_norm"} and all(x == x for x in found.values())
    for before, learner, moves in (
        (student, run.student, True),
        (fake, run.fake, False),
        (heads, run.critic, bool(heads_learn)),
    ):
        assert any(not torch.equal(before[name], weight) for name, weight in learner.weights.items()) == moves


def test_a_step_of_the_teacher_is_guided_ddim():
    """By hand: a network whose prediction hangs on state, time and text."""

    def predict(x_t, t, text):
        return 0.1 * x_t + text.mean((1, 2))[:, None, None, None, None] + 1e-4 * t[:, None, None, None, None]

    x, text, empty = torch.randn(2, 1, 1, 2, 2), torch.ones(2, 3, 4), torch.zeros(1, 3, 4)
    t, until = torch.tensor([999, 499]), torch.tensor([749, 0])
    ours = teacher_step(predict, x, t, until, text, empty, 3.0, 2)
    for i, times in enumerate([(999, 874, 749), (499, 250, 0)]):
        y = x[i].double()
        for now, after in pairwise(times):
            eps = 0.1 * y + 3.0 * 1.0 + 1e-4 * now  # of the empty text 0, of the other 1
            a, b = VIDEO.alphas_cumprod[now].item(), VIDEO.alphas_cumprod[after].item()
            y = b**0.5 * (y - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
        torch.testing.assert_close(ours[i].double(), y, rtol=1e-3, atol=1e-3)


def test_a_consistency_function_leaves_clean_clips_alone():
    x, text = torch.randn(2, 4, 2, 8, 8), torch.zeros(2, 1, 1)
    found = consistent_x0(lambda x_t, t, text: torch.full_like(x_t, 0.5), x, torch.tensor([0, 999]), text)
    torch.testing.assert_close(found[0], x[0])
    abar = VIDEO.alphas_cumprod[999].item()
    torch.testing.assert_close(found[1], (x[1] - (1 - abar) ** 0.5 * 0.5) / abar**0.5, rtol=1e-4, atol=1e-4)


def test_the_target_of_consistency_is_made_by_the_averaged_weights_and_leaves_the_live_ones_alone(new_run, random_clips):
    run = new_run("consistency")
    for average in run.ema.shadow.values():
        average.mul_(0.5)
    live, averages = snapshot(run.student.weights), snapshot(run.ema.shadow)
    real, text = random_clips.batch([0, 1, 2, 3])
    made, clips = run.make_clips(real, text, range(4))
    assert all(torch.equal(live[name], weight) for name, weight in run.student.weights.items())
    assert all(torch.equal(averages[name], weight) for name, weight in run.ema.shadow.items())
    guidance = run.config.warmup.guidance
    with torch.no_grad():
        after = teacher_step(run.roles.teacher, made.x_t, made.t, made.next_t, text, run.empty_text, guidance, 1)
        assert torch.equal(made.t - made.next_t, torch.full((4,), 20).minimum(made.t))
        torch.testing.assert_close(clips, consistent_x0(run.roles.student, made.x_t, made.t, text))
        run.swap()
        torch.testing.assert_close(made.target, consistent_x0(run.roles.student, after, made.next_t, text))
    assert made.target.requires_grad is False and clips.requires_grad


def test_progressive_distillation_regresses_and_then_judges_the_states_of_the_next_step(new_run, random_clips):
    run = new_run("progressive", warmup={"updates": 1, "substeps": 2}, adm={"r1_weight": 0})
    assert set(run.update(0, random_clips)) == {"guidance", "student_norm", "critic", "critic_auc", "critic_norm"}
    real, text = random_clips.batch([0, 1, 2, 3])
    made, clips = run.make_clips(real, text, range(4))
    assert sorted(made.t.tolist()) == [249, 499, 749, 999] and sorted(made.next_t.tolist()) == [0, 249, 499, 749]
    with torch.no_grad():
        eps = run.roles.student(made.x_t, made.t, text)
        expected = VIDEO.diffuse(VIDEO.x0_from_eps(made.x_t, eps, made.t), eps, made.next_t)
        taught = teacher_step(
            run.roles.teacher, made.x_t, made.t, made.next_t, text, run.empty_text, run.config.warmup.guidance, 2
        )
    torch.testing.assert_close(clips, expected)
    torch.testing.assert_close(made.real, taught)
    x_t, t, _ = run.adm.inputs(made, 0)
    assert torch.equal(x_t, torch.cat([made.fake, made.real])) and torch.equal(t, torch.cat([made.next_t, made.next_t]))


def test_motion_consistency_sees_nothing_of_what_stays_the_same(new_run, random_clips):
    run = new_run("motion-consistency")
    made, clips = run.make_clips(*random_clips.batch([0, 1, 2, 3]), range(4))
    loss = peer_losses("motion-consistency", made, clips, True)["consistency"]
    moved = peer_losses("motion-consistency", made, clips + torch.randn(4, 4, 1, 8, 8), True)["consistency"]
    assert loss.item() == pytest.approx(moved.item(), rel=1e-4) and loss.item() > 0


def test_half_of_the_states_of_motion_consistency_are_the_students_own(new_run, random_clips):
    run = new_run("motion-consistency")
    real, text = random_clips.batch([0, 1, 2, 3])
    data, _ = run.make_clips(real, text, range(4))
    own, _ = run.make_clips(real, text, range(4, 8))
    assert set(own.t.tolist()) == {999, 749, 499, 249}
    run.roles.student = lambda x_t, t, text: torch.zeros_like(x_t)
    again, _ = run.make_clips(real, text, range(4))
    torch.testing.assert_close(data.x_t, again.x_t)  # hangs on no student
    other, _ = run.make_clips(real, text, range(4, 8))
    late = own.t < 999
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(own.x_t[late], other.x_t[late], strict=True))


def test_frames_are_judged_alone(stack, make_config):
    config = make_config(method={"kind": "motion-consistency"}, adm={"motion": True})
    encoder = frame_by_frame(lambda x_t, t, text: encoder_features(stack.teacher, x_t, t, text))
    x, t, text = torch.randn(2, 4, 3, 8, 8), torch.tensor([100, 500]), torch.randn(2, 32, 32)
    with torch.no_grad():
        features = encoder(x, t, text)
        heads = heads_for([f.shape[1] for f in features], config)
        logits = heads(features).unflatten(1, (3, -1))
        x[:, :, 1] = torch.randn(2, 4, 8, 8)
        other = heads(encoder(x, t, text)).unflatten(1, (3, -1))
    torch.testing.assert_close(logits[:, [0, 2]], other[:, [0, 2]])
    assert not torch.allclose(logits[:, 1], other[:, 1], atol=1e-3)


def test_pseudo_huber_is_its_closed_form():
    assert pseudo_huber(torch.tensor([3.0, 0.0]), torch.zeros(2), c=4.0).item() == pytest.approx((5 - 4) / 2)


def test_settings_that_no_peer_has_are_refused(make_config):
    with pytest.raises(ConfigError, match=r"adm\.pool: expected 0 where method\.kind is progressive, found 4"):
        make_config(method={"kind": "progressive"}, adm={"pool": 4})
    with pytest.raises(ConfigError, match=r"method\.kind: expected avdm2 where model\.train is style, found consistency"):
        make_config(method={"kind": "consistency"}, model={"train": "style"})
