"""ComfyUI_IPAdapter_plus as it is published, on a student: its attention patch against the same arithmetic in diffusers.

Runs where IPADAPTER_PLUS_DIR names a checkout of that pack, beside COMFYUI_DIR.
"""

import copy
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from avdm2_nodes.diffusion.unets import video_predictor
from tests.avdm2_nodes.conftest import TIMESTEPS
from tests.avdm2_nodes.native import CLIP, GUIDED, chain, difference, in_windows

# (core's block, diffusers' transformer, its width) of the tiny stack
PLACES = [
    (("input", 1), "down_blocks.0.attentions.0", 32),
    (("input", 3), "down_blocks.1.attentions.0", 32),
    (("middle", 0), "mid_block.attentions.0", 64),
    (("output", 2), "up_blocks.1.attentions.0", 32),
    (("output", 3), "up_blocks.1.attentions.1", 32),
    (("output", 4), "up_blocks.2.attentions.0", 32),
    (("output", 5), "up_blocks.2.attentions.1", 32),
]
TOKENS, WEIGHT, SEED = 4, 0.8, 9


@pytest.fixture(scope="module")
def theirs(comfyui):
    """The pack's own attention patch; its nodes, which look for image encoders, are not loaded."""
    named = os.environ.get("IPADAPTER_PLUS_DIR")
    if not named or not (Path(named) / "CrossAttentionPatch.py").is_file():
        pytest.skip("needs IPADAPTER_PLUS_DIR, a checkout of ComfyUI_IPAdapter_plus")
    package = ModuleType("ipadapter_plus_of_the_tests")
    package.__path__ = [named]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.CrossAttentionPatch")


@pytest.fixture(scope="module")
def layers():
    """Keys and values of image tokens at each place."""
    torch.manual_seed(3)
    return {block: (nn.Linear(32, width, bias=False), nn.Linear(32, width, bias=False)) for block, _, width in PLACES}


def images(count, seed=1):
    return torch.randn(count, TOKENS, 32, generator=torch.Generator().manual_seed(seed))


NONE = images(1, seed=2)  # what an adapter makes of no image


@pytest.fixture
def adapted(theirs, layers):
    """adapted(model, images (N, tokens, 32)): the MODEL with the patch, as their node puts it on; several images are one a frame."""
    kvs = {f"{i}_to_{kind}_ip": layers[block]["kv".index(kind)] for i, (block, *_) in enumerate(PLACES) for kind in "kv"}
    adapter = SimpleNamespace(ip_layers=SimpleNamespace(to_kvs=kvs), get_multigpu_clone=lambda device: adapter)

    def add(model, cond):
        model = model.clone()
        common = {
            "ipadapter": adapter, "weight": WEIGHT, "cond": cond, "uncond": NONE.expand(len(cond), -1, -1), "weight_type": "linear",
            "sigma_start": 999999999.9, "sigma_end": 0.0, "unfold_batch": len(cond) > 1, "embeds_scaling": "V only",
        }  # fmt: skip
        for i, (block, *_) in enumerate(PLACES):
            patch = theirs.Attn2Replace(theirs.ipadapter_attention, **common, module_key=str(i))
            model.set_model_attn2_replace(patch, *block)
        return model

    return add


class WithImage:
    """diffusers' cross-attention with the image's added, before the layer that both go through."""

    def __init__(self, keys, values):
        self.keys, self.values, self.images = keys, values, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        frames = len(hidden_states)

        def heads(x):
            return x.expand(frames, -1, -1).unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def read(keys, values):
            return (
                scaled_dot_product_attention(heads(attn.to_q(hidden_states)), heads(keys), heads(values))
                .transpose(1, 2)
                .flatten(2)
            )

        out = read(attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        out = out + WEIGHT * read(self.keys(self.images), self.values(self.images))
        return attn.to_out[1](attn.to_out[0](out))


@pytest.fixture
def predict(student_network, layers):
    """predict(x_t, t, text, images (1 or F, tokens, 32)) by diffusers."""
    unet = copy.deepcopy(student_network("all"))
    processors = []
    for block, name, _ in PLACES:
        processors.append(WithImage(*layers[block]))
        unet.get_submodule(name).transformer_blocks[0].attn2.set_processor(processors[-1])
    predictor = video_predictor(unet)

    def eps(x_t, t, text, cond):
        for processor in processors:
            processor.images = cond
        return predictor(x_t, t, text)

    return eps


@pytest.fixture
def sample(comfyui, loaded):
    common = {"positive": comfyui.prompt(loaded.clip), "seed": SEED, "steps": 0, "denoise": 1.0}
    return lambda student, frames, **more: comfyui.run(
        "AVDM2StudentSampler", student=student, latent=comfyui.empty(frames), **common, **more
    )[0]["samples"]


def reference(predictor, text, frames):
    return chain(predictor, text, (frames, 4, 4, 8), SEED, TIMESTEPS)


@pytest.mark.parametrize("count", [1, 3])
def test_one_image_and_one_a_frame(comfyui, loaded, student, adapted, predict, sample, count):
    ((text, _),) = comfyui.prompt(loaded.clip)
    clip = sample(adapted(student, images(count)), 3)
    assert difference(clip, reference(lambda x_t, t, y: predict(x_t, t, y, images(count)), text, 3)) < CLIP
    assert difference(clip, sample(student, 3)) > 0.01


@pytest.mark.parametrize("count", [1, 3])
def test_with_guidance(comfyui, loaded, student, adapted, predict, sample, count):
    ((text, _),), negative = comfyui.prompt(loaded.clip), comfyui.prompt(loaded.clip, "")

    def guided(x_t, t, y):
        none = predict(x_t, t, negative[0][0], NONE)
        return none + 2.0 * (predict(x_t, t, y, images(count)) - none)

    clip = sample(adapted(student, images(count)), 3, cfg=2.0, negative=negative)
    assert difference(clip, reference(guided, text, 3)) < GUIDED


@pytest.mark.parametrize("count", [7, 3])
def test_in_windows_each_frame_keeps_its_image(comfyui, loaded, student, adapted, predict, sample, count):
    """Fewer images than frames: that pack repeats the last."""
    ((text, _),) = comfyui.prompt(loaded.clip)
    cond = images(count)

    def of_window(x_t, t, y, window):
        return predict(x_t, t, y, cond[[min(i, count - 1) for i in window]])

    windowed = in_windows(
        of_window, lambda step: [[0, 1, 2, 3], [2, 3, 4, 5], [3, 4, 5, 6]], lambda window: [1.0, 2.0, 2.0, 1.0]
    )
    clip = sample(adapted(student, cond), 7)
    assert difference(clip, reference(windowed, text, 7)) < CLIP
