import pytest
import torch
from diffusers import UNetMotionModel
from torch.utils._python_dispatch import TorchDispatchMode

from avdm2_nodes.diffusion.unets import (
    encoder_features,
    image_predictor,
    share_spatial_layers,
    video_predictor,
    video_unet,
    with_own_motion,
    zero_motion,
)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 5, 8, 8, generator=generator)
    return x, torch.tensor([700, 30]), torch.randn(2, 32, 32, generator=generator)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_a_video_unet_is_diffusers_own(stack):
    """With weights that are nobody else's, all in the image UNet's dtype."""
    unet = video_unet(stack.image_unet.half(), stack.motion)
    reference = UNetMotionModel.from_unet2d(stack.image_unet, stack.motion)
    assert unet.config == reference.config and unet.state_dict().keys() == reference.state_dict().keys()
    lent = {w.data_ptr() for part in (stack.image_unet, stack.motion) for w in part.state_dict().values()}
    for name, weight in reference.state_dict().items():
        mine = unet.state_dict()[name]
        assert mine.dtype == weight.dtype == torch.float16 and torch.equal(mine, weight) and mine.data_ptr() not in lent
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_with_zeroed_motion_the_video_unet_is_the_image_unet_frame_by_frame(stack, inputs):
    x, t, text = inputs
    eps = video_predictor(video_unet(stack.image_unet, zero_motion(stack.motion)))(x, t, text)
    for frame in range(5):
        alone = image_predictor(stack.image_unet)(x[:, :, frame], t, text)
        torch.testing.assert_close(eps[:, :, frame], alone, rtol=1e-5, atol=1e-6)


def test_motion_matters_here(stack, inputs):
    """Otherwise half of the other tests would show nothing."""
    x, t, text = inputs
    predict = video_predictor(stack.teacher)
    assert (predict(x, t, text) - predict(x.flip(2), t, text).flip(2)).abs().max() > 1e-2


class Operations(TorchDispatchMode):
    """The names of the operations that run, with the rows of their first matrix."""

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.seen.append((name, args[1 if name == "addmm" else 0].shape[0] if "mm" in name else None))
        return function(*args, **kwargs or {})


def test_nothing_is_multiplied_that_need_not_be(stack, inputs):
    """Against diffusers' own way: the same prediction, no weight copied place by place, no text read again for each frame."""
    x, t, text = (part[:1] for part in inputs)
    theirs = UNetMotionModel.from_unet2d(stack.image_unet, stack.motion).requires_grad_(False)
    with Operations() as plain:
        expected = theirs(x, t, text.repeat_interleave(5, 0), return_dict=False)[0]
    with Operations() as ours:
        eps = video_predictor(stack.teacher)(x, t, text)
    torch.testing.assert_close(eps, expected, rtol=1e-5, atol=1e-5)
    names = [name for name, _ in plain.seen], [name for name, _ in ours.seen]
    modules = sum("motion_modules" in name and name.endswith("proj_in.weight") for name, _ in theirs.named_parameters())
    assert names[0].count("bmm") == modules and "bmm" not in names[1]
    layers = sum(name.endswith("attn2.to_k.weight") and "motion" not in name for name, _ in theirs.named_parameters())
    tokens = text.shape[0] * text.shape[1]
    assert [rows for _, rows in plain.seen].count(5 * tokens) == 2 * layers
    assert [rows for _, rows in ours.seen].count(tokens) >= 2 * layers
    assert 5 * tokens not in [rows for _, rows in ours.seen]


def test_each_sample_reads_its_own_text_and_time(stack, inputs):
    x, t, text = inputs
    predict = video_predictor(stack.teacher)
    together = predict(x, t, text)
    for i in range(2):
        torch.testing.assert_close(predict(x[i : i + 1], t[i : i + 1], text[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)
    assert torch.equal(predict(x, torch.tensor(700), text), predict(x, torch.tensor([700, 700]), text))


@pytest.mark.parametrize("side", [8, 6])
def test_encoder_features_are_those_of_a_whole_forward(stack, inputs, side):
    x, t, text = inputs
    x = x[..., :side]
    unet, seen = stack.teacher, {}
    hooks = [
        unet.down_blocks[0].motion_modules[-1].register_forward_hook(lambda m, i, out: seen.update(fine=out)),
        unet.down_blocks[1].motion_modules[-1].register_forward_hook(lambda m, i, out: seen.update(middle=out)),
        unet.mid_block.register_forward_hook(lambda m, i, out: seen.update(coarse=out)),
    ]
    video_predictor(unet)(x, t, text)
    for hook in hooks:
        hook.remove()
    features = encoder_features(unet, x, t, text)
    for feature, name in zip(features, ("fine", "middle", "coarse"), strict=True):
        assert torch.equal(feature.transpose(1, 2).flatten(0, 1), seen[name])
    assert [tuple(f.shape[:3]) for f in features] == [(2, 32, 5), (2, 32, 5), (2, 64, 5)]
    assert [f.shape[3] for f in features] == [8, 4, 2]
    one_time = encoder_features(unet, x, torch.tensor(30), text)
    assert torch.equal(one_time[0][1], features[0][1])


def test_the_encoder_does_not_run_the_decoder(stack, inputs):
    def fail(*_):
        raise AssertionError("the decoder ran")

    for block in (*stack.teacher.up_blocks, stack.teacher.conv_out):
        block.register_forward_pre_hook(fail)
    encoder_features(stack.teacher, *inputs)


def test_the_encoder_of_a_v2_module_has_motion_in_its_mid_block(stack, inputs):
    from diffusers import MotionAdapter

    motion = MotionAdapter(
        block_out_channels=(32, 32, 64), motion_layers_per_block=1, motion_num_attention_heads=2, use_motion_mid_block=True
    )
    unet, seen = video_unet(stack.image_unet, motion), {}
    unet.mid_block.register_forward_hook(lambda m, i, out: seen.update(mid=out))
    whole = video_predictor(unet)(*inputs)
    assert torch.equal(encoder_features(unet, *inputs)[-1].transpose(1, 2).flatten(0, 1), seen["mid"])
    assert torch.equal(video_predictor(with_own_motion(unet, motion))(*inputs), whole)


def test_a_shared_image_unet_has_the_same_numbers_and_the_same_memory(stack, inputs):
    x, t, text = inputs
    video = stack.teacher
    shared = share_spatial_layers(video, stack.image_unet)
    assert torch.equal(image_predictor(shared)(x[:, :, 0], t, text), image_predictor(stack.image_unet)(x[:, :, 0], t, text))
    pointers = {p.data_ptr() for p in video.parameters()}
    names = dict(stack.image_unet.named_parameters()).keys()
    assert dict(shared.named_parameters()).keys() == names
    assert all(p.data_ptr() in pointers and not p.is_meta for p in (*shared.parameters(), *shared.buffers()))
    video.mid_block.resnets[0].conv1.weight.add_(1)
    assert not torch.equal(image_predictor(shared)(x[:, :, 0], t, text), image_predictor(stack.image_unet)(x[:, :, 0], t, text))


def test_a_shared_video_unet_has_its_own_motion_only(stack, inputs):
    base = stack.teacher
    shared = with_own_motion(base, stack.motion)
    before = video_predictor(base)(*inputs)
    assert torch.equal(video_predictor(shared)(*inputs), before)
    mine, theirs = dict(shared.named_parameters()), dict(base.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        assert (parameter.data_ptr() == theirs[name].data_ptr()) == ("motion_modules" not in name), name
    assert not any(t.is_meta for t in (*shared.parameters(), *shared.buffers()))
    for name, parameter in mine.items():
        if "motion_modules" in name:
            parameter.add_(0.1)
    assert torch.equal(video_predictor(base)(*inputs), before)
    assert not torch.equal(video_predictor(shared)(*inputs), before)


def test_other_widths_are_refused(stack, make_motion):
    with pytest.raises(ValueError, match=r"\(32, 32, 64\), found one for \(32, 64, 64\)"):
        video_unet(stack.image_unet, make_motion((32, 64, 64)))
