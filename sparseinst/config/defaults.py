"""Every configuration key that SparseInst adds to Detectron2, with its default, unit and meaning."""

from pathlib import Path

from detectron2.config import CfgNode

_PACKAGE_DIR = Path(__file__).resolve().parents[1]


def add_sparse_inst_config(cfg: CfgNode) -> None:
    """Add SparseInst's keys to a Detectron2 config, in place.

    No default of Detectron2's own is changed except ``MODEL.MASK_ON``. A model needs two more keys
    than the defaults given here: ``MODEL.META_ARCHITECTURE SparseInst`` and
    ``MODEL.RESNETS.OUT_FEATURES [res3, res4, res5]`` (or another backbone and its feature names).

    Args:
        cfg: what :func:`detectron2.config.get_cfg` returns.
    """
    cfg.MODEL.MASK_ON = True

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
    # "bitmask": boolean masks; "rle": COCO RLEs, each mask made, encoded and freed before the next one.
    sparse_inst.OUTPUT_MASK_FORMAT = "bitmask"
    # Most memory that the boolean masks of one image may take, in GiB; prediction stops before it takes more. 100 masks
    # of a camera's 42 megapixels fit.
    sparse_inst.MAX_MASK_GIB = 4.0
    # How the network runs where nothing is trained; see sparseinst.modeling.optimization.
    sparse_inst.INFERENCE = CfgNode()
    # Fold norms and neighbouring linear layers into convolutions: float32 results move by rounding only.
    sparse_inst.INFERENCE.FUSE = True
    # Feature maps in channels-last layout.
    sparse_inst.INFERENCE.CHANNELS_LAST = True
    # Wide 3x3 convolutions with a quarter of the multiplications (CPU, float32): results move by some 1e-5.
    sparse_inst.INFERENCE.WINOGRAD = True
    # "float32"; "bfloat16" or "float16" autocast.
    sparse_inst.INFERENCE.PRECISION = "float32"
    # torch.compile: seconds to minutes before the first picture, once more at the first one of another size.
    sparse_inst.INFERENCE.COMPILE = False
    # On CUDA: record the network's kernels at the first picture of a shape, and replay them.
    sparse_inst.INFERENCE.CUDA_GRAPHS = False
    # "torch"; "openvino" on a CPU (extra "openvino").
    sparse_inst.INFERENCE.ENGINE = "torch"
    # Evaluation, demo and benchmark on the CPU: memory that is freed stays with the process, which is faster. In a
    # program of your own: sparseinst.engine.host_memory.keep_freed_memory(True).
    sparse_inst.INFERENCE.KEEP_FREED_MEMORY = True
    # Ground truth on the mask grid: the share of each cell that the instance covers. Otherwise, as published, only the
    # cell's central pixels count, and objects of one or two pixels can vanish.
    sparse_inst.ANTIALIASED_TARGETS = False
    # "SparseInstDatasetMapper" (ours) or "DatasetMapper" (Detectron2's); read by train_net.py.
    sparse_inst.DATASET_MAPPER = "SparseInstDatasetMapper"

    sparse_inst.ENCODER = CfgNode()
    sparse_inst.ENCODER.NAME = "InstanceContextEncoder"
    # Norm of the encoder's convolutions but for pyramid pooling: "", "BN", "GN", ... Published models have none.
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
    # Standard deviation of the initial weights of iam_conv.
    sparse_inst.DECODER.IAM_INIT_STD = 0.01
    # Tie each instance's maps to a place: instances stand on a grid over the picture, and their logits fall by this
    # times the squared distance, in grid cells. 0: no place preferred, as published.
    sparse_inst.DECODER.LOCATION_PRIOR = 0.0
    # Tie each mask to the place of its maps: mask logits fall by a sharpness, which is learned for each instance and
    # starts with this, times the squared distance from the maps' centre of mass, in the same cells. 0: off, as
    # published.
    sparse_inst.DECODER.MASK_WINDOW = 0.0
    sparse_inst.DECODER.INST = CfgNode()
    sparse_inst.DECODER.INST.DIM = 256
    sparse_inst.DECODER.INST.CONVS = 4
    sparse_inst.DECODER.MASK = CfgNode()
    sparse_inst.DECODER.MASK.DIM = 256
    sparse_inst.DECODER.MASK.CONVS = 4

    sparse_inst.LOSS = CfgNode()
    sparse_inst.LOSS.NAME = "SparseInstCriterion"
    # "labels": loss_ce; "masks": loss_mask, loss_dice, loss_objectness.
    sparse_inst.LOSS.ITEMS = ("labels", "masks")
    sparse_inst.LOSS.CLASS_WEIGHT = 2.0
    sparse_inst.LOSS.MASK_PIXEL_WEIGHT = 5.0
    sparse_inst.LOSS.MASK_DICE_WEIGHT = 2.0
    sparse_inst.LOSS.OBJECTNESS_WEIGHT = 1.0
    # Weight of loss_iam, which draws each activation map into its instance. 0: no such loss, as published.
    sparse_inst.LOSS.IAM_WEIGHT = 0.0
    # Several processes: divide by the instances and pairs of all of them, so that their gradients are those of one
    # process with the whole batch. False: loss_mask and loss_objectness by each process's own pairs, as published.
    sparse_inst.LOSS.GLOBAL_NORMALIZATION = False

    sparse_inst.MATCHER = CfgNode()
    sparse_inst.MATCHER.NAME = "SparseInstMatcher"
    # Matching score = class probability ** BETA * DICE ** ALPHA.
    sparse_inst.MATCHER.ALPHA = 0.8
    sparse_inst.MATCHER.BETA = 0.2
    # ... times the share of the activation maps that lies inside the instance, ** GAMMA. 0: off, as published.
    sparse_inst.MATCHER.GAMMA = 0.0

    # Besides paths and URLs, MODEL.WEIGHTS can be timm://NAME, weights that timm downloads, and package://NAME/PATH,
    # a file of an installed Python package.
    # Share of the backbone's tensors that MODEL.WEIGHTS must fill at the start of a training. 0 allows anything.
    cfg.MODEL.MIN_BACKBONE_COVERAGE = 0.9
    # Read pickles that run code when they are read: only for files from someone you trust.
    cfg.MODEL.TRUSTED_WEIGHTS = False

    # BACKBONE.NAME build_pyramid_vision_transformer: PVTv2 "b0" to "b5"; LINEAR, with any NAME, is the linear b2.
    cfg.MODEL.PVT = CfgNode()
    cfg.MODEL.PVT.NAME = "b1"
    # Of p1 to p4, strides 4 to 32.
    cfg.MODEL.PVT.OUT_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.PVT.LINEAR = False
    # BACKBONE.NAME build_cspnet_backbone: "darknet53" or "cspdarknet53".
    cfg.MODEL.CSPNET = CfgNode()
    cfg.MODEL.CSPNET.NAME = "darknet53"
    # "" and "BN": batch norms that train; "FrozenBN", "SyncBN".
    cfg.MODEL.CSPNET.NORM = ""
    # Of csp0 to csp4, strides 2 to 32.
    cfg.MODEL.CSPNET.OUT_FEATURES = ["csp1", "csp2", "csp3", "csp4"]
    # BACKBONE.NAME build_timm_backbone: any model of timm that gives feature maps.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "resnet18"
    # Of res1 to res5, strides 2 to 32.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res3", "res4", "res5"]
    # "" leaves the model's norms as they are; "FrozenBN" freezes its batch norms, "SyncBN" synchronises them.
    cfg.MODEL.TIMM.NORM = ""
    # Further keyword arguments of timm.create_model; on a command line MODEL.TIMM.ARGS "{'drop_path_rate': 0.1}".
    cfg.MODEL.TIMM.ARGS = CfgNode(new_allowed=True)

    # "ADAMW" or "SGD".
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # Learning rate of the backbone's parameters over BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    cfg.SOLVER.AMSGRAD = False
    # How PyTorch updates the weights: "auto" (its choice), "for-loop", "foreach", "fused" (the fastest); equal but
    # for rounding; a resumed run may have another.
    cfg.SOLVER.OPTIMIZER_IMPLEMENTATION = "auto"
    # Largest Euclidean norm of all gradients together; larger gradients are scaled down before the step. 0: off.
    cfg.SOLVER.CLIP_TOTAL_NORM = 0.0
    # Batch size that BASE_LR was chosen for: BASE_LR is multiplied by IMS_PER_BATCH over this. 0: off.
    cfg.SOLVER.REFERENCE_BATCH_SIZE = 0
    # Each step's IMS_PER_BATCH images go through the model in this many parts; losses are normalised over all.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # Train with weights and feature maps in channels-last layout: faster convolutions on most CPUs and with AMP.
    cfg.SOLVER.CHANNELS_LAST = False
    # Train through torch.compile: minutes before the first step, and again for other sizes.
    cfg.SOLVER.COMPILE = False
    # Modules, * for any part of a name, whose activations are computed again in the backward pass: less memory, longer
    # steps. Most of it: ["backbone.*", "encoder", "decoder.*_branch"].
    cfg.SOLVER.RECOMPUTE = []
    # Periodic checkpoints kept, the newest; the best and the final one are kept besides. 0: all.
    cfg.SOLVER.MAX_CHECKPOINTS = 5
    # Type of automatic mixed precision (SOLVER.AMP.ENABLED): "float16" or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"
    # A loss or gradient that is not finite: "stop" ends the training, "skip" goes on without that step.
    cfg.SOLVER.NONFINITE = CfgNode()
    cfg.SOLVER.NONFINITE.ACTION = "stop"
    # Steps in a row that "skip" skips before it stops; also those of the gradient scaler, at a scale of at most 1.
    cfg.SOLVER.NONFINITE.MAX_SKIPS = 10

    # Image files of more pixels (height times width) are refused before they are decoded.
    cfg.INPUT.MAX_IMAGE_PIXELS = 200_000_000
    # What computes AP: "pycocotools"; "faster-coco-eval", the same figures sooner (extra "fast-eval").
    cfg.TEST.COCO_EVAL = "pycocotools"
    # Images that may be broken (cut off, of another size than the json says) before a run stops: each is named once in
    # the log and passed over.
    cfg.DATALOADER.MAX_BROKEN_IMAGES = 10

    # A user's own data: a COCO json and its image folder. Where set, they replace DATASETS.TRAIN or DATASETS.TEST.
    cfg.DATASETS.TRAIN_JSON = ""
    cfg.DATASETS.TRAIN_IMAGES = ""
    cfg.DATASETS.TEST_JSON = ""
    cfg.DATASETS.TEST_IMAGES = ""


def get_config_file(name: str) -> str:
    """Path of a config file that comes with the package.

    Args:
        name: path below ``configs/``, with or without ``.yaml``: ``"sparse_inst_r50_giam"``,
            ``"quick/shapes.yaml"``.

    Returns:
        Absolute path of the file.

    Raises:
        ValueError: there is no such file; the message lists those that there are.
    """
    for configs_dir in (_PACKAGE_DIR / "configs", _PACKAGE_DIR.parent / "configs"):
        for candidate in (configs_dir / name, configs_dir / f"{name}.yaml"):
            if candidate.is_file():
                return str(candidate)
    present = sorted(
        str(path.relative_to(configs_dir))
        for configs_dir in (_PACKAGE_DIR / "configs", _PACKAGE_DIR.parent / "configs")
        for path in configs_dir.rglob("*")
        if path.suffix in (".yaml", ".py") and path.name != "__init__.py"
    )
    raise ValueError(f"No config file named {name!r}. There are: {', '.join(present) or 'none'}")
