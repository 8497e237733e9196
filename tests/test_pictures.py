"""The scripts that draw, make videos and stitch, as a user runs them; what all scripts share; what is shipped."""

import io
import math
import os
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import ddpm_model
import inference_ddpm
from ddpm_model import DDPM, IMAGE_SHAPE, ContextUnet, image_grid, load_ddpm, save_weights
from tests import conftest, evaluate
from tests.conftest import PROJECT, SMALL_RUN, assert_one_line_error, file_limit, link, posix, run, small_ddpm
from tests.digit_classifier import judge, load_classifier

WEIGHTS = PROJECT / "weights" / "ddpm_mnist.pth"
VIDEO = "denoising_process_0to9.mp4"
HEIGHT, WIDTH = (size + 2 for size in IMAGE_SHAPE[1:])  # of a tile: an image and the lines between two


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image).astype(int)


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to rounding, which threads do otherwise: what is within 2 % (5 of 255) of black becomes black."""
    return a.shape == b.shape and np.abs(a - b).max() < 8


@pytest.fixture
def quick(workdir):
    """A folder with weights of ten and of six classes, quick to draw with: for all but the looks."""
    for name, n_classes in (("ddpm_mnist.pth", 10), ("other.pth", 6)):
        save_weights(workdir / "weights" / name, small_ddpm(n_classes=n_classes))
    return workdir


@pytest.fixture
def draw(call):
    return lambda cwd, *options: call(cwd, "inference_ddpm.py", *options)


def expected_grid(folder: Path, digit=5, count=9, seed=1, scale=4, weights="weights/ddpm_mnist.pth", **options):
    """The grid that the documented defaults and the documented seed, 10 * seed + digit, give."""
    options = {"guide_w": 0.25, "steps": 40, "eta": 1.0} | options
    generator = torch.Generator().manual_seed(10 * seed + digit)
    digits = load_ddpm(folder / weights).sample([digit] * count, generator=generator, **options)
    return np.array(image_grid(digits, columns=math.ceil(math.sqrt(count)), scale=scale)).astype(int)


@pytest.mark.parametrize("option", [
    {}, {"guide_w": 0}, {"guide_w": 9.0}, {"steps": 3}, {"eta": 0.0}, {"count": 1}, {"count": 7}, {"scale": 1},
    {"digit": 9}, {"seed": 0}, {"seed": inference_ddpm.N_SEEDS - 1}, {"weights": "weights/other.pth"},
], ids=str)  # fmt: skip
def test_every_option_acts(quick, draw, option):
    """Another value of one option draws what it says."""
    command = [f"--{name.replace('_', '-')}={value}" for name, value in ({"seed": 1} | option).items()]
    result = draw(quick, *command)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    picture = pixels(quick / "generated_outputs" / f"digit_{option.get('digit', 5)}_grid.png")
    assert alike(picture, expected_grid(quick, **option))
    assert alike(picture, expected_grid(quick)) == (option == {})


def test_several_digits(quick, draw):
    """Each is what it is alone. --outdir says where they are."""
    options = ("--seed", "1", "--steps", "3", "--outdir", "new")
    result = draw(quick, "--digit", 9, "0", *options)
    for digit in (0, 9):
        path = Path("new", f"digit_{digit}_grid.png")
        assert f"saved {path} (seed 1)\n" in result.stdout
        assert alike(pixels(quick / path), expected_grid(quick, digit, steps=3))
    assert not (quick / "generated_outputs").exists()


def test_seed_is_said(quick, draw):
    """It is another one each time, and repeats the picture, byte for byte."""
    name = "digit_5_grid.png"
    seeds = [re.search(r"\(seed (\d+)\)", draw(quick, "--steps", "3").stdout)[1] for _ in range(2)]
    assert seeds[0] != seeds[1]
    draw(quick, "--steps", "3", "--seed", seeds[1], "--outdir", "new")
    assert (quick / "new" / name).read_bytes() == (quick / "generated_outputs" / name).read_bytes()
    assert 10 * (inference_ddpm.N_SEEDS - 1) + 9 < 2**32  # torch uses 32 bits of a seed


def test_many_digits(quick, monkeypatch, draw):
    """They are drawn in batches."""
    sizes, denoise = [], DDPM.denoise
    monkeypatch.setattr(inference_ddpm, "BATCH_SIZE", 4)
    monkeypatch.setattr(DDPM, "denoise", lambda self, c, **_: sizes.append(len(c)) or denoise(self, c, steps=1))
    assert draw(quick, "--count", "10", "--steps", "1", "--scale", "1").returncode == 0
    assert sizes == [4, 4, 2]
    assert pixels(quick / "generated_outputs" / "digit_5_grid.png").shape == (3 * HEIGHT + 2, 4 * WIDTH + 2)


@pytest.mark.parametrize(("count", "threads"), [(1, 1), (15, 1), (16, 2), (47, 3), (300, 8)])
def test_threads(quick, monkeypatch, draw, count, threads):
    """One, and one more for every 16 images, but not more than there are."""
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert draw(quick, "--count", count, "--steps", "1", "--scale", "1").returncode == 0
    assert chosen[0] == threads


@pytest.mark.parametrize("n_classes", [1, 4])
def test_what_the_weights_do_not_allow(quick, monkeypatch, draw, n_classes):
    """Of fewer classes, the default is the last. What they do not have is an error, and nothing is drawn."""
    save_weights(quick / "weights" / "ddpm_mnist.pth", small_ddpm(n_classes=n_classes))
    assert draw(quick, "--seed", "1", "--steps", "3").returncode == 0
    name = f"digit_{n_classes - 1}_grid.png"
    assert alike(pixels(quick / "generated_outputs" / name), expected_grid(quick, n_classes - 1, steps=3))
    monkeypatch.setattr(DDPM, "guided_v", None)
    assert_one_line_error(draw(quick, "--digit", "0", "7"), f"--digit must be in 0 .. {n_classes - 1},", "not 7")
    assert_one_line_error(draw(quick, "--steps", "41"), "steps must be in 1 .. 40, not 41")
    assert_one_line_error(draw(quick, "--weights", "none.pth", "--outdir", "new"), "No such file", "none.pth")
    assert os.listdir(quick / "generated_outputs") == [name] and not (quick / "new").exists()


@posix
def test_progress_in_a_terminal(quick, monkeypatch, draw):
    """One line that is overwritten at each step, and cleared at the end."""
    result, lines = conftest.progress_lines(monkeypatch, lambda: draw(quick, "--steps", "5"))
    assert result.returncode == 0 and lines == [f"9 images, t = {t}" for t in (40, 26, 14, 6, 2, 0)] + [""]


def test_device(quick, monkeypatch, draw):
    """The network is on the device that is picked. On meta it cannot be computed."""
    assert_one_line_error(draw(quick, "--device", "quantum"), "quantum")
    monkeypatch.setattr(ddpm_model, "pick_device", lambda name: torch.device("meta" if name == "auto" else "cpu"))
    with pytest.raises(NotImplementedError):
        draw(quick)


@pytest.mark.parametrize("stream", [None, Mock(spec=["write", "flush"])], ids=["none", "plain"])
def test_without_a_console(quick, monkeypatch, draw, stream):
    """As under pythonw, which has neither stdout nor stderr, or in a window that has put its own in their place."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    assert draw(quick, "--steps", "1").returncode == 0
    assert (quick / "generated_outputs" / "digit_5_grid.png").exists()


@pytest.mark.parametrize(("n_classes", "columns"), [(10, 5), (13, 6), (1, 2)])
def test_video(quick, monkeypatch, draw, n_classes, columns):
    """Frame k shows t = n_T (1 - k / 120)^2, rounded, and below its images the text. The last one stays."""
    save_weights(quick / "weights" / "ddpm_mnist.pth", small_ddpm(n_classes=n_classes))
    folder = quick / ("权重" if os.name == "nt" else "12:30 权重")
    shown, put_text = [], cv2.putText

    def remember(frame, text, *args):
        shown.append((int(text.removeprefix("t = ")), put_text(frame, text, *args)))
        return frame

    monkeypatch.setattr(cv2, "putText", remember)
    result = draw(quick, "--video", "--seed", "1", "--scale", "2", "--outdir", folder.name)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    generator = torch.Generator().manual_seed(1)
    denoised = load_ddpm(quick / "weights" / "ddpm_mnist.pth").denoise(range(n_classes), generator=generator)
    states = {t: np.array(image_grid(x, columns=columns, scale=2)).astype(int) for t, x in denoised}
    height = len(states[0])
    assert len(shown) == 121
    for k, (t, frame) in enumerate(shown):
        assert t == pytest.approx(40 * (1 - k / 120) ** 2, abs=0.501)
        assert alike(frame[:height].astype(int), states[t])
        assert frame[height:].any() and not frame[-1].any()  # not cut off

    assert {path.name for path in folder.iterdir()} == {VIDEO, "denoising_process_0to9.gif"}
    video = cv2.VideoCapture(shutil.copy(folder / VIDEO, quick / "copy.mp4"))
    assert int(video.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little") in (b"VP90", b"vp09")  # browsers play it
    frames = np.stack([video.retrieve()[1][..., 0] for _ in iter(video.grab, False)]).astype(int)
    assert video.get(cv2.CAP_PROP_FPS) == 30 and len(frames) == 121 + 2 * 30
    for i, frame in enumerate(frames):
        assert np.abs(frame - shown[min(i, 120)][1]).mean() < 12  # the codec loses some detail
    with Image.open(folder / "denoising_process_0to9.gif") as gif:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
        assert gif.info["loop"] == 0 and sum(durations) == 60 * 70 + 2000  # every other frame; equal ones are one
        assert all(duration % 70 == 0 for duration in durations[:-1])
        assert np.abs(np.array(gif.convert("L")).astype(int) - shown[-1][1]).max() < 17  # 16 grey levels


def test_without_opencv(quick, monkeypatch, draw):
    """Nothing is drawn for a video that cannot be made."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr(DDPM, "denoise", None)
    assert_one_line_error(draw(quick, "--video"), "cv2")
    assert not list((quick / "generated_outputs").iterdir())


@pytest.fixture
def grids(workdir):
    """Ten grids, each of one grey, 92 high and 62 wide."""
    folder = workdir / "generated_outputs"
    folder.mkdir()
    for digit in range(10):
        Image.new("L", (62, 92), 20 * digit + 10).save(folder / f"digit_{digit}_grid.png")
    return folder


def test_stitching(workdir, grids, monkeypatch, call):
    """0 to 4 are above 5 to 9. Pillow's limit on pictures of others does not count."""
    expected = (20 * np.arange(10) + 10).reshape(2, 5).repeat(92, axis=0).repeat(62, axis=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    result = call(workdir, "stitch_images.py", "--output", "new/sheet.png")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert (pixels(workdir / "new" / "sheet.png") == expected).all()


def test_stitching_needs_pillow_alone(workdir, grids):
    """It does not wait for torch."""
    (workdir / "torch.py").write_text("raise ImportError('torch')", encoding="utf-8")
    (workdir / "numpy.py").write_text("raise ImportError('numpy')", encoding="utf-8")
    result = run(workdir, "stitch_images.py")
    assert result.returncode == 0 and (workdir / "combined_2x5_grid.png").exists(), result.stderr


@pytest.mark.parametrize("damage", [
    Path.unlink, lambda path: path.write_bytes(b"no picture"), lambda path: path.write_bytes(path.read_bytes()[:60]),
    lambda path: Image.new("L", (62, 31)).save(path), lambda path: path.write_bytes(b"P5 999999999 999999999 255\n"),
])  # fmt: skip
def test_bad_grids(workdir, grids, call, damage):
    """Missing, no picture, half a picture, of another size, too large for the memory."""
    damage(grids / "digit_2_grid.png")
    (workdir / "combined_2x5_grid.png").write_bytes(b"precious")
    assert_one_line_error(call(workdir, "stitch_images.py"), "digit_2_grid.png: ")
    assert (workdir / "combined_2x5_grid.png").read_bytes() == b"precious"


@pytest.mark.parametrize("options", [
    "--digit 1.5", "--digit -1", "--count 0", "--count 2501", "--steps 0", "--scale 0", "--scale 21",
    "--guide-w nan", "--guide-w -1", "--guide-w inf", "--seed -1", f"--seed {inference_ddpm.N_SEEDS}", "--eta 2",
])  # fmt: skip
def test_impossible_options(tmp_path, monkeypatch, draw, options):
    monkeypatch.setattr(ddpm_model, "load_ddpm", None)  # it is not reached
    result = draw(tmp_path, *options.split())
    assert result.returncode == 2 and options.split()[0] in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(("script", "option", "path"), [
    ("inference_ddpm.py", "--outdir", "ddpm_model.py"), ("stitch_images.py", "--indir", 300 * "w"),
    ("stitch_images.py", "--output", "small"), ("stitch_images.py", "--output", "sheet.xyz"),
])  # fmt: skip
def test_impossible_paths(quick, grids, call, monkeypatch, script, option, path):
    """An output folder that cannot be made is found before anything is drawn."""
    monkeypatch.setattr(DDPM, "denoise", None)
    assert_one_line_error(call(quick, script, option, path), path)


def test_full_disk(quick, grids, draw):
    """OpenCV does not report it. The old video stays."""
    (grids / VIDEO).write_bytes(b"precious")
    with file_limit(100):
        result = draw(quick, "--video", "--steps", "1", "--scale", "1")
    assert_one_line_error(result, "frames")
    assert result.stdout == "" and (grids / VIDEO).read_bytes() == b"precious"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("command", [
    "train_ddpm.py {1} --epochs 2 --save-every 1 --data-dir {0}/small --weights {0}/权重/a.pth",
    "inference_ddpm.py --digit 0 1 --steps 2 --weights {0}/weights/other.pth --outdir {0}/权重",
    "stitch_images.py --indir {0}/generated_outputs --output {0}/权重/sheet.png",
])  # fmt: skip
def test_paths(quick, grids, tmp_path_factory, monkeypatch, call, command, encoding):
    """~ is expanded in all of them, and they may have letters that stdout cannot show. Each line is there at once."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("HOME", str(quick))
    monkeypatch.setenv("USERPROFILE", str(quick))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    result = call(elsewhere, *command.format("~", " ".join(SMALL_RUN)).split())
    assert result.returncode == 0 and list((quick / "权重").iterdir()) and not list(elsewhere.iterdir()), result.stderr
    if "stitch" in command:  # it prints one line, at its end
        stdout.flush()
    assert stdout.buffer.getvalue().count(rb"\u6743\u91cd") == 1 + ("stitch" not in command)


def test_from_another_folder(quick, tmp_path_factory):
    """The weights beside the script are found, also through a link. The picture is put into the working directory."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    link(elsewhere / "draw.py", quick / "inference_ddpm.py")
    result = run(elsewhere, "draw.py", "--steps", "2")
    assert result.returncode == 0 and (elsewhere / "generated_outputs" / "digit_5_grid.png").exists(), result.stderr


def test_shipped_weights():
    """They are of the default network, and read as what they are."""
    config = torch.load(WEIGHTS, weights_only=True)["config"]
    assert {"n_classes": 10} | config == DDPM(ContextUnet()).config
    labels = torch.arange(10).repeat(20)
    digits = load_ddpm(WEIGHTS).sample(labels, steps=5, generator=torch.Generator().manual_seed(0))
    features, seen = judge(load_classifier(), digits)
    assert (seen == labels).double().mean() >= 0.97
    real = torch.load(evaluate.FIXTURE, weights_only=True)
    # FID, 200 digits in 5 steps, six seeds: 0.20 to 0.30. With v read as eps: 0.80 to 1.15, and 93 % are recognised.
    assert evaluate.frechet_distance(features, real["test"].float()) < 0.5
    logits = load_classifier().head(real["test"].float())
    assert (logits.argmax(1) == real["test_labels"]).double().mean() >= 0.99  # of the judge itself
    assert WEIGHTS.stat().st_size <= 6e6


def test_gallery():
    """The tiles of the committed sheet are the digits that their places say. (The grids may be a user's by now.)"""
    sheet = torch.from_numpy(pixels(PROJECT / "generated_outputs/combined_2x5_grid.png"))[::4, ::4]  # undo --scale 4
    cells = sheet.unflatten(0, (2, -1)).unflatten(2, (5, -1)).transpose(1, 2).flatten(0, 1)  # [10, height, width]
    tiles = cells[:, 2:, 2:].unflatten(1, (3, HEIGHT)).unflatten(3, (3, WIDTH))[:, :, : HEIGHT - 2, :, : WIDTH - 2]
    _, seen = judge(load_classifier(), tiles.transpose(2, 3).reshape(90, *IMAGE_SHAPE) / 255)
    assert (seen == torch.arange(10).repeat_interleave(9)).sum() >= 88
