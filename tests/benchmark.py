"""What it costs on this machine: prints arithmetic per image and step, training time and drawing time.

    python -m tests.benchmark                     # on the GPU if there is one
    python -m tests.benchmark --device cpu

Each time is the median of repeated runs after one that is not counted. Training needs no data set here: noise costs the
same. The whole command includes the start of Python; it has fewer threads for nine digits than the lines above it.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

import train_ddpm
from ddpm_model import DDPM, ContextUnet, pick_device

N_IMAGES = 60_000  # of an epoch


def seconds(work: Callable[[], object], device: torch.device, runs: int = 5) -> float:
    """Median time of work, after one run that is not counted."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def gflop_per_image_and_step(ddpm: DDPM) -> float:
    one = torch.ones(1, device=ddpm.alphabar.device)
    x, c = torch.randn(1, 1, 28, 28, device=one.device), one.long()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        ddpm.nn_model(x, c, one, one.bool())
    return counter.get_total_flops() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what training and drawing cost on this machine.")
    parser.add_argument("--device", type=pick_device, default="auto")
    device = parser.parse_args().device
    options = train_ddpm.make_parser().parse_args([])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{device.type}, {name}, torch {torch.__version__}")

    ddpm = DDPM(ContextUnet(options.n_feat)).to(device, memory_format=torch.channels_last)
    n_parameters = sum(parameter.numel() for parameter in ddpm.parameters())
    gflop = gflop_per_image_and_step(ddpm)
    print(f"network: {n_parameters / 1e6:.2f} M parameters, {gflop:.4f} GFLOP an image and step")

    optimizer = torch.optim.AdamW(ddpm.parameters())
    x = torch.rand(options.batch_size, 1, 28, 28, device=device)
    c = torch.arange(options.batch_size, device=device) % 10

    def train_20_steps() -> None:
        for _ in range(20):
            with train_ddpm.autocast(device):
                loss = ddpm(x, c)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with train_ddpm.autocast(device):
        precision = "bf16" if torch.is_autocast_enabled(device.type) else "fp32"
    epoch = seconds(train_20_steps, device) / (20 * options.batch_size) * N_IMAGES
    print(f"training, {precision}, batch {options.batch_size}: {epoch:.1f} s an epoch of {N_IMAGES:,}")
    nine = torch.full((9,), 5, device=device)
    for steps in (ddpm.n_T, 50):
        print(f"nine digits, {steps} steps: {seconds(lambda s=steps: ddpm.sample(nine, steps=s), device):.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "inference_ddpm.py", "--device", str(device), "--outdir", folder]
        whole = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), device, runs=3)
    print(f"the whole command, nine digits: {whole:.2f} s")
    many = torch.arange(10, device=device).repeat(10 if device.type == "cpu" else 400)
    rate = len(many) / seconds(lambda: ddpm.sample(many, steps=50), device, runs=3)
    print(f"batches of {len(many)}, 50 steps: {rate:.0f} digits a second")


if __name__ == "__main__":
    main()
