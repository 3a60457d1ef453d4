"""`sparseinst predict` is killed at random moments until it ends: no line is lost or torn."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from sparseinst.inference import resumable_file
from sparseinst.tools import predict
from tests.faults.child import Child, is_full, num_cases, run_in_child
from tests.red_segmenter import red_segmenter_config
from tests.tools.demo_scenes import save_scene

NUM_IMAGES = 40
TIMEOUT = 300
# Most starts of one run; a slow machine gets time to end in the last one.
MAX_STARTS = 8


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A config file, images, and the output of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("killed_predict")
    cfg = red_segmenter_config()
    torch.save({"model": {"scores": torch.tensor([0.9, 0.3])}}, folder / "model.pth")
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    for index in range(NUM_IMAGES):
        save_scene(folder / "images" / f"{index:03}.png", (90, 90 + index, 90))
    outcome = run_in_child(predict_images, folder, folder / "whole.jsonl", timeout=TIMEOUT)
    assert outcome.exit_code == 0, outcome.output
    assert (folder / "whole.jsonl").read_bytes().count(b"\n") == NUM_IMAGES + 1
    return folder


def predict_images(folder, output, rank=None):
    torch.set_num_threads(1)
    # A shell starts what runs in the background with Ctrl-C ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resumable_file.append_whole = append_slowly
    if rank is not None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    arguments = ["--config-file", folder / "config.yaml", "--input", folder / "images", "--output", output]
    raise SystemExit(predict.main([str(argument) for argument in arguments]))


def append_slowly(path, text):
    """Append in two halves, so that a kill often falls between them."""
    content = text.encode()
    with Path(path).open("ab", buffering=0) as file:
        file.write(content[: len(content) // 2])
        time.sleep(0.02)
        file.write(content[len(content) // 2 :])


def written(output):
    """Bytes of all files of a run."""
    return sum(path.stat().st_size for path in output.parent.glob(f"{output.stem}*"))


def kill_until_done(rng, workspace, output, ranks):
    """Start the processes, kill them a moment after they began to write, and so on; return the number of torn files."""
    num_torn = 0
    for start in range(MAX_STARTS):
        before = written(output)
        children = [Child(predict_images, workspace, output, rank) for rank in ranks]
        if start + 1 < MAX_STARTS:
            while any(child.is_alive() for child in children) and written(output) == before:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.3))
            for child in children:
                child.send(signal.SIGKILL)
        outcomes = [child.wait(TIMEOUT) for child in children]
        assert all(outcome.signal == signal.SIGKILL or outcome.exit_code == 0 for outcome in outcomes), outcomes
        files = [path.read_bytes() for path in output.parent.glob(f"{output.stem}*.jsonl")]
        num_torn += sum(not content.endswith(b"\n") for content in files if content)
        if all(outcome.exit_code == 0 for outcome in outcomes):
            return num_torn
    raise AssertionError("not done")


@pytest.mark.parametrize("ranks", [(None,), (0, 1)], ids=["one process", "two processes"])
def test_killed_until_done(workspace, tmp_path, ranks):
    rng, num_torn = random.Random(len(ranks)), 0
    for case in range(num_cases(short=1, full=20)):
        output = tmp_path / str(case) / "out.jsonl"
        output.parent.mkdir()
        num_torn += kill_until_done(rng, workspace, output, ranks)
        # A process that was killed after the other one had ended leaves the merging to the next start.
        assert output.read_bytes() == (workspace / "whole.jsonl").read_bytes()
        assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]
    # A few kills may all miss the moments between two halves.
    assert num_torn > 0 or not is_full()


def test_ctrl_c_keeps_the_finished_lines(workspace, tmp_path):
    output = tmp_path / "out.jsonl"
    child = Child(predict_images, workspace, output)
    while child.is_alive() and (not output.exists() or output.read_bytes().count(b"\n") < 5):
        time.sleep(0.005)
    child.send(signal.SIGINT)
    outcome = child.wait(TIMEOUT)
    assert outcome.exit_code == 130 and "The same command goes on from here" in outcome.output, outcome.output
    content = output.read_bytes()
    assert content.endswith(b"\n") and 5 < content.count(b"\n") < NUM_IMAGES + 1
    assert (workspace / "whole.jsonl").read_bytes().startswith(content)
    assert run_in_child(predict_images, workspace, output, timeout=TIMEOUT).exit_code == 0
    assert output.read_bytes() == (workspace / "whole.jsonl").read_bytes()
