import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import nn

from avdm2_nodes.files.containers import FileFormatError
from avdm2_nodes.files.taesd import load_taesd_file


class Block(nn.Module):
    """TAESD's residual block, after the description of its authors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64))

    def forward(self, x):
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x):
        return 3 * torch.tanh(x / 3)


def conv(into, out, bias=True):
    return nn.Conv2d(into, out, 3, padding=1, bias=bias)


@pytest.fixture(scope="module")
def original():
    """The decoder as its authors have it: latents to pixels in 0..1."""
    torch.manual_seed(0)
    layers = [Clamp(), conv(4, 64), nn.ReLU()]
    for _ in range(3):
        layers += [Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(64, 64, bias=False)]
    return nn.Sequential(*layers, Block(), conv(64, 3)).requires_grad_(False)


@pytest.mark.parametrize("prefix", ["", "decoder.", "taesd_decoder."])
def test_it_decodes_as_the_original(original, tmp_path, prefix):
    weights = {f"{prefix}{name}": weight.half() for name, weight in original.state_dict().items()}
    if prefix:
        weights["taesd_encoder.0.weight"] = torch.zeros(64, 3, 3, 3)
    save_file(weights, tmp_path / "taesd_decoder.safetensors")
    vae = load_taesd_file(tmp_path / "taesd_decoder.safetensors")
    (tmp_path / "taesd_decoder.safetensors").unlink()
    latents = 2 * torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    pixels = original.half().float()(latents)
    torch.testing.assert_close(vae.decode(latents).sample, 2 * pixels - 1, rtol=1e-4, atol=1e-4)
    assert pixels.std() > 1e-3 and vae.config.scaling_factor == 1
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in vae.parameters()) and not vae.training


def test_diffusers_file_of_both_halves(tmp_path):
    theirs = AutoencoderTiny().requires_grad_(False)
    theirs.save_pretrained(tmp_path)
    vae = load_taesd_file(tmp_path / "diffusion_pytorch_model.safetensors")
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(vae.decode(latents).sample, theirs.decode(latents).sample)


def test_other_files_are_refused(original, tmp_path):
    path = tmp_path / "taesd_decoder.safetensors"
    weights = original.state_dict()
    for wrong in ({"a": torch.zeros(1)}, weights | {"1.weight": torch.zeros(64, 16, 3, 3)}, dict(list(weights.items())[:-1])):
        save_file(wrong, path)
        with pytest.raises(FileFormatError, match=r"Expected TAESD's decoder for SD1.5 at .*choose taesd_decoder.safetensors"):
            load_taesd_file(path)
    with pytest.raises(FileFormatError, match="nothing"):
        load_taesd_file(tmp_path / "none.safetensors")


def test_weights_that_are_no_numbers_are_refused(original, tmp_path):
    path, weights = tmp_path / "taesd_decoder.safetensors", original.state_dict()
    for wrong, said in (
        ({"1.bias": weights["1.bias"] * torch.nan}, "NaN or infinite numbers"),
        ({"1.bias": weights["1.bias"].to(torch.int8)}, "no floating numbers"),
        ({"9" * 200 + ".bias": torch.zeros(1)}, None),
    ):
        save_file(weights | wrong, path)
        if said is None:
            load_taesd_file(path)  # another network's layer, as of a file of both halves
            continue
        with pytest.raises(FileFormatError, match=rf"Expected TAESD's decoder in .*{said}"):
            load_taesd_file(path)
