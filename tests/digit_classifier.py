"""The judge: a small CNN that names digits, independent of the diffusion model.

Its 64 penultimate features are the space in which tests/evaluate.py measures Fréchet distance, precision
and recall; its logits say whether a drawn digit is the one that was asked for.

    python -m tests.digit_classifier          # retrain, and redo the features of real images -> tests/fixtures

The committed fixtures were made by that command, which printed an accuracy of 99.71 % on the MNIST test set.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIXTURE = Path(__file__).parent / "fixtures" / "digit_classifier.pth"


def conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3 convolution, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class DigitClassifier(nn.Module):
    """Images [B,1,28,28] in [0,1] -> logits [B,n_classes]. `features` gives the 64 numbers before the last layer."""

    def __init__(self, n_classes: int = 10):
        super().__init__()
        self.trunk = nn.Sequential(
            conv(1, 16), conv(16, 24), nn.MaxPool2d(2),
            conv(24, 48), conv(48, 48), nn.MaxPool2d(2),
            conv(48, 64), conv(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(64, n_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def load_classifier(path: Path = FIXTURE) -> DigitClassifier:
    """The trained judge, in evaluation mode, on the CPU."""
    classifier = DigitClassifier()
    classifier.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return classifier.eval()


@torch.inference_mode()
def judge(classifier: DigitClassifier, images: Tensor, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
    """Features [N,64] and predicted digits [N] of images [N,1,28,28] in [0,1], on the CPU."""
    features = torch.cat([classifier.features(x.to(classifier.head.weight.device)) for x in images.split(batch_size)])
    return features.cpu(), classifier.head(features).argmax(1).cpu()


def augment(x: Tensor) -> Tensor:
    """Each image of x [B,1,28,28] rotated, sheared, scaled and shifted a little, at random."""
    jitter = 0.15 * torch.randn(len(x), 2, 3, device=x.device).clamp(-2, 2)
    theta = jitter + torch.eye(2, 3, device=x.device)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digit classifier that judges drawn digits.")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from torchvision.datasets import MNIST  # only training needs the data set

    from tests import evaluate

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = (MNIST(args.data_dir, train=split, download=True) for split in (True, False))
    classifier = DigitClassifier().to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    steps = args.epochs * (len(train.data) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for epoch in range(1, args.epochs + 1):
        classifier.train()
        order = torch.randperm(len(train.data))
        for index in order[: steps // args.epochs * args.batch_size].split(args.batch_size):
            x = train.data[index].to(device)[:, None] / 255
            loss = F.cross_entropy(classifier(augment(x)), train.targets[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        _, digits = judge(classifier.eval(), test.data[:, None] / 255)
        accuracy = (digits == test.targets).double().mean()
        print(f"epoch {epoch:2d}  loss {loss.item():.4f}  accuracy on the MNIST test set {accuracy:.2%}", flush=True)
    torch.save({name: tensor.cpu() for name, tensor in classifier.state_dict().items()}, FIXTURE)
    torch.save(evaluate.real_features(args.data_dir), evaluate.FIXTURE)


if __name__ == "__main__":
    main()
