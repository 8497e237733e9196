"""Runs train_ddpm.py, alone or under torchrun. What each process saw is in seen_by_RANK.pt: see test_training.py.

In fp32, and each image's noise, timestep and condition depend on the image alone, not on its rank or place.
"""

import contextlib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_ddpm
from ddpm_model import DDPM

models: list[DDPM] = []
numbers: list[Tensor] = []  # of the images of each step
noise: list[float] = []  # a random number of each step, drawn where DDPM.forward would draw its first
forward = DDPM.forward


def watched_forward(self: DDPM, x: Tensor, c: Tensor) -> Tensor:
    models[:] = [self]
    noise.append(torch.rand(1).item())
    numbers.append((255 * x[:, 0, 0, 0]).round().long())
    losses = []
    for image, label, number in zip(x, c, numbers[-1].tolist()):
        torch.manual_seed(number)
        losses.append(forward(self, image[None], label[None]))
    return torch.stack(losses).mean()


DDPM.forward = watched_forward
train_ddpm.autocast = lambda device: contextlib.nullcontext()
train_ddpm.main()
weights = torch.cat([parameter.detach().flatten() for parameter in models[0].parameters()])
gradients = torch.cat([parameter.grad.flatten() for parameter in models[0].parameters()])  # of the last step
seen = {"numbers": torch.stack(numbers), "noise": noise, "weights": weights, "gradients": gradients}
torch.save(seen, f"seen_by_{os.environ.get('RANK', 0)}.pt")
