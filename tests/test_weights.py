"""The weights file: what is saved comes back, damage is one clear line, and nothing in it ever runs as code."""

import itertools
import multiprocessing
import os
import pickle
import random
import signal
import time
import zipfile

import pytest
import torch

from ddpm_model import DDPM, ContextUnet, WeightsError, load_ddpm, save_weights, write_atomically


@pytest.fixture(scope="module")
def ddpm() -> DDPM:
    torch.manual_seed(0)
    return DDPM(ContextUnet(n_feat=8), DDPM.default_betas(50), 50, drop_prob=0.2)


@pytest.fixture(scope="module")
def good_file(ddpm, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "good.pth"
    save_weights(path, ddpm)
    return path


def refused(path) -> str:
    """The message with which the file is refused: one line that names it."""
    with pytest.raises(WeightsError) as caught:
        load_ddpm(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_round_trip(ddpm, good_file):
    loaded = load_ddpm(good_file)
    assert (loaded.n_T, loaded.betas, loaded.drop_prob) == (ddpm.n_T, ddpm.betas, ddpm.drop_prob)
    assert not loaded.training and loaded.nn_model.n_feat == 8
    for name, tensor in ddpm.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert torch.equal(loaded.alphabar, ddpm.alphabar)


def test_file_is_the_documented_one(good_file):
    state = torch.load(good_file, weights_only=True)
    assert set(state) == {"config", "model"}
    assert all(isinstance(tensor, torch.Tensor) for tensor in state["model"].values())


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def dump_pickle(obj, path):
    path.write_bytes(pickle.dumps(obj))


@pytest.mark.parametrize("dump", [torch.save, dump_pickle])
@pytest.mark.parametrize("place", ["alone", "config", "model"])
def test_a_pickle_that_would_run_code_is_refused(good_file, tmp_path, dump, place):
    marker, path = tmp_path / "code_ran", tmp_path / "evil.pth"
    state = torch.load(good_file, weights_only=True)
    dump(Payload(marker) if place == "alone" else state | {place: Payload(marker)}, path)
    refused(path)
    assert not marker.exists()
    if dump is torch.save:  # the payload does work where nothing refuses it
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert marker.exists()


def test_missing_empty_and_foreign_files(tmp_path):
    path = tmp_path / "weights.pth"
    assert "does not exist" in refused(path) and "train_ddpm.py" in refused(path)
    for content in (b"", b"PK", b"not weights at all", bytes(1000)):
        path.write_bytes(content)
        refused(path)
    refused(tmp_path)  # a folder
    for foreign in ([1, 2], {"a": 1}, {"config": {}, "model": {}}, torch.zeros(3), None):
        torch.save(foreign, path)
        assert "architecture" in refused(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_feat", 16), ("n_feat", 2**40), ("n_feat", -8), ("n_feat", "8"), ("n_classes", 3), ("n_T", 0), ("n_T", 2**40),
     ("n_T", float("nan")), ("betas", (0.5, 0.1)), ("betas", None)],
)  # fmt: skip
def test_another_architecture_is_refused(good_file, tmp_path, key, value):
    state = torch.load(good_file, weights_only=True)
    state["config"][key] = value
    torch.save(state, tmp_path / "other.pth")
    assert "architecture" in refused(tmp_path / "other.pth")


def test_weights_that_are_not_finite_are_refused(good_file, tmp_path):
    state = torch.load(good_file, weights_only=True)
    next(iter(state["model"].values())).view(-1)[0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    refused(tmp_path / "nan.pth")


def test_a_record_marked_as_a_folder_is_refused(good_file, tmp_path):
    """torch.load reads nothing of such a record, and takes for its weights what happens to be in memory."""
    with zipfile.ZipFile(good_file) as good, zipfile.ZipFile(tmp_path / "folder.pth", "w") as bad:
        for entry in good.infolist():
            data = good.read(entry)
            entry.external_attr = 0x10 if entry.filename.endswith("/data/3") else 0
            bad.writestr(entry, data)
    assert "damaged" in refused(tmp_path / "folder.pth")


def test_random_damage_is_refused_or_harmless(ddpm, good_file, tmp_path):
    """Truncations and bit flips: one line, or (a flip in the padding) the very weights that were saved."""
    rng, good, path = random.Random(0), good_file.read_bytes(), tmp_path / "damaged.pth"
    n_refused = 0
    for trial in range(400):
        damaged = bytearray(good)
        if trial % 4 == 0:
            del damaged[rng.randrange(len(good)) :]
        elif trial % 4 == 1:  # the archive's directory, where most of the structure is
            damaged[-1 - rng.randrange(8000)] ^= 1 << rng.randrange(8)
        else:
            for _ in range(rng.choice((1, 1, 3, 30))):
                damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_ddpm(path)
        except WeightsError as error:
            assert "\n" not in str(error)
            n_refused += 1
        else:
            assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), ddpm.parameters()))
    assert n_refused > 200


SIZE = 10_000_000


def write_forever(path, ready):
    for i in itertools.count():
        write_atomically(path, bytes([i % 256]) * SIZE)
        ready.set()


def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_file(tmp_path):
    """Saves go on in another process, which is killed (SIGKILL) at 40 random moments."""
    rng, path, fork = random.Random(0), tmp_path / "state.pth", multiprocessing.get_context("fork")
    values = []
    for _ in range(40):
        ready = fork.Event()
        writer = fork.Process(target=write_forever, args=(path, ready), daemon=True)
        writer.start()
        assert ready.wait(30)
        time.sleep(rng.random() * 0.03)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        data = path.read_bytes()
        assert data == data[:1] * SIZE
        values.append(data[0])
    assert len(set(values)) > 1  # the kills came at different moments


def test_a_full_disk_leaves_the_old_file(ddpm, tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    save_weights(path, ddpm)
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, ddpm)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["weights.pth"]
