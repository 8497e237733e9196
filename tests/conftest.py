"""What the tests share: a small network, a small data set in MNIST's format, and ways to run the scripts."""

import contextlib
import importlib
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddpm_model import DDPM, IMAGE_SHAPE, ContextUnet

PROJECT = Path(__file__).resolve().parent.parent
N_CLASSES = 7  # of the small network, where a test does not ask for another number
LABELS = torch.arange(64) % 10  # of the small data set
SMALL_RUN = ("--n-feat", "8", "--n-T", "40", "--batch-size", "16", "--data-dir", "small", "--device", "cpu")

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals that Windows does not have")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, and so its children


def small_ddpm(n_feat: int = 8, n_classes: int = N_CLASSES, n_T: int = 40, drop_prob: float = 0.1) -> DDPM:
    """Quick and untrained, always the same, with a network of which every part counts, also what starts at 0."""
    torch.manual_seed(0)
    ddpm = DDPM(ContextUnet(n_feat, n_classes), n_T, drop_prob)
    with torch.no_grad():
        for parameter in ddpm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return ddpm


def write_small_mnist(data_dir: Path, labels: torch.Tensor = LABELS) -> None:
    """What load_mnist reads: a bright bar at a height that is the label, and the image's number in a corner pixel."""
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = torch.zeros(len(labels), *IMAGE_SHAPE, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels))
    for image, label in zip(images, labels.tolist()):
        image[:, 2 * label + 3 : 2 * label + 6, 6:22] = 255
    for split in ("train", "t10k"):
        for name, tensor in (("images-idx3", images[:, 0]), ("labels-idx1", labels.byte())):
            header = struct.pack(f">BBBB{tensor.ndim}I", 0, 0, 8, tensor.ndim, *tensor.shape)  # 8 is uint8
            (raw / f"{split}-{name}-ubyte").write_bytes(header + tensor.numpy().tobytes())


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A folder with the scripts and the small data set, but no weights and no pictures."""
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, tmp_path)
    write_small_mnist(tmp_path / "small")
    return tmp_path


def link(path: Path, target: str | Path) -> None:
    """Makes path a symbolic link, or skips the test."""
    path.parent.mkdir(exist_ok=True)
    try:
        path.symlink_to(target)
    except (OSError, NotImplementedError):
        pytest.skip("no symbolic links here")


def progress_lines(monkeypatch, work: Callable[[], object]) -> tuple[object, list[str]]:
    """What work returns and writes to stderr, a terminal of 40 columns: lines that each overwrite the one before."""
    controller, terminal = os.openpty()
    with open(controller, newline="\n") as screen, open(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "40")
        patch.setattr(sys, "stderr", stderr)
        result = work()
        print("end", file=stderr, flush=True)
        *lines, end, _ = screen.readline().split("\r")
    assert end == "end" and all(len(line) == 39 for line in lines), lines
    return result, [line.rstrip() for line in lines]


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
    assert all(str(text) in result.stderr for text in mentions), result.stderr
