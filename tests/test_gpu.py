"""What is seen only on a machine with a GPU: training, resume and drawing there, and the way back to the CPU."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_model import load_ddpm, pick_device
from tests.conftest import PROJECT, SMALL_RUN

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
RUN = ("train_ddpm.py", *SMALL_RUN, "--device", "auto")  # the last --device counts


def test_training(workdir, call):
    """One epoch, then another one with --resume. The CPU can use the weights."""
    path = workdir / "weights" / "ddpm_mnist.pth"
    for epochs, more in ((1, ()), (2, ("--resume",))):
        result = call(workdir, *RUN, "--epochs", epochs, *more)
        assert result.returncode == 0 and f"{epochs - 1} of {epochs} epochs are done" in result.stdout, result.stderr
        assert "1 x cuda" in result.stdout
        digits = load_ddpm(path).sample([3, 1], steps=5)
        assert digits.device.type == "cpu" and digits.isfinite().all()


def test_drawing(tmp_path, call):
    """The digits of a seed are the same on the GPU and on the CPU, up to rounding."""
    weights = PROJECT / "weights" / "ddpm_mnist.pth"
    pictures = []
    for seed, device in ((1, "cpu"), (1, "auto"), (2, "auto")):
        options = ("--seed", seed, "--device", device, "--steps", "20", "--scale", "1", "--weights", weights)
        assert call(tmp_path, "inference_ddpm.py", *options).returncode == 0
        with Image.open(tmp_path / "generated_outputs" / "digit_5_grid.png") as picture:
            pictures.append(np.array(picture).astype(int))
    assert np.abs(pictures[1] - pictures[0]).mean() < 5 < np.abs(pictures[2] - pictures[0]).mean()


def test_devices():
    """auto is the GPU, and the network and its digits are where they should be."""
    assert pick_device("auto").type == "cuda"
    for device in ("cpu", "cuda"):
        ddpm = load_ddpm(PROJECT / "weights" / "ddpm_mnist.pth", device)
        assert {tensor.device.type for tensor in ddpm.state_dict().values()} == {device}
        assert ddpm.sample([3], steps=2).device.type == device
