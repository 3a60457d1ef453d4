"""The command: training, evaluation and resuming on a user's own data, and clear errors."""

import json
import os
from pathlib import Path

import pytest

from sparseinst.tools import train_net
from tests.faults.child import run_in_child
from tests.shapes_data import CLASS_NAMES, write_shapes
from tests.tiny_model import tiny_cfg

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Config file and data, as command-line arguments."""
    folder = tmp_path_factory.mktemp("train net")  # with a space
    config = folder / "tiny.yaml"
    cfg = tiny_cfg(
        "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2,
        "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0,
    )  # fmt: skip
    config.write_text(cfg.dump())
    train_json, train_images = write_shapes(folder, 6)
    test_json, test_images = write_shapes(folder, 3, seed=1, split="test")
    return [
        "--config-file", str(config), "--train-json", train_json, "--train-images", train_images,
        "--test-json", test_json, "--test-images", test_images,
    ]  # fmt: skip


def train_net_cli(arguments, folder):
    os.chdir(folder)
    train_net.cli(arguments)


def run(*args, cwd=REPO):
    """Run the command in a process of its own, whose imports are done; return how it ended, with its output."""
    return run_in_child(train_net_cli, [*map(str, args)], cwd, timeout=300)


def test_train_then_evaluate_then_resume(workspace, tmp_path):
    trained = run(*workspace, "OUTPUT_DIR", tmp_path, cwd=tmp_path)
    assert trained.exit_code == 0, trained.output
    assert json.loads((tmp_path / "classes.json").read_text()) == {
        "names": CLASS_NAMES,
        "category_ids": [1, 2, 3, 4],
    }
    assert "sparseinst" in trained.output and "total_loss" in trained.output

    weights = tmp_path / "model_final.pth"
    evaluated = run(*workspace, "--eval-only", "OUTPUT_DIR", tmp_path / "eval", "MODEL.WEIGHTS", weights)
    assert evaluated.exit_code == 0, evaluated.output
    assert "post-processing" in evaluated.output and "images/s" in evaluated.output
    assert "segm" in json.loads((tmp_path / "eval" / "results.json").read_text())["results"]

    large = run(
        *workspace, "--eval-only", "OUTPUT_DIR", tmp_path / "eval", "MODEL.WEIGHTS", weights,
        "MODEL.OUTPUT.MAX_MASK_GIB", 1e-6, "MODEL.SPARSE_INST.CLS_THRESHOLD", -1.0,
    )  # fmt: skip
    # Results are encoded mask by mask, whatever boolean masks would take.
    assert large.exit_code == 0, large.output

    # Heads of another shape are what a fine-tuning starts from, and an evaluation cannot.
    other_heads = ["OUTPUT_DIR", tmp_path / "heads", "MODEL.WEIGHTS", weights, "MODEL.SPARSE_INST.DECODER.GROUPS", 4]
    refused = run(*workspace, "--eval-only", *other_heads)
    assert refused.exit_code == 1 and "Traceback" not in refused.output
    assert "error: " in refused.output and "MODEL.SPARSE_INST.DECODER.NUM_MASKS or GROUPS" in refused.output
    tuned = run(*workspace, *other_heads, "SOLVER.MAX_ITER", 1)
    assert tuned.exit_code == 0, tuned.output
    assert tuned.output.count("Not loaded, starts from initial values: ") == 7

    resumed = run(*workspace, "--resume", "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 3)
    assert resumed.exit_code == 0, resumed.output
    assert "Starting training from iteration 2" in resumed.output


def test_expected_results_are_verified(workspace, tmp_path):
    expected = "[['segm', 'AP', 99.0, 0.5]]"
    failed = run(*workspace, "--eval-only", "OUTPUT_DIR", tmp_path, "TEST.EXPECTED_RESULTS", expected)
    assert failed.exit_code != 0
    assert "failed" in failed.output


def test_a_builtin_data_set_that_is_not_there(tmp_path):
    failed = run("--config-file", "sparse_inst_r50_giam", "MODEL.WEIGHTS", "", "OUTPUT_DIR", tmp_path, cwd=tmp_path)
    assert failed.exit_code == 1
    assert "Traceback" not in failed.output
    (error,) = (line for line in failed.output.splitlines() if line.startswith("error: "))
    assert "annotations/instances_" in error and "DETECTRON2_DATASETS" in error
    no_test = run("--config-file", "sparse_inst_r50_giam", "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path, cwd=tmp_path)
    assert no_test.exit_code == 1
    assert "instances_train2017.json" in no_test.output and "DETECTRON2_DATASETS" in no_test.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 80], "MODEL.SPARSE_INST.DECODER.NUM_CLASSES 4"),
        (["TEST.AUG.ENABLED", True], "TEST.AUG.ENABLED"),
        (["MODEL.MASK_ON", False], "MODEL.MASK_ON"),
        (["SOLVER.NO_SUCH_KEY", 1], "NO_SUCH_KEY"),
        (["MODEL.WEIGHTS", "no_such_weights.pth"], "no_such_weights.pth"),
        (["MODEL.WEIGHTS", __file__], "test_train_net.py is a text file"),
        (["MODEL.WEIGHTS", "package://no_such_package/weights.pth"], "pip install no-such-package"),
        (["MODEL.WEIGHTS", "http://127.0.0.1:9/weights.pth"], "cannot be downloaded"),
        (["DATASETS.TRAIN_JSON", "missing.json", "--train-json", ""], "missing.json"),
        (["--config-file", "no_such_config"], "no_such_config"),
    ],
)
def test_errors_are_one_line_that_names_the_key(workspace, tmp_path, args, message):
    flags = [arg for arg in args if str(arg).startswith("--")]
    if flags:
        start = args.index(flags[0])
        args, flags = args[:start] + args[start + 2 :], args[start : start + 2]
    failed = run(*workspace, *flags, "OUTPUT_DIR", tmp_path, *args)
    assert failed.exit_code == 1
    assert "Traceback" not in failed.output
    error = [line for line in failed.output.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]
