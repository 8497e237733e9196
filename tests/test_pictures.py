"""The scripts that draw, film and stitch, run as a user runs them; and the shipped weights, judged."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import inference_ddpm
from ddpm_model import DDPM, ContextUnet, load_ddpm, save_weights
from tests.conftest import PROJECT, assert_one_line_error
from tests.digit_classifier import judge, load_classifier

GALLERY = PROJECT / "generated_outputs"
WEIGHTS = PROJECT / "weights" / "ddpm_mnist.pth"


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture
def quick(workdir):
    """A folder whose weights are of a small untrained network, quick to draw with: for all but the looks."""
    torch.manual_seed(0)
    save_weights(workdir / "weights" / "ddpm_mnist.pth", DDPM(ContextUnet(n_feat=8), DDPM.default_betas(40), 40))
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
    assert (
        last_row[:, : 30 * (count - columns * (rows - 1))].any()
        and not last_row[:, 30 * (count - columns * (rows - 1)) + 2 :].any()
    )


def test_scale_enlarges_each_pixel_and_seed_repeats_to_the_byte(quick, draw):
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


def test_several_digits_are_those_drawn_alone(quick, draw):
    out = quick / "generated_outputs"
    assert draw(quick, "--digit", "2", "6", "--seed", "1", "--steps", "3").returncode == 0
    together = [(out / f"digit_{digit}_grid.png").read_bytes() for digit in (2, 6)]
    assert draw(quick, "--digit", "6", "--seed", "1", "--steps", "3").returncode == 0
    assert together[1] == (out / "digit_6_grid.png").read_bytes() != together[0]


def test_many_digits_are_drawn_in_batches(quick, monkeypatch, draw):
    sizes = []
    monkeypatch.setattr(inference_ddpm, "BATCH_SIZE", 4)
    monkeypatch.setattr(DDPM, "guided_v", lambda self, x, c, t, w, x0_hat: sizes.append(len(x)) or x)
    assert draw(quick, "--count", "10", "--steps", "1", "--scale", "1").returncode == 0
    assert sizes == [4, 4, 2]
    assert pixels(quick / "generated_outputs" / "digit_5_grid.png").shape == (30 * 3 + 2, 30 * 4 + 2)


# ---- Filming


def read_video(path) -> tuple[list[np.ndarray], float, str]:
    video = cv2.VideoCapture(str(path))
    fps, fourcc = video.get(cv2.CAP_PROP_FPS), int(video.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little").decode()
    frames = []
    while True:
        more, frame = video.read()
        if not more:
            return frames, fps, fourcc
        frames.append(frame)


@pytest.mark.parametrize("steps", ["2", "40"])
def test_video(quick, steps, draw):
    result = draw(quick, "--video", "--seed", "1", "--steps", steps)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert [path.name for path in (quick / "generated_outputs").iterdir()] == ["denoising_process_0to9.mp4"]
    frames, fps, fourcc = read_video(quick / "generated_outputs" / "denoising_process_0to9.mp4")
    assert fourcc.upper() in ("VP90", "VP09", "AVC1", "H264")  # those that browsers play
    assert len(frames) == inference_ddpm.DENOISING_FRAMES + inference_ddpm.HELD_FRAMES
    assert all(frame.shape == (62 * 4, 152 * 4, 3) for frame in frames)
    held = int(fps)  # at least the last second shows the finished digits
    assert all(np.abs(frame.astype(int) - frames[-1].astype(int)).mean() < 2 for frame in frames[-held:])
    noise = frames[0][8:120, 8:120].astype(float)
    assert noise.std() > 60 and 100 < noise.mean() < 155  # pure noise, cut off at black and white


def test_video_without_a_codec_that_browsers_play_warns(quick, monkeypatch, capsys):
    """Codecs are tried in order, best for browsers first."""
    real, tried = cv2.VideoWriter, []

    def only_mp4v(path, fourcc, *rest):
        tried.append(fourcc.to_bytes(4, "little").decode())
        return real(path, fourcc, *rest) if tried[-1] == "mp4v" else real()

    monkeypatch.setattr(cv2, "VideoWriter", only_mp4v)
    only_mp4v_fourcc = real.fourcc
    monkeypatch.setattr(cv2, "VideoWriter_fourcc", only_mp4v_fourcc)
    inference_ddpm.write_video(quick / "film.mp4", [np.zeros((62, 152), np.uint8)] * 5)
    assert tried == ["vp09", "avc1", "mp4v"]
    assert "browsers" in capsys.readouterr().err
    assert len(read_video(quick / "film.mp4")[0]) == 5


# ---- Stitching


def write_grids(folder, size=(92, 92)):
    folder.mkdir(exist_ok=True)
    for digit in range(10):
        Image.fromarray(np.full(size, 20 * digit + 10, np.uint8)).save(folder / f"digit_{digit}_grid.png")


def test_stitching_puts_0_to_4_above_5_to_9(workdir, call):
    write_grids(workdir / "generated_outputs", (92, 62))
    result = call(workdir, "stitch_images.py")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    sheet = pixels(workdir / "combined_2x5_grid.png")
    expected = np.repeat(np.repeat((20 * np.arange(10) + 10).reshape(2, 5), 92, axis=0), 62, axis=1)
    assert (sheet == expected).all()
    result = call(workdir, "stitch_images.py", "--indir", "generated_outputs", "--output", "new/sheet.png")
    assert result.returncode == 0 and (pixels(workdir / "new" / "sheet.png") == expected).all()


def test_stitching_names_all_missing_grids(workdir, call):
    write_grids(workdir / "generated_outputs")
    for digit in (2, 7):
        (workdir / "generated_outputs" / f"digit_{digit}_grid.png").unlink()
    result = call(workdir, "stitch_images.py")
    assert_one_line_error(result, "digit_2_grid.png", "digit_7_grid.png")
    assert "digit_3" not in result.stderr and not (workdir / "combined_2x5_grid.png").exists()


def test_stitching_names_grids_of_another_size(workdir, call):
    write_grids(workdir / "generated_outputs")
    Image.fromarray(np.zeros((62, 62), np.uint8)).save(workdir / "generated_outputs" / "digit_4_grid.png")
    result = call(workdir, "stitch_images.py")
    assert_one_line_error(result, "digit_4_grid.png", "62x62", "92x92")
    assert "digit_3" not in result.stderr and not (workdir / "combined_2x5_grid.png").exists()


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"no picture", lambda data: data[:60]])
def test_stitching_names_an_unreadable_png(workdir, damage, call):
    write_grids(workdir / "generated_outputs")
    path = workdir / "generated_outputs" / "digit_8_grid.png"
    path.write_bytes(damage(path.read_bytes()))
    assert_one_line_error(call(workdir, "stitch_images.py"), "digit_8_grid.png")


def test_stitching_to_a_place_that_cannot_be_written(workdir, call):
    write_grids(workdir / "generated_outputs")
    assert_one_line_error(call(workdir, "stitch_images.py", "--output", "small/MNIST"), "small/MNIST")
    assert (workdir / "small" / "MNIST" / "raw").is_dir()


# ---- Bad input


@pytest.mark.parametrize(
    ("options", "allowed"),
    [("--digit 10", "from 0 to 9"), ("--digit -1", "from 0 to 9"), ("--digit 5 x", "from 0 to 9"),
     ("--count 0", "at least 1"), ("--count -3", "at least 1"), ("--count 2.5", "whole number"),
     ("--steps 0", "at least 1"), ("--scale 0", "from 1 to"), ("--scale -4", "from 1 to"),
     ("--guide-w nan", "from 0 to"), ("--guide-w -1", "from 0 to"), ("--guide-w inf", "from 0 to"),
     ("--seed -1", "from 0 to"), ("--device quantum", "device")],
)  # fmt: skip
def test_impossible_options_state_the_allowed_range(tmp_path, draw, options, allowed):
    result = draw(tmp_path, *options.split())
    assert result.returncode == 2 and allowed in result.stderr


def test_more_steps_than_the_weights_have(quick, draw):
    assert_one_line_error(draw(quick, "--steps", "41"), "--steps", "1 to 40")


@pytest.mark.parametrize("content", [None, b"", b"not weights"])
@pytest.mark.parametrize("mode", [(), ("--video",)])
def test_unusable_weights(workdir, content, mode, draw):
    if content is not None:
        (workdir / "bad.pth").write_bytes(content)
    assert_one_line_error(draw(workdir, "--weights", "bad.pth", *mode), "bad.pth")
    assert not (workdir / "generated_outputs").exists()


@pytest.mark.parametrize("mode", [(), ("--video",)])
def test_outdir_that_cannot_be_written(quick, mode, draw):
    (quick / "file").write_text("in the way")
    assert_one_line_error(draw(quick, "--steps", "1", "--outdir", "file", *mode), "file")
    assert (quick / "file").read_text() == "in the way"


# ---- What is shipped


def test_shipped_weights_draw_what_was_asked_for():
    labels = torch.arange(10).repeat(10)
    digits = load_ddpm(WEIGHTS).sample(labels, steps=100, generator=torch.Generator().manual_seed(0))
    _, seen = judge(load_classifier(), digits)
    assert (seen == labels).sum().item() >= 98


def test_shipped_weights_are_small_and_of_the_default_network():
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
