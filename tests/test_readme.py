"""README is true: its commands run as they stand there, and what it names exists."""

import ast
import inspect
import re
import shutil
import subprocess
import sys

import pytest

import inference_ddpm
import train_ddpm
from ddpm_model import DDPM, GUIDANCE_INTERVAL, ContextUnet
from tests.conftest import PROJECT, write_small_mnist

README = (PROJECT / "README.md").read_text(encoding="utf-8").replace("\\\n", "")  # a line that ends in \ goes on
RECORD = (PROJECT / "tests" / "README.md").read_text(encoding="utf-8")
ENGLISH, CHINESE = re.split(r"^(?=#+ .*[一-龥])", README, maxsplit=1, flags=re.M)  # at the first Chinese heading
SCRIPTS = ("train_ddpm.py", "inference_ddpm.py", "stitch_images.py")
TOOLS = ("tests.evaluate", "tests.figures", "tests.benchmark", "tests.digit_classifier")


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Each line that runs a script, without its comment, and the files that it writes, by the options that say so."""
    found = []
    for command in re.findall(r"^python \w+\.py[^#\n]*\b", text, flags=re.M):
        script, *parts = command.split(" --")
        options = dict(part.partition(" ")[::2] for part in parts)
        outdir = options.get("outdir", "generated_outputs")
        if "train_ddpm.py" in script:
            names = [options.get("weights", "weights/ddpm_mnist.pth")]
        elif "stitch_images.py" in script:
            names = [options.get("output", "combined_2x5_grid.png")]
        elif "video" in options:
            names = [f"{outdir}/denoising_process_0to9.{suffix}" for suffix in ("mp4", "gif")]
        else:
            names = [f"{outdir}/digit_{digit}_grid.png" for digit in options.get("digit", "5").split()]
        found.append((command, names))
    return found


def test_four_commands(workdir, call, monkeypatch):
    """They run in their order in a fresh copy, and write what they should."""
    four = README.split("<!-- commands -->")[1].split("<!-- end -->")[0]
    # To be quick, digits are drawn in 5 steps, and training is that of a small network on 64 bars, one step an epoch.
    timesteps = DDPM.timesteps
    monkeypatch.setattr(DDPM, "timesteps", lambda self, steps=None: timesteps(self, min(steps or 5, 5)))
    monkeypatch.setattr(train_ddpm, "ContextUnet", lambda n_feat, n_classes: ContextUnet(n_feat // 4, n_classes))
    write_small_mnist(workdir / "data")
    for folder in ("weights", "generated_outputs"):
        shutil.copytree(PROJECT / folder, workdir / folder)
    for command, names in commands(four):
        for name in names:
            (workdir / name).unlink(missing_ok=True)
        result = call(workdir, *command.split()[1:])
        assert result.returncode == 0 and all((workdir / name).exists() for name in names), result.stderr
    assert all(part in four for part in (*SCRIPTS, "--digit", "--video"))


def test_defaults(monkeypatch):
    """Those that README states, of the scripts and of the library."""
    monkeypatch.setattr("sys.argv", ["inference_ddpm.py"])
    train, drawing = train_ddpm.parse_args([]), inference_ddpm.parse_args()
    assert (train.epochs, train.batch_size, train.lr, train.seed) == (30, 64, 4e-3, 0)
    assert (drawing.count, drawing.scale, GUIDANCE_INTERVAL) == (9, 4, (0.4, 0.9))
    shared = {"n_feat": 32, "n_T": 400, "drop_prob": 0.1, "guide_w": 0.25, "eta": 1, "steps": None}
    parameters = [inspect.signature(function).parameters for function in (ContextUnet, DDPM, DDPM.denoise)]
    library = {name: parameter.default for some in parameters for name, parameter in some.items()}
    assert shared.items() <= (vars(train) | vars(drawing)).items() and shared.items() <= library.items()
    for stated in (r"\b30 .{0,2}epoch", r"\b400 .{0,3}(step|步)", r"\b0\.25"):
        assert re.search(stated, ENGLISH) and re.search(stated, CHINESE), stated


def test_python_code():
    """It compiles, and what it imports exists."""
    code = "".join(code_blocks(README, "python"))
    imports = [node for node in ast.parse(code).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports
    pytest.importorskip("diffusers")
    exec(ast.unparse(imports))


def test_options_exist(tmp_path, call):
    """Those behind a script's name belong to it. A code span that starts with an option is about any of the scripts."""
    texts = {script: call(tmp_path, script, "--help").stdout for script in SCRIPTS + TOOLS}
    options = {script: set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.M)) for script, text in texts.items()}
    options["any"] = set.union(*options.values())
    text = README + RECORD
    named = []
    for line in "".join(code_blocks(text, "bash")).splitlines() + re.findall(r"`([^`\n]+)`", text):
        before, *parts = re.split(f"({'|'.join(map(re.escape, texts))})", line.split("#")[0])
        if before.startswith("--"):
            parts += ["any", before]
        for script, words in zip(parts[::2], parts[1::2]):
            named += [(script, option) for option in re.findall(r"--[\w-]+", words)]
    assert len(named) > 10 and [(script, name) for script, name in named if name not in options[script]] == []


def test_names_exist():
    """Functions, classes, layers and files in the tables; pictures and links, from where the text stands."""
    code = "".join((PROJECT / script).read_text(encoding="utf-8") for script in ("ddpm_model.py", *SCRIPTS))
    names = re.findall(r"^\|.*?\| `(\w+)` \|", ENGLISH + RECORD, flags=re.M)
    assert names and all(re.search(rf"(def|class) {name}\b|self\.{name} = ", code) for name in names), names
    for text, folder in ((README, PROJECT), (RECORD, PROJECT / "tests")):
        names = re.findall(r'(?:\]\(|src=")([^)"#:\s]+)[)"#\s]', text)
        assert names and all((folder / name).exists() for name in names), names


def test_both_languages_say_the_same():
    """Commands, code, and the figures of all tables but that of the equations."""

    def facts(text: str) -> tuple[str, list]:
        code = re.sub(r"(^|\s+)#.*", "", "".join(code_blocks(text, r"\w*")), flags=re.M)
        rows = re.findall(r"^\|[^$\n]*\d[^$\n]*$", text, flags=re.M)
        return code, [re.findall(r"\d+(?:[.,]\d+)*|\.\d+", row) for row in rows]

    assert all(facts(ENGLISH)) and facts(ENGLISH) == facts(CHINESE)


def test_no_command_replaces_a_file():
    """Of another command of its block. The exercises write into try/ only."""
    for block in code_blocks(README, "bash"):
        written = [name for _, names in commands(block) for name in names]
        assert len(set(written)) == len(written), block
    for heading in ("Try yourself", "动手试试"):
        exercises = commands(README.split(f"\n## {heading}\n")[1].split("\n## ")[0])
        assert exercises and all(name.startswith("try/") for _, names in exercises for name in names)


def test_nothing_else_is_needed():
    """No other packages. What is shipped is committed; files of your own may be too. Without git, nothing is asked."""
    packages = ["torch>=2.4", "torchvision", "numpy", "opencv-python", "pillow"]
    assert (PROJECT / "requirements.txt").read_text(encoding="utf-8").split() == packages
    code = "".join((PROJECT / script).read_text(encoding="utf-8") for script in ("ddpm_model.py", *SCRIPTS))
    imported = set(re.findall(r"^ *(?:import|from(?=.* import )) (\w+)", code, re.M))
    assert imported - sys.stdlib_module_names == {"torch", "torchvision", "numpy", "cv2", "PIL", "ddpm_model"}
    git = subprocess.run("git --git-dir=.git ls-files", shell=True, cwd=PROJECT, capture_output=True, encoding="utf-8")
    shipped = {"README.md", "ddpm_model.py", *SCRIPTS, "requirements.txt", "generated_outputs", "tests", "weights"}
    assert not git.stdout or shipped <= {path.split("/")[0] for path in git.stdout.split()}
