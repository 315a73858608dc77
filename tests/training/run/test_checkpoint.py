import logging
import os
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
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


# ---- damage ----


def two(folder):
    """Two checkpoints; the path of the newest."""
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2):
        checkpoints.save(step, {"step": step, "weight": torch.full((20_000,), float(step)), "inner": {"n": [1, 2]}})
    return checkpoints, checkpoints.paths()[-1]


def is_passed_over(checkpoints, newest, caplog, keys=()):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        step, state = checkpoints.latest(keys)
    assert "\n" not in caplog.records[0].getMessage()
    return step == state["step"] == 1 and newest.name in caplog.text


@pytest.mark.parametrize("place", [-1, -40_000, -79_000, 300, 340, 9])
def test_a_flipped_bit_is_found(tmp_path, caplog, place):
    checkpoints, newest = two(tmp_path)
    data = bytearray(newest.read_bytes())
    data[place] ^= 4
    newest.write_bytes(data)
    assert is_passed_over(checkpoints, newest, caplog)


def test_a_hole_that_a_power_cut_left_is_found(tmp_path, caplog):
    checkpoints, newest = two(tmp_path)
    data = newest.read_bytes()
    newest.write_bytes(data[:20_000] + bytes(32_768) + data[52_768:])
    assert is_passed_over(checkpoints, newest, caplog)


def test_every_flipped_bit_of_a_small_one(tmp_path):
    """Whatever bit it is: the same state as was written, or refused; the hash's own name may go, and nothing else with it."""
    path = tmp_path / "x.safetensors"
    save_state(path, {"step": 3, "weight": torch.arange(6.0)})
    data = path.read_bytes()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            state = load_state(path)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert state["step"] == 3 and torch.equal(state["weight"], torch.arange(6.0))


@pytest.mark.parametrize("kind", ["folder", "dangling", "loop", "pipe"])
def test_what_is_no_file_is_passed_over(tmp_path, caplog, kind):
    checkpoints, newest = two(tmp_path)
    newest.unlink()
    if kind == "folder":
        newest.mkdir()
    elif kind == "pipe":
        os.mkfifo(newest)
    else:
        newest.symlink_to(newest.name if kind == "loop" else "nowhere")
    assert is_passed_over(checkpoints, newest, caplog)
    checkpoints.save(3, {"step": 3})
    assert checkpoints.latest() == (3, {"step": 3})


@pytest.mark.parametrize(
    "skeleton", ['{"__dict__": 5}', "[" * 100_000, "3", '{"a": 1}', '{"__dict__": [["step"]]}', "1" * 5000, "{"]
)
def test_another_structure_is_passed_over(tmp_path, caplog, skeleton):
    checkpoints, newest = two(tmp_path)
    save_file({"x": torch.zeros(1)}, newest, {"state": skeleton})
    assert is_passed_over(checkpoints, newest, caplog)


def test_a_state_of_another_program_is_passed_over(tmp_path, caplog):
    checkpoints, newest = two(tmp_path)
    save_state(newest, {"x": {"weight": torch.zeros(1)}})
    assert is_passed_over(checkpoints, newest, caplog, keys=("step", "weight"))


def test_a_checkpoint_of_before_there_were_hashes_is_taken(tmp_path):
    checkpoints, newest = two(tmp_path)
    with safe_open(newest, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, newest, {"state": about["state"]})
    step, state = checkpoints.latest(("step", "weight"))
    assert (
        step == state["step"] == 2
        and torch.equal(state["weight"], torch.full((20_000,), 2.0))
        and state["inner"] == {"n": [1, 2]}
    )


def test_a_file_in_the_folders_place_is_told(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=r"Expected a folder for checkpoints at .*found a file"):
        Checkpoints(tmp_path / "checkpoints", keep=1).latest()
    with pytest.raises(CheckpointError, match="File exists"):
        Checkpoints(tmp_path / "checkpoints", keep=1).save(1, {"step": 1})


def test_files_of_other_names_are_not_looked_at(tmp_path):
    checkpoints, _ = two(tmp_path)
    (tmp_path / "step-x.safetensors").write_bytes(b"x")
    assert checkpoints.latest()[0] == 2
