"""What it costs on this machine: prints arithmetic, training time and drawing time. Runs for some minutes.

    python -m tests.benchmark                     # on the GPU if there is one
    python -m tests.benchmark --device cpu

Each time is the median of repeated runs after one that is not counted. Training takes noise: it costs the same.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import train_ddpm
from ddpm_model import DDPM, IMAGE_SHAPE, ContextUnet, one_line_errors, pick_device

PROJECT = Path(__file__).resolve().parent.parent
N_IMAGES = 60_000  # of an epoch


def seconds(work: Callable[[], object], device: torch.device, runs: int = 5) -> float:
    """Median time of work, after one run that is not counted."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()  # a GPU works on after the call; cuda, mps, xpu
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what training and drawing cost on this machine.")
    parser.add_argument("--device", default="auto", help="cpu, cuda ...; auto is the GPU, if there is one")
    device = pick_device(parser.parse_args().device)
    options = train_ddpm.parse_args([])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"measuring for some minutes: {device.type}, {name}, torch {torch.__version__}")

    ddpm = DDPM(ContextUnet(options.n_feat)).to(device, memory_format=torch.channels_last)
    n_parameters = sum(parameter.numel() for parameter in ddpm.parameters())
    x = torch.rand(options.batch_size, *IMAGE_SHAPE, device=device)
    c = torch.arange(options.batch_size, device=device) % 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ddpm.guided_v(x[:1], c[:1], t=1, guide_w=0)
    gflop = counter.get_total_flops() / 1e9  # an addition and a multiplication are two operations
    print(f"network: {n_parameters / 1e6:.2f} M parameters, {gflop:.4f} GFLOP an image and step")

    ema = copy.deepcopy(ddpm).requires_grad_(False)
    optimizer = torch.optim.AdamW(ddpm.parameters(), fused=device.type in ("cpu", "cuda"))

    def train_20_steps() -> None:
        for _ in range(20):
            with train_ddpm.autocast(device):
                loss = ddpm(x, c)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            get_ema_multi_avg_fn(0.999)(list(ema.parameters()), list(ddpm.parameters()), None)

    with train_ddpm.autocast(device):
        precision = "bf16" if torch.is_autocast_enabled("cuda" if device.type == "cuda" else "cpu") else "fp32"
    epoch = seconds(train_20_steps, device) / (20 * options.batch_size) * N_IMAGES
    whole = f"{options.epochs} epochs in {options.epochs * epoch / 60:.0f} min"
    print(f"training, {precision}, batch {options.batch_size}: {epoch:.1f} s an epoch of {N_IMAGES:,}, {whole}")
    nine = torch.full((9,), 5, device=device)
    for steps in (ddpm.n_T, 50):
        print(f"nine digits, {steps} steps: {seconds(lambda s=steps: ddpm.sample(nine, steps=s), device):.2f} s")
    many = torch.arange(10, device=device).repeat(10 if device.type == "cpu" else 400)
    rate = len(many) / seconds(lambda: ddpm.sample(many, steps=50), device, runs=3)
    print(f"batches of {len(many)}, 50 steps: {rate:.0f} digits a second")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "inference_ddpm.py", "--device", str(device), "--outdir", folder]
        whole = seconds(lambda: subprocess.run(command, cwd=PROJECT, check=True, capture_output=True), device, runs=3)
    print(f"the whole command, nine digits: {whole:.1f} s")


if __name__ == "__main__":
    main()
