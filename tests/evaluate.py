"""How good are the drawn digits? Prints, for each guidance weight and number of steps, figures of N images per class.

    python -m tests.evaluate                        # the shipped weights, 200 images per class
    python -m tests.evaluate --guide-w 0 0.5 1 --steps 50 20 --eta 0 --per-class 500

accuracy   how often the judge (tests/digit_classifier.py) sees the digit that was asked for
FID        Fréchet distance (Heusel et al. 2017, arXiv:1706.08500) to the 10,000 images of the MNIST test set, in the
           judge's 64 features (not comparable with figures measured in Inception features). The standard deviation
           over 20 sets of real images is 0.004 for N = 500, 0.010 for 250, 0.015 for 100: less than three times this
           between two rows means nothing
precision  share of drawn images that lie among real ones, recall: share of real ones that lie among the drawn
           (Kynkäänniemi et al. 2019, arXiv:1904.06991, k = 3), against N test images per class
box        share of images whose larger side is exactly 20 pixels, counting all pixels that are not 0; then counting
           those above 0.2 alone
centre     share of images whose centre of mass is less than half a pixel from (14, 14), pixels counted from 0. Those
           who made MNIST scaled and moved every digit so: of its 60,000, 99.98 % obey the first rule, and 99.995 % this
spread     mean distance between two images of one class, sqrt of the sum of squares over the pixels: their variety
told apart accuracy of a small CNN that was trained to tell drawn from real images, on others of both; 50 % is chance
           (Lopez-Paz & Oquab 2017, arXiv:1610.06545)

The first row has the same figures for N real training images per class, picked at random. The judge has learned from
them: on the test set its accuracy is 99.71 %.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm_model import DDPM, GUIDE_W, UserError, load_ddpm, number, one_line_errors, pick_device
from tests.digit_classifier import N_CLASSES, DigitClassifier, judge, load_classifier, train
from train_ddpm import load_mnist

FIXTURE = Path(__file__).parent / "fixtures" / "mnist_features.pth"
MAX_PER_CLASS = 500  # images of each digit that are judged at a time
TOLD_APART_PER_CLASS = 300  # images that the two-sample test compares; half of them to learn from


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to features a [N,D] and b [M,D] (Heusel et al. 2017, eq. 6)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    trace_of_root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_of_root).item()


def share_inside(points: Tensor, of: Tensor, k: int = 3) -> float:
    """Share of points [N,D] within reach of `of` [M,D]: nearer to one of them than its k-th neighbour among them
    (Kynkäänniemi et al. 2019, eq. 1 and 2)."""
    points, of = points.double(), of.double()
    radii = torch.cdist(of, of).kthvalue(k + 1, dim=1).values  # the nearest of all is the point itself
    return (torch.cdist(points, of) <= radii).any(dim=1).double().mean().item()


def box(images: Tensor, above: float = 0.0) -> float:
    """Share of images [N,1,28,28] whose larger side, over the pixels above this value, is exactly 20 pixels."""
    ink = images[:, 0] > above
    sides = []
    for used in (ink.any(dim=1), ink.any(dim=2)):  # columns, rows
        first = used.int().argmax(dim=1)
        after_last = used.shape[1] - used.flip(1).int().argmax(dim=1)
        sides.append(after_last - first)
    return (torch.maximum(*sides) == 20).double().mean().item()


def centre(images: Tensor) -> float:
    """Share of images [N,1,28,28] whose centre of mass is less than half a pixel from (14, 14) in both directions."""
    x = images[:, 0].double()
    mass = x / x.sum(dim=(1, 2), keepdim=True)
    distance = torch.arange(28) - 14
    rows = (mass.sum(dim=2) * distance).sum(dim=1)
    columns = (mass.sum(dim=1) * distance).sum(dim=1)
    return (torch.maximum(rows.abs(), columns.abs()) < 0.5).double().mean().item()


def told_apart(a: Tensor, b: Tensor) -> float:
    """Accuracy of a small CNN that learns from the even images of a and b [N,1,28,28] to tell the odd ones apart."""
    torch.manual_seed(0)
    x = torch.cat([a, b])
    y = torch.arange(2).repeat_interleave(len(a))
    classifier = DigitClassifier(n_classes=2)
    train(classifier, x[::2], y[::2], epochs=12, batch=100, lr=5e-3, change=nn.Identity())
    _, predicted = judge(classifier, x[1::2])
    return (predicted == y[1::2]).double().mean().item()


def first_of_each_class(labels: Tensor, n: int) -> Tensor:
    """Indices of the first n of each digit."""
    return torch.cat([(labels == digit).nonzero()[:n, 0] for digit in range(N_CLASSES)])


def random_of_each_class(labels: Tensor, n: int) -> Tensor:
    """Indices of n of each digit, picked at random, but the same ones in each run."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return order[first_of_each_class(labels[order], n)]


def load(data_dir: str, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST, downloaded where it is missing: images [N,1,28,28] in [0, 1] and labels [N]. Raises UserError."""
    from torchvision.datasets import MNIST  # slow to import

    load_mnist(data_dir)  # as in training: downloads MNIST as a whole, and never over files that are there
    try:
        mnist = MNIST(data_dir, train=train)
    except Exception as error:  # missing, or damaged: each has a type of its own
        raise UserError(f"no MNIST ({error}); {Path(data_dir, 'MNIST', 'raw')} must hold its four files") from error
    return mnist.data[:, None] / 255, mnist.targets


def draw(ddpm: DDPM, per_class: int, guide_w: float, steps: int, eta: float, seed: int) -> Tensor:
    """per_class images of each digit, [10 per_class,1,28,28] in the 8 bits of a PNG: all zeros, then all ones, ..."""
    generator = torch.Generator().manual_seed(seed)
    batches = torch.arange(N_CLASSES).repeat_interleave(per_class).split(500)
    options = {"guide_w": guide_w, "steps": steps, "eta": eta, "generator": generator}
    images = torch.cat([ddpm.sample(c, **options).cpu() for c in batches])
    return (images * 255).round() / 255


def spread(images: Tensor, per_class: int) -> float:
    """Mean distance between two images of one class, for images [N,1,28,28] of which per_class follow each other."""
    return sum(torch.pdist(same.flatten(1)).mean().item() for same in images.split(per_class)) * per_class / len(images)


def figures(features: Tensor, predicted: Tensor, labels: Tensor, real: dict, per_class: int) -> list[float]:
    """Accuracy, FID, precision, recall of images with these features, predicted and asked-for digits."""
    test = real["test"].float()
    peers = test[first_of_each_class(real["test_labels"], per_class)]
    accuracy = (predicted == labels).double().mean().item()
    return [accuracy, frechet_distance(features, test), share_inside(features, peers), share_inside(peers, features)]


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure the quality of drawn digits.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--weights", type=os.path.expanduser, default="weights/ddpm_mnist.pth", help="draw with these")
    add("--guide-w", type=number(float, 0, 100), nargs="+", default=[0.0, GUIDE_W, 1.0], help="guidance weights")
    add("--steps", type=number(int, 1, 10**6), nargs="+", default=[50], help="numbers of steps")
    add("--eta", type=number(float, 0, 1), default=1.0, help="1 is DDPM, 0 is DDIM")
    add("--per-class", type=number(int, 4, MAX_PER_CLASS), default=200, help="images of each digit")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the noise")
    add("--device", default="auto", help="cpu, cuda ...; auto is the GPU, if there is one")
    add("--data-dir", type=os.path.expanduser, default="data", help="folder of MNIST; downloaded if missing")
    args = parser.parse_args()
    ddpm = load_ddpm(args.weights, pick_device(args.device))
    N = args.per_class
    n = min(N, TOLD_APART_PER_CLASS)

    classifier = load_classifier()
    test = torch.load(FIXTURE, weights_only=True)
    labels = torch.arange(N_CLASSES).repeat_interleave(N)
    some = first_of_each_class(labels, n)
    train_images, train_labels = load(args.data_dir, train=True)
    random = random_of_each_class(train_labels, N + n).unflatten(0, (N_CLASSES, N + n))
    real = train_images[random[:, :N].flatten()]
    others = train_images[random[:, N:].flatten()]

    def print_row(name: str, images: Tensor) -> None:
        accuracy, *more = figures(*judge(classifier, images), labels, test, N)
        cells = [f"{accuracy:.2%}", *(f"{value:.3f}" for value in more)]
        cells += [f"{share:.2%}" for share in (box(images), box(images, above=0.2), centre(images))]
        cells += [f"{spread(images, N):.2f}", f"{told_apart(images[some], others):.1%}"]
        print(f"{name:24}" + "".join(f"{cell:>11}" for cell in cells))

    columns = ("accuracy", "FID", "precision", "recall", "box", "box > 0.2", "centre", "spread", "told apart")
    print(f"{f'{N} images per class':24}" + "".join(f"{column:>11}" for column in columns))
    print_row("real training images", real)
    for steps in args.steps:
        for guide_w in args.guide_w:
            print_row(f"{steps} steps, w = {guide_w:g}", draw(ddpm, N, guide_w, steps, args.eta, args.seed))


if __name__ == "__main__":
    main()
