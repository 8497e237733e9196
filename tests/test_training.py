"""train_ddpm.py as a user runs it: it learns, survives what stops it, refuses the impossible, and shares its work."""

import contextlib
import gzip
import hashlib
import http.server
import itertools
import os
import random
import re
import shutil
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
from ddpm_model import DDPM, IMAGE_SHAPE, ContextUnet, UserError, load_ddpm
from tests.conftest import (
    PROJECT,
    SMALL_RUN,
    assert_one_line_error,
    file_limit,
    fill,
    posix,
    run,
    start,
    write_small_mnist,
)

WEIGHTS = Path("weights/ddpm_mnist.pth")
STATE = Path("weights/ddpm_mnist.pth.train")
RESUME = ("train_ddpm.py", "--data-dir", "small", "--device", "cpu", "--resume")


@pytest.fixture
def train(call, monkeypatch):
    """A small run with black previews, as drawing takes most of its time."""
    monkeypatch.setattr(DDPM, "sample", lambda self, c, **options: torch.zeros(len(c), *IMAGE_SHAPE))
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


def read_state(path: Path) -> dict:
    return torch.load(path, weights_only=True)


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
    assert "replaces" not in result.stdout
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
    assert state["parts"]["optimizer"]["param_groups"][0]["lr"] == train_ddpm.learning_rate(11, 12, 0.5)
    weights = load_ddpm(workdir / WEIGHTS).nn_model.state_dict()
    assert all(torch.equal(weights[name], state["parts"]["ema"][f"nn_model.{name}"]) for name in weights)
    assert not any(torch.equal(weights[name], state["parts"]["ddpm"][f"nn_model.{name}"]) for name in weights)


def test_averaged_weights(workdir, monkeypatch, train):
    """After each step, w_ema = decay w_ema + (1 - decay) w (as in Song & Ermon 2020, arXiv:2006.09011, technique 5)."""
    steps = []
    update = torch.optim.AdamW.step

    def remember(self, *args):
        result = update(self, *args)
        steps.append([parameter.detach().double() for parameter in self.param_groups[0]["params"]])
        return result

    created = []
    monkeypatch.setattr(torch.optim.AdamW, "step", remember)
    monkeypatch.setattr(train_ddpm, "ContextUnet", lambda n_feat: created.append(ContextUnet(n_feat)) or created[0])
    torch.manual_seed(0)
    average = [parameter.detach().double() for parameter in DDPM(ContextUnet(8)).parameters()]
    assert train(workdir, "--epochs", "3").returncode == 0
    assert len(steps) == 12
    for step, weights in enumerate(steps):
        decay = min(train_ddpm.EMA_DECAY, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights)]
    saved = read_state(workdir / STATE)["parts"]["ema"]
    for expected, (name, _) in zip(average, created[0].named_parameters()):
        torch.testing.assert_close(saved[f"nn_model.{name}"].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_bf16_on_gpus(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    autocast = train_ddpm.autocast(torch.device("cuda"))
    assert autocast._enabled == native and autocast.device == "cuda"


@pytest.mark.parametrize("capabilities", [{"avx512_bf16": True}, {"avx512_bf16": False}, {}, None])
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
    assert result.returncode == 130 and result.stderr == "\nstopped\n", result.stderr
    assert_saved(workdir, 3)
    result = run(workdir, "-c", stopping(14, signal.SIGKILL), *RESUME[1:])
    assert result.returncode == -signal.SIGKILL
    assert_saved(workdir, 6)
    monkeypatch.setattr(train_ddpm, "autocast", lambda device: contextlib.nullcontext())
    result = call(workdir, *RESUME)
    assert result.returncode == 0 and "continuing after epoch 6" in result.stdout, result.stderr
    whole = fill(tmp_path_factory.mktemp("whole"))
    assert call(whole, "train_ddpm.py", *options).returncode == 0
    stopped, straight = (read_state(folder / STATE) for folder in (workdir, whole))
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
        assert result.returncode == 130 and result.stderr == "\nstopped\n"
    assert result.stdout.count("--resume continues from here") == saved
    assert result.stdout.startswith(f"the first save replaces the files of {WEIGHTS}; ")
    assert_saved(workdir, saved)
    assert ((workdir / WEIGHTS).read_bytes() == b"precious") == (saved == 0)


def test_ends_before_training(workdir, monkeypatch, train):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_ddpm, "load_mnist", stop)
    result = train(workdir)
    assert result.returncode == 130 and result.stderr == "\nstopped\n"


@pytest.mark.parametrize(("name", "saved"), [(STATE, 0), (WEIGHTS, 1), ("weights/ddpm_mnist.pth.epoch_01.png", 1)])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_save_fails(workdir, monkeypatch, train, name, saved, epochs):
    """The first one. Then the run goes on, if epochs are left. What was saved before stays whole."""
    replace, count = os.replace, itertools.count()

    def refused(source, target):
        if Path(target) == workdir / name and next(count) == 0:
            raise PermissionError(1, "Operation not permitted")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    result = train(workdir, "--epochs", epochs, "--save-every", "1")
    assert len(losses(result.stdout)) == epochs
    if epochs == 1:
        assert_one_line_error(result, "Operation not permitted")
        assert_saved(workdir, saved)
    else:
        assert result.returncode == 0 and result.stdout.count("--resume continues from here") == 1
        assert "warning: the save of epoch 1 failed: [Errno 1] Operation not permitted" in result.stdout
        assert_saved(workdir, 2)
        load_ddpm(workdir / WEIGHTS)
    assert not [path for path in files(workdir) if ".tmp" in str(path)]


def test_full_disk(workdir, train):
    """What is there stays."""
    (workdir / "weights").mkdir()
    for path in (STATE, WEIGHTS):
        (workdir / path).write_bytes(b"precious")
    with file_limit(500_000):  # less than the state of this network takes
        result = train(workdir, "--epochs", "2", "--save-every", "1")
    assert_one_line_error(result, "too large")
    assert "warning: the save of epoch 1 failed" in result.stdout
    assert {path.read_bytes() for path in (workdir / "weights").iterdir()} == {b"precious"}


def test_files_of_a_run(workdir, train):
    """All lie beside the weights. The working directory stays clean."""
    before = {path.name for path in workdir.iterdir()}
    assert train(workdir, "--weights", "out/a.pth", "--epochs", "1").returncode == 0
    assert {path.name for path in workdir.iterdir()} == before | {"out"}
    assert {path.name for path in (workdir / "out").iterdir()} == {"a.pth", "a.pth.train", "a.pth.epoch_01.png"}
    result = train(workdir, "--weights", "out/a.pth", "--epochs", "1")
    assert result.stdout.startswith("the first save replaces the files of out/a.pth; to continue")


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
        assert result.returncode == 0 and "continuing after epoch 2" in result.stdout
        assert "the learning rate rises" not in result.stdout
        assert (workdir / WEIGHTS).read_bytes() == weights
    result = call(workdir, *RESUME, "--epochs", "3")
    assert len(losses(result.stdout)) == 1 and "the learning rate rises again" in result.stdout


def test_resumed_run_has_the_options_of_the_run(workdir, tmp_path_factory, train, call):
    """And its data, also after the folder was copied: a relative path stays relative."""
    options = ("--lr", "0.003", "--drop-prob", "0.2", "--seed", "7", "--save-every", "1")
    assert train(workdir, "--epochs", "1", *options).returncode == 0
    copied = shutil.copytree(workdir, tmp_path_factory.mktemp("copied") / "project")
    (workdir / "small").rename(workdir / "no longer here")
    before = files(workdir)
    command = ("train_ddpm.py", "--resume", "--epochs", "2", "--device", "cpu")
    assert call(copied, *command).returncode == 0
    assert files(workdir) == before
    whole = fill(tmp_path_factory.mktemp("whole"))
    assert train(whole, "--epochs", "1", *options).returncode == 0
    assert call(whole, "train_ddpm.py", *SMALL_RUN, *options, "--epochs", "2", "--resume").returncode == 0
    assert_same(read_state(copied / WEIGHTS), read_state(whole / WEIGHTS))


@pytest.mark.parametrize(
    ("options", "now", "then"),
    [(["--data-dir", "other"], "'images': 50", "'images': 64"), (["--n-feat", "16"], "'n_feat': 16", "'n_feat': 8"),
     (["--n-T", "50"], "'n_T': 50", "'n_T': 40")],
)  # fmt: skip
def test_resumed_run_with_other_data_or_network(workdir, train, options, now, then):
    """Both are named, and nothing is replaced."""
    write_small_mnist(workdir / "other", n_images=50)
    assert train(workdir, "--epochs", "1").returncode == 0
    before = {path: path.read_bytes() for path in (workdir / "weights").iterdir()}
    result = train(workdir, "--epochs", "2", "--resume", *options)
    assert_one_line_error(result, "options or data differ", STATE, now, then)
    assert {path: path.read_bytes() for path in (workdir / "weights").iterdir()} == before


def test_foreign_states(workdir, train, call):
    assert_one_line_error(call(workdir, *RESUME), STATE, "No such file")
    assert train(workdir, "--epochs", "1").returncode == 0
    good = read_state(workdir / STATE)
    foreign = [{name: value for name, value in good.items() if name != missing} for missing in good]
    for state in ([], {"config": {}, "model": {}}, *foreign):
        torch.save(state, workdir / STATE)
        assert_one_line_error(call(workdir, *RESUME), STATE, "damaged, or was not written by this version")


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
    assert_one_line_error(result, "no MNIST (", "four files, unpacked, belong in nowhere/MNIST/raw")
    assert ("HTTP Error 403" in result.stdout + result.stderr) == (network == "403")  # older torchvision prints it


@pytest.mark.parametrize("network", ["no network"], indirect=True)
def test_only_gz_files(workdir, monkeypatch, train, network):
    """The .gz files are enough."""
    from torchvision.datasets import MNIST

    packed = {path.name: gzip.compress(path.read_bytes()) for path in (workdir / "small/MNIST/raw").iterdir()}
    raw = workdir / "packed" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, data in packed.items():
        (raw / f"{name}.gz").write_bytes(data)
    sums = [(f"{name}.gz", hashlib.md5(packed[name]).hexdigest()) for name in sorted(packed, reverse=True)]
    monkeypatch.setattr(MNIST, "resources", sums)
    result = train(workdir, "--epochs", "1", "--data-dir", "packed")
    assert result.returncode == 0 and len(losses(result.stdout)) == 1, result.stderr


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
    assert_one_line_error(train(workdir), name, "Permission denied")


@TRAINING_FILES
def test_damaged_data(workdir, train, name, reader):
    """Truncations and bit flips, most of them in the header: an error in one line, or as many images and labels."""
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
            images, labels = train_ddpm.load_mnist(workdir / "small", torch.device("cpu"))
        except UserError:
            n_refused += 1
        else:
            assert images.shape == (64, *IMAGE_SHAPE[1:]) and images.dtype == torch.uint8
            assert labels.shape == (64,)
    assert n_refused > 100
    path.write_bytes(good[:-5])
    assert_one_line_error(train(workdir), "no MNIST (", "small/MNIST/raw")


# ---- Bad input


@pytest.mark.parametrize(
    ("options", "allowed"),
    [("--epochs 0", "from 1"), ("--batch-size 0", "from 1"), ("--lr 0", "from 1e-08"), ("--lr nan", "to 1"),
     ("--drop-prob 1", "from 0 to 0.99"), ("--drop-prob -0.1", "from 0 to 0.99"), ("--n-feat 0", "from 1 to 256"),
     ("--n-feat 257", "from 1 to 256"), ("--n-T 0", "from 1 to 10000"), ("--save-every 0", "from 1"),
     ("--seed -1", "from 0"), ("--device quantum", "device")],
)  # fmt: skip
def test_impossible_options(tmp_path, call, options, allowed):
    result = call(tmp_path, "train_ddpm.py", *options.split())
    assert result.returncode == 2 and allowed in result.stderr


def test_batches_have_the_size_that_was_asked_for(workdir, monkeypatch, train):
    """What is left over of an epoch is not used."""
    sizes = []
    forward = DDPM.forward
    monkeypatch.setattr(DDPM, "forward", lambda self, x, c: sizes.append(len(x)) or forward(self, x, c))
    for size in ("64", "40", "20"):
        assert train(workdir, "--epochs", "1", "--batch-size", size).returncode == 0
    assert sizes == [64, 40, 20, 20, 20]
    assert_one_line_error(train(workdir, "--epochs", "1", "--batch-size", "65"), "--batch-size must be at most 64")


def test_batch_that_cannot_be_shared(workdir, monkeypatch, train):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    assert_one_line_error(train(workdir, "--batch-size", "16"), "--batch-size", "a multiple of 3 (processes)")


# ---- Several processes


def torchrun(cwd: Path, *command: str):
    if not dist.is_available() or sys.platform == "win32":
        pytest.skip("no torch.distributed with gloo here")
    return run(cwd, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command, OMP_NUM_THREADS="1")


def test_two_ranks(workdir, tmp_path_factory, call):
    """They stay identical, visit no image twice in an epoch, and have the gradients of the whole batch.

    With the same noise on each image, the optimizer's running means of the gradients tell, after ten steps.
    """
    script = PROJECT / "tests" / "two_ranks.py"
    options = ["--same-noise", *SMALL_RUN, "--batch-size", "12", "--epochs", "2"]  # 64 images: 4 are left over
    result = torchrun(workdir, script, *options)
    assert result.returncode == 0, result.stderr
    assert len(losses(result.stdout)) == 2 and result.stdout.count("saved") == 1
    assert "identical ranks, no image twice in an epoch" in result.stdout
    alone = fill(tmp_path_factory.mktemp("alone"))
    assert run(alone, script, *options).returncode == 0
    means = []
    for folder in (workdir, alone):
        parameters = read_state(folder / STATE)["parts"]["optimizer"]["state"].values()
        means.append(torch.cat([parameter["exp_avg"].flatten() for parameter in parameters]))
    assert (means[0] - means[1]).norm() < 2e-4 * means[1].norm()
    result = call(workdir, *RESUME, "--epochs", "3")
    assert result.returncode == 0 and len(losses(result.stdout)) == 1, result.stderr
    result = torchrun(workdir, *RESUME, "--epochs", "4")
    assert result.returncode == 0 and len(losses(result.stdout)) == 1, result.stderr


@pytest.mark.parametrize(("how", "message"), [("--die", "exitcode"), ("--fail", "CUDA out of memory")])
def test_a_rank_that_dies(workdir, how, message):
    """It ends the run, the reason is seen, and what was saved is whole."""
    options = [*SMALL_RUN, "--batch-size", "12", "--epochs", "1000", "--save-every", "1"]
    result = torchrun(workdir, PROJECT / "tests" / "two_ranks.py", how, *options)
    assert result.returncode != 0 and message in result.stderr
    load_ddpm(workdir / WEIGHTS)


@pytest.mark.parametrize("left_over", ["LOCAL_RANK=0", "RANK=1 WORLD_SIZE=2"])
def test_alone(workdir, monkeypatch, train, left_over):
    """Without torchrun, nothing distributed is used."""
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
    assert taken == [3]
