"""SparseCtrl against diffusers' SparseControlNetModel."""

from types import SimpleNamespace

import pytest
import torch

from ..files.sparse_networks import HEADS, new_network, write_network

FRAMES, SIDE = 6, 8


@pytest.fixture
def rooms(comfyui):
    return comfyui.pack("comfy_bridge.sparse_control")


@pytest.fixture(params=[True, False], ids=["latents", "pictures"])
def network(request):
    return new_network(request.param)


@pytest.fixture
def load(rooms, network, tmp_path):
    def load(frames):
        write_network(network, tmp_path / "sparse.safetensors")
        return rooms.load_sparse_control(tmp_path / "sparse.safetensors", frames, heads=HEADS)

    return load


class Sampling:
    """Stands where core puts the sampling of the MODEL in progress."""

    @staticmethod
    def timestep(t):
        return t


def run(control, x, context, options=None, copies=1, vae=None, pictures=None):
    """What core's sampler does with a ControlNet around one evaluation at timestep 499."""
    control = control.copy().set_cond_hint(pictures, 0.5, (0.0, 1.0), vae)
    model = SimpleNamespace(model_sampling=Sampling(), latent_format=SimpleNamespace(process_in=lambda latents: 2 * latents))
    control.pre_run(model, lambda percent: 999.0 - 999.0 * percent)
    cond = {"c_crossattn": context.repeat(len(x), 1, 1)}
    with torch.no_grad():
        return control.get_control(x, torch.full((len(x),), 499.0), cond, copies, options or {})


def hints(network, pictures, frames):
    """(cond, mask) of diffusers for pictures at these frames."""
    cond = torch.zeros(1, pictures.shape[1], FRAMES, *pictures.shape[2:])
    mask = torch.zeros(1, 1, FRAMES, *pictures.shape[2:])
    for picture, frame in zip(pictures, frames, strict=True):
        cond[0, :, frame], mask[0, :, frame] = picture, 1.0
    return cond, mask


def expected(network, context, pictures, frames):
    cond, mask = hints(network, pictures, frames)
    with torch.no_grad():
        down, mid = network(
            torch.zeros(1, 4, FRAMES, SIDE, SIDE), torch.tensor(499), context.repeat(FRAMES, 1, 1), cond, 0.5,
            conditioning_mask=mask, return_dict=False,
        )  # fmt: skip
    return [*down, mid]


@pytest.fixture
def given(network):
    """(pictures as a person wires them, what the network gets of them, the VAE)."""
    generator = torch.Generator().manual_seed(3)
    pictures = torch.rand(2, 3, 8 * SIDE, 8 * SIDE, generator=generator)
    if not network.use_simplified_condition_embedding:
        return pictures, pictures, None
    latents = torch.randn(2, 4, SIDE, SIDE, generator=generator)
    return pictures, 2 * latents, SimpleNamespace(encode=lambda images: latents)


def close(made, reference):
    flat = [*made["output"], *made["middle"]]
    assert len(flat) == len(reference)
    for mine, theirs in zip(flat, reference, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_residuals_are_diffusers(load, network, given):
    pictures, known, vae = given
    x, context = torch.randn(FRAMES, 4, SIDE, SIDE), torch.randn(1, 5, 32)
    close(run(load("0, -2"), x, context, vae=vae, pictures=pictures), expected(network, context, known, (0, FRAMES - 2)))


def test_two_prompts_in_a_batch_get_the_same_hints(load, network, given):
    pictures, known, vae = given
    x, context = torch.randn(2 * FRAMES, 4, SIDE, SIDE), torch.randn(1, 5, 32)
    made = run(load("0,3"), x, context, copies=2, vae=vae, pictures=pictures)
    once = expected(network, context, known, (0, 3))
    close(made, [torch.cat([part, part]) for part in once])


def test_a_window_gets_the_hints_of_its_frames(load, network, given):
    pictures, known, vae = given
    x, context = torch.randn(FRAMES, 4, SIDE, SIDE), torch.randn(1, 5, 32)
    window = SimpleNamespace(index_list=list(range(4, 4 + FRAMES)), total_frames=20)
    made = run(load("0,7"), x, context, {"context_window": window}, vae=vae, pictures=pictures)
    close(made, expected(network, context, known[1:], (3,)))


@pytest.mark.parametrize(
    ("frames", "words"),
    [("", "Expected frames such as 0"), ("0,x", "Expected frames such as 0"), ("1,1", "Expected each frame once")],
)
def test_other_frames_are_refused(rooms, frames, words):
    with pytest.raises(rooms.SparseControlError, match=words):
        rooms.parse_frames(frames)


def test_pictures_and_frames_must_be_as_many(rooms, load, given):
    with pytest.raises(rooms.SparseControlError, match="Expected a picture for each of the frames 0, 1, 2, found 2"):
        load("0,1,2").set_cond_hint(given[0], 1.0, vae=given[2])


def test_a_frame_outside_the_clip_is_refused(rooms, load, given):
    x, context = torch.randn(FRAMES, 4, SIDE, SIDE), torch.randn(1, 5, 32)
    with pytest.raises(
        rooms.SparseControlError, match=f"Expected hints at frames of the clip, which has {FRAMES}, found one at 6"
    ):
        run(load("0,6"), x, context, vae=given[2], pictures=given[0])


def test_latents_want_a_vae(rooms, load, network, given):
    if network.use_simplified_condition_embedding:
        with pytest.raises(rooms.SparseControlError, match="Expected a VAE for this SparseCtrl"):
            load("0,1").set_cond_hint(given[0], 1.0)
