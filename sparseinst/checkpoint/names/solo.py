"""SOLO, Decoupled SOLO and SOLOv2: names of the official code, AdelaiDet and mmdetection."""

import re

from sparseinst.checkpoint.names.source import MMDETECTION_PYRAMID, KeyHint, Recipe, Renaming, Source, by_patterns

_NODES = "of MODEL.SOLO or MODEL.SOLOV2"
_HEAD = r"^head\.(cate|mask|kernel)_"

MODEL = Source("SOLO or SOLOv2", frozenset({"head.cate_tower.0.weight", "head.cate_pred.weight"}))


def _mmdetection_names(*heads: tuple[str, str]) -> Renaming:
    """Return the renaming of a model on mmdetection's backbone and pyramid, its heads by these patterns."""
    return by_patterns(
        *MMDETECTION_PYRAMID,
        *heads,
        # Convolutions with a norm, in towers and mask features.
        (r"^((?:mask_feature_)?head\..*)\.conv\.conv_offset\.", r"\1.offset."),
        (r"^((?:mask_feature_)?head\..*)\.conv\.", r"\1."),
        (r"^((?:mask_feature_)?head\..*)\.gn\.", r"\1.norm."),
    )


def _adelaidet_tower(match: re.Match) -> str:
    # A tower is a sequence of convolution, norm, ReLU, ...
    index, layer = divmod(int(match[2]), 3)
    return f"head.{match[1]}_tower.{index}.{'norm.' if layer == 1 else ''}"


_OFFICIAL = _mmdetection_names(
    (r"^bbox_head\.ins_convs(_[xy])?\.", r"head.mask_tower\1."),
    (r"^bbox_head\.kernel_convs\.", "head.kernel_tower."),
    (r"^bbox_head\.cate_convs\.", "head.cate_tower."),
    (r"^bbox_head\.d?solo_ins_list(_[xy])?\.", r"head.mask_pred\1."),
    (r"^bbox_head\.d?solo_cate\.", "head.cate_pred."),
    (r"^bbox_head\.solo_kernel\.", "head.kernel_pred."),
    (r"^mask_feat_head\.convs_all_levels\.(\d)\.conv(\d)\.", r"mask_feature_head.levels.\1.\2."),
    (r"^mask_feat_head\.conv_pred\.0\.", "mask_feature_head.output."),
)
_MMDETECTION = _mmdetection_names(
    (r"^mask_head\.mask_feature_head\.convs_all_levels\.(\d)\.conv(\d)\.", r"mask_feature_head.levels.\1.\2."),
    (r"^mask_head\.mask_feature_head\.conv_pred\.", "mask_feature_head.output."),
    (r"^mask_head\.mask_convs(_[xy])?\.", r"head.mask_tower\1."),
    (r"^mask_head\.kernel_convs\.", "head.kernel_tower."),
    (r"^mask_head\.cls_convs\.", "head.cate_tower."),
    (r"^mask_head\.conv_mask_list(_[xy])?\.", r"head.mask_pred\1."),
    (r"^mask_head\.conv_cls\.", "head.cate_pred."),
    (r"^mask_head\.conv_kernel\.", "head.kernel_pred."),
)
_ADELAIDET = by_patterns(
    (r"^ins_head\.(cate|kernel)_tower\.(\d+)\.", _adelaidet_tower),
    (r"^ins_head\.", "head."),
    (r"^mask_head\.convs_all_levels\.(\d)\.conv(\d)\.0\.", r"mask_feature_head.levels.\1.\2."),
    (r"^mask_head\.convs_all_levels\.(\d)\.conv(\d)\.1\.", r"mask_feature_head.levels.\1.\2.norm."),
    (r"^mask_head\.conv_pred\.0\.", "mask_feature_head.output."),
    (r"^mask_head\.conv_pred\.1\.", "mask_feature_head.output.norm."),
)
_RGB = Recipe("RGB", (123.675, 116.280, 103.530), (58.395, 57.120, 57.375), stride_in_1x1=False)
_BGR = Recipe("BGR", (103.530, 116.280, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=True)

MODELS = (
    MODEL,
    Source(
        "SOLO or SOLOv2 of the official code",
        frozenset({"bbox_head.cate_convs.0.conv.weight"}),
        renamings={MODEL.family: _OFFICIAL},
        recipe=_RGB,
    ),
    Source(
        "SOLOv2 of AdelaiDet",
        frozenset({"ins_head.cate_tower.0.weight", "ins_head.cate_pred.weight"}),
        renamings={MODEL.family: _ADELAIDET},
        recipe=_BGR,
    ),
    Source(
        "SOLO or SOLOv2 of mmdetection",
        frozenset({"mask_head.cls_convs.0.conv.weight", "mask_head.conv_cls.weight", "backbone.conv1.weight"}),
        renamings={MODEL.family: _MMDETECTION},
        recipe=_RGB,
    ),
)

# The first that fits is the hint.
KEY_HINTS = (
    KeyHint(r"^head\.cate_pred\.\w+$", f"NUM_CLASSES {_NODES}", first_axis=True),
    KeyHint(r"^head\.mask_pred", "MODEL.SOLO.NUM_GRIDS", first_axis=True),
    KeyHint(r"^(head\.kernel_pred|mask_feature_head\.output)\.", "MODEL.SOLOV2.KERNEL_DIM", first_axis=True),
    KeyHint(r"^mask_feature_head\..*\.offset\.", "MODEL.SOLOV2.DEFORM_MODULATED", first_axis=True),
    KeyHint(rf"{_HEAD}.*\.offset\.", f"DEFORM_MODULATED {_NODES}", first_axis=True),
    KeyHint(r"^mask_feature_head\.", "MODEL.SOLOV2.MASK_FEATURES.CHANNELS, or MODEL.FPN.OUT_CHANNELS"),
    KeyHint(_HEAD, f"CHANNELS {_NODES}, or MODEL.FPN.OUT_CHANNELS"),
    KeyHint(r"^mask_feature_head\..*\.offset\.", "MODEL.SOLOV2.MASK_FEATURES.DEFORM", is_presence=True),
    KeyHint(rf"{_HEAD}.*\.offset\.", f"DEFORM {_NODES}", is_presence=True),
    KeyHint(r"^mask_feature_head\.levels\.", "MODEL.SOLOV2.MASK_FEATURES.IN_FEATURES", is_presence=True),
    KeyHint(r"^(mask_feature_head|head\.kernel_\w+)\.", "MODEL.META_ARCHITECTURE", is_presence=True),
    KeyHint(r"^head\.mask_(tower|pred)", "MODEL.META_ARCHITECTURE, or MODEL.SOLO.HEAD or NUM_CONVS", is_presence=True),
    KeyHint(r"^head\.cate_tower\.", f"NUM_CONVS {_NODES}", is_presence=True),
)
