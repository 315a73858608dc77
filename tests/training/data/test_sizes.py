import pytest
import torch

from training.data.sizes import cover, resized


@pytest.mark.parametrize("sides", [(48, 96), (96, 48), (200, 130), (30, 31), (64, 64)])
def test_cover_cuts_the_centre(sides):
    h, w = sides
    frames = torch.zeros(2, h, w, 3, dtype=torch.uint8)
    frames[:, h // 2 - h // 8 : h // 2 + h // 8, w // 2 - w // 8 : w // 2 + w // 8] = 255
    cut = cover(frames, 64, 64)
    assert cut.shape == (2, 64, 64, 3) and cut.dtype == torch.uint8
    rows, columns = (cut[0, ..., 0] > 127).nonzero(as_tuple=True)
    assert abs(rows.float().mean() - 31.5) < 1.5 and abs(columns.float().mean() - 31.5) < 1.5


def test_cover_is_antialiased():
    checks = (torch.arange(256)[:, None] + torch.arange(256)) % 2 * 255
    cut = cover(checks.to(torch.uint8)[None, :, :, None].expand(1, 256, 256, 3), 64, 64)
    assert (cut.float() - 127.5).abs()[:, 2:-2, 2:-2].max() < 4


def test_resized_keeps_a_ramp():
    ramp = torch.arange(0, 256, 2, dtype=torch.uint8)[None, None, :, None].expand(1, 8, 128, 3)
    wide = resized(ramp, 8, 256)
    assert wide.shape == (1, 8, 256, 3) and (wide[0, 0, 8:-8, 0].float() - torch.arange(8, 248)).abs().max() <= 2
