"""README is true: its commands run as they stand there, and it lists the options that there are."""

import re
import shutil
import subprocess

import cv2
import pytest
from PIL import Image

from tests.conftest import PROJECT, fill, run, write_small_mnist

README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_four_commands_in_a_copy_of_the_project(tmp_path):
    """In their order, so the digits are drawn by weights that one step an epoch on 128 bars has made."""
    fill(tmp_path)
    write_small_mnist(tmp_path / "data", n_images=128)
    shutil.copytree(PROJECT / "weights", tmp_path / "weights")
    shipped = (tmp_path / "weights" / "ddpm_mnist.pth").read_bytes()
    block = README.split("<!-- commands -->")[1].split("<!-- end -->")[0]
    train, draw, film, stitch = (
        line.split("#")[0].split() for line in block.splitlines() if line.startswith("python ")
    )
    pictures = tmp_path / "generated_outputs"

    result = run(tmp_path, *train[1:])
    assert result.returncode == 0 and len(re.findall(r"^epoch", result.stdout, re.MULTILINE)) == 30, result.stderr
    assert (tmp_path / "weights" / "ddpm_mnist.pth").read_bytes() != shipped
    assert len(list(pictures.glob("epoch_*.png"))) == 6

    result = run(tmp_path, *draw[1:])
    assert result.returncode == 0 and "digit_5_grid.png" in result.stdout, result.stderr
    with Image.open(pictures / "digit_5_grid.png") as grid:
        assert grid.size == (92 * 4, 92 * 4)

    result = run(tmp_path, *film[1:])
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert cv2.VideoCapture(str(pictures / "denoising_process_0to9.mp4")).get(cv2.CAP_PROP_FRAME_WIDTH) >= 600

    others = ["0", "1", "2", "3", "4", "6", "7", "8", "9"]
    assert run(tmp_path, *draw[1:2], "--digit", *others, "--steps", "5").returncode == 0
    result = run(tmp_path, *stitch[1:])
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "combined_2x5_grid.png") as sheet:
        assert sheet.size == (5 * 92 * 4, 2 * 92 * 4)


@pytest.mark.parametrize("script", ["train_ddpm.py", "inference_ddpm.py", "stitch_images.py"])
def test_readme_lists_the_options_and_no_others(script):
    help_text = run(PROJECT, script, "--help").stdout
    options = set(re.findall(r"^  (--[\w-]+)", help_text, re.MULTILINE))
    table = README.split(f"| `{script}` | default | |")[1].split("\n\n")[0]
    assert options == set(re.findall(r"`(--[\w-]+)`", table))


def test_only_the_agreed_names_are_at_the_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    names = {path.split("/")[0] for path in tracked.stdout.split()}
    assert {name for name in names if not name.startswith(".")} == {
        "README.md", "ddpm_model.py", "generated_outputs", "inference_ddpm.py", "requirements.txt", "stitch_images.py",
        "tests", "train_ddpm.py", "weights",
    }  # fmt: skip


def test_packages_are_the_agreed_ones():
    assert (PROJECT / "requirements.txt").read_text().split() == [
        "torch", "torchvision", "numpy", "opencv-python", "pillow",
    ]  # fmt: skip
