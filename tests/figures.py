"""Draws the pictures that README explains the model with, from the shipped weights, into generated_outputs.

python -m tests.figures                       # noise_levels.png, estimates.png, guidance.png, steps.png
python train_ddpm.py --save-every 1           # the previews of a training run, for:
python -m tests.figures --learning            # learning.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm_model import DDPM, GUIDE_W, file_path, image_grid, load_ddpm, number, one_line_errors, save_png, to_image

SCALE = 2  # pixels of a picture for one of a digit, in each direction
LABEL_WIDTH = 120


def labelled(rows: dict[str, np.ndarray]) -> np.ndarray:
    """Grids, uint8 [height, width], one under another, each with its label on the left."""
    lines = []
    font = ImageFont.load_default(size=20)
    for text, grid in rows.items():
        label = Image.new("L", (LABEL_WIDTH, len(grid)))
        ImageDraw.Draw(label).text((LABEL_WIDTH - 10, len(grid) // 2), text, fill=255, font=font, anchor="rm")
        lines.append(np.hstack([np.array(label), grid]))
    return np.vstack(lines)


def row(images: Tensor) -> np.ndarray:
    """Images [N,1,28,28] in [0, 1] -> uint8 [height, width], side by side."""
    return image_grid(images, columns=len(images), scale=SCALE)


def draw(ddpm: DDPM, seed: int, **options) -> Tensor:
    """Digits 0 to 9, [10,1,28,28] in [0, 1], from the noise that seed stands for."""
    return ddpm.sample(torch.arange(10), generator=torch.Generator().manual_seed(seed), **options)


def noise_levels(ddpm: DDPM, seed: int) -> np.ndarray:
    """Digits at timesteps t = 0, n_T / 8, ..., n_T of the forward process (Ho et al. 2020, eq. 4)."""
    x_0 = 2 * draw(ddpm, seed) - 1
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    rows = {}
    for t in range(0, ddpm.n_T + 1, ddpm.n_T // 8):
        alphabar = ddpm.alphabar[t]
        x_t = alphabar.sqrt() * x_0 + (1 - alphabar).sqrt() * eps
        rows[f"t = {t}"] = row(to_image(x_t))
    return labelled(rows)


def estimates(ddpm: DDPM, seed: int) -> np.ndarray:
    """The estimate of x_0 at timesteps n_T, ..., while digits are drawn."""
    guided_v, x_0 = ddpm.guided_v, {}

    def remember(x: Tensor, c: Tensor, t: int, guide_w: float) -> Tensor:
        v = guided_v(x, c, t, guide_w)
        alphabar = ddpm.alphabar[t]
        x_0[t] = to_image(alphabar.sqrt() * x - (1 - alphabar).sqrt() * v)
        return v

    ddpm.guided_v = remember
    draw(ddpm, seed)
    del ddpm.guided_v
    shown = [*range(ddpm.n_T, 0, -ddpm.n_T // 8), 1]
    return labelled({f"t = {t}": row(x_0[t]) for t in shown})


def guidance(ddpm: DDPM, seed: int) -> np.ndarray:
    """The same noise at several guidance weights."""
    return labelled({f"w = {w:g}": row(draw(ddpm, seed, guide_w=w)) for w in (0, GUIDE_W, 3, 10)})


def steps(ddpm: DDPM, seed: int) -> np.ndarray:
    """The same noise in several numbers of steps, without fresh noise on the way (eta = 0)."""
    numbers = {f"{n} steps": n for n in (ddpm.n_T, 50, 20, 5)} | {"1 step": 1}
    return labelled({text: row(draw(ddpm, seed, steps=n, eta=0)) for text, n in numbers.items()})


def learning(weights: Path) -> np.ndarray:
    """The first row of the previews of a training run."""
    rows = {}
    for epoch in (1, 5, 10, 30):
        preview = Image.open(weights.with_name(f"{weights.name}.epoch_{epoch:02d}.png"))
        grid = np.array(preview)[: 32 * 3 : 3, ::3]  # previews have scale 3
        rows[f"epoch {epoch}"] = grid.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    return labelled(rows)


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of README.")
    parser.add_argument("--weights", type=file_path, default="weights/ddpm_mnist.pth")
    parser.add_argument("--outdir", type=file_path, default="generated_outputs")
    parser.add_argument("--seed", type=number(int, 0, 2**60), default=0)
    parser.add_argument("--learning", action="store_true", help="from the previews beside the weights")
    args = parser.parse_args()
    if args.learning:
        save_png(args.outdir / "learning.png", learning(args.weights))
        return
    ddpm = load_ddpm(args.weights)
    if ddpm.n_T < 50:
        raise SystemExit(f"error: {args.weights} has {ddpm.n_T} timesteps; the pictures need at least 50")
    for figure in (noise_levels, estimates, guidance, steps):
        save_png(args.outdir / f"{figure.__name__}.png", figure(ddpm, args.seed))


if __name__ == "__main__":
    main()
