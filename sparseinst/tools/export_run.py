"""Export a model, check the file, and put it in place, for the command `export`."""

import argparse
import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model

import sparseinst
from sparseinst.checkpoint import checkpointer_from_config
from sparseinst.checkpoint.atomic_write import as_output_error, check_writable, output_folder
from sparseinst.checkpoint.trained_keys import follow_checkpoint
from sparseinst.config import load_config
from sparseinst.data.augmentations import build_test_augmentations, model_input, photograph_input
from sparseinst.data.coco_json import ClassInfo, register_user_datasets
from sparseinst.data.images import read_image
from sparseinst.engine.console import report_error
from sparseinst.engine.run_setup import log_to_console
from sparseinst.evaluation import evaluate
from sparseinst.inference.prediction_lines import list_images
from sparseinst.inference.predictor import find_classes
from sparseinst.modeling.meta_arch import InstanceSegmenter, Network
from sparseinst.runtime.export import (
    DEFORMABLE_NOTE,
    FORMATS,
    MIN_CELLS,
    ExportableNetwork,
    InputRule,
    check_packages,
    converter,
    export_program,
    has_deform_conv,
    input_rule,
    weights_sha256,
)
from sparseinst.runtime.exported_file import ExportMetadata
from sparseinst.runtime.exported_model import ExportedSegmenter, open_network, postprocessing_weights
from sparseinst.runtime.output_difference import compared_share
from sparseinst.runtime.quantize import ADDITIONS, Quantization, by_error, quantizable_layers
from sparseinst.runtime.rewrites.fuse import fused_copy
from sparseinst.runtime.self_check import (
    BOUNDS,
    MASK_BOUNDS,
    SelfCheckError,
    check_differences,
    check_shapes,
    end_to_end_differences,
    output_differences,
)
from sparseinst.tools.export import MOST_DETECTIONS
from sparseinst.tools.export_arguments import check_arguments, chosen_batch, chosen_number, chosen_size, split_size

logger = logging.getLogger(__name__)

# Largest difference of AP in percent that --test-json accepts; with int8, largest loss.
AP_BOUNDS = {"float32": 0.1, "float16": 0.5, "int8": 1.0}
# Most images of --calibration that are run, evenly spaced.
CALIBRATION_IMAGES = 64
# Of these the errors of single layers are measured, where int8 loses too much AP.
_ERROR_IMAGES = 4
# A loss of AP says little below this AP of the model, percent.
_LEAST_INT8_AP = 5.0
# Most images in a dynamic batch of a TensorRT engine.
_MAX_BATCH = 4
# Most images of --test-images in which an end-to-end file's detections are compared, evenly spaced.
_COMPARED_IMAGES = 8


def run(args: argparse.Namespace) -> int:
    """Run the command. Return 0, or 1 where the file differs from the model; raise what `export` raises."""
    log_to_console(logging.INFO)
    try:
        # --size takes all that follows it, --end-to-end one value.
        args.size, leading = split_size(args.size)
        if args.end_to_end is not None and args.end_to_end[:1].isalpha():
            leading, args.end_to_end = [*leading, args.end_to_end], MOST_DETECTIONS
        args.end_to_end = chosen_number(args.end_to_end)
        opts = [*leading, *args.opts, "MODEL.DEVICE", "cpu"]
        # A path such as 2024 would be read as a number.
        opts += ["DATASETS.TEST_JSON", repr(args.test_json), "DATASETS.TEST_IMAGES", repr(args.test_images)]
        cfg = load_config(args.config_file, opts, imports=args.imports)
        path, metadata = export(cfg, args)
    except SelfCheckError as error:
        return report_error(f"{error}. Nothing was written")
    note = ""
    if metadata.compared_detections == 0:
        note = (
            ". No class, mask or box was compared, because the model finds nothing certain in the images of the "
            "self-check: --test-images takes a folder of images with objects"
        )
    elif metadata.compared_detections:
        note = f"; {metadata.compared_detections} detections were compared"
    print(f"Written: {path}, {sum(file.stat().st_size for file in _files(path)) / 1e6:.1f} MB{note}")
    return 0


def export(cfg: CfgNode, args: argparse.Namespace) -> tuple[Path, ExportMetadata]:
    """Export the model of a config, and return the path of the file and its metadata.

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
    check_arguments(args)
    check_packages(args.format)
    check_writable(args.output)
    own_datasets = cfg.DATASETS.TEST
    if args.test_json:
        # The config of a training with --val-share would evaluate on a part of its training data.
        cfg.DATASETS.VAL_SHARE = 0.0
        register_user_datasets(cfg, ("TEST",))
    for note in follow_checkpoint(cfg, cfg.MODEL.WEIGHTS):
        logger.info("%s", note)
    if not cfg.MODEL.WEIGHTS:
        # Random weights may give scores near 0 everywhere, whose relative rounding is large: a refusal can be repeated.
        torch.manual_seed(0)
    model = build_model(cfg).eval().requires_grad_(False)
    if not isinstance(model, InstanceSegmenter):
        raise ValueError(f"MODEL.META_ARCHITECTURE is {type(model).__name__}; expected an InstanceSegmenter")
    content = checkpointer_from_config(cfg, model).load(cfg.MODEL.WEIGHTS)
    classes = find_classes(cfg, content.get("classes"), model.class_names)
    rule = input_rule(model)
    size, batch = chosen_size(args.size, rule), chosen_batch(args.batch)
    least = MIN_CELLS * rule.divisibility
    usual = tuple(max(side, least) for side in model.preprocess([photograph_input(cfg)]).tensor.shape[-2:])

    metadata = _metadata(cfg, own_datasets, model, classes, args, rule, size, batch)
    network = ExportableNetwork(model, args.input == "image", args.end_to_end)
    names = _output_names(network, size or usual)
    float_model = ExportedSegmenter(model, model.network, metadata)
    is_compared = args.end_to_end and args.test_images
    compared = _images(cfg, float_model, "--test-images", args.test_images, _COMPARED_IMAGES) if is_compared else []
    # The file computes what RUNTIME.FUSE computes; the comparisons are with the model as it is.
    source = ExportableNetwork(fused_copy(model), network.takes_pixels, network.max_detections)
    quantization = None
    if args.precision == "int8":
        images = _images(cfg, float_model, "--calibration", args.calibration, CALIBRATION_IMAGES)
        quantization = Quantization(source.model, images)
    logger.info("Exporting the network by torch.export")
    program = export_program(source, rule.divisibility, size, batch)
    metadata = _with(metadata, outputs=names, has_deform_conv=has_deform_conv(program))
    if metadata.has_deform_conv and args.format == "onnx":
        print(f"Note: {DEFORMABLE_NOTE}")
    channels = len(metadata.pixel_mean)
    largest = -(-cfg.INPUT.MAX_SIZE_TEST // rule.divisibility) * rule.divisibility if rule.divisibility else 0
    shapes = [(batch or number, channels, *(size or sides)) for number, sides in
              ((1, (least,) * 2), (1, usual), (_MAX_BATCH, (max(*usual, largest),) * 2))]  # fmt: skip
    checked = check_shapes(rule.divisibility, size, batch, usual)
    with output_folder(args.output) as folder:
        path = folder / target.file_name
        expected_ap = None
        logger.info("Converting the network to %s", args.format)
        convert = converter(args.format, program, names, args.precision, tuple(shapes))
        for skipped in _skipped_layers(source, program, quantization):
            if quantization is not None:
                quantization = quantization._replace(skipped=skipped)
                logger.info("Quantizing, with the ranges of activations on %d images", len(quantization.images))
            metadata = _with(metadata, skipped_layers=list(skipped))
            write = convert(quantization)
            with as_output_error(args.output):
                path.parent.mkdir(exist_ok=True)
                write(path, metadata)
            exported = open_network(path, metadata, "torch", cfg.RUNTIME.INTRA_OP_THREADS, cfg.RUNTIME.PROVIDERS)
            logger.info("Comparing the file with the model at %s", _shown(checked))
            self_check, num_compared = _check_outputs(network, exported, checked, args.precision, compared)
            if not args.test_json:
                break
            if expected_ap is None:
                float_metadata = _with(metadata, input="normalized")
                logger.info("Computing the AP of the model in eager float32")
                expected_ap = _mask_ap(cfg, ExportedSegmenter(model, model.network, float_metadata))
                if math.isnan(expected_ap):
                    raise ValueError(
                        f"--test-json {args.test_json} gives no AP: it has no annotations, or the model finds nothing "
                        "in its images. Give annotated images and trained weights"
                    )
                if args.precision == "int8" and expected_ap < _LEAST_INT8_AP:
                    if cfg.MODEL.WEIGHTS:
                        raise ValueError(
                            f"The model's AP on --test-json {args.test_json} is {expected_ap:.2f}; INT8 is accepted by "
                            f"its AP, so at least {_LEAST_INT8_AP:g} is expected. Give trained weights and images like "
                            "those of the training"
                        )
                    print("The weights are random, so the AP proves nothing about INT8. Use the file to measure speed")
            logger.info("Computing the AP of the exported file")
            ap = _mask_ap(cfg, ExportedSegmenter(model, exported, metadata))
            metadata = _with(metadata, ap={"model": expected_ap, "file": ap})
            print(f"AP of the masks: {expected_ap:.2f} in eager float32, {ap:.2f} of the exported file")
            # INT8 may gain any AP.
            lost = expected_ap - ap if args.precision == "int8" else abs(expected_ap - ap)
            if lost <= AP_BOUNDS[args.precision]:
                break
        else:
            bound = AP_BOUNDS[args.precision]
            allowed = f"{bound} may be lost" if args.precision == "int8" else f"they may differ by {bound}"
            raise SelfCheckError(f"The file's AP is {ap:.2f}, the model's {expected_ap:.2f}: {allowed}")
        del exported
        metadata = _with(metadata, self_check=self_check, compared_detections=num_compared)
        with as_output_error(args.output):
            write(path, metadata)
    return args.output / target.file_name, metadata


def _images(cfg: CfgNode, model: ExportedSegmenter, flag: str, name: str, most: int) -> list[torch.Tensor]:
    """Return up to ``most`` images as the file takes them, each (B, 3, h, w), where B is the file's batch size or 1.

    Args:
        cfg: of the model.
        model: preprocesses as the file asks for.
        flag: of the command, for messages.
        name: its value: a folder, a pattern, or a text file with one path in each line.
        most: evenly spaced ones are taken.

    Raises:
        ValueError: no image matches, or an image cannot be read.
    """
    paths = list_images([name], flag)
    paths = paths[:: -(-len(paths) // most)]
    resize = T.AugmentationList(build_test_augmentations(_resizing_to_fit(cfg, model.metadata)))
    inputs = [model_input(read_image(path, cfg.INPUT.FORMAT, cfg.INPUT.MAX_IMAGE_PIXELS), resize) for path in paths]
    batch = model.metadata.batch or 1
    # The first images again fill the last batch.
    chunks = ((inputs[start:] + inputs * batch)[:batch] for start in range(0, len(inputs), batch))
    return [model.preprocess(chunk).tensor for chunk in chunks]


def _skipped_layers(
    network: ExportableNetwork, program: torch.export.ExportedProgram, quantization: Quantization | None
) -> Iterator[list[str]]:
    """Yield what to leave in float32: nothing, additions, and more and more of the layers with the largest errors."""
    yield []
    if quantization is None:
        return
    print("Too much AP is lost. Left in float32: the additions of residual blocks")
    yield [ADDITIONS]
    images = quantization.images[:_ERROR_IMAGES]
    layers = by_error(network, quantizable_layers(program, quantization.model), images)
    counts = [2**power for power in range(len(layers).bit_length()) if 2**power < len(layers)]
    for attempt, count in enumerate(counts, 1):
        shown = ", ".join([ADDITIONS, *layers[:count]])
        print(f"Too much AP is lost. Attempt {attempt} of at most {len(counts)}. Left in float32: {shown}")
        yield [ADDITIONS, *layers[:count]]


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
    saved.DATASETS.VAL_SHARE = 0.0
    saved.DATASETS.TEST = own_datasets
    saved.OUTPUT_DIR = "./output"
    # Of the model in PyTorch; the file has its own.
    saved.RUNTIME.ENGINE, saved.RUNTIME.PRECISION = "torch", "float32"
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
        min_side=0 if size else MIN_CELLS * rule.divisibility,
        batch=batch,
        max_batch=_MAX_BATCH if args.format == "tensorrt" and batch is None else None,
        short_side=cfg.INPUT.MIN_SIZE_TEST,
        long_side=cfg.INPUT.MAX_SIZE_TEST,
        fit_size=list(saved.INPUT.FIT_SIZE_TEST) or None,
        outputs=[],
        postprocessing=model.postprocessing_options,
        max_detections=args.end_to_end,
        precision=args.precision,
        has_deform_conv=False,
        weights_sha256=weights_sha256(model),
        version=sparseinst.__version__,
        postprocessing_weights={} if args.end_to_end else postprocessing_weights(model),
    )


def _check_outputs(
    network: ExportableNetwork,
    exported: Network,
    shapes: list[tuple[int, int, int]],
    precision: str,
    images: list[torch.Tensor],
) -> tuple[dict[str, float], int | None]:
    """Compare and print, and raise SelfCheckError above the precision's bound.

    Return the figures with the bounds and the share of compared instances, and the number of compared detections where
    the network returns detections.
    """
    bound, mask_bound, num_compared, share = BOUNDS[precision], None, None, 1.0
    if network.max_detections:
        mask_bound = MASK_BOUNDS[precision]
        worst, num_compared = end_to_end_differences(network, exported, shapes, bound, images)
    else:
        worst = output_differences(network, exported, shapes, precision)
        share = compared_share(network.model.ranks_instances, precision)
    shown = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    allowed = "their AP decides" if bound is None else f"at most {bound:g}"
    if mask_bound is not None:
        allowed += f", worst_mask {mask_bound:g}"
    if share < 1:
        allowed += f"; of the {100 * share:g} % of the instances that differ least"
    others = f" and {len(images)} batches of --test-images" if images else ""
    print(f"Largest differences from eager float32 at {_shown(shapes)}{others}: {shown} ({allowed})")
    check_differences(worst, float("inf") if bound is None else bound, mask_bound)
    conditions = {"bound": bound, "mask_bound": mask_bound, "compared_share": share if share < 1 else None}
    return worst | {name: value for name, value in conditions.items() if value is not None}, num_compared


def _mask_ap(cfg: CfgNode, model: ExportedSegmenter) -> float:
    """Return the AP of the masks on DATASETS.TEST, in percent; NaN without an AP."""
    with tempfile.TemporaryDirectory() as folder:
        own_cfg = _resizing_to_fit(cfg, model.metadata)
        own_cfg.OUTPUT_DIR = folder
        return evaluate(own_cfg, model).get("segm", {}).get("AP", math.nan)


def _resizing_to_fit(cfg: CfgNode, metadata: ExportMetadata) -> CfgNode:
    """Return a copy of a config with which images fit into the file's size, where it has one."""
    cfg = cfg.clone()
    cfg.defrost()
    if metadata.size and metadata.size_divisibility:
        cfg.INPUT.FIT_SIZE_TEST = list(metadata.size)
    return cfg


def _with(metadata: ExportMetadata, **changes: object) -> ExportMetadata:
    return ExportMetadata(**{**vars(metadata), **changes})


def _shown(shapes: list[tuple[int, int, int]]) -> str:
    return ", ".join(f"{batch}x{height}x{width}" for batch, height, width in shapes)


def _files(path: Path) -> list[Path]:
    return [file for file in path.parent.glob(f"{path.stem}.*") if path.suffix == ".xml" or file == path]
