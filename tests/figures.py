"""Draws the pictures that README explains the model with, from the shipped weights, into generated_outputs.

python -m tests.figures --seed 3              # noise_levels.png, estimates.png, guidance.png, steps.png
python train_ddpm.py --save-every 1           # the previews of a training run, for:
python -m tests.figures --learning            # learning.png
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm_model import (
    DDPM,
    GUIDE_W,
    N_CLASSES,
    ContextUnet,
    UserError,
    atomic_write,
    image_grid,
    load_ddpm,
    number,
    one_line_errors,
    to_image,
)
from tests.digit_classifier import judge, load_classifier

SCALE = 4  # pixels of a picture for one of a digit, in each direction
FONT_SIZE = 64  # README shows the pictures at half of their width; a phone shows them at a quarter
LABEL_WIDTH = 320
GAP = 80  # between the columns of estimates.png
GUIDED_CLASS = 8  # of guidance.png
PREVIEW_ROW = 2  # the row of the previews that learning.png shows
ALL = torch.arange(N_CLASSES)


def labelled(rows: list[tuple[str, np.ndarray | None]]) -> Image.Image:
    """Pictures, uint8 [height, width], one under another, each with its label on the left.

    A label without a picture is a title. "|" divides it into titles of columns.
    """
    width = LABEL_WIDTH + max(pixels.shape[1] for _, pixels in rows if pixels is not None)
    heights = [2 * FONT_SIZE if pixels is None else len(pixels) for _, pixels in rows]
    picture = Image.new("L", (width, sum(heights)))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=FONT_SIZE)
    top = 0
    for (label, pixels), height in zip(rows, heights):
        middle = top + height // 2
        if pixels is None:
            titles = label.split("|")
            for i, title in enumerate(titles):
                centre = LABEL_WIDTH + (width - LABEL_WIDTH) * (2 * i + 1) // (2 * len(titles))
                draw.text((centre, middle), title, fill=255, font=font, anchor="mm")
        else:
            draw.text((LABEL_WIDTH - 20, middle), label, fill=255, font=font, anchor="rm")
            picture.paste(Image.fromarray(pixels), (LABEL_WIDTH, top))
        top += height
    return picture


def row(images: Tensor) -> np.ndarray:
    """Images [N,1,28,28] in [0, 1] -> uint8 [height, width], side by side."""
    return np.array(image_grid(images, columns=len(images), scale=SCALE))


def draw(ddpm: DDPM, seed: int, c: Tensor = ALL, **options) -> Tensor:
    """Digits of classes c [N], [N,1,28,28] in [0, 1], from the noise that seed stands for."""
    return ddpm.sample(c, generator=torch.Generator().manual_seed(seed), **options)


def eighths(ddpm: DDPM) -> list[int]:
    """Nine timesteps, 0, n_T / 8, ..., n_T."""
    return [ddpm.n_T * i // 8 for i in range(9)]


def noise_levels(ddpm: DDPM, seed: int) -> Image.Image:
    """Digits at nine timesteps of the forward process (Ho et al. 2020, eq. 4)."""
    x_0 = 2 * draw(ddpm, seed) - 1
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    rows = []
    for t in eighths(ddpm):
        alphabar = ddpm.alphabar[t]
        x_t = alphabar.sqrt() * x_0 + (1 - alphabar).sqrt() * eps
        rows.append((f"t = {t}", row(to_image(x_t))))
    return labelled(rows)


def estimates(ddpm: DDPM, seed: int) -> Image.Image:
    """x_t and the estimate of x_0 at nine timesteps, while digits are drawn: five of those of noise_levels."""
    timesteps = [max(t, 1) for t in reversed(eighths(ddpm))]
    guided_v, shown = ddpm.guided_v, {}

    def remember(x_t: Tensor, c: Tensor, t: int, guide_w: float) -> Tensor:
        v = guided_v(x_t, c, t, guide_w)
        if t in timesteps:
            alphabar = ddpm.alphabar[t]
            x_0 = alphabar.sqrt() * x_t - (1 - alphabar).sqrt() * v
            noisy, clean = (row(to_image(x[2:7])) for x in (x_t, x_0))
            shown[t] = np.hstack([noisy, np.zeros_like(noisy[:, :GAP]), clean])
        return v

    ddpm.guided_v = remember
    draw(ddpm, seed)
    del ddpm.guided_v
    return labelled([("noisy digits|clean, as estimated", None)] + [(f"t = {t}", shown[t]) for t in timesteps])


def guidance(ddpm: DDPM, seed: int) -> Image.Image:
    """The same noise at several guidance weights: ten digits of a class. What is read as another digit has a frame."""
    c = torch.full((N_CLASSES,), GUIDED_CLASS)
    classifier = load_classifier()
    rows = []
    for w in (0, GUIDE_W, 3, 10):
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
        rows.append((f"eta = {eta}", None))
        rows += [(f"{n} step" + "s" * (n > 1), row(draw(ddpm, seed, steps=n, eta=eta))) for n in numbers]
    return labelled(rows)


def learning(weights: Path) -> Image.Image:
    """A row of the previews of a training run, after that of an untrained network."""
    torch.manual_seed(0)
    c = ALL.repeat(PREVIEW_ROW + 1)
    rows = [("epoch 0", row(draw(DDPM(ContextUnet()), 0, c, steps=50)[-N_CLASSES:]))]
    for epoch in (1, 3, 30):
        with Image.open(weights.with_name(f"{weights.name}.epoch_{epoch:02d}.png")) as preview:
            grid = np.array(preview)[::3, ::3]  # previews have scale 3
        pixels = grid[30 * PREVIEW_ROW : 30 * PREVIEW_ROW + 32]
        rows.append((f"epoch {epoch}", pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1)))
    return labelled(rows)


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the pictures of README.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--weights", type=os.path.expanduser, default="weights/ddpm_mnist.pth", help="draw with these")
    add("--outdir", type=os.path.expanduser, default="generated_outputs", help="where the pictures go")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the noise")
    add("--learning", action="store_true", help="learning.png alone, from the previews beside the weights")
    args = parser.parse_args()
    if args.learning:
        pictures = {"learning": learning(Path(args.weights))}
    else:
        ddpm = load_ddpm(args.weights)
        if ddpm.n_T < 50:
            raise UserError(f"{args.weights} has {ddpm.n_T} timesteps; the pictures need at least 50")
        pictures = {figure.__name__: figure(ddpm, args.seed) for figure in (noise_levels, estimates, guidance, steps)}
    for name, picture in pictures.items():
        with atomic_write(Path(args.outdir, f"{name}.png")) as temporary:
            picture.save(temporary)


if __name__ == "__main__":
    main()
