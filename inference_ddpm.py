"""Draws digits with a trained conditional DDPM.

python inference_ddpm.py --digit 5 --count 9             # generated_outputs/digit_5_grid.png
python inference_ddpm.py --digit 0 1 2 3 4 5 6 7 8 9     # all ten grids
python inference_ddpm.py --video                         # generated_outputs/denoising_process_0to9.mp4 and .gif
"""

import argparse
import os
import secrets
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ddpm_model
from ddpm_model import DDPM, GUIDE_W, UserError, number

WEIGHTS = Path("weights/ddpm_mnist.pth")
N_SEEDS = 2**32 // 10  # 10 * seed + digit must fit in the 32 bits that torch's CPU generator uses of a seed
BATCH_SIZE = 500  # images drawn at a time, which bounds the memory
N_FRAMES = 121  # of the video, from noise to digits
FPS = 30  # frames a second; the last frame stays for two seconds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw digits, or a video of how they emerge from noise.")
    add = parser.add_argument
    add("--digit", type=number(int, 0, 10**6), nargs="+", help="which classes (default: 5, or the last)")
    add("--count", type=number(int, 1, 2500), default=9, help="how many of each (default: %(default)s)")
    add("--video", action="store_true", help="make a video of all classes instead (default: no)")
    add("--guide-w", type=number(float, 0, 100), default=GUIDE_W, help="guidance weight (default: %(default)s)")
    add("--steps", type=number(int, 1, 10_000), help="fewer is faster (default: all timesteps)")
    add("--eta", type=number(float, 0, 1), default=1.0, help="1 is DDPM, 0 is DDIM (default: %(default)s)")
    add("--seed", type=number(int, 0, N_SEEDS - 1), default=secrets.randbelow(N_SEEDS), help="(default: a new one)")
    add("--scale", type=number(int, 1, 20), default=4, help="size of a pixel in the picture (default: %(default)s)")
    weights = WEIGHTS if WEIGHTS.exists() else Path(__file__).resolve().parent / WEIGHTS  # beside this script
    add("--weights", type=os.path.expanduser, default=str(weights), help="made by train_ddpm.py (default: %(default)s)")
    add("--outdir", type=os.path.expanduser, default="generated_outputs", help="for pictures (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda ...; auto is the GPU, if there is one (default: %(default)s)")
    return parser.parse_args()


def draw(ddpm: DDPM, c: torch.Tensor, args: argparse.Namespace, shown: list[int]) -> dict[int, torch.Tensor]:
    """Draws images of classes c. Returns {t: the images at timestep t} for the timesteps that are shown."""
    images = {}
    for t, x in ddpm.denoise(c, guide_w=args.guide_w, steps=args.steps, eta=args.eta):
        ddpm_model.show_progress(f"{len(c)} images, t = {t}")
        if t in shown:
            images[t] = x.cpu()
    ddpm_model.show_progress("")
    return images


def draw_grids(ddpm: DDPM, args: argparse.Namespace) -> None:
    """Draws args.count of each class, one picture a class. They are the same whichever other classes are drawn."""
    last = ddpm.nn_model.n_classes - 1
    digits = args.digit or [min(5, last)]
    if max(digits) > last:
        raise UserError(f"--digit must be in 0 .. {last}, the classes of {args.weights}, not {max(digits)}")
    for digit in digits:
        torch.manual_seed(10 * args.seed + digit)
        batches = torch.full((args.count,), digit).split(BATCH_SIZE)
        images = torch.cat([draw(ddpm, c, args, shown=[0])[0] for c in batches])  # x_0
        path = Path(args.outdir, f"digit_{digit}_grid.png")
        with ddpm_model.atomic_write(path) as temporary:
            ddpm_model.image_grid(images, ceil(sqrt(args.count)), args.scale).save(temporary)
        print(f"saved {path} (seed {args.seed})")


def draw_video(ddpm: DDPM, args: argparse.Namespace) -> None:
    """Draws an image of each class, and makes a video (VP9 in MP4) and a GIF of some of the steps."""
    os.environ |= {"OPENCV_LOG_LEVEL": "SILENT", "OPENCV_FFMPEG_LOGLEVEL": "-8"}  # OpenCV must not print
    import cv2  # here, so that grids can be drawn without it

    torch.manual_seed(args.seed)
    timesteps = ddpm.timesteps(args.steps)
    wanted = ddpm.n_T * np.linspace(1, 0, N_FRAMES) ** 2  # squares: few frames of noise, many of clear images
    shown = [min(timesteps, key=lambda t: abs(t - w)) for w in wanted]
    c = torch.arange(ddpm.nn_model.n_classes)
    images = draw(ddpm, c, args, shown)
    scale = args.scale
    frames = []
    for t in shown:
        grid = np.asarray(ddpm_model.image_grid(images[t], columns=ceil(sqrt(2 * len(c))), scale=scale))
        frame = cv2.copyMakeBorder(grid, 0, 12 * scale, 0, 0, cv2.BORDER_CONSTANT)  # room for a line of text
        place = (2 * scale, len(grid) + 9 * scale)
        frames.append(cv2.putText(frame, f"t = {t}", place, cv2.FONT_HERSHEY_SIMPLEX, scale / 4, 255))

    path = Path(args.outdir, "denoising_process_0to9.mp4")
    video = frames + frames[-1:] * 2 * FPS
    with ddpm_model.atomic_write(path) as temporary:
        codec = cv2.VideoWriter_fourcc(*"vp09")
        writer = cv2.VideoWriter(str(temporary), codec, FPS, frames[0].shape[1::-1], isColor=False)
        for frame in video:
            writer.write(frame)
        writer.release()
        n_written = int(cv2.VideoCapture(str(temporary)).get(cv2.CAP_PROP_FRAME_COUNT))
        if n_written < len(video):  # OpenCV does not report it
            raise UserError(f"not all {len(video)} frames of {path} were written: a full disk, or OpenCV without VP9")

    with ddpm_model.atomic_write(path.with_suffix(".gif")) as temporary:
        # 16 grey levels: a smaller file
        pictures = [Image.fromarray(np.uint8(np.round(frame / 17) * 17)) for frame in frames[::2]]
        durations = [70] * (len(pictures) - 1) + [2000]  # ms, about two frames; GIF counts in units of 10 ms
        pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    print(f"saved {path} and .gif (seed {args.seed})")


@ddpm_model.one_line_errors()
def main() -> None:
    args = parse_args()
    ddpm = ddpm_model.load_ddpm(args.weights, ddpm_model.pick_device(args.device))
    os.makedirs(args.outdir, exist_ok=True)  # before the drawing, so that an error comes at once
    # One thread, and one more for every 16 images: with fewer images, threads mostly wait for each other.
    torch.set_num_threads(min(torch.get_num_threads(), 1 + args.count // 16))
    draw_pictures = draw_video if args.video else draw_grids
    draw_pictures(ddpm, args)


if __name__ == "__main__":
    main()
