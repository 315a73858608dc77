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
    assert logits.shape == (shape[0], shape[2], *features[1].shape[3:]) and logits.isfinite().all()


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
    heads(features)[:, 2].sum().backward()
    assert all((features[i].grad[:, :, 1] != 0).any() and (features[i].grad[:, :, 3] != 0).any() for i in range(3))


def test_another_number_of_scales_is_refused():
    with pytest.raises(ValueError):
        DiscriminatorHeads([8, 8, 8], 16)([torch.randn(1, 8, 2, 4, 4)] * 2)
