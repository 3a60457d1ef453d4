"""train_net.py with a LazyConfig: the published file, made small by overrides, and errors of one line."""

import json
import logging

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.solver import build_lr_scheduler
from detectron2.utils.logger import setup_logger

from sparseinst import get_config_file
from sparseinst.config import load_config
from sparseinst.tools.train_net import build_parser, main
from tests.shapes_data import register_shapes

PUBLISHED = "lazy/sparse_inst_r50_giam.py"


def run(*arguments, config=PUBLISHED):
    return main(build_parser().parse_args(["--config-file", str(config), *map(str, arguments)]))


@pytest.fixture(autouse=True)
def loggers():
    """Undo what the command does to the loggers, which write to the captured stdout of one test."""
    yield
    for name in ("detectron2", "fvcore", "sparseinst"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    setup_logger.cache_clear()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Overrides that make the published file small."""
    folder = tmp_path_factory.mktemp("lazy")
    names = register_shapes(folder, "lazy_train"), register_shapes(folder, "lazy_val", 3, seed=1)
    return [
        "model.backbone.stages.depth=18",
        *(f"model.encoder.input_shape.res{stage}.channels={2**stage * 16}" for stage in (3, 4, 5)),
        "model.decoder.inst_branch.num_classes=4", "model.decoder.inst_branch.num_masks=6",
        f"dataloader.train.dataset.names={names[0]}", f"dataloader.test.dataset.names={names[1]}",
        "dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0", "dataloader.test.num_workers=0",
        "dataloader.train.mapper.augmentations.1.short_edge_length=[64]",
        "train.init_checkpoint=''", "train.max_iter=2", "train.seed=1", "train.device=cpu",
    ]  # fmt: skip


def test_train_then_resume_then_evaluate(small, tmp_path, capsys):
    output = f"train.output_dir='{tmp_path}'"
    results = run(*small, output)
    assert capsys.readouterr().err.count("WARNING: the config file") == 1
    assert "segm" in results
    assert json.loads((tmp_path / "results.json").read_text())["results"].keys() == results.keys()
    first = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert first["iteration"] == 1
    with pytest.raises(ValueError, match="config.yaml.*a training of a LazyConfig"):
        load_config(str(tmp_path / "config.yaml"))

    with pytest.raises(SystemExit, match="earlier run"):
        run(*small, output)
    run("--resume", *small, output, "train.max_iter=3")
    second = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert second["iteration"] == 2
    steps = [next(iter(content["trainer"]["optimizer"]["state"].values()))["step"] for content in (first, second)]
    assert steps == [2, 3]

    saved = (tmp_path / "config.yaml").read_text()
    evaluated = run("--eval-only", *small, f"train.init_checkpoint='{tmp_path}/model_final.pth'", output)
    assert evaluated.keys() == results.keys()
    assert (tmp_path / "config.yaml").read_text() == saved
    assert "/model_final.pth" in (tmp_path / "inference" / "config.yaml").read_text()


def test_gradients_are_clipped(small, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def recorded_step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    run(*small, f"train.output_dir='{tmp_path}'", "train.clip_total_norm=0.01", "train.max_iter=1")
    assert norms == [pytest.approx(0.01, rel=1e-3)]


@pytest.mark.parametrize(
    ("lazy_name", "yaml_name"),
    [
        (PUBLISHED, "sparse_inst_r50_giam"),
        ("lazy/solov2_light_448_r50.py", "solov2/solov2_light_448_r50_3x"),
        ("lazy/yolact_resnet50.py", "yolact/yolact_resnet50"),
    ],
)
def test_the_recipe_is_that_of_the_yaml(lazy_name, yaml_name):
    lazy, cfg = LazyConfig.load(get_config_file(lazy_name)), load_config(yaml_name)
    solver, test = cfg.SOLVER, lazy.dataloader.test
    assert lazy.optimizer._target_ is {"ADAMW": torch.optim.AdamW, "SGD": torch.optim.SGD}[solver.OPTIMIZER]
    assert lazy.optimizer.params.get("weight_decay_norm", 0.0) == solver.WEIGHT_DECAY_NORM
    assert lazy.optimizer.get("momentum", solver.MOMENTUM) == solver.MOMENTUM
    assert (lazy.optimizer.lr, lazy.optimizer.weight_decay) == (solver.BASE_LR, solver.WEIGHT_DECAY)
    assert (lazy.train.max_iter, lazy.train.clip_total_norm) == (solver.MAX_ITER, solver.CLIP_TOTAL_NORM)
    assert lazy.dataloader.train.total_batch_size == solver.IMS_PER_BATCH
    assert (lazy.train.eval_period, lazy.train.init_checkpoint) == (cfg.TEST.EVAL_PERIOD, cfg.MODEL.WEIGHTS)
    augmentations = lazy.dataloader.train.mapper.augmentations
    if cfg.INPUT.SQUARE_SIZE:
        assert augmentations[-1].shape == [cfg.INPUT.SQUARE_SIZE] * 2 and not test.mapper.augmentations
        assert lazy.model.side == cfg.INPUT.SQUARE_SIZE and list(lazy.model.pixel_mean) == cfg.MODEL.PIXEL_MEAN
    else:
        resizes = [augmentations[1], test.mapper.augmentations[0]]
        assert tuple(resizes[0].short_edge_length) == tuple(cfg.INPUT.MIN_SIZE_TRAIN)
        assert resizes[1].short_edge_length == cfg.INPUT.MIN_SIZE_TEST
        assert [resize.max_size for resize in resizes] == [cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST]
    multiplier = instantiate(lazy.lr_multiplier)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    published = build_lr_scheduler(cfg, optimizer)
    edges = (1, 500, solver.WARMUP_ITERS, *solver.STEPS, solver.MAX_ITER)
    for iteration in (0, *edges[:-1], *(edge - 1 for edge in edges)):
        assert multiplier(iteration / solver.MAX_ITER) == pytest.approx(
            published._multiplier(iteration / solver.MAX_ITER)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.max_iter", "10"], "'train.max_iter' is not an override.*KEY=VALUE"),
        (["train.max_itr=10"], "'train.max_itr=10' names no key"),
        (["train.max_iter=[1"], "cannot be applied"),
        (["model.decoder.inst_branch.num_masks=none"], "model of the config cannot be built"),
        (["train.amp.enabled=True", "train.device=cpu"], "train.amp.enabled"),
        (["train.init_checkpoint=no_such.pth"], "no_such.pth"),
        (["dataloader.train.dataset.names=no_such_data"], "no_such_data"),
    ],
)
def test_errors_are_one_line(small, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as error:
        run(*small, f"train.output_dir='{tmp_path}'", *arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("model = (", "SyntaxError"), ("1 / 0", "ZeroDivisionError"), ("model = {}", "has no dataloader, optimizer")],
)
def test_a_file_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "config.py"
    path.write_text(content)
    with pytest.raises(SystemExit, match=f"^error: .*config.py.*{message}"):
        run(config=path)
    with pytest.raises(ValueError, match="Python code"):
        load_config(str(path))


def test_a_recipe_is_refused():
    with pytest.raises(SystemExit, match="--recipe and --config-file are both given"):
        main(build_parser().parse_args(["--config-file", str(PUBLISHED), "--recipe", "auto"]))
