"""Add the configuration keys that all model families share, with their defaults and units."""

import importlib
from pathlib import Path

from detectron2.config import CfgNode

import sparseinst

# Modules that add the keys of one model family each by `add_keys(cfg)`; RANGES has the values that the keys accept.
FAMILIES = (
    "sparseinst.modeling.sparse_inst.config",
    "sparseinst.modeling.solo.config",
    "sparseinst.modeling.yolact.config",
)
_PACKAGE_DIR = Path(__file__).resolve().parents[1]
# Of an installed package and of a checkout.
CONFIG_FOLDERS = (_PACKAGE_DIR / "configs", _PACKAGE_DIR.parent / "configs")


def add_sparse_inst_config(cfg: CfgNode) -> None:
    """Add the plugin's keys to a Detectron2 config, in place, and register its models and backbones.

    The only default of Detectron2 that changes is ``MODEL.MASK_ON``. A model needs two more keys
    than the defaults given here: ``MODEL.META_ARCHITECTURE SparseInst`` and
    ``MODEL.RESNETS.OUT_FEATURES [res3, res4, res5]`` (or another backbone and its feature names).

    Args:
        cfg: what :func:`detectron2.config.get_cfg` returns.
    """
    sparseinst.register()
    cfg.MODEL.MASK_ON = True

    for family in FAMILIES:
        importlib.import_module(family).add_keys(cfg)

    # Modules that are imported before the rest of the config is merged: dotted names, or .py files relative to the
    # config file, else to the working directory. They run code. `--import FILE` adds one. A module's `add_config(cfg)`,
    # where it has one, adds its own keys.
    cfg.IMPORTS = []

    # Services that get the scalars of a training besides metrics.json and TensorBoard: "wandb", "mlflow" (extras of the
    # same names). Their own environment variables set project and server.
    cfg.TRACKERS = []

    # Format and limits of the predictions.
    cfg.MODEL.OUTPUT = CfgNode()
    # "bitmask": boolean masks; "rle": COCO RLEs, which need memory for one mask at a time.
    cfg.MODEL.OUTPUT.MASK_FORMAT = "bitmask"
    # Largest memory of the boolean masks of one image, in GiB; a prediction that needs more raises an error.
    # 100 masks of 42 megapixels fit.
    cfg.MODEL.OUTPUT.MAX_MASK_GIB = 4.0
    # Instances with a final score at or below this are dropped, in [0, 1].
    cfg.MODEL.OUTPUT.SCORE_THRESHOLD = 0.0

    # How the network runs at inference; see sparseinst.runtime.optimize.
    cfg.RUNTIME = CfgNode()
    # "torch"; "openvino" on a CPU (extra "openvino"); "onnxruntime" (extra "onnx"). Exported files run in the engine of
    # their format where this is "torch".
    cfg.RUNTIME.ENGINE = "torch"
    # Threads of OpenVINO and ONNX Runtime for one image. 0: as many as PyTorch has.
    cfg.RUNTIME.INTRA_OP_THREADS = 0
    # Execution providers of ONNX Runtime in the order of preference; "CUDAExecutionProvider" needs onnxruntime-gpu.
    cfg.RUNTIME.PROVIDERS = ["CPUExecutionProvider"]
    # "float32"; "bfloat16" or "float16" autocast; ENGINE "openvino" has bfloat16 where the processor has it.
    cfg.RUNTIME.PRECISION = "float32"
    # Fold norms and neighboring linear layers into convolutions: float32 results change by rounding only.
    cfg.RUNTIME.FUSE = True
    # Feature maps in channels-last layout.
    cfg.RUNTIME.CHANNELS_LAST = True
    # Compute wide 3x3 convolutions with a quarter of the multiplications (CPU, float32); results change by about 1e-5.
    cfg.RUNTIME.WINOGRAD = True
    # Run through torch.compile, which takes seconds to minutes at the first image, and once more, for all sizes, at the
    # first image of another size. The compiler itself may need another round for images below about 256x256 pixels.
    cfg.RUNTIME.COMPILE = False
    # Evaluation, demo, predict and benchmark on the CPU: the process reuses freed memory, which is faster. `serve` does
    # not. Other programs call sparseinst.engine.host_memory.keep_freed_memory(True).
    cfg.RUNTIME.KEEP_FREED_MEMORY = True

    # "SparseInstDatasetMapper" or Detectron2's "DatasetMapper".
    cfg.INPUT.DATASET_MAPPER = "SparseInstDatasetMapper"

    # Besides paths and URLs, MODEL.WEIGHTS can be sparseinst://NAME, a published checkpoint; hf://OWNER/NAME/FILE; a
    # link to Google Drive; timm://NAME, weights that timm downloads; package://NAME/PATH, a file of a Python package.
    # Share of the backbone's tensors that MODEL.WEIGHTS must fill at the start of a training. 0 allows anything.
    cfg.MODEL.MIN_BACKBONE_COVERAGE = 0.9
    # Read pickles that run code while they are read. Set this only for files from a trusted source.
    cfg.MODEL.TRUSTED_WEIGHTS = False
    # Weights to take from a file with raw and averaged ones (EMA): "averaged", "raw", or "auto", averaged if there are
    # any. --resume always continues with the raw weights.
    cfg.MODEL.EMA_WEIGHTS = "auto"

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
    # Slope of its leaky ReLUs below zero: timm's 0.01; DarkNet's authors and YOLACT have 0.1.
    cfg.MODEL.CSPNET.NEGATIVE_SLOPE = 0.01
    # BACKBONE.NAME build_resnet_dcn_backbone: n makes every n-th block of the stages in DEFORM_ON_PER_STAGE deformable,
    # from the first one on.
    cfg.MODEL.RESNETS.DEFORM_INTERVAL = 1
    # BACKBONE.NAME build_timm_backbone: any model of timm that gives feature maps.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "resnet18"
    # Of res1 to res5, strides 2 to 32.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res3", "res4", "res5"]
    # "" leaves the model's norms as they are; "FrozenBN" freezes its batch norms, "SyncBN" synchronizes them.
    cfg.MODEL.TIMM.NORM = ""
    # Arguments of timm.create_model that shape the network, those of MODEL_ARGS in backbones/timm_backbone.py; on a
    # command line MODEL.TIMM.ARGS "{'drop_path_rate': 0.1}".
    cfg.MODEL.TIMM.ARGS = CfgNode(new_allowed=True)

    # "ADAMW" or "SGD".
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # Learning rate of the backbone's parameters over BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    cfg.SOLVER.AMSGRAD = False
    # PyTorch's implementation of the update: "auto", "for-loop", "foreach" or "fused" (the fastest). Results differ by
    # rounding only. A resumed run may use another one.
    cfg.SOLVER.OPTIMIZER_IMPLEMENTATION = "auto"
    # Largest Euclidean norm of all gradients together; larger gradients are scaled down before the step. 0: off.
    cfg.SOLVER.CLIP_TOTAL_NORM = 0.0
    # Batch size that BASE_LR was tuned at: the learning rate is BASE_LR * IMS_PER_BATCH / this. 0: off.
    cfg.SOLVER.REFERENCE_BATCH_SIZE = 0
    # Each step's IMS_PER_BATCH images go through the model in this many parts; losses are normalized over all.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # Train with weights and feature maps in channels-last layout: faster convolutions on most CPUs and with AMP.
    cfg.SOLVER.CHANNELS_LAST = False
    # Train through torch.compile, which takes minutes at the first step, and again at new image sizes.
    cfg.SOLVER.COMPILE = False
    # Modules whose activations are recomputed in the backward pass: less memory, slower steps. * matches any part of a
    # name. Most memory is saved by ["backbone.*", "encoder", "decoder.*_branch"].
    cfg.SOLVER.RECOMPUTE = []
    # Number of newest periodic checkpoints to keep, besides the best and the final one. 0: all.
    cfg.SOLVER.MAX_CHECKPOINTS = 5
    # Type of automatic mixed precision (SOLVER.AMP.ENABLED): "float16" or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Reaction to a NaN or Inf loss or gradient: "stop" ends the training, "skip" skips the step.
    cfg.SOLVER.NONFINITE = CfgNode()
    cfg.SOLVER.NONFINITE.ACTION = "stop"
    # Largest number of consecutive steps that "skip" or the gradient scaler (at a scale of at most 1) may skip.
    cfg.SOLVER.NONFINITE.MAX_SKIPS = 10

    # (height, width): test images are resized to the largest size of their aspect ratio that fits, in place of
    # MIN_SIZE_TEST and MAX_SIZE_TEST. Empty: off. Exported files of a fixed size set it.
    cfg.INPUT.FIT_SIZE_TEST = []
    # Side in pixels of the square that images of any shape are resized to; 0: off. A model of fixed input size
    # needs it, and resizes what the mapper passes on: set MIN_SIZE_TEST 0.
    cfg.INPUT.SQUARE_SIZE = 0
    # Take the annotations' boxes, transformed with the image, as ground truth, and pass crowds on as "crowd_boxes". An
    # object is left out where the center of its box is outside of the image. False: boxes are tight around the masks,
    # and crowds are left out.
    cfg.INPUT.ANNOTATION_BOXES = False
    # Training: the augmentations of SSD (arXiv 1512.02325), before flip and resize; they need ANNOTATION_BOXES.
    cfg.INPUT.SSD = CfgNode()
    cfg.INPUT.SSD.ENABLED = False
    # Crops have an object whose IoU with the crop is at least the drawn one. False, as published: any crop with the
    # center of an object.
    cfg.INPUT.SSD.MIN_IOU = False

    # Image files of more pixels (height times width) are refused before they are decoded.
    cfg.INPUT.MAX_IMAGE_PIXELS = 200_000_000
    # Library that computes AP: "pycocotools", or "faster-coco-eval" (extra "fast-eval"), faster with equal results.
    cfg.TEST.COCO_EVAL = "pycocotools"
    # End a training after so many evaluations (EVAL_PERIOD) without a better AP of the masks. 0: never.
    cfg.TEST.PATIENCE = 0
    # Draw curves, predictions, precision-recall and confusion matrix into OUTPUT_DIR (docs/results.md).
    cfg.TEST.PLOTS = True
    # Largest number of broken images (truncated, or of another size than in the json) before a run stops. Each is
    # logged once and skipped.
    cfg.DATALOADER.MAX_BROKEN_IMAGES = 10

    # Training: replace an image that the augmentations leave without an object by another one, drawn from the seed.
    cfg.DATALOADER.REPLACE_EMPTY = False

    # A custom data set: a COCO json and its image folder. If set, they replace DATASETS.TRAIN or DATASETS.TEST.
    cfg.DATASETS.TRAIN_JSON = ""
    cfg.DATASETS.TRAIN_IMAGES = ""
    cfg.DATASETS.TEST_JSON = ""
    cfg.DATASETS.TEST_IMAGES = ""
    # Share of TRAIN_JSON's images that are evaluated on and not trained on, in (0, 1); 0: off. Crops of one photo stay
    # together. The split depends on the file names alone.
    cfg.DATASETS.VAL_SHARE = 0.0


def get_config_file(name: str) -> str:
    """Return the path of a config file of the package.

    Args:
        name: path below ``configs/``, with or without ``.yaml``: ``"sparse_inst_r50_giam"``,
            ``"quick/shapes.yaml"``.

    Returns:
        Absolute path of the file.

    Raises:
        ValueError: the file does not exist; the message lists the existing files.
    """
    for configs_dir in CONFIG_FOLDERS:
        for candidate in (configs_dir / name, configs_dir / f"{name}.yaml"):
            if candidate.is_file():
                return str(candidate)
    present = sorted(
        str(path.relative_to(configs_dir))
        for configs_dir in CONFIG_FOLDERS
        for path in configs_dir.rglob("*")
        if path.suffix in (".yaml", ".py") and path.name != "__init__.py"
    )
    raise ValueError(f"No config file named {name!r}. There are: {', '.join(present) or 'none'}")
