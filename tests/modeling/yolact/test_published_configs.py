"""Every config file of the family at its full width: build, train a step, infer, save, load, optimise."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from sparseinst.config import load_config
from sparseinst.engine.optimizer import build_optimizer
from sparseinst.modeling.yolact.model import YOLACT
from sparseinst.runtime.optimize import optimize_for_inference
from tests.parity.record_yolact import filled
from tests.saved_model import no_random_weights, save_and_load
from tests.tiny_model import random_input

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FILES = [
    *sorted((CONFIGS / "yolact").glob("[!B]*.yaml")),
    CONFIGS / "small_data" / "yolact.yaml",
    CONFIGS / "quick" / "shapes_yolact.yaml",
]
# Files that differ from another one in these keys alone.
VARIANTS = {
    "yolact_base": ("yolact_resnet50", {"MODEL.WEIGHTS", "MODEL.RESNETS.DEPTH"}),
    "yolact_im400": ("yolact_base", {"MODEL.YOLACT.ANCHOR_SIZES", "INPUT.SQUARE_SIZE"}),
    "yolact_im700": (
        "yolact_base",
        {"MODEL.YOLACT.ANCHOR_SIZES", "MODEL.YOLACT.LOSS.MAX_TRAIN_MASKS", "INPUT.SQUARE_SIZE"},
    ),
    "yolact_plus_base": (
        "yolact_plus_resnet50",
        {"MODEL.WEIGHTS", "MODEL.RESNETS.DEPTH", "MODEL.RESNETS.DEFORM_INTERVAL"},
    ),
}
# im400 and im700 differ from base by the input's size, which the step sets anyhow.
STEPPED = [file for file in FILES if file.stem not in ("yolact_im400", "yolact_im700")]


def flat(node, prefix=""):
    """Return the values of a config by key."""
    values = {}
    for key, value in node.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def test_all_published_configs_are_there():
    assert len(FILES) == 7 + 2


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_else_differs(name):
    other, keys = VARIANTS[name]
    own, others = (flat(load_config(f"yolact/{each}")) for each in (name, other))
    assert {key for key, value in own.items() if value != others[key]} == keys | {"OUTPUT_DIR"}


@pytest.mark.parametrize(
    ("name", "depth", "deformable"),
    [
        ("yolact_resnet50", 16, 0),
        ("yolact_base", 33, 0),
        ("yolact_plus_resnet50", 16, 13),
        # res3 {0, 3}, res4 {0, 3, ..., 21}, res5 {0}.
        ("yolact_plus_base", 33, 11),
    ],
)
def test_blocks(name, depth, deformable):
    names = build_model(load_config(f"yolact/{name}", ["MODEL.DEVICE", "meta"])).state_dict()
    assert sum(name.endswith("conv1.weight") and ".res" in name for name in names) == depth
    blocks = {name.split("bottom_up.")[1].rsplit(".", 2)[0] for name in names if name.endswith("conv2_offset.bias")}
    assert len(blocks) == deformable
    if name == "yolact_plus_base":
        assert blocks == {"res3.0", "res3.3", *(f"res4.{block}" for block in range(0, 22, 3)), "res5.0"}


@pytest.mark.parametrize("file", STEPPED, ids=lambda file: file.stem)
def test_a_step_an_answer_and_a_checkpoint(file, tmp_path):
    is_plus = "plus" in file.stem
    cfg = load_config(
        str(file),
        ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "INPUT.SQUARE_SIZE", 256 if is_plus else 96,
         # Formulas in place of weights give few anchors a high score.
         "MODEL.YOLACT.SCORE_THRESHOLD", 0.0,
         # Every anchor of every level learns.
         "MODEL.YOLACT.LOSS.NEG_POS_RATIO", 100_000],
    )  # fmt: skip
    with no_random_weights():
        model = filled(build_model(cfg))
    assert isinstance(model, YOLACT)
    inputs = [random_input(64, 96, num_instances=3, seed=seed) for seed in range(2)]
    for x in inputs:
        x["instances"].gt_classes %= model.head.num_classes
    optimizer = build_optimizer(cfg, model)
    losses = model.train()(inputs)
    expected = {"loss_box", "loss_cls", "loss_mask", "loss_sem_seg"}
    assert losses.keys() == expected | ({"loss_mask_iou"} if is_plus else set())
    sum(losses.values()).backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    silent = {name for name, value in trained.items() if not value.grad.any()}
    assert all(torch.isfinite(value.grad).all() for value in trained.values())
    assert not silent, silent
    before = {name: value.detach().clone() for name, value in trained.items()}
    optimizer.step()
    for name, value in trained.items():
        assert torch.isfinite(value).all() and not torch.equal(value, before[name]), name

    del before, losses
    model.zero_grad()
    x = {**inputs[-1], "height": 100, "width": 180}
    save_and_load(filled(model), x, tmp_path)
    images = model.preprocess([x]).tensor
    with torch.no_grad():
        expected = model.network(images)
    for name, value in optimize_for_inference(model).network(images).items():
        assert (value - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name
