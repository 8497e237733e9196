"""Draws the pictures that README explains the model with, into try/. They need MNIST.

python -m tests.figures --seed 6              # all but learning.png, with the included weights
python -m tests.figures --learning            # learning.png; trains for 30 epochs
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

import ddpm_model
import train_ddpm
from ddpm_model import DDPM, ContextUnet, atomic_write, image_grid, load_ddpm, number, one_line_errors
from tests.digit_classifier import N_CLASSES, judge, load_classifier
from tests.evaluate import load, random_of_each_class

SCALE = 4  # pixels of a picture for one of a digit, in each direction
FONT_SIZE = 64  # README shows the pictures at half of their width; a phone shows them at a quarter
LABEL_WIDTH = 320
GAP = 80  # between the columns of estimates.png
GUIDED_CLASS = 8  # of guidance.png
LEARNING = {1: "step 1", 50: "step 50", 100: "step 100", 300: "step 300", 937: "epoch 1", 28110: "epoch 30"}
ALL = torch.arange(N_CLASSES)


def labelled(rows: list[tuple[str, np.ndarray | str]]) -> Image.Image:
    """Pictures, uint8 [height, width], one under another, each with its label on the left.

    In place of a picture there can be a line of text. "|" divides it into columns.
    """
    width = LABEL_WIDTH + max(content.shape[1] for _, content in rows if not isinstance(content, str))
    heights = [2 * FONT_SIZE if isinstance(content, str) else len(content) for _, content in rows]
    picture = Image.new("L", (width, sum(heights)))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=FONT_SIZE)
    top = 0
    for (label, content), height in zip(rows, heights):
        middle = top + height // 2
        draw.text((LABEL_WIDTH - 20, middle), label, fill=255, font=font, anchor="rm")
        if isinstance(content, str):
            texts = content.split("|")
            for i, text in enumerate(texts):
                centre = LABEL_WIDTH + (width - LABEL_WIDTH) * (2 * i + 1) // (2 * len(texts))
                draw.text((centre, middle), text, fill=255, font=font, anchor="mm")
        else:
            picture.paste(Image.fromarray(content), (LABEL_WIDTH, top))
        top += height
    return picture


def row(images: Tensor) -> np.ndarray:
    """Images [N,1,28,28] in [0, 1] -> uint8 [height, width], side by side."""
    return np.array(image_grid(images, columns=len(images), scale=SCALE))


def draw(ddpm: DDPM, seed: int, c: Tensor = ALL, **options) -> Tensor:
    """Digits of classes c [N], [N,1,28,28] in [0, 1], from the noise that seed stands for."""
    return ddpm.sample(c, generator=torch.Generator().manual_seed(seed), **options)


def noise_levels(ddpm: DDPM, seed: int, digits: Tensor) -> Image.Image:
    """Ten digits at nine timesteps of the forward process (Ho et al. 2020, eq. 4)."""
    x_0 = 2 * digits - 1
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(9):
        t = ddpm.n_T * i // 8
        alphabar = ddpm.alphabar[t]
        eps = torch.randn(x_0.shape, generator=generator)
        x_t = alphabar.sqrt() * x_0 + (1 - alphabar).sqrt() * eps
        rows.append((f"t = {t}", row(ddpm_model.to_image(x_t))))
    return labelled(rows)


def estimates(ddpm: DDPM, seed: int) -> Image.Image:
    """x_t and the estimate of x_0 at nine timesteps, while five digits are drawn."""
    timesteps = [max(ddpm.n_T * i // 8, 1) for i in range(8, -1, -1)]
    guided_v, shown = ddpm.guided_v, {}

    def remember(x_t: Tensor, c: Tensor, t: int, guide_w: float) -> Tensor:
        v = guided_v(x_t, c, t, guide_w)
        if t in timesteps:
            alphabar = ddpm.alphabar[t]
            x_0 = alphabar.sqrt() * x_t - (1 - alphabar).sqrt() * v
            noisy, clean = (row(ddpm_model.to_image(x[2:7])) for x in (x_t, x_0))
            shown[t] = np.hstack([noisy, np.zeros_like(noisy[:, :GAP]), clean])
        return v

    ddpm.guided_v = remember
    draw(ddpm, seed)
    del ddpm.guided_v
    return labelled([("", "noisy images|clean, as estimated")] + [(f"t = {t}", shown[t]) for t in timesteps])


def guidance(ddpm: DDPM, seed: int) -> Image.Image:
    """The same noise at several guidance weights: ten digits of a class. What is read as another digit has a frame."""
    c = torch.full((N_CLASSES,), GUIDED_CLASS)
    classifier = load_classifier()
    rows = []
    for w in (0, ddpm_model.GUIDE_W, 3, 10):
        digits = draw(ddpm, seed, c, guide_w=w)
        pixels = row(digits)
        _, seen = judge(classifier, digits)
        for i in (seen != c).nonzero()[:, 0].tolist():
            tile = pixels[:, 30 * SCALE * i : 30 * SCALE * (i + 1) + 2 * SCALE]
            tile[:4] = tile[-4:] = tile[:, :4] = tile[:, -4:] = 255
        rows.append((f"w = {w:g}", pixels))
    return labelled(rows)


def steps(ddpm: DDPM, seed: int) -> Image.Image:
    """The same noise in several numbers of steps, without fresh noise on the way (eta = 0) and with it (eta = 1)."""
    rows = []
    for eta, numbers in ((0, (ddpm.n_T, 50, 20, 5, 1)), (1, (ddpm.n_T, 50, 20))):
        rows.append(("", f"eta = {eta}"))
        rows += [(f"{n} step" + "s" * (n > 1), row(draw(ddpm, seed, steps=n, eta=eta))) for n in numbers]
    return labelled(rows)


def copies(ddpm: DDPM, seed: int, train: Tensor, test: Tensor) -> Image.Image:
    """Drawn digits and test images, ten of each, above the nearest training images. Prints distances of all.

    Ten: the first of each class, of 500 drawn digits; of the test images [10 N,1,28,28], every N-th.
    """
    drawn = draw(ddpm, seed, ALL.repeat(50), steps=50)
    rows = []
    for name, images, ten in (("drawn", drawn, ALL), ("test", test, ALL * (len(test) // N_CLASSES))):
        distance, nearest = torch.cdist(images.flatten(1), train.flatten(1)).min(dim=1)
        low, median = distance.quantile(torch.tensor([0.01, 0.5])).tolist()
        print(
            f"{len(images)} {name} images to the nearest training image: median {median:.2f}, 1st percentile {low:.2f}"
        )
        distances = "|".join(f"{value:.1f}" for value in distance[ten])
        rows += [(name, row(images[ten])), ("nearest", row(train[nearest[ten]])), ("distance", distances)]
    return labelled(rows)


def learning(seed: int, data_dir: str) -> Image.Image:
    """The same noise at several moments of a training with the default options, with the averaged weights."""
    ddpm = DDPM(ContextUnet()).requires_grad_(False)
    steps = itertools.count(1)
    rows = []

    def average(decay: float) -> Callable:
        """Takes the place of torch's function, which train_ddpm.py calls once a step."""

        def update(ema: list[Tensor], parameters: list[Tensor], _: None) -> None:
            get_ema_multi_avg_fn(decay)(ema, parameters, None)
            label = LEARNING.get(next(steps))
            if label:
                for mine, its in zip(ddpm.parameters(), ema):
                    mine.copy_(its)
                rows.append((label, row(draw(ddpm, seed, steps=50))))

        return update

    with tempfile.TemporaryDirectory() as folder:
        argv = ["train_ddpm.py", "--data-dir", data_dir, "--weights", f"{folder}/ddpm.pth", "--save-every", "30"]
        with mock.patch.object(train_ddpm, "get_ema_multi_avg_fn", average), mock.patch.object(sys, "argv", argv):
            train_ddpm.main()
    return labelled(rows)


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the pictures of README.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--weights", type=os.path.expanduser, default="weights/ddpm_mnist.pth", help="draw with these")
    add("--data-dir", type=os.path.expanduser, default="data", help="folder of MNIST; downloaded if missing")
    add("--outdir", type=os.path.expanduser, default="try", help="where the pictures go")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the noise")
    add("--learning", action="store_true", help="learning.png alone: trains as train_ddpm.py does, keeps no weights")
    args = parser.parse_args()
    os.makedirs(args.outdir, exist_ok=True)  # fails now, not after a training
    if args.learning:
        pictures = {"learning": learning(args.seed, args.data_dir)}
    else:
        ddpm = load_ddpm(args.weights)
        train, train_labels = load(args.data_dir, train=True)
        test, test_labels = load(args.data_dir, train=False)
        one_of_each = train[random_of_each_class(train_labels, 1)]
        some = test[random_of_each_class(test_labels, 100)]
        pictures = {figure.__name__: figure(ddpm, args.seed) for figure in (estimates, guidance, steps)}
        pictures["noise_levels"] = noise_levels(ddpm, args.seed, one_of_each)
        pictures["copies"] = copies(ddpm, args.seed, train, some)
    for name, picture in pictures.items():
        path = Path(args.outdir, f"{name}.png")
        with atomic_write(path) as temporary:
            picture.save(temporary)
        print(f"saved {path}")


if __name__ == "__main__":
    main()
