"""README is true: its commands run as they stand there, and the options that it names exist."""

import re
import shutil
import subprocess

import cv2
import pytest
from PIL import Image

from tests.conftest import PROJECT, fill, run, write_small_mnist
from tests.test_pictures import write_grids

README = (PROJECT / "README.md").read_text(encoding="utf-8")
RECORD = (PROJECT / "tests" / "README.md").read_text(encoding="utf-8")
ENGLISH, CHINESE = README.split("\n# 中文\n")
SCRIPTS = ("train_ddpm.py", "inference_ddpm.py", "stitch_images.py", "tests.evaluate", "tests.figures")


def test_four_commands(tmp_path):
    """In their order, so the digits are drawn by weights that one step an epoch on 128 bars has made."""
    fill(tmp_path)
    write_small_mnist(tmp_path / "data", n_images=128)
    shutil.copytree(PROJECT / "weights", tmp_path / "weights")
    shipped = (tmp_path / "weights" / "ddpm_mnist.pth").read_bytes()
    block = README.split("<!-- commands -->")[1].split("<!-- end -->")[0]
    train, draw, video, stitch = (
        line.split("#")[0].split() for line in block.splitlines() if line.startswith("python ")
    )
    pictures = tmp_path / "generated_outputs"

    result = run(tmp_path, *train[1:])
    assert result.returncode == 0 and len(re.findall(r"^epoch", result.stdout, re.MULTILINE)) == 30, result.stderr
    assert (tmp_path / "weights" / "ddpm_mnist.pth").read_bytes() != shipped
    assert len(list((tmp_path / "weights").glob("ddpm_mnist.pth.epoch_*.png"))) == 6

    result = run(tmp_path, *draw[1:])
    assert result.returncode == 0 and "digit_5_grid.png" in result.stdout, result.stderr
    with Image.open(pictures / "digit_5_grid.png") as grid:
        assert grid.size == (92 * 4, 92 * 4)

    result = run(tmp_path, *video[1:])
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert cv2.VideoCapture(str(pictures / "denoising_process_0to9.mp4")).get(cv2.CAP_PROP_FRAME_WIDTH) >= 600
    assert (pictures / "denoising_process_0to9.gif").exists()

    write_grids(pictures)
    result = run(tmp_path, *stitch[1:])
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "combined_2x5_grid.png") as sheet:
        assert sheet.size == (5 * 92, 2 * 92)


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


def test_length_of_files():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, flags=re.M)
    assert len(rows) == 8
    for name, lines in rows:
        assert abs(len((PROJECT / name).read_text(encoding="utf-8").splitlines()) - int(lines)) <= 10, name


def test_both_languages_say_the_same():
    """Commands, code and rows of figures."""

    def facts(text: str) -> list[str]:
        commands = [line.split("#")[0].strip() for line in re.findall(r"^(?:python3?|pip|mv) .*", text, flags=re.M)]
        code = re.findall(r"^(?:from|ddpm|digits|save_image).*?(?=$|  #)", text, flags=re.M)
        rows = [re.sub(r"^\|[^|]*", "", row) for row in re.findall(r"^\|.*\d %.*", text, flags=re.M)]
        return commands + code + rows

    assert facts(ENGLISH) == facts(CHINESE)
    assert len(facts(ENGLISH)) > 15


def written_files(command: str) -> set[str]:
    """What a command of README writes, by the options that say so."""

    def value(option: str, default: str) -> str:
        match = re.search(rf"{option} ((?:\S+ ?)+?)(?= --|$)", command)
        return match[1] if match else default

    if "train_ddpm.py" in command:
        return {value("--weights", "weights/ddpm_mnist.pth")}
    if "inference_ddpm.py" in command:
        names = ["video"] if "--video" in command else [f"digit_{digit}" for digit in value("--digit", "5").split()]
        return {f"{value('--outdir', 'generated_outputs')}/{name}" for name in names}
    return {value("--output", "combined_2x5_grid.png")} if "stitch_images.py" in command else set()


def test_no_two_commands_of_a_block_write_the_same_file():
    """Nor does an exercise replace what is in the repository."""
    n_files = 0
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        written = [name for line in block.splitlines() for name in written_files(line.split("#")[0].strip())]
        assert len(set(written)) == len(written), block
        n_files += len(written)
    assert n_files > 20
    exercises = re.findall(r"^## (?:Try yourself|动手试试)\n(.*?)^## ", README, flags=re.M | re.S)
    assert len(exercises) == 2
    for line in "\n".join(exercises).splitlines():
        assert all(name.startswith("try/") for name in written_files(line.strip())), line


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
