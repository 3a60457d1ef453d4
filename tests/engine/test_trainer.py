"""The training loop: accumulation, mixed precision, checkpoints, resuming, hooks, and what is refused."""

import json

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from sparseinst.engine import trainer as trainer_module
from sparseinst.engine.trainer import Trainer
from tests.shapes_data import CLASS_NAMES, register_shapes
from tests.tiny_model import tiny_cfg


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return register_shapes(folder, "trainer_train"), register_shapes(folder, "trainer_val", 4, seed=1)


# Small images and two stages: CPUs have no fast convolution in float16.
SMALL = (
    "INPUT.MIN_SIZE_TRAIN", (32,),
    "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"], "MODEL.SPARSE_INST.ENCODER.IN_FEATURES", ["res2", "res3"],
)  # fmt: skip


def make_cfg(shapes, output_dir, *opts):
    return tiny_cfg(
        "DATASETS.TRAIN", shapes[:1], "DATASETS.TEST", shapes[1:], "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4,
        "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", (3,),
        "SOLVER.BASE_LR", 1e-3, "OUTPUT_DIR", str(output_dir), "SEED", 3, *opts,
    )  # fmt: skip


def run(cfg, resume=False):
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer, trainer.train()


def read_metrics(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.json").read_text().splitlines()]


def test_trains_evaluates_and_keeps_a_bounded_number_of_checkpoints(shapes, tmp_path):
    cfg = make_cfg(
        shapes, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_CHECKPOINTS", 2, "TEST.EVAL_PERIOD", 2,
        # After four steps masks may have no pixel above the usual threshold, and AP without predictions is NaN.
        "MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0, "MODEL.SPARSE_INST.MASK_THRESHOLD", 0.001,
    )  # fmt: skip
    trainer, results = run(cfg)
    assert {"bbox", "segm"} <= results.keys()
    assert results["segm"]["AP"] >= 0
    # The best and the final one are kept beside the newest periodic ones.
    names = sorted(path.name for path in tmp_path.glob("model_*.pth"))
    assert set(names) - {"model_best.pth"} == {"model_0000002.pth", "model_0000003.pth", "model_final.pth"}
    metrics = read_metrics(tmp_path)
    written = set().union(*metrics)
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_objectness", "total_loss", "lr", "segm/AP"} <= written
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_checkpoints_carry_the_classes_and_load_with_stock_parts(shapes, tmp_path):
    cfg = make_cfg(shapes, tmp_path, "SOLVER.MAX_ITER", 1)
    trainer, _ = run(cfg)
    model = build_model(cfg)
    rest = DetectionCheckpointer(model).load(str(tmp_path / "model_final.pth"))
    assert rest["classes"] == {"names": CLASS_NAMES, "category_ids": [1, 2, 3, 4]}
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_trackers_start_with_the_training(shapes, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(trainer_module, "check_trackers", lambda names: None)
    monkeypatch.setattr(trainer_module, "build_trackers", lambda *args: started.append(args) or [])
    for max_iter in (1, 2):
        cfg = make_cfg(shapes[:1], tmp_path, "SOLVER.MAX_ITER", max_iter, "TRACKERS", ["wandb"])
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=max_iter > 1)
        assert len(started) == max_iter - 1
        trainer.train()
        # The last value: whether it is resumed.
        assert started[-1] == (["wandb"], str(tmp_path), cfg.dump(), max_iter > 1)


def test_resumes_from_the_last_checkpoint(shapes, tmp_path):
    run(make_cfg(shapes, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 2))
    first = torch.load(tmp_path / "model_final.pth")
    trainer, _ = run(make_cfg(shapes, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 2), resume=True)
    assert trainer.start_iter == 2 and trainer.iter == 4
    second = torch.load(tmp_path / "model_final.pth")
    assert (first["iteration"], second["iteration"]) == (1, 3)
    steps = [state["step"].item() for state in second["trainer"]["optimizer"]["state"].values()]
    assert set(steps) == {4}


def test_a_run_that_was_killed_before_its_final_checkpoint_gets_one(shapes, tmp_path):
    cfg = make_cfg(shapes, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ())
    run(cfg)
    final = tmp_path / "model_final.pth"
    first = torch.load(final)
    final.write_bytes(b"of a shorter training")
    (tmp_path / "last_checkpoint").write_text("model_0000000.pth")
    trainer, _ = run(cfg, resume=True)
    assert trainer.start_iter == 1
    second = torch.load(final)
    assert second["iteration"] == first["iteration"] == 0
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())


def test_a_changed_learning_rate_is_taken_on_resume(shapes, tmp_path):
    opts = ("SOLVER.STEPS", (), "DATASETS.TEST", (), "SOLVER.CHECKPOINT_PERIOD", 2)
    run(make_cfg(shapes, tmp_path, *opts, "SOLVER.MAX_ITER", 2))
    cfg = make_cfg(shapes, tmp_path, *opts, "SOLVER.BASE_LR", 1e-5, "SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.MAX_ITER", 4)
    trainer, _ = run(cfg, resume=True)
    assert trainer.start_iter == 2
    assert {(group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups} == {(1e-5, 0.0)}
    assert read_metrics(tmp_path)[-1]["lr"] == 1e-5
    steps = [state["step"].item() for state in trainer.optimizer.state.values()]
    assert set(steps) == {4}
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER is SGD, but the checkpoint has the state of ADAMW"):
        run(make_cfg(shapes, tmp_path, *opts, "SOLVER.OPTIMIZER", "SGD"), resume=True)


def test_a_step_draws_the_same_random_numbers_whatever_came_before_it(shapes, tmp_path):
    drawn = {}

    def draw(trainer):
        key = (trainer.start_iter, trainer.iter)
        drawn[key] = (torch.rand(()).item(), [x["image"] for x in trainer.batches[0]])

    cfg = make_cfg(shapes, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", ())
    for resume in (False, True):
        if resume:
            (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.model.register_forward_pre_hook(lambda *_, trainer=trainer: draw(trainer))
        trainer.train()
    assert sorted(drawn) == [(0, 0), (0, 1), (0, 2), (0, 3), (2, 2), (2, 3)]
    assert len({number for number, _ in drawn.values()}) == 4
    for iteration in (2, 3):
        assert drawn[2, iteration][0] == drawn[0, iteration][0]
        assert all(map(torch.equal, drawn[2, iteration][1], drawn[0, iteration][1]))


def test_resuming_with_other_classes_is_refused(shapes, tmp_path):
    run(make_cfg(shapes, tmp_path, "SOLVER.MAX_ITER", 1))
    trainer = Trainer(make_cfg(shapes, tmp_path))
    trainer.checkpointer.checkpointables["classes"].classes = trainer.checkpointer.checkpointables[
        "classes"
    ].classes._replace(names=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="--resume"):
        trainer.resume_or_load(resume=True)


def step_gradients(cfg, batches):
    """Gradients that one step leaves, and the losses that it logs."""
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    # At the scale that it starts with a step may overflow.
    trainer.grad_scaler.load_state_dict({**trainer.grad_scaler.state_dict(), "scale": 16.0})
    trainer.iter, trainer.max_iter = 0, 1
    trainer._loader_iter = iter(batches)
    with EventStorage() as trainer.storage:
        trainer.run_step()
        losses = {name: value for name, (value, _) in trainer.storage.latest().items() if "loss" in name}
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}, losses


def test_accumulated_steps_equal_one_large_batch(shapes, tmp_path):
    # FrozenBN: batch statistics of parts differ from those of the whole.
    opts = ("MODEL.RESNETS.NORM", "FrozenBN", "INPUT.RANDOM_FLIP", "none")
    whole_cfg = make_cfg(shapes, tmp_path, *opts)
    batch = next(iter(Trainer(whole_cfg).data_loader))
    assert len({len(x["instances"]) for x in batch}) > 1
    whole, whole_losses = step_gradients(whole_cfg, [batch])
    parts, part_losses = step_gradients(
        make_cfg(shapes, tmp_path, *opts, "SOLVER.ACCUMULATE_STEPS", 2), [batch[:1], batch[1:]]
    )
    assert part_losses == pytest.approx(whole_losses, rel=1e-5)
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def test_channels_last_gives_the_same_gradients(shapes, tmp_path):
    cfg = make_cfg(shapes, tmp_path)
    batch = next(iter(Trainer(cfg).data_loader))
    plain, _ = step_gradients(cfg, [batch])
    cfg = make_cfg(shapes, tmp_path, "SOLVER.CHANNELS_LAST", True)
    assert Trainer(cfg).model.encoder.fpn_outputs[0].weight.is_contiguous(memory_format=torch.channels_last)
    # Other summation orders; batch statistics over few pixels magnify their rounding.
    for name, gradient in step_gradients(cfg, [batch])[0].items():
        assert (plain[name] - gradient).norm() <= 2e-2 * gradient.norm() + 1e-6, name


RECOMPUTE = ("SOLVER.RECOMPUTE", ["backbone.*", "encoder", "decoder.*_branch"])
FUSED = ("SOLVER.OPTIMIZER_IMPLEMENTATION", "fused")
BFLOAT16 = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16")
SGD = ("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1e-5)


@pytest.mark.parametrize(
    ("plain", "opts", "tolerance"),
    [
        # Adam's first steps are of one size, however small a gradient, and so is what rounding does to it.
        ((), FUSED, 5e-2),
        ((), RECOMPUTE, 1e-6),
        (("SOLVER.ACCUMULATE_STEPS", 2), RECOMPUTE, 1e-6),
        ((), (*FUSED, *RECOMPUTE, "SOLVER.CHANNELS_LAST", True), 5e-2),
        (SGD, (*FUSED, *RECOMPUTE, "SOLVER.CHANNELS_LAST", True), 1e-3),
        (BFLOAT16, RECOMPUTE, 1e-6),
    ],
)
def test_options_give_the_same_weights(shapes, tmp_path, plain, opts, tolerance):
    common = ("DATASETS.TEST", (), "MODEL.RESNETS.NORM", "BN", *plain)
    torch.manual_seed(0)
    start = build_model(make_cfg(shapes, tmp_path, *common))
    plain, _ = run(make_cfg(shapes, tmp_path / "plain", *common))
    fast, _ = run(make_cfg(shapes, tmp_path / "fast", *common, *opts))
    assert fast.model.state_dict().keys() == plain.model.state_dict().keys()
    # Relative to how far four steps have moved the weights.
    start, plain, fast = (
        torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        for model in (start, plain.model, fast.model)
    )
    moved, apart = (plain - start).norm(), (fast - plain).norm()
    assert 0 < moved and apart <= tolerance * moved


@pytest.mark.parametrize("amp_dtype", [None, "bfloat16", "float16"])
def test_the_gradients_are_clipped_after_they_are_unscaled(shapes, tmp_path, amp_dtype):
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", amp_dtype) if amp_dtype else ()
    opts = ("DATASETS.TEST", (), *SMALL, *SGD, *amp)
    cfg = make_cfg(shapes, tmp_path, *opts)
    batch = next(iter(Trainer(cfg).data_loader))
    gradients, _ = step_gradients(cfg, [batch])
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    assert 1 < norm < 500
    for clip_value in (0.1, 1e3):
        clipped, _ = step_gradients(make_cfg(shapes, tmp_path, *opts, "SOLVER.CLIP_TOTAL_NORM", clip_value), [batch])
        factor = min(1, clip_value / norm.item())
        for name, gradient in gradients.items():
            assert torch.allclose(clipped[name], gradient * factor, rtol=1e-4, atol=1e-7), (clip_value, name)


@pytest.mark.parametrize("clip_type", ["value", "norm"])
def test_detectron2s_clipping_by_parameter_works(shapes, tmp_path, clip_type):
    clip = "SOLVER.CLIP_GRADIENTS"
    cfg = make_cfg(
        shapes, tmp_path, "DATASETS.TEST", (), *SGD, "SOLVER.BASE_LR", 1.0, "SOLVER.WEIGHT_DECAY", 0.0,
        "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (),
        f"{clip}.ENABLED", True, f"{clip}.CLIP_TYPE", clip_type, f"{clip}.CLIP_VALUE", 1e-3,
    )  # fmt: skip
    torch.manual_seed(0)
    before = dict(build_model(cfg).named_parameters())
    trainer, _ = run(cfg)
    # With a learning rate of 1 a parameter moves by its clipped gradient.
    order = torch.inf if clip_type == "value" else 2
    moved = [(parameter - before[name]).detach().norm(order) for name, parameter in trainer.model.named_parameters()]
    assert max(moved) == pytest.approx(1e-3, rel=1e-2)


def test_a_run_is_resumed_with_other_options(shapes, tmp_path):
    def weights(folder, resumed_with):
        opts = ("DATASETS.TEST", (), "SOLVER.CHECKPOINT_PERIOD", 2)
        run(make_cfg(shapes, folder, *opts, "SOLVER.MAX_ITER", 2))
        # One more step: AdamW makes another one's tiny gradients large, whose rounding differs.
        trainer, _ = run(
            make_cfg(shapes, folder, *opts, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (), *resumed_with), resume=True
        )
        assert trainer.start_iter == 2
        saved = torch.load(folder / "model_final.pth")
        assert saved["iteration"] == 2
        return trainer, saved["model"]

    _, expected = weights(tmp_path / "plain", ())
    trainer, found = weights(tmp_path / "fast", (*FUSED, *RECOMPUTE))
    assert all(group["fused"] for group in trainer.optimizer.param_groups)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name].float(), value.float(), rtol=1e-5, atol=1e-6), name


def test_a_compiled_run_writes_the_checkpoint_of_any_other(shapes, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: lambda images: compiled.append(1) or network(images))
    opts = ("SOLVER.MAX_ITER", 2, "DATASETS.TEST", ())
    run(make_cfg(shapes, tmp_path / "plain", *opts))
    assert not compiled
    run(make_cfg(shapes, tmp_path / "compiled", *opts, "SOLVER.COMPILE", True))
    assert len(compiled) == 2
    first, second = (torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("plain", "compiled"))
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_accumulation_divides_the_batch(shapes, tmp_path):
    trainer = Trainer(make_cfg(shapes, tmp_path, "SOLVER.ACCUMULATE_STEPS", 2))
    assert len(next(iter(trainer.data_loader))) == 2
    with pytest.raises(ValueError, match="ACCUMULATE_STEPS"):
        Trainer(make_cfg(shapes, tmp_path, "SOLVER.ACCUMULATE_STEPS", 3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_on_the_cpu(shapes, tmp_path, dtype):
    cfg = make_cfg(shapes, tmp_path, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype, "DATASETS.TEST", (),
                   *SMALL)  # fmt: skip
    trainer, _ = run(cfg)
    assert trainer.grad_scaler.is_enabled() == (dtype == "float16")
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    state = torch.load(tmp_path / "model_final.pth")["trainer"]
    assert bool(state["grad_scaler"]) == (dtype == "float16")


def test_visualisation_and_precise_bn(shapes, tmp_path):
    cfg = make_cfg(
        shapes, tmp_path, "VIS_PERIOD", 2, "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 2,
        "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2,
    )  # fmt: skip
    trainer = Trainer(cfg)
    pictures = {}
    put_image = EventStorage.put_image
    EventStorage.put_image = lambda self, name, picture: pictures.setdefault(name, picture)
    try:
        trainer.train()
    finally:
        EventStorage.put_image = put_image
    assert set(pictures) == {"train/ground_truth", "train/predictions", "train/activation_maps"}
    assert all(picture.shape[0] == 3 for picture in pictures.values())
    assert trainer.model.training and not trainer.model.output.with_maps


def test_stock_mapper_by_name(shapes, tmp_path):
    for mask_format in ("polygon", "bitmask"):
        cfg = make_cfg(
            shapes, tmp_path, "MODEL.SPARSE_INST.DATASET_MAPPER", "DatasetMapper", "INPUT.MASK_FORMAT", mask_format,
            "SOLVER.MAX_ITER", 1, "DATASETS.TEST", (),
        )  # fmt: skip
        run(cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TEST.AUG.ENABLED", True),
        ("SOLVER.AMP.DTYPE", "float8"),
        ("SOLVER.OPTIMIZER_IMPLEMENTATION", "fast"),
        ("SOLVER.RECOMPUTE", ["backbone.res7"]),
        ("MODEL.SPARSE_INST.DATASET_MAPPER", "Mine"),
        ("DATASETS.TRAIN", ()),
    ],
)
def test_refused_by_name(shapes, tmp_path, key, value):
    with pytest.raises(ValueError, match=key.split(".")[-1]):
        Trainer(make_cfg(shapes, tmp_path, key, value))


def test_weights_are_loaded_for_certain(shapes, tmp_path):
    run(make_cfg(shapes, tmp_path / "first", "SOLVER.MAX_ITER", 1))
    path = tmp_path / "first" / "model_final.pth"
    # Nothing in it needs code to be read: the optimizer's, the hooks' and the gradient scaler's states included.
    first = torch.load(path, weights_only=True)
    assert {"model", "trainer", "classes", "iteration"} <= first.keys()

    # Fine-tuning: with other heads, from what fits.
    trainer = Trainer(make_cfg(shapes, tmp_path / "second", "MODEL.WEIGHTS", str(path),
                               "MODEL.SPARSE_INST.DECODER.NUM_MASKS", 9))  # fmt: skip
    trainer.resume_or_load(resume=False)
    assert trainer.start_iter == 0
    state = trainer.model.state_dict()
    different = [name for name, value in first["model"].items() if not torch.equal(state[name], value)]
    assert different == ["decoder.inst_branch.iam_conv.weight", "decoder.inst_branch.iam_conv.bias"]

    # A backbone that does not fit.
    torch.save({name.replace("res", "stage"): value for name, value in first["model"].items()}, tmp_path / "other.pth")
    cfg = make_cfg(shapes, tmp_path / "third", "MODEL.WEIGHTS", str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="MODEL.MIN_BACKBONE_COVERAGE 0.0"):
        Trainer(cfg).resume_or_load(resume=False)
    cfg.MODEL.MIN_BACKBONE_COVERAGE = 0.0
    Trainer(cfg).resume_or_load(resume=False)


@pytest.mark.parametrize(("warmup", "expected"), [(4, 1), (3, 0)])
def test_a_warm_up_of_the_whole_training(shapes, tmp_path, warmup, expected, caplog):
    Trainer(make_cfg(shapes, tmp_path, "SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", warmup))
    assert caplog.text.count(f"SOLVER.WARMUP_ITERS {warmup} is not below SOLVER.MAX_ITER 4") == expected


def test_a_step_of_the_schedule_at_its_end(shapes, tmp_path):
    with pytest.raises(ValueError, match=r"SOLVER.STEPS \(2, 4\) has SOLVER.MAX_ITER 4: leave that step out"):
        Trainer(make_cfg(shapes, tmp_path, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (2, 4)))
