import pytest
import torch

from avdm2_nodes.diffusion.unets import encoder_features
from training.method.discriminator import DiscriminatorHeads


@pytest.mark.parametrize("shape", [(2, 4, 8, 8, 8), (1, 4, 3, 16, 8), (1, 4, 1, 8, 8), (1, 4, 2, 6, 10)])
def test_a_logit_for_every_place_of_every_frame_at_the_middle_scale(stack, shape):
    text = torch.randn(shape[0], 32, 32)
    with torch.no_grad():
        features = encoder_features(stack.teacher, torch.randn(shape), torch.full((shape[0],), 500), text)
        logits = DiscriminatorHeads([f.shape[1] for f in features], 16)(features)
    places = features[1].shape[3] * features[1].shape[4]
    assert logits.shape == (shape[0], shape[2] * places) and logits.isfinite().all()


def test_every_scale_counts_and_a_scales_loudness_does_not():
    torch.manual_seed(0)
    heads = DiscriminatorHeads([8, 8, 16], 16)
    features = [torch.randn(1, 8, 2, 8, 8), torch.randn(1, 8, 2, 4, 4), torch.randn(1, 16, 2, 2, 2)]
    logits = heads(features)
    for i in range(3):
        other = [torch.randn_like(f) if j == i else f for j, f in enumerate(features)]
        assert not torch.allclose(heads(other), logits, atol=1e-4)
        louder = [f * 100 if j == i else f for j, f in enumerate(features)]
        torch.testing.assert_close(heads(louder), logits, rtol=1e-4, atol=1e-5)


def test_frames_are_judged_in_the_light_of_their_neighbours():
    torch.manual_seed(0)
    heads = DiscriminatorHeads([8, 8, 8], 16)
    features = [torch.randn(1, 8, 6, side, side, requires_grad=True) for side in (8, 4, 2)]
    heads(features).unflatten(1, (6, 4, 4))[:, 2].sum().backward()
    assert all((features[i].grad[:, :, 1] != 0).any() and (features[i].grad[:, :, 3] != 0).any() for i in range(3))


def test_another_number_of_scales_is_refused():
    with pytest.raises(ValueError):
        DiscriminatorHeads([8, 8, 8], 16)([torch.randn(1, 8, 2, 4, 4)] * 2)


def test_a_judge_of_motion_sees_no_single_frame():
    """Clips that stand still are all the same to it, and those that move in the same way are not."""
    torch.manual_seed(0)
    heads = DiscriminatorHeads([8, 8, 8], 16, motion=True)
    frames = 4
    still = [[torch.randn(1, 8, 1, side, side).expand(-1, -1, frames, -1, -1) for side in (8, 4, 2)] for _ in range(2)]
    moving = [torch.randn(1, 8, frames, side, side) for side in (8, 4, 2)]
    a, b, c = (heads(features).split([frames * 16, (frames - 1) * 16], 1) for features in (*still, moving))
    torch.testing.assert_close(a[1], b[1])
    assert not torch.allclose(a[0], b[0], atol=1e-3) and not torch.allclose(a[1], c[1], atol=1e-3)
