"""Mixed precision over many steps, and steps that are not finite on one of several processes."""

import math
import time

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from sparseinst import get_config_file
from sparseinst.config import load_config
from sparseinst.data.coco_json import register_user_datasets
from sparseinst.engine.finite import NonFiniteStepError
from sparseinst.engine.trainer import Trainer
from sparseinst.tools.make_shapes import write_shapes_dataset
from tests.faults.child import Child, num_cases
from tests.shapes_data import register_shapes
from tests.tiny_model import tiny_cfg

NUM_LAST = 20


def precision_opts(dtype):
    is_mixed = dtype != "float32"
    return ("SOLVER.AMP.ENABLED", is_mixed, "SOLVER.AMP.DTYPE", dtype if is_mixed else "float16")


def train(cfg):
    """Trains; returns the losses of all steps, and how many the gradient scaler skipped."""
    seed_all_rng(1)
    trainer = Trainer(cfg)
    start = time.perf_counter()
    trainer.train()
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    counts = trainer.finite_guard.counts
    last = sum(losses[-NUM_LAST:]) / len(losses[-NUM_LAST:])
    print(
        f"{cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else 'float32'} at {cfg.INPUT.MIN_SIZE_TRAIN[0]} pixels: "
        f"{len(losses)} steps in {time.perf_counter() - start:.0f} s, first loss {losses[0]:.3f}, "
        f"mean of the last {NUM_LAST} {last:.3f}, skipped by the scaler {counts['scaler_skipped']}"
    )
    assert len(losses) == cfg.SOLVER.MAX_ITER and all(map(math.isfinite, losses))
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert counts["skipped"] == counts["scaler_in_row"] == 0
    return last, counts["scaler_skipped"]


# float16 at the config's own size would take a quarter of an hour: most CPUs have no instructions for it.
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 128), ("float16", 64)])
def test_mixed_precision_trains_where_float32_does(tmp_path, dtype, size):
    write_shapes_dataset(tmp_path, num_cases(8, 200), seed=0, size=128)

    def make_cfg(dtype):
        opts = (
            "DATASETS.TRAIN_JSON", str(tmp_path / "train.json"), "DATASETS.TRAIN_IMAGES", str(tmp_path / "train"),
            "DATASETS.TEST_JSON", "", "DATASETS.TEST_IMAGES", "", "DATASETS.TEST", (),
            "OUTPUT_DIR", str(tmp_path / dtype), "SOLVER.MAX_ITER", num_cases(5, 200),
            "INPUT.MIN_SIZE_TRAIN", (num_cases(32, size),), "SOLVER.IMS_PER_BATCH", num_cases(2, 4),
            *precision_opts(dtype),
        )  # fmt: skip
        cfg = load_config(get_config_file("quick/shapes"), opts)
        register_user_datasets(cfg, ("TRAIN",))
        return cfg

    expected, _ = train(make_cfg("float32"))
    last, scaler_skips = train(make_cfg(dtype))
    assert last == pytest.approx(expected, rel=0.15)
    # From its first scale, 65536, the scaler needs a few steps to one that float16 has room for.
    assert scaler_skips <= 16


# What goes wrong on process 1 alone, at iteration 1.
def break_loss(module, args, output):
    return output * float("nan")


def break_one_mask(module, args, output):
    output["pred_masks"].data[:, 0] = float("inf")


def break_gradient(module, args, output):
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * float("nan"))


FAULTS = {"encoder.fusion": break_loss, "decoder": break_one_mask, "encoder.ppm": break_gradient}


def train_as_one_of_two(rank, folder, name, action, dtype):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/exchange", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    data = register_shapes(folder / f"data{rank}", "numbers_two")
    seed_all_rng(1 + rank)
    cfg = tiny_cfg(
        "DATASETS.TRAIN", (data,), "DATASETS.TEST", (), "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4,
        "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (), "OUTPUT_DIR", str(folder / "output"),
        "SOLVER.NONFINITE.ACTION", action, *precision_opts(dtype),
    )  # fmt: skip
    trainer = Trainer(cfg)

    def spoil(module, args, output):
        return FAULTS[name](module, args, output) if trainer.iter == 1 and rank == 1 else None

    model = trainer.model.module
    model.get_submodule(name).register_forward_hook(spoil)
    try:
        trainer.train()
    except NonFiniteStepError as error:
        print(f"STOPPED {error}\nEND")
        return
    weights = sum(parameter.double().sum().item() for parameter in model.parameters())
    statistics_finite = all(torch.isfinite(buffer).all() for buffer in model.buffers())
    print(f"DONE {weights} {statistics_finite} {trainer.finite_guard.counts}")


def train_as_two(folder, *args):
    folder.mkdir(parents=True)
    children = [Child(train_as_one_of_two, rank, folder, *args) for rank in range(2)]
    outcomes = [child.wait(120) for child in children]
    for outcome in outcomes:
        assert outcome.exit_code == 0 and not outcome.timed_out, outcome.output
    return [outcome.output for outcome in outcomes]


@pytest.mark.parametrize("name", num_cases(["encoder.fusion"], list(FAULTS)))
@pytest.mark.parametrize("dtype", num_cases(["float32"], ["float32", "bfloat16"]))
def test_a_fault_on_one_of_two_processes_stops_both_with_the_same_error(tmp_path, name, dtype):
    outputs = train_as_two(tmp_path / "run", name, "stop", dtype)
    messages = [output.split("\nSTOPPED ")[1].split("\nEND")[0] for output in outputs]
    assert messages[0] == messages[1]
    assert "at iteration 1." in messages[0] and "Process 1 of 2: " in messages[0] and "Process 0" not in messages[0]
    assert name in messages[0] and "data1" in messages[0] and "data0" not in messages[0]
    assert "--resume repeats the step" in messages[0]
    assert (tmp_path / "run" / "output" / "last_checkpoint").read_text() == "model_nonfinite.pth"


@pytest.mark.parametrize("name", num_cases(["encoder.ppm"], list(FAULTS)))
@pytest.mark.parametrize("dtype", num_cases(["float32"], ["float32", "bfloat16"]))
def test_a_fault_on_one_of_two_processes_is_skipped_by_both(tmp_path, name, dtype):
    outputs = train_as_two(tmp_path / "run", name, "skip", dtype)
    ends = [output.split("\nDONE ")[1] for output in outputs]
    # The same weights after it: neither has taken the step alone.
    assert ends[0] == ends[1]
    assert "True" in ends[0] and "'skipped': 1, 'in_row': 0" in ends[0]
