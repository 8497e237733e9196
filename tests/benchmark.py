"""What it costs on this machine: prints arithmetic per image and step, training time and drawing time.

    python -m tests.benchmark                     # on the GPU if there is one
    python -m tests.benchmark --device cpu

Each time is the median of repeated runs after one that is not counted. Training needs no data set here: noise costs the
same. Drawing times have no start of Python in them; for the whole command: time python inference_ddpm.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

import train_ddpm
from ddpm_model import DDPM, keep_freed_memory, pick_device

N_IMAGES = 60_000  # of an epoch
STEPS = 20  # training steps timed at once


def seconds(work: Callable[[], object], device: torch.device, runs: int = 5) -> float:
    """Median time of work, after one run that is not counted."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def gflop_per_image_and_step(ddpm: DDPM) -> float:
    one = torch.ones(1, device=ddpm.alphabar.device)
    x, c = torch.randn(1, 1, 28, 28, device=one.device), one.long()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        ddpm.nn_model(x, c, one, one)
    return counter.get_total_flops() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what training and drawing cost on this machine.")
    parser.add_argument("--device", type=pick_device, default="auto")
    device = parser.parse_args().device

    options = train_ddpm.make_parser().parse_args([])
    images = torch.randint(0, 256, (options.batch_size * STEPS, 28, 28), dtype=torch.uint8)
    keep_freed_memory()
    trainer = train_ddpm.Trainer(options, images, torch.arange(len(images)) % 10, rank=0, world=1, device=device)
    ddpm = trainer.ema
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{device.type}, {name}, torch {torch.__version__}")
    n_parameters = sum(parameter.numel() for parameter in ddpm.parameters())
    print(
        f"network: {n_parameters / 1e6:.2f} M parameters, {gflop_per_image_and_step(ddpm):.4f} GFLOP an image and step"
    )

    order = torch.randperm(len(images), device=device).tensor_split(STEPS)
    all_over = range(0, options.epochs * STEPS, options.epochs)  # the training: its later steps cost more
    train = seconds(lambda: [trainer.step(index, step) for index, step in zip(order, all_over)], device)
    epoch = train / len(images) * N_IMAGES
    precision = "bf16" if trainer.bf16 else "fp32"
    print(f"training, {precision}, batch {options.batch_size}: {epoch:.1f} s an epoch of {N_IMAGES:,}")
    nine = torch.full((9,), 5, device=device)
    for steps in (ddpm.n_T, 50):
        print(f"nine digits, {steps} steps: {seconds(lambda s=steps: ddpm.sample(nine, steps=s), device):.2f} s")
    many = torch.arange(10, device=device).repeat(10 if device.type == "cpu" else 400)
    rate = len(many) / seconds(lambda: ddpm.sample(many, steps=50), device, runs=3)
    print(f"batches of {len(many)}, 50 steps: {rate:.0f} digits a second")


if __name__ == "__main__":
    main()
