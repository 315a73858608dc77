import copy

import pytest
import torch

from avdm2_nodes.diffusion.unets import image_predictor
from training.method.adapters import Adapters, checkpoint_layers


@pytest.fixture
def unet(stack):
    return copy.deepcopy(stack.image_unet).requires_grad_(False)


@pytest.fixture
def inputs(unet):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
    return x, torch.tensor([300, 700]), torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)


def set_products(weights, seed):
    """Draws every lora_B, which begins as zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        if ".lora_B." in name:
            weight.data.normal_(0, 0.05, generator=generator)


def merged(unet, weights):
    """A copy of a plain UNet with B A (a 1x1 convolution after a k x k one, for convolutions) added to its weights."""
    copied = copy.deepcopy(unet)
    layers = dict(copied.named_parameters())
    for name, down in weights.items():
        if ".lora_A." in name:
            layer, up = name.split(".lora_A.")[0], weights[name.replace("lora_A", "lora_B")]
            layers[f"{layer}.weight"].data += torch.einsum("or,r...->o...", up.flatten(1), down.detach())
    return copied


def test_an_adapter_acts_as_its_product_would_in_the_weights_and_only_while_it_is_active(stack, unet, inputs):
    adapters = Adapters()
    first, second = (adapters.add(unet, name, 2, seed=0) for name in ("first", "second"))
    set_products(first, 1)
    set_products(second, 2)
    with torch.no_grad():
        plain = image_predictor(stack.image_unet)(*inputs)
        torch.testing.assert_close(image_predictor(unet)(*inputs), plain, rtol=0, atol=0)
        for name, weights in (("first", first), ("second", second)):
            expected = image_predictor(merged(stack.image_unet, weights))(*inputs)
            assert (expected - plain).abs().max() > 0.01
            torch.testing.assert_close(adapters.bind(name, image_predictor(unet))(*inputs), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(image_predictor(unet)(*inputs), plain, rtol=0, atol=0)


def test_after_an_error_the_adapter_of_before_acts_again(unet):
    adapters = Adapters()
    for name in ("outer", "inner"):
        adapters.add(unet, name, 2, seed=0)
    with adapters.active("outer"):
        with pytest.raises(RuntimeError, match="broken"), adapters.active("inner"):
            assert {layer._active_adapter[0] for layer in adapters.layers} == {"inner"}
            raise RuntimeError("broken")
        assert {layer._active_adapter[0] for layer in adapters.layers} == {"outer"}
    assert adapters.name is None and all(layer._disable_adapters for layer in adapters.layers)


def test_a_checkpointed_layer_is_run_again_with_the_adapter_of_its_first_pass(unet, inputs):
    """The backward pass comes when another adapter acts: its gradient is still that of the one that made the loss."""
    adapters = Adapters()
    weights = {name: adapters.add(unet, name, 2, seed=0) for name in ("used", "other")}
    for seed, drawn in enumerate(weights.values()):
        set_products(drawn, seed)
        for weight in drawn.values():
            weight.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_layers([unet], [adapters])
        loss = adapters.bind("used", image_predictor(unet))(*inputs).square().sum()
        with adapters.active("other"):
            gradients.append(torch.autograd.grad(loss, list(weights["used"].values())))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)


def test_adapters_of_one_seed_are_drawn_apart_by_their_names(stack):
    first, second = (Adapters().add(copy.deepcopy(stack.image_unet), name, 2, seed=0) for name in ("first", "second"))
    drawn = [name for name in first if ".lora_A." in name]
    assert drawn and not any(torch.equal(first[name], second[name]) for name in drawn)
