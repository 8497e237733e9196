"""Trains the conditional DDPM on MNIST, or on your own pictures. The averaged weights go to weights/ddpm_mnist.pth.

python train_ddpm.py                               # 30 epochs, on the GPU if there is one
python train_ddpm.py --data-dir my_images --weights weights/own.pth     # pictures, in a folder for each class
python train_ddpm.py --resume                      # go on from the last save
torchrun --nproc-per-node=4 train_ddpm.py          # four GPUs share each batch (srun alone starts four trainings)
"""

import argparse
import copy
import glob
import hashlib
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

import ddpm_model
from ddpm_model import DDPM, IMAGE_SHAPE, ContextUnet, UserError, number

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
    add("--data-dir", type=os.path.expanduser, default="data", help="MNIST, or a folder of pictures for each class")
    add("--weights", type=os.path.expanduser, default="weights/ddpm_mnist.pth", help="written at each save")
    add("--save-every", type=number(int, 1, 10**6), default=5, help="epochs between saves")
    add("--seed", type=number(int, 0, 10**9), default=0, help="seed of all random numbers")
    add("--device", default="auto", help="cpu, cuda, ...; auto is the GPU if there is one")
    add("--resume", action="store_true", help="go on from the last save of --weights, with the options of that run")
    args = parser.parse_args(argv)
    if args.resume:
        with ddpm_model.read_state(f"{args.weights}.train") as state:
            parser.set_defaults(**state["options"])
        args = parser.parse_args(argv)  # what is typed now counts more than these defaults
    return args


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
    if not os.path.basename(args.weights):
        raise UserError(f"--weights must name a file, not {args.weights!r}")
    paths = [Path(os.path.realpath(f"{args.weights}{suffix}")) for suffix in ("", ".train")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two trials that change nothing: a temporary file (its name is longer than the preview's), and the old file.
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name).close()
        if os.path.lexists(path):
            path.open("r+b").close()
    if not args.resume and any(map(os.path.exists, paths)):
        print(f"the first save replaces the files of {args.weights}; to continue a stopped run, use --resume")


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 mixed precision (Kalamkar et al. 2019, arXiv:1905.12322), on NVIDIA GPUs and x86 CPUs that have it."""
    has_bfloat16 = False
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older versions of torch do not
        has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast("cuda" if device.type == "cuda" else "cpu", torch.bfloat16, enabled=has_bfloat16)


# ---- Data ------------------------------------------------------------------------------------------------------------


def load_mnist(data_dir: str) -> tuple[Tensor, Tensor, list[str]]:
    """The training images, uint8 [N,1,28,28], their labels [N], and names of the classes. Downloads what is missing.

    Raises UserError.
    """
    from torchvision.datasets import mnist  # slow to import: not for --help

    raw = Path(data_dir, "MNIST", "raw")
    try:
        if not raw.exists():  # never over files that are there: they may be your own
            print(f"downloading MNIST (12 MB) to {raw}")
            raw.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=raw.parent, prefix=".tmp") as folder:
                mnist.MNIST(folder, download=True)
                if not raw.exists():  # else another process has put its download there meanwhile
                    os.rename(f"{folder}/MNIST/raw", raw)
        images = mnist.read_image_file(raw / "train-images-idx3-ubyte")
        labels = mnist.read_label_file(raw / "train-labels-idx1-ubyte")
        names = [str(label) for label in range(labels.max() + 1)]
    except Exception as error:  # no network, a full disk, a damaged file: each has a type of its own
        files = "train-images-idx3-ubyte and train-labels-idx1-ubyte"
        raise UserError(f"no MNIST ({error!r}): {raw} must have {files}; without {raw}, they are downloaded") from error
    return images[:, None], labels, names


def load_folders(data_dir: str, folders: list[str]) -> tuple[Tensor, Tensor, list[str]]:
    """The same for pictures in a folder for each class, in the order of the folders. Raises UserError or OSError."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    samples = make_dataset(data_dir, {name: label for label, name in enumerate(folders)}, IMG_EXTENSIONS)
    images = torch.stack([load_picture(path) for path, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    return images, labels, [f"{label} {name}" for label, name in enumerate(folders)]


def load_picture(path: str) -> Tensor:
    """A picture as uint8 [1,28,28]: upright, on white, grey, squeezed to this size. Raises UserError."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode[0] in "IF":
            raise ValueError("it has 16 bits or floats; save it with 8 bits")
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("L").resize(IMAGE_SHAPE[:0:-1])  # width, height
    except Exception as error:  # damaged pictures make Pillow raise errors of many types
        raise UserError(f"cannot use {path}: {error}") from error
    return torch.from_numpy(np.array(picture))[None]


def load_data(data_dir: str) -> tuple[Tensor, Tensor, list[str]]:
    """What load_mnist or load_folders returns, by what is in data_dir. Raises UserError or OSError."""
    folders = sorted(os.path.dirname(name) for name in glob.glob("*/", root_dir=data_dir))  # none with a leading dot
    mixed = "MNIST" in folders and len(folders) > 1
    if mixed or (not folders and glob.glob("*", root_dir=data_dir)):
        raise UserError(f"{data_dir} must have a folder of pictures for each class, or only MNIST/, or nothing")
    images, labels, names = load_mnist(data_dir) if folders in ([], ["MNIST"]) else load_folders(data_dir, folders)

    right = images.dtype == torch.uint8 and images.shape[1:] == IMAGE_SHAPE and labels.shape == images.shape[:1]
    if not right or labels.is_floating_point() or (labels < 0).any():  # this would train, but wrongly
        found = f"{images.dtype} {list(images.shape)} with labels {labels.dtype} {list(labels.shape)}"
        found += f" in {labels.min()} .. {labels.max()}"
        raise UserError(f"images must be uint8 {IMAGE_SHAPE}, each with a whole label from 0 up, not {found}")
    return images, labels.long(), names


# ---- Training --------------------------------------------------------------------------------------------------------


def resume(args: argparse.Namespace, data: dict, parts: dict) -> int:
    """Gives parts the state of the last save. Returns how many epochs are done. Raises UserError or OSError."""
    path = f"{args.weights}.train"
    with ddpm_model.read_state(path) as state:
        old_data, epochs_done = state["data"], state["epoch"]
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
    if data != old_data:
        raise UserError(f"the data differ from those of the run in {path}: {data}, not {old_data}")
    return epochs_done


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


def save(args: argparse.Namespace, data: dict, epoch: int, parts: dict) -> None:
    """Writes the training state, the weights, and then a preview with six images of each class.

    A failed save is only a warning, except after the last epoch: there it raises OSError.
    """
    own = ("weights", "device", "resume")  # of each command: --resume takes all other options from the state
    options = {name: value for name, value in vars(args).items() if name not in own}
    states = {name: part.state_dict() for name, part in parts.items()}
    state = {"options": options, "data": data, "epoch": epoch, "parts": states}
    ema = parts["ema"]
    n_classes = ema.nn_model.n_classes
    try:
        ddpm_model.write_state(f"{args.weights}.train", state)
        ddpm_model.save_weights(args.weights, ema)
        generator = torch.Generator().manual_seed(0)
        drawn = ema.sample(6 * list(range(n_classes)), steps=min(50, ema.n_T), generator=generator)
        with ddpm_model.atomic_write(f"{args.weights}.epoch_{epoch:02d}.png") as temporary:
            ddpm_model.image_grid(drawn, columns=n_classes, scale=3).save(temporary)
        print(f"saved {args.weights}")
    except OSError as error:
        if epoch == args.epochs:
            raise
        print(f"warning: the save of epoch {epoch} failed: {error}")


@ddpm_model.one_line_errors()
def main() -> None:
    # Set-up. Of several processes, the one with rank 0 shows progress and saves.
    args = parse_args()
    rank, world = join_torchrun(args)
    device = ddpm_model.pick_device(args.device)
    if rank == 0:
        check_weights(args)

    # Data
    images, labels, names = load_data(args.data_dir)
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    data = {"images": len(images), "classes": names, "sha256": digest}  # a resumed run must have the same
    images, labels = images.to(device), labels.to(device)
    n_batches = len(images) // args.batch_size  # full ones: what is left of an epoch is not used
    if n_batches == 0 or args.batch_size % world:
        raise UserError(f"--batch-size must be at most {len(images)} (images) and a multiple of {world} (processes)")

    # Model
    torch.manual_seed(args.seed)
    nn_model = ContextUnet(args.n_feat, n_classes=len(names))
    ddpm = DDPM(nn_model, args.n_T, args.drop_prob).to(device, memory_format=torch.channels_last)  # faster convolutions
    ema = copy.deepcopy(ddpm).requires_grad_(False)  # has an exponential moving average of the weights
    # AdamW is the Adam of the paper, with weight decay. fused: one operation for all weights; not on MPS in torch 2.4.
    optimizer = torch.optim.AdamW(ddpm.parameters(), fused=device.type in ("cpu", "cuda"))
    parts = {"ddpm": ddpm, "ema": ema, "optimizer": optimizer}  # what a save keeps

    # Resume
    epochs_done = resume(args, data, parts) if args.resume else 0
    if rank == 0:
        if args.resume:
            ddpm_model.save_weights(args.weights, ema)  # the file may be missing, or of another save
        print(f"{len(images)} images of the classes {', '.join(names)}")
        print(f"{epochs_done} of {args.epochs} epochs are done, {n_batches} steps each, on {world} x {device.type}")

    # Loop. Each epoch seeds the random numbers anew, so a resumed run draws those of a run that was not stopped. The
    # order of the images is the same in all processes; timesteps, noise and hidden classes are others in each.
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
                loss = model(images[shard] / 255, labels[shard])  # DDPM.forward: algorithm 1
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            decay = min(EMA_DECAY, (1 + step) / (10 + step))  # small at first, to forget the random start
            update_ema = get_ema_multi_avg_fn(decay)
            update_ema(list(ema.parameters()), list(ddpm.parameters()), None)  # ema = decay ema + (1 - decay) ddpm

            total += loss.detach()
            if rank == 0 and i % 20 == 0:
                done = (i + 1) / n_batches
                ddpm_model.show_progress(report(epoch, args.epochs, done, total.item() / (i + 1), start))

        # Save, at the end of an epoch. All processes have the same weights.
        ddpm_model.show_progress("")
        if not all(weights.isfinite().all() for weights in ema.parameters()):
            raise UserError(f"there is a NaN or infinity in the weights after epoch {epoch}; a lower --lr may help")
        if rank == 0:
            print(report(epoch, args.epochs, 1, total.item() / n_batches, start))
            if epoch % args.save_every == 0 or epoch == args.epochs:
                save(args, data, epoch, parts)

    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
