"""The weights file: what is saved comes back, a file of no use is one clear line, and nothing in it runs as code."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from ddpm_model import UserError, atomic_write, load_ddpm, read_state, save_weights
from tests.conftest import file_limit, link, posix, small_ddpm

CONFIG = {"n_feat": 8, "n_classes": 10, "n_T": 50, "drop_prob": 0}
DDPM_50 = small_ddpm(**CONFIG).to(memory_format=torch.channels_last)
CONTENTS = [bytes([i]) * 4_000_000 for i in range(20)]  # of a file that takes some time to write
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def path(tmp_path) -> Path:
    """A good weights file."""
    save_weights(tmp_path / "weights.pth", DDPM_50)
    return tmp_path / "weights.pth"


def test_round_trip(path):
    """The file is the documented one, and what it holds comes back. Older ones have ten classes and do not say so."""
    state = torch.load(path, weights_only=True)
    assert state.keys() == {"config", "model"} and state["config"] == CONFIG
    loaded = load_ddpm(path)
    assert loaded.config == CONFIG and not loaded.training
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in DDPM_50.state_dict().items())
    del state["config"]["n_classes"]
    torch.save(state, path)
    assert load_ddpm(path).config == CONFIG


def test_device(path, monkeypatch):
    """It is the one that was asked for, whatever the weights were saved on. A full GPU says nothing about the file."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
    save_weights(path, DDPM_50)
    for device in ("cpu", "meta"):
        assert {tensor.device.type for tensor in load_ddpm(path, device).state_dict().values()} == {device}
    with pytest.raises(torch.cuda.OutOfMemoryError), read_state(path):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("code_ran",)


def test_code_does_not_run(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    torch.save({"config": {}, "model": Payload()}, path)
    with pytest.raises(UserError, match="is damaged"):
        load_ddpm(path)
    assert not os.path.exists("code_ran")
    torch.load(path, weights_only=False)
    assert os.path.exists("code_ran")  # where nothing refuses the payload, it works


DAMAGED = "{} is damaged, or is not a file that train_ddpm.py wrote"
OTHER = "{} is of another network or version ("
BAD_FILES = {
    "missing": ("[Errno 2] No such file", lambda path, state: path.unlink()),
    "folder": ("[Errno", lambda path, state: (path.unlink(), path.mkdir())),
    "empty": (DAMAGED, lambda path, state: path.write_bytes(b"")),
    "truncated": (DAMAGED, lambda path, state: path.write_bytes(path.read_bytes()[:-1000])),
    "git-lfs": (DAMAGED, lambda path, state: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha")),
    "page": (DAMAGED, lambda path, state: path.write_text("<!DOCTYPE html>\n<html><body>404</body></html>\n")),
    "other content": (OTHER + "TypeError: ", lambda path, state: torch.save([1, 2], path)),
    "other config": (OTHER + "KeyError: 'n_feat')", lambda path, state: torch.save(state | {"config": {}}, path)),
    "other network": (OTHER, lambda path, state: (state["model"].popitem(), torch.save(state, path))),
    "other size": (OTHER, lambda path, state: (state["config"].update(n_feat=4), torch.save(state, path))),
    "other classes": (OTHER, lambda path, state: (state["config"].update(n_classes=4), torch.save(state, path))),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_file_of_no_use(path, kind):
    """That it cannot be opened, that it is no such file, and that it does not fit are three messages."""
    expected, spoil = BAD_FILES[kind]
    spoil(path, torch.load(path, weights_only=True))
    with pytest.raises(UserError if "{}" in expected else OSError) as caught:
        load_ddpm(path)
    message = str(caught.value)
    assert expected.format(path) in message and str(path) in message and "\n" not in message
    assert message.count("torch.Size") == 2 * (kind in ("other size", "other classes"))  # one sees what differs


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


def test_what_a_save_leaves(path):
    """Of a full disk the old file alone. A link stays a link. The temporary file is on the disk of its target."""
    before = path.read_bytes()
    with file_limit(1000), pytest.raises(OSError, match="File too large"):
        save_weights(path, DDPM_50)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["weights.pth"]
    link(path.with_name("link"), path.name)
    with atomic_write(path.with_name("link")) as temporary:
        temporary.write_bytes(b"new")
    assert path.with_name("link").is_symlink() and not path.is_symlink() and path.read_bytes() == b"new"
    assert temporary.parents[1] == path.parent
