import torch

from training.miniature.vae import preview_colours


def test_preview_colours_are_the_linear_map_that_made_the_patches():
    generator = torch.Generator().manual_seed(0)
    latents, factors, bias = (torch.randn(shape, generator=generator) for shape in ((6, 4, 2, 3), (4, 3), (3,)))
    colours = torch.einsum("nchw,cr->nrhw", latents, factors) + bias[:, None, None]
    images = colours.repeat_interleave(8, 2).repeat_interleave(8, 3)
    found = preview_colours(latents, images)
    torch.testing.assert_close(found[0], factors, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], bias, rtol=1e-4, atol=1e-4)
