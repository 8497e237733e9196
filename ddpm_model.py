"""A conditional denoising diffusion model of 28x28 digits: the network, the diffusion process, the weights file.

Read from top to bottom:
    ddpm_schedules   how much noise there is at each timestep
    ContextUnet      the network: noisy image, class and timestep in, velocity out
    DDPM             the diffusion process: noising, training loss, guided sampling
    save_weights, load_ddpm, and the few helpers that the scripts share

Sources: DDPM, Ho et al. 2020 (arXiv:2006.11239); DDIM, Song et al. 2020 (arXiv:2010.02502); velocity, Salimans & Ho
2022 (arXiv:2202.00512); classifier-free guidance, Ho & Salimans 2022 (arXiv:2207.12598); DPM-Solver++, Lu et al. 2022
(arXiv:2211.01095). The names are those of minDiffusion and Conditional_Diffusion_MNIST.
"""

import argparse
import ctypes
import io
import itertools
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GUIDE_W = 0.7  # the guidance weight drawn with unless told otherwise; README has the table it was chosen from
GUIDED = (0.3, 0.6)  # guidance acts while t / n_T is in this interval
X0_LIMIT = 1.1  # x0 is clipped here, beyond black at -1: clipped at -1, what errors are left would all be too bright
N_T_RANGE = (21, 10_000)  # timesteps a DDPM can have: below 21, the scaled betas would pass 1


def ddpm_schedules(beta1: float, beta2: float, T: int) -> dict[str, Tensor]:
    """The variance schedule of Ho et al. 2020, section 2, indexed by t = 0 .. T; t = 0 is clean data.

    beta[t] rises linearly from beta1 at t = 1 to beta2 at t = T (beta[0] = 0), and alphabar[t] = prod (1 - beta[1..t]),
    so alphabar[0] = 1. Returns {"beta", "alphabar"}, each float32 [T+1], computed in float64.
    Raises ValueError unless 0 < beta1 <= beta2 < 1 and T >= 1.
    """
    if not (0 < beta1 <= beta2 < 1 and T >= 1):
        raise ValueError(f"need 0 < beta1 <= beta2 < 1 and T >= 1, not beta1={beta1}, beta2={beta2}, T={T}")
    beta = torch.cat([torch.zeros(1, dtype=torch.float64), torch.linspace(beta1, beta2, T, dtype=torch.float64)])
    return {"beta": beta.float(), "alphabar": (1 - beta).cumprod(0).float()}


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep (Vaswani et al. 2017, arXiv:1706.03762, section 3.5) through a linear layer.

    t [B] in (0,1] -> [B, dim].
    """

    def __init__(self, dim: int, n_freqs: int = 32):
        super().__init__()
        freqs = 1000 * torch.exp(-math.log(10_000) * torch.arange(n_freqs) / n_freqs)
        self.register_buffer("freqs", freqs, persistent=False)
        self.linear = nn.Linear(2 * n_freqs, dim)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.freqs
        return self.linear(torch.cat([angles.sin(), angles.cos()], dim=1))


def with_fine_detail(x: Tensor) -> Tensor:
    """x [B,C,H,W] -> [B,5C,H,W]: x, and sinusoids of it in which differences of a grey level are large.

    Fourier features (Kingma et al. 2021, arXiv:2107.00630, appendix C): they tell the last specks of noise from black.
    """
    angles = torch.cat([8 * math.pi * x, 16 * math.pi * x], dim=1)
    return torch.cat([x, angles.sin(), angles.cos()], dim=1)


class ResBlock(nn.Module):
    """Pre-activation residual block; the embedding scales and shifts its second normalisation (FiLM).

    The normalisations have one group: small groups, in channels_last memory, take a CPU longer than a convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(emb_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(1, out_channels, affine=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        nn.init.zeros_(self.conv2.weight)  # the block starts as the identity
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)  # [B, C, 1, 1] each
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(F.silu(h))


class ContextUnet(nn.Module):
    """A U-Net that sees a noisy image, its class and its timestep, and predicts the velocity v.

    All work happens at 14x14 (n_feat channels) and 7x7 (4 n_feat channels): the 28x28 image enters and leaves by
    folding each 2x2 patch of pixels into channels. Time and class share one embedding, which modulates every block.
    Each class also has a map of its own, added at 7x7: what to draw, and where. n_feat is a positive multiple of 8.
    """

    def __init__(self, in_channels: int = 1, n_feat: int = 32, n_classes: int = 10):
        super().__init__()
        self.n_feat, self.n_classes = n_feat, n_classes
        wide, emb_dim = 4 * n_feat, 4 * n_feat
        self.time_emb = TimeEmbedding(emb_dim)
        self.context_emb = nn.Embedding(n_classes + 1, emb_dim)  # the last row is the null class: no condition
        self.emb_mlp = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, emb_dim), nn.SiLU())
        self.context_map = nn.Embedding(n_classes + 1, 7 * 7 * wide)
        nn.init.normal_(self.context_map.weight, std=0.3)

        self.stem = nn.Conv2d(4 * 6 * in_channels, n_feat, 3, padding=1)
        self.enc = ResBlock(n_feat, n_feat, emb_dim)
        self.down = nn.Conv2d(n_feat, wide, 2, stride=2)
        self.mid1 = ResBlock(wide, wide, emb_dim)
        self.mid2 = ResBlock(wide, wide, emb_dim)
        self.up = nn.Conv2d(wide, 4 * n_feat, 1)
        self.dec = ResBlock(2 * n_feat, n_feat, emb_dim)
        self.out_norm = nn.GroupNorm(1, n_feat)
        self.out = nn.Conv2d(n_feat, 4 * in_channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, c: Tensor, t: Tensor, context_mask: Tensor, x0_hat: Tensor | None = None) -> Tensor:
        """The velocity v = sqrt(alphabar) eps - sqrt(1 - alphabar) x0 (Salimans & Ho 2022, section 4), shaped as x.

        x [B, in_channels, 28, 28] noisy image; c [B] int64 class in [0, n_classes); t [B] float in (0, 1], which is
        timestep / n_T; context_mask [B], 1 keeps the condition and 0 drops it; x0_hat, shaped as x, is an earlier
        estimate of the clean image, if there is one, to improve on (self-conditioning, Chen et al. 2022,
        arXiv:2208.04202).
        """
        c = torch.where(context_mask > 0, c, self.n_classes)
        emb = self.emb_mlp(self.time_emb(t) + self.context_emb(c))  # [B, emb_dim]
        x0_hat = torch.zeros_like(x) if x0_hat is None else x0_hat
        h = self.stem(F.pixel_unshuffle(torch.cat([with_fine_detail(x), x0_hat], dim=1), 2))  # [B, n_feat, 14, 14]
        skip = self.enc(h, emb)
        context_map = self.context_map(c).view(len(c), 7, 7, -1).permute(0, 3, 1, 2)
        h = self.down(skip) + context_map  # [B, 4 n_feat, 7, 7]
        h = self.mid2(self.mid1(h, emb), emb)
        h = F.pixel_shuffle(self.up(h), 2)  # [B, n_feat, 14, 14]
        h = self.dec(torch.cat([h, skip], dim=1), emb)
        return F.pixel_shuffle(self.out(F.silu(self.out_norm(h))), 2)


class DDPM(nn.Module):
    """The diffusion process around a network: q(x_t | x_0), the training loss, and sampling.

    nn_model: a ContextUnet. betas: (beta1, beta2) of ddpm_schedules. n_T: number of timesteps, in N_T_RANGE.
    drop_prob: probability in [0,1] that training hides an image's class.
    Images are in [0,1] outside this class and in [-1,1] inside it.
    """

    def __init__(self, nn_model: nn.Module, betas: tuple[float, float], n_T: int, drop_prob: float = 0.1):
        super().__init__()
        self.nn_model = nn_model
        self.betas, self.n_T, self.drop_prob = tuple(betas), n_T, drop_prob
        for name, tensor in ddpm_schedules(*betas, n_T).items():
            self.register_buffer(name, tensor, persistent=False)

    @staticmethod
    def default_betas(n_T: int) -> tuple[float, float]:
        """Ho et al.'s (1e-4, 0.02) for 1000 steps, scaled so that n_T steps end in as pure a noise: alphabar < 1e-4."""
        return 0.1 / n_T, 20 / n_T

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t of Ho et al. 2020, eq. 4, for x0, eps [B,1,28,28] and t [B] int64 in 0 .. n_T."""
        alphabar = self.alphabar[t][:, None, None, None]
        return alphabar.sqrt() * x0 + (1 - alphabar).sqrt() * eps

    def expected_v(self, x_t: Tensor, t: Tensor, x0: Tensor, candidate: Tensor) -> Tensor:
        """The velocity that x_t [B,1,28,28] has on average if it was made from one of the images x0 [M,1,28,28].

        t [B] int64 in 1 .. n_T; candidate [B,M] bool: from which of them it can be, each as likely before x_t is seen.
        Bayes' rule weighs each by q(x_t | x0) (Stable Target Field, Xu et al. 2023, arXiv:2302.00670, section 3). In
        fp32, also under autocast: bf16 would not tell the candidates apart.
        """
        with torch.autocast(x_t.device.type, enabled=False):
            alphabar, x_t_flat, x0 = self.alphabar[t][:, None], x_t.flatten(1), x0.flatten(1)
            signal, noise = alphabar.sqrt(), (1 - alphabar).sqrt()
            log_q = (signal * (x_t_flat @ x0.mT) - alphabar * x0.square().sum(1) / 2) / noise**2  # up to a constant
            posterior = log_q.masked_fill(~candidate, -math.inf).softmax(1)  # [B, M]
            return ((signal * x_t_flat - posterior @ x0) / noise).view_as(x_t)

    def forward(self, x: Tensor, c: Tensor, others: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Training loss, a scalar, for images x [B,1,28,28] in [0,1] of classes c [B] int64.

        It is the mean squared error on v; Ho et al. 2020, eq. 14, has it on eps, which weighs noisy timesteps less.
        A noisy image could have come from many digits, so its target is not the v of the one it was made from but the
        mean over all that it could have come from as far as the network can tell: those of its class (of any, where the
        class is hidden) in this batch and in others, which are more images [M,1,28,28] of the data set and their
        classes [M]. The best network is the same, and the gradient has far less noise.
        One image in twenty, unless it is nearly clean, is asked for as the class of its neighbour in the batch: the
        mean over that class tells how to lead a drawing back that begins to look like another digit.
        One timestep in five is uniform over 1 .. n_T, as in eq. 14; the others are logit-normal (Esser et al. 2024,
        arXiv:2403.03206, section 3.1) around 0.38 n_T, where the strokes of a digit are decided. Half of the images
        come with an estimate of x0, as they will when sampling: the network's own, made without gradients.
        """
        B, device = len(x), x.device
        uniform, middle = torch.rand(B, device=device), torch.sigmoid(0.8 * torch.randn(B, device=device) - 0.5)
        t = (torch.where(torch.rand(B, device=device) < 0.2, uniform, middle) * self.n_T).long() + 1
        x_t = self.add_noise(2 * x - 1, t, torch.randn_like(x))
        context_mask = torch.rand(B, device=device) >= self.drop_prob
        all_x, all_c = (x, c) if others is None else (torch.cat([x, others[0]]), torch.cat([c, others[1]]))
        c = torch.where((torch.rand(B, device=device) < 1 / 20) & (t > 0.15 * self.n_T), c.roll(1), c)
        v = self.expected_v(x_t, t, 2 * all_x - 1, (c[:, None] == all_c) | ~context_mask[:, None])
        time, some = t / self.n_T, slice((B + 1) // 2)
        x0_hat = torch.zeros_like(x_t)
        with torch.no_grad():
            v_hat = self.nn_model(x_t[some], c[some], time[some], context_mask[some]).float()
            x0_hat[some] = predict_x0(x_t[some], v_hat, self.alphabar[t[some]][:, None, None, None])
        return F.mse_loss(self.nn_model(x_t, c, time, context_mask, x0_hat).float(), v)

    def guided_v(self, x_t: Tensor, c: Tensor, t: int, guide_w: float, x0_hat: Tensor | None = None) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022, eq. 6), v = (1+w) v_cond - w v_null; w = 0 skips the null half.

        The paper's line is in eps; at a given x_t, v is linear in eps, so it is the same line in v. A CPU that has bf16
        multiplies in it: a quarter less time, and the same digits to the eye.
        """
        keep = torch.ones(len(x_t), device=x_t.device)
        time = keep * (t / self.n_T)
        x0_hat = torch.zeros_like(x_t) if x0_hat is None else x0_hat
        with torch.autocast("cpu", torch.bfloat16, enabled=hardware_has_bf16(torch.device("cpu"))):
            if guide_w == 0:
                return self.nn_model(x_t, c, time, keep, x0_hat).float()
            x_t, x0_hat, c, time = (torch.cat([a, a]) for a in (x_t, x0_hat, c, time))
            v_cond, v_null = self.nn_model(x_t, c, time, torch.cat([keep, 0 * keep]), x0_hat).float().chunk(2)
        return (1 + guide_w) * v_cond - guide_w * v_null

    @torch.inference_mode()
    def denoise(
        self, c: Tensor, guide_w: float = GUIDE_W, steps: int | None = None, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Yields steps + 1 image batches [N,1,28,28] in [0,1]: pure noise x_T first, the finished digits x_0 last.

        c [N] int64 labels; guide_w >= 0; generator: on the CPU, so that a seed means the same digits on every device.
        All n_T steps (the default) are DDPM's ancestral sampling (Ho et al. 2020, algorithm 2). Fewer start at n_T, are
        spaced as squares (Song et al. 2020, appendix D.2) and add no fresh noise: DDIM (eq. 12 with sigma = 0). One
        line makes both second order: SDE-DPM-Solver++ 2M and DPM-Solver++ 2M (Lu et al. 2022, algorithm 2).
        Guidance acts in the interval GUIDED alone (Kynkäänniemi et al. 2024, arXiv:2404.07724): noisier images lose
        variety by it and cleaner ones gain nothing, so that work is saved. Each step after the first hands the network
        the x0 of the step before (self-conditioning).
        Raises ValueError unless 1 <= steps <= n_T.
        """
        steps = self.n_T if steps is None else steps
        if not 1 <= steps <= self.n_T:
            raise ValueError(f"steps must be in 1 .. {self.n_T}, not {steps}")
        ancestral = steps == self.n_T
        times = [max(i, round(self.n_T * (i / steps) ** 2)) for i in range(steps, -1, -1)]  # n_T > ... > 0
        alphabar, device = self.alphabar.tolist(), self.alphabar.device
        log_snr = [math.log(a / (1 - a)) / 2 if a < 1 else math.inf for a in alphabar]  # lambda of DPM-Solver

        def noise() -> Tensor:
            pinned = device.type == "cuda"  # so that the host does not wait for the copy
            return torch.randn(len(c), 1, 28, 28, generator=generator, pin_memory=pinned).to(device, non_blocking=True)

        x = noise()
        yield to_image(x)
        x0_before = h_before = None
        for t, s in itertools.pairwise(times):  # from timestep t to the cleaner timestep s
            a_t, a_s = alphabar[t], alphabar[s]
            v = self.guided_v(x, c, t, guide_w if GUIDED[0] < t / self.n_T <= GUIDED[1] else 0, x0_before)
            x0 = predict_x0(x, v, a_t)
            h, target = log_snr[s] - log_snr[t], x0
            if x0_before is not None and s > 0:  # second order: extrapolate x0 half a step on
                target = (x0 + (x0 - x0_before) * h / (2 * h_before)).clamp(-X0_LIMIT, X0_LIMIT)
            x0_before, h_before = x0, h
            eps = (x - a_t**0.5 * target) / (1 - a_t) ** 0.5  # the noise that goes with the clipped x0
            var = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s) if ancestral else 0.0  # Ho et al. 2020, eq. 7; 0 at s = 0
            x = a_s**0.5 * target + max(1 - a_s - var, 0) ** 0.5 * eps  # Song et al. 2020, eq. 12
            if var > 0:
                x = x + var**0.5 * noise()
            yield to_image(x)

    def sample(
        self, c: Tensor, guide_w: float = GUIDE_W, steps: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The finished digits of `denoise`, [N,1,28,28] in [0,1]."""
        for x in self.denoise(c, guide_w, steps, generator):
            pass
        return x


def predict_x0(x_t: Tensor, v: Tensor, alphabar: Tensor | float) -> Tensor:
    """The clean image that x_t and its velocity v imply (Salimans & Ho 2022, appendix D), clipped to +-X0_LIMIT."""
    return (alphabar**0.5 * x_t - (1 - alphabar) ** 0.5 * v).clamp(-X0_LIMIT, X0_LIMIT)


def to_image(x: Tensor) -> Tensor:
    """From the model's [-1,1] to images in [0,1]; noise that lies outside is cut off."""
    return ((x + 1) / 2).clamp(0, 1)


# ---- The weights file --------------------------------------------------------------------------------------------


class WeightsError(Exception):
    """A weights file that cannot be used; the message is one line that names it and says what to do."""


def save_weights(path: str | Path, ddpm: DDPM) -> None:
    """Writes {"config": what rebuilds the DDPM, "model": state_dict of its network}, atomically. Raises OSError."""
    net = ddpm.nn_model
    config = {
        "n_feat": net.n_feat, "n_classes": net.n_classes,
        "betas": ddpm.betas, "n_T": ddpm.n_T, "drop_prob": ddpm.drop_prob,
    }  # fmt: skip
    model = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    write_state(path, {"config": config, "model": model})


def load_ddpm(path: str | Path, device: str | torch.device = "cpu") -> DDPM:
    """The DDPM that save_weights wrote, in evaluation mode on device. Raises WeightsError, whatever the file holds."""
    state = read_state(path)
    try:
        state = dict(state)  # a file of torch.save can hold anything
        config, model = state["config"], state["model"]
        n_feat, n_classes = config["n_feat"], config["n_classes"]
        if not N_T_RANGE[0] <= config["n_T"] <= N_T_RANGE[1]:
            raise ValueError(config["n_T"])
        claimed = (4 * n_feat, 4 * n_feat, 3, 3), (n_classes + 1, 4 * n_feat)
        if (model["mid1.conv1.weight"].shape, model["context_emb.weight"].shape) != claimed:
            raise ValueError(claimed)  # a network of a size that the file only claims takes no memory
        if not all(tensor.isfinite().all() for tensor in model.values()):
            raise ValueError("not finite")
        net = ContextUnet(n_feat=n_feat, n_classes=n_classes)
        net.load_state_dict(model)
        ddpm = DDPM(net, config["betas"], config["n_T"], config["drop_prob"])
    except Exception:  # keys, types and sizes can each be wrong in many ways, and all mean the same to the user
        raise WeightsError(
            f"{path} does not hold a network of this architecture; train one: python train_ddpm.py"
        ) from None
    return ddpm.to(device).eval()


def write_state(path: str | Path, state: dict) -> None:
    """torch.save, atomically. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def read_state(path: str | Path) -> dict:
    """What write_state wrote, on the CPU. Runs no code from the file. Raises WeightsError."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
            folder = any(entry.external_attr & 0x10 for entry in archive.infolist())  # torch.load would not read these
        if damaged is None and not folder:
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; make it with: python train_ddpm.py") from None
    except pickle.UnpicklingError:
        raise WeightsError(f"{path} holds more than weights and could run code, so it was not loaded") from None
    except Exception as error:  # whatever a damaged archive makes zipfile, zlib or torch raise
        raise WeightsError(f"{path} is not a readable weights file ({type(error).__name__}); get it again") from None
    raise WeightsError(f"{path} is damaged; get it again")


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a file that at any moment, even if the process is killed, is the old one or the new. Raises OSError."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# ---- What the scripts share ------------------------------------------------------------------------------------------


def image_grid(images: Tensor, columns: int, scale: int = 1) -> np.ndarray:
    """Images [N,1,28,28] in [0,1] -> uint8 [height, width], the geometry of torchvision's make_grid(padding=2).

    Each pixel becomes scale x scale. A last row that is short is filled with black.
    """
    tiles = (images[:, 0] * 255).round().to(torch.uint8).cpu()
    columns = min(columns, len(tiles))
    tiles = torch.cat([tiles, tiles.new_zeros(-len(tiles) % columns, *tiles.shape[1:])])
    tiles = F.pad(tiles, (0, 2, 0, 2)).unflatten(0, (-1, columns))  # [rows, columns, 30, 30]
    grid = F.pad(tiles.transpose(1, 2).flatten(2).flatten(0, 1), (2, 0, 2, 0))
    return grid.numpy().repeat(scale, axis=0).repeat(scale, axis=1)


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """uint8 [height, width] -> a grey PNG, atomically. Raises OSError."""
    from PIL import Image  # not needed to train or to film

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def hardware_has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
    return device.type == "cpu" and bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))


def keep_freed_memory() -> None:
    """Has glibc keep the memory of freed tensors, rather than hand it back to the kernel, which clears each page anew.

    On a CPU that is thousands of page faults a step. Does nothing where the C library is another one.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def show_progress(text: str) -> None:
    """Replaces the line that a person watches; nothing where stderr is no terminal. An empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: an int or a float in [low, high]; anything else is an error that states the range."""
    allowed = f"{'a whole number' if kind is int else 'a number'} " + (
        f"from {low} to {high}" if high < math.inf else f"of at least {low}"
    )

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:  # also true for NaN
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text!r}")
        return value

    return parse


def pick_device(name: str) -> torch.device:
    """An argparse type: a device that works here; "auto" is the GPU (or the like) if there is one, else the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(
            f"must be auto, or a device of this machine such as cpu, not {name!r}"
        ) from None
