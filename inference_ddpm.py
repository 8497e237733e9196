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
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_model import (
    DDPM,
    GUIDE_W,
    UserError,
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
    without = argparse.SUPPRESS  # the help of an option without a fixed default says what happens
    add("--digit", type=number(int, 0, 9), nargs="+", default=[5], help="which digits to draw")
    add("--count", type=number(int, 1, 10**6), default=9, help="how many of each; square numbers fill the grid")
    add("--video", action="store_true", help="make a video of digits 0 to 9 instead")
    add("--guide-w", type=number(float, 0, 100), default=GUIDE_W, help="guidance weight; 0 is no guidance")
    add("--steps", type=number(int, 1, 10**6), default=without, help="fewer is faster (default: all timesteps)")
    add("--eta", type=number(float, 0, 1), default=1.0, help="1 is DDPM, 0 is DDIM")
    add("--seed", type=number(int, 0, 2**60), default=without, help="same seed, same digits (default: a new seed)")
    add("--scale", type=number(int, 1, 64), default=4, help="side of an image pixel in the output")
    weights = WEIGHTS if WEIGHTS.exists() else Path(__file__).parent / WEIGHTS
    add("--weights", type=file_path, default=weights, help="made by train_ddpm.py")
    add("--outdir", type=file_path, default="generated_outputs", help="where the pictures go")
    add("--device", type=pick_device, default="auto", help="cpu, cuda, ...; auto is the GPU if there is one")
    args = parser.parse_args(namespace=argparse.Namespace(steps=None, seed=secrets.randbelow(2**32)))
    args.columns = math.ceil(math.sqrt(args.count))
    width = (30 * args.columns + 2) * args.scale
    if not args.video and width > MAX_WIDTH:
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
        drawn = []
        for c in torch.full((args.count,), digit).split(BATCH_SIZE):
            for x in denoise_with_progress(ddpm, c, args):
                pass
            drawn.append(x.cpu())
        path = args.outdir / f"digit_{digit}_grid.png"
        save_png(path, image_grid(torch.cat(drawn), args.columns, args.scale))
        say(f"saved {path} (seed {args.seed})")


def draw_video(ddpm: DDPM, args: argparse.Namespace) -> None:
    """Draws digits 0 to 9, and makes a video of N_FRAMES of the steps."""
    os.environ["OPENCV_LOG_LEVEL"] = "SILENT"
    os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"
    try:
        import cv2  # noqa: F401

        folder = tempfile.TemporaryDirectory()
        folder.name.encode()  # OpenCV takes no other names
    except ImportError as error:
        reason = f"cannot import OpenCV ({error})"
        raise UserError(f"{reason}; install the system's libgl1, or opencv-python-headless") from None
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f"no usable temporary folder ({error}); set TMPDIR to one") from None
    torch.manual_seed(args.seed)
    timesteps = np.array(ddpm.timesteps(args.steps))
    images = list(denoise_with_progress(ddpm, torch.arange(10), args))
    frames = []
    for t in ddpm.n_T * np.linspace(1, 0, N_FRAMES) ** 2:  # squares: few frames of noise, many of digits
        step = np.abs(timesteps - t).argmin()
        frames.append((images[step], timesteps[step]))
    path = args.outdir / "denoising_process_0to9.mp4"
    with folder:
        write_atomically(path, encode_mp4(frames, args.scale, folder.name))
    write_atomically(path.with_suffix(".gif"), encode_gif(frames, min(args.scale, 6)))
    say(f"saved {path} and .gif (seed {args.seed})")


def draw_frame(images: Tensor, t: int, scale: int) -> np.ndarray:
    """Images [10,1,28,28] in two rows, and t below them, uint8 [74 scale, 152 scale]."""
    import cv2

    grid = image_grid(images, columns=5, scale=scale)
    frame = np.pad(grid, ((0, 12 * scale), (0, 0)))
    return cv2.putText(frame, f"t = {t}", (2 * scale, 71 * scale), cv2.FONT_HERSHEY_SIMPLEX, scale / 4, 255)


def encode_mp4(frames: list[tuple[Tensor, int]], scale: int, folder: str) -> bytes:
    """A VP9 video in MP4 of frames (images, t). Uses a file in folder, as OpenCV needs one. Raises UserError."""
    import cv2

    path = os.path.join(folder, "video.mp4")
    frames = frames + frames[-1:] * 2 * FPS
    codec = cv2.VideoWriter_fourcc(*"vp09")
    writer = cv2.VideoWriter(path, codec, FPS, (152 * scale, 74 * scale), isColor=False)
    if not writer.isOpened():
        raise UserError("OpenCV has no codec for VP9 video; try: pip install --upgrade opencv-python")
    for images, t in frames:
        writer.write(draw_frame(images, t, scale))
    writer.release()
    n_written = int(cv2.VideoCapture(path).get(cv2.CAP_PROP_FRAME_COUNT))
    if n_written < len(frames):  # OpenCV does not report that a disk is full
        raise UserError(f"only {n_written} of {len(frames)} frames fit in {path}; set TMPDIR to another disk")
    return Path(path).read_bytes()


def encode_gif(frames: list[tuple[Tensor, int]], scale: int) -> bytes:
    """A GIF of every other frame, in 16 grey levels, that plays again and again."""
    pictures = [Image.fromarray(draw_frame(images, t, scale) // 17 * 17) for images, t in frames[1::2]]
    durations = [2000 // FPS] * (len(pictures) - 1) + [2000]  # ms
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()


@one_line_errors()
def main() -> None:
    args = parse_args()
    ddpm = load_ddpm(args.weights, args.device)
    args.steps = args.steps or ddpm.n_T
    if args.steps > ddpm.n_T:
        raise UserError(f"--steps must be from 1 to {ddpm.n_T}, the timesteps of {args.weights}, not {args.steps}")
    # A thread for each 16 images: on fewer, threads spend more time waiting for each other than working.
    n_images = 10 if args.video else min(args.count, BATCH_SIZE)
    torch.set_num_threads(min(torch.get_num_threads(), 1 + n_images // 16))
    draw = draw_video if args.video else draw_grids
    draw(ddpm, args)


if __name__ == "__main__":
    main()
