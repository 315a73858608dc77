import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from training.evaluation import feature_net
from training.world import scenes


def batch(count=8, seed=0):
    contents = scenes.draw_contents(count, held_out=False, seed=seed)
    styles = [scenes.STYLES[i % 2] for i in range(count)]
    clips = [
        scenes.render(c, s, np.random.default_rng([seed, i])) for i, (c, s) in enumerate(zip(contents, styles, strict=True))
    ]
    targets = feature_net.targets_of(
        contents, styles, np.stack([c.velocity for c in clips]), np.stack([c.centres for c in clips])
    )
    return torch.from_numpy(np.stack([c.frames for c in clips])), targets


@pytest.fixture
def net():
    torch.manual_seed(0)
    return feature_net.VideoFeatures().eval()


def test_shapes_and_batching(net):
    clips, _ = batch(5)
    outputs = net(feature_net.as_input(clips))
    assert {name: tuple(outputs[name].shape) for name in ("velocity", "centres", "direction", "style")} == {
        "velocity": (5, 2), "centres": (5, 8, 2), "direction": (5, 5), "style": (5, 2),
    }  # fmt: skip
    features = net.features(clips.numpy(), batch=2)
    assert features.shape == (5, 96) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features, outputs["features"].detach(), atol=1e-5, rtol=1e-5)
    assert net.features(clips[:0]).shape == (0, 96)


def test_heads_are_linear_in_the_features(net):
    outputs = net(feature_net.as_input(batch(2)[0]))
    velocity = outputs["features"] @ net.velocity.weight.T + net.velocity.bias
    torch.testing.assert_close(outputs["velocity"], velocity * 3)


def test_features_see_the_order_of_the_frames(net):
    clips, _ = batch(4)
    assert (net.features(clips) - net.features(clips.flip(1))).abs().max() > 1e-3


def test_targets_name_still_clips():
    contents = [
        scenes.Content("small", "red", "circle", None, None, "plain"),
        scenes.Content("large", "blue", "square", "up", "fast", "checked"),
    ]
    targets = feature_net.targets_of(contents, ["plain", "neon"], np.zeros((2, 2)), np.zeros((2, 8, 2)))
    words = {name: [feature_net.CLASSES[name][i] for i in targets[name]] for name in feature_net.CLASSES}
    assert words["direction"] == ["still", "up"] and words["speed"] == ["still", "fast"]
    assert words["style"] == ["plain", "neon"] and words["colour"] == ["red", "blue"]


def test_a_perfect_answer_costs_nothing():
    _, targets = batch(3)
    outputs = {
        name: 50.0 * torch.nn.functional.one_hot(targets[name], len(words)) for name, words in feature_net.CLASSES.items()
    }
    outputs |= {"velocity": targets["velocity"], "centres": targets["centres"]}
    assert feature_net.loss(outputs, targets)["total"] < 1e-6


def test_training_steps_learn(net):
    clips, targets = batch(8)
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    net.train()
    totals = []
    for _ in range(12):
        losses = feature_net.training_step(net, clips, targets, generator)
        optimiser.zero_grad()
        losses["total"].backward()
        optimiser.step()
        totals.append(losses["total"].item())
    assert totals[-1] < 0.6 * totals[0]
    assert all(p.grad is not None for p in net.parameters())


def test_augmentation_leaves_half_and_repeats_from_a_seed():
    clips = feature_net.as_input(batch(16)[0])
    once = feature_net.degrade(clips, torch.Generator().manual_seed(3))
    again = feature_net.degrade(clips, torch.Generator().manual_seed(3))
    assert torch.equal(once, again)
    change = (once - clips).abs().flatten(1).mean(1)
    assert 3 <= (change < 1e-4).sum() <= 13
    assert change.max() < 0.1 and once.min() >= 0 and once.max() <= 1


def test_round_trip_and_hash(net, tmp_path):
    path = tmp_path / "features.safetensors"
    feature_net.save_features(net, path)
    assert path.stat().st_size <= 2**20
    loaded = feature_net.load_features(path)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    clips, _ = batch(3)
    torch.testing.assert_close(loaded.features(clips), net.features(clips), atol=2e-2, rtol=2e-2)
    assert feature_net.content_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    feature_net.save_features(loaded, tmp_path / "again.safetensors")
    assert feature_net.content_hash(tmp_path / "again.safetensors") == feature_net.content_hash(path)
    assert {p.name for p in tmp_path.iterdir()} == {"features.safetensors", "again.safetensors"}


def test_refuses_other_files(net, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        feature_net.load_features(tmp_path / "none.safetensors")
    path = tmp_path / "features.safetensors"
    feature_net.save_features(net, path)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        feature_net.load_features(tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="found version None"):
        feature_net.load_features(tmp_path / "other.safetensors")


def test_refuses_other_clips(net):
    with pytest.raises(ValueError, match="Expected clips of shape"):
        net(torch.zeros(1, 3, 8, 32, 32))
    with pytest.raises(ValueError, match="Expected uint8 clips"):
        net.features(np.zeros((1, 8, 64, 64, 3), np.float32))
