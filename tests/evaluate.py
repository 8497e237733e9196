"""How good are the drawn digits? Prints, for each guidance weight and number of steps, figures of N images per class.

    python -m tests.evaluate                                        # the shipped weights, 200 images per class
    python -m tests.evaluate --guide-w 0 0.5 1 --steps 50 20 --eta 0 --per-class 500
    python -m tests.evaluate --data-dir data                        # also the two-sample test, which needs real images

accuracy   how often the judge (tests/digit_classifier.py) sees the digit that was asked for
FID        Fréchet distance (Heusel et al. 2017, arXiv:1706.08500) to the 10,000 images of the MNIST test set, in the
           judge's 64 features (not comparable with figures measured in Inception features)
precision  share of drawn images that lie among real ones, recall: share of real ones that lie among the drawn
           (Kynkäänniemi et al. 2019, arXiv:1904.06991, k = 3), against N test images per class
spread     mean distance between two images of one class, sqrt of the sum of squares over the pixels: their variety
told apart accuracy of a small CNN that was trained to tell drawn from real images, on others of both; 50 % is chance
           (Lopez-Paz & Oquab 2017, arXiv:1610.06545)

The first line has the same figures for N real training images per class. The judge has learned from them: on the test
set its accuracy is 99.71 %.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_model import DDPM, GUIDE_W, N_CLASSES, load_ddpm, number, one_line_errors, pick_device
from tests.digit_classifier import DigitClassifier, judge, load_classifier

FIXTURE = Path(__file__).parent / "fixtures" / "mnist_features.pth"
TRAIN_PER_CLASS = 500  # of the training set, the fixture keeps this many of each digit
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


def told_apart(a: Tensor, b: Tensor, epochs: int = 12) -> float:
    """Accuracy of a small CNN that tells images a from images b, both [N,1,28,28] in [0, 1].

    It learns from the images with even numbers and is tested on those with odd ones.
    """
    torch.manual_seed(0)
    x = torch.cat([a, b])
    y = torch.arange(2).repeat_interleave(len(a))
    x_train, y_train = x[::2], y[::2]
    n_batches = len(x_train) // 100
    classifier = DigitClassifier(n_classes=2)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs * n_batches)
    for _ in range(epochs):
        for index in torch.randperm(len(x_train)).tensor_split(n_batches):
            loss = F.cross_entropy(classifier(x_train[index]), y_train[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    _, predicted = judge(classifier.eval(), x[1::2])
    return (predicted == y[1::2]).double().mean().item()


def first_of_each_class(labels: Tensor, n: int) -> Tensor:
    """Indices of the first n of each digit."""
    return torch.cat([(labels == digit).nonzero()[:n, 0] for digit in range(N_CLASSES)])


def real_features(data_dir: str | Path) -> dict[str, Tensor]:
    """The judge's view of MNIST: features and predictions of the whole test set and of part of the training set."""
    from torchvision.datasets import MNIST

    real = {}
    for name, is_train in (("test", False), ("train", True)):
        split = MNIST(data_dir, train=is_train, download=True)
        index = first_of_each_class(split.targets, TRAIN_PER_CLASS) if is_train else torch.arange(len(split.data))
        features, predicted = judge(load_classifier(), split.data[index][:, None] / 255)
        real[name] = features.half()  # halves the fixture; figures change in the fourth digit
        real[f"{name}_labels"], real[f"{name}_predicted"] = split.targets[index].byte(), predicted.byte()
    return real


def real_images(data_dir: str | Path, n: int) -> tuple[Tensor, Tensor]:
    """Two sets of n training images of each digit, [10 n,1,28,28] in [0, 1], picked at random, no image in both."""
    from torchvision.datasets import MNIST

    split = MNIST(data_dir, download=True)
    order = torch.randperm(len(split.data), generator=torch.Generator().manual_seed(0))
    classes = [order[split.targets[order] == digit] for digit in range(N_CLASSES)]
    sets = (torch.cat([index[:n] for index in classes]), torch.cat([index[n : 2 * n] for index in classes]))
    return tuple(split.data[index][:, None] / 255 for index in sets)


def draw(
    ddpm: DDPM, per_class: int, guide_w: float, steps: int, eta: float, seed: int, batch_size: int = 500
) -> Tensor:
    """per_class images of each digit, [10 per_class,1,28,28] in the 8 bits of a PNG: all zeros, then all ones, ..."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.arange(N_CLASSES).repeat_interleave(per_class).to(ddpm.alphabar.device)
    images = torch.cat(
        [
            ddpm.sample(batch, guide_w=guide_w, steps=steps, eta=eta, generator=generator)
            for batch in c.split(batch_size)
        ]
    )
    return (images.cpu() * 255).round() / 255


def spread(images: Tensor, per_class: int) -> float:
    """Mean distance between two images of one class, for images [N,1,28,28] of which per_class follow each other."""
    return sum(torch.pdist(same.flatten(1)).mean().item() for same in images.split(per_class)) * per_class / len(images)


def figures(features: Tensor, predicted: Tensor, labels: Tensor, real: dict[str, Tensor], per_class: int) -> str:
    """The columns of one line that judge images by their features, predicted and asked-for digits."""
    test = real["test"].float()
    peers = test[first_of_each_class(real["test_labels"], per_class)]
    accuracy = (predicted == labels).double().mean()
    return (
        f"{accuracy:8.2%}  {frechet_distance(features, test):6.3f}"
        f"  {share_inside(features, peers):9.3f}  {share_inside(peers, features):6.3f}"
    )


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the quality of drawn digits.")
    parser.add_argument("--weights", type=os.path.expanduser, default="weights/ddpm_mnist.pth")
    parser.add_argument("--guide-w", type=number(float, 0, 100), nargs="+", default=[0.0, GUIDE_W, 1.0])
    parser.add_argument("--steps", type=number(int, 1, 10**6), nargs="+", default=[50])
    parser.add_argument("--eta", type=number(float, 0, 1), default=1.0, help="1 is DDPM, 0 is DDIM")
    parser.add_argument("--per-class", type=number(int, 4, TRAIN_PER_CLASS), default=200)
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    parser.add_argument("--device", type=pick_device, default="auto")
    parser.add_argument("--data-dir", type=os.path.expanduser, help="has MNIST, for the two-sample test")
    args = parser.parse_args()

    real = real_features(args.data_dir) if args.data_dir else torch.load(FIXTURE, weights_only=True)
    ddpm = load_ddpm(args.weights, args.device)

    print(f"{args.per_class} images per class       accuracy     FID  precision  recall   spread  s/image  told apart")
    some = first_of_each_class(real["train_labels"], args.per_class)
    columns = (real["train"][some].float(), real["train_predicted"][some], real["train_labels"][some])
    line = f"real training images     {figures(*columns, real, args.per_class)}"
    n = min(args.per_class, TOLD_APART_PER_CLASS)
    if args.data_dir:
        peers, others = real_images(args.data_dir, n)
        line += f"  {spread(others, n):7.2f}{told_apart(others, peers):21.1%}"
    print(line, flush=True)
    labels, classifier = torch.arange(N_CLASSES).repeat_interleave(args.per_class), load_classifier()
    for steps in args.steps:
        for guide_w in args.guide_w:
            start = time.perf_counter()
            images = draw(ddpm, args.per_class, guide_w, steps, args.eta, args.seed)
            seconds = (time.perf_counter() - start) / len(images)
            line = f"{steps:4d} steps, guide_w {guide_w:4.2f}  "
            line += figures(*judge(classifier, images), labels, real, args.per_class)
            line += f"  {spread(images, args.per_class):7.2f}  {seconds:7.4f}"
            if args.data_dir:
                drawn = images.unflatten(0, (N_CLASSES, -1))[:, :n].flatten(0, 1)
                line += f"{told_apart(drawn, peers):12.1%}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
