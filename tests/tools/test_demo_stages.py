"""The demo's stages run beside one another: order, speed, Ctrl-C and errors."""

import json
import os
import re
import signal

import numpy as np
import pytest

from sparseinst.inference import VideoReader, VideoWriter
from sparseinst.tools import demo_run
from tests.tools.demo_scenes import run, save_scene

pytestmark = pytest.mark.usefixtures("loggers_as_before", "no_window")

SPEED = r"(\d+) (\w+) in [\d.]+ s: [\d.]+ images/s \(model [\d.]+ images/s alone\)"


def save_clip(path, count=12):
    """A red block that moves to the right, 4 pixels in a frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, 10) as writer:
        for index in range(count):
            frame = np.full((48, 128, 3), (90, 160, 90), np.uint8)
            frame[8:24, index * 4 : index * 4 + 32] = (250, 20, 20)
            writer.write(frame)
    return path


def frames_of(path):
    with VideoReader(path) as reader:
        return list(reader)


def test_frames_are_drawn_in_their_order(tmp_path, config_file, capsys):
    clip = save_clip(tmp_path / "in" / "clip.mp4")
    file = tmp_path / "found.json"
    assert run(config_file, "--video-input", clip, "--output", tmp_path / "out", "--json", file) == 0
    assert re.search(SPEED, capsys.readouterr().out).groups() == ("12", "frames")
    lefts = [result["bbox"][0] for result in json.loads(file.read_text())]
    assert np.allclose(lefts, np.arange(12) * 4, atol=3)
    for before, frame in zip(frames_of(clip), frames_of(tmp_path / "out" / "clip.mp4"), strict=True):
        # Above the label, in the block.
        changed = (np.abs(frame[9:16].astype(int) - before[9:16]).max(2) > 40).any(0)
        red = (before[9:16, :, 0] > 180).all(0)
        assert (changed & red).sum() > 20 and not changed[: max(0, red.argmax() - 4)].any()


def test_speed_of_pictures(tmp_path, config_file, capsys):
    paths = [save_scene(tmp_path / "in" / f"{index}.png") for index in range(7)]
    assert run(config_file, "--input", *paths, "--output", tmp_path / "out") == 0
    assert re.search(SPEED, capsys.readouterr().out).groups() == ("7", "images")


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C at the fifth picture."""
    calls = []

    def predict(self, image):
        calls.append(image)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, image)

    original = demo_run.TimedPredictor.predict
    monkeypatch.setattr(demo_run.TimedPredictor, "predict", predict)


def test_after_ctrl_c_the_finished_frames_are_kept(tmp_path, config_file, interrupted, capsys):
    clip = save_clip(tmp_path / "in" / "clip.mp4")
    output, file = tmp_path / "out", tmp_path / "found.json"
    assert run(config_file, "--video-input", clip, "--output", output, "--json", file) == 130
    captured = capsys.readouterr()
    num_kept = int(re.search(r"The first (\d) frames are in", captured.out)[1])
    assert 1 <= num_kept <= 4 and "Interrupted" in captured.err
    assert len(frames_of(output / "clip.mp4")) == num_kept
    assert len(json.loads((tmp_path / "found_images.json").read_text())["images"]) == num_kept
    assert [path.name for path in output.iterdir()] == ["clip.mp4"]


def test_after_ctrl_c_the_finished_pictures_are_kept(tmp_path, config_file, interrupted, capsys):
    paths = [save_scene(tmp_path / "in" / f"{index}.png") for index in range(8)]
    assert run(config_file, "--input", *paths, "--output", tmp_path / "out") == 130
    drawn = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert drawn == [path.name for path in paths[: len(drawn)]] and len(drawn) <= 4
    assert f"{len(drawn)} of 8 images" in capsys.readouterr().out


def test_a_signal_in_the_model_ends_after_its_image(tmp_path, config_file, monkeypatch, capsys):
    calls = []

    def predict(self, image):
        calls.append(image)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, image)

    original = demo_run.TimedPredictor.predict
    monkeypatch.setattr(demo_run.TimedPredictor, "predict", predict)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        paths = [save_scene(tmp_path / "in" / f"{index}.png") for index in range(8)]
        assert run(config_file, "--input", *paths, "--output", tmp_path / "out") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    captured = capsys.readouterr()
    assert "5 of 8 images are in" in captured.out and "Interrupted" in captured.err
    assert len(list((tmp_path / "out").iterdir())) == len(calls) == 5


def test_an_error_while_frames_are_written_is_told_and_leaves_no_video(tmp_path, config_file, monkeypatch, capsys):
    clip = save_clip(tmp_path / "in" / "clip.mp4")

    def write(self, frame):
        if self.num_frames == 3:
            raise ValueError("the disk is full")
        original(self, frame)

    original = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", write)
    assert run(config_file, "--video-input", clip, "--output", tmp_path / "out") == 2
    assert "error: the disk is full" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
