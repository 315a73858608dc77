import pytest
import torch
from torch.nn.functional import softplus

from avdm2_nodes.diffusion.schedules import VIDEO
from training.method.adm import wins
from training.method.made import make_clips

POOL = {"pool": 2, "updates_per_student": 4, "motion": True, "relativistic": True, "normalised": True, "r2_weight": 0.1}


@pytest.fixture
def new_run(stack, make_distillation, make_config):
    """new_run(**adm): a run with these settings of ADM, whose encoder notes the batches that it sees without gradient."""

    def make(**adm):
        config = make_config(student={"steps": [499]}, sdm={"weight": 0}, adm=adm, run={"accumulate": 2})
        run = make_distillation(stack, config)
        encoder, run.batches = run.roles.encoder, []

        def noted(x_t, t, text):
            if not torch.is_grad_enabled():
                run.batches.append(len(x_t))
            return encoder(x_t, t, text)

        run.roles.encoder = noted
        return run

    return make


def made_of(run, clips, samples):
    real, text = clips.batch(list(samples))
    return make_clips(run.roles.student, real, text, samples, run.config)


def test_a_pool_is_seen_by_the_encoder_once_and_by_the_heads_as_often_as_asked(new_run, random_clips):
    run = new_run(pool=2, updates_per_student=4, r2_weight=0.1)
    turns, head_loss = [], run.adm.head_loss

    def noted(look):
        turns.append(look.made.samples[0])
        exact = run.adm.roles.encoder(*run.adm.inputs(look.made, look.number))
        run.batches.pop()
        found = head_loss(look)
        for kept, anew in zip(look.features, exact, strict=True):
            torch.testing.assert_close(kept, anew, rtol=1e-4, atol=1e-5)
        return found

    run.adm.head_loss = torch.no_grad()(noted)
    run.critic.step = lambda terms: ({}, 0.0)
    for step in range(5):
        run.update(step, random_clips)
    assert run.batches == [8] * 5  # two parts of one clip, each as the student's, a real one, and both perturbed
    by_update = [turns[i : i + 8] for i in range(0, len(turns), 8)]
    assert [update[:2] for update in by_update] == [[2 * step, 2 * step + 1] for step in range(5)]  # the newest first
    for step, update in enumerate(by_update):
        assert {sample // 2 for sample in update} <= {step - 2, step - 1, step}
    assert len({tuple(sample // 2 - step for sample in update) for step, update in enumerate(by_update)}) > 1


def test_a_pool_forgets_what_is_older(new_run, random_clips):
    run = new_run(pool=1, updates_per_student=2)
    for step in range(3):
        run.update(step, random_clips)
    assert [seen["first"] for seen in run.adm.state_dict()] == [2, 4]


def test_the_clips_of_a_pool_go_into_a_checkpoint_and_their_features_do_not(new_run, random_clips):
    run = new_run(**POOL)
    run.update(0, random_clips)
    (seen,) = run.state_dict()["adm"]
    assert set(seen) == {"first", "fake"} and seen["fake"].shape == (2, *random_clips.clips.shape[1:])
    assert "adm" not in new_run().state_dict()  # as those of runs that were begun before there was a pool


def test_each_clips_gradient_is_brought_to_one_size(new_run, random_clips):
    """Its direction, and the loss that is told, stay."""
    plain, normalised = new_run(), new_run(normalised=True)
    gradients = []
    for run in (plain, normalised):
        made, _ = made_of(run, random_clips, range(2))
        clips = made.fake.clone().requires_grad_()
        loss = run.adm.student_loss(made, clips)
        loss.backward()
        gradients.append((loss.item(), clips.grad))
    (loss, exact), (told, ours) = gradients
    assert told == pytest.approx(loss, rel=1e-6)
    for one, other in zip(exact, ours, strict=True):
        assert other.abs().mean().item() * ours.numel() == pytest.approx(1.0, rel=1e-4)
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).item() == pytest.approx(1.0, abs=1e-5)


def test_pairs_are_of_one_caption_at_one_noise_level(new_run, random_clips):
    run = new_run(relativistic=True, r1_weight=0, motion=True)
    made, clips = made_of(run, random_clips, range(2))
    x_t, t, text = run.adm.inputs(made, 0)
    assert torch.equal(t[:2], t[2:]) and torch.equal(text[:2], text[2:])
    alpha, sigma = VIDEO.alpha_sigma(t, x_t)
    noise = (x_t - alpha * torch.cat([made.fake, made.real])) / sigma
    assert noise.std().item() == pytest.approx(1.0, rel=0.1) and not torch.allclose(noise[:2], noise[2:], atol=0.1)

    fake, real = run.heads(run.roles.encoder(x_t, t, text)).mean(1).chunk(2)
    run.adm.begin([made], random_clips)
    loss, *_ = run.adm.head_loss(*run.adm.turn(0, 0))
    assert loss.item() == pytest.approx(softplus(fake - real).mean().item(), rel=1e-5)
    # The student's own: against a real clip at the same t, so between what the pair gives in either order.
    assert run.adm.student_loss(made, clips).item() > 0


def test_without_a_clip_to_judge_the_heads_learn_nothing_and_say_so(stack, make_distillation, make_config, random_clips):
    adm = POOL | {"t_max": 300, "updates_per_student": 1}
    config = make_config(student={"steps": [999, 749]}, adm=adm, run={"batch": 1})
    run = make_distillation(stack, config)
    figures = [run.update(step, random_clips) for step in range(2)]  # one of the two is the first step, judged from 749 on
    told = sorted((f["critic"] > 0, f["critic_auc"] in (0, 1), f["critic_auc"] == 0.5) for f in figures)
    assert told == [(False, False, True), (True, True, False)]


def test_pairs_are_told_apart_where_the_real_ones_logit_is_larger():
    fake, real = torch.tensor([0.0, 2.0, -1.0, 5.0]), torch.tensor([1.0, 1.0, -1.0, 6.0])
    assert wins(fake, real).item() == 2.5
    assert wins(fake[:0], real[:0]).item() == 0
