"""The scripts that draw, make videos and stitch, as a user runs them; what all scripts share; what is shipped."""

import io
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_model
import inference_ddpm
from ddpm_model import DDPM, N_CLASSES, ContextUnet, image_grid, load_ddpm, save_weights
from tests import evaluate
from tests.conftest import PROJECT, SMALL_RUN, TOO_LONG, assert_one_line_error, file_limit, link, run
from tests.digit_classifier import judge, load_classifier

GALLERY = PROJECT / "generated_outputs"
WEIGHTS = PROJECT / "weights" / "ddpm_mnist.pth"
VIDEO = "denoising_process_0to9.mp4"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture
def quick(workdir):
    """A folder whose weights are of a small untrained network, quick to draw with: for all but the looks."""
    torch.manual_seed(0)
    save_weights(workdir / "weights" / "ddpm_mnist.pth", DDPM(ContextUnet(n_feat=8), 40))
    return workdir


@pytest.fixture
def draw(call):
    return lambda cwd, *options: call(cwd, "inference_ddpm.py", *options)


# ---- Drawing


@pytest.mark.parametrize(("count", "rows", "columns"), [(9, 3, 3), (1, 1, 1), (7, 3, 3), (5, 2, 3)])
def test_grid_geometry(quick, count, rows, columns, draw):
    result = draw(quick, "--digit", "3", "--count", count, "--scale", "1", "--steps", "2")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no progress line where there is no terminal, and no noise
    grid = pixels(quick / "generated_outputs" / "digit_3_grid.png")
    assert grid.shape == (30 * rows + 2, 30 * columns + 2)
    last_row = grid[30 * (rows - 1) + 2 :]
    used = 30 * (count - columns * (rows - 1))
    assert last_row[:, :used].any() and not last_row[:, used + 2 :].any()


def test_seed_is_said(quick, draw):
    """And repeats the picture, also where it was not given."""
    path = quick / "generated_outputs" / "digit_5_grid.png"
    seed = re.fullmatch(r"saved .*digit_5_grid.png \(seed (\d+)\)\n", draw(quick, "--steps", "3").stdout)[1]
    drawn = path.read_bytes()
    assert f"(seed {seed})" in draw(quick, "--steps", "3", "--seed", seed).stdout
    assert path.read_bytes() == drawn


def test_scale_and_seed(quick, draw):
    """Each pixel is enlarged, and a seed repeats the file to the byte."""
    path = quick / "generated_outputs" / "digit_5_grid.png"
    contents = []
    for options in (["--seed", "7"], ["--seed", "7"], ["--seed", "8"], [], [], ["--seed", "7", "--scale", "1"]):
        assert draw(quick, "--steps", "3", *options).returncode == 0
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert len(set(contents)) == 5
    small = pixels(path)
    path.write_bytes(contents[0])
    assert small.shape == (92, 92) and (pixels(path) == np.kron(small, np.ones((4, 4), np.uint8))).all()


def test_no_two_seeds_are_the_same(quick, draw):
    """torch uses 32 bits of a seed."""
    path = quick / "generated_outputs" / "digit_9_grid.png"
    contents = set()
    for seed in (0, 1, inference_ddpm.N_SEEDS - 1):
        assert draw(quick, "--steps", "1", "--digit", "9", "--seed", seed).returncode == 0
        contents.add(path.read_bytes())
    assert len(contents) == 3
    assert 10 * (inference_ddpm.N_SEEDS - 1) + 9 < 2**32
    assert draw(quick, "--seed", inference_ddpm.N_SEEDS).returncode == 2


def test_several_digits(quick, draw):
    """They are those that are drawn alone."""
    out = quick / "generated_outputs"
    assert draw(quick, "--digit", "2", "6", "--seed", "1", "--steps", "3").returncode == 0
    together = [(out / f"digit_{digit}_grid.png").read_bytes() for digit in (2, 6)]
    assert draw(quick, "--digit", "6", "--seed", "1", "--steps", "3").returncode == 0
    assert together[1] == (out / "digit_6_grid.png").read_bytes() != together[0]


def test_many_digits(quick, monkeypatch, draw):
    """They are drawn in batches."""
    sizes = []
    monkeypatch.setattr(inference_ddpm, "BATCH_SIZE", 4)
    monkeypatch.setattr(DDPM, "guided_v", lambda self, x, *args: sizes.append(len(x)) or x)
    assert draw(quick, "--count", "10", "--steps", "1", "--scale", "1").returncode == 0
    assert sizes == [4, 4, 2]
    assert pixels(quick / "generated_outputs" / "digit_5_grid.png").shape == (30 * 3 + 2, 30 * 4 + 2)


# ---- Video


def read_video(path: Path) -> tuple[list[np.ndarray], float, str]:
    """(frames, frames a second, codec)."""
    video = cv2.VideoCapture(str(path))
    codec = int(video.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little").decode()
    frames = [video.retrieve()[1] for _ in iter(video.grab, False)]
    return frames, video.get(cv2.CAP_PROP_FPS), codec


@pytest.mark.parametrize(("steps", "scale", "outdir"), [(40, 2, "generated_outputs"), (2, 1, "12:30"), (2, 1, "权重")])
def test_video(quick, steps, scale, outdir, draw):
    folder = quick / outdir
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no such names on this file system")
    options = ("--steps", steps, "--scale", scale, "--outdir", outdir, "--count", "500000")  # count is of grids
    result = draw(quick, "--video", "--seed", "1", *options)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert {path.name for path in folder.iterdir()} == {VIDEO, "denoising_process_0to9.gif"}
    frames, fps, codec = read_video(shutil.copy(folder / VIDEO, quick / "copy.mp4"))
    assert codec.upper() in ("VP90", "VP09")  # browsers play it
    assert fps == inference_ddpm.FPS and len(frames) == inference_ddpm.N_FRAMES + 2 * fps
    frames = np.stack(frames).astype(int)
    assert frames.shape[1:] == (74 * scale, 152 * scale, 3)
    assert np.abs(frames[-int(fps) :] - frames[-1]).mean() < 2  # at least the last second shows the finished digits
    noise = frames[0][2 * scale : 30 * scale, 2 * scale : 30 * scale]
    assert noise.std() > 60 and 100 < noise.mean() < 155  # pure noise, cut off at black and white

    with Image.open(folder / "denoising_process_0to9.gif") as gif:
        durations = []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
        assert gif.info["loop"] == 0 and sum(durations) == pytest.approx(6000, rel=0.1)
        assert np.abs(np.array(gif.convert("L")) - frames[-1][..., 0]).mean() < 12  # in 16 grey levels


def test_no_codec(quick, monkeypatch, draw):
    real = cv2.VideoWriter
    monkeypatch.setattr(cv2, "VideoWriter", lambda *args, **kwargs: real())
    monkeypatch.setattr(cv2, "VideoWriter_fourcc", lambda *code: 0)
    result = draw(quick, "--video", "--steps", "2", "--scale", "1")
    assert_one_line_error(result, "not all 181 frames", "OpenCV without VP9")


def test_frames_show_their_timestep(quick, monkeypatch, draw):
    """From n_T down to 0, few of them near n_T, and each with the images that belong to it."""
    texts, pictures = [], []
    put_text = cv2.putText

    def remember(frame, text, *args):
        texts.append(text)
        pictures.append(frame[:62].copy())
        return put_text(frame, text, *args)

    monkeypatch.setattr(cv2, "putText", remember)
    assert draw(quick, "--video", "--seed", "1", "--scale", "1").returncode == 0
    assert len(texts) == inference_ddpm.N_FRAMES
    timesteps = [int(text.removeprefix("t = ")) for text in texts]
    assert timesteps[0] == 40 and timesteps[-1] == 0 and sorted(timesteps, reverse=True) == timesteps
    assert timesteps.index(20) < len(timesteps) / 2
    ddpm = load_ddpm(quick / "weights" / "ddpm_mnist.pth")
    torch.manual_seed(1)
    states = [np.array(image_grid(x, columns=5)).astype(int) for x in ddpm.denoise(range(N_CLASSES))]
    # Threads round otherwise, and 2 % (5 of 255) from black is black.
    assert all(np.abs(picture - states[40 - t]).max() < 8 for t, picture in zip(timesteps, pictures))


def test_full_disk(quick, draw):
    """OpenCV does not report it. The old video stays."""
    (quick / "out").mkdir()
    (quick / "out" / VIDEO).write_bytes(b"precious")
    with file_limit(10_000):
        result = draw(quick, "--video", "--steps", "2", "--scale", "1", "--outdir", "out")
    assert_one_line_error(result, "frames")
    assert result.stdout == ""
    assert [path.name for path in (quick / "out").iterdir()] == [VIDEO]
    assert (quick / "out" / VIDEO).read_bytes() == b"precious"


def test_without_opencv(quick, monkeypatch, draw):
    """As on a system without libGL. Nothing is drawn for it."""
    (quick / "broken").mkdir()
    (quick / "broken" / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open')", encoding="utf-8")
    monkeypatch.syspath_prepend(quick / "broken")
    monkeypatch.delitem(sys.modules, "cv2")
    monkeypatch.setattr(DDPM, "denoise", None)
    assert_one_line_error(draw(quick, "--video"), "libGL.so.1")
    assert not list((quick / "generated_outputs").iterdir())


# ---- Stitching


def write_grids(folder: Path, size: tuple[int, int] = (92, 92)) -> None:
    folder.mkdir(exist_ok=True)
    for digit in range(10):
        Image.fromarray(np.full(size, 20 * digit + 10, np.uint8)).save(folder / f"digit_{digit}_grid.png")


@pytest.fixture
def grids(workdir):
    write_grids(workdir / "generated_outputs")
    return workdir / "generated_outputs"


def test_stitching(workdir, call):
    """0 to 4 are above 5 to 9."""
    write_grids(workdir / "generated_outputs", (92, 62))
    result = call(workdir, "stitch_images.py")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    expected = np.repeat(np.repeat((20 * np.arange(10) + 10).reshape(2, 5), 92, axis=0), 62, axis=1)
    assert (pixels(workdir / "combined_2x5_grid.png") == expected).all()
    result = call(workdir, "stitch_images.py", "--indir", "generated_outputs", "--output", "new/sheet.png")
    assert result.returncode == 0 and (pixels(workdir / "new" / "sheet.png") == expected).all()


def test_format_of_the_sheet(workdir, grids, call):
    """It is that of the name."""
    for name, form in {"sheet.jpg": "JPEG", "sheet.png": "PNG"}.items():
        assert call(workdir, "stitch_images.py", "--output", name).returncode == 0
        with Image.open(workdir / name) as sheet:
            assert sheet.format == form and sheet.size == (5 * 92, 2 * 92)
    assert_one_line_error(call(workdir, "stitch_images.py", "--output", "sheet.xyz"), "sheet.xyz", "extension")


def test_stitching_needs_pillow_alone(workdir, grids):
    """It does not wait for torch."""
    (workdir / "torch.py").write_text("raise ImportError('torch')", encoding="utf-8")
    (workdir / "numpy.py").write_text("raise ImportError('numpy')", encoding="utf-8")
    result = run(workdir, "stitch_images.py")
    assert result.returncode == 0 and (workdir / "combined_2x5_grid.png").exists(), result.stderr


def picture(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"", "cannot identify"), (b"no picture", "cannot identify"),
     (picture(92, 92)[:60], "truncated"), (picture(62, 31), "not the size of digit_0_grid.png")],
    ids=["missing", "empty", "foreign", "truncated", "another size"],
)  # fmt: skip
def test_bad_grids(workdir, grids, call, content, reason):
    path = grids / "digit_2_grid.png"
    path.unlink() if content is None else path.write_bytes(content)
    (workdir / "combined_2x5_grid.png").write_bytes(b"precious")
    assert_one_line_error(call(workdir, "stitch_images.py"), "digit_2_grid.png", reason)
    assert (workdir / "combined_2x5_grid.png").read_bytes() == b"precious"


def test_full_disk_while_stitching(workdir, grids, call):
    (workdir / "combined_2x5_grid.png").write_bytes(b"precious")
    before = set(workdir.iterdir())
    with file_limit(200):
        result = call(workdir, "stitch_images.py")
    assert_one_line_error(result, "combined_2x5_grid.png", "too large")
    assert (workdir / "combined_2x5_grid.png").read_bytes() == b"precious" and set(workdir.iterdir()) == before


# ---- Bad input


@pytest.mark.parametrize(
    ("options", "allowed"),
    [("--digit 10", "from 0 to 9"), ("--digit -1", "from 0 to 9"), ("--digit 5 x", "invalid int value: 'x'"),
     ("--count 0", "from 1"), ("--count -3", "from 1"), ("--count 2.5", "invalid int value: '2.5'"),
     ("--steps 0", "from 1"),
     ("--scale 0", "from 1 to"), ("--scale -4", "from 1 to"), ("--guide-w nan", "from 0 to"),
     ("--guide-w -1", "from 0 to"), ("--guide-w inf", "from 0 to"), ("--seed -1", "from 0 to"),
     ("--eta 2", "from 0 to 1"), ("--device quantum", "device"), ("--count 100000000000", "from 1 to 1000000")],
)  # fmt: skip
def test_impossible_options(tmp_path, monkeypatch, draw, options, allowed):
    monkeypatch.setattr(ddpm_model, "load_ddpm", None)  # it is not reached
    result = draw(tmp_path, *options.split())
    assert result.returncode == 2 and allowed in result.stderr


def test_more_steps_than_the_weights_have(quick, draw):
    for mode in ((), ("--video",)):
        assert_one_line_error(draw(quick, "--steps", "41", *mode), "steps must be in 1 .. 40, not 41")


@pytest.mark.parametrize("content", [None, b"", b"not weights"])
@pytest.mark.parametrize("mode", [(), ("--video",)])
def test_unusable_weights(workdir, content, mode, draw):
    if content is not None:
        (workdir / "bad.pth").write_bytes(content)
    assert_one_line_error(draw(workdir, "--weights", "bad.pth", *mode), "bad.pth")
    assert not (workdir / "generated_outputs").exists()


DRAW = ("inference_ddpm.py", "--steps", "1")
STITCH = ("stitch_images.py",)


@pytest.mark.parametrize(
    ("command", "named"),
    [((*DRAW, "--outdir", "ddpm_model.py"), "ddpm_model.py"),
     ((*DRAW, "--video", "--scale", "1", "--outdir", "ddpm_model.py"), "ddpm_model.py"),
     ((*DRAW, "--outdir", TOO_LONG), TOO_LONG), ((*DRAW, "--weights", TOO_LONG), TOO_LONG),
     ((*STITCH, "--output", "small/MNIST"), "small/MNIST"), ((*STITCH, "--output", f"{TOO_LONG}.png"), TOO_LONG),
     ((*STITCH, "--output", "ddpm_model.py/sheet.png"), "ddpm_model.py"), ((*STITCH, "--indir", TOO_LONG), TOO_LONG),
     (("train_ddpm.py", "--data-dir", TOO_LONG), TOO_LONG)],
    ids=str,
)  # fmt: skip
def test_impossible_paths(quick, grids, call, monkeypatch, command, named):
    """An output folder that cannot be made is found before anything is drawn."""
    monkeypatch.setattr(DDPM, "denoise", None)
    before = (quick / "ddpm_model.py").read_bytes()
    assert_one_line_error(call(quick, *command), Path(named))
    assert (quick / "ddpm_model.py").read_bytes() == before and (quick / "small" / "MNIST" / "raw").is_dir()


# ---- What all scripts share


COMMANDS = {  # of a home folder and an output folder
    "train": "train_ddpm.py {2} --epochs 1 --data-dir {0}/small --weights {0}/{1}/a.pth",
    "inference": "inference_ddpm.py --digit 0 1 --steps 2 --weights {0}/weights/ddpm_mnist.pth --outdir {0}/{1}",
    "stitch": "stitch_images.py --indir {0}/generated_outputs --output {0}/{1}/sheet.png",
}
PRODUCTS = {"train": "a.pth", "inference": "digit_1_grid.png", "stitch": "sheet.png"}


@pytest.fixture(params=COMMANDS)
def script(request, quick, grids):
    """(a function that gives a command, the name of the file that it writes), of each script."""

    def command(out: str, home: str = ".") -> list[str]:
        return COMMANDS[request.param].format(home, out, " ".join(SMALL_RUN)).split()

    return command, PRODUCTS[request.param]


def test_home(quick, tmp_path_factory, monkeypatch, call, script):
    """~ is expanded in all paths."""
    command, product = script
    monkeypatch.setenv("HOME", str(quick))
    monkeypatch.setenv("USERPROFILE", str(quick))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    result = call(elsewhere, *command("new", home="~"))
    assert result.returncode == 0, result.stderr
    assert (quick / "new" / product).exists() and not list(elsewhere.iterdir())


def test_output_is_a_link(quick, call, script):
    """To a file, and to none yet. It stays a link."""
    command, product = script
    (quick / "old").write_bytes(b"old")
    for target in (quick / "old", quick / "new"):
        (quick / "out" / product).unlink(missing_ok=True)
        link(quick / "out" / product, target)
        assert call(quick, *command("out")).returncode == 0
        assert (quick / "out" / product).is_symlink() and target.stat().st_size > 100


def test_from_another_folder(quick, tmp_path_factory):
    """The weights beside the script are found, also through a link. The picture is put into the working directory."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    link(elsewhere / "draw.py", quick / "inference_ddpm.py")
    result = run(elsewhere, "draw.py", "--steps", "2")
    assert result.returncode == 0 and (elsewhere / "generated_outputs" / "digit_5_grid.png").exists(), result.stderr


@pytest.mark.parametrize("name", ["train_ddpm.py", "inference_ddpm.py", "stitch_images.py"])
def test_help_has_defaults(tmp_path, call, name):
    """Each option but --help says its default, and none says None."""
    text = " ".join(call(tmp_path, name, "--help").stdout.split("options:")[1].split())
    options = re.findall(r" (--[\w-]+) .*?(?= --|$)", text.replace("-h, --help", ""))
    assert len(options) > 1 and text.count("(default: ") == len(set(options)) and "None" not in text


# ---- What is shipped


def test_shipped_weights():
    """They draw what was asked for, as near to the test set as real digits; are small, and of the default network."""
    labels = torch.arange(N_CLASSES).repeat(20)
    digits = load_ddpm(WEIGHTS).sample(labels, steps=50, generator=torch.Generator().manual_seed(0))
    features, seen = judge(load_classifier(), digits)
    assert (seen == labels).double().mean() >= 0.98
    real = torch.load(evaluate.FIXTURE, weights_only=True)
    some = evaluate.first_of_each_class(real["train_labels"], 20)
    of_real_digits = evaluate.frechet_distance(real["train"][some], real["test"])
    assert evaluate.frechet_distance(features, real["test"]) < of_real_digits
    assert WEIGHTS.stat().st_size <= 6e6
    config = torch.load(WEIGHTS, weights_only=True)["config"]
    assert config["n_T"] == 400 and config["drop_prob"] == 0.1


def test_gallery_shows_each_digit():
    """The tiles of the committed sheet are the digits that their places say."""
    sheet = torch.from_numpy(pixels(GALLERY / "combined_2x5_grid.png"))[::4, ::4]  # undo --scale 4
    cells = sheet.unflatten(0, (2, 92)).unflatten(2, (5, 92)).transpose(1, 2).flatten(0, 1)  # [10, 92, 92]
    tiles = cells[:, 2:, 2:].unflatten(1, (3, 30)).unflatten(3, (3, 30))[:, :, :28, :, :28]  # [10, 3, 28, 3, 28]
    images = tiles.transpose(2, 3).reshape(90, 1, 28, 28) / 255
    _, seen = judge(load_classifier(), images)
    assert (seen == torch.arange(10).repeat_interleave(9)).sum() >= 88


def test_the_judge_knows_the_test_set():
    """The accuracy that tests/digit_classifier.py prints, from the committed predictions on the MNIST test set."""
    real = torch.load(PROJECT / "tests" / "fixtures" / "mnist_features.pth", weights_only=True)
    assert len(real["test_labels"]) == 10_000
    logits = load_classifier().head(real["test"].float())
    assert (logits.argmax(1) == real["test_labels"]).double().mean() >= 0.99
    assert (PROJECT / "tests" / "fixtures" / "digit_classifier.pth").stat().st_size <= 500_000
