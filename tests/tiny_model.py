"""A SparseInst that is small enough for tests: a ResNet-18 without its last stage, 16 channels, 6 masks."""

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from sparseinst import add_sparse_inst_config

NUM_CLASSES = 3
# The tiny model's maps have stride 8, its masks with a factor of 2 stride 4: that of res2.
DETAIL = ("MODEL.SPARSE_INST.DECODER.MASK.DETAIL_FEATURE", "res2")


def tiny_cfg(*opts) -> CfgNode:
    """A config for the CPU, with KEY, VALUE, ... on top."""
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    cfg.merge_from_list(
        [
            "MODEL.DEVICE", "cpu",
            "MODEL.META_ARCHITECTURE", "SparseInst",
            "MODEL.RESNETS.DEPTH", 18,
            "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
            "MODEL.RESNETS.NORM", "BN",
            "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4"],
            "MODEL.BACKBONE.FREEZE_AT", 0,
            "MODEL.WEIGHTS", "",
            "INPUT.FORMAT", "RGB",
            "INPUT.MIN_SIZE_TRAIN", (64,),
            "INPUT.MIN_SIZE_TEST", 64,
            "MODEL.SPARSE_INST.ENCODER.IN_FEATURES", ["res3", "res4"],
            "MODEL.SPARSE_INST.ENCODER.NUM_CHANNELS", 16,
            "MODEL.SPARSE_INST.DECODER.NAME", "GroupIAMDecoder",
            "MODEL.SPARSE_INST.DECODER.GROUPS", 2,
            "MODEL.SPARSE_INST.DECODER.NUM_MASKS", 6,
            "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", NUM_CLASSES,
            "MODEL.SPARSE_INST.DECODER.KERNEL_DIM", 8,
            "MODEL.SPARSE_INST.DECODER.INST.DIM", 16,
            "MODEL.SPARSE_INST.DECODER.INST.CONVS", 1,
            "MODEL.SPARSE_INST.DECODER.MASK.DIM", 16,
            "MODEL.SPARSE_INST.DECODER.MASK.CONVS", 1,
            "DATALOADER.NUM_WORKERS", 0,
            "TEST.PLOTS", False,
            *opts,
        ]
    )  # fmt: skip
    return cfg


def tiny_model(*opts, seed: int = 0) -> torch.nn.Module:
    """The model in eval mode, with random weights whose masks differ from one another."""
    torch.manual_seed(seed)
    model = build_model(tiny_cfg(*opts)).eval()
    torch.nn.init.normal_(model.decoder.inst_branch.iam_conv.weight, std=1.0)
    torch.nn.init.normal_(model.decoder.inst_branch.mask_kernel.weight, std=1.0)
    torch.nn.init.zeros_(model.decoder.inst_branch.cls_score.bias)
    return model


def placed_cfg(*opts) -> CfgNode:
    """Return a config with a PlacedIAMDecoder, which has three levels of cells, with KEY, VALUE, ... on top."""
    return tiny_cfg(
        "MODEL.RESNETS.NORM", "FrozenBN",
        "MODEL.SPARSE_INST.DECODER.NAME", "PlacedIAMDecoder",
        "MODEL.SPARSE_INST.LOSS.NAME", "PlacedCriterion",
        *opts,
    )  # fmt: skip


def placed_model(*opts, seed: int = 0) -> torch.nn.Module:
    """Return the model of `placed_cfg` in eval mode, with random weights whose heat map has peaks."""
    torch.manual_seed(seed)
    model = build_model(placed_cfg(*opts)).eval()
    branch = model.decoder.inst_branch
    torch.nn.init.normal_(branch.heatmap.weight, std=0.3)
    torch.nn.init.zeros_(branch.heatmap.bias)
    # Without norms of a batch the features are large.
    torch.nn.init.zeros_(branch.objectness.weight)
    torch.nn.init.zeros_(branch.level_box.weight)
    return model


def normed_placed_model(*opts) -> torch.nn.Module:
    """Return a `placed_model` with a step's statistics of norms, and random weights of the layers that begin at 0."""
    model = placed_model(*opts)
    model.train()([random_input(64, 96, num_instances=2, seed=seed) for seed in range(2)])
    inst_branch, mask_branch = model.decoder.inst_branch, model.decoder.mask_branch
    for layer in (inst_branch.objectness, inst_branch.level_box, inst_branch.saliency, mask_branch.displacement):
        torch.nn.init.normal_(layer.weight, std=0.03)
    return model.eval()


def random_input(height=50, width=70, num_instances=None, seed=0) -> dict:
    """A dict as a mapper makes it; with ``instances`` (rectangles as BitMasks) where a number is given."""
    generator = torch.Generator().manual_seed(seed)
    x = {"image": torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)}
    if num_instances is not None:
        masks = torch.zeros(num_instances, height, width, dtype=torch.bool)
        for index in range(num_instances):
            y, x0 = index * 5 % (height // 2), index * 7 % (width // 2)
            masks[index, y : y + height // 3, x0 : x0 + width // 3] = True
        x["instances"] = Instances(
            (height, width),
            gt_classes=torch.randint(NUM_CLASSES, (num_instances,), generator=generator),
            gt_masks=BitMasks(masks),
        )
    return x
