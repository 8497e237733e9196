"""The mathematics of ddpm_model.py: schedule, noising, loss, guidance and sampling, against closed forms."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ddpm_model
from ddpm_model import DDPM, GUIDED, X0_LIMIT, ContextUnet, ddpm_schedules, image_grid, predict_x0


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch):
    """On every machine alike: exact enough for closed forms."""
    monkeypatch.setattr(ddpm_model, "hardware_has_bf16", lambda device: False)


def randomised(net: nn.Module) -> nn.Module:
    """A network whose last layers, zero at the start, are not: every part of it counts."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net.eval()


def small_ddpm(n_T: int = 40, drop_prob: float = 0.1) -> DDPM:
    return DDPM(randomised(ContextUnet(n_feat=8)), DDPM.default_betas(n_T), n_T, drop_prob).eval()


class Oracle(nn.Module):
    """The best possible network when all data is one image x0: it knows x0, so v follows from x_t. With error > 0, what
    it takes for x0 is off by noise of that std, anew at each step."""

    def __init__(self, x0: torch.Tensor, betas: tuple[float, float], n_T: int, error: float = 0.0):
        super().__init__()
        self.x0, self.n_T, self.error, self.alphabar = x0, n_T, error, ddpm_schedules(*betas, n_T)["alphabar"]

    def forward(self, x, c, t, context_mask, x0_hat=None):
        self.x_t = x
        alphabar = self.alphabar[(t * self.n_T).round().long()][:, None, None, None]
        x0 = self.x0 + self.error * torch.randn_like(x)
        return (alphabar.sqrt() * x - x0) / (1 - alphabar).sqrt()


def gaussian_ddpm(n_T: int, std: float) -> DDPM:
    """A DDPM whose network is exact for data x0 ~ N(0, std^2) in the model's units: E[v | x_t] is linear in x_t."""
    alphabar = ddpm_schedules(*DDPM.default_betas(n_T), n_T)["alphabar"]

    class Exact(nn.Module):
        def forward(self, x, c, t, context_mask, x0_hat=None):
            a = alphabar[(t * n_T).round().long()][:, None, None, None]
            variance = a * std**2 + 1 - a
            return (a.sqrt() * (1 - a).sqrt() * (1 - std**2)) / variance * x

    return DDPM(Exact(), DDPM.default_betas(n_T), n_T)


def timestep_probabilities(n_T: int) -> torch.Tensor:
    """How often training visits t = 1 .. n_T: a fifth uniform, the rest logit-normal (mean -0.5, deviation 0.8)."""
    edges = torch.arange(n_T + 1, dtype=torch.float64) / n_T
    return 0.2 / n_T + 0.8 * torch.special.ndtr((edges.logit() + 0.5) / 0.8).diff()


@pytest.mark.parametrize("T", [1, 40, 1000])
def test_schedule_is_the_closed_form(T):
    beta1, beta2 = 1e-4, 0.02
    schedule = ddpm_schedules(beta1, beta2, T)
    alphabar = 1.0
    for t in range(T + 1):
        beta = 0.0 if t == 0 else beta1 + (beta2 - beta1) * (t - 1) / max(T - 1, 1)
        alphabar *= 1 - beta
        assert schedule["beta"][t].item() == pytest.approx(beta, rel=1e-6)
        assert schedule["alphabar"][t].item() == pytest.approx(alphabar, rel=1e-6)
    assert all(len(tensor) == T + 1 and tensor.dtype == torch.float32 for tensor in schedule.values())


@pytest.mark.parametrize(
    "betas", [(0, 0.02, 10), (0.02, 1e-4, 10), (1e-4, 1, 10), (1e-4, math.nan, 10), (1e-4, 0.02, 0)]
)
def test_schedule_rejects_what_is_no_variance(betas):
    with pytest.raises(ValueError):
        ddpm_schedules(*betas)


@pytest.mark.parametrize("n_T", [21, 50, 400, 1000, 10_000])
def test_default_schedule_ends_in_noise(n_T):
    alphabar = ddpm_schedules(*DDPM.default_betas(n_T), n_T)["alphabar"]
    assert alphabar[0] == 1 and (alphabar.diff() < 0).all() and alphabar[-1] < 1e-4


def test_noised_image_has_the_mean_and_variance_of_equation_4():
    ddpm, n = small_ddpm(), 20_000
    x0 = torch.linspace(-1, 1, 784).reshape(1, 1, 28, 28)
    for t in (1, 13, 40):
        alphabar = ddpm.alphabar[t].item()
        total, squares = torch.zeros(784, dtype=torch.float64), torch.zeros(784, dtype=torch.float64)
        for _ in range(n // 1000):
            eps = torch.randn(1000, 1, 28, 28)
            many = torch.full((1000,), t)
            x_t = ddpm.add_noise(x0.expand(1000, -1, -1, -1), many, eps)
            total += x_t.flatten(1).double().sum(0)
            squares += x_t.flatten(1).double().square().sum(0)
            v = ddpm.expected_v(x_t, many, x0, torch.ones(1000, 1, dtype=torch.bool))
            torch.testing.assert_close(predict_x0(x_t, v, alphabar), x0.expand_as(x_t), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close((1 - alphabar) ** 0.5 * x_t + alphabar**0.5 * v, eps, rtol=1e-4, atol=1e-4)
        mean, error = total / n, 5 * ((1 - alphabar) / n) ** 0.5  # five standard errors
        assert (mean - alphabar**0.5 * x0.flatten()).abs().max() < error
        variance = (squares / n - mean**2).mean().item()  # over all pixels
        assert variance == pytest.approx(1 - alphabar, rel=5 * (2 / (n * 784)) ** 0.5 + 1 / n)


def test_clean_data_is_timestep_0():
    ddpm, x0 = small_ddpm(), torch.rand(3, 1, 28, 28)
    x_0 = ddpm.add_noise(x0, torch.zeros(3, dtype=torch.long), torch.randn_like(x0))
    assert torch.equal(x_0, x0)


def test_loss_of_the_perfect_network_is_zero_and_of_the_zero_network_is_the_power_of_v():
    betas, image = DDPM.default_betas(40), torch.rand(1, 1, 28, 28)
    x = image.expand(64, -1, -1, -1)
    perfect = DDPM(Oracle(2 * image - 1, betas, 40), betas, 40)
    assert perfect(x, torch.zeros(64, dtype=torch.long)).item() < 1e-6

    class Zero(nn.Module):
        def forward(self, x, c, t, context_mask, x0_hat=None):
            return torch.zeros_like(x)

    ddpm = DDPM(Zero(), betas, 40)
    # E v^2 = alphabar + (1 - alphabar) x0^2, averaged over the timesteps
    alphabar = (ddpm.alphabar[1:].double() * timestep_probabilities(40)).sum()
    expected = alphabar + (1 - alphabar) * (2 * image - 1).double().square().mean()
    measured = torch.stack([ddpm(x, torch.zeros(64, dtype=torch.long)) for _ in range(200)]).double().mean()
    assert measured.item() == pytest.approx(expected.item(), rel=0.01)


def noised(t: int, n: int) -> tuple[DDPM, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ddpm, three images x0 of four pixels, which of them [n] was noised to timestep t, x_t and v [n,1,1,4])."""
    torch.manual_seed(0)
    ddpm, x0, which = small_ddpm(), torch.randn(3, 1, 1, 4), torch.randint(3, (n,))
    eps, alphabar = torch.randn(n, 1, 1, 4), ddpm.alphabar[t]
    x_t = ddpm.add_noise(x0[which], torch.full((n,), t), eps)
    return ddpm, x0, which, x_t, alphabar.sqrt() * eps - (1 - alphabar).sqrt() * x0[which]


@pytest.mark.parametrize("t", [2, 20, 40])
def test_expected_velocity_is_the_mean_of_the_posterior(t):
    ddpm, x0, which, x_t, _ = noised(t, 50)
    candidate = (torch.rand(50, 3) < 0.5) | (which[:, None] == torch.arange(3))
    signal, noise = ddpm.alphabar[t].double().sqrt(), (1 - ddpm.alphabar[t].double()).sqrt()
    x, images = x_t.double()[:, None], x0.double()[None]  # [50,1,...] and [1,3,...]
    log_q = torch.distributions.Normal(signal * images, noise).log_prob(x).sum(dim=(2, 3, 4))
    posterior = (log_q + candidate.double().log()).softmax(dim=1)  # Bayes' rule
    v = signal * (x - signal * images) / noise - noise * images  # if it was made from each
    expected = (posterior[:, :, None, None, None] * v).sum(dim=1)
    with torch.autocast("cpu", torch.bfloat16):  # as in training; it must not round
        measured = ddpm.expected_v(x_t, torch.full((50,), t), x0, candidate)
    torch.testing.assert_close(measured.double(), expected, rtol=1e-3, atol=1e-3)


def test_expected_velocity_teaches_the_same_with_less_noise():
    """The tower rule: E[v f(x_t)] = E[E[v | x_t] f(x_t)] for any f, so the mean gradient of the loss is the same."""
    n = 100_000
    ddpm, x0, _, x_t, v = noised(20, n)
    expected = ddpm.expected_v(x_t, torch.full((n,), 20), x0, torch.ones(n, 3, dtype=torch.bool))
    for f in (torch.ones_like(x_t), x_t, x_t.sin(), x_t.square()):
        difference = ((v - expected) * f).flatten(1).double()
        assert (difference.mean(0).abs() < 5 * difference.std(0) / n**0.5).all()
    assert expected.var() < 0.9 * v.var()


def test_targets_are_averaged_over_what_the_network_cannot_tell_apart():
    x, c = torch.rand(4, 1, 28, 28), torch.arange(4)
    same_class, other_class = (torch.rand(4, 1, 28, 28), c), (torch.rand(4, 1, 28, 28), c + 4)

    def loss(drop_prob: float, others: tuple[torch.Tensor, torch.Tensor] | None) -> float:
        torch.manual_seed(0)
        ddpm = DDPM(Witness(), DDPM.default_betas(40), 40, drop_prob)
        return sum(ddpm(x, c, others).item() for _ in range(20))  # Witness says 0, so this is the power of the targets

    assert loss(0.0, other_class) == pytest.approx(loss(0.0, None), rel=1e-5)  # the class is known
    assert loss(0.0, same_class) < 0.99 * loss(0.0, None)
    assert loss(1.0, other_class) < 0.99 * loss(1.0, None)  # it is hidden
    assert loss(1.0, None) < 0.99 * loss(0.0, None)  # the batch itself counts


class Constants(nn.Module):
    """The perfect network for images of class c whose pixels all are c / 9. Remembers what it was asked."""

    def __init__(self, alphabar: torch.Tensor):
        super().__init__()
        self.alphabar = alphabar

    def forward(self, x, c, t, context_mask, x0_hat=None):
        self.c, self.t = c, (t * 40).round().long()
        alphabar = self.alphabar[self.t]
        x0, signal, noise = (a[:, None, None, None] for a in (2 * c / 9 - 1, alphabar.sqrt(), (1 - alphabar).sqrt()))
        return (signal * x - x0) / noise


def test_one_noisy_image_in_twenty_is_asked_for_as_the_class_of_its_neighbour_and_told_what_is_right_for_that():
    betas, c, noisy, asked = DDPM.default_betas(40), torch.arange(500) % 10, 0, 0
    ddpm = DDPM(Constants(ddpm_schedules(*betas, 40)["alphabar"]), betas, 40, drop_prob=0.0)
    for _ in range(40):
        loss = ddpm((c / 9)[:, None, None, None].expand(-1, 1, 28, 28), c)
        assert loss.item() < 1e-6
        other = ddpm.nn_model.c != c
        assert (ddpm.nn_model.c == c.roll(1))[other].all() and (ddpm.nn_model.t > 6)[other].all()  # 6 = 0.15 * 40
        noisy, asked = noisy + (ddpm.nn_model.t > 6).sum().item(), asked + other.sum().item()
    assert asked / noisy == pytest.approx(1 / 20, abs=5 * (19 / 400 / noisy) ** 0.5)


class Witness(nn.Module):
    """Remembers what the training loss asks of the network."""

    def forward(self, x, c, t, context_mask, x0_hat=None):
        self.t, self.context_mask = t, context_mask
        return torch.zeros_like(x)


@pytest.mark.parametrize("batch", [1, 3, 7, 40])
def test_training_visits_every_timestep_as_often_as_it_should(batch):
    ddpm, counts, n = DDPM(Witness(), DDPM.default_betas(40), 40), torch.zeros(41), 4000 // batch * 3
    for _ in range(n):
        ddpm(torch.rand(batch, 1, 28, 28), torch.zeros(batch, dtype=torch.long))
        counts += torch.bincount((ddpm.nn_model.t * 40).round().long(), minlength=41)
    assert counts[0] == 0
    expected = n * batch * timestep_probabilities(40)
    assert ((counts[1:] - expected).abs() < 5 * expected.sqrt()).all()


@pytest.mark.parametrize("drop_prob", [0.0, 0.1, 1.0])
def test_training_drops_the_condition_with_drop_prob(drop_prob):
    ddpm, kept = DDPM(Witness(), DDPM.default_betas(40), 40, drop_prob), 0
    for _ in range(20):
        ddpm(torch.rand(500, 1, 28, 28), torch.zeros(500, dtype=torch.long))
        kept += ddpm.nn_model.context_mask.sum().item()
    assert kept / 10_000 == pytest.approx(1 - drop_prob, abs=5 * (drop_prob * (1 - drop_prob) / 10_000) ** 0.5)


def test_dropped_condition_makes_the_output_independent_of_the_label():
    net, x, t = (
        randomised(ContextUnet(n_feat=8)),
        torch.randn(10, 1, 28, 28)[:1].expand(10, -1, -1, -1),
        torch.full((10,), 0.5),
    )
    dropped = net(x, torch.arange(10), t, torch.zeros(10))
    torch.testing.assert_close(dropped, dropped[:1].expand_as(dropped))
    kept = net(x, torch.arange(10), t, torch.ones(10))
    assert all((kept[i] - kept[j]).abs().max() > 1e-3 for i in range(10) for j in range(i))
    assert (kept - dropped).abs().amax((1, 2, 3)).min() > 1e-3


def test_guidance_is_linear_in_w_and_conditional_at_0():
    ddpm, x, c = small_ddpm(), torch.randn(4, 1, 28, 28), torch.tensor([1, 2, 3, 4])
    t, ones = torch.full((4,), 20 / 40), torch.ones(4)
    v_cond, v_null = ddpm.nn_model(x, c, t, ones), ddpm.nn_model(x, c, t, 0 * ones)
    torch.testing.assert_close(ddpm.guided_v(x, c, 20, 0), v_cond)
    for w in (0.5, 2.0):
        torch.testing.assert_close(ddpm.guided_v(x, c, 20, w), v_cond + w * (v_cond - v_null))


def test_drawing_multiplies_in_bf16_where_the_hardware_does(monkeypatch):
    ddpm, x, c = small_ddpm(), torch.randn(4, 1, 28, 28), torch.arange(4)
    exact = ddpm.guided_v(x, c, 20, 1.0)
    monkeypatch.setattr(ddpm_model, "hardware_has_bf16", lambda device: True)
    rounded = ddpm.guided_v(x, c, 20, 1.0)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert (rounded - exact).abs().mean() < 0.02 * exact.abs().mean()


def calls_of(ddpm: DDPM, work: Callable[[], object]) -> list[tuple[torch.Tensor, ...]]:
    """(x_t, x0_hat, v, the x0 that they imply) of each time that work asks the network."""
    calls = []

    def remember(net, inputs, v):
        x_t, _, t, _, *x0_hat = inputs
        alphabar = ddpm.alphabar[(t * ddpm.n_T).round().long()][:, None, None, None]
        calls.append((x_t, *(x0_hat or [None]), v, predict_x0(x_t, v, alphabar)))

    hook = ddpm.nn_model.register_forward_hook(remember)
    work()
    hook.remove()
    return calls


def test_half_of_the_images_train_with_an_estimate_of_x0_from_the_network_itself():
    ddpm, x = small_ddpm(), torch.rand(8, 1, 28, 28)
    (seen, none, v, estimate), (x_t, x0_hat, _, _) = calls_of(ddpm, lambda: ddpm(x, torch.arange(8)))
    assert torch.equal(seen, x_t[:4]) and none is None and not v.requires_grad
    torch.testing.assert_close(x0_hat[:4], estimate)
    assert (x0_hat[4:] == 0).all()


@pytest.mark.parametrize("steps", [40, 10])
def test_each_step_of_sampling_starts_from_the_estimate_of_the_step_before(steps):
    ddpm = small_ddpm()
    calls = calls_of(ddpm, lambda: ddpm.sample(torch.arange(4), 0, steps))
    assert (calls[0][1] == 0).all()
    for (_, _, _, before), (_, x0_hat, _, _) in itertools.pairwise(calls):
        torch.testing.assert_close(x0_hat, before, rtol=1e-4, atol=1e-4)


def test_an_estimate_of_x0_counts_and_none_is_middle_grey():
    net, x, c = randomised(ContextUnet(n_feat=8)), torch.randn(2, 1, 28, 28), torch.arange(2)
    t, keep = torch.full((2,), 0.5), torch.ones(2)
    v = net(x, c, t, keep)
    assert torch.equal(v, net(x, c, t, keep, torch.zeros_like(x)))
    assert (v - net(x, c, t, keep, torch.ones_like(x))).abs().mean() > 1e-3


def test_without_guidance_the_null_half_is_not_computed():
    ddpm, sizes = small_ddpm(), []
    ddpm.nn_model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    ddpm.guided_v(torch.randn(4, 1, 28, 28), torch.arange(4), 5, 0)
    ddpm.guided_v(torch.randn(4, 1, 28, 28), torch.arange(4), 5, 1)
    assert sizes == [4, 8]


@pytest.mark.parametrize("steps", [40, 10])
def test_guidance_acts_in_its_interval_alone(steps):
    ddpm, calls = small_ddpm(), []
    ddpm.nn_model.register_forward_hook(
        lambda net, inputs, v: calls.append((round(inputs[2][0].item() * 40) / 40, len(v)))
    )
    ddpm.sample(torch.arange(4), guide_w=1.0, steps=steps)
    assert {size for time, size in calls} == {4, 8}  # without and with the null half
    assert all((size == 8) == (GUIDED[0] < time <= GUIDED[1]) for time, size in calls)


def test_an_image_does_not_depend_on_its_batch():
    net, x, c = randomised(ContextUnet(n_feat=8)), torch.randn(5, 1, 28, 28), torch.arange(5)
    t, mask = torch.rand(5), torch.tensor([1.0, 0, 1, 0, 1])
    together = net(x, c, t, mask)
    assert together.shape == x.shape
    for i in range(5):
        alone = net(x[i : i + 1], c[i : i + 1], t[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_odd_batches_train(batch):
    ddpm = small_ddpm().train()
    ddpm(torch.rand(batch, 1, 28, 28), torch.arange(batch)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in ddpm.parameters())


@pytest.mark.parametrize("steps", [1, 2, 7, 39, 40, None])
def test_sampling_with_the_perfect_network_ends_at_the_data(steps):
    betas, image = DDPM.default_betas(40), torch.rand(1, 1, 28, 28)
    ddpm = DDPM(Oracle(2 * image - 1, betas, 40), betas, 40)
    states = list(ddpm.denoise(torch.zeros(3, dtype=torch.long), 0, steps))
    assert len(states) == (steps or 40) + 1
    assert all(state.shape == (3, 1, 28, 28) and state.min() >= 0 and state.max() <= 1 for state in states)
    torch.testing.assert_close(states[-1], image.expand(3, -1, -1, -1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("std", [0.2, 0.05])
@pytest.mark.parametrize("steps", [400, 50, 20])
def test_sampling_a_gaussian_gives_its_variance(steps, std):
    """For data N(0, std^2) the exact network is known, so what the sampler gets wrong is its own. std is small enough
    that the clipping of x0 hardly ever acts. At first order, all three miss it at std 0.05."""
    c = torch.zeros(500, dtype=torch.long)
    x0 = 2 * gaussian_ddpm(400, std).sample(c, 0, steps, torch.Generator().manual_seed(0)) - 1
    assert x0.mean().item() == pytest.approx(0, abs=5 * std / x0.numel() ** 0.5)
    assert x0.std().item() == pytest.approx(std, rel=0.05)


def test_few_steps_are_second_order():
    """From x_T, the probability flow of data N(0, std^2) leads to x_0 = std x_T. Twice the steps bring the sampler four
    times as close to it; at first order it would be twice."""
    std, c = 0.2, torch.zeros(50, dtype=torch.long)
    ddpm, errors = gaussian_ddpm(10_000, std), {}
    for steps in (40, 80, 160):
        x_T = torch.randn(50, 1, 28, 28, generator=torch.Generator().manual_seed(1))
        x_0 = 2 * ddpm.sample(c, 0, steps, torch.Generator().manual_seed(1)) - 1
        errors[steps] = (x_0 - std * x_T).abs().mean().item() / std
    assert errors[40] < 0.02 and errors[40] / errors[80] > 3 and errors[80] / errors[160] > 3


def test_all_steps_are_ancestral_sampling():
    """Each x_s is a draw from q(x_s | x_t, x0), as Bayes' rule has it: the precisions of q(x_t | x_s) and q(x_s | x0)
    add, and so do their precision-weighted means."""
    betas, x0 = DDPM.default_betas(40), 2 * torch.rand(1, 1, 28, 28) - 1
    ddpm, calls = DDPM(Oracle(x0, betas, 40), betas, 40), []
    ddpm.nn_model.register_forward_hook(lambda net, inputs, v: calls.append(inputs[0]))
    ddpm.sample(torch.zeros(200, dtype=torch.long), 0, None, torch.Generator().manual_seed(0))
    for t, (x_t, x_s) in zip(range(40, 1, -1), itertools.pairwise(calls), strict=True):
        alpha, a_s = (ddpm.alphabar[t] / ddpm.alphabar[t - 1]).item(), ddpm.alphabar[t - 1].item()
        precision = alpha / (1 - alpha) + 1 / (1 - a_s)
        mean = (alpha**0.5 * x_t / (1 - alpha) + a_s**0.5 * x0 / (1 - a_s)) / precision
        z, error = (x_s - mean) * precision**0.5, 5 / x_s.numel() ** 0.5 + 1e-3
        assert abs(z.mean().item()) < error and z.std().item() == pytest.approx(1, abs=error)
        assert abs((z * (x_t - x_t.mean())).mean().item()) < error


@pytest.mark.parametrize("steps", [40, 10])
def test_x0_that_the_network_puts_out_of_range_is_clipped_at_each_step(steps):
    betas = DDPM.default_betas(40)  # strong guidance drives x0 far out on a black background
    ddpm = DDPM(Oracle(torch.tensor(-3.0), betas, 40), betas, 40)
    assert ddpm.sample(torch.zeros(2, dtype=torch.long), 0, steps).max() < 1e-5
    assert ddpm.nn_model.x_t.mean().item() == pytest.approx(-X0_LIMIT, abs=0.05)  # at the last step, t = 1


@pytest.mark.parametrize("steps", [400, 50])
def test_small_errors_do_not_lift_a_black_background(steps):
    """Errors of x0 around black that are 0 on average leave the image at black on average: none are cut off."""
    betas = DDPM.default_betas(400)
    ddpm = DDPM(Oracle(torch.tensor(-1.0), betas, 400, error=0.03), betas, 400)
    ddpm.sample(torch.zeros(20, dtype=torch.long), 0, steps)
    assert ddpm.nn_model.x_t.mean().item() == pytest.approx(-1, abs=0.002)


def test_seed_repeats_the_sample_and_another_seed_does_not():
    ddpm, c = small_ddpm(), torch.arange(4)
    first, again, other = (ddpm.sample(c, 0.5, None, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("steps", [0, -1, 41])
def test_impossible_steps_are_an_error(steps):
    with pytest.raises(ValueError, match=r"1 \.\. 40"):
        small_ddpm().sample(torch.arange(2), steps=steps)


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (9, 3), (7, 3), (10, 5), (2, 5)])
def test_grid_has_the_geometry_of_torchvision(n, columns):
    from torchvision.utils import make_grid

    images = torch.rand(n, 1, 28, 28)
    expected = (make_grid(images, nrow=columns)[0] * 255).round().byte().numpy() if n > 1 else None
    grid = image_grid(images, columns)
    assert grid.dtype == "uint8"
    if n > 1:  # make_grid returns a single image without its borders
        assert (grid == expected).all()
    else:
        assert grid.shape == (32, 32) and (grid[2:30, 2:30] == (images[0, 0] * 255).round().byte().numpy()).all()
    scaled = image_grid(images, columns, scale=3)
    assert scaled.shape == (3 * grid.shape[0], 3 * grid.shape[1]) and (scaled[1::3, 2::3] == grid).all()


@pytest.mark.parametrize("steps", [1, 2, 20, 50, 399, 400])
def test_steps_visit_as_many_timesteps_from_the_last_to_the_first(steps):
    ddpm, visited = DDPM(Witness(), DDPM.default_betas(400), 400), []
    ddpm.nn_model.register_forward_hook(lambda net, inputs, output: visited.append(round(net.t[0].item() * 400)))
    ddpm.sample(torch.zeros(1, dtype=torch.long), 0, steps)
    assert len(visited) == steps and visited[0] == 400 and visited[-1] >= 1
    assert all(t > s for t, s in itertools.pairwise(visited))
