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

from ddpm_model import DDPM, ContextUnet, UserError, atomic_write, load_ddpm, save_weights
from tests.conftest import TOO_LONG, file_limit, link

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")


@pytest.fixture(scope="module")
def ddpm() -> DDPM:
    torch.manual_seed(0)
    return DDPM(ContextUnet(n_feat=8), n_T=50)


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
    """The message with which the file is refused: one line that names it."""
    with pytest.raises((UserError, OSError)) as caught:
        load_ddpm(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# ---- What the file holds ---------------------------------------------------------------------------------------------


def test_round_trip(ddpm, path):
    loaded = load_ddpm(path)
    assert (loaded.n_T, loaded.drop_prob, loaded.nn_model.n_feat) == (50, ddpm.drop_prob, 8)
    assert not loaded.training
    assert torch.equal(loaded.alphabar, ddpm.alphabar)
    for name, tensor in ddpm.nn_model.state_dict().items():
        assert torch.equal(tensor, loaded.nn_model.state_dict()[name])


def test_any_model_that_was_saved_can_be_loaded(path):
    """Also one in the memory format of training, with a whole number for its probability."""
    save_weights(path, DDPM(ContextUnet(n_feat=8).to(memory_format=torch.channels_last), n_T=50, drop_prob=0))
    assert load_ddpm(path).drop_prob == 0


def test_file_is_the_documented_one(ddpm, state):
    assert state["config"] == {"n_feat": 8, "n_T": 50, "drop_prob": ddpm.drop_prob}
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
        assert "not written by this version" in refusal(path)
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
    assert "No such file" in refusal(tmp_path / "none.pth")


@pytest.mark.parametrize("content", [b"", b"PK", b"not weights at all", bytes(1000)])
def test_foreign_file(path, content):
    path.write_bytes(content)
    assert "damaged" in refusal(path)


def test_unreadable_file(path, tmp_path, monkeypatch):
    refusal(tmp_path)  # a folder

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "Permission denied" in refusal(path)


@pytest.mark.parametrize("foreign", [[1, 2], {"a": 1}, {"config": {}, "model": {}}, torch.zeros(3), None])
def test_foreign_content(path, foreign):
    torch.save(foreign, path)
    assert "architecture" in refusal(path) or "not written by this version" in refusal(path)


def test_file_of_the_previous_version(state, path):
    """Its network had one ResBlock where there are two now."""
    state["model"] = {name.replace("enc1.", "enc."): tensor for name, tensor in state["model"].items()}
    torch.save(state, path)
    message = refusal(path)
    assert "architecture" in message
    assert "python train_ddpm.py" in message


@pytest.mark.parametrize(("key", "value"), [("n_feat", 16), ("n_feat", "8"), ("n_T", [50])])
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


def test_truncated_file(path):
    good = path.read_bytes()
    for share in (0.001, 0.1, 0.5, 0.9, 0.99, 0.9999):
        path.write_bytes(good[: int(share * len(good))])
        assert "damaged" in refusal(path)


# ---- Writing ---------------------------------------------------------------------------------------------------------

SIZE = 4_000_000


def write_many(path: Path, numbers, ready) -> None:
    for i in numbers:
        with atomic_write(path) as temporary:
            temporary.write_bytes(bytes([i % 256]) * SIZE)
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


def test_full_disk_leaves_the_old_file(path, tmp_path):
    before = path.read_bytes()
    with file_limit(1000), pytest.raises(OSError, match="File too large"):
        save_weights(path, DDPM(ContextUnet(n_feat=4)))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["weights.pth"]


@pytest.mark.parametrize("exists", [True, False])
def test_link_stays_a_link(tmp_path, exists):
    target = tmp_path / "disk" / "target.pth"
    target.parent.mkdir()
    path = tmp_path / "link.pth"
    link(path, Path("disk", "target.pth"))
    if exists:
        target.write_bytes(b"old")
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.is_symlink()
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"


def test_missing_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "c.pth"
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"


def test_what_cannot_be_written(tmp_path):
    """An OSError that names the place, and nothing is left."""
    file = tmp_path / "file"
    file.write_bytes(b"old")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folder, tmp_path / TOO_LONG, tmp_path / TOO_LONG / "y", file / "y"):
        with pytest.raises(OSError, match=str(tmp_path)), atomic_write(path) as temporary:
            temporary.write_bytes(b"new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
