"""Ranks that train together: weights as one process with the joint batch has them, and data of which some have none."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from sparseinst.data.coco_json import register_coco_json
from sparseinst.engine.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.shapes_data import write_shapes
from tests.tiny_model import tiny_cfg

SEED = 5
# SGD, and gradients clipped by their norm: AdamW, and clipping by value, make a full step of what is mere rounding.
# FrozenBN: batch statistics are each rank's own.
OPTS = (
    "MODEL.RESNETS.NORM", "FrozenBN", "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1e-3, "SOLVER.MAX_ITER", 3,
    "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm",
    "SOLVER.IMS_PER_BATCH", 12, "SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", (),
    "INPUT.RANDOM_FLIP", "none", "SEED", SEED, "MODEL.SPARSE_INST.LOSS.GLOBAL_NORMALIZATION", True,
    "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4,
)  # fmt: skip


def train(files, output_dir, *opts):
    """As train_net.py does; returns parameters and buffers."""
    if files[0] not in DatasetCatalog:
        register_coco_json(files[0], *files)
    seed_all_rng(SEED + comm.get_rank())
    trainer = Trainer(tiny_cfg(*OPTS, "DATASETS.TRAIN", files[:1], "OUTPUT_DIR", output_dir, *opts))
    trainer.train()
    return dict(trainer.checkpointer.model.state_dict())


def distance(weights, others):
    """Between two models, over the length of the first."""
    squares = [((others[name] - weight) ** 2).sum() for name, weight in weights.items()]
    return float((sum(squares) / sum((weight**2).sum() for weight in weights.values())) ** 0.5)


def test_weights_of_several_ranks_are_those_of_one_process(tmp_path):
    files = write_shapes(tmp_path, 6)
    (tmp_path / "one").mkdir()
    one = train(files, str(tmp_path / "one"))
    (tmp_path / "start").mkdir()
    moved = distance(one, train(files, str(tmp_path / "start"), "SOLVER.BASE_LR", 0.0))
    for num_ranks in (2, 3):
        output_dir = tmp_path / str(num_ranks)
        output_dir.mkdir()
        first, *others = run_ranks(num_ranks, train, files, str(output_dir))
        assert all(torch.equal(rank[name], weight) for rank in others for name, weight in first.items())
        assert distance(one, first) < 1e-4 * moved
        saved = torch.load(output_dir / "model_final.pth", weights_only=True)["model"]
        assert all(torch.equal(saved[name], weight) for name, weight in first.items())


@pytest.mark.parametrize("global_normalization", [False, True])
def test_most_ranks_have_no_instances(tmp_path, global_normalization):
    json_file, images = write_shapes(tmp_path, 6)
    content = json.loads(Path(json_file).read_text())
    annotated = content["annotations"][0]["image_id"]
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] == annotated]
    Path(json_file).write_text(json.dumps(content))
    (tmp_path / "out").mkdir()
    first, second = run_ranks(
        2, train, (json_file, images), str(tmp_path / "out"),
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.ACCUMULATE_STEPS", 1,
        "SOLVER.MAX_ITER", 8, "MODEL.SPARSE_INST.LOSS.GLOBAL_NORMALIZATION", global_normalization,
    )  # fmt: skip
    assert all(torch.equal(second[name], weight) and weight.isfinite().all() for name, weight in first.items())
