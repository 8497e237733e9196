"""The weights file: what is saved comes back, a file of no use is one clear line, and nothing in it runs as code."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from ddpm_model import DDPM, ContextUnet, UserError, atomic_write, load_ddpm, save_weights
from tests.conftest import file_limit, link, posix

DDPM_50 = DDPM(ContextUnet(n_feat=8), n_T=50, drop_prob=0).to(memory_format=torch.channels_last)
CONTENTS = [bytes([i]) * 4_000_000 for i in range(20)]  # of a file that takes some time to write
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


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
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in DDPM_50.state_dict().items())


def test_device(path, monkeypatch):
    """The weights go to the device that was asked for, also those that were saved on a GPU that is not here."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
    save_weights(path, DDPM_50)
    for device in ("cpu", "meta"):
        assert {tensor.device.type for tensor in load_ddpm(path, device).state_dict().values()} == {device}


class Payload:
    def __reduce__(self):
        return os.mkdir, ("code_ran",)


def test_code_does_not_run(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    torch.save({"config": {}, "model": Payload()}, path)
    refusal(path)
    assert not os.path.exists("code_ran")
    torch.load(path, weights_only=False)
    assert os.path.exists("code_ran")  # where nothing refuses the payload, it works


BAD_FILES = {
    "missing": lambda path, state: path.unlink(),
    "folder": lambda path, state: (path.unlink(), path.mkdir()),
    "empty": lambda path, state: path.write_bytes(b""),
    "truncated": lambda path, state: path.write_bytes(path.read_bytes()[:-1000]),
    "other content": lambda path, state: torch.save([1, 2], path),
    "other config": lambda path, state: torch.save(state | {"config": {}}, path),
    "other network": lambda path, state: (state["model"].popitem(), torch.save(state, path)),
    "other size": lambda path, state: (state["config"].update(n_feat=4), torch.save(state, path)),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_file_of_no_use(path, kind):
    BAD_FILES[kind](path, torch.load(path, weights_only=True))
    message = refusal(path)
    assert ("No such file" in message) == (kind == "missing")
    assert message.count("torch.Size") == 2 * (kind == "other size")  # one sees what differs


def write(path: Path, contents: list[bytes]) -> None:
    for content in contents:
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)


@posix
def test_writers(path):
    """A reader finds a whole file: while two processes write it, which both end well, and after one was killed."""
    fork = multiprocessing.get_context("fork")
    path.write_bytes(CONTENTS[0])
    writers = [fork.Process(target=write, args=(path, 20 * [content])) for content in CONTENTS[:2]]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in CONTENTS
    assert [writer.exitcode for writer in writers] == [0, 0] and os.listdir(path.parent) == [path.name]
    found = set()
    for i in range(15):
        writer = fork.Process(target=write, args=(path, 10 * CONTENTS))
        writer.start()
        time.sleep(i / 100)
        writer.kill()
        writer.join()
        found.add(CONTENTS.index(path.read_bytes()))
    assert len(found) > 2  # the kills came at different moments


def test_full_disk_leaves_the_old_file(path):
    before = path.read_bytes()
    with file_limit(1000), pytest.raises(OSError, match="File too large"):
        save_weights(path, DDPM_50)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["weights.pth"]


def test_link_stays_a_link(path):
    path.write_bytes(b"old")
    link(path.with_name("link"), path.name)
    save_weights(path.with_name("link"), DDPM_50)
    assert path.with_name("link").is_symlink() and not path.is_symlink() and load_ddpm(path)


def test_temporary_file_is_beside_its_target(path):
    """On the same disk, so that renaming it is one operation."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
    assert temporary.parents[1] == path.parent and path.read_bytes() == b"new"
