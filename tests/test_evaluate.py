"""The yardsticks of tests/evaluate.py, against closed forms."""

import sys

import pytest
import torch

from ddpm_model import DDPM, ContextUnet, save_weights
from tests import evaluate
from tests.conftest import assert_one_line_error
from tests.evaluate import (
    FIXTURE,
    figures,
    first_of_each_class,
    frechet_distance,
    share_inside,
    spread,
    told_apart,
)


def test_frechet_distance_of_gaussians():
    """Between N(m, s^2 I) and N(0, I) in d dimensions it is |m|^2 + d (s - 1)^2."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 200_000, 3, generator=generator, dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(2 * a + torch.tensor([1.0, 2.0, 0.0]), b) == pytest.approx(5 + 3, rel=0.02)


def test_frechet_distance_of_rotated_sets():
    a, b = torch.randn(2, 500, 4, dtype=torch.float64)
    b = b @ torch.randn(4, 4, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    assert frechet_distance(a @ q, b @ q) == pytest.approx(frechet_distance(a, b))


def test_precision_and_recall_of_known_sets():
    line = torch.arange(100.0)[:, None]  # the third neighbour is 2 away, or 3 at the ends
    assert share_inside(line, line) == 1
    assert share_inside(torch.tensor([[50.5], [1000.0], [-2.5], [-4.0]]), line) == 0.5
    half = line[:50]  # drawn from half of what is real: all precise, half recalled and a little beyond
    assert share_inside(half, line) == 1
    assert share_inside(line, half) == 0.53  # 50, 51 and 52 are within 3 of 49, the end


def test_spread():
    """Two images of each class, 3 and 4 apart in two pixels: at distance 5; and at 0."""
    images = torch.zeros(4, 1, 28, 28)
    images[1, 0, 0, :2] = torch.tensor([3.0, 4.0])
    assert spread(images, 2) == pytest.approx(2.5)


@pytest.mark.parametrize(("brightness", "low", "high"), [(1.0, 0.35, 0.65), (0.5, 0.95, 1.0)])
def test_two_sample_test(brightness, low, high):
    """Two sets from one distribution cannot be told apart, and sets of another brightness can."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 400, 1, 28, 28, generator=generator)
    assert low <= told_apart(a, brightness * b) <= high


def test_figures_of_real_images():
    real = torch.load(FIXTURE, weights_only=True)
    some = first_of_each_class(real["train_labels"], 50)
    features, predicted, labels = real["train"][some].float(), real["train_predicted"][some], real["train_labels"][some]
    accuracy, fid, precision, recall = figures(features, predicted, labels, real, 50).split()
    assert float(accuracy[:-1]) > 99 and float(precision) > 0.8 and float(recall) > 0.8
    assert float(figures(features, predicted, labels.flip(0), real, 50).split()[0][:-1]) < 1
    one_class = labels == 3
    assert float(
        figures(features[one_class], predicted[one_class], labels[one_class], real, 50).split()[1]
    ) > 10 * float(fid)


def test_too_many_steps(tmp_path, call, monkeypatch):
    save_weights(tmp_path / "small.pth", DDPM(ContextUnet(n_feat=8), n_T=40))
    monkeypatch.setitem(sys.modules, "evaluate", evaluate)
    result = call(tmp_path, "evaluate.py", "--weights", "small.pth", "--steps", "41")
    assert_one_line_error(result, "steps must be in 1 .. 40")
