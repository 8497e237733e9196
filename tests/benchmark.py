"""What it costs on this machine: prints arithmetic, operations, training time and drawing time. Runs for some minutes.

    python -m tests.benchmark                     # on the GPU if there is one
    python -m tests.benchmark --device cpu

Each time is the median of repeated runs after one that is not counted. Training needs no data set here: noise costs the
same. The whole command includes the start of Python; it has fewer threads for nine digits than the lines above it.
Operations are what Python starts in a step, without views and allocations. A GPU waits for them where they are small.
"""

import argparse
import contextlib
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import train_ddpm
from ddpm_model import DDPM, IMAGE_SHAPE, N_CLASSES, ContextUnet, pick_device

N_IMAGES = 60_000  # of an epoch
NO_WORK = """empty empty_like empty_strided resize_ set_ item _local_scalar_dense is_nonzero to _to_copy contiguous view
    reshape expand t transpose permute select slice detach detach_ alias unsqueeze squeeze as_strided as_strided_ narrow
    split chunk unflatten view_as expand_as _reshape_alias _unsafe_view result_type resolve_conj lift_fresh"""


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
    """Counted by torch: an addition and a multiplication are two operations."""
    one = torch.ones(1, device=ddpm.alphabar.device)
    x, c = torch.randn(1, *IMAGE_SHAPE, device=one.device), one.long()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        ddpm.nn_model(x, c, one, one.bool())
    return counter.get_total_flops() / 1e9


def operations(work: Callable[[], object]) -> int:
    """How many operations of torch work starts: the innermost ones, without views and allocations."""

    def counts(event) -> bool:
        return event.name.startswith("aten::") and event.name.removeprefix("aten::") not in NO_WORK.split()

    def has_inner(event) -> bool:
        return any(counts(inner) or has_inner(inner) for inner in event.cpu_children)

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    return sum(counts(event) and not has_inner(event) for event in profiler.events())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what training and drawing cost on this machine.")
    parser.add_argument("--device", default="auto")
    device = pick_device(parser.parse_args().device)
    options = train_ddpm.parse_args([])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{device.type}, {name}, torch {torch.__version__}", flush=True)

    ddpm = DDPM(ContextUnet(options.n_feat)).to(device, memory_format=torch.channels_last)
    n_parameters = sum(parameter.numel() for parameter in ddpm.parameters())
    gflop = gflop_per_image_and_step(ddpm)
    print(f"network: {n_parameters / 1e6:.2f} M parameters, {gflop:.4f} GFLOP an image and step")

    ema = copy.deepcopy(ddpm).requires_grad_(False)
    optimizer = torch.optim.AdamW(ddpm.parameters(), fused=device.type in ("cpu", "cuda"))
    x = torch.rand(options.batch_size, *IMAGE_SHAPE, device=device)
    c = torch.arange(options.batch_size, device=device) % N_CLASSES

    def train_step(precision: contextlib.AbstractContextManager) -> None:
        with precision:
            loss = ddpm(x, c)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        get_ema_multi_avg_fn(0.999)(list(ema.parameters()), list(ddpm.parameters()), None)

    def train_20_steps() -> None:
        for _ in range(20):
            train_step(train_ddpm.autocast(device))

    with train_ddpm.autocast(device):
        precision = "bf16" if torch.is_autocast_enabled(device.type) else "fp32"
    epoch = seconds(train_20_steps, device) / (20 * options.batch_size) * N_IMAGES
    print(f"training, {precision}, batch {options.batch_size}: {epoch:.1f} s an epoch of {N_IMAGES:,}")
    n_operations = operations(lambda: train_step(contextlib.nullcontext()))
    print(f"training, fp32: {n_operations} operations a step", flush=True)
    nine = torch.full((9,), 5, device=device)
    for steps in (ddpm.n_T, 50):
        print(f"nine digits, {steps} steps: {seconds(lambda s=steps: ddpm.sample(nine, steps=s), device):.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "inference_ddpm.py", "--device", str(device), "--outdir", folder]
        whole = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), device, runs=3)
    print(f"the whole command, nine digits: {whole:.2f} s", flush=True)
    many = torch.arange(N_CLASSES, device=device).repeat(10 if device.type == "cpu" else 400)
    rate = len(many) / seconds(lambda: ddpm.sample(many, steps=50), device, runs=3)
    print(f"batches of {len(many)}, 50 steps: {rate:.0f} digits a second")


if __name__ == "__main__":
    main()
