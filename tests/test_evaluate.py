"""The yardsticks of tests/evaluate.py, against closed forms; tests/figures.py and tests/benchmark.py run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_model import save_weights
from tests import benchmark, evaluate, figures
from tests.conftest import assert_one_line_error, small_ddpm, write_small_mnist
from tests.evaluate import FIXTURE, box, centre, first_of_each_class, frechet_distance, share_inside, spread, told_apart


@pytest.fixture
def folder(tmp_path):
    """Has weights of a small untrained network, and ten bars of each class as MNIST."""
    save_weights(tmp_path / "small.pth", small_ddpm(n_feat=1, n_classes=10, n_T=50))
    write_small_mnist(tmp_path / "data", labels=torch.arange(100) % 10)
    return tmp_path


def test_frechet_distance_of_gaussians():
    """Between N(m, A^2) and N(0, I) it is |m|^2 and the sum of (s - 1)^2 over the eigenvalues s of A, here 3, 1, 2."""
    a, b = torch.randn(2, 200_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    A = torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 0, 2]], dtype=torch.float64)
    assert frechet_distance(a @ A + torch.tensor([1.0, 2.0, 0.0]), b) == pytest.approx(5 + 5, rel=0.02)


def test_precision_recall_and_spread_of_known_sets():
    line = torch.arange(100.0)[:, None]  # the third neighbour is 2 away, or 3 at the ends
    assert share_inside(line, line) == 1
    assert share_inside(torch.tensor([[50.5], [1000.0], [-2.5], [-4.0]]), line) == 0.5
    assert share_inside(line[:50], line) == 1 and share_inside(line, line[:50]) == 0.53  # 52 is within 3 of 49, the end
    # Two images of each class, 3 and 4 apart in two pixels: at distance 5; and at 0.
    assert spread(torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 1.0]]), 2) == pytest.approx(2.5)


@pytest.mark.parametrize(("height", "down", "faint", "expected"), [  # box, box > 0.2, centre
    (20, 0, 0, (1, 1, 1)), (19, 0, 0, (0, 0, 1)), (21, 0, 0, (0, 0, 1)), (20, 1, 0, (1, 1, 0)),
    (20, -1, 0, (1, 1, 0)), (20, 0, 0.1, (0, 1, 1)),
])  # fmt: skip
def test_rules_of_mnist(height, down, faint, expected):
    """A bar 11 pixels wide, with a faint rim. Its upper half is darker, or no centre of 20 rows could be near 14."""
    bar = torch.zeros(1, 1, 28, 28)
    top = 14 - height // 2 + down
    bar[..., top - 1 : top + height + 1, 8:21] = faint
    bar[..., top : top + height, 9:20] = 1
    bar[..., top : top + 10, 9:20] = 0.95
    for images in (bar, bar.transpose(2, 3)):
        assert (box(images), box(images, above=0.2), centre(images)) == expected
    assert box(torch.cat([bar, torch.ones(1, 1, 28, 28)])) == expected[0] / 2


def test_two_sample_test():
    """Two sets from one distribution cannot be told apart, and sets of another brightness can."""
    a, b = torch.rand(2, 400, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert 0.35 <= told_apart(a, b) <= 0.65 and told_apart(a, b / 2) >= 0.95


def test_figures_of_real_images():
    real = torch.load(FIXTURE, weights_only=True)
    some = first_of_each_class(real["train_labels"], 50)
    features, seen, labels = (real[name][some] for name in ("train", "train_predicted", "train_labels"))
    accuracy, fid, precision, recall = evaluate.figures(features, seen, labels, real, 50)
    assert accuracy > 0.99 and precision > 0.8 and recall > 0.8
    accuracy, fid_of_threes, *_ = evaluate.figures(features[150:200], seen[150:200], labels[150:200] + 1, real, 50)
    assert accuracy < 0.01 and fid_of_threes > 10 * fid


def test_command(folder, call, monkeypatch):
    """As few images as can be. What is missing is one line, and is not downloaded over what is there."""
    command = ("tests.evaluate", "--weights", "small.pth", "--per-class", 4, "--guide-w", 0, "--steps", 2, 51)
    result = call(folder, *command)
    assert_one_line_error(result, "steps must be in 1 .. 50")
    assert [len(line.split()) for line in result.stdout.splitlines()] == [16, 12, 14]
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", lambda *_, **__: 1 / 0)
    assert_one_line_error(call(folder, *command, "--data-dir", "new"), "division by zero")
    (folder / "data" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    assert_one_line_error(call(folder, *command), "not found", "four files")


def test_pictures(folder, call, monkeypatch):
    result = call(folder, "tests.figures", "--weights", "small.pth")
    monkeypatch.setattr(figures, "LEARNING", {1: "step 1", 30: "epoch 30"})
    result.stdout += call(folder, "tests.figures", "--learning").stdout
    drawn = {path.stem: np.array(Image.open(path))[:, figures.LABEL_WIDTH :] for path in (folder / "try").iterdir()}
    assert all(f"saved {Path('try', name)}.png\n" in result.stdout for name in drawn)
    assert set(drawn) == {"noise_levels", "estimates", "guidance", "steps", "copies", "learning"}
    assert np.diff(np.split(drawn["learning"], 2), axis=0).any()  # training changes the digits
    monkeypatch.setattr(figures, "learning", None)  # it is not reached
    assert_one_line_error(call(folder, "tests.figures", "--learning", "--outdir", "small.pth"), "small.pth")


def test_copies(monkeypatch, capsys):
    """Digits that are copies are found, each beside the image that it is a copy of; test images are none here."""
    train, test = torch.rand(100, 1, 28, 28), torch.rand(30, 1, 28, 28)
    monkeypatch.setattr(figures, "draw", lambda *_, **__: train.flip(0))
    rows = np.split(np.array(figures.copies(None, 0, train, test))[:, figures.LABEL_WIDTH :], 6)  # all equally high
    assert (rows[0] == rows[1]).all() and (rows[3] == figures.row(test[::3])).all() and (rows[3] != rows[4]).any()
    assert capsys.readouterr().out.count("median 0.0") == 1


def test_benchmark(folder, call, monkeypatch):
    """It runs to its last line, also the command in it, with a small network."""
    small = small_ddpm(n_feat=1, n_classes=10, n_T=50)
    save_weights(folder / "weights" / "ddpm_mnist.pth", small)
    monkeypatch.setattr(benchmark, "DDPM", lambda net: small)
    monkeypatch.setattr(benchmark, "PROJECT", folder)
    monkeypatch.setattr(benchmark.seconds, "__defaults__", (1,))
    monkeypatch.setattr("subprocess.run", lambda command, cwd, **_: call(cwd, *command[1:]).check_returncode())
    result = call(folder, "tests.benchmark", "--device", "cpu")
    assert result.returncode == 0 and result.stdout.startswith("the whole command, nine digits: "), result.stderr
