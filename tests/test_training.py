"""train_ddpm.py as a user runs it: it learns, survives what stops it, refuses the impossible, and shares its work."""

import contextlib
import functools
import os
import re
import signal
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import train_ddpm
from ddpm_model import DDPM, IMAGE_SHAPE, UserError, load_ddpm
from tests import conftest
from tests.conftest import PROJECT, SMALL_RUN, assert_one_line_error, link, posix, run, write_small_mnist

WEIGHTS = Path("weights/ddpm_mnist.pth")
STATE = Path("weights/ddpm_mnist.pth.train")
RESUME = ("train_ddpm.py", "--device", "cpu", "--resume")
RAW = Path("MNIST", "raw")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEN = "64 images of the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n"  # the small data set
N_BATCHES = 4  # of an epoch of SMALL_RUN
OTHERS = {"epochs": 2, "batch_size": 32, "lr": 0.01, "drop_prob": 0.5, "n_feat": 16, "n_T": 50, "seed": 1}
read_state = functools.partial(torch.load, weights_only=True)


@pytest.fixture
def train(call, monkeypatch):
    """A small run with black previews, as drawing takes most of its time."""
    monkeypatch.setattr(DDPM, "sample", lambda self, c, **options: torch.zeros(len(c), *IMAGE_SHAPE))
    return lambda cwd, *options: call(cwd, "train_ddpm.py", *SMALL_RUN, *options)


@pytest.fixture
def steps(monkeypatch) -> list[dict]:
    """Of each training step, before it: images x, classes c, random state, weights; after it: loss."""
    steps, forward = [], DDPM.forward

    def watched(self, x, c):
        random = torch.get_rng_state().numpy().tobytes()
        steps.append({"x": x, "c": c, "random": random, "weights": flat(self.state_dict().values())})
        steps[-1]["loss"] = forward(self, x, c)
        return steps[-1]["loss"]

    monkeypatch.setattr(DDPM, "forward", watched)
    return steps


@pytest.fixture
def download(monkeypatch) -> Mock:
    """torchvision's download of MNIST to a folder, which fails."""
    download = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr("torchvision.datasets.MNIST.download", lambda self: download(Path(self.root)))
    return download


def become(rank: int, monkeypatch) -> None:
    """Makes the runs in this process those of one of two processes."""
    monkeypatch.setattr(train_ddpm, "join_torchrun", lambda args: (rank, 2))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model: model)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def losses(output: str) -> list[float]:
    pattern = r"^epoch +\d+/\d+  100%  loss ([\d.]+)  \d+ s  [\d.]+ min left$"
    return [float(loss) for loss in re.findall(pattern, output, re.MULTILINE)]


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_learns(workdir, call):
    """And all files lie beside the weights."""
    before = set(contents(workdir))
    result = call(workdir, "train_ddpm.py", *SMALL_RUN, "--epochs", "120", "--lr", "0.01", "--save-every", "50")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert len(losses(result.stdout)) == 120 and losses(result.stdout)[-1] < 0.5 * losses(result.stdout)[0]
    sheets = [workdir / f"{WEIGHTS}.epoch_{epoch}.png" for epoch in (50, 100, 120)]
    assert set(contents(workdir)) - before == {workdir / "weights", workdir / WEIGHTS, workdir / STATE, *sheets}
    assert Image.open(sheets[0]).height == 3 * (6 * (IMAGE_SHAPE[1] + 2) + 2)  # six digits of each class
    classes = torch.arange(10)
    digits = load_ddpm(workdir / WEIGHTS).sample(classes, generator=torch.Generator().manual_seed(0))
    bars = digits.mean(dim=(1, 3))  # brightness of each row
    centres = (bars * torch.arange(IMAGE_SHAPE[1])).sum(1) / bars.sum(1)
    assert np.corrcoef(centres, classes)[0, 1] > 0.9


def test_learning_rate():
    """It warms up to the peak and ends at zero."""
    total, peak, warmup = 10_000, 2e-3, train_ddpm.WARMUP_STEPS
    rates = [train_ddpm.learning_rate(step, total, peak) for step in range(total + 1)]
    assert rates[warmup] == pytest.approx(peak) == max(rates)
    assert np.all(np.diff(rates[:warmup]) > 0) and np.all(np.diff(rates[warmup:]) < 0)
    assert rates[0] > 0 and rates[-1] == pytest.approx(0, abs=1e-12)
    assert all(0 < train_ddpm.learning_rate(step, n, peak) <= peak for n in (1, 2, 9, 11) for step in range(n))


def test_steps_of_a_run(workdir, monkeypatch, train, steps):
    """The printed losses and time, the learning rate of the last step, and the average of the weights."""
    line = train_ddpm.report(3, 10, done=0.5, loss=0, start=time.perf_counter() - 60)
    assert "60 s" in line and "15.0 min left" in line  # 7.5 epochs of two minutes
    monkeypatch.setattr(train_ddpm, "EMA_DECAY", 0.5)  # the bound of the last four steps
    result = train(workdir, "--epochs", "3", "--lr", "0.01")
    means = np.reshape([step["loss"].item() for step in steps], (3, N_BATCHES)).mean(axis=1)
    assert losses(result.stdout) == pytest.approx(means, abs=1e-5)
    parts = read_state(workdir / STATE)["parts"]
    assert parts["optimizer"]["param_groups"][0]["lr"] == train_ddpm.learning_rate(11, 12, 0.01)
    average, *weights = [step["weights"] for step in steps] + [flat(parts["ddpm"].values())]
    for i, w in enumerate(weights):
        decay = min(0.5, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * w  # Song & Ermon 2020 (arXiv:2006.09011), technique 5
    torch.testing.assert_close(flat(parts["ema"].values()), average, rtol=1e-5, atol=1e-6)
    assert torch.equal(flat(load_ddpm(workdir / WEIGHTS).state_dict().values()), flat(parts["ema"].values()))


def test_images_and_noise_of_a_run(workdir, train, steps):
    """Pixels / 255 with their labels; in each epoch and with each seed, another order and other noise."""
    for seed in (0, 1):
        assert train(workdir, "--epochs", "2", "--seed", seed).returncode == 0
    images, labels, _ = train_ddpm.load_mnist(workdir / "small")
    orders = {tuple(range(len(images)))}  # that of the file; in the end also those of four epochs
    for epoch in np.reshape(steps, (4, N_BATCHES)):
        x = torch.cat([step["x"] for step in epoch])
        order = (255 * x[:, 0, 0, 0]).round().long()
        orders.add(tuple(order.tolist()))
        assert len(order.unique()) == len(images)
        torch.testing.assert_close(255 * x, images[order].float())
        assert torch.equal(torch.cat([step["c"] for step in epoch]), labels[order])
    assert len(orders) == 5 and len({step["random"] for step in steps}) == len(steps)
    assert not torch.equal(steps[0]["weights"], steps[2 * N_BATCHES]["weights"])


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_every_option_acts(workdir, train, name, value):
    """It alone differs in what is saved, the network is as asked for, and the weights are others."""
    usual, other = workdir / "lr0.1", workdir / "lr0.2"  # their other files must not get the same names
    assert train(workdir, "--epochs", "1", "--weights", usual).returncode == 0
    assert train(workdir, "--epochs", "1", "--weights", other, f"--{name.replace('_', '-')}={value}").returncode == 0
    options = read_state(Path(f"{other}.train"))["options"]
    assert options == read_state(Path(f"{usual}.train"))["options"] | {name: value}
    assert read_state(other)["config"].items() <= (options | {"n_classes": 10}).items()
    assert not torch.equal(flat(load_ddpm(usual).parameters()), flat(load_ddpm(other).parameters()))


@pytest.mark.parametrize(("device", "hardware", "expected"), [
    ("cuda", (7, 5), False), ("cuda", (8, 0), True), ("cuda", (9, 0), True), ("mps", {"avx512_bf16": True}, False),
    ("cpu", {"avx512_bf16": True}, True), ("cpu", {"avx512_bf16": False}, False), ("cpu", {}, False),
])  # fmt: skip
def test_bfloat16_where_the_hardware_has_it(monkeypatch, device, hardware, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: hardware)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: hardware, raising=False)
    kind = "cuda" if device == "cuda" else "cpu"
    with train_ddpm.autocast(torch.device(device)):
        assert torch.is_autocast_enabled(kind) == expected
        assert torch.get_autocast_dtype(kind) == torch.bfloat16


KILLED = """
import contextlib, os, signal, train_ddpm
train_ddpm.autocast = lambda device: contextlib.nullcontext()
train_ddpm.report = lambda epoch, *rest: os.kill(os.getpid(), signal.SIGKILL) if epoch == 8 else ""
train_ddpm.main()
"""


@posix
def test_resume_is_exact(workdir, monkeypatch, call, train):
    """A run that was stopped in its first preview and killed in a step ends with the weights of one that was not."""
    monkeypatch.setattr(train_ddpm, "autocast", lambda device: contextlib.nullcontext())  # in fp32
    options = ("--epochs", "12", "--save-every", "3", "--lr", "0.003", "--drop-prob", "0.2", "--seed", "7")
    assert train(workdir, *options, "--weights", "whole.pth").returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(DDPM, "sample", lambda *args, **options: signal.raise_signal(signal.SIGINT))
        result = train(workdir, *options)
    assert result.returncode == 130 and result.stderr == "\nstopped\n", result.stderr
    assert read_state(workdir / STATE)["epoch"] == 3 and (workdir / WEIGHTS).exists()
    assert run(workdir, "-c", KILLED, *RESUME[1:]).returncode == -signal.SIGKILL
    result = call(workdir, *RESUME)
    assert result.returncode == 0 and result.stdout.startswith(f"{TEN}6 of 12 epochs are done"), result.stderr
    for path, whole in ((STATE, "whole.pth.train"), (WEIGHTS, "whole.pth")):
        a, b = read_state(workdir / path), read_state(workdir / whole)
        assert [a.pop(key, None) for key in ("options", "data")] == [b.pop(key, None) for key in ("options", "data")]
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [N_BATCHES, 2 * N_BATCHES - 1])
def test_nan(workdir, monkeypatch, train, rank, step):
    """Also in the last step of an epoch: it ends the run on each rank, and is not saved. What is replaced is said."""
    (workdir / "a.pth").touch()
    become(rank, monkeypatch)
    monkeypatch.setattr(train_ddpm, "learning_rate", lambda i, *args: 0.001 if i < step else torch.nan)
    result = train(workdir, "--epochs", "3", "--save-every", "1", "--weights", "a.pth")
    assert_one_line_error(result, "NaN or infinity", "epoch 2", "--lr")
    if rank == 0:
        assert result.stdout.startswith("the first save replaces the files of a.pth; ")
        assert read_state(workdir / "a.pth.train")["epoch"] == 1


@pytest.mark.parametrize(("suffix", "saved"), [(".train", 1), (".pth", 2), (".png", 2)])
def test_saves_fail(workdir, monkeypatch, train, suffix, saved):
    """The run goes on, but after the last epoch it is an error. The state of the last good save stays."""
    assert train(workdir, "--epochs", "1").returncode == 0
    replace, refuse = os.replace, Mock(side_effect=PermissionError(1, "Operation not permitted"))
    monkeypatch.setattr(os, "replace", lambda a, b: (refuse if Path(b).suffix == suffix else replace)(a, b))
    result = train(workdir, "--epochs", "2", "--save-every", "1")
    assert "warning: the save of epoch 1 failed: [Errno 1] Operation not permitted" in result.stdout
    assert len(losses(result.stdout)) == 2
    assert_one_line_error(result, "Operation not permitted")
    assert read_state(workdir / STATE)["epoch"] == saved


def test_resume_with_nothing_to_do(workdir, monkeypatch, train, call):
    """The weights become those of the state again. One that is missing or damaged, or does not fit, is one line."""
    assert_one_line_error(call(workdir, *RESUME), STATE, "No such file")
    assert train(workdir, "--epochs", "2").returncode == 0
    before = contents(workdir)
    for spoil in (Path.unlink, Path.touch, lambda path: path.write_bytes(b"of another run")):
        spoil(workdir / WEIGHTS)
        result = call(workdir, *RESUME)
        assert result.returncode == 0 and result.stdout.startswith(f"{TEN}2 of 2 epochs are done")
        assert losses(result.stdout) == [] and contents(workdir) == before
    for option in ("--n-feat=16", "--n-T=50"):
        assert_one_line_error(train(workdir, "--resume", option), STATE, "another network", "size mismatch")
    images, labels, names = train_ddpm.load_mnist(workdir / "small")
    for other in ((255 - images, labels, names), (images, labels.roll(1), names), (images, labels, names[::-1])):
        monkeypatch.setattr(train_ddpm, "load_mnist", lambda data_dir, other=other: other)
        assert_one_line_error(train(workdir, "--resume"), STATE, "the data differ")
    assert contents(workdir) == before
    for state in ([], {}, read_state(workdir / WEIGHTS)):
        torch.save(state, workdir / STATE)
        assert_one_line_error(call(workdir, *RESUME), STATE)


HALVES = {"bits": (255, 0), "clear": (204, 255), "red": (76, 0), "red 2": (255, 0), "turned": (255, 0)}


@pytest.fixture
def folder(workdir) -> Path:
    """Has folders with a picture each, white on the left and black on the right at first, and what does not count."""
    grey = Image.new("L", (90, 40))
    black = grey.copy()
    grey.paste(255, (0, 0, 45, 40))
    clear = black.copy()
    clear.putalpha(grey.point(lambda white: white // 5))  # black, of which one sees 20 % and nothing
    turned = grey.transpose(Image.Transpose.ROTATE_270)  # white is at its top, and
    turned.getexif()[0x112] = 8  # Exif says: this is the left side
    red = Image.merge("RGB", (grey, black, black))  # ITU-R 601: 0.299 of it
    pictures = {"turned/a.png": turned, "red/a.png": red, "red 2/1/B.JPG": grey, "clear/a.png": clear}
    pictures |= {"bits/a.png": grey.convert("1"), ".cache/a.png": grey}
    for name, picture in pictures.items():
        path = workdir / "own" / name
        path.parent.mkdir(parents=True)
        path.with_name("notes.txt").touch()
        picture.save(path, exif=picture.getexif())
    return workdir / "own"


def test_own_pictures(workdir, folder, train, steps, download):
    """A class for each folder, in the order of their names. They become grey, upright, on white, 28x28."""
    result = train(workdir, "--data-dir", "own", "--batch-size", "5", "--epochs", "1")
    assert result.stdout.startswith("5 images of the classes 0 bits, 1 clear, 2 red, 3 red 2, 4 turned\n")
    assert "\n0 of 1 epochs are done, 1 steps each, on 1 x cpu\n" in result.stdout
    for image, label in zip(255 * steps[0]["x"], steps[0]["c"]):
        left, right = [*HALVES.values()][label]
        assert (image[..., :10] - left).abs().max() < 1.5 and (image[..., -10:] - right).abs().max() < 1.5
    assert sorted(steps[0]["c"].tolist()) == [0, 1, 2, 3, 4]
    assert Image.open(f"{workdir / WEIGHTS}.epoch_01.png").width == 3 * (5 * (IMAGE_SHAPE[2] + 2) + 2)
    assert_one_line_error(train(workdir, "--data-dir", folder / "red"), folder, "must have a folder of pictures")
    write_small_mnist(folder)  # which of the two is meant?
    assert_one_line_error(train(workdir, "--data-dir", "own"), "own must have a folder of pictures", "or only MNIST/")
    assert not download.called and len(os.listdir(folder / "red")) == 2


@pytest.mark.parametrize("spoil", [
    lambda path: Image.new("I;16", (9, 9)).save(path), lambda path: Image.new("F", (9, 9)).save(path, "TIFF"),
    lambda path: Image.new("L", (181, 40)).save(path), lambda path: path.write_bytes(path.read_bytes()[:40]),
    lambda path: path.write_text("no picture"), Path.unlink,
])  # fmt: skip
def test_pictures_of_no_use(workdir, folder, monkeypatch, train, spoil):
    """16 bits, floats, more pixels than Pillow takes, half a picture, other content; none in a class: one line."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 40)  # Pillow refuses twice as many
    spoil(folder / "red" / "a.png")
    name = "classes red" if spoil == Path.unlink else Path("own", "red", "a.png")
    assert_one_line_error(train(workdir, "--data-dir", "own"), name)


def test_mnist_of_27_classes(workdir, train, download):
    """As the letters of EMNIST, 1 .. 26. The two files of training are enough, and they stay."""
    write_small_mnist(workdir / "letters", labels=torch.arange(64) % 26 + 1)
    for path in (workdir / "letters" / RAW).glob("t10k*"):
        path.unlink()
    before = contents(workdir / "letters")
    result = train(workdir, "--data-dir", "letters", "--epochs", "1")
    assert result.stdout.startswith(f"64 images of the classes {', '.join(map(str, range(27)))}\n"), result.stderr
    assert load_ddpm(workdir / WEIGHTS).nn_model.n_classes == 27
    assert contents(workdir / "letters") == before and not download.called


@pytest.mark.parametrize(("pattern", "spoil"), [
    ("*", lambda path: path.rename(str(path).replace("-idx", ".idx"))), ("*", lambda path: path.rename(f"{path}.gz")),
    ("*", lambda path: path.rename(path.with_name("emnist-" + path.name))), ("*images*", Path.unlink),
    ("*", Path.unlink), *((name, lambda path: path.write_bytes(b"")) for name in FILES),
    *((name, lambda path: path.write_bytes(path.read_bytes()[:-5])) for name in FILES),
    *((name, lambda path: path.write_text("<html></html>")) for name in FILES),
])  # fmt: skip
def test_mnist_of_no_use(workdir, train, download, pattern, spoil):
    """Names of Kaggle, half an old download, EMNIST; labels alone, nothing, damage: it is one line, and all stays."""
    for path in list((workdir / "small" / RAW).glob(pattern)):
        spoil(path)
    before = contents(workdir / "small")
    assert_one_line_error(train(workdir), "no MNIST (", "small" / RAW, *FILES)
    assert contents(workdir / "small") == before and not download.called


def test_download(workdir, monkeypatch, train, download):
    """Where nothing is. What failed or was stopped does not block the next; of two at once, the first one counts."""
    line = f"downloading MNIST (12 MB) to {'new' / RAW}\n"
    (workdir / "new").mkdir()
    assert_one_line_error(train(workdir, "--data-dir", "new"), "no network", "new" / RAW, *FILES)
    download.side_effect = lambda folder: write_small_mnist(folder) or signal.raise_signal(signal.SIGINT)
    assert train(workdir, "--data-dir", "new").returncode == 130
    download.side_effect = write_small_mnist
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", Mock(side_effect=PermissionError("in use")))
        assert_one_line_error(train(workdir, "--data-dir", "new"), "in use")
    assert train(workdir, "--data-dir", "new", "--epochs", "1").stdout.startswith(line + TEN)
    both = [(workdir / "both", torch.arange(32))]  # what another process has downloaded meanwhile
    download.side_effect = lambda folder: [write_small_mnist(*arguments) for arguments in [(folder,), *both]]
    result = train(workdir, "--data-dir", "both", "--epochs", "1")
    assert "\n32 images of" in result.stdout and len(losses(result.stdout)) == 1, result.stderr
    assert os.listdir(workdir / "new" / "MNIST") == os.listdir(workdir / "both" / "MNIST") == ["raw"]


@pytest.mark.parametrize("wrong", [
    lambda x, c: (x, c.float()), lambda x, c: (x, c - 1), lambda x, c: (x, c[:-1]), lambda x, c: (x / 255, c),
    lambda x, c: (x[..., 2:], c), lambda x, c: (x.repeat(1, 3, 1, 1), c), lambda x, c: (x[:, 0], c),
    lambda x, c: (x, c[:, None]), lambda x, c: (x, 1000 * torch.arange(64) - 1),
])  # fmt: skip
def test_data_that_do_not_fit(workdir, monkeypatch, train, wrong):
    """Whatever loads them: labels of floats, below 0, too few, in columns; images of floats, other size, in colour."""
    images, labels, names = train_ddpm.load_mnist(workdir / "small")
    images, labels = wrong(images, labels)
    monkeypatch.setattr(train_ddpm, "load_mnist", lambda data_dir: (images, labels, names))
    result = train(workdir)
    assert_one_line_error(result, "images must be uint8", "label", f"in {labels.min()} .. {labels.max()}")
    assert len(result.stderr) < 300  # it does not list all labels


@pytest.mark.parametrize("name", ["a.pth", "a.pth.train"])
@pytest.mark.parametrize("obstacle", [
    Path.mkdir, lambda path: link(path, path.name), lambda path: link(path, Path("train_ddpm.py", "a")),
    lambda path: path.touch(0o400),
])  # fmt: skip
def test_files_that_cannot_be_replaced(workdir, monkeypatch, train, name, obstacle):
    """A folder, a link to itself, one through a file, a protected file: one line before the data are read."""
    obstacle(workdir / name)
    if (workdir / name).is_file() and os.access(workdir / name, os.W_OK):  # as root, whom permissions do not bind
        monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError(13, "Permission denied")))
    monkeypatch.setattr(train_ddpm, "load_data", None)
    before = os.listdir(workdir)
    assert_one_line_error(train(workdir, "--weights", "a.pth"))
    assert os.listdir(workdir) == before


@pytest.mark.parametrize(("status", "option"), [
    (2, "--epochs=0"), (2, "--lr=nan"), (2, "--drop-prob=1"), (2, "--n-feat=257"), (2, "--n-T=0"), (2, "--seed=-1"),
    (1, "--device=quantum"), (1, "--weights="), (1, "--weights=small"), (1, "--weights=new/"),
    (1, "--weights=train_ddpm.py/a"), (1, "--weights=" + 244 * "w"),  # too long for the name of the preview only
])  # fmt: skip
def test_impossible_options(workdir, train, status, option):
    """They end the run before the first epoch, and nothing is left."""
    before = contents(workdir)
    result = train(workdir, option)
    assert result.returncode == status and not result.stdout and contents(workdir) == before
    if status == 1:
        assert_one_line_error(result)


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="no torch.distributed with gloo here")
def test_two_ranks(workdir):
    """They share the batches of a run alone, stay identical, and have other noise."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    script = (PROJECT / "tests/two_ranks.py", *SMALL_RUN, "--batch-size=12", "--epochs=2")  # 4 images are left over
    assert run(workdir, *script).returncode == 0
    whole = read_state(workdir / "seen_by_0.pt")
    result = run(workdir, *torchrun, *script)
    assert result.returncode == 0, result.stderr
    assert len(losses(result.stdout)) == 2 and result.stdout.count("saved") == 1
    first, second = (read_state(workdir / f"seen_by_{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    shared = torch.cat([first["numbers"], second["numbers"]], dim=1)  # [10, 12]
    assert torch.equal(shared.sort().values, whole["numbers"].sort().values)
    assert len(set(first["noise"][::5] + second["noise"][::5])) == 4  # where an epoch begins
    # With the same noise on each image, the gradients are those of the whole batch.
    assert (first["gradients"] - whole["gradients"]).norm() < 2e-4 * whole["gradients"].norm()
    result = run(workdir, *torchrun, *RESUME, "--epochs", "3")
    assert result.returncode == 0 and len(losses(result.stdout)) == 1, result.stderr


@pytest.mark.parametrize(("n_gpus", "device", "expected"), [(4, "cuda", [3, "joined"]), (0, "cpu", ["joined"])])
def test_join_torchrun(monkeypatch, n_gpus, device, expected):
    """Each process takes its GPU before it joins. Without GPUs: the CPU, never MPS. Without torchrun: nothing."""
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda: calls.append("joined"))
    monkeypatch.setattr(dist, "get_rank", lambda: 7)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "3")
    args = train_ddpm.parse_args([])
    assert train_ddpm.join_torchrun(args) == (0, 1) and calls == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert train_ddpm.join_torchrun(args) == (7, 8)
    assert calls == expected and args.device == device
    args.device = "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(UserError, match="number of GPUs, 3"):
        train_ddpm.join_torchrun(args)


@posix
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes(workdir, monkeypatch, train, rank):
    """The first alone shows its progress in the terminal, cut to its width, prints and saves."""
    become(rank, monkeypatch)
    result, lines = conftest.progress_lines(monkeypatch, lambda: train(workdir, "--epochs", "1"))
    assert [line[:23] for line in lines] == (["epoch  1/1   25%  loss ", ""] if rank == 0 else [""])
    assert result.returncode == 0 and len(losses(result.stdout)) == (rank == 0)
    assert (workdir / "weights").exists() == (rank == 0)
    for size in ("15", "66"):
        assert_one_line_error(train(workdir, "--batch-size", size), "at most 64 (images) and a multiple of 2")
