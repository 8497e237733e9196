"""train_ddpm.py as a user runs it: it learns, survives what stops it, refuses the impossible, and shares its work."""

import http.server
import random
import re
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train_ddpm
from ddpm_model import DDPM, load_ddpm, read_state
from tests.conftest import PROJECT, SMALL_RUN, assert_one_line_error, fill, run, start, write_idx

WEIGHTS, STATE = "weights/ddpm_mnist.pth", "weights/ddpm_mnist.train.pth"


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^epoch .*loss ([\d.]+)", output, re.MULTILINE)]


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


def test_a_small_run_learns_and_its_weights_draw(workdir, call):
    result = call(workdir, "train_ddpm.py", *SMALL_RUN, "--epochs", "120", "--lr", "0.01", "--save-every", "50")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "replaced" not in result.stdout
    assert len(losses(result.stdout)) == 120 and losses(result.stdout)[-1] < 0.5 * losses(result.stdout)[0]
    assert all(
        re.search(r"images/s .* min left$", line) for line in result.stdout.splitlines() if line.startswith("epoch")
    )
    sheets = sorted(path.name for path in (workdir / "generated_outputs").iterdir())
    assert sheets == ["epoch_100.png", "epoch_120.png", "epoch_50.png"]
    with Image.open(workdir / "generated_outputs" / "epoch_120.png") as sheet:
        assert sheet.width == (30 * 10 + 2) * 3
    digits = load_ddpm(workdir / WEIGHTS).sample(torch.arange(10), generator=torch.Generator().manual_seed(0))
    bars = digits.mean(dim=(1, 3)).numpy()  # brightness of each row; digit c has its bar at rows 2 c + 3 to 2 c + 5
    centres = (bars * np.arange(28)).sum(1) / bars.sum(1)
    assert np.corrcoef(centres, np.arange(10))[0, 1] > 0.9
    drawn = call(workdir, "inference_ddpm.py", "--digit", "4", "--steps", "4")
    assert drawn.returncode == 0 and (workdir / "generated_outputs" / "digit_4_grid.png").exists(), drawn.stderr


def test_targets_are_averaged_over_new_images_of_the_whole_data_set_with_their_labels(workdir, monkeypatch, call):
    real, seen = DDPM.forward, []

    def remember(self, x, c, others):
        seen.append(others)
        return real(self, x, c, others)

    monkeypatch.setattr(DDPM, "forward", remember)
    data, _ = train_ddpm.load_mnist(str(workdir / "small"))
    data[:, 0, 0] = torch.arange(64)  # a corner tells which image it is
    write_idx(workdir / "small" / "MNIST" / "raw" / "train-images-idx3-ubyte", data)
    assert call(workdir, "train_ddpm.py", *SMALL_RUN, "--epochs", "1").returncode == 0
    images, labels = (torch.cat(of_all_steps) for of_all_steps in zip(*seen))
    which = (255 * images[:, 0, 0, 0]).round().long()
    assert torch.equal(images, data[which][:, None] / 255) and torch.equal(labels, which % 10)
    expected = len(which) / 64
    assert (which.bincount(minlength=64) - expected).abs().max() < 5 * expected**0.5
    numbers = [len(labels) for _, labels in seen]
    assert numbers[0] == 0 and numbers[len(seen) // 2] == train_ddpm.OTHERS / 4 and numbers == sorted(numbers)
    assert not torch.equal(seen[-2][1], seen[-1][1][: numbers[-2]])


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_an_orthogonalised_matrix_keeps_its_singular_vectors_and_has_singular_values_near_one(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = 1e-3 * u @ torch.linspace(1, 0.05, min(shape)).diag() @ v
    values = u.T @ train_ddpm.orthogonalised(matrix[None])[0] @ v.T
    assert values.diag().min() > 0.6 and values.diag().max() < 1.3
    assert (values - values.diag().diag()).abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_muon_goes_downhill_by_the_learning_rate_however_steep_it_is(scale):
    """Its step is as large as AdamW's, 0.2 lr in root mean square (Liu et al. 2025), give or take singular values."""
    shapes = [(16, 8, 3, 3), (4, 8, 1, 1), (16, 8, 3, 3)]
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    before, muon = [weight.detach().clone() for weight in weights], train_ddpm.Muon(weights, lr=0.01)
    for weight in weights:
        weight.grad = scale * torch.randn_like(weight)
    muon.step()
    for weight, old in zip(weights, before):
        step = weight.detach() - old
        assert (step * weight.grad).sum() < 0
        assert 0.6 < step.square().mean().sqrt() / (0.2 * 0.01) < 1.3


def test_what_exists_is_replaced_only_at_the_first_save_and_said_first(workdir):
    (workdir / "weights").mkdir()
    (workdir / WEIGHTS).write_bytes(b"precious")
    process = start(workdir, "train_ddpm.py", *SMALL_RUN, "--epochs", "10000", "--save-every", "10000")
    first = process.stdout.readline()
    assert WEIGHTS in first and "replaced" in first
    while not process.stdout.readline().startswith("epoch  3"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert (workdir / WEIGHTS).read_bytes() == b"precious"


def test_learning_rate_warms_up_and_ends_at_zero():
    total, peak = 10_000, 2e-3
    rates = [train_ddpm.learning_rate(step, total, peak) for step in range(total + 1)]
    assert rates[train_ddpm.WARMUP_STEPS] == pytest.approx(peak) == max(rates)
    assert np.all(np.diff(rates[: train_ddpm.WARMUP_STEPS]) > 0) and np.all(
        np.diff(rates[train_ddpm.WARMUP_STEPS :]) < 0
    )
    assert rates[0] > 0 and rates[-1] == pytest.approx(0, abs=1e-12)
    for few in (1, 2, 9, 11):
        assert all(0 < train_ddpm.learning_rate(step, few, peak) <= peak for step in range(few))


# ---- Going on


RUN_OF_15 = (*SMALL_RUN, "--epochs", "15", "--precision", "fp32")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = fill(tmp_path_factory.mktemp("whole"))
    assert run(folder, "train_ddpm.py", *RUN_OF_15).returncode == 0
    return folder


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(workdir, whole_run, stop):
    process = start(workdir, "train_ddpm.py", *RUN_OF_15)
    while not process.stdout.readline().startswith("saved"):
        assert process.poll() is None
    time.sleep(random.Random(0).random() * 0.2)
    process.send_signal(stop)
    _, err = process.communicate(timeout=10)
    if stop == signal.SIGINT:
        assert process.returncode == 130 and "--resume" in err and "Traceback" not in err
    assert 5 <= read_state(workdir / STATE)["epoch"] < 15
    result = run(workdir, "train_ddpm.py", "--data-dir", "small", "--device", "cpu", "--resume")
    assert result.returncode == 0 and "going on after epoch" in result.stdout, result.stderr
    for name in (WEIGHTS, STATE):
        assert_same(read_state(workdir / name), read_state(whole_run / name))


def test_killed_at_random_moments_a_run_can_always_go_on(workdir):
    rng, done, resume = random.Random(1), 0, ()
    options = [*SMALL_RUN, "--epochs", "1000", "--save-every", "1"]
    for _ in range(3):
        process = start(workdir, "train_ddpm.py", *options, *resume)
        while not process.stdout.readline().startswith("saved"):
            assert process.poll() is None, process.stderr.read()
        time.sleep(rng.random())
        process.kill()
        process.communicate()
        load_ddpm(workdir / WEIGHTS)
        epoch = read_state(workdir / STATE)["epoch"]
        assert epoch > done
        done, resume = epoch, ("--resume",)


def test_ctrl_c_before_the_first_save_says_that_nothing_is_saved(workdir):
    process = start(workdir, "train_ddpm.py", *SMALL_RUN, "--epochs", "10000", "--save-every", "10000")
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "saved nothing" in err and err.count("\n") == 1
    assert not (workdir / WEIGHTS).exists()


def test_resume_without_a_state_and_with_a_foreign_one(workdir, call):
    assert_one_line_error(call(workdir, "train_ddpm.py", *SMALL_RUN, "--resume"), STATE)
    (workdir / "weights").mkdir()
    torch.save({"config": {}, "model": {}}, workdir / STATE)
    assert_one_line_error(call(workdir, "train_ddpm.py", *SMALL_RUN, "--resume"), STATE)
    torch.save([], workdir / STATE)
    assert_one_line_error(call(workdir, "train_ddpm.py", *SMALL_RUN, "--resume"), STATE)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_weights(workdir, monkeypatch, call):
    real, calls = DDPM.forward, []

    def diverges(self, *batch):
        calls.append(1)
        return real(self, *batch) * (float("nan") if len(calls) > 6 else 1)  # four steps an epoch

    monkeypatch.setattr(DDPM, "forward", diverges)
    result = call(workdir, "train_ddpm.py", *SMALL_RUN, "--epochs", "3", "--save-every", "1")
    assert_one_line_error(result, "nan", "is that of epoch 1")
    assert read_state(workdir / STATE)["epoch"] == 1
    load_ddpm(workdir / WEIGHTS)


def test_a_save_that_fails_says_so_and_keeps_the_old_file(workdir, monkeypatch, call):
    real, calls = train_ddpm.write_state, []

    def full(path, state):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(path, state)

    monkeypatch.setattr(train_ddpm, "write_state", full)
    result = call(workdir, "train_ddpm.py", *SMALL_RUN, "--epochs", "2", "--save-every", "1")
    assert_one_line_error(result, "No space left", "is that of epoch 1")
    assert read_state(workdir / STATE)["epoch"] == 1


@pytest.mark.parametrize("where", ["weights", "generated_outputs"])
def test_a_folder_that_cannot_be_written_is_reported_before_training(workdir, where, call):
    (workdir / where).write_text("a file in the way")
    result = call(workdir, "train_ddpm.py", *SMALL_RUN, "--epochs", "1")
    assert_one_line_error(result, where)
    assert "epoch" not in result.stdout


def test_a_disk_that_is_full_is_reported_before_training(workdir, monkeypatch, call):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert_one_line_error(call(workdir, "train_ddpm.py", *SMALL_RUN), "MB free", "weights")


# ---- Data


class Refuse(http.server.BaseHTTPRequestHandler):
    """A proxy that answers 403 to everything."""

    def do_CONNECT(self):
        self.send_error(403)

    do_GET = do_CONNECT

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("network", ["none", "403"])
def test_a_download_that_fails_names_the_files_and_the_folder(workdir, network):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    port = server.server_port
    if network == "403":
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    proxy = f"http://127.0.0.1:{port}"
    result = run(
        workdir, "train_ddpm.py", "--data-dir", "nowhere", "--device", "cpu",
        http_proxy=proxy, https_proxy=proxy, HTTP_PROXY=proxy, HTTPS_PROXY=proxy, no_proxy="", NO_PROXY="",
    )  # fmt: skip
    assert_one_line_error(result, "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "nowhere/MNIST/raw")
    if network == "403":
        assert "403" in result.stderr
        server.shutdown()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_a_truncated_file_is_named(workdir, name, call):
    path = workdir / "small" / "MNIST" / "raw" / name
    path.write_bytes(path.read_bytes()[:-5])
    assert_one_line_error(call(workdir, "train_ddpm.py", *SMALL_RUN), name, "delete it")


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_random_damage_of_the_data_is_one_line_or_harmless(workdir, name):
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
            images, labels = train_ddpm.load_mnist(str(workdir / "small"))
        except SystemExit as error:
            assert str(error).startswith("error: ") and "\n" not in str(error) and name in str(error)
            n_refused += 1
        else:
            assert images.shape == (64, 28, 28) and images.dtype == torch.uint8
            assert labels.shape == (64,) and labels.min() >= 0 and labels.max() <= 9
    assert n_refused > 100


def test_images_of_another_size_are_refused(workdir, call):
    path = workdir / "small" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    write_idx(path, torch.zeros(64, 32, 32, dtype=torch.uint8))
    assert_one_line_error(call(workdir, "train_ddpm.py", *SMALL_RUN), path.name, "28x28")


# ---- Bad input


@pytest.mark.parametrize(
    ("options", "allowed"),
    [("--epochs 0", "at least 1"), ("--batch-size 0", "at least 1"), ("--lr 0", "from 1e-08"), ("--lr nan", "to 1"),
     ("--drop-prob 1.1", "from 0 to 1"), ("--drop-prob -0.1", "from 0 to 1"), ("--n-feat 0", "from 8"),
     ("--n-feat 12", "multiple of 8"), ("--n-T 20", "from 21 to 10000"), ("--save-every 0", "at least 1"),
     ("--seed -1", "from 0"), ("--device quantum", "device"), ("--precision fp8", "fp32")],
)  # fmt: skip
def test_impossible_options_state_the_allowed_range(tmp_path, call, options, allowed):
    result = call(tmp_path, "train_ddpm.py", *options.split())
    assert result.returncode == 2 and allowed in result.stderr


def test_a_batch_larger_than_the_data_set_is_refused(workdir, call):
    result = call(workdir, "train_ddpm.py", "--data-dir", "small", "--batch-size", "65", "--device", "cpu")
    assert_one_line_error(result, "--batch-size", "from 1 to 64")


# ---- Several processes


def torchrun(cwd, *command):
    return run(cwd, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command, OMP_NUM_THREADS="1")


def test_two_ranks_visit_each_image_once_stay_identical_and_one_can_go_on(workdir):
    options = [*SMALL_RUN, "--batch-size", "15"]  # does not divide the 64 images, nor by two
    result = torchrun(workdir, PROJECT / "tests" / "two_ranks.py", *options, "--epochs", "3")
    assert result.returncode == 0, result.stderr
    assert len(losses(result.stdout)) == 3 and result.stdout.count("saved") == 1
    assert "identical ranks, each image once an epoch" in result.stdout
    alone = run(workdir, "train_ddpm.py", "--data-dir", "small", "--device", "cpu", "--resume", "--epochs", "4")
    assert alone.returncode == 0 and len(losses(alone.stdout)) == 1, alone.stderr
    both = torchrun(workdir, "train_ddpm.py", "--data-dir", "small", "--device", "cpu", "--resume", "--epochs", "5")
    assert both.returncode == 0 and len(losses(both.stdout)) == 1, both.stderr


def test_gradients_of_two_ranks_are_those_of_the_whole_batch(workdir, tmp_path_factory):
    """With the same noise on each image. The optimizers' running means of the gradients tell, after five steps."""
    script = PROJECT / "tests" / "two_ranks.py"
    options = ["--same-noise", *SMALL_RUN, "--batch-size", "15", "--epochs", "1", "--precision", "fp32"]
    alone = fill(tmp_path_factory.mktemp("alone"))
    for result in (torchrun(workdir, script, *options), run(alone, script, *options)):
        assert result.returncode == 0, result.stderr
    moments = []
    for folder in (workdir, alone):
        state = read_state(folder / STATE)
        means = [of_each["exp_avg"] for of_each in state["adamw"]["state"].values()]
        means += [of_each["momentum"] for of_each in state["muon"]["state"].values()]
        moments.append(torch.cat([mean.flatten() for mean in means]))
    assert (moments[0] - moments[1]).norm() < 2e-4 * moments[1].norm()


def test_a_rank_that_dies_ends_the_run_with_a_message(workdir):
    result = torchrun(
        workdir, PROJECT / "tests" / "two_ranks.py", "--die", *SMALL_RUN, "--epochs", "1000", "--save-every", "1"
    )
    assert result.returncode != 0
    assert "exitcode" in result.stderr or "another process was lost" in result.stderr
    load_ddpm(workdir / WEIGHTS)


def test_without_torchrun_nothing_distributed_is_used(workdir):
    code = "import train_ddpm, torch; train_ddpm.main(); print('used:', torch.distributed.is_initialized())"
    result = run(workdir, "-c", code, *SMALL_RUN, "--epochs", "1")
    assert result.returncode == 0 and "used: False" in result.stdout, result.stderr
