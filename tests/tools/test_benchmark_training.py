"""The benchmark of training steps: what it times, its figures, its data and its errors; no test asserts a time."""

import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage

from sparseinst.data.coco_json import register_coco_json
from sparseinst.engine import training_benchmark
from sparseinst.engine.trainer import Trainer
from sparseinst.engine.training_benchmark import (
    CRITERION_BACKWARD,
    DATA,
    LOOP,
    MATCHER,
    NETWORK_BACKWARD,
    NETWORK_FORWARD,
    OPTIMIZER,
    STAGES,
    Measurement,
    StageClock,
    TimedTrainer,
    as_training_of,
    measure,
)
from sparseinst.tools import benchmark_training
from sparseinst.tools.make_shapes import write_ellipses
from tests.tiny_model import NUM_CLASSES, tiny_cfg


@pytest.fixture(autouse=True)
def loggers_as_before():
    """The command's handlers write to a stream that is gone after the test."""
    loggers = [logging.getLogger(name) for name in ("fvcore", "detectron2", "sparseinst")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "data").mkdir()
    json_file, images = write_ellipses(tmp_path / "data", (64, 96), 3, NUM_CLASSES, num_images=4)
    opts = ("SOLVER.IMS_PER_BATCH", 2, "OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.BASE_LR", 1e-3, "SEED", 3)
    return as_training_of(tiny_cfg(*opts), json_file, images, (64, 96))


class Ticks:
    """A clock that goes on by one at each look, and says who looked."""

    def __init__(self):
        self.time = 0

    def __call__(self, device):
        self.time += 1
        return float(self.time)


def test_time_is_divided_without_a_gap(monkeypatch):
    monkeypatch.setattr(training_benchmark, "now", Ticks())
    clock = StageClock(torch.device("cpu"))
    clock.start()  # 1
    inner = clock.timed(lambda x: x + 1, MATCHER)
    outer = clock.timed(lambda x: 2 * inner(x), NETWORK_FORWARD)
    assert outer(3) == 8  # 2, 3, 4, 5: one tick for the matcher, two for what is around it
    clock.switch(OPTIMIZER)  # 6
    clock.switch(LOOP)  # 7
    seconds = {stage: value for stage, value in clock.seconds.items() if value}
    assert seconds == {LOOP: 2, NETWORK_FORWARD: 2, MATCHER: 1, OPTIMIZER: 1}


def test_a_timed_step_is_the_trainers_own(cfg):
    def weights(steps):
        torch.manual_seed(0)
        trainer, run_step = steps()
        for iteration in range(3):
            trainer.iter, trainer.max_iter = iteration, iteration + 1
            run_step()
        return trainer.model.state_dict()

    def plain():
        trainer = Trainer(cfg)
        storage = EventStorage()

        def run_step():
            with storage:
                trainer.run_step()

        return trainer, run_step

    def timed():
        steps = TimedTrainer(cfg, keeps_batches=False)
        return steps.trainer, steps.step

    expected, found = weights(plain), weights(timed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("SOLVER.AMP.ENABLED", True, "SOLVER.OPTIMIZER_IMPLEMENTATION", "fused"),
        ("SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.RECOMPUTE", ["decoder.*_branch", "encoder"]),
    ],
)
def test_every_stage_has_its_time(cfg, opts):
    cfg.merge_from_list(list(opts))
    steps = TimedTrainer(cfg, keeps_batches=True)
    stages = dict(zip(STAGES, steps.step()))
    assert all(seconds > 0 for seconds in stages.values()), stages
    (total,) = steps.step(with_stages=False)
    assert total > 0


def test_the_criterions_backward_pass_ends_where_the_networks_begins(cfg, monkeypatch):
    monkeypatch.setattr(training_benchmark, "now", Ticks())
    steps = TimedTrainer(cfg, keeps_batches=True)
    clock, model = steps.clock, steps.trainer.model
    seen = {}
    # The last thing that the criterion does, and the last of the network, have their gradients first.
    plain_forward = model.criterion.forward

    def forward(*args):
        losses = plain_forward(*args)
        for loss in losses.values():
            loss.register_hook(lambda _: seen.setdefault("loss", clock.stage) and None)
        return losses

    model.criterion.forward = forward
    model.encoder.fusion.weight.register_hook(lambda _: seen.setdefault("encoder", clock.stage) and None)
    model.decoder.mask_branch.projection.weight.register_hook(
        lambda _: seen.setdefault("decoder", clock.stage) and None
    )
    steps.step()
    assert seen == {"loss": CRITERION_BACKWARD, "decoder": NETWORK_BACKWARD, "encoder": NETWORK_BACKWARD}


def test_kept_batches_are_taken_in_turn_and_others_are_read(cfg):
    seen = []
    for keeps in (True, False):
        steps = TimedTrainer(cfg, keeps_batches=keeps)
        for _ in range(3):
            steps.step()
            seen.append([x["image_id"] for x in steps.trainer.batches[0]])
    assert seen[0] == seen[2] == seen[3] and seen[1] == seen[4] != seen[0]
    assert sorted(seen[0] + seen[1]) == [1, 2, 3, 4]


def test_settings_are_measured_in_turn(cfg, monkeypatch):
    order = []
    step = TimedTrainer.step
    monkeypatch.setattr(TimedTrainer, "step", lambda self: order.append(self.name) or step(self))
    monkeypatch.setattr(
        training_benchmark, "_timed_trainer",
        lambda cfg, folder, keeps: setattr(trainer := TimedTrainer(cfg, keeps), "name", cfg.SOLVER.BASE_LR) or trainer,
    )  # fmt: skip
    other = cfg.clone()
    other.SOLVER.BASE_LR = 2e-3
    found = measure({"a": cfg, "b": other}, keeps_batches=True, repetitions=2, warmup=1, with_memory=False)
    assert order == [1e-3, 2e-3] * 3
    for measured in found.values():
        assert measured.stages.shape == (2, len(STAGES)) and measured.batch_size == 2 and measured.peak_bytes is None
        assert np.allclose(measured.totals, measured.stages.sum(1))


def test_shares():
    stages = np.zeros((1, len(STAGES)))
    stages[0, STAGES.index(NETWORK_FORWARD)], stages[0, STAGES.index(NETWORK_BACKWARD)] = 3.0, 5.0
    stages[0, STAGES.index(CRITERION_BACKWARD)], stages[0, STAGES.index(DATA)] = 1.5, 0.5
    assert Measurement(stages, stages.sum(1), 2, None).outside_network() == pytest.approx([0.2])


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
    # Pictures of 43 times as many pixels take more.
    small = training_benchmark.peak_bytes(cfg, keeps_batches=True)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (512,), 768
    large = training_benchmark.peak_bytes(cfg, keeps_batches=True)
    assert 2**20 < small < large - 50 * 2**20


def test_the_command(cfg, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_cfg().dump())
    path = tmp_path / "out" / "speed.json"
    code = benchmark_training.main(
        ["--config-file", str(config), "--size", "64", "96", "--batch-size", "2", "--repetitions", "2",
         "--precision", "float16", "--instances", "2", "--no-memory", "--threads", "1", "--json", str(path),
         "--compare", "plain", "fused", "mine=WEIGHT_DECAY 0.1 MODEL.SPARSE_INST.DECODER.NUM_MASKS 5"]
    )  # fmt: skip
    text = capsys.readouterr()
    assert code == 0, text.err
    assert "batch of 2, float16" in text.out and "2 ellipses in each picture of 64x96" in text.out
    assert "times as fast as plain" in text.out and "all but the network" in text.out
    settings = json.loads(path.read_text())["settings"]
    assert settings.keys() == {"plain", "fused", "mine"}
    assert settings["plain"]["times_as_fast_as_first"]["median"] == 1
    assert settings["mine"].keys() >= {*STAGES, "step", "share_of_all_but_the_network", "peak_mb"}


def test_the_loaders_speed(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_cfg("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4).dump())
    code = benchmark_training.main(
        ["--config-file", str(config), "--data", "shapes", "--size", "64", "64", "--batch-size", "2",
         "--repetitions", "1", "--warmup", "0", "--no-memory"]
    )  # fmt: skip
    text = capsys.readouterr()
    assert code == 0, text.err
    assert "A worker reads" in text.out and "DATALOADER.NUM_WORKERS is 0" in text.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--compare", "fastest-of-all"], "--compare fastest-of-all: there are configured, plain"),
        (["--compare", "mine=FUSED True"], "--compare mine=FUSED True"),
        (["--compare", "mine=COMPILE"], "--compare mine=COMPILE"),
        (["--compare", "mine=RECOMPUTE \"['backbone.res7']\""], "SOLVER.RECOMPUTE has 'backbone.res7'"),
        (["--instances", "0"], "--instances has 0; it must be at least 1"),
        (["--repetitions", "0"], "--repetitions has 0"),
        (["--data", "config"], "DATASETS.TRAIN is empty"),
        (["--data", "shapes"], "NUM_CLASSES"),
    ],
)
def test_errors(tmp_path, capsys, args, message):
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_cfg().dump())
    fixed = ["--config-file", str(config), "--size", "64", "64", "--batch-size", "2", "--no-memory"]
    assert benchmark_training.main([*fixed, *args]) == 2
    assert message in capsys.readouterr().err
