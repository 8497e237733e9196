"""The judge: a small CNN that names digits, independent of the diffusion model.

Its 64 penultimate features are the space in which tests/evaluate.py measures Fréchet distance, precision
and recall; its logits say whether a drawn digit is the one that was asked for.

    python -m tests.digit_classifier          # retrain, and redo the features of real images -> tests/fixtures
"""

import argparse
import os
from collections.abc import Callable
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_model import one_line_errors

FIXTURE = Path(__file__).parent / "fixtures" / "digit_classifier.pth"
N_CLASSES = 10


def conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3 convolution, batch normalisation, ReLU."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


class DigitClassifier(nn.Module):
    """Images [B,1,28,28] in [0,1] -> logits [B,n_classes]. `trunk` gives the 64 features before the last layer."""

    def __init__(self, n_classes: int = N_CLASSES):
        super().__init__()
        self.trunk = nn.Sequential(
            conv(1, 16), conv(16, 24), nn.MaxPool2d(2),
            conv(24, 48), conv(48, 48), nn.MaxPool2d(2),
            conv(48, 64), conv(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(64, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def load_classifier(path: Path = FIXTURE) -> DigitClassifier:
    """The trained judge, in evaluation mode, on the CPU."""
    classifier = DigitClassifier()
    classifier.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return classifier.eval()


@torch.inference_mode()
def judge(classifier: DigitClassifier, images: Tensor, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
    """Features [N,64] and predicted digits [N] of images [N,1,28,28] in [0,1], on the CPU."""
    features = torch.cat([classifier.trunk(x.to(classifier.head.weight.device)) for x in images.split(batch_size)])
    return features.cpu(), classifier.head(features).argmax(1).cpu()


def augment(x: Tensor) -> Tensor:
    """Each image of x [B,1,28,28] rotated, sheared, scaled and shifted a little, at random."""
    jitter = 0.15 * torch.randn(len(x), 2, 3, device=x.device).clamp(-2, 2)
    theta = jitter + torch.eye(2, 3, device=x.device)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def train(classifier: nn.Module, x: Tensor, y: Tensor, epochs: int, batch: int, lr: float, change: Callable) -> None:
    """Trains a classifier on images x [N,1,28,28] of classes y [N]. change alters each batch of images."""
    device = classifier.head.weight.device
    n_batches = ceil(len(x) / batch)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * n_batches)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).tensor_split(n_batches):
            logits = classifier(change(x[index].to(device)))
            loss = F.cross_entropy(logits, y[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.eval()


@one_line_errors()
def main() -> None:
    from tests import evaluate  # which imports this module

    parser = argparse.ArgumentParser(description="Train the digit classifier that judges drawn digits.")
    parser.add_argument("--data-dir", type=os.path.expanduser, default="data", help="folder of MNIST")
    data_dir = parser.parse_args().data_dir
    images, labels = evaluate.load(data_dir, train=True)
    test_images, test_labels = evaluate.load(data_dir, train=False)

    torch.manual_seed(0)
    classifier = DigitClassifier().to("cuda" if torch.cuda.is_available() else "cpu")
    train(classifier, images, labels, epochs=16, batch=128, lr=1e-2, change=augment)
    torch.save(classifier.cpu().state_dict(), FIXTURE)

    some = evaluate.first_of_each_class(labels, 500)
    real = {}
    for name, x, y in (("test", test_images, test_labels), ("train", images[some], labels[some])):
        features, digits = judge(classifier, x)
        print(f"accuracy on {len(y)} {name} images {(digits == y).double().mean():.2%}")
        real[name] = features.half()  # halves the fixture; figures change in the fourth digit
        real[f"{name}_labels"], real[f"{name}_predicted"] = y.byte(), digits.byte()
    torch.save(real, evaluate.FIXTURE)


if __name__ == "__main__":
    main()
