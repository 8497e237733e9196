"""train_ddpm.py as a user runs it: it learns, survives what stops it, refuses the impossible, and shares its work."""

import contextlib
import gzip
import hashlib
import http.server
import itertools
import os
import random
import re
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import train_ddpm
from ddpm_model import DDPM, UserError, load_ddpm, read_state, write_atomically
from tests.conftest import (
    PROJECT,
    SMALL_RUN,
    TOO_LONG,
    assert_one_line_error,
    file_limit,
    fill,
    pipe,
    posix,
    run,
    start,
    write_idx,
)

WEIGHTS = Path("weights/ddpm_mnist.pth")
STATE = Path("weights/ddpm_mnist.pth.train")
RESUME = ("train_ddpm.py", "--data-dir", "small", "--device", "cpu", "--resume")


@pytest.fixture
def train(call, monkeypatch):
    """A small run without previews, which take most of its time."""
    monkeypatch.setattr(train_ddpm, "save_preview", lambda *args: None)
    return lambda cwd, *options: call(cwd, "train_ddpm.py", *SMALL_RUN, *options)


def losses(output: str) -> list[float]:
    pattern = r"^epoch +\d+/\d+  100%  loss ([\d.]+)  \d+ s  [\d.]+ min left$"
    return [float(loss) for loss in re.findall(pattern, output, re.MULTILINE)]


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def stopping(step: int, sent: signal.Signals) -> str:
    """Code that trains in fp32 and sends a signal to itself in a step, counted from 0 where this process began."""
    return f"""
import contextlib, itertools, os, train_ddpm
from ddpm_model import DDPM
forward, count = DDPM.forward, itertools.count()
def stops(self, x, c):
    if next(count) == {step}:
        os.kill(os.getpid(), {int(sent)})
    return forward(self, x, c)
DDPM.forward = stops
train_ddpm.autocast = lambda device: contextlib.nullcontext()
train_ddpm.main()
"""


def wait_for_save(process) -> None:
    while not process.stdout.readline().startswith("saved"):
        assert process.poll() is None, process.stderr.read()


def assert_saved(folder: Path, epoch: int) -> None:
    """That epoch is what --resume goes on from; 0 is none."""
    assert (read_state(folder / STATE)["epoch"] if (folder / STATE).exists() else 0) == epoch


def assert_same(a, b) -> None:
    """Two nested states are equal, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


# ---- Learning


def test_learns(workdir, call):
    result = call(workdir, "train_ddpm.py", *SMALL_RUN, "--epochs", "120", "--lr", "0.01", "--save-every", "50")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "replaced" not in result.stdout
    assert len(losses(result.stdout)) == 120 and losses(result.stdout)[-1] < 0.5 * losses(result.stdout)[0]
    sheets = [f"ddpm_mnist.pth.epoch_{epoch}.png" for epoch in (100, 120, 50)]
    assert sorted(path.name for path in (workdir / "weights").iterdir()) == [WEIGHTS.name, *sheets, STATE.name]
    with Image.open(workdir / "weights" / sheets[1]) as sheet:
        assert sheet.size == ((30 * 10 + 2) * 3, (30 * 6 + 2) * 3)
    digits = load_ddpm(workdir / WEIGHTS).sample(torch.arange(10), generator=torch.Generator().manual_seed(0))
    bars = digits.mean(dim=(1, 3)).numpy()  # brightness of each row; digit c has its bar at rows 2 c + 3 to 2 c + 5
    centres = (bars * np.arange(28)).sum(1) / bars.sum(1)
    assert np.corrcoef(centres, np.arange(10))[0, 1] > 0.9
    drawn = call(workdir, "inference_ddpm.py", "--digit", "4", "--steps", "4")
    assert drawn.returncode == 0 and (workdir / "generated_outputs" / "digit_4_grid.png").exists(), drawn.stderr


def test_learning_rate():
    """It warms up to the peak and ends at zero."""
    total, peak, warmup = 10_000, 2e-3, train_ddpm.WARMUP_STEPS
    rates = [train_ddpm.learning_rate(step, total, peak) for step in range(total + 1)]
    assert rates[warmup] == pytest.approx(peak) == max(rates)
    assert np.all(np.diff(rates[:warmup]) > 0) and np.all(np.diff(rates[warmup:]) < 0)
    assert rates[0] > 0 and rates[-1] == pytest.approx(0, abs=1e-12)
    for few in (1, 2, 9, 11):
        assert all(0 < train_ddpm.learning_rate(step, few, peak) <= peak for step in range(few))


def test_last_step(workdir, train):
    """It has the learning rate of its place, and what is saved for drawing is an average of the last weights."""
    assert train(workdir, "--epochs", "3", "--lr", "0.5").returncode == 0
    state = read_state(workdir / STATE)
    assert state["optimizer"]["param_groups"][0]["lr"] == train_ddpm.learning_rate(11, 12, 0.5)
    weights = load_ddpm(workdir / WEIGHTS).nn_model.state_dict()
    assert all(torch.equal(weights[name], state["ema"][f"nn_model.{name}"]) for name in weights)
    assert not any(torch.equal(weights[name], state["ddpm"][f"nn_model.{name}"]) for name in weights)


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_bf16_on_gpus(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert isinstance(train_ddpm.autocast(torch.device("cuda")), torch.autocast) == native


@pytest.mark.parametrize("capabilities", [{"avx512_bf16": True}, {"amx_bf16": True}, {"amx_bf16": False}, {}, None])
def test_bf16_on_cpus(monkeypatch, capabilities):
    if capabilities is None:  # torch is too old to tell
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    native = True in (capabilities or {}).values()
    for device, expected in (("cpu", native), ("mps", False)):
        with train_ddpm.autocast(torch.device(device)):
            assert ((torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16) == expected


# ---- Stopping and going on


@posix
def test_resume_is_exact(workdir, tmp_path_factory, call, monkeypatch):
    """A run that was stopped and killed ends with the weights of one that was not."""
    options = (*SMALL_RUN, "--epochs", "12", "--save-every", "3")  # 4 steps an epoch
    result = run(workdir, "-c", stopping(18, signal.SIGINT), *options)
    assert result.returncode == 130 and result.stderr == "stopped\n", result.stderr
    assert_saved(workdir, 3)
    result = run(workdir, "-c", stopping(14, signal.SIGKILL), *RESUME[1:])
    assert result.returncode == -signal.SIGKILL
    assert_saved(workdir, 6)
    monkeypatch.setattr(train_ddpm, "autocast", lambda device: contextlib.nullcontext())
    result = call(workdir, *RESUME)
    assert result.returncode == 0 and "epochs are done" in result.stdout, result.stderr
    whole = fill(tmp_path_factory.mktemp("whole"))
    assert call(whole, "train_ddpm.py", *options).returncode == 0
    stopped, straight = (read_state(folder / STATE) for folder in (workdir, whole))
    assert stopped["options"].pop("data_dir") != straight["options"].pop("data_dir")
    assert_same(stopped, straight)
    assert_same(read_state(workdir / WEIGHTS), read_state(whole / WEIGHTS))


@posix
def test_killed_at_random_moments(workdir):
    rng, done, resume = random.Random(1), 0, ()
    for _ in range(3):
        process = start(workdir, "train_ddpm.py", *SMALL_RUN, "--epochs", "1000000", "--save-every", "1", *resume)
        wait_for_save(process)
        time.sleep(rng.random())
        process.kill()
        process.communicate()
        load_ddpm(workdir / WEIGHTS)
        epoch = read_state(workdir / STATE)["epoch"]
        assert epoch > done
        done, resume = epoch, ("--resume",)


@pytest.mark.parametrize(("steps", "saved"), [(2, 0), (6, 1)])
@pytest.mark.parametrize("end", ["nan", "Ctrl-C"])
def test_ends_early(workdir, monkeypatch, train, end, steps, saved):
    """After some steps, four of which are an epoch. The first save replaces what is there, and it is said first."""
    (workdir / "weights").mkdir()
    (workdir / WEIGHTS).write_bytes(b"precious")
    forward, count = DDPM.forward, itertools.count()

    def ends(self, x, c):
        late = next(count) >= steps
        if late and end == "Ctrl-C":
            raise KeyboardInterrupt
        return forward(self, x, c) * (float("nan") if late else 1)

    monkeypatch.setattr(DDPM, "forward", ends)
    result = train(workdir, "--epochs", "3", "--save-every", "1")
    if end == "nan":
        assert_one_line_error(result, "nan", f"epoch {saved + 1}", "--lr")
    else:
        assert result.returncode == 130 and result.stderr == "stopped\n"
    assert result.stdout.count("--resume goes on from here") == saved
    assert result.stdout.startswith(f"{WEIGHTS} exists and is replaced at the first save")
    assert_saved(workdir, saved)
    assert ((workdir / WEIGHTS).read_bytes() == b"precious") == (saved == 0)


def test_ends_before_training(workdir, monkeypatch, train):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_ddpm, "load_mnist", stop)
    result = train(workdir)
    assert result.returncode == 130 and result.stderr == "stopped\n"


@pytest.mark.parametrize(
    ("name", "time", "saved"),
    [(STATE, 1, 0), (WEIGHTS, 1, 0), (STATE, 2, 0), (WEIGHTS, 2, 1), (STATE, 3, 1), (WEIGHTS, 3, 2)],
)
def test_a_save_fails(workdir, monkeypatch, train, call, name, time, saved):
    """The time at which the file is replaced: 1 is the trial before training, 2 is epoch 1. What is said is true."""
    replace, count = os.replace, itertools.count(1)

    def refused(source, target):
        if Path(target) == workdir / name and next(count) == time:
            raise PermissionError(1, "Operation not permitted")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    result = train(workdir, "--epochs", "2", "--save-every", "1")
    assert_one_line_error(result, name, "Operation not permitted")
    assert len(losses(result.stdout)) == time - 1
    assert result.stdout.count("--resume goes on from here") == max(0, time - 2)
    assert_saved(workdir, saved)
    assert not [path for path in files(workdir) if path.suffix == ".tmp"]
    if saved:
        result = call(workdir, *RESUME, "--epochs", "3")
        assert len(losses(result.stdout)) == 3 - saved
        load_ddpm(workdir / WEIGHTS)


@pytest.mark.parametrize(
    "weights",
    ["small", ".", "", "train_ddpm.py/w.pth", "pipe", TOO_LONG, 252 * "w", f"{TOO_LONG}/w.pth"],
    ids=["folder", "here", "empty", "file in the way", "pipe", "too long", "too long with .train", "folder too long"],
)
def test_weights_that_cannot_be_written(workdir, train, weights):
    """Refused before training, and nothing is left behind."""
    pipe(workdir / "pipe")
    before = files(workdir)
    result = train(workdir, "--epochs", "1", "--weights", weights)
    assert_one_line_error(result, f"cannot write {weights}")
    assert "epoch " not in result.stdout
    assert files(workdir) == before


def test_full_disk(workdir, train):
    """Refused before training, and what is there stays."""
    (workdir / "weights").mkdir()
    (workdir / STATE).write_bytes(b"precious")
    with file_limit(500_000):  # less than the state of this network takes
        result = train(workdir, "--epochs", "1")
    assert_one_line_error(result, WEIGHTS, "too large")
    assert losses(result.stdout) == []
    assert [path.name for path in (workdir / "weights").iterdir()] == [STATE.name]


@pytest.mark.parametrize("n_feat", [1, 8])
def test_room_that_is_tried(workdir, monkeypatch, train, n_feat):
    """It is enough for all that is there at the same time: the weights, a state, and the state that replaces it."""
    rooms = []

    def remember(path, data):
        rooms.append(len(data))
        write_atomically(path, data)

    monkeypatch.setattr(train_ddpm, "write_atomically", remember)
    assert train(workdir, "--epochs", "1", "--n-feat", n_feat).returncode == 0
    needed = 2 * (workdir / STATE).stat().st_size + (workdir / WEIGHTS).stat().st_size
    assert len(rooms) == 2 and min(rooms) >= needed


def test_preview(workdir, call):
    """It lies beside the weights. One that cannot be written is a warning. The working directory stays clean."""
    before = {path.name for path in workdir.iterdir()}
    command = ("train_ddpm.py", *SMALL_RUN, "--save-every", "1", "--weights", "out/a.pth")
    assert call(workdir, *command, "--epochs", "1").returncode == 0
    assert {path.name for path in workdir.iterdir()} == before | {"out"}
    assert {path.name for path in (workdir / "out").iterdir()} == {"a.pth", "a.pth.train", "a.pth.epoch_01.png"}
    (workdir / "out" / "a.pth.epoch_02.png").mkdir()
    result = call(workdir, *command, "--epochs", "3", "--resume")
    assert result.returncode == 0 and f"warning: cannot write {Path('out/a.pth.epoch_02.png')}" in result.stdout
    assert (workdir / "out" / "a.pth.epoch_03.png").is_file()


def test_states_are_not_shared(workdir, train):
    for seed, name in enumerate(("lr0.01", "lr0.02")):
        assert train(workdir, "--epochs", "1", "--seed", seed, "--weights", f"w/{name}").returncode == 0
    for seed, name in enumerate(("lr0.01", "lr0.02")):
        assert read_state(workdir / "w" / f"{name}.train")["options"]["seed"] == seed


@pytest.mark.parametrize("found", [None, b"of another run", "as saved"])
def test_nothing_left(workdir, train, call, found):
    """The weights are those of the state, whatever became of them meanwhile."""
    assert train(workdir, "--epochs", "2").returncode == 0
    weights = (workdir / WEIGHTS).read_bytes()
    for epochs in ((), ("--epochs", "1")):
        if found != "as saved":
            (workdir / WEIGHTS).unlink()
        if isinstance(found, bytes):
            (workdir / WEIGHTS).write_bytes(found)
        result = call(workdir, *RESUME, *epochs)
        assert result.returncode == 0 and "2 epochs are done; a larger --epochs" in result.stdout
        assert (workdir / WEIGHTS).read_bytes() == weights
    result = call(workdir, *RESUME, "--epochs", "3")
    assert len(losses(result.stdout)) == 1 and "a larger --epochs" not in result.stdout


def test_resumed_run_has_the_data_of_the_run(workdir, tmp_path_factory, train, call):
    """From another folder too, and any other option that decides what is learned."""
    options = ("--lr", "0.003", "--drop-prob", "0.2", "--seed", "7", "--save-every", "1")
    assert train(workdir, "--epochs", "1", *options).returncode == 0
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    command = ("train_ddpm.py", "--resume", "--epochs", "2", "--weights", workdir / WEIGHTS, "--device", "cpu")
    assert call(elsewhere, *command).returncode == 0
    whole = fill(tmp_path_factory.mktemp("whole"))
    assert train(whole, "--epochs", "1", *options).returncode == 0
    assert call(whole, "train_ddpm.py", *SMALL_RUN, *options, "--epochs", "2", "--resume").returncode == 0
    assert_same(read_state(workdir / WEIGHTS), read_state(whole / WEIGHTS))
    assert not list(elsewhere.iterdir())


def test_foreign_states(workdir, train, call):
    assert_one_line_error(call(workdir, *RESUME), STATE, "does not exist")
    assert train(workdir, "--epochs", "1").returncode == 0
    good = read_state(workdir / STATE)
    without_data_dir = {name: value for name, value in good["options"].items() if name != "data_dir"}
    foreign = [
        [],
        {"config": {}, "model": {}},
        {"options": good["options"]},
        good | {"options": 1},
        good | {"options": without_data_dir},  # of an earlier version
        good | {"ddpm": {}},
        good | {"optimizer": 1},
    ]
    for state in (*foreign, good | {"epoch": "x"}, good | {"options": good["options"] | {"n_feat": 9}}):
        torch.save(state, workdir / STATE)
        assert_one_line_error(call(workdir, *RESUME), STATE, "start anew")


# ---- Data


class Refuse(http.server.BaseHTTPRequestHandler):
    """A proxy that answers 403 to everything."""

    def do_CONNECT(self):
        self.send_error(403)

    do_GET = do_CONNECT

    def log_message(self, *_):
        pass


@pytest.fixture(params=["no network", "403"])
def network(request, monkeypatch):
    """No way to the internet: the proxy is not there, or refuses."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    urllib.request.install_opener(None)  # it remembers the proxies
    if request.param == "403":
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield request.param
        server.shutdown()
    server.server_close()
    if request.param != "403":
        yield request.param


def test_download_fails(workdir, call, network):
    result = call(workdir, "train_ddpm.py", "--data-dir", "nowhere", "--device", "cpu")
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    assert_one_line_error(result, *names, Path("nowhere/MNIST/raw"), "cannot read", "put them there")
    assert ("HTTP Error 403" in result.stdout + result.stderr) == (network == "403")  # older torchvision prints it


@pytest.mark.parametrize("network", ["no network"], indirect=True)
def test_only_gz_files(workdir, monkeypatch, train, network):
    """The .gz files of the training set are enough."""
    from torchvision.datasets import MNIST

    packed = {path.name: gzip.compress(path.read_bytes()) for path in (workdir / "small/MNIST/raw").iterdir()}
    raw = workdir / "packed" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, data in packed.items():
        if name.startswith("train"):
            (raw / f"{name}.gz").write_bytes(data)
    sums = [(f"{name}.gz", hashlib.md5(packed[name]).hexdigest()) for name in sorted(packed, reverse=True)]
    monkeypatch.setattr(MNIST, "resources", sums)
    result = train(workdir, "--epochs", "1", "--data-dir", "packed")
    assert result.returncode == 0 and len(losses(result.stdout)) == 1, result.stderr


def test_torchvision_stays_as_it_is(workdir):
    """It has the test set too, after the training set was loaded."""
    from torchvision.datasets import MNIST

    train_ddpm.load_mnist(workdir / "small")
    assert len(MNIST.resources) == 4
    assert len(MNIST(workdir / "small", train=False, download=True)) == 64


TRAINING_FILES = pytest.mark.parametrize(
    ("name", "reader"),
    [("train-images-idx3-ubyte", "read_image_file"), ("train-labels-idx1-ubyte", "read_label_file")],
)


@TRAINING_FILES
def test_unreadable_data(workdir, monkeypatch, train, name, reader):
    from torchvision.datasets import mnist

    def refused(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(mnist, reader, refused)
    result = train(workdir)
    assert_one_line_error(result, "cannot read or write", name, "Permission denied")
    assert "delete" not in result.stderr


@TRAINING_FILES
def test_damaged_data(workdir, train, name, reader):
    """Truncations and bit flips, most of them in the header: the reader says which file, or gives images and digits."""
    rng, path = random.Random(0), workdir / "small" / "MNIST" / "raw" / name
    good, n_refused = path.read_bytes(), 0
    for trial in range(300):
        damaged = bytearray(good)
        if trial % 3 == 0:
            del damaged[rng.randrange(len(good)) :]
        else:
            damaged[rng.randrange(16 if trial % 3 == 1 else len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            images, labels = train_ddpm.load_mnist(workdir / "small")
        except UserError as error:
            assert "\n" not in str(error) and name in str(error)
            n_refused += 1
        else:
            assert images.shape == (64, 28, 28) and images.dtype == torch.uint8
            assert labels.shape == (64,) and labels.min() >= 0 and labels.max() <= 9
    assert n_refused > 100
    path.write_bytes(good[:-5])
    assert_one_line_error(train(workdir), name, "delete damaged ones")


def test_images_of_another_size(workdir, train):
    path = workdir / "small" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    write_idx(path, torch.zeros(64, 32, 32, dtype=torch.uint8))
    assert_one_line_error(train(workdir), path.name, "28x28")


# ---- Bad input


@pytest.mark.parametrize(
    ("options", "allowed"),
    [("--epochs 0", "from 1"), ("--batch-size 0", "from 1"), ("--lr 0", "from 1e-08"), ("--lr nan", "to 1"),
     ("--drop-prob 1.1", "from 0 to 1"), ("--drop-prob -0.1", "from 0 to 1"), ("--n-feat 0", "from 1 to 256"),
     ("--n-feat 257", "from 1 to 256"), ("--n-T 0", "from 1 to 10000"), ("--save-every 0", "from 1"),
     ("--seed -1", "from 0"), ("--device quantum", "device")],
)  # fmt: skip
def test_impossible_options(tmp_path, call, options, allowed):
    result = call(tmp_path, "train_ddpm.py", *options.split())
    assert result.returncode == 2 and allowed in result.stderr


def test_batch_larger_than_the_data(workdir, train):
    result = train(workdir, "--epochs", "1", "--batch-size", "65")
    assert result.returncode == 0 and "1 epochs of 1 steps" in result.stdout, result.stderr


def test_batch_smaller_than_the_processes(workdir, monkeypatch, train):
    """Batches of 64 images have 2 or 3 where 3 are asked for."""
    monkeypatch.setattr(train_ddpm, "torchrun_rank", lambda: (0, 3))
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    assert_one_line_error(train(workdir, "--batch-size", "3"), "--batch-size 3", "3 processes")


# ---- Several processes

ONE = "LOCAL_RANK=0 RANK=0 WORLD_SIZE=1"


def torchrun(cwd: Path, *command: str):
    if not dist.is_available() or sys.platform == "win32":
        pytest.skip("no torch.distributed with gloo here")
    return run(cwd, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command, OMP_NUM_THREADS="1")


def test_two_ranks(workdir, tmp_path_factory, call):
    """They stay identical, visit each image once an epoch, and have the gradients of the whole batch.

    With the same noise on each image, the optimizer's running means of the gradients tell, after ten steps.
    """
    script = PROJECT / "tests" / "two_ranks.py"
    options = ["--same-noise", *SMALL_RUN, "--batch-size", "15", "--epochs", "2"]  # divides neither 64 images nor by 2
    result = torchrun(workdir, script, *options)
    assert result.returncode == 0, result.stderr
    assert len(losses(result.stdout)) == 2 and result.stdout.count("saved") == 1
    assert "identical ranks, each image once an epoch" in result.stdout
    alone = fill(tmp_path_factory.mktemp("alone"))
    assert run(alone, script, *options).returncode == 0
    means = []
    for folder in (workdir, alone):
        parameters = read_state(folder / STATE)["optimizer"]["state"].values()
        means.append(torch.cat([parameter["exp_avg"].flatten() for parameter in parameters]))
    assert (means[0] - means[1]).norm() < 2e-4 * means[1].norm()
    result = call(workdir, *RESUME, "--epochs", "3")
    assert result.returncode == 0 and len(losses(result.stdout)) == 1, result.stderr
    result = torchrun(workdir, *RESUME, "--epochs", "4")
    assert result.returncode == 0 and len(losses(result.stdout)) == 1, result.stderr


@pytest.mark.parametrize(("how", "message"), [("--die", "exitcode"), ("--fail", "CUDA out of memory")])
def test_a_rank_that_dies(workdir, how, message):
    """It ends the run, the reason is seen, and what was saved is whole."""
    options = [*SMALL_RUN, "--batch-size", "15", "--epochs", "1000", "--save-every", "1"]
    result = torchrun(workdir, PROJECT / "tests" / "two_ranks.py", how, *options)
    assert result.returncode != 0 and message in result.stderr
    load_ddpm(workdir / WEIGHTS)


@pytest.mark.parametrize("left_over", ["LOCAL_RANK=0", "RANK=1 WORLD_SIZE=2", "TORCHELASTIC_RUN_ID=1 " + ONE])
def test_alone(workdir, monkeypatch, train, left_over):
    """Without torchrun, or with one process of it, nothing distributed is used."""
    for pair in left_over.split():
        monkeypatch.setenv(*pair.split("="))
    monkeypatch.setattr(dist, "init_process_group", None)
    assert train(workdir, "--epochs", "1").returncode == 0
    assert not (dist.is_available() and dist.is_initialized())


def test_each_process_takes_its_gpu(monkeypatch):
    """Before any GPU is used, so that none has work of all processes."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "3", "RANK": "7", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train_ddpm, "make_parser", lambda: pytest.exit if taken else pytest.fail("too late"))
    with pytest.raises(AttributeError):  # the parser that is none
        train_ddpm.main()
    assert taken == [3] and train_ddpm.torchrun_rank() == (7, 8)
