"""Trains the conditional DDPM on MNIST; the weights, averaged over the last steps, go to weights/ddpm_mnist.pth.

    python train_ddpm.py                                 # 30 epochs, on the GPU if there is one
    python train_ddpm.py --resume                        # go on from the last save, after any kind of stop
    torchrun --nproc-per-node=4 train_ddpm.py            # four GPUs (or processes) that share each batch

With each save, a sheet of digits goes to generated_outputs/epoch_NN.png: watch it learn.
"""

import argparse
import copy
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm_model import (
    DDPM,
    N_T_RANGE,
    ContextUnet,
    WeightsError,
    hardware_has_bf16,
    image_grid,
    keep_freed_memory,
    number,
    pick_device,
    read_state,
    save_png,
    save_weights,
    show_progress,
    write_state,
)

EMA_DECAY = 0.999
WARMUP_STEPS = 500
OTHERS = 6000  # images that the targets of the last step are averaged over; of a step before, fewer
SHEET_DIR = Path("generated_outputs")
RUN_OPTIONS = ("epochs", "batch_size", "lr", "drop_prob", "n_feat", "n_T", "save_every", "seed", "precision")


# ---- Options ---------------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a conditional DDPM on MNIST.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=number(int, 1), default=30)
    add("--batch-size", type=number(int, 1), default=128, help="images a step, over all processes")
    add("--lr", type=number(float, 1e-8, 1), default=5e-3, help="peak learning rate")
    add("--drop-prob", type=number(float, 0, 1), default=0.1, help="how often the class is hidden")
    add("--n-feat", type=number(int, 8, 1024), default=32, help="width of the network, a multiple of 8")
    add("--n-T", type=number(int, *N_T_RANGE), default=400, help="number of timesteps")
    add("--data-dir", default="data", help="has MNIST/raw, or gets it")
    add("--weights", type=Path, default="weights/ddpm_mnist.pth", help="written at each save")
    add("--save-every", type=number(int, 1), default=5, help="epochs between saves")
    add("--seed", type=number(int, 0, 10**9), default=0)
    add("--device", type=pick_device, default="auto")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is native")
    add("--resume", action="store_true", help="go on from the last save, with the options of that run")
    return parser


def parse_args() -> tuple[argparse.Namespace, dict | None]:
    """The options, and with --resume the training state to go on from, whose options are then the defaults.

    Raises WeightsError where there is no such state.
    """
    parser = make_parser()
    args, state = parser.parse_args(), None
    if args.resume:
        path = state_path(args.weights)
        state = read_state(path)
        if not isinstance(state, dict) or "options" not in state:
            raise WeightsError(f"{path} is not a training state; start anew without --resume")
        parser.set_defaults(**state["options"])
        args = parser.parse_args()
    if args.n_feat % 8:
        parser.error(f"argument --n-feat: must be a multiple of 8, not {args.n_feat}")
    return args, state


def state_path(weights: Path) -> Path:
    """Where the training state lies: weights/ddpm_mnist.pth -> weights/ddpm_mnist.train.pth."""
    return weights.with_suffix(".train.pth")


def check_writable(path: Path, n_bytes: int) -> None:
    """Exits with one line if a file of n_bytes cannot be written at path. Makes the folder where it is missing."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        sys.exit(f"error: cannot write {path} ({error.strerror}); nothing was trained")
    if free < n_bytes:
        sys.exit(
            f"error: {path.parent} has {free / 1e6:.0f} MB free and needs {n_bytes / 1e6:.0f} MB; nothing was trained"
        )


# ---- Data ------------------------------------------------------------------------------------------------------------


def load_mnist(data_dir: str) -> tuple[Tensor, Tensor]:
    """The training images, uint8 [N,28,28], and labels, int64 [N]. Downloads MNIST where it is missing.

    Exits with one line that names the file that is missing or damaged, and says what to do.
    """
    from torchvision.datasets import MNIST, mnist

    folder = Path(data_dir) / "MNIST" / "raw"
    image_file, label_file = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    try:
        if not (image_file.is_file() and label_file.is_file()):
            MNIST(data_dir, download=True)
    except Exception as error:  # no network, a refusal, a full disk, a damaged archive: each has a type of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        missing = " and ".join(str(file) for file in (image_file, label_file) if not file.is_file())
        sys.exit(f"error: cannot download {missing} ({reason}); put the files there by hand, unpacked, and run again")

    def read(file: Path, reader) -> Tensor:
        try:
            return reader(str(file))
        except Exception as error:  # torchvision asserts; sizes that do not fit make torch raise
            sys.exit(f"error: {file} is damaged ({type(error).__name__}); delete it and run again to download it")

    images, labels = read(image_file, mnist.read_image_file), read(label_file, mnist.read_label_file)
    if len(images) == 0 or images.shape[1:] != (28, 28):
        sys.exit(f"error: {image_file} does not hold 28x28 images; delete it and run again to download it")
    if len(labels) != len(images) or not 0 <= labels.min() <= labels.max() <= 9:
        sys.exit(f"error: {label_file} does not hold a digit for each image; delete it and run again to download it")
    return images, labels


# ---- Training --------------------------------------------------------------------------------------------------------


def join_processes(device: torch.device) -> tuple[int, int, torch.device]:
    """(rank, number of processes, device) of this process: alone, unless torchrun started several."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1, device
    import torch.distributed as dist
    import torch.distributed.nn  # before there is a group: torch imports it later, and then it holds the group for ever

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up to peak, then half a cosine down to 0 after total steps."""
    warmup = min(WARMUP_STEPS, total // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a weight [out, ...], seen as a matrix, has singular values near 1.

    Every direction in which the convolution can improve then improves alike (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). The update is scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982,
    section 2.2), so that both take the same learning rate.
    """

    MOMENTUM = 0.95

    def __init__(self, weights: list[nn.Parameter], lr: float):
        same_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for weight in weights:
            same_shape.setdefault(weight.shape, []).append(weight)
        super().__init__([{"params": group} for group in same_shape.values()], {"lr": lr})
        for weight in weights:
            self.state[weight]["momentum"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = group["params"]
            gradients, momenta = [w.grad for w in weights], [self.state[w]["momentum"] for w in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(gradients, momenta, self.MOMENTUM))  # Nesterov's
            updates = orthogonalised(ahead.flatten(2))
            size = 0.2 * math.sqrt(max(updates.shape[1:]))
            torch._foreach_add_(weights, list(updates.view_as(ahead)), alpha=-group["lr"] * size)


def orthogonalised(x: Tensor) -> Tensor:
    """Matrices x [N,m,n] with their singular values, but for very small ones, brought to 0.7 .. 1.2.

    That is five Newton-Schulz iterations of Jordan et al. Each multiplies x from the left by a polynomial in x x^T, and
    needs no more of x than that small product.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalised(x.mT).mT
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = x @ x.mT
    product = identity = torch.eye(x.shape[1], device=x.device)
    for _ in range(5):
        polynomial = torch.baddbmm(a * identity + b * gram, gram, gram, alpha=c)
        product, gram = polynomial @ product, polynomial @ gram @ polynomial
    return product @ x


class Trainer:
    """What changes while training. Random numbers start anew at each epoch from (seed, epoch, rank): a run that goes on
    after a save repeats the run that was not stopped, and no random state needs saving."""

    PARTS = ("ddpm", "ema", "adamw", "muon")

    def __init__(
        self, args: argparse.Namespace, images: Tensor, labels: Tensor, rank: int, world: int, device: torch.device
    ):
        self.args, self.rank, self.world = args, rank, world
        self.images, self.labels = images.to(device), labels.to(device)
        torch.manual_seed(args.seed)
        self.ddpm = DDPM(ContextUnet(n_feat=args.n_feat), DDPM.default_betas(args.n_T), args.n_T, args.drop_prob)
        self.ddpm.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.ddpm).eval().requires_grad_(False)
        kernels = [weight for weight in self.ddpm.parameters() if weight.ndim == 4]  # of the convolutions
        others = [weight for weight in self.ddpm.parameters() if weight.ndim != 4]
        self.muon, self.adamw = Muon(kernels, args.lr), torch.optim.AdamW(others, lr=args.lr, fused=True)
        self.epoch = 0  # how many are complete
        self.saved_epoch = 0  # how many of them are saved
        self.batches = math.ceil(len(images) / args.batch_size)  # in an epoch
        self.bf16 = args.precision == "bf16" or (args.precision == "auto" and hardware_has_bf16(device))
        self.model = self.ddpm
        if world > 1:  # averages the gradients over the processes
            self.model = nn.parallel.DistributedDataParallel(self.ddpm)

    def load(self, state: dict) -> None:
        """Takes up what save wrote. Raises WeightsError if it is the state of another network."""
        try:
            for name in self.PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.epoch = self.saved_epoch = int(state["epoch"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise WeightsError(f"{state_path(self.args.weights)} does not fit these options; start anew") from None

    def save(self) -> None:
        """Writes the training state, the weights and a sheet of digits. Raises OSError; the old files are intact."""
        options = {name: getattr(self.args, name) for name in RUN_OPTIONS}
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        write_state(state_path(self.args.weights), {"options": options, "epoch": self.epoch, **parts})
        save_weights(self.args.weights, self.ema)
        self.saved_epoch = self.epoch
        labels = torch.arange(10, device=self.images.device).repeat(6)
        digits = self.ema.sample(labels, steps=min(50, self.args.n_T), generator=torch.Generator().manual_seed(0))
        sheet = SHEET_DIR / f"epoch_{self.epoch:02d}.png"
        save_png(sheet, image_grid(digits, columns=10, scale=3))
        print(f"saved {self.args.weights} and {sheet}", flush=True)

    def step(self, index: Tensor, step: int) -> Tensor:
        """An update on the images of index, of which this process takes its share. Returns the sum of its losses.

        Its targets are averaged over others, drawn anew: few at first, when any target will do, and more and more as
        the learning rate falls, when noise in the targets is what is left to be learned away.
        """
        mine = index.tensor_split(self.world)[self.rank]
        x = self.images[mine][:, None] / 255
        total = self.args.epochs * self.batches
        others = torch.randint(len(self.images), (int(OTHERS * (step / total) ** 2),), device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(x, self.labels[mine], (self.images[others][:, None] / 255, self.labels[others]))
        share = self.world * len(mine) / len(index)  # 1, unless the batch does not divide evenly
        (loss * share).backward()
        nn.utils.clip_grad_norm_(self.ddpm.parameters(), 1.0)
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, self.args.lr)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))  # short at first, to forget the random start
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.ddpm.parameters()), 1 - decay)
        return loss.detach() * len(mine)

    def train_epoch(self) -> None:
        """Visits each image once, over all processes. Raises FloatingPointError if the loss is not finite."""
        seed, n_images = self.args.seed * 100_000 + self.epoch, len(self.images)
        order = torch.randperm(n_images, generator=torch.Generator().manual_seed(seed)).to(self.images.device)
        torch.manual_seed(seed * 1000 + self.rank)
        total, seen, start, shown = torch.zeros((), device=order.device), 0, time.perf_counter(), 0.0
        for i, index in enumerate(order.tensor_split(self.batches)):  # sizes that differ by one at most
            total += self.step(index, self.epoch * self.batches + i)
            seen += len(index)
            seconds = time.perf_counter() - start
            if self.rank == 0 and seconds - shown > 1:  # not at each step: reading the loss waits for the GPU
                shown = seconds
                show_progress(self.report(total.item() * self.world / seen, seen, seconds))
        if self.world > 1:
            torch.distributed.all_reduce(total)
        line = self.report(total.item() / n_images, seen, time.perf_counter() - start)
        self.epoch += 1
        if self.rank == 0:
            show_progress("")
            print(line, flush=True)

    def report(self, loss: float, seen: int, seconds: float) -> str:
        """A line about this epoch after so many images; raises FloatingPointError if the loss is not finite."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {self.epoch + 1}")
        done = seen / len(self.images)
        minutes = seconds / done * (self.args.epochs - self.epoch - done) / 60
        epoch = f"epoch {self.epoch + 1:2d}/{self.args.epochs}" + (f" {done:4.0%}" if done < 1 else "")
        return f"{epoch}  loss {loss:.5f}  {seen / seconds:,.0f} images/s  {minutes:.1f} min left"

    def run(self) -> None:
        """Trains the epochs that are left, and saves after every save_every-th and the last."""
        if self.rank == 0:
            precision, device = "bf16" if self.bf16 else "fp32", self.images.device.type
            print(
                f"{len(self.images):,} images, {self.args.epochs} epochs x {self.batches} steps, {precision}, {device}"
                + (f" x {self.world}" if self.world > 1 else "")
                + (f", going on after epoch {self.epoch}" if self.epoch else ""),
                flush=True,
            )
        while self.epoch < self.args.epochs:
            self.train_epoch()
            if self.rank == 0 and (self.epoch % self.args.save_every == 0 or self.epoch == self.args.epochs):
                self.save()

    def what_is_saved(self) -> str:
        weights = self.args.weights
        if self.saved_epoch == 0:
            return f"this run has saved nothing, and {weights} is as it was"
        return f"{weights} is that of epoch {self.saved_epoch}; to go on: the same command with --resume"


def prepare() -> Trainer:
    """Reads the options and the data, joins the other processes, and takes up the saved state with --resume."""
    args, state = parse_args()
    keep_freed_memory()
    rank, world, device = join_processes(args.device)
    if rank == 0:
        if args.weights.is_file() and not state:
            print(f"{args.weights} exists and is replaced at the first save (--weights: elsewhere)", flush=True)
        images, labels = load_mnist(args.data_dir)
    if world > 1:
        torch.distributed.barrier()  # until rank 0 has downloaded
    if rank > 0:
        images, labels = load_mnist(args.data_dir)
    if not world <= args.batch_size <= len(images):
        sys.exit(f"error: --batch-size must be from {world} to {len(images)}, the images there are")

    trainer = Trainer(args, images, labels, rank, world, device)
    if state:
        trainer.load(state)
    if rank == 0:
        size = sum(parameter.nbytes for parameter in trainer.ddpm.parameters())
        check_writable(args.weights, 10 * size)  # at most five copies are saved, beside the old ones
        check_writable(SHEET_DIR / "epoch_01.png", 10**6)
    return trainer


def main() -> None:
    trainer, what = None, "stopped"
    try:
        trainer = prepare()
        trainer.run()
        if trainer.world > 1:
            torch.distributed.destroy_process_group()
        return
    except KeyboardInterrupt:
        code = 130
    except WeightsError as error:
        sys.exit(f"error: {error}")
    except FloatingPointError as error:
        code, what = 1, f"error: {error}; a lower --lr may help"
    except OSError as error:
        code, what = 1, f"error: cannot save ({error.strerror or error})"
    except RuntimeError as error:
        if trainer is None or trainer.world == 1:
            raise
        code, what = 1, f"error: another process was lost ({str(error).splitlines()[0]})"
    show_progress("")
    if trainer is None:
        print(f"{what}; nothing was trained", file=sys.stderr)
    elif trainer.rank == 0 or code == 1:
        print(f"{what}; {trainer.what_is_saved()}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
