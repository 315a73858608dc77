import contextlib

import numpy as np
import pytest
import torch

from training.data.clips import ClipFolder, write_clips
from training.data.latents import EncodedClips, Encoder, LatentClips
from training.world import scenes


@pytest.fixture
def clips(tmp_path):
    rendered = scenes.render_split(4, style="plain", held_out=False, seed=0)
    write_clips(tmp_path / "data", ((clip.frames, clip.content.caption) for clip in rendered), scenes.FPS)
    return ClipFolder(tmp_path / "data", 8, 64, 64)


def latents(clips, stack):
    encoder = Encoder(stack, torch.device("cpu"), "float32")
    return LatentClips(EncodedClips(clips, encoder), encoder, (4, 8, 8, 8))


def test_clips_are_the_stacks_latents_times_the_scaling_factor(clips, stack):
    x, text = latents(clips, stack).batch([2, 0])
    assert x.shape == (2, 4, 8, 8, 8) and text.shape == (2, 32, 32) and x.dtype == text.dtype == torch.float32
    frame = torch.from_numpy(np.asarray(clips.read(2)[5])).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = stack.vae.encode(frame).latents[0] * 2.0
    torch.testing.assert_close(x[0, :, 5], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text[0], stack.encode_text([clips.captions[2]])[0], rtol=1e-4, atol=1e-5)


def test_where_nobody_looks_at_the_clips_none_is_encoded(clips, stack):
    data = latents(clips, stack)
    x, text = data.batch([0, 2])
    data.encoder.clip = None  # fails where it is called
    blank, same = data.batch([0, 2], clips=False)
    assert torch.equal(same, text) and torch.equal(blank, torch.zeros_like(x))
    assert torch.equal(data.batch([0, 2])[0], x)  # kept


def test_a_clip_is_bitwise_the_same_in_whatever_batch_it_comes_first(clips, stack):
    """A resumed run meets other batches than the one that it continues."""
    together, apart = latents(clips, stack), latents(clips, stack)
    x, text = together.batch([0, 1, 2, 3])
    for i in range(4):
        alone_x, alone_text = apart.batch([i])
        assert torch.equal(alone_x[0], x[i]) and torch.equal(alone_text[0], text[i])


def test_each_clip_is_read_once(clips, stack, monkeypatch):
    data, read, seen = latents(clips, stack), clips.read, []
    monkeypatch.setattr(clips, "read", lambda i: seen.append(i) or read(i))
    data.batch([1, 1, 3])
    data.batch([3, 1])
    assert seen == [1, 3] and len(data) == 4 and data.captions == clips.captions


def test_vae_and_text_encoder_leave_the_device_when_every_clip_is_encoded(clips, stack, monkeypatch):
    """They are lent to it meanwhile; only where they stay is told apart here, for this machine may have one device only."""
    places = []
    for part in (stack.vae, stack.text_encoder):
        monkeypatch.setattr(part, "to", lambda device, part=part: places.append((part, device)))
    monkeypatch.setattr("training.data.latents.lent", lambda *_: contextlib.nullcontext())
    encoder = Encoder(stack, torch.device("cpu"), "float32")
    data = EncodedClips(clips, encoder)
    assert [part for part, _ in places] == [stack.vae, stack.text_encoder]
    places.clear()
    for index in (0, 1, 2, 1):
        data.read(index)
    assert not places
    data.read(3)
    assert len(places) == 2 and all(device == torch.device("cpu") for _, device in places)
    data.read(0)
    assert len(places) == 2


def test_the_empty_prompt(clips, stack):
    torch.testing.assert_close(latents(clips, stack).text([""]), stack.encode_text([""]), rtol=1e-5, atol=1e-6)
