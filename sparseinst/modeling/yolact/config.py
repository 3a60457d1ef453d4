"""The keys of YOLACT and YOLACT++ below MODEL.YOLACT, with their defaults, units and meanings."""

from detectron2.config import CfgNode

from sparseinst.config.values import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, Range, each, one_of

NODE = "MODEL.YOLACT"
NUM_CLASSES_KEY = f"{NODE}.NUM_CLASSES"
MAX_DETECTIONS_KEY = f"{NODE}.MAX_DETECTIONS"
SQUARE_SIZE_KEY = "INPUT.SQUARE_SIZE"
_INSIDE = Range(lambda value: 0 < value < 1, "in (0, 1)")
_THRESHOLDS = Range(
    lambda pair: len(pair) == 2 and 0 <= pair[0] <= pair[1] <= 1, "a lower and an upper IoU, both in [0, 1]"
)
_WEIGHTS = ("BOX_WEIGHT", "CLS_WEIGHT", "MASK_WEIGHT", "SEM_SEG_WEIGHT", "MASK_IOU_WEIGHT")
_COUNTS = (
    "NUM_CLASSES", "NUM_CONVS", "CHANNELS", "NUM_PROTOTYPES", "PROTOTYPE_NET.NUM_CONVS", "PROTOTYPE_NET.CHANNELS",
    "LOSS.MAX_TRAIN_MASKS", "NMS.TOP_K", "MAX_DETECTIONS",
)  # fmt: skip
# The values that the keys accept; `sparseinst.config.check_values` refuses others.
RANGES = {
    **{f"{NODE}.{key}": COUNT for key in _COUNTS},
    **{f"{NODE}.{key}": each(POSITIVE) for key in ("ANCHOR_SIZES", "ANCHOR_SCALES", "ANCHOR_RATIOS")},
    **{f"{NODE}.LOSS.{key}": NOT_NEGATIVE for key in (*_WEIGHTS, "NEG_POS_RATIO", "MASK_IOU_MIN_AREA")},
    f"{NODE}.MATCHER.IOU_THRESHOLDS": _THRESHOLDS,
    f"{NODE}.MATCHER.CROWD_IOA": FRACTION,
    f"{NODE}.MATCHER.MIN_BOX_SIDE": POSITIVE,
    f"{NODE}.FREEZE_NORM_BELOW": NOT_NEGATIVE,
    f"{NODE}.SCORE_THRESHOLD": FRACTION,
    f"{NODE}.MASK_THRESHOLD": _INSIDE,
    f"{NODE}.NMS.TYPE": one_of("fast", "cross_class", "greedy"),
    f"{NODE}.NMS.IOU_THRESHOLD": FRACTION,
}


def add_keys(cfg: CfgNode) -> None:
    """Add the keys of the family to a config, in place."""
    cfg.MODEL.YOLACT = node = CfgNode()
    node.NUM_CLASSES = 80
    # A name of YOLACT_HEAD_REGISTRY; convolutions before the predictors, and their width.
    node.HEAD = "YOLACTHead"
    node.NUM_CONVS = 1
    node.CHANNELS = 256
    # Prototypes, and as many coefficients of each prediction.
    node.NUM_PROTOTYPES = 32
    # A name of PROTOTYPE_NET_REGISTRY; convolutions before the upsampling, and the width.
    node.PROTOTYPE_NET = CfgNode()
    node.PROTOTYPE_NET.NAME = "ProtoNet"
    node.PROTOTYPE_NET.NUM_CONVS = 3
    node.PROTOTYPE_NET.CHANNELS = 256

    # Base size of each level's anchors in pixels of INPUT.SQUARE_SIZE, finest first: one level for each. Levels beyond
    # those of MODEL.FPN.IN_FEATURES are computed from the coarsest one.
    node.ANCHOR_SIZES = [24, 48, 96, 192, 384]
    # Factors of the base size; each with all ratios.
    node.ANCHOR_SCALES = [1.0]
    # Width over height.
    node.ANCHOR_RATIOS = [1.0, 0.5, 2.0]
    # Anchors as high as wide: a defect of the published training. The published weights of YOLACT (not those of
    # YOLACT++) need True; train from other weights with False.
    node.SQUARE_ANCHORS = False

    node.MATCHER = CfgNode()
    # An anchor is background below the first IoU and positive from the second one on; between them it has no loss.
    node.MATCHER.IOU_THRESHOLDS = [0.4, 0.5]
    # An anchor that is not positive has no loss where a crowd covers more than this share of it.
    node.MATCHER.CROWD_IOA = 0.7
    # Objects with a shorter side in pixels of INPUT.SQUARE_SIZE are not learned.
    node.MATCHER.MIN_BOX_SIDE = 4.0

    node.LOSS = CfgNode()
    # A name of YOLACT_CRITERION_REGISTRY.
    node.LOSS.NAME = "YOLACTCriterion"
    node.LOSS.BOX_WEIGHT = 1.5
    node.LOSS.CLS_WEIGHT = 1.0
    node.LOSS.MASK_WEIGHT = 6.125
    # Semantic segmentation on the finest level, in training only; 0: no such head.
    node.LOSS.SEM_SEG_WEIGHT = 1.0
    node.LOSS.MASK_IOU_WEIGHT = 25.0
    # The predicted IoU of masks with more pixels than this is trained; pixels of the prototypes' grid.
    node.LOSS.MASK_IOU_MIN_AREA = 25
    # Background anchors for each positive one, those with the largest loss. An image without objects trains as many as
    # an image with one positive anchor.
    node.LOSS.NEG_POS_RATIO = 3
    # Most masks of an image in one step, chosen at random.
    node.LOSS.MAX_TRAIN_MASKS = 100
    # Several processes: divide by the counts of all of them, so that gradients equal those of one process with the
    # whole batch. False: each process divides by its own, as published.
    node.LOSS.GLOBAL_NORMALIZATION = False

    # YOLACT++: multiply each score by the IoU that a second head predicts from the mask.
    node.MASK_IOU_ON = False
    # With fewer images per process and pass, batch norms keep their statistics and are not trained. 0: never.
    node.FREEZE_NORM_BELOW = 6

    # An anchor is a candidate where its best class has a score above this, in [0, 1].
    node.SCORE_THRESHOLD = 0.05
    # A pixel belongs to the mask where its probability is above this, in (0, 1).
    node.MASK_THRESHOLD = 0.5
    node.NMS = CfgNode()
    # "fast": Fast NMS in each class; "cross_class": Fast NMS between the best classes of all candidates; "greedy":
    # ordinary NMS in each class.
    node.NMS.TYPE = "fast"
    node.NMS.IOU_THRESHOLD = 0.5
    # Candidates of each class that enter Fast NMS, best first.
    node.NMS.TOP_K = 200
    # Fast NMS: drop detections whose score in their own class is at or below SCORE_THRESHOLD. As published nearly every
    # image has MAX_DETECTIONS detections, down to tiny scores.
    node.NMS.SECOND_THRESHOLD = False
    # Most instances returned for one image, best scores first.
    node.MAX_DETECTIONS = 100
