"""Trains the conditional DDPM on MNIST. The averaged weights go to weights/ddpm_mnist.pth.

python train_ddpm.py                               # 30 epochs, on the GPU if there is one
python train_ddpm.py --resume                      # go on from the last save
torchrun --nproc-per-node=4 train_ddpm.py          # four GPUs share each batch (srun alone starts four trainings)
"""

import argparse
import copy
import math
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

import ddpm_model
from ddpm_model import DDPM, IMAGE_SHAPE, N_CLASSES, ContextUnet, UserError, number

WARMUP_STEPS = 500
EMA_DECAY = 0.999


# ---- Set-up ----------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options. With --resume, the defaults are those of that run (not --weights, --device). Raises UserError."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=number(int, 1, 10**6), default=30, help="passes over the training images")
    add("--batch-size", type=number(int, 1, 10**6), default=64, help="images a step, over all processes of torchrun")
    add("--lr", type=number(float, 1e-8, 1), default=4e-3, help="peak learning rate")
    add("--drop-prob", type=number(float, 0, 0.99), default=0.1, help="how often the class is hidden")
    add("--n-feat", type=number(int, 1, 256), default=32, help="channels at 14x14; at 7x7, three times as many")
    add("--n-T", type=number(int, 1, 10_000), default=400, help="number of timesteps")
    add("--data-dir", type=os.path.expanduser, default="data", help="folder of MNIST; downloaded if missing")
    add("--weights", type=os.path.expanduser, default="weights/ddpm_mnist.pth", help="written at each save")
    add("--save-every", type=number(int, 1, 10**6), default=5, help="epochs between saves")
    add("--seed", type=number(int, 0, 10**9), default=0, help="seed of all random numbers")
    add("--device", default="auto", help="cpu, cuda, ...; auto is the GPU if there is one")
    add("--resume", action="store_true", help="go on from the last save of --weights, with the options of that run")
    args = parser.parse_args(argv)
    if args.resume:
        with ddpm_model.read_state(f"{args.weights}.train") as state:
            parser.set_defaults(**state["options"])
    return parser.parse_args(argv)


def join_torchrun(args: argparse.Namespace) -> tuple[int, int]:
    """Joins the other processes, if torchrun started this one. Returns its rank and their number. Raises UserError."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return 0, 1
    local_rank = int(os.environ["LOCAL_RANK"])
    n_gpus = torch.cuda.device_count()
    if args.device == "auto":
        args.device = "cuda" if n_gpus > 0 else "cpu"  # never MPS, where processes cannot exchange gradients
    if args.device == "cuda":
        if local_rank >= n_gpus:
            raise UserError(f"--nproc-per-node is larger than the number of GPUs, {n_gpus}")
        torch.cuda.set_device(local_rank)
    dist.init_process_group()
    return dist.get_rank(), dist.get_world_size()


def check_weights(args: argparse.Namespace) -> None:
    """Raises UserError or OSError now if files cannot be written there. Says what the first save replaces."""
    if os.path.isdir(args.weights) or not os.path.basename(args.weights):
        raise UserError(f"--weights must name a file, not {args.weights!r}")
    state = Path(f"{args.weights}.train").resolve()
    state.parent.mkdir(parents=True, exist_ok=True)
    tempfile.NamedTemporaryFile(dir=state.parent, prefix=state.name).close()  # the name may be too long
    if not args.resume and (os.path.exists(args.weights) or state.exists()):
        print(f"the first save replaces the files of {args.weights}; to continue a stopped run, use --resume")


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 mixed precision (Kalamkar et al. 2019, arXiv:1905.12322), where the hardware supports it."""
    has_bfloat16 = False
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.4 does not have it
        has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast("cuda" if device.type == "cuda" else "cpu", torch.bfloat16, enabled=has_bfloat16)


# ---- Data ------------------------------------------------------------------------------------------------------------


def load_mnist(data_dir: str) -> tuple[Tensor, Tensor]:
    """The training images, uint8 [N,1,28,28], and their labels [N], 0 .. 9. Downloads them if none are there.

    To train on images of your own, replace the body. Raises UserError.
    """
    from torchvision.datasets import mnist  # slow to import: not for --help

    images = Path(data_dir, "MNIST", "raw", "train-images-idx3-ubyte")
    labels = images.with_name("train-labels-idx1-ubyte")
    try:
        if not any(images.parent.glob("train-*ubyte")):  # the download would replace files of your own
            mnist.MNIST(data_dir, download=True)
        return mnist.read_image_file(images)[:, None], mnist.read_label_file(labels)
    except Exception as error:  # no network, a full disk, a damaged file: each has a type of its own
        hint = f"{images.parent} must have {images.name} and {labels.name}, or neither: then MNIST is downloaded"
        raise UserError(f"no training data ({error!r}); {hint}") from error


def load_data(data_dir: str, device: torch.device, world: int) -> tuple[Tensor, Tensor]:
    """What load_mnist returns, checked, on the device. Raises UserError."""
    is_first = os.environ.get("LOCAL_RANK") == "0"  # on this machine: it may download, the others wait
    if world > 1 and not is_first:
        dist.barrier()
    images, labels = load_mnist(data_dir)
    if world > 1 and is_first:
        dist.barrier()

    classes = set(labels.flatten().tolist())
    right = images.dtype == torch.uint8 and images.shape[1:] == IMAGE_SHAPE and labels.shape == images.shape[:1]
    if not right or not classes <= set(range(N_CLASSES)):
        found = f"images {images.dtype} {list(images.shape)}, labels {list(labels.shape)}, which are {classes}"
        raise UserError(f"images must be uint8 {IMAGE_SHAPE}, each with a label 0 .. {N_CLASSES - 1}; found: {found}")
    return images.to(device), labels.to(device, torch.int64)


# ---- Training --------------------------------------------------------------------------------------------------------


def resume(args: argparse.Namespace, fingerprint: dict, parts: dict) -> int:
    """Loads what `save` wrote into parts. Returns the number of epochs that are done. Raises UserError."""
    path = f"{args.weights}.train"
    with ddpm_model.read_state(path) as state:
        data, epochs_done = state["data"], state["epoch"]
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
    if data != fingerprint:
        raise UserError(f"the data differ from those of the run in {path}: {fingerprint}, not {data}")
    return epochs_done


def learning_rate(step: int, n_steps: int, peak: float) -> float:
    """Linear warm-up to peak, then half a cosine down to 0 after n_steps."""
    warmup = min(WARMUP_STEPS, n_steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (n_steps - warmup))) / 2


def report(epoch: int, epochs: int, *, done: float, loss: float, start: float) -> str:
    """The progress line of an epoch that began at time start. done: share of its steps, in (0, 1]."""
    seconds = time.perf_counter() - start
    left = seconds / done * (epochs - epoch + 1 - done) / 60
    return f"epoch {epoch:2d}/{epochs}  {done:4.0%}  loss {loss:.5f}  {seconds:.0f} s  {left:.1f} min left"


def save(args: argparse.Namespace, fingerprint: dict, epoch: int, parts: dict) -> None:
    """Writes the training state, the weights, and then a preview with six digits of each class.

    A failed save is only a warning, except after the last epoch: there it raises OSError.
    """
    options = {name: value for name, value in vars(args).items() if name not in ("weights", "device", "resume")}
    states = {name: part.state_dict() for name, part in parts.items()}
    ema = parts["ema"]
    try:
        state = {"options": options, "data": fingerprint, "epoch": epoch, "parts": states}
        ddpm_model.write_state(f"{args.weights}.train", state)
        ddpm_model.save_weights(args.weights, ema)
        generator = torch.Generator().manual_seed(0)
        digits = ema.sample(6 * list(range(N_CLASSES)), steps=min(50, ema.n_T), generator=generator)
        with ddpm_model.atomic_write(f"{args.weights}.epoch_{epoch:02d}.png") as temporary:
            ddpm_model.image_grid(digits, columns=N_CLASSES, scale=3).save(temporary)
        print(f"saved {args.weights}", flush=True)
    except OSError as error:
        if epoch == args.epochs:
            raise
        print(f"warning: the save of epoch {epoch} failed: {error}", flush=True)


@ddpm_model.one_line_errors()
def main() -> None:
    # Set-up. Of several processes, the one with rank 0 shows progress and saves.
    args = parse_args()
    rank, world = join_torchrun(args)
    device = ddpm_model.pick_device(args.device)
    if rank == 0:
        check_weights(args)

    # Data
    images, labels = load_data(args.data_dir, device, world)
    fingerprint = {"images": len(images), "sum of pixels": images.sum().item()}  # a resumed run must have the same
    n_batches = len(images) // args.batch_size  # of the same size: what is left of an epoch is not used
    if n_batches == 0 or args.batch_size % world:
        raise UserError(f"--batch-size must be at most {len(images)} (images) and a multiple of {world} (processes)")

    # Model
    torch.manual_seed(args.seed)
    # channels_last: convolutions are faster with it.
    ddpm = DDPM(ContextUnet(args.n_feat), args.n_T, args.drop_prob).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(ddpm).requires_grad_(False)  # the average of the weights over the last steps
    # AdamW is the Adam of the paper, with weight decay. fused: one operation for all weights; not on MPS in torch 2.4.
    optimizer = torch.optim.AdamW(ddpm.parameters(), fused=device.type in ("cpu", "cuda"))
    parts = {"ddpm": ddpm, "ema": ema, "optimizer": optimizer}

    # Resume
    epochs_done = resume(args, fingerprint, parts) if args.resume else 0
    if rank == 0:
        if args.resume:
            ddpm_model.save_weights(args.weights, ema)  # the file may be missing, or of another save
        print(f"{epochs_done} of {args.epochs} epochs are done, {n_batches} steps each, on {world} x {device.type}")

    # Loop. Each epoch seeds the random numbers anew, so a resumed run draws those of a run that was not stopped.
    model = torch.nn.parallel.DistributedDataParallel(ddpm) if world > 1 else ddpm  # averages the gradients
    for epoch in range(epochs_done + 1, args.epochs + 1):
        seed = 100_000 * args.seed + epoch
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(device)
        torch.manual_seed(1000 * seed + rank)
        total = 0.0
        start = time.perf_counter()

        for i, batch in enumerate(order.split(args.batch_size)[:n_batches]):
            step = n_batches * (epoch - 1) + i
            optimizer.param_groups[0]["lr"] = learning_rate(step, n_batches * args.epochs, args.lr)

            shard = batch.chunk(world)[rank]
            with autocast(device):
                loss = model(images[shard] / 255, labels[shard])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            decay = min(EMA_DECAY, (1 + step) / (10 + step))  # small at first, to forget the random start
            # ema = decay ema + (1 - decay) ddpm, for all weights at once.
            get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(ddpm.parameters()), None)

            total += loss.detach()
            if rank == 0 and (i % 20 == 0 or i == n_batches - 1):
                line = report(epoch, args.epochs, done=(i + 1) / n_batches, loss=total.item() / (i + 1), start=start)
                ddpm_model.show_progress(line)

        # Save, at the end of an epoch.
        ddpm_model.show_progress("")
        if not math.isfinite(total):
            raise UserError(f"the loss is {total / n_batches} in epoch {epoch}; a lower --lr may help")
        if rank == 0:
            print(line, flush=True)
            if epoch % args.save_every == 0 or epoch == args.epochs:
                save(args, fingerprint, epoch, parts)

    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
