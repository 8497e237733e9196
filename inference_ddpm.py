"""Draws digits with a trained conditional DDPM.

python inference_ddpm.py --digit 5 --count 9             # generated_outputs/digit_5_grid.png
python inference_ddpm.py --digit 0 1 2 3 4 5 6 7 8 9     # all ten grids
python inference_ddpm.py --video                         # generated_outputs/denoising_process_0to9.mp4 and .gif
"""

import argparse
import io
import math
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ddpm_model import (
    DDPM,
    GUIDE_W,
    file_path,
    image_grid,
    load_ddpm,
    number,
    one_line_errors,
    pick_device,
    save_png,
    say,
    show_progress,
    write_atomically,
)

WEIGHTS = Path("weights/ddpm_mnist.pth")
BATCH_SIZE = 500  # digits drawn at a time, which bounds the memory
MAX_WIDTH = 16_384  # pixels of a picture
N_FRAMES = 120  # of the video, from noise to digits
FPS = 30  # frames a second; the last frame stays for two seconds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw digits, or a video of how they emerge from noise.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--digit", type=number(int, 0, 9), nargs="+", default=[5], help="which digits to draw")
    add("--count", type=number(int, 1, 10**6), default=9, help="how many of each; square numbers fill the grid")
    add("--video", action="store_true", help="make a video of digits 0 to 9 instead")
    add("--guide-w", type=number(float, 0, 100), default=GUIDE_W, help="guidance: 0 is none")
    add("--steps", type=number(int, 1, 10**6), help="fewer is faster; by default all of the weights' timesteps")
    add("--eta", type=number(float, 0, 1), default=1.0, help="1 is DDPM, 0 is DDIM")
    add("--seed", type=number(int, 0, 2**60), help="same seed, same digits; by default new ones")
    add("--scale", type=number(int, 1, 64), default=4, help="side of an image pixel in the output")
    add("--weights", type=file_path, default=WEIGHTS if WEIGHTS.exists() else Path(__file__).parent / WEIGHTS)
    add("--outdir", type=file_path, default="generated_outputs")
    add("--device", type=pick_device, default="auto")
    args = parser.parse_args()
    if args.seed is None:
        args.seed = secrets.randbelow(2**32)
    args.columns = math.ceil(math.sqrt(args.count))
    width = (30 * args.columns + 2) * args.scale
    if width > MAX_WIDTH:
        parser.error(f"--count and --scale make a picture {width} pixels wide; at most {MAX_WIDTH} are allowed")
    return args


def denoise_with_progress(ddpm: DDPM, c: Tensor, args: argparse.Namespace) -> Iterator[Tensor]:
    """ddpm.denoise with the options in args, and a line on the terminal about the time left."""
    start = time.perf_counter()
    for step, x in enumerate(ddpm.denoise(c, args.guide_w, args.steps, args.eta)):
        left = (time.perf_counter() - start) * (args.steps - step) / max(step, 1)
        show_progress(f"digits {c.unique().tolist()}: step {step}/{args.steps}, {left:.0f} s left")
        yield x
    show_progress("")


def draw_grids(ddpm: DDPM, args: argparse.Namespace) -> None:
    """Draws args.count of each digit, one picture a digit. They are the same whichever other digits are drawn."""
    for digit in args.digit:
        torch.manual_seed(10 * args.seed + digit)
        c = torch.full((args.count,), digit, device=ddpm.alphabar.device)
        drawn = []
        for batch in c.split(BATCH_SIZE):
            for x in denoise_with_progress(ddpm, batch, args):
                pass
            drawn.append(x.cpu())
        path = args.outdir / f"digit_{digit}_grid.png"
        save_png(path, image_grid(torch.cat(drawn), args.columns, args.scale))
        say(f"saved {path}")


def draw_video(ddpm: DDPM, args: argparse.Namespace) -> None:
    """Draws digits 0 to 9, and makes a video of N_FRAMES of the steps."""
    torch.manual_seed(args.seed)
    c = torch.arange(10, device=ddpm.alphabar.device)
    states = list(denoise_with_progress(ddpm, c, args))
    shown = torch.linspace(0, args.steps, N_FRAMES).round().int()
    frames = [states[step] for step in shown]
    path = args.outdir / "denoising_process_0to9.mp4"
    write_atomically(path, encode_mp4(frames, args.scale))
    write_atomically(path.with_suffix(".gif"), encode_gif(frames, min(args.scale, 3)))
    say(f"saved {path} and .gif")


def encode_mp4(frames: list[Tensor], scale: int) -> bytes:
    """An MP4 of frames [10,1,28,28], in VP9. Exits with one line if that fails."""
    import cv2

    pictures = [image_grid(frame, columns=5, scale=scale) for frame in frames]
    pictures += pictures[-1:] * 2 * FPS
    with tempfile.TemporaryDirectory() as folder:  # OpenCV does not take every path, and does not report errors
        path = os.path.join(folder, "video.mp4")
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"vp09"), FPS, pictures[0].shape[::-1])
        if not writer.isOpened():
            sys.exit("error: OpenCV has no codec for VP9 video; try: pip install --upgrade opencv-python")
        for picture in pictures:
            writer.write(cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR))
        writer.release()

        reader = cv2.VideoCapture(path)
        n_written = sum(1 for _ in iter(reader.grab, False))
        reader.release()
        if n_written < len(pictures):
            sys.exit(f"error: cannot write {path} (only {n_written} of {len(pictures)} frames fit)")
        return Path(path).read_bytes()


def encode_gif(frames: list[Tensor], scale: int) -> bytes:
    """A GIF of every other frame, in 16 grey levels, that plays again and again."""
    pictures = [Image.fromarray(image_grid(frame, columns=5, scale=scale) // 17 * 17) for frame in frames[1::2]]
    durations = [2000 // FPS] * (len(pictures) - 1) + [2000]  # ms
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()


@one_line_errors()
def main() -> None:
    args = parse_args()
    if args.video:
        os.environ["OPENCV_LOG_LEVEL"] = "SILENT"
        os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"
        try:
            import cv2  # noqa: F401
        except ImportError as error:
            sys.exit(f"error: cannot import OpenCV ({error}); install the system's libgl1, or opencv-python-headless")
    ddpm = load_ddpm(args.weights, args.device)
    args.steps = args.steps or ddpm.n_T
    if args.steps > ddpm.n_T:
        sys.exit(f"error: --steps must be from 1 to {ddpm.n_T}, the timesteps of {args.weights}, not {args.steps}")
    draw = draw_video if args.video else draw_grids
    draw(ddpm, args)


if __name__ == "__main__":
    main()
