"""Export a model, check the file, and put it in place, for the command `export`."""

import argparse
import logging
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

import sparseinst
from sparseinst.checkpoint import checkpointer_from_config
from sparseinst.checkpoint.atomic_write import output_folder
from sparseinst.checkpoint.trained_keys import follow_checkpoint
from sparseinst.config import load_config
from sparseinst.data.augmentations import build_test_augmentations
from sparseinst.data.coco_json import ClassInfo, register_user_datasets
from sparseinst.evaluation import evaluate
from sparseinst.inference.predictor import find_classes
from sparseinst.modeling.meta_arch import InstanceSegmenter
from sparseinst.runtime.export import (
    FORMATS,
    ExportableNetwork,
    InputRule,
    check_packages,
    export_program,
    file_writer,
    has_deform_conv,
    input_rule,
    weights_sha256,
)
from sparseinst.runtime.exported_file import ExportMetadata
from sparseinst.runtime.exported_model import ExportedSegmenter, open_network, postprocessing_weights
from sparseinst.runtime.self_check import (
    BOUNDS,
    SelfCheckError,
    check_differences,
    check_shapes,
    differences,
    end_to_end_differences,
)
from sparseinst.tools.export import DYNAMIC

logger = logging.getLogger(__name__)

# Largest difference of AP in percent that --test-json accepts.
AP_BOUNDS = {"float32": 0.1, "float16": 0.5}
# Of the image whose resized size is checked, pixels: COCO's most common one.
_USUAL_IMAGE = (480, 640)


def run(args: argparse.Namespace) -> int:
    """Run the command. Return 0; 1 where the file differs from the model; 2 after other errors."""
    for name in ("fvcore", "detectron2", "sparseinst"):
        setup_logger(name=name).setLevel(logging.INFO)
    try:
        # --size takes all that follows it.
        num_sizes = 1 if args.size[0] == DYNAMIC else 2
        args.size, leading = args.size[:num_sizes], args.size[num_sizes:]
        opts = [*leading, *args.opts, "MODEL.DEVICE", "cpu", "DATASETS.TEST_JSON", args.test_json]
        cfg = load_config(args.config_file, [*opts, "DATASETS.TEST_IMAGES", args.test_images], imports=args.imports)
        path = export(cfg, args)
    except SelfCheckError as error:
        print(f"error: {error}. Nothing was written", file=sys.stderr)
        return 1
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Written: {path}, {sum(file.stat().st_size for file in _files(path)) / 1e6:.1f} MB")
    return 0


def export(cfg: CfgNode, args: argparse.Namespace) -> Path:
    """Export the model of a config, and return the path of the file.

    Args:
        cfg: on the CPU; MODEL.WEIGHTS is loaded.
        args: of the command.

    Raises:
        SelfCheckError: the file does not return the model's numbers.
        ValueError: arguments that exclude each other; the model cannot be exported.
        ImportError: the format needs a package that is not installed.
        OutputError: the file cannot be written.
    """
    target = FORMATS[args.format]
    # Errors come before the work.
    _check_arguments(args)
    check_packages(args.format)
    own_datasets = cfg.DATASETS.TEST
    if args.test_json:
        register_user_datasets(cfg, ("TEST",))
    for note in follow_checkpoint(cfg, cfg.MODEL.WEIGHTS):
        logger.info("%s", note)
    model = build_model(cfg).eval().requires_grad_(False)
    if not isinstance(model, InstanceSegmenter):
        raise ValueError(f"MODEL.META_ARCHITECTURE is {type(model).__name__}; expected an InstanceSegmenter")
    content = checkpointer_from_config(cfg, model).load(cfg.MODEL.WEIGHTS)
    classes = find_classes(cfg, content.get("classes"), model.class_names)
    rule = input_rule(model)
    size, batch = _chosen_size(args.size, rule), _chosen_batch(args.batch)
    usual = _usual_size(cfg, model)

    network = ExportableNetwork(model, args.input == "image", args.end_to_end)
    program = export_program(network, rule.divisibility, size, batch)
    names = _output_names(network, size or usual)
    metadata = _metadata(cfg, own_datasets, model, classes, args, rule, size, batch)
    metadata = _with(metadata, outputs=names, has_deform_conv=has_deform_conv(program))
    channels = len(metadata.pixel_mean)
    largest = -(-cfg.INPUT.MAX_SIZE_TEST // rule.divisibility) * rule.divisibility if rule.divisibility else 0
    shapes = [(batch or number, channels, *(size or sides)) for number, sides in
              ((1, (2 * rule.divisibility,) * 2), (1, usual), (4, (max(*usual, largest),) * 2))]  # fmt: skip
    write = file_writer(args.format, program, names, args.precision, tuple(shapes))
    with output_folder(args.output) as folder:
        path = folder / target.file_name
        path.parent.mkdir(exist_ok=True)
        write(path, metadata)
        exported = open_network(path, metadata, "torch", cfg.RUNTIME.INTRA_OP_THREADS, cfg.RUNTIME.PROVIDERS)
        compare = end_to_end_differences if args.end_to_end else differences
        checked = check_shapes(rule.divisibility, size, batch, usual)
        worst = compare(network, exported, checked)
        bound = BOUNDS[args.precision]
        shown = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
        print(f"Largest differences from eager float32 at {_shown(checked)}: {shown} (at most {bound:g})")
        check_differences(worst, bound)
        if args.test_json:
            _check_ap(cfg, model, ExportedSegmenter(model, exported, metadata), AP_BOUNDS[args.precision])
        del exported
        write(path, _with(metadata, self_check={**worst, "bound": bound}))
    return args.output / target.file_name


def _check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for arguments that exclude each other."""
    target = FORMATS[args.format]
    if args.precision not in target.precisions:
        supported = "; ".join(f"{name}: {', '.join(each.precisions)}" for name, each in FORMATS.items())
        raise ValueError(f"--precision {args.precision} is not supported by --format {args.format}; {supported}")
    if args.end_to_end and not target.end_to_end:
        supported = ", ".join(name for name, each in FORMATS.items() if each.end_to_end)
        raise ValueError(f"--end-to-end is not supported by --format {args.format}; it is by {supported}")
    if args.end_to_end < 0:
        raise ValueError(f"--end-to-end is {args.end_to_end}; it must be at least 1")
    if args.end_to_end and args.test_json:
        raise ValueError("--test-json computes the AP of files without --end-to-end: leave one of them out")
    if bool(args.test_json) != bool(args.test_images):
        raise ValueError("--test-json and --test-images go together")


def _chosen_size(given: list[str], rule: InputRule) -> tuple[int, int] | None:
    """Read --size. None: dynamic."""
    if rule.fixed_size is not None:
        fixed = " ".join(map(str, rule.fixed_size))
        if given != fixed.split():
            raise ValueError(f"--size is {' '.join(given)}; this model supports {fixed}, its own size, only")
        return rule.fixed_size
    if given == [DYNAMIC]:
        return None
    sides = [int(side) if side.isdecimal() else 0 for side in given]
    if len(sides) != 2 or min(sides) < 1 or any(side % rule.divisibility for side in sides):
        raise ValueError(
            f"--size is {' '.join(given)}; it must be dynamic, or HEIGHT WIDTH in multiples of {rule.divisibility}"
        )
    return tuple(sides)


def _chosen_batch(given: str) -> int | None:
    """Read --batch. None: dynamic."""
    if given == DYNAMIC:
        return None
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"--batch is {given}; it must be dynamic, or a number from 1 on")
    return int(given)


def _usual_size(cfg: CfgNode, model: InstanceSegmenter) -> tuple[int, int]:
    """Return the padded size of an image of COCO's usual size."""
    image = T.AugInput(np.zeros((*_USUAL_IMAGE, 3), np.uint8))
    T.AugmentationList(build_test_augmentations(cfg))(image)
    pixels = torch.from_numpy(np.ascontiguousarray(image.image.transpose(2, 0, 1)))
    return tuple(model.preprocess([{"image": pixels}]).tensor.shape[-2:])


def _output_names(network: ExportableNetwork, size: tuple[int, int]) -> list[str]:
    model = network.model
    with torch.no_grad():
        outputs = model.network(torch.zeros((1, len(model.pixel_mean), *size)))
        if network.max_detections:
            outputs = model.dense_detections(outputs, size, network.max_detections)
    return list(outputs)


def _metadata(
    cfg: CfgNode,
    own_datasets: tuple[str, ...],
    model: InstanceSegmenter,
    classes: ClassInfo,
    args: argparse.Namespace,
    rule: InputRule,
    size: tuple[int, int] | None,
    batch: int | None,
) -> ExportMetadata:
    saved = cfg.clone()
    saved.defrost()
    saved.MODEL.WEIGHTS = ""
    for key in ("TEST_JSON", "TEST_IMAGES", "TRAIN_JSON", "TRAIN_IMAGES"):
        saved.DATASETS[key] = ""
    saved.DATASETS.TEST = own_datasets
    saved.OUTPUT_DIR = "./output"
    if size and rule.fixed_size is None:
        saved.INPUT.FIT_SIZE_TEST = list(size)
    return ExportMetadata(
        meta_architecture=cfg.MODEL.META_ARCHITECTURE,
        config=saved.dump(),
        class_names=classes.names,
        category_ids=classes.category_ids,
        input=args.input,
        channel_order=cfg.INPUT.FORMAT,
        pixel_mean=[float(value) for value in cfg.MODEL.PIXEL_MEAN],
        pixel_std=[float(value) for value in cfg.MODEL.PIXEL_STD],
        size_divisibility=rule.divisibility,
        size=size,
        batch=batch,
        short_side=cfg.INPUT.MIN_SIZE_TEST,
        long_side=cfg.INPUT.MAX_SIZE_TEST,
        outputs=[],
        postprocessing=model.postprocessing_options,
        max_detections=args.end_to_end,
        precision=args.precision,
        has_deform_conv=False,
        weights_sha256=weights_sha256(model),
        version=sparseinst.__version__,
        postprocessing_weights=postprocessing_weights(model),
    )


def _check_ap(cfg: CfgNode, model: InstanceSegmenter, exported: ExportedSegmenter, bound: float) -> None:
    """Evaluate both, print both APs, and raise SelfCheckError where they differ by more than the bound.

    Raises:
        ValueError: the model has no AP.
    """
    results = []
    with tempfile.TemporaryDirectory() as folder:
        own_cfg = cfg.clone()
        own_cfg.defrost()
        own_cfg.OUTPUT_DIR = folder
        if exported.metadata.size and exported.metadata.size_divisibility:
            own_cfg.INPUT.FIT_SIZE_TEST = list(exported.metadata.size)
        for each in (ExportedSegmenter(model, model.network, _with(exported.metadata, input="normalized")), exported):
            results.append(evaluate(own_cfg, each).get("segm", {}).get("AP", math.nan))
            if math.isnan(results[0]):
                raise ValueError(
                    f"--test-json {cfg.DATASETS.TEST_JSON} gives no AP: it has no annotations, or the model finds "
                    "nothing in its images. Give annotated images and trained weights"
                )
    print(f"AP of the masks: {results[0]:.2f} in eager float32, {results[1]:.2f} of the exported file")
    if not abs(results[0] - results[1]) <= bound:
        raise SelfCheckError(
            f"The file's AP is {results[1]:.2f}, the model's {results[0]:.2f}: they may differ by {bound}"
        )


def _with(metadata: ExportMetadata, **changes: object) -> ExportMetadata:
    return ExportMetadata(**{**vars(metadata), **changes})


def _shown(shapes: list[tuple[int, int, int]]) -> str:
    return ", ".join(f"{batch}x{height}x{width}" for batch, height, width in shapes)


def _files(path: Path) -> list[Path]:
    return [file for file in path.parent.glob(f"{path.stem}.*") if path.suffix == ".xml" or file == path]
