"""The suite of all architectures: its models, its figures, its table and its plot."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sparseinst.benchmarks import suites
from sparseinst.benchmarks.suites import SUITES, SuiteModel, run_suite, suite_config, suite_table
from sparseinst.tools import benchmark
from tests.loggers import loggers_restored
from tests.tiny_model import tiny_cfg

DOCS = Path(__file__).resolve().parents[2] / "docs"
STOCK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"


@pytest.mark.parametrize("model", SUITES["realtime"], ids=lambda model: model.config)
def test_every_model_has_a_config_and_the_published_ap_of_the_docs(model):
    own, common = (suite_config(model.config, ["MODEL.DEVICE", "cpu"], size, 50) for size in (False, True))
    assert own.MODEL.WEIGHTS == "" and common.INPUT.MIN_SIZE_TEST in (0, suites.COMMON_SIDE)
    assert (common.INPUT.SQUARE_SIZE == suites.COMMON_SIDE) == bool(own.INPUT.SQUARE_SIZE)
    if model.config == STOCK:
        return
    name = model.config.rpartition("/")[2]
    rows = [line for page in ("models", "solo", "yolact") for line in (DOCS / f"{page}.md").read_text().splitlines()]
    (row,) = [line for line in rows if re.match(rf"\| \[[a-z0-9/]*{name}\]", line)]
    assert f"{model.ap}" in re.findall(r"(?<= )\d\d\.\d(?= )", row)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    config = tmp_path_factory.mktemp("suite") / "tiny.yaml"
    keys = ("MODEL.SPARSE_INST.DECODER.NUM_MASKS", 100, "INPUT.MIN_SIZE_TEST", 64)
    config.write_text(tiny_cfg(*keys).dump())
    models = [SuiteModel(str(config), 12.5, "test-dev"), SuiteModel("small_data/mask_rcnn", 10.0)]
    opts = ["MODEL.DEVICE", "cpu", "INPUT.MAX_SIZE_TEST", "96"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "_COMMON_SIZE_KEYS", ("INPUT.MIN_SIZE_TEST", 32, "INPUT.MAX_SIZE_TEST", 64))
        return run_suite(models, np.zeros((48, 64, 3), dtype=np.uint8), opts, repetitions=2, warmup=0)


def test_times_of_both_protocols(rows):
    assert [row["config"].rpartition("/")[2] for row in rows] == ["tiny.yaml", "mask_rcnn"]
    for row in rows:
        assert row["ms"].keys() == {"own size", "common size"}
        for size in row["ms"].values():
            assert size.keys() == {"50", "100"}
            assert all(0 < times["as published"] < times["end to end"] for times in size.values())


def test_the_table(rows):
    header, _, first, second = suite_table(rows).splitlines()
    assert header.count("|") == first.count("|") == 11
    assert first.startswith("| tiny | 12.5 (test-dev) |") and second.startswith("| mask_rcnn | 10.0 |")
    time = rows[1]["ms"]["common size"]["100"]["end to end"]
    assert second.endswith(f"| {time:.0f} |")


def test_the_command(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suites, "run_suite", lambda *args, **kwargs: rows)
    plot, figures = tmp_path / "new" / "speed.png", tmp_path / "speed.json"
    with loggers_restored():
        assert benchmark.main(["--suite", "realtime", "--plot", str(plot), "--json", str(figures)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG") and json.loads(figures.read_text())["rows"] == rows
    assert "| tiny | 12.5 (test-dev) |" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--suite", "realtime", "--config-file", "sparse_inst_r50_giam"]])
def test_either_a_suite_or_a_config(arguments, capsys):
    with loggers_restored():
        assert benchmark.main(arguments) == 2
    assert "Give either --config-file or --suite" in capsys.readouterr().err
