import logging
import os
import resource

import pytest
import torch
from torch import nn

from training.run.checkpoint import CheckpointError, Checkpoints, load_state, save_state, write_atomically


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


@pytest.fixture
def file_limit():
    """Files may grow to 64 KiB: stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_nested_state_comes_back_as_it_was(path):
    state = {
        "numbers": {"steps": 3, "lr": 0.1 + 0.2, "tiny": 1e-300, "none": None, "yes": True, "text": "ö/.x"},
        "by number": {0: {"step": torch.tensor(4.0)}, 17: torch.arange(5)},
        "kinds": [
            torch.randn(3).bfloat16(),
            torch.randn(2, 2).half(),
            torch.randn(()),
            torch.zeros(0, 4),
            torch.tensor([True]),
        ],
        "turned": torch.randn(4, 6).t(),
        "empty": {},
    }
    save_state(path, state)
    back = load_state(path)
    assert back["numbers"] == state["numbers"] and list(back["by number"]) == [0, 17] and back["empty"] == {}
    assert torch.equal(back["by number"][0]["step"], torch.tensor(4.0)) and torch.equal(back["by number"][17], torch.arange(5))
    for mine, theirs in zip(back["kinds"], state["kinds"], strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, theirs)
    assert torch.equal(back["turned"], state["turned"])


def test_tied_weights_and_keys_that_look_alike(path):
    shared = torch.randn(3)
    save_state(path, {"a": shared, "b": shared, "c.d": torch.zeros(1), "c": {"d": torch.ones(1)}, "tuple": (1, 2)})
    back = load_state(path)
    assert torch.equal(back["a"], shared) and torch.equal(back["b"], shared) and back["tuple"] == [1, 2]
    assert back["c.d"].item() == 0 and back["c"]["d"].item() == 1


def test_an_optimiser_goes_on_bitwise(path):
    def made():
        torch.manual_seed(0)
        net = nn.Linear(4, 4)
        return net, torch.optim.AdamW(net.parameters(), lr=0.1, betas=(0.0, 0.99))

    def step(net, optimiser, n):
        net(torch.randn(2, 4, generator=torch.Generator().manual_seed(n))).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    (net, optimiser), (other, resumed) = made(), made()
    for n in range(4):
        if n == 2:
            save_state(path, {"net": net.state_dict(), "optimiser": optimiser.state_dict()})
        step(net, optimiser, n)
    state = load_state(path)
    other.load_state_dict(state["net"])
    resumed.load_state_dict(state["optimiser"])
    for n in (2, 3):
        step(other, resumed, n)
    assert torch.equal(net.weight, other.weight)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path):
    save_state(path, {"a": torch.ones(3)})
    old = path.read_bytes()

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_atomically(path, fail)
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]


def test_a_full_disk_is_told_in_a_sentence(path, file_limit):
    save_state(path, {"a": torch.ones(3)})
    old = path.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        save_state(path, {"a": torch.ones(2**16)})
    message = str(caught.value)
    assert message.startswith(f"Expected room and the right to write {path}, found: ") and "\n" not in message
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_not_there_is_told_in_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"found: .*No such file"):
        save_state(tmp_path / "gone" / "x.safetensors", {"a": torch.ones(3)})


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 400])
def test_a_file_of_another_kind_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"found state\.safetensors unreadable"):
        load_state(path)


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest() is None
    for step in (5, 90, 1000):
        checkpoints.save(step, {"step": step})
    assert [p.name for p in checkpoints.paths()] == ["step-00000090.safetensors", "step-00001000.safetensors"]
    assert checkpoints.latest() == (1000, {"step": 1000})


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_newest_one_is_passed_over_and_named(tmp_path, caplog, length):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(step, {"step": step, "weight": torch.full((50,), float(step))})
    newest = checkpoints.paths()[-1]
    newest.write_bytes(newest.read_bytes()[:length])
    with caplog.at_level(logging.WARNING):
        step, state = checkpoints.latest()
    assert step == state["step"] == 1 and newest.name in caplog.text


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".step-00000001.safetensors.4242.tmp").write_bytes(b"half")
    Checkpoints(tmp_path, keep=3).save(1, {"step": 1})
    assert os.listdir(tmp_path) == ["step-00000001.safetensors"]


def test_a_full_disk_loses_no_checkpoint(tmp_path, file_limit):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"a": torch.ones(3)})
    with pytest.raises(CheckpointError):
        checkpoints.save(2, {"a": torch.ones(2**16)})
    assert checkpoints.latest()[0] == 1 and len(os.listdir(tmp_path)) == 1
