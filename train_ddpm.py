"""Trains the conditional DDPM on MNIST. The averaged weights go to weights/ddpm_mnist.pth.

python train_ddpm.py                               # 30 epochs, on the GPU if there is one
python train_ddpm.py --resume                      # go on from the last save
torchrun --nproc-per-node=4 train_ddpm.py          # four GPUs share each batch
"""

import argparse
import contextlib
import copy
import importlib
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm_model import (
    DDPM,
    N_FEAT_RANGE,
    N_T_RANGE,
    ContextUnet,
    UserError,
    file_path,
    image_grid,
    number,
    one_line_errors,
    pick_device,
    read_state,
    save_png,
    save_weights,
    say,
    show_progress,
    write_atomically,
    write_state,
)

WARMUP_STEPS = 500
EMA_DECAY = 0.999


# ---- Options ---------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a conditional DDPM on MNIST.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=number(int, 1, 10**6), default=30, help="passes over the training images")
    add("--batch-size", type=number(int, 1, 10**6), default=64, help="images a step, over all processes")
    add("--lr", type=number(float, 1e-8, 1), default=4e-3, help="peak learning rate")
    add("--drop-prob", type=number(float, 0, 1), default=0.1, help="how often the class is hidden")
    add("--n-feat", type=number(int, *N_FEAT_RANGE), default=32, help="channels at 14x14; at 7x7, three times as many")
    add("--n-T", type=number(int, *N_T_RANGE), default=400, help="number of timesteps")
    add("--data-dir", type=file_path, default="data", help="has MNIST/raw, or gets it")
    add("--weights", type=file_path, default="weights/ddpm_mnist.pth", help="written at each save")
    add("--save-every", type=number(int, 1, 10**6), default=5, help="epochs between saves")
    add("--seed", type=number(int, 0, 10**9), default=0, help="of all random numbers")
    add("--device", type=pick_device, default="auto", help="cpu, cuda, ...; auto is the GPU if there is one")
    add("--resume", action="store_true", help="go on from the last save of --weights, with the options of that run")
    return parser


# ---- Data ------------------------------------------------------------------------------------------------------------


def load_mnist(data_dir: Path) -> tuple[Tensor, Tensor]:
    """The training images, uint8 [N,28,28], and labels, int64 [N]. Downloads them where they are missing.

    Raises UserError if that fails, or if the files are damaged.
    """
    from torchvision import datasets  # slow to import: not for --help

    class MNIST(datasets.MNIST):  # the name of the class is the name of its folder
        resources = datasets.MNIST.resources[:2]  # not the test set

    files = f"train-images-idx3-ubyte and train-labels-idx1-ubyte in {data_dir / 'MNIST' / 'raw'}"
    try:
        mnist = MNIST(data_dir, download=True)
    except PermissionError as error:
        raise UserError(f"cannot read or write {error.filename} ({error.strerror})") from None
    except Exception as error:  # no network, a refusal, a full disk, a damaged file: each has a type of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {files} ({reason}); put them there, unpacked, or delete damaged ones") from None
    images, labels = mnist.data, mnist.targets
    if len(images) == 0 or images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max() > 9:
        raise UserError(f"{files} do not hold 28x28 images with a digit each; delete them and run again")
    return images, labels


# ---- Training --------------------------------------------------------------------------------------------------------


def torchrun_rank() -> tuple[int, int]:
    """(rank, number of processes): (0, 1), unless torchrun started this process. Takes its GPU, before any is used."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Where the hardware computes in bfloat16, multiplications use it (Kalamkar et al. 2019, arXiv:1905.12322)."""
    native = False
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.4 does not have it
        cpu = torch.cpu.get_capabilities()
        native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.autocast(device.type, torch.bfloat16) if native else contextlib.nullcontext()


def learning_rate(step: int, n_steps: int, peak: float) -> float:
    """Linear warm-up to peak, then half a cosine down to 0 after n_steps."""
    warmup = min(WARMUP_STEPS, n_steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (n_steps - warmup))) / 2


def report(epoch: int, epochs: int, done: float, loss: float, start: float) -> str:
    """A line about an epoch that began at time start and of which a share is done."""
    seconds = time.perf_counter() - start
    left = seconds / done * (epochs - epoch + 1 - done) / 60
    return f"epoch {epoch:2d}/{epochs}  {done:4.0%}  loss {loss:.5f}  {seconds:.0f} s  {left:.1f} min left"


@one_line_errors()
def main() -> None:
    rank, world = torchrun_rank()
    parser = make_parser()
    args = parser.parse_args()
    state_file = Path(f"{args.weights}.train")
    state = {"epoch": 0}
    if args.resume:
        state = read_training_state(state_file)
        parser.set_defaults(**state["options"], device=args.device)
        args = parser.parse_args()
    device = args.device
    if world > 1:
        # torch imports this module later. If the group exists then, the module keeps its threads alive at the end.
        importlib.import_module("torch.distributed.nn")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank > 0:
        dist.barrier()  # until rank 0 has downloaded
    images, labels = load_mnist(args.data_dir)
    if rank == 0 and world > 1:
        dist.barrier()
    images = images.to(device)
    labels = labels.to(device)
    n_batches = math.ceil(len(images) / args.batch_size)
    if len(images) // n_batches < world:  # the smallest batch has an image for each process
        raise UserError(f"--batch-size {args.batch_size} is too small for {world} processes")
    n_steps = n_batches * args.epochs

    torch.manual_seed(args.seed)
    ddpm = DDPM(ContextUnet(args.n_feat), args.n_T, args.drop_prob)
    ddpm.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(ddpm).requires_grad_(False)  # the average of the weights over the last steps
    optimizer = torch.optim.AdamW(ddpm.parameters())
    parts = {"ddpm": ddpm, "ema": ema, "optimizer": optimizer}
    if args.resume:
        restore(parts, state, state_file)
    if rank == 0:
        prepare_files(args, state_file, state["epoch"], ema)
        say(f"{len(images):,} images, {args.epochs} epochs of {n_batches} steps, on {world} x {device.type}")
    model = nn.parallel.DistributedDataParallel(ddpm) if world > 1 else ddpm  # averages the gradients

    for epoch in range(state["epoch"] + 1, args.epochs + 1):
        # Random numbers start anew at each epoch, so a resumed run repeats the run that was not stopped.
        seed = 100_000 * args.seed + epoch
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(device)
        torch.manual_seed(1000 * seed + rank)
        total = torch.zeros((), device=device)
        start = time.perf_counter()

        for i, batch in enumerate(order.tensor_split(n_batches)):
            step = n_batches * (epoch - 1) + i
            optimizer.param_groups[0]["lr"] = learning_rate(step, n_steps, args.lr)

            shard = batch.tensor_split(world)[rank]
            x = images[shard][:, None] / 255
            c = labels[shard]
            with autocast(device):
                loss = model(x, c)
            loss = loss * len(shard) * world / len(batch)  # undoes DDP's mean over shards, which may differ in size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            decay = min(EMA_DECAY, (1 + step) / (10 + step))  # small at first, to forget the random start
            for average, parameter in zip(ema.parameters(), ddpm.parameters()):
                average.lerp_(parameter.detach(), 1 - decay)

            total += loss.detach()
            if rank == 0 and i % 20 == 0:  # not at each step: reading the loss waits for the GPU
                show_progress(report(epoch, args.epochs, (i + 1) / n_batches, total.item() / (i + 1), start))

        if world > 1:
            dist.all_reduce(total)
        loss = total.item() / world / n_batches
        show_progress("")
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} in epoch {epoch}; a lower --lr may help")
        if rank == 0:
            say(report(epoch, args.epochs, 1, loss, start))
            if epoch % args.save_every == 0 or epoch == args.epochs:
                save(args, state_file, epoch, parts)

    if world > 1:
        dist.destroy_process_group()


# ---- Saving and resuming ---------------------------------------------------------------------------------------------


def read_training_state(path: Path) -> dict:
    """What save wrote. Raises UserError if it is something else, or from a version without all options."""
    match read_state(path):
        case {"options": {"data_dir": str()}, "epoch": int()} as state:
            return state
    raise UserError(f"{path} is not a training state of this version; start anew without --resume")


def restore(parts: dict, state: dict, path: Path) -> None:
    """Loads the training state that path held into parts. Raises UserError if it is of another network."""
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise UserError(f"{path} does not fit this network; start anew without --resume") from None


def prepare_files(args: argparse.Namespace, state_file: Path, epoch: int, ema: DDPM) -> None:
    """Raises UserError unless the training state and the weights can be written. Says what becomes of the weights."""
    n_bytes = sum(parameter.nbytes for parameter in ema.parameters())
    room = 10 * n_bytes + 10**6  # a state has four copies of the weights, and the old one is there with the new one
    check_writable(state_file, room)
    if args.resume:
        # The weights may be missing, or not those of the state.
        save_weights(args.weights, ema)
        say(f"{epoch} epochs are done" + "; a larger --epochs trains more" * (epoch >= args.epochs))
        return
    check_writable(args.weights, room)
    if args.weights.exists():
        say(f"{args.weights} exists and is replaced at the first save (--weights: elsewhere)")


def check_writable(path: Path, room: int) -> None:
    """Raises UserError unless path can be replaced, or made with room bytes. What is there stays as it is."""
    try:
        if os.path.isfile(path):
            write_atomically(path, path.read_bytes())
        else:
            write_atomically(path, bytes(room))
            os.unlink(os.path.realpath(path))
    except OSError as error:
        raise UserError(f"cannot replace {path} ({error.strerror})") from None


def save(args: argparse.Namespace, state_file: Path, epoch: int, parts: dict) -> None:
    """Writes the training state, the weights and a preview. Raises UserError if one of the first two fails."""
    options = {name: value for name, value in vars(args).items() if name not in ("weights", "device", "resume")}
    options["data_dir"] = os.path.abspath(args.data_dir)
    states = {name: part.state_dict() for name, part in parts.items()}
    write_state(state_file, {"options": options, "epoch": epoch, **states})
    save_weights(args.weights, parts["ema"])
    say(f"saved {args.weights}; --resume goes on from here")
    save_preview(Path(f"{args.weights}.epoch_{epoch:02d}.png"), parts["ema"])


def save_preview(path: Path, ddpm: DDPM) -> None:
    """Draws six digits of each class. Warns if the picture cannot be written."""
    c = torch.arange(10).repeat(6)
    digits = ddpm.sample(c, steps=min(50, ddpm.n_T), generator=torch.Generator().manual_seed(0))
    try:
        save_png(path, image_grid(digits, columns=10, scale=3))
    except UserError as error:
        say(f"warning: {error}")


if __name__ == "__main__":
    main()
