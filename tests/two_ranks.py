"""Runs train_ddpm.py's trainer and looks into it, under torchrun: see test_training.py.

--same-noise   each image's noise, timestep and condition depend on the image alone, not on its rank or place
--die          the second rank is killed in its third epoch
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_ddpm
from ddpm_model import DDPM

OWN = {name: name in sys.argv for name in ("--same-noise", "--die")}
sys.argv = [arg for arg in sys.argv if arg not in OWN]


def loss_of_fixed_noise(self: DDPM, x: torch.Tensor, c: torch.Tensor, others: object) -> torch.Tensor:
    """A training loss whose random numbers are a function of the image."""
    total = 0.0
    for image, label in zip(x, c):
        generator = torch.Generator().manual_seed(int(image.sum()) * 10 + int(label))
        t = torch.randint(1, self.n_T + 1, (1,), generator=generator)
        x0 = 2 * image[None] - 1
        x_t = self.add_noise(x0, t, torch.randn(1, 1, 28, 28, generator=generator))
        v = self.expected_v(x_t, t, x0, torch.ones(1, 1, dtype=torch.bool))
        total = total + (self.nn_model(x_t, label[None], t / self.n_T, torch.ones(1)) - v).square().mean()
    return total / len(x)


visited: list[torch.Tensor] = []
step, run = train_ddpm.Trainer.step, train_ddpm.Trainer.run


def watched_step(self, index, number):
    if OWN["--die"] and self.rank == 1 and self.epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    visited.append(index.tensor_split(self.world)[self.rank])
    return step(self, index, number)


def watched_run(self):
    run(self)
    if self.world == 1:
        return
    for parameter in [*self.ddpm.parameters(), *self.ema.parameters()]:
        of_rank_0 = parameter.detach().clone()
        dist.broadcast(of_rank_0, 0)
        assert torch.equal(parameter, of_rank_0)
    mine = torch.cat(visited).reshape(self.epoch, -1)  # a row an epoch
    of_all = [None] * self.world
    dist.all_gather_object(of_all, mine)
    for epoch in torch.cat(of_all, dim=1):
        assert torch.equal(epoch.sort().values, torch.arange(len(self.images)))
    if self.rank == 0:
        print("identical ranks, each image once an epoch")


if OWN["--same-noise"]:
    DDPM.forward = loss_of_fixed_noise
train_ddpm.Trainer.step, train_ddpm.Trainer.run = watched_step, watched_run
train_ddpm.main()
threads = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]  # where there is such a folder
assert not any("gloo" in name for name in threads), threads  # one that is left can abort Python while it shuts down
