"""README is true: its commands run as they stand there, and what it names exists."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys

import pytest

import inference_ddpm
import train_ddpm
from ddpm_model import DDPM, ContextUnet
from tests.conftest import PROJECT, fill, write_small_mnist

README = (PROJECT / "README.md").read_text(encoding="utf-8")
RECORD = (PROJECT / "tests" / "README.md").read_text(encoding="utf-8")
ENGLISH, CHINESE = README.split("\n# 中文\n")
SCRIPTS = ("train_ddpm.py", "inference_ddpm.py", "stitch_images.py", "tests.evaluate", "tests.figures")
FOUR = README.split("<!-- commands -->")[1].split("<!-- end -->")[0]


def commands(text: str) -> list[str]:
    """Each line that runs a script, without its comment."""
    return [line.split("#")[0].strip() for line in re.findall(r"^python \w+\.py.*", text, flags=re.M)]


def written_files(command: str) -> list[str]:
    """What a command writes, by the options that say so."""

    def value(option: str, default: str) -> str:
        match = re.search(rf"{option} ((?:[^-]\S* ?)+)", command)
        return match[1].strip() if match else default

    if "train_ddpm.py" in command:
        return [value("--weights", "weights/ddpm_mnist.pth")]
    if "stitch_images.py" in command:
        return [value("--output", "combined_2x5_grid.png")]
    names = [f"digit_{digit}_grid.png" for digit in value("--digit", "5").split()]
    if "--video" in command:
        names = ["denoising_process_0to9.mp4", "denoising_process_0to9.gif"]
    return [f"{value('--outdir', 'generated_outputs')}/{name}" for name in names]


def test_four_commands(tmp_path, call, monkeypatch):
    """They run in their order in a fresh copy, and write what they should.

    To be quick, training is that of a small network on 64 bars, one step an epoch, and its previews show noise.
    """
    monkeypatch.setattr(train_ddpm, "ContextUnet", lambda n_feat: ContextUnet(n_feat // 4))
    monkeypatch.setattr(DDPM, "sample", lambda self, c, **options: next(self.denoise(c)))
    fill(tmp_path)
    write_small_mnist(tmp_path / "data")
    for folder in ("weights", "generated_outputs"):
        shutil.copytree(PROJECT / folder, tmp_path / folder)
    for command in commands(FOUR):
        files = [tmp_path / name for name in written_files(command)]
        for path in files:
            path.unlink(missing_ok=True)
        result = call(tmp_path, *command.split()[1:])
        assert result.returncode == 0, result.stderr
        assert all(path.exists() for path in files)
    assert all(part in FOUR for part in (*SCRIPTS[:3], "--digit", "--video"))


def test_defaults(monkeypatch):
    """Those that README states, of the scripts and of the library."""
    monkeypatch.setattr(sys, "argv", ["inference_ddpm.py"])
    train, drawing = train_ddpm.parse_args([]), inference_ddpm.parse_args()
    assert (train.epochs, train.batch_size, train.lr, train.seed) == (30, 64, 4e-3, 0)
    assert (drawing.digit, drawing.count, drawing.scale, drawing.steps) == ([5], 9, 4, None)
    assert (train.n_feat, train.n_T, train.drop_prob, drawing.guide_w, drawing.eta) == (32, 400, 0.1, 0.25, 1)
    library = {}
    for function in (ContextUnet, DDPM, DDPM.denoise):
        library |= {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    for name in ("n_feat", "n_T", "drop_prob"):
        assert library[name] == getattr(train, name)
    for name in ("guide_w", "eta", "steps"):
        assert library[name] == getattr(drawing, name)
    for text in (ENGLISH, CHINESE):
        for stated in (r"30 (epochs|个 epoch)", r"400 (steps|步)", r"w = 0\.25"):
            assert re.search(stated, text), stated


def test_python_code():
    """It compiles, and what it imports from here exists."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.py" in (*SCRIPTS, "ddpm_model.py"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block


def test_options_exist(tmp_path, call):
    """Those behind a script's name belong to it. A code span that starts with an option is about any of the scripts."""
    options = {}
    for script in SCRIPTS:
        options[script] = set(re.findall(r"^  (--[\w-]+)", call(tmp_path, script, "--help").stdout, re.MULTILINE))
    text = README + RECORD
    blocks = re.findall(r"```.*?```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = spans + "\n".join(blocks).splitlines()
    named = 0
    for line in lines:
        words = re.findall(r"[\w.-]+", line.split("#")[0])
        known = set.union(*options.values()) if line.startswith("--") else None
        for word in words:
            if word in options:
                known = options[word]
            elif known is not None and word.startswith("--"):
                assert word in known, line
                named += 1
    assert named > 10


def test_functions_exist():
    """The tables of equations and of what is beyond the paper name functions, classes, layers and files."""
    code = "".join((PROJECT / script).read_text(encoding="utf-8") for script in ("ddpm_model.py", *SCRIPTS[:3]))
    rows = re.findall(r"^\|.*?\| `(\w+)` \|", ENGLISH + RECORD, flags=re.M)
    assert len(rows) > 15
    for name in rows:
        assert re.search(rf"(def|class) {name}\b|self\.{name} = ", code), name


def test_files_exist():
    """Pictures and links, from where the text stands."""
    for text, folder in ((README, PROJECT), (RECORD, PROJECT / "tests")):
        names = re.findall(r'\]\(([\w./]+)\)|src="([^"]+)"', text)
        assert len(names) > 1
        for name in names:
            assert (folder / "".join(name)).exists(), name


def test_both_languages_say_the_same():
    """Commands, code, and the figures of all tables but that of the equations."""

    def facts(text: str) -> list[str]:
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
        lines = [re.split(r"(?:^|\s)#", line)[0].rstrip() for line in "".join(blocks).splitlines()]
        rows = re.findall(r"^\|.*\d.*", re.sub(r"^.*\$.*", "", text, flags=re.M), flags=re.M)
        return [line for line in lines if line] + [re.findall(r"\d+(?:[.,]\d+)*|\.\d+", row) for row in rows]

    assert facts(ENGLISH) == facts(CHINESE)
    assert len(facts(ENGLISH)) > 15


def test_no_two_commands_of_a_block_write_the_same_file():
    """Nor do those of the exercises replace what is in the repository."""
    n_files = 0
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        written = [name for command in commands(block) for name in written_files(command)]
        assert len(set(written)) == len(written), block
        n_files += len(written)
    assert n_files > 20
    exercises = re.findall(r"^## (?:Try yourself|动手试试)\n(.*?)^## ", README, flags=re.M | re.S)
    assert len(exercises) == 2
    written = [name for text in exercises for command in commands(text) for name in written_files(command)]
    assert len(written) > 10 and all(name.startswith("try/") for name in written)


def test_top_level():
    """In a copy without git, or inside of another repository, there is nothing to ask."""

    def git(*command: str) -> str:
        result = subprocess.run(["git", *command], cwd=PROJECT, capture_output=True, encoding="utf-8")
        return result.stdout if result.returncode == 0 else ""

    if not shutil.which("git") or not git("rev-parse", "--show-toplevel"):
        pytest.skip("not a git checkout")
    if not PROJECT.samefile(git("rev-parse", "--show-toplevel").strip()):
        pytest.skip("inside of another repository")
    names = {path.split("/")[0] for path in git("ls-files").split()}
    assert {name for name in names if not name.startswith(".")} == {
        "README.md", "ddpm_model.py", "generated_outputs", "inference_ddpm.py", "requirements.txt", "stitch_images.py",
        "tests", "train_ddpm.py", "weights",
    }  # fmt: skip


def test_packages():
    assert (PROJECT / "requirements.txt").read_text(encoding="utf-8").split() == [
        "torch>=2.4", "torchvision", "numpy", "opencv-python", "pillow",
    ]  # fmt: skip
