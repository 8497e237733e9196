"""Stitches ten digit grids into one sheet of 2 rows x 5 columns: 0 to 4 above 5 to 9.

python inference_ddpm.py --digit 0 1 2 3 4 5 6 7 8 9
python stitch_images.py                                  # combined_2x5_grid.png

If the disk is full, half a sheet may be left. The grids are whole, so run it again.
"""

import argparse
import os
import sys
from pathlib import Path

from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--indir", type=os.path.expanduser, default="generated_outputs", help="has the ten grids")
    parser.add_argument("--output", type=os.path.expanduser, default="combined_2x5_grid.png", help="the sheet")
    args = parser.parse_args()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have letters that the terminal lacks
    Image.MAX_IMAGE_PIXELS = None  # the grids are the user's own, however large
    try:
        for digit in range(10):
            path = Path(args.indir, f"digit_{digit}_grid.png")
            grid = Image.open(path).convert("L")
            if digit == 0:
                width, height = grid.size
                sheet = Image.new("L", (5 * width, 2 * height))
            if grid.size != (width, height):
                raise ValueError("not the size of digit_0_grid.png; draw all with the same --count and --scale")
            sheet.paste(grid, (digit % 5 * width, digit // 5 * height))
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except (OSError, SyntaxError, ValueError, MemoryError) as error:  # Pillow raises three of them for damaged files
        sys.exit(f"error: {path}: {str(error) or 'too large for the memory'}")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
