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
    ContextUnet,
    UserError,
    atomic_write,
    image_grid,
    load_ddpm,
    number,
    one_line_errors,
    to_image,
)

SCALE = 4  # pixels of a picture for one of a digit, in each direction
FONT_SIZE = 48  # README shows the pictures at a third of their width, or less
LABEL_WIDTH = 300
ALL = torch.arange(10)


def labelled(title: str, rows: dict[str, np.ndarray]) -> np.ndarray:
    """A title, and grids, uint8 [height, width], one under another, each with its label on the left."""
    font = ImageFont.load_default(size=FONT_SIZE)
    body = np.vstack(list(rows.values()))
    picture = Image.new("L", (LABEL_WIDTH + body.shape[1], 2 * FONT_SIZE + len(body)))
    picture.paste(Image.fromarray(body), (LABEL_WIDTH, 2 * FONT_SIZE))
    draw = ImageDraw.Draw(picture)
    draw.text((LABEL_WIDTH + body.shape[1] // 2, FONT_SIZE), title, fill=255, font=font, anchor="mm")
    for i, label in enumerate(rows):
        middle = 2 * FONT_SIZE + int((i + 0.5) * len(body) / len(rows))
        draw.text((LABEL_WIDTH - 20, middle), label, fill=255, font=font, anchor="rm")
    return np.array(picture)


def row(images: Tensor) -> np.ndarray:
    """Images [N,1,28,28] in [0, 1] -> uint8 [height, width], side by side."""
    return np.array(image_grid(images, columns=len(images), scale=SCALE))


def save_png(path: Path, pixels: np.ndarray) -> None:
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary)


def draw(ddpm: DDPM, seed: int, c: Tensor = ALL, **options) -> Tensor:
    """Digits of classes c [N], [N,1,28,28] in [0, 1], from the noise that seed stands for."""
    return ddpm.sample(c, generator=torch.Generator().manual_seed(seed), **options)


def noise_levels(ddpm: DDPM, seed: int) -> np.ndarray:
    """Digits at timesteps t = 0, n_T / 8, ..., n_T of the forward process (Ho et al. 2020, eq. 4)."""
    x_0 = 2 * draw(ddpm, seed) - 1
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    rows = {}
    for t in range(0, ddpm.n_T + 1, ddpm.n_T // 8):
        alphabar = ddpm.alphabar[t]
        x_t = alphabar.sqrt() * x_0 + (1 - alphabar).sqrt() * eps
        rows[f"t = {t}"] = row(to_image(x_t))
    return labelled("digits with the noise of timestep t", rows)


def estimates(ddpm: DDPM, seed: int) -> np.ndarray:
    """The estimate of x_0 at some timesteps, while digits are drawn."""
    guided_v, x_0 = ddpm.guided_v, {}

    def remember(x: Tensor, c: Tensor, t: int, guide_w: float) -> Tensor:
        v = guided_v(x, c, t, guide_w)
        alphabar = ddpm.alphabar[t]
        x_0[t] = to_image(alphabar.sqrt() * x - (1 - alphabar).sqrt() * v)
        return v

    ddpm.guided_v = remember
    draw(ddpm, seed)
    del ddpm.guided_v
    shown = [round(share * ddpm.n_T) for share in (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.5)] + [1]
    return labelled("the clean digits, as estimated at timestep t", {f"t = {t}": row(x_0[t]) for t in shown})


def guidance(ddpm: DDPM, seed: int) -> np.ndarray:
    """The same noise at several guidance weights: five digits of each of two classes."""
    c = torch.tensor([4, 8]).repeat_interleave(5)
    rows = {f"w = {w:g}": row(draw(ddpm, seed, c, guide_w=w)) for w in (0, GUIDE_W, 3, 10)}
    return labelled("fours and eights with guidance weight w", rows)


def steps(ddpm: DDPM, seed: int) -> np.ndarray:
    """The same noise in several numbers of steps, without fresh noise on the way (eta = 0), and once with it."""
    rows = {f"{n} steps": row(draw(ddpm, seed, steps=n, eta=0)) for n in (ddpm.n_T, 50, 20)}
    rows["20, eta = 1"] = row(draw(ddpm, seed, steps=20))
    rows["5 steps"] = row(draw(ddpm, seed, steps=5, eta=0))
    rows["1 step"] = row(draw(ddpm, seed, steps=1, eta=0))
    return labelled("the same noise in fewer steps, with eta = 0", rows)


def learning(weights: Path) -> np.ndarray:
    """The first row of the previews of a training run, after that of an untrained network."""
    torch.manual_seed(0)
    rows = {"epoch 0": row(draw(DDPM(ContextUnet()), 0, steps=50))}
    for epoch in (1, 3, 30):
        preview = Image.open(weights.with_name(f"{weights.name}.epoch_{epoch:02d}.png"))
        grid = np.array(preview)[: 32 * 3 : 3, ::3]  # previews have scale 3
        rows[f"epoch {epoch}"] = grid.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    return labelled("the same noise after so many epochs of training", rows)


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the pictures of README.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--weights", type=os.path.expanduser, default="weights/ddpm_mnist.pth", help="draw with these")
    add("--outdir", type=os.path.expanduser, default="generated_outputs", help="where the pictures go")
    add("--seed", type=number(int, 0, 2**60), default=0, help="of the noise")
    add("--learning", action="store_true", help="learning.png alone, from the previews beside the weights")
    args = parser.parse_args()
    if args.learning:
        save_png(Path(args.outdir, "learning.png"), learning(Path(args.weights)))
        return
    ddpm = load_ddpm(args.weights)
    if ddpm.n_T < 50:
        raise UserError(f"{args.weights} has {ddpm.n_T} timesteps; the pictures need at least 50")
    for figure in (noise_levels, estimates, guidance, steps):
        save_png(Path(args.outdir, f"{figure.__name__}.png"), figure(ddpm, args.seed))


if __name__ == "__main__":
    main()
