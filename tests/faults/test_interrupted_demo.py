"""The demo is stopped by Ctrl-C at random moments: it ends at once, and what it leaves is whole."""

import random
import re
import signal
import time

import cv2
import numpy as np
import pytest
import torch

from sparseinst.inference import VideoReader, VideoWriter
from sparseinst.tools import demo
from tests.faults.child import Child, num_cases, run_in_child
from tests.red_segmenter import red_segmenter_config

NUM_FRAMES = 1500
NUM_PICTURES = 300
TIMEOUT = 90
# A slow machine has not begun by then, so the first case is stopped at once.
LATEST = 0.6
# From Ctrl-C to the end, on a busy machine too.
MAX_SECONDS_TO_END = 15


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A config file, and a clip."""
    folder = tmp_path_factory.mktemp("interrupted_demo")
    cfg = red_segmenter_config()
    torch.save({"model": {"scores": torch.tensor([0.9, 0.3])}}, folder / "model.pth")
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    with VideoWriter(folder / "clip.mp4", 10) as writer:
        for index in range(NUM_FRAMES):
            frame = np.full((240, 320, 3), (90, 160, 90), np.uint8)
            frame[50:90, index % 240 : index % 240 + 80] = (250, 20, 20)
            writer.write(frame)
    (folder / "pictures").mkdir()
    for index in range(NUM_PICTURES):
        cv2.imwrite(str(folder / "pictures" / f"{index:03}.png"), frame[:, :, ::-1])
    # The first child waits for the server's imports.
    run_in_child(draw, folder, folder / "first", "video", timeout=TIMEOUT)
    return folder


def draw(folder, output, kind):
    torch.set_num_threads(1)
    # A shell starts what runs in the background with Ctrl-C ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    source = ["--video-input", folder / "clip.mp4"] if kind == "video" else ["--input", folder / "pictures"]
    arguments = ["--config-file", folder / "config.yaml", *source, "--output", output]
    raise SystemExit(demo.main([str(argument) for argument in arguments]))


def interrupt(workspace, output, kind, seconds):
    """Stop it so many seconds after its progress bar began."""
    child = Child(draw, workspace, output, kind)
    while child.is_alive() and "0%" not in child.output():
        time.sleep(0.005)
    time.sleep(seconds)
    sent = time.monotonic()
    child.send(signal.SIGINT)
    outcome = child.wait(TIMEOUT)
    assert not outcome.timed_out and time.monotonic() - sent < MAX_SECONDS_TO_END, outcome.output
    assert "Traceback" not in outcome.output, outcome.output
    return outcome


def test_videos(workspace, tmp_path):
    rng = random.Random(0)
    codes = []
    for case in range(num_cases(short=4, full=60)):
        output = tmp_path / str(case)
        outcome = interrupt(workspace, output, "video", rng.uniform(0, LATEST) if case else 0)
        codes.append(outcome.exit_code)
        assert outcome.exit_code in (0, 130), outcome.output
        told = re.search(r"(\d+) frames are in", outcome.output)
        files = [] if not output.exists() else [path.name for path in output.iterdir()]
        assert files == (["clip.mp4"] if told else []), outcome.output
        if told:
            with VideoReader(output / "clip.mp4") as reader:
                assert len(list(reader)) == int(told[1]), outcome.output
    assert 130 in codes


def test_pictures(workspace, tmp_path):
    rng = random.Random(1)
    codes = []
    for case in range(num_cases(short=3, full=40)):
        output = tmp_path / str(case)
        outcome = interrupt(workspace, output, "pictures", rng.uniform(0, LATEST) if case else 0)
        codes.append(outcome.exit_code)
        assert outcome.exit_code in (0, 130), outcome.output
        files = sorted(output.iterdir()) if output.exists() else []
        told = re.search(r"(\d+) of 300 images are in", outcome.output)
        assert len(files) == int(told[1]), outcome.output
        assert [path.name for path in files] == [f"{index:03}.png" for index in range(len(files))]
        assert all(cv2.imread(str(path)).shape == (480, 640, 3) for path in files)
    assert 130 in codes
