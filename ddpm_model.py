"""A conditional denoising diffusion model (DDPM) of handwritten digits.

Read it from top to bottom, beside Ho et al. 2020 (arXiv:2006.11239):

    ddpm_schedule      sections 2, 4   how much of the image is left at each timestep t
    ContextUnet        section 4       the network: noisy image, class and timestep in, velocity v out
    DDPM.forward       algorithm 1     the training loss
    DDPM.denoise       algorithm 2     sampling

The rest is the weights file and what the scripts share. "+" marks what is not as in the DDPM paper, with its source if
it has one. Left out of the paper's network: attention, dropout, two of the four resolutions, all skips but one.
"""

import argparse
import contextlib
import io
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from math import ceil, inf, pi, sqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

GUIDE_W = 0.25  # the default guidance weight w; README shows what other values do
GUIDANCE_INTERVAL = (0.4, 0.9)  # guidance acts while 0.4 < t / n_T <= 0.9; there alphabar is 0.65 .. 0.024
IMAGE_SHAPE = (1, 28, 28)  # channels, height, width; the network halves the last two twice
TIME_DIM = 64


class UserError(ValueError):
    """What the user can fix. The scripts print it as one line."""


def ddpm_schedule(n_T: int) -> Tensor:
    """alphabar[t] = (1 - beta_1) ... (1 - beta_t) (section 2), float32 [n_T + 1]. alphabar[0] = 1 is clean data.

    + A squared cosine, f(t) / f(0) (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17). In the DDPM paper, beta rises
    linearly, and the last quarter of the x_t are almost pure noise.
    + alphabar[n_T] is 1e-8, not 0, so that rounding puts no negative number under a root in `denoise`.
    """
    t = torch.arange(n_T + 1, dtype=torch.float64)
    f = torch.cos((t / n_T + 0.008) / 1.008 * pi / 2) ** 2
    alphabar = f / f[0]
    return alphabar.clamp(min=1e-8).float()


# ---- The network -----------------------------------------------------------------------------------------------------


def time_embedding(t_fraction: Tensor) -> Tensor:
    """Sinusoids (section 4; Vaswani et al. 2017, arXiv:1706.03762): t / n_T, [B] in (0, 1] -> [B, TIME_DIM]."""
    k = torch.arange(TIME_DIM // 2, device=t_fraction.device)
    frequencies = 1000 * 10_000 ** (-2 * k / TIME_DIM)  # 1000, as the paper has 1000 timesteps
    angles = t_fraction[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResBlock(nn.Module):
    """A residual block: x [B, in_channels, H, W], emb [B, emb_dim] -> [B, out_channels, H, W].

    + FiLM: emb scales and shifts the channels (Perez et al. 2017, arXiv:1709.07871). The DDPM paper only adds it.
    + GroupNorm has one group: mean and variance are those of all channels and pixels together, not of a few channels.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(emb_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(1, out_channels, affine=False)  # film scales and shifts
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(F.silu(h))
        return self.skip(x) + h


class ContextUnet(nn.Module):
    """A U-Net that sees a noisy image, its class (the context) and its timestep, and estimates the velocity v.

    n_feat: channels at 14x14; there are 3 n_feat at 7x7. n_classes: the classes are 0 .. n_classes - 1.
    + The class is an input. The DDPM paper has none.
    + Pixel unshuffle: each 2x2 patch of pixels becomes 4 channels, so all work is at 14x14 and 7x7. Pixel shuffle (Shi
    et al. 2016, arXiv:1609.05158) is its inverse, and the way back.
    + Each class has a learned map [3 n_feat, 7, 7], which is added at 7x7: what to draw, and where.
    """

    def __init__(self, n_feat: int = 32, n_classes: int = 10):
        super().__init__()
        self.n_feat = n_feat
        self.n_classes = n_classes
        channels, height, width = IMAGE_SHAPE
        emb_dim = 4 * n_feat
        wide = 3 * n_feat
        self.time_emb = nn.Linear(TIME_DIM, emb_dim)
        self.context_emb = nn.Embedding(n_classes + 1, emb_dim)  # + the last row is the null class: no class
        self.emb = nn.Linear(emb_dim, emb_dim)
        self.context_map = nn.Embedding(n_classes + 1, wide * (height // 4) * (width // 4))

        self.stem = nn.Conv2d(4 * channels, n_feat, 3, padding=1)
        self.enc1 = ResBlock(n_feat, n_feat, emb_dim)
        self.enc2 = ResBlock(n_feat, n_feat, emb_dim)
        self.down = nn.Conv2d(n_feat, wide, 2, stride=2)
        self.mid1 = ResBlock(wide, wide, emb_dim)
        self.mid2 = ResBlock(wide, wide, emb_dim)
        self.up = nn.Conv2d(wide, 4 * n_feat, 1)  # 4, for the pixel shuffle after it
        self.dec1 = ResBlock(2 * n_feat, n_feat, emb_dim)
        self.dec2 = ResBlock(n_feat, n_feat, emb_dim)
        self.out_norm = nn.GroupNorm(1, n_feat)
        self.out = nn.Conv2d(n_feat, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor, t_fraction: Tensor, context_mask: Tensor) -> Tensor:
        """An estimate of v = sqrt(alphabar) eps - sqrt(1 - alphabar) x_0, shaped as x.

        x [B,1,28,28]: noisy image. c [B] int64: class. t_fraction [B] in (0, 1]: t / n_T. context_mask [B] bool: True
        keeps the class, False hides it.
        """
        c = torch.where(context_mask, c, self.n_classes)
        emb = self.time_emb(time_embedding(t_fraction)) + self.context_emb(c)
        emb = F.silu(self.emb(F.silu(emb)))  # [B, 4 n_feat]

        h = self.stem(F.pixel_unshuffle(x, 2))  # [B, n_feat, 14, 14]
        h = self.enc1(h, emb)
        skip = self.enc2(h, emb)
        h = self.down(skip)  # [B, 3 n_feat, 7, 7]
        h = h + self.context_map(c).view_as(h)
        h = self.mid1(h, emb)
        h = self.mid2(h, emb)
        h = F.pixel_shuffle(self.up(h), 2)  # [B, n_feat, 14, 14]
        h = self.dec1(torch.cat([h, skip], dim=1), emb)
        h = self.dec2(h, emb)
        h = self.out(F.silu(self.out_norm(h)))
        return F.pixel_shuffle(h, 2)  # [B, 1, 28, 28]


# ---- The diffusion process -------------------------------------------------------------------------------------------


def to_image(x: Tensor) -> Tensor:
    """From [-1, 1] to images in [0, 1], clipped. + What is nearly black becomes black: most of MNIST's pixels are 0."""
    x = ((x + 1) / 2).clamp(0, 1)
    return torch.where(x < 0.02, 0, x)


class DDPM(nn.Module):
    """The diffusion process around a network: the training loss and the sampler.

    nn_model: a ContextUnet, or a network that has its n_feat and n_classes and takes the same arguments. n_T: number
    of timesteps, 1 .. 10,000. drop_prob: probability in [0, 1) that training hides an image's class. Callers see
    images in [0, 1]; in the equations, x_0 is in [-1, 1].
    """

    def __init__(self, nn_model: nn.Module, n_T: int = 400, drop_prob: float = 0.1):
        super().__init__()
        self.nn_model = nn_model
        self.n_T = n_T
        self.drop_prob = drop_prob
        # What rebuilds it from a weights file.
        self.config = {"n_feat": nn_model.n_feat, "n_classes": nn_model.n_classes, "n_T": n_T, "drop_prob": drop_prob}
        self.register_buffer("alphabar", ddpm_schedule(n_T))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """The training loss, a scalar (algorithm 1), for images x [B,1,28,28] in [0, 1] of classes c [B] int64.

        + The network estimates v, not eps (Salimans & Ho 2022, arXiv:2202.00512). By eq. 4, v - v_hat is
        (eps - eps_hat) / sqrt(alphabar), so this is the loss of the paper (eq. 14) with the weight 1 / alphabar.
        + With probability drop_prob the class is hidden (Ho & Salimans 2022, arXiv:2207.12598, algorithm 1).
        """
        B = len(x)
        x_0 = 2 * x - 1  # section 3.3
        t = torch.randint(1, self.n_T + 1, (B,), device=x.device)
        eps = torch.randn_like(x_0)
        abar = self.alphabar[t][:, None, None, None]
        x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps  # eq. 4
        v = abar.sqrt() * eps - (1 - abar).sqrt() * x_0  # + the target is v
        context_mask = torch.rand(B, device=x.device) >= self.drop_prob  # + False hides the class
        v_hat = self.nn_model(x_t, c, t / self.n_T, context_mask)
        return F.mse_loss(v_hat, v)

    def guided_v(self, x_t: Tensor, c: Tensor, t: int, guide_w: float) -> Tensor:
        """+ Classifier-free guidance (Ho & Salimans 2022, eq. 6): (1 + w) v(x_t, c) - w v(x_t, null), shaped as x_t.

        That paper has eps in place of v. Both give the same: v = (eps - sqrt(1 - alphabar) x_t) / sqrt(alphabar), by
        eq. 4 of DDPM, and the weights 1 + w and -w add up to 1.
        + It acts only while t / n_T is in GUIDANCE_INTERVAL (the idea of Kynkäänniemi et al. 2024, arXiv:2404.07724;
        the limits are ours, and belong to this schedule). With 1 or 2 steps, no t is in it. With drop_prob = 0, the
        null class was never trained, and there is no guidance.
        """
        t_fraction = torch.full((len(x_t),), t / self.n_T, device=x_t.device)
        keep = torch.ones_like(c, dtype=torch.bool)
        low, high = GUIDANCE_INTERVAL
        guided = guide_w != 0 and self.drop_prob > 0 and low < t / self.n_T <= high

        v = self.nn_model(x_t, c, t_fraction, keep)
        if not guided:
            return v
        v_null = self.nn_model(x_t, c, t_fraction, ~keep)
        return (1 + guide_w) * v - guide_w * v_null

    def timesteps(self, steps: int | None = None) -> list[int]:
        """The steps + 1 timesteps that sampling visits, from n_T down to 0. steps: 1 .. n_T, by default n_T.

        + With fewer steps than n_T, they are denser near 0 (DDIM, appendix D.2: quadratic). Raises UserError.
        """
        steps = self.n_T if steps is None else steps
        if not 1 <= steps <= self.n_T:
            raise UserError(f"steps must be in 1 .. {self.n_T}, not {steps}")
        # Rounding alone can repeat small timesteps; max(i, ...) keeps them distinct.
        return [max(i, round(self.n_T * (i / steps) ** 2)) for i in range(steps, -1, -1)]

    @torch.no_grad()
    def denoise(
        self,
        c: Tensor | list[int] | int,
        *,
        guide_w: float = GUIDE_W,
        steps: int | None = None,
        eta: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Sampling (algorithm 2). Yields steps + 1 times (t, images [N,1,28,28] in [0, 1]), from noise to digits.

        c: N > 0 classes, whole numbers in 0 .. n_classes - 1, in anything that torch.as_tensor takes. guide_w: guidance
        weight, >= 0.
        steps: 1 .. n_T, by default n_T. + With fewer, timesteps are skipped (DDIM, J. Song et al. 2020,
        arXiv:2010.02502).
        eta: in 0 .. 1. 1 is DDPM, with the variance of its eq. 7. + 0 is DDIM, which adds no noise during sampling;
        numbers between mix both (eq. 16 there).
        generator: a CPU generator, so that a seed means the same noise on every device.
        Raises UserError, when the first images are asked for, if c, guide_w, steps or eta is out of range.
        """
        timesteps = self.timesteps(steps)
        c = torch.as_tensor(c).reshape(-1)
        n_classes = self.nn_model.n_classes
        wrong = [k for k in c.tolist() if k not in range(n_classes)]
        if wrong or len(c) == 0:
            raise UserError(f"classes must be whole numbers in 0 .. {n_classes - 1}, not {wrong[:1]}")
        if not (0 <= eta <= 1 and 0 <= guide_w < inf):
            raise UserError(f"eta must be in 0 .. 1, and guide_w 0 or more, not {eta} and {guide_w}")
        c = c.to(self.alphabar.device, torch.int64)
        alphabar = self.alphabar.tolist()
        shape = (len(c), *IMAGE_SHAPE)

        x = torch.randn(shape, generator=generator).to(c.device)  # x_T
        yield timesteps[0], to_image(x)
        for t, s in itertools.pairwise(timesteps):
            # From x_t to the less noisy x_s. With all steps, s = t - 1 and abar_t / abar_s is alpha_t.
            abar_t = alphabar[t]
            abar_s = alphabar[s]
            v = self.guided_v(x, c, t, guide_w)
            # Algorithm 2 goes from eps directly to x_s. Here x_0 is estimated first, so that it can be clipped.
            x_0 = sqrt(abar_t) * x - sqrt(1 - abar_t) * v  # from eq. 4 and the definition of v
            x_0 = x_0.clamp(-1, 1)  # + clipping
            eps = (x - sqrt(abar_t) * x_0) / sqrt(1 - abar_t)  # eq. 4, solved for eps, with the clipped x_0
            # DDIM, eq. 12 and 16, where alpha stands for alphabar. With eta = 1 this is DDPM, eq. 6 and 7, with x_t
            # written in x_0 and eps. At s = 0, sigma = 0: no noise in the last step (algorithm 2, line 3).
            sigma = eta * sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s))
            z = torch.randn(shape, generator=generator).to(c.device)
            x = sqrt(abar_s) * x_0 + sqrt(1 - abar_s - sigma**2) * eps + sigma * z
            yield s, to_image(x)

    def sample(self, *args, **kwargs) -> Tensor:
        """The digits that `denoise` ends with, [N,1,28,28] in [0, 1]. Takes the arguments of `denoise`."""
        for _, x in self.denoise(*args, **kwargs):
            pass
        return x


# ---- The weights file ------------------------------------------------------------------------------------------------


def save_weights(path: str | Path, ddpm: DDPM) -> None:
    """Writes {"config": what rebuilds the DDPM, "model": state_dict of its network}. Raises OSError."""
    write_state(path, {"config": ddpm.config, "model": ddpm.nn_model.state_dict()})


def load_ddpm(path: str | Path, device: str | torch.device = "cpu") -> DDPM:
    """The DDPM that save_weights wrote, in evaluation mode on device. Raises UserError or OSError."""
    with read_state(path) as state:
        config = {"n_classes": 10} | state["config"]  # older files have ten classes and do not say so
        nn_model = ContextUnet(config["n_feat"], config["n_classes"])
        nn_model.load_state_dict(state["model"])
        ddpm = DDPM(nn_model, config["n_T"], config["drop_prob"])
    return ddpm.to(device, memory_format=torch.channels_last).eval()


def write_state(path: str | Path, state: dict) -> None:
    """torch.save, atomically. Raises OSError."""
    buffer = io.BytesIO()  # because on a full disk, torch.save raises RuntimeError
    torch.save(state, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


@contextlib.contextmanager
def read_state(path: str | Path) -> Iterator[dict]:
    """Gives what write_state wrote, on the CPU. With weights_only, torch refuses files that would run code (older
    versions of torch had holes in this).

    Raises OSError if the file cannot be opened, and UserError if it is damaged or another file, or if the block under
    `with` cannot use it.
    """
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # other content makes torch raise errors of many types
            raise UserError(f"{path} is damaged, or is not a file that train_ddpm.py wrote") from error
    try:
        yield state
    except (ArithmeticError, LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        reason = str(error).split("\n")[-1].strip()[:200]
        raise UserError(f"{path} is of another network or version ({type(error).__name__}: {reason})") from error


# ---- What the scripts share ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path to write to. At the end, that file replaces path; after an error, it is removed.

    So if the process ends at any moment, path is the old file or the new one (a loss of power is another matter). A
    killed process leaves a folder .tmp... beside it. Makes the folder of path. A symbolic link stays a link.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp") as folder:
        temporary = Path(folder, Path(path).name)  # the suffix tells Pillow the format
        yield temporary
        os.replace(temporary, target)


def image_grid(images: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Images [N,1,H,W] in [0, 1] -> an 8-bit grey picture, row by row, with 2 black pixels around each.

    Each pixel becomes scale x scale. For more than one image, this is the geometry of torchvision's make_grid.
    """
    rows = ceil(len(images) / columns)
    height = images.shape[2] + 2
    width = images.shape[3] + 2
    grid = Image.new("L", (width * min(columns, len(images)) + 2, height * rows + 2))
    pixels = (images[:, 0] * 255).round().to(torch.uint8).cpu().numpy()
    for i, tile in enumerate(pixels):
        grid.paste(Image.fromarray(tile), (width * (i % columns) + 2, height * (i // columns) + 2))
    return grid.resize((scale * grid.width, scale * grid.height), Image.NEAREST)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """For main: prints expected errors as one line and exits with 1; after Ctrl-C, exits with 130."""
    if hasattr(sys.stdout, "reconfigure"):
        # Lines come at once, also in a log file; a path may have letters that the terminal lacks.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        yield
    except (UserError, OSError, ImportError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def show_progress(text: str) -> None:
    """Overwrites the status line, if stderr is a terminal. An empty text clears it."""
    if hasattr(sys.stderr, "isatty") and sys.stderr.isatty():  # without a console (pythonw), stderr is None
        width = shutil.get_terminal_size().columns - 1
        print(f"{text[:width]:{width}}", end="\r", file=sys.stderr, flush=True)


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: an int or a float in [low, high]."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it: invalid int value: '2.5'
    return parse


def pick_device(name: str) -> torch.device:
    """The device of that name. "auto": the GPU if there is one that works, else the CPU. Raises UserError."""
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = gpu if name == "auto" else name
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0]
        if name != "auto":
            raise UserError(f"cannot use {name}: {reason}") from error
        print(f"warning: the CPU is used, not the GPU: {reason}", file=sys.stderr)
        device = "cpu"
    return torch.device(device)
