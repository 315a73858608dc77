"""Compiled and recorded evaluations, against those of the same network as it was."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from avdm2_nodes.diffusion.compiled import compile_layers, recorded
from avdm2_nodes.diffusion.layers import MotionLayer, Residual
from avdm2_nodes.diffusion.unets import guided, video_predictor, video_unet


@pytest.fixture(autouse=True)
def no_grad():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def unet(make_motion):
    """Of each kind of layer several."""
    widths = 8, 8
    image_unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=widths, layers_per_block=1, attention_head_dim=2, cross_attention_dim=32, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return video_unet(image_unet, make_motion(widths)).eval().requires_grad_(False)


def drawn(frames, tokens=32, seed=0, t=700):
    """x_t, t and text of a clip."""
    generator = torch.Generator().manual_seed(seed)
    x_t, text = torch.randn(1, 4, frames, 8, 8, generator=generator), torch.randn(1, tokens, 32, generator=generator)
    return x_t, torch.tensor([t]), text


def kinds_of(unet, evaluate):
    """The different layers of an evaluation: their class, their weights' shapes and the size of what they get."""
    kinds = set()

    def note(layer, args, kwargs):
        size = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)).shape[1:]
        kinds.add((type(layer), size, *(weight.shape for weight in layer.parameters())))

    layers = [layer for layer in unet.modules() if isinstance(layer, (Residual, Transformer2DModel, MotionLayer))]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    evaluate()
    for hook in hooks:
        hook.remove()
    return kinds, layers


def test_each_kind_of_layer_is_compiled_once_for_all_prompts_seeds_and_frame_counts(unet):
    graphs, before = [], copy.deepcopy(unet)

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain, fast = video_predictor(before), video_predictor(compile_layers(unet, count))
    kinds, layers = kinds_of(before, lambda: plain(*drawn(4)))
    for seed, (frames, t, tokens) in enumerate(((4, 999, 32), (4, 749, 32), (7, 499, 32), (2, 249, 32), (12, 999, 64))):
        x_t, t, text = drawn(frames, tokens, seed, t)
        torch.testing.assert_close(fast(x_t, t, text), plain(x_t, t, text), rtol=1e-5, atol=1e-5)
        assert len(graphs) == len(kinds) < len(layers), "one graph each, without breaks"
    both = (guided(predict, torch.zeros_like(text), 3.0)(x_t, t, text) for predict in (fast, plain))
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)  # in a batch of two


@pytest.mark.slow  # a minute of a C++ compiler
def test_inductor_predicts_the_same(unet):
    plain, fast = video_predictor(copy.deepcopy(unet)), video_predictor(compile_layers(unet))
    for frames in (4, 6):
        torch.testing.assert_close(fast(*drawn(frames)), plain(*drawn(frames)), rtol=1e-4, atol=1e-4)


class Tape:
    """In place of a CUDA graph: what runs again writes into the same memory, as a graph's replay does."""

    def __init__(self):
        self.recordings = self.replays = 0

    def __call__(self, run):
        self.recordings += 1
        made = run()

        def again():
            self.replays += 1
            return made.copy_(run())

        return again


def test_a_recording_is_made_once_a_shape_and_replayed_on_other_inputs(unet):
    tape, plain = Tape(), video_predictor(unet)
    predict, made = recorded(plain, tape), []
    for seed in range(3):
        for frames in (3, 5):
            given = drawn(frames, seed=seed, t=900 - 300 * seed)
            kept = [tensor.clone() for tensor in given]
            made.append((predict(*given), plain(*given)))
            assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True)), "its buffers are its own"
    assert all(torch.equal(ours, theirs) for ours, theirs in made), "and so are the results, which later replays leave alone"
    assert tape.recordings == 2 and tape.replays == 6


def test_more_shapes_than_memory_is_meant_for_are_evaluated_plainly(unet):
    tape, plain = Tape(), video_predictor(unet)
    predict = recorded(plain, tape)
    for frames in range(2, 8):
        assert torch.equal(predict(*drawn(frames)), plain(*drawn(frames)))
    assert tape.recordings == tape.replays == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_gives_what_the_network_gives(unet):
    unet = unet.cuda()
    plain = video_predictor(unet)
    predict = recorded(plain)
    for seed in range(3):
        given = [tensor.cuda() for tensor in drawn(4, seed=seed, t=900 - 300 * seed)]
        torch.testing.assert_close(predict(*given), plain(*given), rtol=1e-4, atol=1e-4)
