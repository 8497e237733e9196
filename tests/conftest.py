"""What the tests share: a copy of the project, a small data set in MNIST's format, and ways to run the scripts."""

import contextlib
import importlib
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpm_model import IMAGE_SHAPE, N_CLASSES

PROJECT = Path(__file__).resolve().parent.parent
SMALL_RUN = ("--n-feat", "8", "--n-T", "40", "--batch-size", "16", "--data-dir", "small", "--device", "cpu")
TOO_LONG = 300 * "w"  # more than any file system takes as a name

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals that Windows does not have")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, and so its children


def write_small_mnist(data_dir: Path, n_images: int = 64) -> None:
    """What load_mnist reads: a bright bar at a height that is the label, and the image's number in a corner pixel.

    All tests take their data from here. With a load_mnist of your own, change this function to what yours reads.
    """
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    labels = (torch.arange(n_images) % N_CLASSES).byte()
    images = torch.zeros(n_images, *IMAGE_SHAPE, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n_images)
    for image, label in zip(images, labels.tolist()):
        image[:, 2 * label + 3 : 2 * label + 6, 6:22] = 255
    for split in ("train", "t10k"):
        for name, tensor in (("images-idx3", images[:, 0]), ("labels-idx1", labels)):
            header = struct.pack(f">BBBB{tensor.ndim}I", 0, 0, 8, tensor.ndim, *tensor.shape)  # 8 is uint8
            (raw / f"{split}-{name}-ubyte").write_bytes(header + tensor.numpy().tobytes())


def fill(folder: Path) -> Path:
    """Puts the scripts and the small data set into a folder, but no weights and no pictures."""
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, folder)
    write_small_mnist(folder / "small")
    return folder


@pytest.fixture
def workdir(tmp_path) -> Path:
    return fill(tmp_path)


def link(path: Path, target: str | Path) -> None:
    """Makes path a symbolic link, or skips the test."""
    path.parent.mkdir(exist_ok=True)
    try:
        path.symlink_to(target)
    except (OSError, NotImplementedError):
        pytest.skip("no symbolic links here")


@contextlib.contextmanager
def file_limit(n_bytes: int):
    """What is written beyond this size fails, as on a full disk. Only around one call: pytest writes files too."""
    resource = pytest.importorskip("resource", reason="no limit on file sizes here")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def run(cwd: Path, *command: str) -> subprocess.CompletedProcess:
    """Runs `python command...` in cwd to its end."""
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, encoding="utf-8", timeout=280,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"}, stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip


@pytest.fixture
def call(monkeypatch, capfd):
    """Runs a script in this process: as `run`, without the seconds that importing torch takes."""
    replace = os.replace

    def guarded(source, target):
        assert not Path(target).is_relative_to(PROJECT), f"a test would have replaced {target}"
        replace(source, target)

    def call(cwd: Path, script: str, *options: str) -> subprocess.CompletedProcess:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        status, message = 0, ""
        threads = torch.get_num_threads()
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except SystemExit as exit:  # with a text, Python prints it and exits with 1
            status, message = (1, f"{exit.code}\n") if isinstance(exit.code, str) else (exit.code or 0, "")
        finally:
            torch.set_num_threads(threads)  # a script may have chosen fewer
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(sys.argv, status, out, err + message)

    monkeypatch.setattr(os, "replace", guarded)
    return call


def assert_one_line_error(result: subprocess.CompletedProcess, *mentions: str | Path) -> None:
    """The command failed with status 1 and one line on stderr that has all of mentions."""
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for text in mentions:
        assert str(text) in result.stderr, result.stderr
