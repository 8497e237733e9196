"""The weights file: what is saved comes back, damage is one clear line, and nothing in it ever runs as code."""

import errno
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import ddpm_model
from ddpm_model import DDPM, ContextUnet, UserError, load_ddpm, save_weights, write_atomically

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the platform has no named pipes")


@pytest.fixture(scope="module")
def ddpm() -> DDPM:
    torch.manual_seed(0)
    return DDPM(ContextUnet(n_feat=8), n_T=50, drop_prob=0.2)


@pytest.fixture
def path(ddpm, tmp_path) -> Path:
    """A good weights file."""
    path = tmp_path / "weights.pth"
    save_weights(path, ddpm)
    return path


@pytest.fixture
def state(path) -> dict:
    """What the file holds."""
    return torch.load(path, weights_only=True)


def refusal(path: Path) -> str:
    """The message with which the file is refused: one line that begins with its name or says that it cannot be read."""
    with pytest.raises(UserError) as caught:
        load_ddpm(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith((str(path), f"cannot read {path}"))
    return message


# ---- What the file holds ---------------------------------------------------------------------------------------------


def test_round_trip(ddpm, path):
    loaded = load_ddpm(path)
    assert (loaded.n_T, loaded.drop_prob, loaded.nn_model.n_feat) == (50, 0.2, 8)
    assert not loaded.training
    assert torch.equal(loaded.alphabar, ddpm.alphabar)
    for name, tensor in ddpm.nn_model.state_dict().items():
        assert torch.equal(tensor, loaded.nn_model.state_dict()[name])


def test_any_model_that_was_saved_can_be_loaded(path):
    """Also one in the memory format of training, with a whole number for its probability."""
    save_weights(path, DDPM(ContextUnet(n_feat=8).to(memory_format=torch.channels_last), n_T=50, drop_prob=0))
    assert load_ddpm(path).drop_prob == 0


def test_file_is_the_documented_one(ddpm, state):
    assert state["config"] == {"n_feat": 8, "n_T": 50, "drop_prob": 0.2}
    assert state["model"].keys() == ddpm.nn_model.state_dict().keys()
    assert state.keys() == {"config", "model"}


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["alone", "config", "model"])
@pytest.mark.parametrize("as_archive", [True, False])
def test_code_does_not_run(state, path, tmp_path, place, as_archive):
    marker = tmp_path / "code_ran"
    evil = Payload(marker) if place == "alone" else state | {place: Payload(marker)}
    if as_archive:
        torch.save(evil, path)
        assert "could run code" in refusal(path)
        assert not marker.exists()
        torch.load(path, weights_only=False)
    else:
        path.write_bytes(pickle.dumps(evil))
        refusal(path)
        assert not marker.exists()
        pickle.loads(path.read_bytes())
    assert marker.exists()  # where nothing refuses the payload, it works


# ---- What cannot be used ---------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    message = refusal(tmp_path / "none.pth")
    assert "does not exist" in message
    assert "train_ddpm.py" in message


@pytest.mark.parametrize("content", [b"", b"PK", b"not weights at all", bytes(1000)])
def test_foreign_file(path, content):
    path.write_bytes(content)
    assert "get it again" in refusal(path)


def test_unreadable_file(path, tmp_path, monkeypatch):
    assert "cannot read" in refusal(tmp_path)  # a folder

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refusal(path) == f"cannot read {path} (Permission denied)"


@pytest.mark.parametrize("foreign", [[1, 2], {"a": 1}, {"config": {}, "model": {}}, torch.zeros(3), None])
def test_foreign_content(path, foreign):
    torch.save(foreign, path)
    assert "architecture" in refusal(path)


def test_file_of_the_previous_version(state, path):
    """Its network had one ResBlock where there are two now."""
    state["model"] = {name.replace("enc1.", "enc."): tensor for name, tensor in state["model"].items()}
    torch.save(state, path)
    message = refusal(path)
    assert "architecture" in message
    assert "python train_ddpm.py" in message


@pytest.mark.parametrize(("key", "value"), [("n_feat", 16), ("n_feat", "8"), ("n_T", [50]), ("drop_prob", None)])
def test_impossible_config(state, path, key, value):
    state["config"][key] = value
    torch.save(state, path)
    assert "architecture" in refusal(path)


@pytest.mark.parametrize("change", [lambda tensor: tensor[:, 1:], lambda tensor: tensor.T.flatten()])
def test_impossible_tensor(state, path, change):
    name = "emb.weight"
    assert state["model"][name].shape == (32, 32)
    state["model"][name] = change(state["model"][name])
    torch.save(state, path)
    assert "architecture" in refusal(path)


def test_too_few_and_too_many_tensors(state, path):
    missing = state["model"].pop("emb.bias")
    torch.save(state, path)
    assert "architecture" in refusal(path)
    state["model"] |= {"emb.bias": missing, "more": missing}
    torch.save(state, path)
    assert "architecture" in refusal(path)


def test_our_own_bug_is_not_blamed_on_the_file(path, monkeypatch):
    def broken(self, *args):
        raise TypeError("a bug")

    monkeypatch.setattr(ddpm_model.ContextUnet, "__init__", broken)
    with pytest.raises(TypeError, match="a bug"):
        load_ddpm(path)


def test_truncated_file(path):
    good = path.read_bytes()
    for share in (0.001, 0.1, 0.5, 0.9, 0.99, 0.9999):
        path.write_bytes(good[: int(share * len(good))])
        assert "damaged" in refusal(path)


# ---- Writing ---------------------------------------------------------------------------------------------------------

SIZE = 4_000_000


def write_many(path: Path, numbers, ready) -> None:
    for i in numbers:
        write_atomically(path, bytes([i % 256]) * SIZE)
        ready.set()


def read_whole(path: Path) -> int:
    """The byte that fills the file, which no other byte is in."""
    data = path.read_bytes()
    assert data == data[:1] * SIZE
    return data[0]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_writer_leaves_the_old_or_the_new_file(tmp_path):
    """Saves go on in another process, which is killed (SIGKILL) at 30 random moments."""
    rng = random.Random(0)
    path = tmp_path / "state.pth"
    fork = multiprocessing.get_context("fork")
    found = set()
    for _ in range(30):
        ready = fork.Event()
        writer = fork.Process(target=write_many, args=(path, itertools.count(), ready), daemon=True)
        start = time.perf_counter()
        writer.start()
        assert ready.wait(60)
        time.sleep(rng.random() * 2 * (time.perf_counter() - start))  # until within the next two writes or so
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found.add(read_whole(path))
    assert len(found) > 1  # the kills came at different moments


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_writers_of_one_file_both_end_well(tmp_path):
    path = tmp_path / "state.pth"
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    writers = [fork.Process(target=write_many, args=(path, [i] * 20, ready), daemon=True) for i in (1, 2)]
    for writer in writers:
        writer.start()
    assert ready.wait(60)
    while any(writer.is_alive() for writer in writers):
        assert read_whole(path) in (1, 2)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert read_whole(path) in (1, 2)
    assert os.listdir(tmp_path) == ["state.pth"]


def test_full_disk_leaves_the_old_file(path, tmp_path, monkeypatch):
    before = path.read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as caught:
        save_weights(path, DDPM(ContextUnet(n_feat=4)))
    assert str(caught.value) == f"cannot write {path} (No space left on device)"
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["weights.pth"]


@pytest.mark.parametrize("exists", [True, False])
def test_link_stays_a_link(tmp_path, exists):
    folder = tmp_path / "disk"
    folder.mkdir()
    target = folder / "target.pth"
    link = tmp_path / "link.pth"
    try:
        link.symlink_to(Path("disk", "target.pth"))
    except (OSError, NotImplementedError):
        pytest.skip("the platform makes no symbolic links")
    if exists:
        target.write_bytes(b"old")
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"


def test_missing_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "c.pth"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


@needs_fifo
def test_what_is_no_file_is_refused(tmp_path):
    """A named pipe stands for every device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(UserError, match=r"\(\w.*\)$") as caught:
            write_atomically(path, b"new")
        assert str(caught.value).startswith(f"cannot write {path} (")
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_error_names_the_path(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    for path in (tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "y", file / "y"):
        with pytest.raises(UserError, match=r"\(\w.*\)$") as caught:
            write_atomically(path, b"new")
        assert str(caught.value).startswith(f"cannot write {path} (")
    assert os.listdir(tmp_path) == ["file"]
