"""Runs train_ddpm.py and looks into it, under torchrun: see test_training.py.

--same-noise   each image's noise, timestep and condition depend on the image alone, not on its rank or place; fp32
--die          the second rank is killed in its third epoch
--fail         the second rank runs out of memory in its third epoch
"""

import contextlib
import copy
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_ddpm
from ddpm_model import DDPM

OWN = {name: name in sys.argv for name in ("--same-noise", "--die", "--fail")}
sys.argv = [arg for arg in sys.argv if arg not in OWN]
N_BATCHES = 5  # of an epoch

seen: list[torch.Tensor] = []  # the numbers of the images of each step
models: list[DDPM] = []
forward, destroy_process_group = DDPM.forward, dist.destroy_process_group


def watched_forward(self: DDPM, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    if os.environ.get("RANK") == "1" and len(seen) == 2 * N_BATCHES:
        if OWN["--die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if OWN["--fail"]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    numbers = (255 * x[:, 0, 0, 0]).round().long()
    seen.append(numbers)
    if not OWN["--same-noise"]:
        return forward(self, x, c)
    losses = []
    for image, label, number in zip(x, c, numbers.tolist()):
        torch.manual_seed(number)
        losses.append(forward(self, image[None], label[None]))
    return torch.stack(losses).mean()


def watched_copy(ddpm: DDPM) -> DDPM:
    models.extend([ddpm, copy.deepcopy(ddpm)])
    return models[1]


def check_and_destroy() -> None:
    for model in models:
        for parameter in model.parameters():
            of_rank_0 = parameter.detach().clone()
            dist.broadcast(of_rank_0, 0)
            assert torch.equal(parameter, of_rank_0)
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, torch.cat(seen))
    epochs = len(seen) // N_BATCHES
    for epoch in torch.cat([numbers.reshape(epochs, -1) for numbers in of_all], dim=1):
        assert len(epoch.unique()) == len(epoch) == 12 * N_BATCHES
    if dist.get_rank() == 0:
        print("identical ranks, no image twice in an epoch")
    models.clear()  # their parameters hold the process group
    destroy_process_group()


DDPM.forward = watched_forward
train_ddpm.copy = SimpleNamespace(deepcopy=watched_copy)
dist.destroy_process_group = check_and_destroy
if OWN["--same-noise"]:
    train_ddpm.autocast = lambda device: contextlib.nullcontext()
train_ddpm.main()
