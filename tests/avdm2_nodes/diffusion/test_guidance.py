import torch
from diffusers import DDPMScheduler

from avdm2_nodes.diffusion.guidance import predict_frames, pull_evaluations, pulled, style_pull

ABAR = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.double()


def gaussian_score(mean):
    """The exact noise prediction for frames that are N(mean, 1): of variance 1 at every t, eps = sigma (x_t - alpha mean)."""

    def eps(x_t, t, text):
        abar = ABAR[t].float().view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * (mean + 0 * text.mean()))

    return eps


def test_the_pull_is_the_difference_and_nothing_where_they_agree():
    x0, a, b = torch.randn(3, 8, 4, 2, 2).unbind(0)
    torch.testing.assert_close(style_pull(x0, a, b, 0.5), x0 + 0.5 * a - 0.5 * b)
    assert torch.equal(style_pull(x0, a, a, 3.0), x0) and torch.equal(style_pull(x0, a, b, 0.0), x0)


def test_predictions_of_a_gaussian_are_its_posterior_means():
    frames, noise = torch.randn(5, 4, 2, 2), torch.randn(1, 4, 2, 2)
    text = torch.zeros(1, 3, 8)
    for t in (20, 500, 950):
        abar = ABAR[t].float()
        x_t = abar.sqrt() * frames + (1 - abar).sqrt() * noise
        posterior = 0.7 + abar.sqrt() * (x_t - abar.sqrt() * 0.7)  # E[x0 | x_t] of N(0.7, 1)
        x0 = predict_frames(gaussian_score(0.7), frames, noise, t, text, text, 2.0)
        torch.testing.assert_close(x0, posterior, rtol=1e-3, atol=1e-3)


def test_a_clip_is_pulled_from_the_source_towards_the_style():
    clip, text = torch.randn(1, 4, 5, 2, 2), torch.zeros(1, 3, 8)
    refine = pulled(gaussian_score(2.0), gaussian_score(-1.0), text, text, 1.0, torch.Generator().manual_seed(0), t=500)
    # Posterior means differ by (1 - abar) (m_style - m_source), whatever the frame and its noise.
    expected = clip + (1 - ABAR[500].float()) * 3.0
    torch.testing.assert_close(refine(clip, 0), expected, rtol=1e-3, atol=1e-3)


def test_the_same_model_twice_pulls_nothing_and_all_frames_share_the_noise():
    seen = []

    def score(x_t, t, text):
        seen.append(x_t)
        return torch.sin(x_t)

    clip, text = torch.zeros(1, 4, 5, 2, 2), torch.zeros(1, 3, 8)
    assert torch.equal(pulled(score, score, text, text, 2.0, torch.Generator().manual_seed(0))(clip, 0), clip)
    assert all(torch.equal(x_t, x_t[:1].expand_as(x_t)) and x_t.std() > 0.1 for x_t in seen)


def test_pulls_at_chosen_steps_count_and_nothing_else_is_evaluated():
    evaluations = []

    def score(mean):
        def eps(x_t, t, text):
            evaluations.append(len(x_t))
            return gaussian_score(mean)(x_t, t, text)

        return eps

    clip, text = torch.randn(1, 4, 5, 2, 2), torch.zeros(1, 3, 8)

    def refined(step, strength=0.5, **options):
        evaluations.clear()
        noise = torch.Generator().manual_seed(0)
        return pulled(score(2.0), score(-1.0), text, text, strength, noise, t=500, **options)(clip, step)

    pull = 0.5 * (1 - ABAR[500].float()) * 3.0
    for pulls in (1, 3):
        torch.testing.assert_close(refined(2, pulls=pulls, steps=(1, 2)), clip + pulls * pull, rtol=1e-3, atol=1e-3)
        assert sum(evaluations) == 5 * pull_evaluations(1, pulls) == 2 * 5 * pulls
        refined(2, pulls=pulls, guidance=2.0)
        assert sum(evaluations) == 5 * pull_evaluations(1, pulls, 2.0) == 4 * 5 * pulls
    assert pull_evaluations(4) == 8 and pull_evaluations(4, 3, 2.0, at=(1, 2, 9)) == 24
    for refining in ({"step": 0, "steps": (1, 2)}, {"step": 1, "strength": 0.0}):
        assert torch.equal(refined(**refining), clip) and not evaluations


def test_a_style_reads_its_own_texts_and_the_source_the_student_s():
    read = {"style": [], "source": []}

    def score(name):
        def eps(x_t, t, text):
            read[name].append({int(row.max()) for row in text})
            return torch.zeros_like(x_t)

        return eps

    clip, noise = torch.zeros(1, 4, 2, 2, 2), torch.Generator().manual_seed(0)
    texts = [torch.full((1, 3, 8), float(i)) for i in range(4)]
    for guidance in (2.0, 1.0):
        pulled(score("style"), score("source"), *texts[:2], 1.0, noise, guidance=guidance, style_texts=texts[2:])(clip, 0)
    assert read == {"style": [{2, 3}, {2}], "source": [{0, 1}, {0}]}


def test_clips_of_a_batch_are_pulled_as_each_alone():
    def score(scale):
        return lambda x_t, t, text: torch.sin(scale * x_t + text.mean((1, 2))[:, None, None, None])

    clips, texts, empty = torch.randn(3, 4, 5, 2, 2), torch.randn(3, 3, 8), torch.zeros(1, 3, 8)

    def refined(samples):
        noise = [torch.Generator().manual_seed(i) for i in samples]
        return pulled(score(2.0), score(1.0), texts[samples], empty, 1.0, noise, guidance=2.0, pulls=2)(clips[samples], 0)

    torch.testing.assert_close(refined([0, 1, 2]), torch.cat([refined([i]) for i in range(3)]))
    one = pulled(score(2.0), score(1.0), texts[:1], empty, 1.0, torch.Generator().manual_seed(0), guidance=2.0, pulls=2)(
        clips[:1], 0
    )
    torch.testing.assert_close(one, refined([0]))
