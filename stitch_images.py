"""Stitches ten digit grids into one sheet of 2 rows x 5 columns: 0 to 4 above 5 to 9.

python inference_ddpm.py --digit 0 1 2 3 4 5 6 7 8 9
python stitch_images.py                                  # combined_2x5_grid.png
"""

import argparse
import os
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_model import UserError, file_path, one_line_errors, save_png, say


def read_grid(path: Path) -> np.ndarray:
    """The picture at path, uint8 [height, width]. Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("L"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more on damaged files
        raise UserError(f"{path} is not a readable picture ({type(error).__name__}); draw it again") from None


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Stitch ten digit grids into one sheet.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--indir", type=file_path, default="generated_outputs", help="has digit_0_grid.png to digit_9_grid.png")
    add("--output", type=file_path, default="combined_2x5_grid.png", help="the sheet")
    args = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None  # the grids are the user's own, however large

    paths = [args.indir / f"digit_{digit}_grid.png" for digit in range(10)]
    missing = ", ".join(str(path) for path in paths if not os.path.exists(path))
    if missing:
        raise UserError(f"missing {missing}; draw them with: python inference_ddpm.py --digit 0 1 2 3 4 5 6 7 8 9")
    grids = [read_grid(path) for path in paths]
    sizes = [f"{path} is {grid.shape[1]}x{grid.shape[0]}" for path, grid in zip(paths, grids)]
    odd = ", ".join(size for size, grid in zip(sizes, grids) if grid.shape != grids[0].shape)
    if odd:
        raise UserError(f"{odd}, but {sizes[0]}; draw all with the same --count and --scale")

    sheet = np.vstack([np.hstack(grids[:5]), np.hstack(grids[5:])])
    save_png(args.output, sheet)
    say(f"saved {args.output}")


if __name__ == "__main__":
    main()
