"""The mathematics of ddpm_model.py, against the equations of the papers, closed forms and Hugging Face diffusers.

The names are those of Ho et al. 2020 (arXiv:2006.11239): beta[t], alpha[t], alphabar[t], sigma, eps, z, t = 1 .. T.
After another network, schedule, distribution of t or estimate (eps in place of v), change the section "What describes
the model". Nothing here depends on IMAGE_SHAPE or on the layers of the network.
"""

import itertools
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

import ddpm_model
from ddpm_model import DDPM, GUIDANCE_INTERVAL, IMAGE_SHAPE, UserError, ddpm_schedule, to_image
from tests.conftest import N_CLASSES, small_ddpm

T = 40
alphabar = ddpm_schedule(T).double()
alpha = torch.cat([torch.ones(1), alphabar[1:] / alphabar[:-1]])
beta = 1 - alpha

CLASSES = torch.arange(N_CLASSES)
KEEP = torch.ones(N_CLASSES, dtype=torch.bool)  # context_mask
HIDE = ~KEEP
SHAPE = (N_CLASSES, *IMAGE_SHAPE)
GUIDED = [t for t in range(1, T + 1) if GUIDANCE_INTERVAL[0] < t / T <= GUIDANCE_INTERVAL[1]]
MEANS = torch.linspace(-0.3, 0.3, N_CLASSES)[:, None, None, None].expand(SHAPE)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_forward_is_algorithm_1():
    """In eps, as printed, with the x_t, the t and the context_mask that the network was given."""
    ddpm, calls = recorded(small_ddpm().nn_model, drop_prob=0.5)
    x = torch.rand(64, *IMAGE_SHAPE)
    c = torch.arange(64) % N_CLASSES
    loss = ddpm(x, c)
    [(x_t, t, context_mask)] = calls
    x_0 = 2 * x - 1
    abar = alphabar[t][:, None, None, None]
    eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
    eps_hat = to_eps(ddpm.nn_model(x_t, c, t / T, context_mask), x_t, abar)
    expected = (EPS_WEIGHT[t][:, None, None, None] * (eps - eps_hat).square()).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_denoise_is_algorithm_2():
    """In eps, as printed, with sigma^2 = tilde beta. No x_0 of this network is out of range, so none is clipped."""
    ddpm, calls = recorded(Gaussian(MEANS, std=0.1))
    timesteps, images = zip(*ddpm.denoise(CLASSES, guide_w=0, generator=seed(1)))
    assert timesteps == (*range(T, -1, -1),)

    generator = seed(1)
    x = torch.randn(SHAPE, generator=generator).double()
    for t in range(T, 0, -1):
        x_t = calls[T - t][0]
        torch.testing.assert_close(x_t, x.float(), rtol=0, atol=ROUNDING)
        assert torch.equal(images[T - t], to_image(x_t))
        z = torch.randn(SHAPE, generator=generator) if t > 1 else 0
        sigma = ((1 - alphabar[t - 1]) / (1 - alphabar[t]) * beta[t]).sqrt()
        eps = eps_theta(ddpm, x, t, KEEP)
        x = 1 / alpha[t].sqrt() * (x - (1 - alpha[t]) / (1 - alphabar[t]).sqrt() * eps) + sigma * z
    torch.testing.assert_close(images[T], to_image(x).float(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("steps", "eta", "w"), [(10, 0, 0), (10, 0.5, 0), (10, 1, 2), (T, 0, 0.5), (1, 1, 2)])
def test_denoise_is_equation_12_of_ddim(steps, eta, w):
    """Song et al. 2020 (arXiv:2010.02502), eq. 12 and 16: any number of steps; eta = 0 uses no noise but x_T."""
    ddpm, calls = recorded(Gaussian(MEANS, std=0.1))
    timesteps, images = zip(*ddpm.denoise(CLASSES, guide_w=w, steps=steps, eta=eta, generator=seed(1)))
    visited = {t[0].item(): x_t[:N_CLASSES] for x_t, t, _ in calls}
    assert [*visited, 0] == ddpm.timesteps(steps) == [*timesteps]
    n_guided = sum(t in GUIDED for t in visited) if w > 0 else 0
    assert sum(len(x_t) for x_t, _, _ in calls) == N_CLASSES * (len(visited) + n_guided)  # no estimate is wasted

    generator = seed(1)
    x = torch.randn(SHAPE, generator=generator).double()
    for t, s in itertools.pairwise([*visited, 0]):
        torch.testing.assert_close(visited[t], x.float(), rtol=0, atol=ROUNDING)
        eps = eps_theta(ddpm, x, t, KEEP)
        if t in GUIDED:
            eps = (1 + w) * eps - w * eps_theta(ddpm, x, t, HIDE)  # Ho & Salimans 2022 (arXiv:2207.12598), eq. 6
        x_0 = (x - (1 - alphabar[t]).sqrt() * eps) / alphabar[t].sqrt()
        x_0 = x_0.clamp(-1, 1)  # hardly ever needed, but then eps changes too
        eps = (x - alphabar[t].sqrt() * x_0) / (1 - alphabar[t]).sqrt()
        sigma = eta * ((1 - alphabar[s]) / (1 - alphabar[t])).sqrt() * (1 - alphabar[t] / alphabar[s]).sqrt()
        z = torch.randn(SHAPE, generator=generator)
        x = alphabar[s].sqrt() * x_0 + (1 - alphabar[s] - sigma**2).sqrt() * eps + sigma * z
    torch.testing.assert_close(images[-1], to_image(x).float(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("x_0", [-1, 1])
def test_clipped_steps_are_equation_7(x_0):
    """Where the network puts x_0 at -3 or 3, each step is a draw from q(x_{t-1} | x_t, x_0) with x_0 at -1 or 1."""
    ddpm, calls = recorded(Gaussian(torch.full(SHAPE, 3.0 * x_0), std=0))
    ddpm.sample(CLASSES, guide_w=0, generator=seed(1))

    generator = seed(1)
    x = torch.randn(SHAPE, generator=generator).double()
    for t in range(T, 0, -1):
        torch.testing.assert_close(calls[T - t][0], x.float(), rtol=0, atol=ROUNDING)
        of_x_0 = alphabar[t - 1].sqrt() * beta[t] / (1 - alphabar[t])
        of_x_t = alpha[t].sqrt() * (1 - alphabar[t - 1]) / (1 - alphabar[t])
        sigma = ((1 - alphabar[t - 1]) / (1 - alphabar[t]) * beta[t]).sqrt()
        x = of_x_0 * x_0 + of_x_t * x + sigma * torch.randn(SHAPE, generator=generator)


def diffusers_scheduler(name: str):
    """A scheduler of Hugging Face diffusers with our betas. Its timestep t - 1 is our t."""
    scheduler = getattr(pytest.importorskip("diffusers"), name)
    return scheduler(T, trained_betas=beta[1:].numpy(), prediction_type="v_prediction", clip_sample=True)


@pytest.mark.parametrize(("name", "eta"), [("DDIM", 0), ("DDIM", 0.5), ("DDIM", 1), ("DDPM", 1)])
def test_every_x_t_is_that_of_diffusers(name, eta):
    scheduler = diffusers_scheduler(f"{name}Scheduler")
    scheduler.set_timesteps(T)
    options = {"eta": eta, "use_clipped_model_output": True} if name == "DDIM" else {}
    ddpm, calls = recorded(small_ddpm().nn_model)
    ddpm.sample(CLASSES, guide_w=0, eta=eta, generator=seed(1))

    generator = seed(1)
    x = torch.randn(SHAPE, generator=generator)
    for t in range(T, 0, -1):
        torch.testing.assert_close(calls[T - t][0], x, rtol=0, atol=5 * ROUNDING)  # both are float32
        v = ddpm.nn_model(x, CLASSES, torch.full((N_CLASSES,), t / T), KEEP).detach()
        x = scheduler.step(v, t - 1, x, generator=generator, **options).prev_sample


def test_forward_makes_the_x_t_and_v_of_diffusers():
    scheduler = diffusers_scheduler("DDPMScheduler")
    ddpm, calls = recorded(Zero())  # so the loss is the mean of v^2
    x = torch.rand(N_CLASSES, *IMAGE_SHAPE)
    torch.manual_seed(1)
    ddpm(torch.full_like(x, 0.5), CLASSES)  # grey: x_0 = 0, and x_t is noise alone
    torch.manual_seed(1)
    loss = ddpm(x, CLASSES)
    (noise, t, _), (x_t, _, _) = calls
    eps = noise / (1 - alphabar[t][:, None, None, None]).sqrt().float()
    x_0 = 2 * x - 1
    torch.testing.assert_close(x_t, scheduler.add_noise(x_0, eps, t - 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, scheduler.get_velocity(x_0, eps, t - 1).square().mean(), rtol=1e-5, atol=0)


# ---- What describes the model: change it here too. Below it, what the tests share. -----------------------------------
# For eps in place of v: ROUNDING, EPS_WEIGHT, to_eps, Gaussian, and above, prediction_type and get_velocity.

ROUNDING = 2e-5  # of float32. With eps it is 1e-3: dividing by sqrt(alphabar[T]) = 1e-4 costs four digits

T_PROBABILITIES = torch.full((T,), 1 / T, dtype=torch.float64)  # how often training draws t = 1 .. T
EPS_WEIGHT = 1 / alphabar  # the loss is the squared error in v; one in eps has this weight in it
STD_ERRORS = [(400, 1, 0.03), (400, 0, 0.01), (200, 0, 0.02), (50, 0, 0.05)]  # (steps, eta, relative error of the std)


def cosine(t: int, n_T: int) -> float:
    """f(t) of Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17, with s = 0.008."""
    return math.cos((t / n_T + 0.008) / (1 + 0.008) * math.pi / 2) ** 2


def to_eps(v: Tensor, x_t: Tensor, abar: Tensor) -> Tensor:
    """The eps that the network's v stands for: x_t and v are a rotation of x_0 and eps."""
    return (1 - abar).sqrt() * x_t + abar.sqrt() * v


class Zero(nn.Module):
    n_feat = 1
    n_classes = N_CLASSES

    def forward(self, x: Tensor, c: Tensor, t: Tensor, context_mask: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Gaussian(Zero):
    """The best possible network for pixels x_0 ~ N(mean[c], std^2), or N(0, std^2) where the class is hidden."""

    def __init__(self, mean: Tensor, std: float, n_T: int = T):
        super().__init__()
        self.mean = mean  # [N_CLASSES, *IMAGE_SHAPE] in [-1, 1]
        self.std = std
        self.n_T = n_T
        self.alphabar = ddpm_schedule(n_T)

    def forward(self, x: Tensor, c: Tensor, t: Tensor, context_mask: Tensor) -> Tensor:
        abar = self.alphabar[(t * self.n_T).round().long()][:, None, None, None]
        mean = self.mean[c] * context_mask[:, None, None, None]
        gain = abar.sqrt() * self.std**2 / (abar * self.std**2 + 1 - abar)
        x_0 = mean + gain * (x - abar.sqrt() * mean)  # E[x_0 | x_t]
        return (abar.sqrt() * x - x_0) / (1 - abar).sqrt()


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def recorded(net: nn.Module, drop_prob: float = 0.1) -> tuple[DDPM, list[tuple[Tensor, Tensor, Tensor]]]:
    """A DDPM, and a list that grows by (x_t, t as int64, context_mask) whenever its network is asked."""
    calls = []

    def remember(net, inputs):
        x, _, t, context_mask = inputs
        calls.append((x, (t * T).round().long(), context_mask))

    net.register_forward_pre_hook(remember)
    return DDPM(net, T, drop_prob), calls


def eps_theta(ddpm: DDPM, x_t: Tensor, t: int, context_mask: Tensor) -> Tensor:
    """The network's eps for one image of each class."""
    v = ddpm.nn_model(x_t, CLASSES, torch.full((N_CLASSES,), t / T), context_mask)
    return to_eps(v, x_t, alphabar[t])


# ---- Schedule, training, network, sampling, devices ------------------------------------------------------------------


@pytest.mark.parametrize("n_T", [1, 2, 40, 400, 1000, 10_000])
def test_schedule_is_the_closed_form_and_ends_in_noise(n_T):
    expected = [cosine(t, n_T) / cosine(0, n_T) for t in range(n_T)] + [1e-8]
    torch.testing.assert_close(ddpm_schedule(n_T), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("drop_prob", [0, 0.1, 0.9])
def test_what_training_draws(drop_prob):
    """Each t as often as it should be, the noise of eq. 4 at each t, and a hidden class with drop_prob."""
    ddpm, calls = recorded(Zero(), drop_prob)
    image = torch.rand(IMAGE_SHAPE)
    ddpm(image.expand(10_000, *IMAGE_SHAPE), torch.zeros(10_000, dtype=torch.int64))
    [(x_t, t, context_mask)] = calls
    counts = torch.bincount(t, minlength=T + 1)
    expected = 10_000 * T_PROBABILITIES
    assert counts[0] == 0
    assert ((counts[1:] - expected).abs() < 5 * expected.sqrt()).all()
    for step in range(1, T + 1):
        noise = x_t[t == step].double() - alphabar[step].sqrt() * (2 * image - 1)
        variance = 1 - alphabar[step]
        assert noise.mean(dim=0).abs().max() < 6 * (variance / len(noise)).sqrt()  # six standard errors
        assert noise.square().mean().item() == pytest.approx(variance.item(), rel=6 * (2 / noise.numel()) ** 0.5)
    error = 5 * (drop_prob * (1 - drop_prob) / 10_000) ** 0.5
    assert context_mask.double().mean().item() == pytest.approx(1 - drop_prob, abs=error)


def test_network_sees_the_image_and_its_class_alone():
    net = small_ddpm().nn_model
    x = torch.randn(1, *IMAGE_SHAPE).expand(SHAPE)
    t = torch.full((N_CLASSES,), 0.5)
    hidden = net(x, CLASSES, t, HIDE)
    kept = net(x, CLASSES, t, KEEP)
    rounding = 1e-5 * kept.abs().max()
    assert ((hidden - hidden[0]).abs() < rounding).all()  # a hidden class does not count
    for a, b in itertools.combinations([*kept, hidden[0]], 2):
        assert (a - b).abs().max() > 10 * rounding
    others = torch.randn(SHAPE)  # nor do the other images of a batch
    others[0] = x[0]
    assert ((net(others, CLASSES, t, KEEP)[0] - kept[0]).abs() < rounding).all()


@pytest.mark.parametrize(("steps", "eta", "tolerance"), STD_ERRORS)
def test_sampling_a_gaussian_gives_its_mean_and_variance(steps, eta, tolerance):
    """DDIM is a method of first order: half the steps, twice the error."""
    ddpm = DDPM(Gaussian(MEANS / 3, std=0.2, n_T=400), 400)
    c = CLASSES.repeat(30)
    error = 2 * ddpm.sample(c, guide_w=0, steps=steps, eta=eta) - 1 - MEANS[c] / 3
    assert error.mean().item() == pytest.approx(0, abs=5 * 0.2 / error.numel() ** 0.5)
    assert error.std().item() == pytest.approx(0.2, rel=tolerance)


@pytest.mark.parametrize("n_T", [1, 2, 40, 400])
def test_timesteps_are_spaced_quadratically(n_T):
    """tau_k = T (k / n)^2 (DDIM, appendix D.2), rounded. Where that is less than k, it is k, so none comes twice."""
    ddpm = DDPM(Zero(), n_T)
    for n in range(1, n_T + 1):
        tau = ddpm.timesteps(n)[::-1]
        assert len(tau) == n + 1 and all(s < t for s, t in itertools.pairwise(tau))
        assert all(abs(tau[k] - max(k, n_T * (k / n) ** 2)) < 0.501 for k in range(n + 1))


def test_without_drop_prob_w_does_nothing():
    """The null class was never trained."""
    ddpm = small_ddpm(n_T=T, drop_prob=0)
    digits = ddpm.sample(CLASSES, guide_w=2, generator=seed(1))
    assert torch.equal(digits, ddpm.sample(CLASSES, guide_w=0, generator=seed(1)))


def test_arguments():
    """Impossible ones are an error. Classes come in any form."""
    ddpm = small_ddpm(n_T=T)
    for steps in (0, -1, T + 1):
        with pytest.raises(UserError, match=rf"steps must be in 1 \.\. {T}, not {steps}"):
            ddpm.sample(0, steps=steps)
    for eta, w in ((-0.1, 0), (1.1, 0), (math.nan, 0), (1, -0.1), (1, math.nan), (1, math.inf)):
        with pytest.raises(UserError, match=rf"eta must be in 0 \.\. 1, and guide_w 0 or more, not {eta} and {w}$"):
            ddpm.sample(0, eta=eta, guide_w=w)
    numbers = rf"classes must be whole numbers in 0 \.\. {N_CLASSES - 1}, not"
    for c, wrong in ((N_CLASSES, N_CLASSES), (-1, -1), ([0, 3.5, -2], 3.5), (np.array([0, math.nan]), "nan"), ([], "")):
        with pytest.raises(UserError, match=rf"{numbers} \[{wrong}\]$"):
            ddpm.sample(c)
    with pytest.raises(AttributeError, match="n_feat"):  # at once, not at the first save
        DDPM(nn.Identity())
    expected = ddpm.sample(torch.tensor([1]), steps=2, generator=seed(1))
    for c in (1, [1], np.array([1]), np.int64(1), torch.tensor(1), torch.tensor([1], dtype=torch.int32), range(1, 2)):
        assert torch.equal(ddpm.sample(c, steps=2, generator=seed(1)), expected)


def test_what_is_nearly_black_becomes_black():
    """White is not touched: in MNIST it is 252 to 254."""
    x = torch.tensor([-5, -1, -0.97, -0.95, 0, 0.95, 0.97, 0.99, 1, 5])
    torch.testing.assert_close(to_image(x), torch.tensor([0, 0, 0, 0.025, 0.5, 0.975, 0.985, 0.995, 1, 1]))


@pytest.mark.parametrize("size", [(28, 28), (40, 28), (28, 40)])
@pytest.mark.parametrize(("n", "columns"), [(1, 1), (9, 3), (7, 3), (10, 5), (2, 5)])
def test_grid_has_the_geometry_of_torchvision(n, columns, size):
    images = torch.rand(n, 1, *size)
    expected = make_grid(images, nrow=columns)[0]
    if n == 1:
        expected = nn.functional.pad(expected, (2, 2, 2, 2))  # make_grid gives a single image no border
    expected = (expected * 255).round().byte().numpy()
    assert np.array_equal(np.array(ddpm_model.image_grid(images, columns)), expected)
    scaled = np.array(ddpm_model.image_grid(images, columns, scale=3))
    assert np.array_equal(scaled, expected.repeat(3, axis=0).repeat(3, axis=1))


def test_devices_are_not_mixed_and_the_cpu_draws_the_noise_of_sampling():
    """A seed means the same noise on every device: both leave the generator in the same state. No gradient is kept."""
    ddpm = small_ddpm(n_T=T)
    on_cpu = seed(1)
    ddpm.sample(CLASSES, guide_w=1, steps=10, generator=on_cpu)
    values = ddpm.alphabar.tolist()
    ddpm.to("meta")  # has no values, but an operation on two devices fails as it does with a GPU
    ddpm.alphabar.tolist = lambda: values
    on_meta = seed(1)
    for _, x in ddpm.denoise(CLASSES, guide_w=1, steps=10, generator=on_meta):
        assert x.device.type == "meta" and not x.requires_grad
    assert torch.equal(on_meta.get_state(), on_cpu.get_state())
    ddpm(torch.rand(SHAPE, device="meta"), CLASSES.to("meta")).backward()


def test_bf16_stays_inside_the_network():
    ddpm = DDPM(Zero(), T)
    x = torch.rand(SHAPE)
    expected = ddpm.sample(CLASSES, generator=seed(1))
    ddpm.nn_model.register_forward_hook(lambda net, inputs, v: v.bfloat16())  # a zero is exact in bf16
    with torch.autocast("cpu", torch.bfloat16):
        assert ddpm(x, CLASSES).dtype == torch.float32
        assert torch.equal(ddpm.sample(CLASSES, generator=seed(1)), expected)


@pytest.mark.parametrize("name", ["meta", "hpu", "privateuseone", "xla", "quantum", "cuda:99", ""])
def test_device_that_is_not_here_is_an_error(name):
    with pytest.raises(UserError, match=f"cannot use {name}: .+"):
        ddpm_model.pick_device(name)


@pytest.mark.parametrize(("gpus", "expected"), [(["cuda", "mps"], "cuda"), (["mps"], "mps"), ([], "cpu")])
def test_auto_takes_a_gpu_that_works(monkeypatch, gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in gpus)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(*size))  # works on any device
    assert ddpm_model.pick_device("auto") == torch.device(expected)


def test_gpu_that_does_not_work(monkeypatch, capsys):
    """auto is then the CPU and says why. A GPU that was asked for is an error with the first line of torch's text."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", Mock(side_effect=RuntimeError("CUDA out of memory. Tried\nto")))
    assert ddpm_model.pick_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err == "warning: the CPU is used, not the GPU: CUDA out of memory. Tried\n"
    with pytest.raises(UserError, match=r"cannot use cuda: CUDA out of memory\. Tried$"):
        ddpm_model.pick_device("cuda")
