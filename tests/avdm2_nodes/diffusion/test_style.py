import pytest
import torch

from avdm2_nodes.diffusion.style import StyleChange, StyleError, add_change, style_change
from avdm2_nodes.diffusion.unets import video_predictor
from avdm2_nodes.files.stack import load_image_unet


@pytest.fixture
def other(stack_folder):
    return load_image_unet(stack_folder / "styles" / "other")


def predicted(unet):
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 3, 8, 8, generator=generator), torch.randn(1, 32, 32, generator=generator)
    with torch.no_grad():
        return video_predictor(unet)(x, torch.tensor([500]), text)


def test_a_teacher_with_the_whole_change_is_the_teacher_on_the_style(stack, other):
    """Bound: float32 rounds base + (style - base)."""
    unet = stack.teacher
    plain = predicted(unet)
    add_change(unet, style_change(stack.image_unet, other), 1.0)
    stack.image_unet.load_state_dict(other.state_dict())
    del stack.__dict__["teacher"]
    expected = predicted(stack.teacher)
    torch.testing.assert_close(predicted(unet), expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.01


def test_strength_0_and_the_base_as_style_change_no_bit(stack, other):
    unet = stack.teacher
    before = {name: weight.clone() for name, weight in unet.named_parameters()}
    add_change(unet, style_change(stack.image_unet, other), 0.0)
    add_change(unet, style_change(stack.image_unet, stack.image_unet), 3.0)
    assert all(torch.equal(before[name], weight) for name, weight in unet.named_parameters())


def test_changes_add_up_in_any_order(stack, other):
    change = style_change(stack.image_unet, other)
    name = "conv_in.weight"
    before = stack.image_unet.get_parameter(name).clone()
    for strength in (0.25, 0.5):
        add_change(stack.image_unet, change, strength)
    torch.testing.assert_close(stack.image_unet.get_parameter(name), before + 0.75 * change[name])


def test_a_style_of_another_architecture_is_refused(stack, make_image_unet):
    with pytest.raises(StyleError, match=r"found \d+ layers unlike its own .*; choose a model made from the same base"):
        style_change(stack.image_unet, make_image_unet((32, 64, 64)))
    with pytest.raises(StyleError, match=r"found 1 weights unlike its own \(such as conv_in.weight\)"):
        add_change(stack.image_unet, {"conv_in.weight": torch.zeros(3)}, 1.0)


def test_a_change_is_computed_when_it_is_asked_for_and_says_the_same(stack, other):
    whole, lazy = style_change(stack.image_unet, other), StyleChange(stack.image_unet, other)
    assert lazy.keys() == whole.keys() and len(lazy) == len(whole)
    for name, delta in lazy.items():
        torch.testing.assert_close(delta, other.get_parameter(name) - stack.image_unet.get_parameter(name), rtol=0, atol=0)
        assert torch.equal(delta, whole[name]) and lazy[name] is not lazy[name]
