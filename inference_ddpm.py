"""Draws digits with a trained conditional DDPM.

python inference_ddpm.py --digit 5 --count 9             # generated_outputs/digit_5_grid.png
python inference_ddpm.py --digit 0 1 2 3 4 5 6 7 8 9     # all ten grids, the model loaded once
python inference_ddpm.py --video                         # generated_outputs/denoising_process_0to9.mp4
"""

import argparse
import math
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_model import (
    DDPM,
    GUIDE_W,
    WeightsError,
    image_grid,
    keep_freed_memory,
    load_ddpm,
    number,
    pick_device,
    save_png,
    show_progress,
)

BATCH_SIZE = 500  # digits drawn at a time, which bounds the memory
FPS = 30
DENOISING_FRAMES, HELD_FRAMES = 120, 60  # 4 seconds from noise to digits, then 2 seconds of the digits


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw digits, or film how they emerge from noise.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--digit", type=number(int, 0, 9), nargs="+", default=[5], help="which digits to draw")
    parser.add_argument(
        "--count", type=number(int, 1), default=9, help="how many of each; square numbers fill the grid"
    )
    parser.add_argument("--video", action="store_true", help="film digits 0 to 9 instead")
    parser.add_argument("--guide-w", type=number(float, 0, 100), default=GUIDE_W, help="guidance: 0 is none")
    parser.add_argument("--steps", type=number(int, 1), help="fewer is faster; None is all")
    parser.add_argument("--seed", type=number(int, 0, 2**60), help="same seed, same digits; None is new ones")
    parser.add_argument("--scale", type=number(int, 1, 64), default=4, help="side of an image pixel in the output")
    parser.add_argument("--weights", default="weights/ddpm_mnist.pth")
    parser.add_argument("--outdir", type=Path, default="generated_outputs")
    parser.add_argument("--device", type=pick_device, default="auto")
    return parser.parse_args()


def progress(frames: Iterable[Tensor], total: int, what: str) -> Iterator[Tensor]:
    """Passes frames on, and keeps a line on the terminal about how many there were and the time left."""
    start = time.perf_counter()
    for done, frame in enumerate(frames):
        seconds = (time.perf_counter() - start) / max(done, 1) * (total - done)
        show_progress(f"{what}: step {done}/{total}" + (f", {seconds:.0f} s left" if done else ""))
        yield frame
    show_progress("")


def draw_digits(ddpm: DDPM, digit: int, args: argparse.Namespace, seed: int) -> Tensor:
    """args.count images of a digit, [count,1,28,28] in [0,1], the same whichever other digits are drawn."""
    generator = torch.Generator().manual_seed(10 * seed + digit)
    labels = torch.full((args.count,), digit, device=ddpm.alphabar.device)
    drawn = []
    for c in labels.split(BATCH_SIZE):
        what = f"digit {digit}, {sum(map(len, drawn))} of {args.count} drawn"
        for x in progress(ddpm.denoise(c, args.guide_w, args.steps, generator), args.steps, what):
            pass
        drawn.append(x.cpu())
    return torch.cat(drawn)


def film(ddpm: DDPM, args: argparse.Namespace, seed: int) -> list[np.ndarray]:
    """Frames uint8 [height, width] of digits 0 to 9 in 2 x 5: from pure noise to finished digits, which are held."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(10, device=ddpm.alphabar.device)
    states = list(progress(ddpm.denoise(labels, args.guide_w, args.steps, generator), args.steps, "digits 0 to 9"))
    shown = np.linspace(0, len(states) - 1, DENOISING_FRAMES).round().astype(int)  # skips steps, or repeats them
    frames = [image_grid(states[i], columns=5, scale=args.scale) for i in shown]
    return frames + frames[-1:] * HELD_FRAMES


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """An MP4 that browsers play: VP9, else H.264; failing both, MPEG-4 with a warning. Atomic. Raises OSError."""
    os.environ["OPENCV_LOG_LEVEL"], os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "SILENT", "-8"
    import cv2  # takes long to load, and only a film needs it

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name("." + path.name)  # the suffix chooses the container
    height, width = frames[0].shape
    try:
        for codec in ("vp09", "avc1", "mp4v"):
            writer = cv2.VideoWriter(str(beside), cv2.VideoWriter_fourcc(*codec), FPS, (width, height))
            if writer.isOpened():
                break
        else:
            raise OSError(f"OpenCV has no codec that can write {path}")
        if codec == "mp4v":
            print("warning: no VP9 or H.264 here; browsers will not play this MPEG-4 video", file=sys.stderr)
        for frame in frames:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR))
        writer.release()
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    try:
        ddpm = load_ddpm(args.weights, args.device)
        args.steps = args.steps or ddpm.n_T
        if args.steps > ddpm.n_T:
            sys.exit(f"error: --steps must be from 1 to {ddpm.n_T}, the timesteps of {args.weights}, not {args.steps}")
        seed = secrets.randbelow(2**32) if args.seed is None else args.seed
        if args.video:
            path = args.outdir / "denoising_process_0to9.mp4"
            write_video(path, film(ddpm, args, seed))
            print(f"saved {path}")
        for digit in [] if args.video else args.digit:
            path = args.outdir / f"digit_{digit}_grid.png"
            images = draw_digits(ddpm, digit, args, seed)
            save_png(path, image_grid(images, columns=math.ceil(math.sqrt(args.count)), scale=args.scale))
            print(f"saved {path}")
    except WeightsError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write {args.outdir} ({error.strerror or error}); choose another --outdir")
    except KeyboardInterrupt:
        show_progress("")
        sys.exit(130)


if __name__ == "__main__":
    main()
