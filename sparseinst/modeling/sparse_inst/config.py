"""The keys of SparseInst below MODEL.SPARSE_INST, with their defaults, units and meanings."""

from detectron2.config import CfgNode

from sparseinst.config.renamed_keys import RenamedKey
from sparseinst.config.values import COUNT, FRACTION, NORM, NOT_NEGATIVE, POSITIVE, Range

NUM_CLASSES_KEY = "MODEL.SPARSE_INST.DECODER.NUM_CLASSES"
MAX_INSTANCES_KEY = "MODEL.SPARSE_INST.DECODER.NUM_MASKS"
MAX_DETECTIONS_KEY = "MODEL.SPARSE_INST.MAX_DETECTIONS"
MASK_NMS_KEY = "MODEL.SPARSE_INST.MASK_NMS_THRESHOLD"
ACTIVATION_MAPS_KEY = "MODEL.SPARSE_INST.DECODER.OUTPUT_IAM"
NUM_LEVELS_KEY = "MODEL.SPARSE_INST.DECODER.NUM_LEVELS"
LOSSLESS_TARGETS_KEY = "MODEL.SPARSE_INST.ANTIALIASED_TARGETS"
_RANGES = {
    "CLS_THRESHOLD": Range(lambda value: value <= 1, "at most 1 (below 0 keeps all predictions)"),
    "MASK_THRESHOLD": Range(lambda value: 0 < value < 1, "in (0, 1)"),
    "MAX_DETECTIONS": COUNT,
    "MASK_NMS_THRESHOLD": Range(FRACTION.accepts, "in [0, 1] (0: off)"),
    "ENCODER.NORM": NORM,
    "ENCODER.NUM_CHANNELS": COUNT,
    **{f"DECODER.{name}": COUNT for name in ("NUM_MASKS", "NUM_CLASSES", "KERNEL_DIM", "GROUPS")},
    "DECODER.SCALE_FACTOR": POSITIVE,
    "DECODER.NUM_LEVELS": Range(lambda value: 1 <= value <= 6, "from 1 to 6"),
    "DECODER.NORM": NORM,
    **{f"DECODER.{branch}.{name}": COUNT for branch in ("INST", "MASK") for name in ("DIM", "CONVS")},
    **{
        f"LOSS.{name}_WEIGHT": NOT_NEGATIVE
        for name in ("CLASS", "MASK_PIXEL", "MASK_DICE", "OBJECTNESS", "BOX", "SEM_SEG")
    },
    **{f"MATCHER.{name}": NOT_NEGATIVE for name in ("ALPHA", "BETA")},
}
# The values that the keys accept; `sparseinst.config.check_values` refuses others.
RANGES = {f"MODEL.SPARSE_INST.{key}": accepted for key, accepted in _RANGES.items()}


def _only_off(value: float) -> None:
    """Refuse a removed option where it is on, because a model with it would be another one."""
    if float(value) != 0:
        raise ValueError("the option was removed, and models that were trained with it run with earlier versions only")


_RUNTIME = ("ENGINE", "PRECISION", "FUSE", "CHANNELS_LAST", "WINOGRAD", "COMPILE", "KEEP_FREED_MEMORY")
RENAMED_KEYS = {
    "MODEL.SPARSE_INST.OUTPUT_MASK_FORMAT": RenamedKey("MODEL.OUTPUT.MASK_FORMAT"),
    "MODEL.SPARSE_INST.MAX_MASK_GIB": RenamedKey("MODEL.OUTPUT.MAX_MASK_GIB"),
    # The published key, which stays valid.
    "MODEL.SPARSE_INST.DATASET_MAPPER": RenamedKey("INPUT.DATASET_MAPPER", default="SparseInstDatasetMapper"),
    **{f"MODEL.SPARSE_INST.INFERENCE.{name}": RenamedKey(f"RUNTIME.{name}") for name in _RUNTIME},
    "MODEL.SPARSE_INST.INFERENCE.CUDA_GRAPHS": RenamedKey(
        None, reason="CUDA graphs were removed; RUNTIME.COMPILE replaces them"
    ),
    **{
        f"MODEL.SPARSE_INST.{key}": RenamedKey(None, _only_off, "PlacedIAMDecoder replaces the options of learned maps")
        for key in ("DECODER.LOCATION_PRIOR", "DECODER.MASK_WINDOW", "LOSS.IAM_WEIGHT", "MATCHER.GAMMA")
    },
    "MODEL.SPARSE_INST.DECODER.ELLIPSE_SIZE": RenamedKey(
        None, reason="the first size of a box follows from its level, see DECODER.NUM_LEVELS"
    ),
    "MODEL.SPARSE_INST.DECODER.IAM_INIT_STD": RenamedKey(None, reason="it counted at the start of a training alone"),
}


def add_keys(cfg: CfgNode) -> None:
    """Add the node MODEL.SPARSE_INST to a config, in place."""
    cfg.MODEL.SPARSE_INST = CfgNode()
    sparse_inst = cfg.MODEL.SPARSE_INST
    # A prediction is kept while sqrt(class probability * objectness) is above this; before rescoring. In [0, 1].
    sparse_inst.CLS_THRESHOLD = 0.005
    # A pixel belongs to the mask where its probability is above this; also used by the rescoring. In (0, 1).
    sparse_inst.MASK_THRESHOLD = 0.45
    # Most instances returned for one image, best scores first.
    sparse_inst.MAX_DETECTIONS = 100
    # Of two masks of one class whose IoU is above this, the lower score is dropped. 0: off, as published.
    sparse_inst.MASK_NMS_THRESHOLD = 0.0
    # Ground truth on the mask grid: the share of each cell that the instance covers. Otherwise, as published, only the
    # cell's central pixels count, and objects of one or two pixels can vanish.
    sparse_inst.ANTIALIASED_TARGETS = False
    # The published key; INPUT.DATASET_MAPPER is the one to set. A value that is not this default wins over it.
    sparse_inst.DATASET_MAPPER = "SparseInstDatasetMapper"

    sparse_inst.ENCODER = CfgNode()
    sparse_inst.ENCODER.NAME = "InstanceContextEncoder"
    # Norm of the encoder's convolutions except pyramid pooling: "", "BN", "GN", ... Published models have none.
    sparse_inst.ENCODER.NORM = ""
    # Backbone features, two to four, finest first; the first one's grid is the decoder's.
    sparse_inst.ENCODER.IN_FEATURES = ["res3", "res4", "res5"]
    sparse_inst.ENCODER.NUM_CHANNELS = 256

    sparse_inst.DECODER = CfgNode()
    sparse_inst.DECODER.NAME = "BaseIAMDecoder"
    # Instance activation maps per image (N): no image can have more predictions.
    sparse_inst.DECODER.NUM_MASKS = 100
    sparse_inst.DECODER.NUM_CLASSES = 80
    # Dimension D of mask kernels and mask features.
    sparse_inst.DECODER.KERNEL_DIM = 128
    # Mask grid over decoder grid.
    sparse_inst.DECODER.SCALE_FACTOR = 2.0
    # Return the activation maps of the kept instances as `pred_iams`.
    sparse_inst.DECODER.OUTPUT_IAM = False
    # Activation maps per instance (G); only the group decoders read it.
    sparse_inst.DECODER.GROUPS = 4
    # Norm of the 3x3 convolutions of both branches. Published models have none.
    sparse_inst.DECODER.NORM = ""
    # PlacedIAMDecoder: most levels of cells, each of twice the size of the one before, for larger objects; none of more
    # than 32 pixels.
    sparse_inst.DECODER.NUM_LEVELS = 4
    sparse_inst.DECODER.INST = CfgNode()
    sparse_inst.DECODER.INST.DIM = 256
    sparse_inst.DECODER.INST.CONVS = 4
    sparse_inst.DECODER.MASK = CfgNode()
    sparse_inst.DECODER.MASK.DIM = 256
    sparse_inst.DECODER.MASK.CONVS = 4
    # PlacedIAMDecoder: backbone feature on the mask grid, which shows the mask branch the outlines. "": none.
    sparse_inst.DECODER.MASK.DETAIL_FEATURE = ""

    sparse_inst.LOSS = CfgNode()
    # "PlacedCriterion" for a PlacedIAMDecoder.
    sparse_inst.LOSS.NAME = "SparseInstCriterion"
    # "labels": loss_ce; "masks": loss_mask, loss_dice, loss_objectness. A PlacedCriterion has all of its losses.
    sparse_inst.LOSS.ITEMS = ("labels", "masks")
    # Of loss_ce, or of PlacedCriterion's loss_heatmap.
    sparse_inst.LOSS.CLASS_WEIGHT = 2.0
    sparse_inst.LOSS.MASK_PIXEL_WEIGHT = 5.0
    sparse_inst.LOSS.MASK_DICE_WEIGHT = 2.0
    sparse_inst.LOSS.OBJECTNESS_WEIGHT = 1.0
    # Of PlacedCriterion's loss_box.
    sparse_inst.LOSS.BOX_WEIGHT = 1.0
    # Of loss_sem_seg: semantic segmentation on the encoder's map, in training only. 0, as published: no such head.
    sparse_inst.LOSS.SEM_SEG_WEIGHT = 0.0
    # Several processes: divide by the instances and pairs of all of them, so that their gradients equal those of one
    # process with the whole batch. False: loss_mask and loss_objectness by each process's own pairs, as published.
    sparse_inst.LOSS.GLOBAL_NORMALIZATION = False

    sparse_inst.MATCHER = CfgNode()
    sparse_inst.MATCHER.NAME = "SparseInstMatcher"
    # Matching score = class probability ** BETA * DICE ** ALPHA.
    sparse_inst.MATCHER.ALPHA = 0.8
    sparse_inst.MATCHER.BETA = 0.2
