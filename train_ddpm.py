"""Trains the conditional DDPM on MNIST. The averaged weights go to weights/ddpm_mnist.pth.

python train_ddpm.py                               # 30 epochs, on the GPU if there is one
python train_ddpm.py --resume                      # go on from the last save
torchrun --nproc-per-node=4 train_ddpm.py          # four GPUs share each batch
"""

import argparse
import copy
import math
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn

import ddpm_model
from ddpm_model import DDPM, N_CLASSES, ContextUnet, UserError, number

WARMUP_STEPS = 500
EMA_DECAY = 0.999


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=number(int, 1, 10**6), default=30, help="passes over the training images")
    add("--batch-size", type=number(int, 1, 10**6), default=64, help="images a step, over all processes")
    add("--lr", type=number(float, 1e-8, 1), default=4e-3, help="peak learning rate")
    add("--drop-prob", type=number(float, 0, 0.99), default=0.1, help="how often the class is hidden")
    add("--n-feat", type=number(int, 1, 256), default=32, help="channels at 14x14; at 7x7, three times as many")
    add("--n-T", type=number(int, 1, 10_000), default=400, help="number of timesteps")
    add("--data-dir", type=os.path.expanduser, default="data", help="folder of MNIST; downloaded if missing")
    add("--weights", type=os.path.expanduser, default="weights/ddpm_mnist.pth", help="written at each save")
    add("--save-every", type=number(int, 1, 10**6), default=5, help="epochs between saves")
    add("--seed", type=number(int, 0, 10**9), default=0, help="seed of all random numbers")
    add("--device", type=ddpm_model.pick_device, default="auto", help="cpu, cuda, ...; auto is the GPU if there is one")
    add("--resume", action="store_true", help="go on from the last save of --weights, with the options of that run")
    return parser


def load_mnist(data_dir: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The training images, uint8 [N,28,28], and labels, int64 [N]. Downloads them where they are missing.

    Raises UserError if that fails, or if the files are damaged.
    """
    from torchvision.datasets import MNIST  # slow to import: not for --help

    try:
        mnist = MNIST(data_dir, download=True)
    except Exception as error:  # no network, a full disk, a damaged file: each has a type of its own
        raise UserError(f"no MNIST ({error}); its four files, unpacked, belong in {data_dir}/MNIST/raw") from error
    return mnist.data.to(device), mnist.targets.to(device)


def autocast(device: torch.device) -> torch.autocast:
    """Where the hardware computes in bfloat16, multiplications use it (Kalamkar et al. 2019, arXiv:1905.12322)."""
    has_bfloat16 = False
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.4 does not have it
        has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast("cuda" if device.type == "cuda" else "cpu", torch.bfloat16, enabled=has_bfloat16)


def learning_rate(step: int, n_steps: int, peak: float) -> float:
    """Linear warm-up to peak, then half a cosine down to 0 after n_steps."""
    warmup = min(WARMUP_STEPS, n_steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (n_steps - warmup))) / 2


def report(epoch: int, epochs: int, done: float, loss: float, start: float) -> str:
    """The progress line of an epoch that began at time start. done: share of its steps, in (0, 1]."""
    seconds = time.perf_counter() - start
    left = seconds / done * (epochs - epoch + 1 - done) / 60
    return f"epoch {epoch:2d}/{epochs}  {done:4.0%}  loss {loss:.5f}  {seconds:.0f} s  {left:.1f} min left"


@ddpm_model.one_line_errors()
def main() -> None:
    # torchrun starts a process for each GPU. They share each batch; the one with rank 0 prints and saves.
    torchrun = dist.is_available() and dist.is_torchelastic_launched()
    rank = int(os.environ["RANK"]) if torchrun else 0
    world = int(os.environ["WORLD_SIZE"]) if torchrun else 1
    if torchrun and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())

    args = make_parser().parse_args()
    state_file = f"{args.weights}.train"
    epochs_done = 0
    if args.resume:
        options, run_then, epochs_done, states = ddpm_model.read_state(state_file, "options", "run", "epoch", "parts")
        args = make_parser().parse_args(namespace=argparse.Namespace(**options))  # the command line has priority

    if torchrun:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    if rank > 0:
        dist.barrier()  # until rank 0 has downloaded
    images, labels = load_mnist(args.data_dir, args.device)
    if torchrun and rank == 0:
        dist.barrier()  # the others go on
    # A resumed run must have the network and the data of the run before.
    run = {"n_feat": args.n_feat, "n_T": args.n_T, "images": len(images), "sum of pixels": images.sum().item()}
    if args.resume and run != run_then:
        raise UserError(f"options or data differ from those of the run in {state_file}: {run}, not {run_then}")
    n_batches = len(images) // args.batch_size  # all of the same size: the rest of an epoch is left out
    if n_batches == 0 or args.batch_size % world:
        raise UserError(f"--batch-size must be at most {len(images)} (images) and a multiple of {world} (processes)")

    torch.manual_seed(args.seed)
    # channels_last: convolutions are faster with it.
    ddpm = DDPM(ContextUnet(args.n_feat), args.n_T, args.drop_prob).to(args.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(ddpm).requires_grad_(False)  # the average of the weights over the last steps
    # AdamW is the Adam of the paper, with weight decay. fused: one operation for all weights; not on MPS in torch 2.4.
    optimizer = torch.optim.AdamW(ddpm.parameters(), fused=args.device.type in ("cpu", "cuda"))
    parts = {"ddpm": ddpm, "ema": ema, "optimizer": optimizer}
    if args.resume:
        for name, part in parts.items():
            part.load_state_dict(states[name])
    if rank == 0:
        if args.resume:
            ddpm_model.save_weights(args.weights, ema)  # the file may be missing, or of another save
            print(f"continuing after epoch {epochs_done}")
            if args.epochs > options["epochs"]:
                print("more epochs than before: the learning rate rises again")
        elif os.path.exists(args.weights) or os.path.exists(state_file):
            print(f"the first save replaces the files of {args.weights}; to continue a stopped run, use --resume")
        print(f"{len(images):,} images, {args.epochs} epochs of {n_batches} steps, on {world} x {args.device.type}")
    model = torch.nn.parallel.DistributedDataParallel(ddpm) if torchrun else ddpm  # averages the gradients

    for epoch in range(epochs_done + 1, args.epochs + 1):
        # Random numbers start anew at each epoch, so a resumed run repeats the run that was not stopped.
        seed = 100_000 * args.seed + epoch
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(args.device)
        torch.manual_seed(1000 * seed + rank)
        total = 0.0
        start = time.perf_counter()

        for i, batch in enumerate(order.split(args.batch_size)[:n_batches]):
            step = n_batches * (epoch - 1) + i
            optimizer.param_groups[0]["lr"] = learning_rate(step, n_batches * args.epochs, args.lr)

            shard = batch.chunk(world)[rank]
            x = images[shard][:, None] / 255
            with autocast(args.device):
                loss = model(x, labels[shard])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            decay = min(EMA_DECAY, (1 + step) / (10 + step))  # small at first, to forget the random start
            get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(ddpm.parameters()), None)

            total += loss.detach()
            if rank == 0 and i % 20 == 0 and sys.stderr.isatty():  # reading the loss waits for the GPU
                ddpm_model.show_progress(report(epoch, args.epochs, (i + 1) / n_batches, total.item() / (i + 1), start))

        ddpm_model.show_progress("")
        mean_loss = total.item() / n_batches
        if not math.isfinite(mean_loss):
            raise UserError(f"the loss is {mean_loss} in epoch {epoch}; a lower --lr may help")
        if rank == 0:
            print(report(epoch, args.epochs, 1, mean_loss, start), flush=True)
            if epoch % args.save_every == 0 or epoch == args.epochs:
                save(args, run, epoch, parts)

    if torchrun:
        dist.destroy_process_group()


def save(args: argparse.Namespace, run: dict, epoch: int, parts: dict) -> None:
    """Writes the training state, the weights, and a preview with six digits of each class.

    While epochs are left, a failure is a warning, and each file stays whole. At the end, raises OSError.
    """
    options = {name: value for name, value in vars(args).items() if name not in ("weights", "device", "resume")}
    states = {name: part.state_dict() for name, part in parts.items()}
    ema = parts["ema"]
    digits = ema.sample(6 * list(range(N_CLASSES)), steps=min(50, ema.n_T), generator=torch.Generator().manual_seed(0))
    try:
        state = {"options": options, "run": run, "epoch": epoch, "parts": states}
        ddpm_model.write_state(f"{args.weights}.train", state)
        ddpm_model.save_weights(args.weights, ema)
        with ddpm_model.atomic_write(f"{args.weights}.epoch_{epoch:02d}.png") as temporary:
            ddpm_model.image_grid(digits, columns=N_CLASSES, scale=3).save(temporary)
        print(f"saved {args.weights}; --resume continues from here", flush=True)
    except OSError as error:
        if epoch == args.epochs:
            raise
        print(f"warning: the save of epoch {epoch} failed: {error}", flush=True)


if __name__ == "__main__":
    main()
