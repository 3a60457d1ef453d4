"""The keys of SOLO and SOLOv2 below MODEL.SOLO and MODEL.SOLOV2, with their defaults, units and meanings."""

import ast

from detectron2.config import CfgNode

from sparseinst.config.renamed_keys import RenamedKey
from sparseinst.config.values import COUNT, FRACTION, NORM, NOT_NEGATIVE, POSITIVE, Range, each, one_of

SOLO_NODE = "MODEL.SOLO"
SOLOV2_NODE = "MODEL.SOLOV2"
NUM_CLASSES = "NUM_CLASSES"
MAX_DETECTIONS = "MAX_DETECTIONS"
_SIZES = Range(lambda pair: len(pair) == 2 and 0 <= pair[0] <= pair[1], "a smallest and a largest size")
_INSIDE = Range(lambda value: 0 < value < 1, "in (0, 1)")
_SHARE = Range(lambda value: 0 < value <= 1, "in (0, 1]")
_RANGES = {
    **{name: COUNT for name in ("NUM_CLASSES", "NUM_CONVS", "CHANNELS", "MAX_DETECTIONS", "NMS.PRE")},
    "STRIDES": each(COUNT),
    "NUM_GRIDS": each(COUNT),
    "SCALE_RANGES": each(_SIZES),
    "SIGMA": _SHARE,
    "NORM": NORM,
    "DEFORM": one_of("", "last", "all"),
    "PRIOR_PROB": _INSIDE,
    **{f"LOSS.{name}": NOT_NEGATIVE for name in ("CATE_WEIGHT", "MASK_WEIGHT", "SEM_SEG_WEIGHT", "FOCAL_GAMMA")},
    "LOSS.FOCAL_ALPHA": FRACTION,
    "SCORE_THRESHOLD": FRACTION,
    "MASK_THRESHOLD": _INSIDE,
    "NMS.TYPE": one_of("matrix", "mask"),
    "NMS.KERNEL": one_of("gaussian", "linear"),
    "NMS.SIGMA": POSITIVE,
    "NMS.UPDATE_THRESHOLD": FRACTION,
    "NMS.IOU_THRESHOLD": _SHARE,
}
# The values that the keys accept; `sparseinst.config.check_values` refuses others.
RANGES = {
    **{f"{node}.{key}": accepted for node in (SOLO_NODE, SOLOV2_NODE) for key, accepted in _RANGES.items()},
    f"{SOLOV2_NODE}.KERNEL_DIM": COUNT,
    f"{SOLOV2_NODE}.MASK_FEATURES.CHANNELS": COUNT,
    f"{SOLOV2_NODE}.MASK_FEATURES.DEFORM": one_of("", "all"),
}


# Below a node; what pre- and post-processing read of the network.
GEOMETRY = ("HEAD", "IN_FEATURES", "STRIDES", "NUM_GRIDS")


def _always_on(reason: str) -> RenamedKey:
    """Return the row of a key without a counterpart here: True is accepted, other values are refused."""

    def convert(value: object) -> object:
        if value is not True:
            raise ValueError(f"it must be True: {reason}")
        return value

    return RenamedKey(None, convert, reason)


def _ranges(value: object) -> list[list[float]]:
    """Return pairs as lists; YAML reads tuples as text."""
    return [list(pair) for pair in (ast.literal_eval(value) if isinstance(value, str) else value)]


def _is_modulated(value: object) -> bool:
    if value not in ("DCN", "DCNv2"):
        raise ValueError('it must be "DCN" or "DCNv2"')
    return value == "DCNv2"


# AdelaiDet's keys below MODEL.SOLOV2; keys that are the same here are absent.
_ADELAIDET = {
    "INSTANCE_IN_FEATURES": RenamedKey("IN_FEATURES"),
    "FPN_INSTANCE_STRIDES": RenamedKey("STRIDES"),
    "FPN_SCALE_RANGES": RenamedKey("SCALE_RANGES", _ranges),
    "INSTANCE_IN_CHANNELS": RenamedKey(None, reason="it is the width of the backbone's features"),
    "INSTANCE_CHANNELS": RenamedKey("CHANNELS"),
    "NUM_INSTANCE_CONVS": RenamedKey("NUM_CONVS"),
    # AdelaiDet reads both keys and ignores them: set DEFORM "" for a checkpoint that was trained there.
    "USE_DCN_IN_INSTANCE": RenamedKey("DEFORM", lambda value: "all" if value else ""),
    "TYPE_DCN": RenamedKey("DEFORM_MODULATED", _is_modulated),
    "NUM_KERNELS": RenamedKey("KERNEL_DIM"),
    "NUM_MASKS": RenamedKey("KERNEL_DIM"),
    "NORM": RenamedKey("NORM", lambda value: "" if value == "none" else value),
    "USE_COORD_CONV": _always_on("the heads always read the coordinates"),
    "MASK_IN_FEATURES": RenamedKey("MASK_FEATURES.IN_FEATURES"),
    "MASK_IN_CHANNELS": RenamedKey(None, reason="it is the width of the backbone's features"),
    "MASK_CHANNELS": RenamedKey("MASK_FEATURES.CHANNELS"),
    "SCORE_THR": RenamedKey("SCORE_THRESHOLD"),
    "MASK_THR": RenamedKey("MASK_THRESHOLD"),
    "UPDATE_THR": RenamedKey("NMS.UPDATE_THRESHOLD"),
    "NMS_PRE": RenamedKey("NMS.PRE"),
    "NMS_TYPE": RenamedKey("NMS.TYPE"),
    "NMS_KERNEL": RenamedKey("NMS.KERNEL"),
    "NMS_SIGMA": RenamedKey("NMS.SIGMA", float),
    "MAX_PER_IMG": RenamedKey("MAX_DETECTIONS"),
    "LOSS.FOCAL_USE_SIGMOID": _always_on("the focal loss always uses sigmoids"),
    "LOSS.FOCAL_WEIGHT": RenamedKey("LOSS.CATE_WEIGHT"),
    "LOSS.DICE_WEIGHT": RenamedKey("LOSS.MASK_WEIGHT"),
}
RENAMED_KEYS = {
    f"{SOLOV2_NODE}.{old}": row._replace(new=row.new and f"{SOLOV2_NODE}.{row.new}") for old, row in _ADELAIDET.items()
}


def add_keys(cfg: CfgNode) -> None:
    """Add the nodes MODEL.SOLO and MODEL.SOLOV2 to a config, in place."""
    cfg.MODEL.SOLO = _shared_keys("SOLOHead", num_convs=7, channels=256)
    solov2 = cfg.MODEL.SOLOV2 = _shared_keys("SOLOv2Head", num_convs=4, channels=512)
    # Dimension D of kernels and mask features.
    solov2.KERNEL_DIM = 256
    solov2.MASK_FEATURES = CfgNode()
    solov2.MASK_FEATURES.NAME = "MaskFeatureHead"
    # Finest first; each has half the size of the one before it. The last one gets the coordinates.
    solov2.MASK_FEATURES.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    solov2.MASK_FEATURES.CHANNELS = 128
    # Which convolutions are deformable: "" or "all".
    solov2.MASK_FEATURES.DEFORM = ""


def _shared_keys(head: str, num_convs: int, channels: int) -> CfgNode:
    node = CfgNode()
    node.NUM_CLASSES = 80
    # MODEL.SOLO: "SOLOHead", "DecoupledSOLOHead", "DecoupledSOLOLightHead"; MODEL.SOLOV2: "SOLOv2Head".
    node.HEAD = head
    # One backbone feature for each level, finest first. A feature is resized to the level's stride.
    node.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    # Pixels of the input for each pixel of a level's feature map.
    node.STRIDES = [8, 8, 16, 32, 32]
    # Cells along each side of a level's grid (S).
    node.NUM_GRIDS = [40, 36, 24, 16, 12]
    # Objects that a level learns: smallest and largest sqrt(width * height) of the box, pixels of the resized image,
    # both included. They belong to the input size: see docs/solo.md.
    node.SCALE_RANGES = [[1, 96], [48, 192], [96, 384], [192, 768], [384, 2048]]
    # Share of a box around the object's center of mass whose cells are positive, in (0, 1].
    node.SIGMA = 0.2
    # Convolutions of each tower, and their width.
    node.NUM_CONVS = num_convs
    node.CHANNELS = channels
    # Norm of the towers and mask features: any name of Detectron2; "GN" as published.
    node.NORM = "GN"
    # Deformable convolutions of the towers: "" for none, "last" of each tower, "all".
    node.DEFORM = ""
    # Deformable convolutions with modulation (v2).
    node.DEFORM_MODULATED = False
    # Score of every category before training, in (0, 1).
    node.PRIOR_PROB = 0.01

    node.LOSS = CfgNode()
    node.LOSS.NAME = "SOLOCriterion"
    node.LOSS.CATE_WEIGHT = 1.0
    node.LOSS.MASK_WEIGHT = 3.0
    # Semantic segmentation on the finest feature of IN_FEATURES, in training only. 0: no such head, as published.
    node.LOSS.SEM_SEG_WEIGHT = 0.0
    node.LOSS.FOCAL_ALPHA = 0.25
    node.LOSS.FOCAL_GAMMA = 2.0
    # Several processes: divide by the cells and pairs of all of them, so that gradients equal those of one process with
    # the whole batch. False: each process divides by its own, as published.
    node.LOSS.GLOBAL_NORMALIZATION = False

    # A cell is a candidate for each category whose score is above this, in [0, 1]; before rescoring.
    node.SCORE_THRESHOLD = 0.1
    # A pixel belongs to the mask where its probability is above this, in (0, 1).
    node.MASK_THRESHOLD = 0.5
    node.NMS = CfgNode()
    # "matrix" (SOLOv2, and SOLO's released code); "mask": greedy NMS at IOU_THRESHOLD.
    node.NMS.TYPE = "matrix"
    # Decay of matrix NMS: "gaussian" or "linear".
    node.NMS.KERNEL = "gaussian"
    # The gaussian decay is exp(-SIGMA * IoU ** 2).
    node.NMS.SIGMA = 2.0
    # Candidates that enter NMS, best first.
    node.NMS.PRE = 500
    # Instances keep a score of at least this after matrix NMS, in [0, 1].
    node.NMS.UPDATE_THRESHOLD = 0.05
    node.NMS.IOU_THRESHOLD = 0.5
    # Most instances returned for one image, best scores first.
    node.MAX_DETECTIONS = 100
    return node


def check_levels(node: CfgNode, node_name: str) -> None:
    """Raise ValueError where the lists of the levels have different lengths.

    Args:
        node: MODEL.SOLO or MODEL.SOLOV2.
        node_name: its name, for the message.
    """
    lengths = {name: len(node[name]) for name in ("IN_FEATURES", "STRIDES", "NUM_GRIDS", "SCALE_RANGES")}
    if len(set(lengths.values())) != 1:
        text = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"{node_name}: each level needs one value in each list; found {text}")
    _check_widths(node, node_name)


def _check_widths(node: CfgNode, node_name: str) -> None:
    # The import of detectron2.layers imports torch.
    from detectron2.layers import get_norm

    widths = {"CHANNELS": node.CHANNELS}
    if node_name == SOLOV2_NODE:
        widths |= {"KERNEL_DIM": node.KERNEL_DIM, "MASK_FEATURES.CHANNELS": node.MASK_FEATURES.CHANNELS}
    for name, width in widths.items():
        try:
            get_norm(node.NORM, width)
        except ValueError as error:
            raise ValueError(
                f"{node_name}.{name} is {width}; {node_name}.NORM {node.NORM} needs another width: {error}"
            ) from error
