import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from avdm2_nodes.diffusion.unets import image_predictor
from training.method.adapters import _LORA_TARGETS, Adapters, LoraLayer, checkpoint_layers


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_gradients_are_those_of_peft(stack, unet, inputs, dtype):
    """Of x too, and of layers whose input wants none (the text's); in bf16 within that format's steps."""
    weights = Adapters().add(unet, "plain", 2, seed=0)
    set_products(weights, 1)
    x, t, text = inputs
    gradients = []
    for ours in (False, True):
        network = copy.deepcopy(stack.image_unet).requires_grad_(False)
        if ours:
            adapters = Adapters()
            trained = adapters.add(network, "plain", 2, seed=0)
        else:
            config = LoraConfig(r=2, lora_alpha=2, target_modules=_LORA_TARGETS.pattern)
            inject_adapter_in_model(config, network, adapter_name="plain")
            trained = {n.replace(".plain.", "."): p for n, p in network.named_parameters() if ".plain." in n}
        assert list(trained) == list(weights)
        for name, weight in trained.items():
            weight.data.copy_(weights[name])
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
        predict = adapters.bind("plain", image_predictor(network)) if ours else image_predictor(network)
        noisy = x.clone().requires_grad_()
        eps = predict(noisy, t, text)
        loss = (eps - text.mean()).square().mean()
        gradients.append([eps.detach(), loss.detach(), *torch.autograd.grad(loss, [noisy, *trained.values()])])
    theirs, ours = (torch.cat([g.flatten().float() for g in part]) for part in gradients)
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    assert (ours - theirs).norm() < (1e-3 if dtype == torch.float32 else 0.05) * theirs.norm()


def test_a_convolution_in_channels_last_takes_its_adapter_too(unet, inputs):
    adapters = Adapters()
    set_products(adapters.add(unet, "used", 2, seed=0), 1)
    layer = next(m for m in unet.modules() if isinstance(m, LoraLayer) and isinstance(m.base_layer, nn.Conv2d))
    x = torch.randn(2, layer.base_layer.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    with adapters.active("used"):
        torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x), rtol=1e-5, atol=1e-5)


def test_under_autocast_it_computes_in_the_format_of_products(unet, inputs):
    adapters = Adapters()
    set_products(adapters.add(unet, "used", 2, seed=0), 1)
    predict = adapters.bind("used", image_predictor(unet))
    exact = predict(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = predict(*inputs)
    assert 0 < (half - exact).norm() < 0.05 * exact.norm()


def test_after_an_error_the_adapter_of_before_acts_again(unet, inputs):
    adapters, predict = Adapters(), image_predictor(unet)
    for seed, name in enumerate(("outer", "inner")):
        set_products(adapters.add(unet, name, 2, seed=0), seed)
    with torch.no_grad(), adapters.active("outer"):
        outer = predict(*inputs)
        with pytest.raises(RuntimeError, match="broken"), adapters.active("inner"):
            assert not torch.equal(predict(*inputs), outer)
            raise RuntimeError("broken")
        assert torch.equal(predict(*inputs), outer)
    assert adapters.name is None


def test_switching_adapters_touches_no_layer(unet, inputs, monkeypatch):
    """There are hundreds, and with checkpointing each would be touched for each layer that is run again."""
    adapters = Adapters()
    weights = adapters.add(unet, "used", 2, seed=0)
    for weight in weights.values():
        weight.requires_grad_(True)
    checkpoint_layers([unet], [adapters, adapters])
    monkeypatch.setattr(nn.Module, "__setattr__", lambda *_: pytest.fail("an attribute of a module was set"))
    adapters.bind("used", image_predictor(unet))(*inputs).sum().backward()
    assert all(weight.grad is not None for weight in weights.values())


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
