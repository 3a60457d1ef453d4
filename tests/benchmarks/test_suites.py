"""The suite of all architectures: its models, its figures, its table and its plot."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T

from sparseinst.benchmarks import suites
from sparseinst.benchmarks.inference import batched_inputs
from sparseinst.benchmarks.suites import SUITES, SuiteModel, run_suite, suite_config, suite_table
from sparseinst.data.augmentations import build_test_augmentations
from sparseinst.evaluation.stage_timer import StageTimer
from sparseinst.tools import benchmark
from tests.loggers import loggers_restored
from tests.tiny_model import tiny_cfg

DOCS = Path(__file__).resolve().parents[2] / "docs"
STOCK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
OPTS = [
    "MODEL.DEVICE",
    "cpu",
    "INPUT.MIN_SIZE_TEST",
    "96",
    "INPUT.MAX_SIZE_TEST",
    "128",
    "MODEL.ROI_MASK_HEAD.NUM_CONV",
    "0",
]
IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("model", SUITES["realtime"], ids=lambda model: model.config)
def test_every_model_has_a_config_and_the_published_ap_of_the_docs(model):
    own, common = (suite_config(model.config, ["MODEL.DEVICE", "cpu"], size) for size in (False, True))
    assert own.MODEL.WEIGHTS == "" and common.INPUT.MIN_SIZE_TEST in (0, suites.COMMON_SIDE)
    assert (common.INPUT.SQUARE_SIZE == suites.COMMON_SIDE) == bool(own.INPUT.SQUARE_SIZE)
    if model.config == STOCK:
        return
    name = model.config.rpartition("/")[2]
    rows = [line for page in ("models", "solo", "yolact") for line in (DOCS / f"{page}.md").read_text().splitlines()]
    (row,) = [line for line in rows if re.match(rf"\| \[[a-z0-9/]*{name}\]", line)]
    assert f"{model.ap}" in re.findall(r"(?<= )\d\d\.\d(?= )", row)


def test_a_stock_model_keeps_50_and_100_objects():
    # The network of the suite, with small heads and a small image.
    opts = ["INPUT.MIN_SIZE_TEST", "64", "MODEL.ROI_MASK_HEAD.NUM_CONV", "0", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"]
    cfg = suite_config(STOCK, ["MODEL.DEVICE", "cpu", "MODEL.ROI_BOX_HEAD.FC_DIM", "64", *opts], False)
    augmentation = T.AugmentationList(build_test_augmentations(cfg))
    models = suites._stock_models(cfg, IMAGE, augmentation)
    with torch.inference_mode():
        found = [model(batched_inputs([IMAGE], augmentation))[0]["instances"] for model in models]
    assert [len(instances) for instances in found] == [50, 100]
    assert found[1].pred_boxes.area().unique().numel() > 50


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    config = tmp_path_factory.mktemp("suite") / "tiny.yaml"
    keys = ("MODEL.SPARSE_INST.DECODER.NUM_MASKS", 100)
    config.write_text(tiny_cfg(*keys).dump())
    return str(config)


@pytest.fixture(scope="module")
def order():
    return []


@pytest.fixture(scope="module")
def rows(tiny, order):
    models = [SuiteModel(tiny, 12.5, "test-dev"), SuiteModel("small_data/mask_rcnn")]

    def noted(name, function):
        return lambda *args: (order.append(name), function(*args))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "_COMMON_SIZE_KEYS", ("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128))
        for name in ("_build", "time_stages", "_run_stock"):
            patch.setattr(suites, name, noted(name, getattr(suites, name)))
        return run_suite(models, IMAGE, OPTS, repetitions=2, warmup=1)


def test_models_are_loaded_first_and_run_in_turn(rows, order):
    # A model of Detectron2 for each number of objects and its score threshold. One run of our network serves both.
    of_a_size = ["_build"] * 4 + ["time_stages", "_run_stock"] * 3
    assert order == of_a_size * 2


def test_times_of_both_protocols(rows):
    assert [row["config"].rpartition("/")[2] for row in rows] == ["tiny.yaml", "mask_rcnn"]
    assert [row["family"] for row in rows] == ["SparseInst", "GeneralizedRCNN"]
    assert [row["precision"] for row in rows] == ["float32", "float32, eager"]
    for row in rows:
        assert row["ms"].keys() == {"own size", "common size"}
        for size in row["ms"].values():
            assert size.keys() == {"50", "100"}
            for times in size.values():
                published, whole = times["as published"], times["end to end"]
                assert 0 < published["p5_ms"] <= published["median_ms"] <= published["p95_ms"] < whole["p95_ms"]


def test_percentiles_count_the_repetitions_alone():
    timer = StageTimer()
    # A warm-up of 9 s, then two repetitions; post-processing and copy with 50, with 100 objects.
    timer.seconds = {"preprocessing": [9, 1, 3], "network": [9, 10, 30]}
    timer.seconds |= {"post-processing": [9, 9, 2, 4, 6, 8], "copy to host": [9, 9, 1, 1, 1, 1]}
    found = suites._milliseconds(timer, warmup=1)
    assert found["50"]["as published"]["median_ms"] == (12 + 36) / 2 * 1e3
    assert found["100"]["end to end"]["median_ms"] == (1 + 10 + 4 + 1 + 3 + 30 + 8 + 1) / 2 * 1e3


def test_the_table(rows):
    header, _, first, second = suite_table(rows).splitlines()
    assert header == (
        "| config | AP | own size, as published | own size, end to end | common size, as published | "
        "common size, end to end |"
    )
    assert first.startswith("| tiny | 12.5 * |") and second.startswith("| mask_rcnn | - |")
    times = [rows[1]["ms"]["common size"][count]["end to end"]["median_ms"] for count in ("50", "100")]
    assert second.endswith(f"| {times[0]:.0f}, {times[1]:.0f} |")


def test_the_command(rows, tmp_path, monkeypatch, capsys):
    named = []

    def run(models, image, opts, **kwargs):
        named.extend(models)
        assert opts == ["MODEL.DEVICE", "cpu"]
        return rows

    monkeypatch.setattr(suites, "run_suite", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plot, figures = tmp_path / "new" / "speed.png", tmp_path / "speed.json"
    arguments = ["--suite", "realtime", "--config-file", "quick/shapes", "sparse_inst_r50_giam", "--size", "48", "64"]
    with loggers_restored():
        assert benchmark.main([*arguments, "--plot", str(plot), "--json", str(figures), "--repetitions", "2"]) == 0
    assert named == [*SUITES["realtime"], SuiteModel("quick/shapes")]
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = json.loads(figures.read_text())
    assert written["rows"] == rows and written["image_size"] == [48, 64] and written["repetitions"] == 2
    assert "| tiny | 12.5 * |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_7.yaml", "No config file named"),
        ("COCO-Detection/rpn_R_50_C4_1x.yaml", "ProposalNetwork does not find 150 objects"),
        ("tiny", "tiny.yaml: 50 objects in an image: MODEL.SPARSE_INST.DECODER.NUM_MASKS allows 0 to 6"),
    ],
)
def test_a_config_that_cannot_be_timed(config, message, tmp_path):
    if config == "tiny":
        config = tmp_path / "tiny.yaml"
        config.write_text(tiny_cfg().dump())
    with pytest.raises(ValueError, match=message):
        run_suite([SuiteModel(str(config))], IMAGE, OPTS, repetitions=1, warmup=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --config-file or --suite"),
        (["--config-file", "quick/shapes", "--plot", "speed.png"], "--plot needs --suite"),
        (["--suite", "realtime", "--compare", "configured"], "leave out --compare"),
        (["--suite", "realtime", "--detections", "20", "--area", "0.05"], "leave out --detections, --area"),
        (["--suite", "realtime", "--batch-sizes", "1"], "leave out --batch-sizes"),
        (["--suite", "realtime", "--import", "my.py"], "leave out --import"),
        (["--suite", "realtime", "--input", "1.jpg", "2.jpg"], "leave out a second --input"),
    ],
)
def test_options_that_would_be_ignored_are_refused(arguments, message, capsys):
    with loggers_restored():
        assert benchmark.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
