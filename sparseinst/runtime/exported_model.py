"""Run an exported file as the model that it was made from: `load_exported`."""

import base64
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from torch.nn import functional as F

from sparseinst import config
from sparseinst.config import load_config
from sparseinst.modeling.meta_arch import InstanceSegmenter, Network
from sparseinst.runtime.batches import in_batches
from sparseinst.runtime.export import DEFORMABLE_NOTE, MIN_CELLS
from sparseinst.runtime.exported_file import ENGINES, ExportMetadata, is_exported, read_metadata
from sparseinst.runtime.onnxruntime import ONNXRuntimeNetwork
from sparseinst.runtime.openvino import OpenVINONetwork, read_program
from sparseinst.runtime.optimize import OptimizedSegmenter

logger = logging.getLogger(__name__)


class ExportedSegmenter(OptimizedSegmenter):
    """Run an exported network between the pre- and post-processing of its model.

    Args:
        model: preprocesses and postprocesses; its weights are not used.
        network: images as the file takes them to the network's dict.
        metadata: of the file.
        precision: of the engine, see `open_network`.
    """

    def __init__(
        self, model: InstanceSegmenter, network: Network, metadata: ExportMetadata, precision: str = "float32"
    ) -> None:
        # An int8 file has layers that are not quantized, and the engine computes those in its precision.
        names = [name for name in dict.fromkeys((metadata.precision, precision)) if name != "float32"]
        super().__init__(model, network, " and ".join(names) or "float32")
        self.metadata = metadata

    @property
    def class_names(self) -> Sequence[str]:
        """Return the names of the classes that the network predicts."""
        return self.metadata.class_names

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalize and pad as the model does, then as the file asks for: to its size or smallest size, back to uint8.

        Raises:
            ValueError: an image is larger than the file's fixed size.
        """
        images = self.model.preprocess(batched_inputs)
        tensor = images.tensor
        # Files of earlier versions do not hold the smallest side.
        least = self.metadata.size or [self.metadata.min_side or MIN_CELLS * self.metadata.size_divisibility] * 2
        missing = [size - side for size, side in zip(least, tensor.shape[-2:])]
        if self.metadata.size and min(missing) < 0:
            raise ValueError(
                f"An image is {tuple(images.image_sizes[0])} pixels after the resize, and the exported file takes "
                f"{tuple(self.metadata.size)}: set INPUT.FIT_SIZE_TEST to that size"
            )
        if max(missing) > 0:
            tensor = F.pad(tensor, (0, max(0, missing[1]), 0, max(0, missing[0])))
        if self.metadata.input == "image":
            # Exact for pixels. YOLACT's resize to float32 is rounded by up to 0.5 levels. The padding becomes the
            # mean, rounded.
            tensor = (tensor * self.model.pixel_std + self.model.pixel_mean).round().clamp(0, 255).to(torch.uint8)
        return ImageList(tensor, images.image_sizes)


def config_of_run(config_file: str, opts: Sequence[str], imports: Sequence[str] = ()) -> CfgNode:
    """Load the config of a command; without a config file, that of the exported file that MODEL.WEIGHTS names.

    Args:
        config_file: as of `load_config`; or "".
        opts: KEY VALUE overrides.
        imports: as of `load_config`.

    Raises:
        ValueError: as `load_config` and `exported_config`; neither a config file nor an exported file is given; or
            there are imports without a config file.
    """
    weights = dict(zip(opts[::2], opts[1::2])).get("MODEL.WEIGHTS", "")
    if config_file:
        return load_config(config_file, opts, imports=imports)
    if not is_exported(weights):
        raise ValueError(
            "--config-file is missing: a YAML file, or a name such as sparse_inst_r50_giam. Only an exported file "
            "(MODEL.WEIGHTS model.onnx) needs none"
        )
    if imports:
        raise ValueError("--import needs --config-file: the config inside an exported file runs no modules")
    return exported_config(weights, opts)


def exported_config(path: str | os.PathLike, opts: Sequence[str] = ()) -> CfgNode:
    """Return the config that an exported file holds, with MODEL.WEIGHTS naming the file.

    Args:
        path: of the file.
        opts: KEY VALUE overrides.

    Raises:
        ValueError: the file cannot be read; its config is not valid here; or it has IMPORTS, whose code a file from
            elsewhere must not run: pass the config file besides.
    """
    metadata = read_metadata(path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{Path(path).name}.yaml"
        file.write_text(metadata.config, encoding="utf-8")
        try:
            # Files of earlier versions hold the PRECISION of the model in PyTorch.
            opts = ["RUNTIME.PRECISION", "float32", *opts, "MODEL.WEIGHTS", os.fspath(path)]
            return load_config(str(file), opts, allow_imports=False)
        except ValueError as error:
            raise ValueError(f"{str(error).replace(str(file), str(path))}. Pass your own config file too") from error


def has_imports(path: str | os.PathLike) -> bool:
    """Return whether the config that an exported file holds has IMPORTS. Raise ValueError where it cannot be read."""
    try:
        content = yaml.safe_load(read_metadata(path).config)
    except yaml.YAMLError as error:
        raise ValueError(f"The config inside {path} is not YAML") from error
    return isinstance(content, dict) and bool(content.get("IMPORTS"))


def follow_exported(cfg: CfgNode) -> None:
    """Resize test images to the fixed size of the exported file that MODEL.WEIGHTS names, in place.

    Raises:
        ValueError: the file cannot be read.
    """
    metadata = read_metadata(cfg.MODEL.WEIGHTS)
    # Models whose own preprocessing makes the size have no divisibility.
    if metadata.size and metadata.size_divisibility:
        cfg.INPUT.FIT_SIZE_TEST = list(metadata.size)


def load_exported(cfg: CfgNode) -> ExportedSegmenter:
    """Return the model that runs the exported file of MODEL.WEIGHTS with the config's pre- and post-processing.

    Args:
        cfg: of `exported_config`, or the user's own after `follow_exported`; not changed. RUNTIME.ENGINE,
            INTRA_OP_THREADS and PROVIDERS choose the engine.

    Raises:
        ValueError: the file cannot be read or run, or the config is of another model.
        ImportError: the engine's package is not installed.
    """
    path = cfg.MODEL.WEIGHTS
    metadata = read_metadata(path)
    if metadata.max_detections:
        raise ValueError(
            f"{path} was exported with --end-to-end, for runtimes without Python. Export it without that flag to run "
            "it here"
        )
    _check_config(cfg, metadata)
    # The parameters are freed, except for those of the post-processing: the rest of the model is small.
    skeleton_cfg = cfg.clone()
    skeleton_cfg.defrost()
    skeleton_cfg.MODEL.WEIGHTS = ""
    skeleton_cfg.MODEL.DEVICE = "cuda" if ENGINES[Path(path).suffix] == "tensorrt" else "cpu"
    model = build_model(skeleton_cfg).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        is_used = name.split(".")[0] in model.postprocessing_modules
        parameter.data = _saved_tensor(path, metadata, name, parameter) if is_used else parameter.new_empty(0)
    keys = cfg.RUNTIME
    network = open_network(path, metadata, keys.ENGINE, keys.INTRA_OP_THREADS, keys.PROVIDERS, keys.PRECISION)
    logger.info("%s: %s, exported by version %s", path, metadata.meta_architecture, metadata.version)
    return ExportedSegmenter(model, network, metadata, keys.PRECISION)


def open_network(
    path: str | os.PathLike,
    metadata: ExportMetadata,
    engine: str,
    threads: int,
    providers: Sequence[str],
    precision: str = "float32",
) -> Network:
    """Open the network of an exported file in its engine.

    Args:
        path: of the file.
        metadata: of the file.
        engine: "torch": the one of the file's format; "openvino" also reads ONNX.
        threads: of one image; 0: as many as PyTorch has.
        providers: of ONNX Runtime.
        precision: "float32": that of the file; "bfloat16": of OpenVINO, where the processor has it.

    Raises:
        ValueError: the engine does not read the file or lacks the precision, or the processor has no bfloat16.
        ImportError: the engine's package is not installed.
    """
    suffix = Path(path).suffix
    own = ENGINES[suffix]
    engine = own if engine == "torch" else engine
    if engine != own and (engine, suffix) != ("openvino", ".onnx"):
        raise ValueError(f"RUNTIME.ENGINE {engine} does not read {path}; leave it out: {suffix} files run in {own}")
    precisions = ("float32", "bfloat16") if engine == "openvino" else ("float32",)
    if precision not in precisions:
        raise ValueError(
            f"RUNTIME.PRECISION is {precision}; {path} runs in {engine}, whose precisions are {', '.join(precisions)}: "
            "set RUNTIME.PRECISION float32. --precision of `sparseinst export` makes files of float16 and int8"
        )
    if engine == "onnxruntime":
        if metadata.has_deform_conv and "CUDAExecutionProvider" in providers:
            logger.warning("RUNTIME.PROVIDERS %s, and %s: %s", list(providers), path, DEFORMABLE_NOTE)
        return ONNXRuntimeNetwork(path, threads, providers, metadata.batch)
    if engine == "openvino":
        if suffix == ".onnx" and metadata.has_deform_conv:
            # OpenVINO would end the process.
            raise ValueError(
                f"OpenVINO cannot read the deformable convolutions of {path}: export with --format openvino, or leave "
                "RUNTIME.ENGINE out"
            )
        return OpenVINONetwork(read_program(path), threads, precision, metadata.batch)
    if engine == "tensorrt":
        from sparseinst.runtime.tensorrt import TensorRTNetwork

        module = TensorRTNetwork(path)
        return lambda images: in_batches(module, images, metadata.batch, metadata.max_batch)
    try:
        module = torch.export.load(path).module()
    # A damaged file raises errors of many classes.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"PyTorch cannot read {path}: {reason}") from error
    return lambda images: in_batches(module, images, metadata.batch)


def postprocessing_weights(model: InstanceSegmenter) -> dict[str, str]:
    """Return the parameters of a model's post-processing, as `ExportMetadata` holds them."""
    return {
        name: base64.b64encode(parameter.detach().cpu().float().numpy().tobytes()).decode()
        for name, parameter in model.named_parameters()
        if name.split(".")[0] in model.postprocessing_modules
    }


def _saved_tensor(path: str, metadata: ExportMetadata, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Return a tensor of `postprocessing_weights` like a parameter. Raise ValueError where the file lacks it."""
    content = bytearray(base64.b64decode(metadata.postprocessing_weights.get(name, "")))
    if len(content) != 4 * parameter.numel():
        raise ValueError(f"{path} lacks the tensor {name} of the post-processing: export the model again")
    return torch.frombuffer(content, dtype=torch.float32).reshape(parameter.shape).to(parameter.device)


def _check_config(cfg: CfgNode, metadata: ExportMetadata) -> None:
    """Raise ValueError where a config is of another network; the message names the first key that differs."""
    for key, value, exported in _compared_values(cfg, metadata):
        if value != exported:
            raise ValueError(
                f"{key} is {value}, and the network in {cfg.MODEL.WEIGHTS} was exported with {exported}: leave that "
                "key or the config file out, or give the config that was exported"
            )


def _compared_values(cfg: CfgNode, metadata: ExportMetadata) -> Iterator[tuple[str, object, object]]:
    """Yield the keys that a config and its exported file must share, with both values."""
    yield "MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, metadata.meta_architecture
    yield "INPUT.FORMAT", cfg.INPUT.FORMAT, metadata.channel_order
    yield "MODEL.PIXEL_MEAN", list(cfg.MODEL.PIXEL_MEAN), list(metadata.pixel_mean)
    yield "MODEL.PIXEL_STD", list(cfg.MODEL.PIXEL_STD), list(metadata.pixel_std)
    if (num_classes := config.num_classes(cfg)) is not None:
        yield (*num_classes, len(metadata.class_names))
    meta_architecture = config.meta_architecture(cfg)
    try:
        saved = yaml.safe_load(metadata.config)
        maps_key = getattr(meta_architecture, "activation_maps_key", None)
        if maps_key and config.value(cfg, maps_key):
            yield maps_key, True, config.value(saved, maps_key)
        # Without tuples, as it was saved.
        own = yaml.safe_load(cfg.dump())
        for key in getattr(meta_architecture, "geometry_keys", ()):
            yield key, config.value(own, key), config.value(saved, key)
    except (yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{cfg.MODEL.WEIGHTS} holds no config of this model: export the model again") from error
