"""Stitches the ten grids of inference_ddpm.py into one sheet of 2 rows x 5 columns: 0 to 4 above 5 to 9.

python inference_ddpm.py --digit 0 1 2 3 4 5 6 7 8 9
python stitch_images.py                                  # combined_2x5_grid.png
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

ROWS, COLUMNS = 2, 5


def read_grid(path: Path) -> Image.Image:
    """The picture at path; exits with one line if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("L")
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error and more on damaged files
        sys.exit(f"error: {path} is not a readable picture ({type(error).__name__}); draw it again")


def read_grids(folder: Path) -> list[Image.Image]:
    """digit_0_grid.png to digit_9_grid.png of folder; exits with one line if some are missing or differ in size."""
    paths = [folder / f"digit_{digit}_grid.png" for digit in range(ROWS * COLUMNS)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        sys.exit(
            f"error: missing {', '.join(missing)}; draw them with: python inference_ddpm.py --digit 0 1 2 3 4 5 6 7 8 9"
        )
    grids = [read_grid(path) for path in paths]
    width, height = most = Counter(grid.size for grid in grids).most_common(1)[0][0]
    odd = [f"{path} is {grid.width}x{grid.height}" for path, grid in zip(paths, grids) if grid.size != most]
    if odd:
        sys.exit(f"error: {', '.join(odd)}, the others {width}x{height}; draw all with the same --count and --scale")
    return grids


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Stitch ten digit grids into one sheet.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--indir", type=Path, default="generated_outputs", help="has digit_0_grid.png to digit_9_grid.png"
    )
    parser.add_argument("--output", type=Path, default="combined_2x5_grid.png")
    args = parser.parse_args()

    Image.MAX_IMAGE_PIXELS = None  # the grids are the user's own, however large
    grids = read_grids(args.indir)
    width, height = grids[0].size
    sheet = Image.new("L", (COLUMNS * width, ROWS * height))
    for digit, grid in enumerate(grids):
        sheet.paste(grid, (digit % COLUMNS * width, digit // COLUMNS * height))
    beside = args.output.with_name(args.output.name + ".tmp")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(beside, format="PNG")
        os.replace(beside, args.output)
    except OSError as error:
        sys.exit(f"error: cannot write {args.output} ({error.strerror}); choose another --output")
    finally:
        if beside.is_file():
            beside.unlink()
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
