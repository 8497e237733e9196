"""The weights file: what is saved comes back, a file of no use is one clear line, and nothing in it runs as code."""

import contextlib
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pytest
import torch

import ddpm_model
from ddpm_model import DDPM, N_CLASSES, ContextUnet, UserError, atomic_write, load_ddpm, save_weights
from tests.conftest import file_limit, link, posix

DDPM_50 = DDPM(ContextUnet(n_feat=8), n_T=50, drop_prob=0).to(memory_format=torch.channels_last)
SIZE = 4_000_000


@pytest.fixture
def path(tmp_path) -> Path:
    """A good weights file."""
    save_weights(tmp_path / "weights.pth", DDPM_50)
    return tmp_path / "weights.pth"


def refusal(path: Path) -> str:
    """The message with which the file is refused: one line that names it and says what helps."""
    with pytest.raises(UserError) as caught:
        load_ddpm(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and "python train_ddpm.py" in message
    return message


def test_round_trip(path):
    """The file is the documented one, and what it holds comes back."""
    state = torch.load(path, weights_only=True)
    assert state.keys() == {"config", "model"} and state["config"] == {"n_feat": 8, "n_T": 50, "drop_prob": 0}
    loaded = load_ddpm(path)
    assert (loaded.nn_model.n_feat, loaded.n_T, loaded.drop_prob, loaded.training) == (8, 50, 0, False)
    assert state["model"].keys() == loaded.nn_model.state_dict().keys()
    for name, tensor in DDPM_50.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_device(path, monkeypatch):
    """The weights go to the device that was asked for, also those that were saved on a GPU that is not here."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
    save_weights(path, DDPM_50)
    for device in ("cpu", "meta"):
        assert {tensor.device.type for tensor in load_ddpm(path, device).state_dict().values()} == {device}


class Payload:
    def __reduce__(self):
        return os.mkdir, ("code_ran",)


@pytest.mark.parametrize("save", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_does_not_run(path, monkeypatch, save):
    monkeypatch.chdir(path.parent)
    save({"config": {}, "model": Payload()}, path)
    refusal(path)
    assert not os.path.exists("code_ran")
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert os.path.exists("code_ran")  # where nothing refuses the payload, it works


BAD_FILES = {
    "missing": lambda path, state: path.unlink(),
    "folder": lambda path, state: (path.unlink(), path.mkdir()),
    "empty": lambda path, state: path.write_bytes(b""),
    "foreign": lambda path, state: path.write_bytes(b"not weights at all"),
    "truncated": lambda path, state: path.write_bytes(path.read_bytes()[:-1000]),
    "other content": lambda path, state: torch.save([1, 2], path),
    "other config": lambda path, state: torch.save(state | {"config": {}}, path),
    "other network": lambda path, state: (state["model"].popitem(), torch.save(state, path)),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_file_of_no_use(path, kind):
    BAD_FILES[kind](path, torch.load(path, weights_only=True))
    assert ("No such file" in refusal(path)) == (kind == "missing")


def test_other_number_of_classes(path, monkeypatch):
    """The message has both sizes, so one sees what differs."""
    monkeypatch.setattr(ddpm_model, "N_CLASSES", N_CLASSES + 5)
    message = refusal(path)
    assert f"[{N_CLASSES + 1}, " in message and f"[{N_CLASSES + 6}, " in message


def start_writing(path: Path, values: range | list[int]) -> multiprocessing.Process:
    """Another process writes SIZE bytes of each value to path, again and again."""

    def write() -> None:
        for value in values:
            with atomic_write(path) as temporary:
                temporary.write_bytes(bytes([value]) * SIZE)

    path.write_bytes(bytes(SIZE))
    process = multiprocessing.get_context("fork").Process(target=write, daemon=True)
    process.start()
    return process


def read_whole(path: Path) -> int:
    """The byte that fills the file, which no other byte is in."""
    data = path.read_bytes()
    assert data == data[:1] * SIZE
    return data[0]


@posix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_writer_leaves_the_old_or_the_new_file(tmp_path):
    found = set()
    for i in range(15):
        writer = start_writing(tmp_path / "state.pth", range(1, 256))
        time.sleep(i / 100)
        writer.kill()
        writer.join()
        found.add(read_whole(tmp_path / "state.pth"))
    assert len(found) > 2  # the kills came at different moments


@posix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_writers_of_one_file_both_end_well(tmp_path):
    writers = [start_writing(tmp_path / "state.pth", [i] * 20) for i in (1, 2)]
    while any(writer.is_alive() for writer in writers):
        read_whole(tmp_path / "state.pth")
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["state.pth"]


def test_full_disk_leaves_the_old_file(path):
    before = path.read_bytes()
    with file_limit(1000), pytest.raises(OSError, match="File too large"):
        save_weights(path, DDPM_50)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["weights.pth"]


@pytest.mark.parametrize("target", ["old", "new"])
def test_link_stays_a_link(tmp_path, target):
    (tmp_path / "old").write_bytes(b"old")
    link(tmp_path / "link", target)
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_bytes(b"text")
    assert (tmp_path / "link").is_symlink() and not (tmp_path / target).is_symlink()
    assert (tmp_path / target).read_bytes() == b"text"
