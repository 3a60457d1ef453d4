"""The benchmark of training steps: what it times, its figures, its data and its errors; no test asserts a time."""

import json
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage

from sparseinst.benchmarks import training
from sparseinst.benchmarks.training import (
    TRAINING_STAGES,
    SteppingTrainer,
    as_training,
    measure_trainings,
    peak_bytes_of_steps,
)
from sparseinst.data.coco_json import register_coco_json
from sparseinst.engine import recompute
from sparseinst.engine.trainer import Trainer
from sparseinst.modeling.sparse_inst.model import SparseInst
from sparseinst.tools import benchmark_training
from sparseinst.tools.make_shapes import write_ellipses
from tests.tiny_model import NUM_CLASSES, tiny_cfg

pytestmark = pytest.mark.usefixtures("loggers_as_before")


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "data").mkdir()
    json_file, images = write_ellipses(tmp_path / "data", (64, 96), 3, NUM_CLASSES, num_images=4)
    opts = ("SOLVER.IMS_PER_BATCH", 2, "OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.BASE_LR", 1e-3, "SEED", 3)
    data = ("DATASETS.TRAIN_JSON", str(json_file), "DATASETS.TRAIN_IMAGES", str(images))
    return as_training(tiny_cfg(*opts, *data, "TRACKERS", ["wandb"]))


def test_a_timed_step_is_the_trainers_own(cfg, tmp_path):
    def weights(trainer, run_step):
        for iteration in range(3):
            trainer.iter, trainer.max_iter = iteration, iteration + 1
            run_step()
        return trainer.model.state_dict()

    # A measurement is no run of a tracker.
    assert cfg.TRACKERS == []
    torch.manual_seed(0)
    expected = Trainer(cfg)
    with EventStorage():
        expected = weights(expected, expected.run_step)
    torch.manual_seed(0)
    timed = SteppingTrainer(cfg, str(tmp_path), caches_batches=False)
    # The first step with the stages recorded, too.
    timed.time_stages(1)
    found = weights(timed.trainer, lambda: None if timed.trainer.iter == 0 else timed.step())
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "opts",
    [
        (),
        # On the CPU float16 is slow.
        ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16", "SOLVER.OPTIMIZER_IMPLEMENTATION", "fused"),
        ("SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.RECOMPUTE", ["decoder.*_branch", "encoder"]),
        ("SOLVER.COMPILE", True),
    ],
)
def test_every_stage_has_its_time(cfg, opts, tmp_path, monkeypatch):
    # The compiler takes a minute.
    monkeypatch.setattr(recompute, "compiled", lambda network: lambda images: network(images))
    cfg.merge_from_list(list(opts))
    trainer = SteppingTrainer(cfg, str(tmp_path), caches_batches=True)
    stages = trainer.time_stages(2)
    assert list(stages) == list(TRAINING_STAGES)
    assert all(seconds.shape == (2,) and (seconds > 0).all() for seconds in stages.values()), stages
    assert trainer.step() > 0


def test_stages_are_timed_without_a_change_of_the_model(cfg, tmp_path):
    trainer = SteppingTrainer(cfg, str(tmp_path), caches_batches=True)
    before = set(vars(trainer.trainer.model))
    trainer.time_stages(1)
    assert set(vars(trainer.trainer.model)) == before
    assert not before & {"forward", "preprocess", "prepare_targets", "losses"}
    assert isinstance(trainer.trainer.model, SparseInst)


def test_stages_add_up_to_the_step(cfg, tmp_path, monkeypatch):
    trainer = SteppingTrainer(cfg, str(tmp_path), caches_batches=True)
    seconds = []
    step = trainer.step
    monkeypatch.setattr(trainer, "step", lambda: seconds.append(step()) or seconds[-1])
    assert np.allclose(sum(trainer.time_stages(2).values()), seconds)


def test_cached_batches_are_taken_in_turn_and_others_are_read(cfg, tmp_path):
    seen = []
    for caches in (True, False):
        trainer = SteppingTrainer(cfg, str(tmp_path), caches_batches=caches)
        for _ in range(3):
            trainer.step()
            seen.append([x["image_id"] for x in trainer.trainer.batches[0]])
    assert seen[0] == seen[2] == seen[3] and seen[1] == seen[4] != seen[0]
    assert sorted(seen[0] + seen[1]) == [1, 2, 3, 4]


def test_settings_are_measured_in_turn(cfg, monkeypatch):
    order = []
    step = SteppingTrainer.step
    rate = lambda trainer: trainer.trainer.cfg.SOLVER.BASE_LR  # noqa: E731
    monkeypatch.setattr(SteppingTrainer, "step", lambda self: order.append(rate(self)) or step(self))
    other = cfg.clone()
    other.SOLVER.BASE_LR = 2e-3
    found = measure_trainings({"a": cfg, "b": other}, caches_batches=True, repetitions=2, warmup=1, with_memory=False)
    # Then the steps that are timed by stage.
    assert order == [1e-3, 2e-3] * 3 + [1e-3] * 3 + [2e-3] * 3
    for measured in found.values():
        assert list(measured.stages) == [*TRAINING_STAGES, "step"]
        assert measured.batch_size == 2 and measured.peak_bytes is None
        assert measured.totals.shape == (2,) and 0 < measured.more["share_of_all_but_the_network"] < 1


def test_ellipses(tmp_path):
    json_file, images = write_ellipses(tmp_path, (60, 90), 40, 5, num_images=3)
    content = json.loads(json_file.read_text())
    assert len(list(images.iterdir())) == 3 and len(content["annotations"]) == 120
    assert {annotation["category_id"] for annotation in content["annotations"]} == {1, 2, 3, 4, 5}
    shares = np.array([annotation["area"] for annotation in content["annotations"]]) / (60 * 90)
    assert 0.02 < np.median(shares) < 0.06
    # It passes every check of a user's own data.
    register_coco_json("benchmark_ellipses", str(json_file), str(images))
    assert len(DatasetCatalog.get("benchmark_ellipses")) == 3


def test_memory_is_that_of_a_process_of_its_own(cfg):
    # Images of 16 times as many pixels take more.
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (64,), 96
    small = peak_bytes_of_steps(cfg, caches_batches=True)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (256,), 384
    large = peak_bytes_of_steps(cfg, caches_batches=True)
    assert 2**20 < small < large - 50 * 2**20


def test_memory_is_that_of_the_model_s_device(cfg, monkeypatch):
    devices = []
    monkeypatch.setattr(training, "SteppingTrainer", MagicMock())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: devices.append(device) or 7)
    cfg.MODEL.DEVICE = "cuda:1"
    assert training._peak_here(cfg, True, torch.get_num_threads()) == 7
    assert devices == [torch.device("cuda:1")]


def test_the_command(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_cfg().dump())
    path = tmp_path / "out" / "speed.json"
    code = benchmark_training.main(
        ["--config-file", str(config), "--size", "64", "96", "--batch-size", "2", "--repetitions", "2",
         "--precision", "bfloat16", "--instances", "2", "--no-memory", "--threads", "1", "--json", str(path),
         "--compare", "plain", "fused", "mine=WEIGHT_DECAY 0.1 MODEL.SPARSE_INST.DECODER.NUM_MASKS 5"]
    )  # fmt: skip
    text = capsys.readouterr()
    assert code == 0, text.err
    assert "batch of 2, bfloat16" in text.out and "2 ellipses in each image of 64x96" in text.out
    assert "times as fast as plain" in text.out and "all but the network" in text.out and "not measured" in text.out
    settings = json.loads(path.read_text())["settings"]
    assert settings.keys() == {"plain", "fused", "mine"}
    assert settings["plain"]["times_as_fast_as_first"]["median"] == 1
    assert settings["mine"].keys() >= {*TRAINING_STAGES, "step", "share_of_all_but_the_network", "peak_mb"}


def test_drawn_shapes_are_read_by_the_loader(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_cfg("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4).dump())
    code = benchmark_training.main(
        ["--config-file", str(config), "--data", "shapes", "--size", "64", "64", "--batch-size", "2",
         "--repetitions", "1", "--warmup", "0", "--no-memory"]
    )  # fmt: skip
    text = capsys.readouterr()
    assert code == 0, text.err
    assert "drawn shapes of 64 pixels" in text.out and "waiting for data" in text.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--compare", "fastest-of-all"], "--compare fastest-of-all: there are configured, plain"),
        (["--compare", "mine=FUSED True"], "--compare mine=FUSED True"),
        (["--compare", "mine=COMPILE"], "--compare mine=COMPILE"),
        (["--compare", "mine=RECOMPUTE \"['backbone.res7']\""], "SOLVER.RECOMPUTE has 'backbone.res7'"),
        (["--instances", "0"], "--instances is 0; it must be at least 1"),
        (["--repetitions", "0"], "--repetitions is 0"),
        (["--data", "config"], "DATASETS.TRAIN is empty"),
        (["--data", "shapes"], "NUM_CLASSES"),
    ],
)
def test_errors(tmp_path, capsys, args, message):
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_cfg().dump())
    fixed = ["--config-file", str(config), "--size", "64", "64", "--batch-size", "2", "--no-memory"]
    assert benchmark_training.main([*fixed, *args]) == 1
    assert message in capsys.readouterr().err
