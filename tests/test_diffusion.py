"""The mathematics of ddpm_model.py, against the equations of the papers and against closed forms.

The names are those of Ho et al. 2020 (arXiv:2006.11239): beta[t], alpha[t], alphabar[t], sigma, eps, z, t = 1 .. T.
The networks are defined below the tests that read like the papers.
"""

import argparse
import itertools
import math
import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm_model import (
    DDPM,
    GUIDANCE_INTERVAL,
    IMAGE_SHAPE,
    N_CLASSES,
    ContextUnet,
    UserError,
    ddpm_schedule,
    image_grid,
    pick_device,
    to_image,
)

T = 40
alphabar = ddpm_schedule(T).double()
alpha = torch.cat([torch.ones(1), alphabar[1:] / alphabar[:-1]])
beta = 1 - alpha

CLASSES = torch.arange(N_CLASSES)
KEEP = torch.ones(N_CLASSES, dtype=torch.bool)  # context_mask
HIDE = ~KEEP
MEANS = torch.linspace(-0.3, 0.3, N_CLASSES)[:, None, None, None].expand(N_CLASSES, *IMAGE_SHAPE)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- The algorithms, as printed --------------------------------------------------------------------------------------


def test_forward_is_algorithm_1():
    """In eps, as printed. Equal errors in v and in eps differ by the weight 1 / alphabar[t]."""
    ddpm = small_ddpm(drop_prob=0.5)
    x = torch.rand(64, *IMAGE_SHAPE)
    c = torch.arange(64) % N_CLASSES

    torch.manual_seed(1)
    x_0 = 2 * x - 1
    t = draw_timesteps(64)
    eps = torch.randn(64, *IMAGE_SHAPE)
    context_mask = torch.rand(64) >= 0.5

    abar = alphabar[t][:, None, None, None]
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    v = ddpm.nn_model(x_t.float(), c, t / T, context_mask)
    eps_hat = (1 - abar).sqrt() * x_t + abar.sqrt() * v
    loss = ((eps - eps_hat).square() / abar).mean()

    torch.manual_seed(1)
    torch.testing.assert_close(ddpm(x, c).double(), loss, rtol=1e-5, atol=0)


def test_denoise_is_algorithm_2():
    """In eps, as printed, with sigma^2 = tilde beta. No x_0 of this network is out of range, so none is clipped."""
    ddpm = DDPM(Gaussian(MEANS, std=0.1), T)
    c = CLASSES
    images = []
    calls = network_calls(ddpm, lambda: images.extend(ddpm.denoise(c, guide_w=0, generator=seed(1))))

    generator = seed(1)
    x = torch.randn(N_CLASSES, *IMAGE_SHAPE, generator=generator).double()
    for t in range(T, 0, -1):
        x_t = calls[T - t][0]
        torch.testing.assert_close(x_t, x.float(), rtol=0, atol=2e-5)
        assert torch.equal(images[T - t], to_image(x_t))
        z = torch.randn(N_CLASSES, *IMAGE_SHAPE, generator=generator) if t > 1 else 0
        sigma = ((1 - alphabar[t - 1]) / (1 - alphabar[t]) * beta[t]).sqrt()
        eps = eps_theta(ddpm, x, c, t, KEEP)
        x = 1 / alpha[t].sqrt() * (x - (1 - alpha[t]) / (1 - alphabar[t]).sqrt() * eps) + sigma * z
    torch.testing.assert_close(images[T], to_image(x).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("steps", "eta", "w"), [(T, 0, 0), (10, 0, 0), (10, 1, 0), (10, 0.5, 0), (T, 1, 2), (1, 1, 2)])
def test_denoise_is_equation_12_of_ddim(steps, eta, w):
    """Song et al. 2020 (arXiv:2010.02502), eq. 12 and 16: any number of steps; eta = 0 uses no noise but x_T."""
    ddpm = DDPM(Gaussian(MEANS, std=0.1), T)
    c = CLASSES
    calls = network_calls(ddpm, lambda: ddpm.sample(c, guide_w=w, steps=steps, eta=eta, generator=seed(1)))
    assert all(
        torch.equal(half, x[:N_CLASSES]) for x, *_ in calls for half in x.split(N_CLASSES)
    )  # with guidance, both halves
    visited = {t[0].item(): x[:N_CLASSES] for x, _, t, _ in calls}
    assert len(visited) == steps

    generator = seed(1)
    x = torch.randn(N_CLASSES, *IMAGE_SHAPE, generator=generator).double()
    for t, s in itertools.pairwise([*visited, 0]):
        torch.testing.assert_close(visited[t], x.float(), rtol=0, atol=2e-5)
        eps = eps_theta(ddpm, x, c, t, KEEP)
        if GUIDANCE_INTERVAL[0] < t / T <= GUIDANCE_INTERVAL[1]:
            eps = (1 + w) * eps - w * eps_theta(ddpm, x, c, t, HIDE)
        x_0 = (x - (1 - alphabar[t]).sqrt() * eps) / alphabar[t].sqrt()
        sigma = eta * ((1 - alphabar[s]) / (1 - alphabar[t])).sqrt() * (1 - alphabar[t] / alphabar[s]).sqrt()
        z = torch.randn(N_CLASSES, *IMAGE_SHAPE, generator=generator)
        x = alphabar[s].sqrt() * x_0 + (1 - alphabar[s] - sigma**2).sqrt() * eps + sigma * z
    digits = ddpm.sample(c, guide_w=w, steps=steps, eta=eta, generator=seed(1))
    torch.testing.assert_close(digits, to_image(x).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("x_0", [-1, 1])
def test_clipped_steps_are_equation_7(x_0):
    """Where the network puts x_0 at -3 or 3, each step is a draw from q(x_{t-1} | x_t, x_0) with x_0 at -1 or 1."""
    ddpm = DDPM(Gaussian(torch.full((N_CLASSES, *IMAGE_SHAPE), 3.0 * x_0), std=0), T)
    c = CLASSES
    calls = network_calls(ddpm, lambda: ddpm.sample(c, guide_w=0, generator=seed(1)))

    generator = seed(1)
    x = torch.randn(N_CLASSES, *IMAGE_SHAPE, generator=generator).double()
    for t in range(T, 0, -1):
        torch.testing.assert_close(calls[T - t][0], x.float(), rtol=0, atol=2e-5)
        of_x_0 = alphabar[t - 1].sqrt() * beta[t] / (1 - alphabar[t])
        of_x_t = alpha[t].sqrt() * (1 - alphabar[t - 1]) / (1 - alphabar[t])
        sigma = ((1 - alphabar[t - 1]) / (1 - alphabar[t]) * beta[t]).sqrt()
        x = of_x_0 * x_0 + of_x_t * x + sigma * torch.randn(N_CLASSES, *IMAGE_SHAPE, generator=generator)


@pytest.mark.parametrize("w", [0, 0.5, 2])
def test_guidance_is_equation_6(w):
    """Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, in eps."""
    ddpm = small_ddpm()
    x = torch.randn(N_CLASSES, *IMAGE_SHAPE)
    c = CLASSES
    eps = (1 + w) * eps_theta(ddpm, x, c, 30, KEEP) - w * eps_theta(ddpm, x, c, 30, HIDE)
    v = (eps - (1 - alphabar[30]).sqrt() * x) / alphabar[30].sqrt()
    torch.testing.assert_close(ddpm.guided_v(x, c, 30, w), v.float(), rtol=1e-4, atol=1e-4)


# ---- What the tests share --------------------------------------------------------------------------------------------


def draw_timesteps(n: int) -> Tensor:
    """Line 3 of algorithm 1: t [n] as training draws it."""
    return torch.randint(1, T + 1, (n,))


def timestep_probabilities() -> Tensor:
    """How often it draws t = 1 .. T."""
    return torch.full((T,), 1 / T, dtype=torch.float64)


def small_ddpm(drop_prob: float = 0.1) -> DDPM:
    """A network of which every part counts."""
    net = ContextUnet(n_feat=8)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return DDPM(net, T, drop_prob)


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


class Gaussian(nn.Module):
    """The best possible network for pixels x_0 ~ N(mean[c], std^2), or N(0, std^2) where the class is hidden."""

    def __init__(self, mean: Tensor, std: float, n_T: int = T):
        super().__init__()
        self.mean = mean  # [10,1,28,28] in [-1, 1]
        self.std = std
        self.n_T = n_T
        self.alphabar = ddpm_schedule(n_T)

    def forward(self, x: Tensor, c: Tensor, t: Tensor, context_mask: Tensor) -> Tensor:
        abar = self.alphabar[(t * self.n_T).round().long()][:, None, None, None]
        mean = self.mean[c] * context_mask[:, None, None, None]
        gain = abar.sqrt() * self.std**2 / (abar * self.std**2 + 1 - abar)
        x_0 = mean + gain * (x - abar.sqrt() * mean)  # E[x_0 | x_t]
        return (abar.sqrt() * x - x_0) / (1 - abar).sqrt()


class Zero(nn.Module):
    def forward(self, x: Tensor, c: Tensor, t: Tensor, context_mask: Tensor) -> Tensor:
        return torch.zeros_like(x)


def network_calls(ddpm: DDPM, work: Callable[[], object]) -> list[tuple[Tensor, ...]]:
    """(x_t, c, t as int64, context_mask) of each time that work asks the network."""
    calls = []

    def remember(net, inputs, output):
        x, c, t, context_mask = inputs
        calls.append((x, c, (t * ddpm.n_T).round().long(), context_mask))

    hook = ddpm.nn_model.register_forward_hook(remember)
    work()
    hook.remove()
    return calls


def eps_theta(ddpm: DDPM, x: Tensor, c: Tensor, t: int, context_mask: Tensor) -> Tensor:
    """The eps that the network's v stands for: x_t and v are a rotation of x_0 and eps."""
    v = ddpm.nn_model(x, c, torch.full((len(x),), t / T), context_mask)
    return (1 - alphabar[t]).sqrt() * x + alphabar[t].sqrt() * v


# ---- Schedule and training -------------------------------------------------------------------------------------------


def cosine(t: int, n_T: int) -> float:
    """f(t) of Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17, with s = 0.008."""
    return math.cos((t / n_T + 0.008) / (1 + 0.008) * math.pi / 2) ** 2


@pytest.mark.parametrize("n_T", [1, 2, 40, 400, 1000, 10_000])
def test_schedule_is_the_closed_form_and_ends_in_noise(n_T):
    expected = [cosine(t, n_T) / cosine(0, n_T) for t in range(n_T)] + [1e-8]
    schedule = ddpm_schedule(n_T)
    torch.testing.assert_close(schedule, torch.tensor(expected), rtol=1e-6, atol=0)
    assert (schedule[1:] < schedule[:-1]).all()


def test_noised_images_have_the_moments_of_equation_4():
    ddpm = DDPM(Zero(), T)
    image = torch.rand(IMAGE_SHAPE)
    [(x_t, _, t, _)] = network_calls(ddpm, lambda: ddpm(image.expand(8000, *IMAGE_SHAPE), torch.zeros(8000).long()))
    for step in range(1, T + 1):
        noise = x_t[t == step].double() - alphabar[step].sqrt() * (2 * image - 1)
        n = len(noise)
        variance = 1 - alphabar[step]
        assert noise.mean(dim=0).abs().max() < 6 * (variance / n).sqrt()  # six standard errors
        assert noise.square().mean().item() == pytest.approx(variance.item(), rel=6 * (2 / (784 * n)) ** 0.5)


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_training_visits_timesteps_as_often_as_it_should(batch):
    ddpm = DDPM(Zero(), T)
    x = torch.rand(batch, *IMAGE_SHAPE)
    c = torch.zeros(batch, dtype=torch.int64)
    n = 4000 // batch
    calls = network_calls(ddpm, lambda: [ddpm(x, c) for _ in range(n)])
    counts = torch.bincount(torch.cat([t for _, _, t, _ in calls]), minlength=T + 1)
    expected = n * batch * timestep_probabilities()
    assert counts[0] == 0
    assert ((counts[1:] - expected).abs() < 5 * expected.sqrt()).all()


@pytest.mark.parametrize("drop_prob", [0, 0.1, 1])
def test_training_hides_the_class_with_drop_prob(drop_prob):
    ddpm = DDPM(Zero(), T, drop_prob)
    [(*_, kept)] = network_calls(ddpm, lambda: ddpm(torch.rand(10_000, *IMAGE_SHAPE), torch.zeros(10_000).long()))
    error = 5 * (drop_prob * (1 - drop_prob) / 10_000) ** 0.5
    assert kept.double().mean().item() == pytest.approx(1 - drop_prob, abs=error)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_odd_batches_train(batch):
    ddpm = DDPM(ContextUnet(n_feat=8), T)
    ddpm(torch.rand(batch, *IMAGE_SHAPE), torch.arange(batch)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ddpm.parameters())


# ---- The network -----------------------------------------------------------------------------------------------------


def test_hidden_class_does_not_count():
    net = small_ddpm().nn_model
    x = torch.randn(1, *IMAGE_SHAPE).expand(N_CLASSES, *IMAGE_SHAPE)
    t = torch.full((N_CLASSES,), 0.5)
    hidden = net(x, CLASSES, t, HIDE)
    kept = net(x, CLASSES, t, KEEP)
    torch.testing.assert_close(hidden, hidden[:1].expand_as(hidden))
    different = torch.cat([kept, hidden[:1]])
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(different, 2))


def test_image_does_not_depend_on_its_batch():
    net = small_ddpm().nn_model
    inputs = (torch.randn(5, *IMAGE_SHAPE), torch.arange(5), torch.rand(5), torch.arange(5) % 2 == 0)
    together = net(*inputs)
    assert together.shape == (5, *IMAGE_SHAPE)
    for i in range(5):
        alone = net(*[tensor[i : i + 1] for tensor in inputs])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)


def test_network_exports_with_any_batch_size():
    net = small_ddpm().nn_model.eval()
    inputs = (torch.randn(5, *IMAGE_SHAPE), torch.arange(5), torch.rand(5), torch.arange(5) % 2 == 0)
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(net, tuple(tensor[:3] for tensor in inputs), dynamic_shapes=(batch,) * 4)
    torch.testing.assert_close(exported.module()(*inputs), net(*inputs))


# ---- Sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 39, T, None])
@pytest.mark.parametrize("eta", [0, 1])
def test_sampling_with_the_perfect_network_ends_at_the_data(steps, eta):
    images = 0.9 * (2 * torch.rand(N_CLASSES, *IMAGE_SHAPE) - 1)
    ddpm = DDPM(Gaussian(images, std=0), T)
    states = list(ddpm.denoise(CLASSES, guide_w=0, steps=steps, eta=eta))
    assert len(states) == (steps or T) + 1
    assert all(x.shape == (N_CLASSES, *IMAGE_SHAPE) and x.dtype == torch.float32 for x in states)
    torch.testing.assert_close(states[-1], (images + 1) / 2, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("steps", "eta", "tolerance"), [(400, 1, 0.03), (400, 0, 0.01), (200, 0, 0.02), (50, 0, 0.05)])
def test_sampling_a_gaussian_gives_its_mean_and_variance(steps, eta, tolerance):
    """DDIM is a method of first order: half the steps, twice the error."""
    ddpm = DDPM(Gaussian(MEANS / 3, std=0.2, n_T=400), 400)
    c = CLASSES.repeat(20)
    error = 2 * ddpm.sample(c, guide_w=0, steps=steps, eta=eta) - 1 - MEANS[c] / 3
    assert error.mean().item() == pytest.approx(0, abs=5 * 0.2 / error.numel() ** 0.5)
    assert error.std().item() == pytest.approx(0.2, rel=tolerance)


@pytest.mark.parametrize("steps", [1, 2, 20, 50, 399, 400])
def test_steps_visit_as_many_timesteps(steps):
    ddpm = DDPM(Zero(), 400)
    calls = network_calls(ddpm, lambda: ddpm.sample(torch.zeros(1).long(), guide_w=0, steps=steps))
    visited = [t.item() for _, _, t, _ in calls]
    assert len(visited) == steps
    assert visited[0] == 400
    assert visited[-1] >= 1
    assert all(t > s for t, s in itertools.pairwise(visited))


@pytest.mark.parametrize("w", [0, 1])
def test_null_half_is_computed_in_the_interval_alone(w):
    ddpm = small_ddpm()
    calls = network_calls(ddpm, lambda: ddpm.sample(CLASSES, guide_w=w))
    asked = [pair for _, _, t, mask in calls for pair in zip(t.tolist(), mask.tolist())]
    low, high = GUIDANCE_INTERVAL
    kept = N_CLASSES * [(t, True) for t in range(1, T + 1)]
    null = N_CLASSES * [(t, False) for t in range(1, T + 1) if w and low < t / T <= high]
    assert sorted(asked) == sorted(kept + null)
    assert not w or 0 < len(null) < N_CLASSES * T


def test_seed_repeats_the_digits():
    ddpm = small_ddpm()
    first, again, other = (ddpm.sample(torch.arange(4), generator=seed(number)) for number in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_impossible_numbers_are_an_error():
    for steps in (0, -1, T + 1):
        with pytest.raises(ValueError, match=f"1 .. {T}"):
            small_ddpm().sample(torch.arange(2), steps=steps)
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"eta must be in 0 \.\. 1"):
            small_ddpm().sample(torch.arange(2), eta=eta)


@pytest.mark.parametrize("label", [N_CLASSES, -1, 3.5, float("nan")])
def test_impossible_classes_are_an_error(label):
    for c in (label, [3, label], torch.tensor([3, label]), np.array([3, label])):
        with pytest.raises(ValueError, match=f"0 .. {N_CLASSES - 1}"):
            small_ddpm().sample(c, steps=1)


def test_classes_come_in_any_form():
    ddpm = small_ddpm()
    expected = ddpm.sample(torch.tensor([5]), steps=2, generator=seed(1))
    for c in (5, [5], np.array([5]), np.int64(5), torch.tensor(5), torch.tensor([5], dtype=torch.int32), range(5, 6)):
        assert torch.equal(ddpm.sample(c, steps=2, generator=seed(1)), expected)


def test_digits_are_ordinary_tensors():
    weight = torch.ones(1, requires_grad=True)
    ddpm = small_ddpm()
    expected = ddpm.sample(torch.arange(2), steps=3, generator=seed(1))
    for x in ddpm.denoise(torch.arange(2), steps=3, generator=seed(1)):
        assert not x.requires_grad
        last = x.clone()
        (weight * x).sum().backward()
        x.mul_(2)  # changes nothing of what follows
    assert torch.equal(last, expected)
    expected.mul_(2)
    (weight * expected).sum().backward()
    assert weight.grad.item() > 0


def test_what_is_nearly_black_or_white_becomes_so():
    x = torch.tensor([-5, -1, -0.97, -0.95, 0, 0.95, 0.97, 1, 5])
    torch.testing.assert_close(to_image(x), torch.tensor([0, 0, 0, 0.025, 0.5, 0.975, 1, 1, 1]))


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (9, 3), (7, 3), (10, 5), (2, 5)])
def test_grid_has_the_geometry_of_torchvision(n, columns):
    from torchvision.utils import make_grid

    images = torch.rand(n, *IMAGE_SHAPE)
    grid = np.array(image_grid(images, columns))
    assert grid.dtype == "uint8"
    expected = make_grid(images, nrow=columns)[0]
    if n == 1:
        expected = nn.functional.pad(expected, (2, 2, 2, 2))  # make_grid gives a single image no border
    assert (grid == (expected * 255).round().byte().numpy()).all()
    scaled = np.array(image_grid(images, columns, scale=3))
    assert scaled.shape == (3 * grid.shape[0], 3 * grid.shape[1])
    assert all((scaled[i::3, j::3] == grid).all() for i in range(3) for j in range(3))


# ---- Devices and precision -------------------------------------------------------------------------------------------


def test_training_step_does_not_mix_devices():
    """On the meta device tensors have no values, but an operation on two devices fails as it does with a GPU."""
    ddpm = small_ddpm().to("meta")
    optimizer = torch.optim.AdamW(ddpm.parameters())
    loss = ddpm(torch.rand(4, *IMAGE_SHAPE, device="meta"), torch.arange(4, device="meta"))
    loss.backward()
    optimizer.step()
    assert loss.device.type == "meta"


def test_sampling_does_not_mix_devices():
    ddpm = small_ddpm()
    values = ddpm.alphabar.tolist()
    ddpm.to("meta")
    del ddpm.alphabar
    ddpm.alphabar = SimpleNamespace(device=torch.device("meta"), tolist=lambda: values)
    for x in ddpm.denoise(torch.arange(4), guide_w=1, steps=10):
        assert x.device.type == "meta"


def test_bf16_stays_inside_the_network():
    ddpm = small_ddpm()
    x = torch.rand(4, *IMAGE_SHAPE)
    c = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ddpm.nn_model(x, c, torch.rand(4), KEEP[:4]).dtype == torch.bfloat16
        assert ddpm(x, c).dtype == torch.float32
        assert all(x.dtype == torch.float32 for x in ddpm.denoise(c, steps=3))

    ddpm = DDPM(Zero(), T)
    expected = ddpm.sample(c, generator=seed(1))
    ddpm.nn_model.register_forward_hook(lambda net, inputs, v: v.bfloat16())
    assert torch.equal(ddpm.sample(c, generator=seed(1)), expected)  # a zero is exact in bf16


@pytest.mark.parametrize("name", ["meta", "hpu", "privateuseone", "xla", "quantum", "cuda:99", ""])
def test_device_that_is_not_here_is_a_usage_error(name, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=pick_device)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--device", name])
    assert caught.value.code == 2
    assert re.search(f"argument --device: cannot use {name}: .+", capsys.readouterr().err)


@pytest.mark.parametrize("reason", ["Found no NVIDIA driver on your system. Please", "CUDA out of memory. Tried\nto"])
def test_gpu_that_does_not_work(monkeypatch, capsys, reason):
    """auto is then the CPU, and says why; a GPU that was asked for is an error with torch's reason."""

    def fails(*args, device=None):
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fails)
    first_line = reason.split("\n")[0]
    assert pick_device("auto") == torch.device("cpu")
    assert capsys.readouterr().out == f"warning: the CPU is used, not the GPU: {first_line}\n"
    with pytest.raises(argparse.ArgumentTypeError, match=f"{first_line}$"):
        pick_device("cuda")
