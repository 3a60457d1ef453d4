"""Predict instances from the same pixels that the evaluation gives the model."""

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn

from sparseinst import config
from sparseinst.checkpoint import checkpointer_from_config
from sparseinst.checkpoint.trained_keys import follow_checkpoint
from sparseinst.data.augmentations import build_test_augmentations, model_input
from sparseinst.data.coco_json import ClassInfo, class_info
from sparseinst.data.images import MAX_IMAGE_PIXELS, ImageReadError, check_channel_order, read_image
from sparseinst.runtime.exported_file import is_exported
from sparseinst.runtime.exported_model import exported_config, follow_exported, load_exported
from sparseinst.runtime.optimize import optimize_as_configured
from sparseinst.visualization import iam_normalization

logger = logging.getLogger(__name__)


def _accept_file(init: Callable) -> Callable:
    """Let ``__init__`` take the path of an exported file in place of a config."""

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs) -> None:
        if args and isinstance(args[0], str | os.PathLike):
            if not is_exported(args[0]):
                raise ValueError(
                    f"Predictor takes a config, or a file of `sparseinst export`; {os.fspath(args[0])!r} is neither. "
                    "For other weights: Predictor(load_config(CONFIG_FILE, ['MODEL.WEIGHTS', FILE]))"
                )
            args = (exported_config(args[0]), *args[1:])
        init(self, *args, **kwargs)

    return wrapper


class Predictor:
    """Predict the instances of images, given as paths or as arrays. Several threads may share one Predictor.

    ``Predictor(cfg)`` builds the model and loads ``MODEL.WEIGHTS``; ``Predictor(cfg, model=model)`` uses that model
    unchanged; ``Predictor("model.onnx")`` runs a file of ``sparseinst export``, in its engine, with its own classes,
    sizes and thresholds. Images are read, resized and run one by one (results depend on padding) as by
    ``DatasetMapper(cfg, is_train=False)`` and Detectron2's test loader, so predictions equal the evaluation's.

    The class names come from the checkpoint's entry "classes", else from ``classes.json`` in its folder, else from the
    metadata of ``DATASETS.TEST[0]`` or ``DATASETS.TRAIN[0]``, else they are "class 0", "class 1", ... The numbers of
    classes and of instances come from the checkpoint, unless the user set them.

    Args:
        model: any Detectron2 model whose output has ``instances``; runs in evaluation mode, on its own device; its
            mode is restored after each call.
        augmentations: resize the image.
        input_format: channel order that the model was trained with, "RGB" or "BGR" (``INPUT.FORMAT``).
        classes: names and the data set's category ids, one for each class that the model predicts.
        max_image_pixels: files with more pixels are refused before they are decoded (``INPUT.MAX_IMAGE_PIXELS``).

    Attributes:
        model: the model.
        classes: as given.
        max_image_pixels: as given.
        metadata: the class names for Detectron2's visualizers.

    Raises:
        ValueError: ``INPUT.FORMAT`` is wrong; or ``MODEL.WEIGHTS`` does not exist, cannot be read, has another number
            of classes or lacks tensors of the model.
    """

    @_accept_file
    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        augmentations: Sequence[T.Augmentation | T.Transform],
        input_format: str,
        classes: ClassInfo,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        check_channel_order(input_format, "INPUT.FORMAT")
        self.model = model
        self.classes = classes
        self.metadata = Metadata(name="sparseinst_predictor", thing_classes=list(classes.names))
        self._augmentations = T.AugmentationList(list(augmentations))
        self._input_format = input_format
        self.max_image_pixels = max_image_pixels
        self._lock = threading.Lock()
        self._num_running = 0
        self._was_training = False

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module | None = None) -> dict:
        checkpoint: dict = {}
        if model is None:
            # The user's config stays as it is.
            cfg = cfg.clone()
            cfg.defrost()
        if model is None and is_exported(cfg.MODEL.WEIGHTS):
            follow_exported(cfg)
            model = load_exported(cfg)
            names, ids = model.metadata.class_names, model.metadata.category_ids
            checkpoint = {"classes": {"names": list(names), "category_ids": list(ids)}}
        elif model is None:
            for note in follow_checkpoint(cfg, cfg.MODEL.WEIGHTS):
                logger.info("%s", note)
            model = build_model(cfg)
            model.eval()
            checkpoint = checkpointer_from_config(cfg, model).load(cfg.MODEL.WEIGHTS)
            model = optimize_as_configured(cfg, model)
        classes = find_classes(cfg, checkpoint.get("classes"), getattr(model, "class_names", None))
        return {
            "model": model,
            "augmentations": build_test_augmentations(cfg),
            "input_format": cfg.INPUT.FORMAT,
            "classes": classes,
            "max_image_pixels": cfg.INPUT.MAX_IMAGE_PIXELS,
        }

    @property
    def iam_normalization(self) -> str:
        """Return the model's normalization of activation maps: "sigmoid", also where it has none, or "softmax"."""
        return iam_normalization(self.model)

    def __call__(self, images: Iterable[str | os.PathLike | np.ndarray], channel_order: str = "BGR") -> list[Instances]:
        """Predict the instances of each image.

        Args:
            images: paths, or arrays (height, width, 3) uint8.
            channel_order: of the arrays: "BGR", as OpenCV reads them, or "RGB".

        Returns:
            For each image its instances, on the CPU, in the image's own size, best score first: ``pred_boxes``,
            ``pred_masks``, ``scores``, ``pred_classes``, and ``pred_iams`` where the config requests activation maps.
            ``pred_masks`` is boolean (n, height, width), or RLEMasks with MODEL.OUTPUT.MASK_FORMAT "rle", which is for
            large images.

        Raises:
            ImageReadError: an image cannot be read, or an array has another shape or type.
            ValueError: the channel order is unknown; ``images`` is a single image; or boolean masks would take more
                than MODEL.OUTPUT.MAX_MASK_GIB.
        """
        if isinstance(images, str | os.PathLike | np.ndarray):
            raise ValueError("Predictor takes a list of images; put the one image into a list")
        return list(self.stream(images, channel_order))

    def stream(
        self, images: Iterable[str | os.PathLike | np.ndarray], channel_order: str = "BGR"
    ) -> Iterator[Instances]:
        """Yield the instances image by image, predicted on request; arguments and errors as in `__call__`."""
        check_channel_order(channel_order)
        for image in images:
            if isinstance(image, str | os.PathLike):
                pixels = read_image(image, self._input_format, self.max_image_pixels)
            else:
                _check_array(image)
                pixels = image if channel_order == self._input_format else image[:, :, ::-1]
            yield self._predict(pixels)

    def _predict(self, pixels: np.ndarray) -> Instances:
        x = model_input(pixels, self._augmentations)
        with torch.no_grad(), self._evaluation_mode():
            output = self.model([x])[0]
        return output["instances"].to("cpu")

    @contextlib.contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Keep the model in evaluation mode until the last thread is done, then restore its mode."""
        with self._lock:
            if self._num_running == 0:
                self._was_training = self.model.training
                self.model.eval()
            self._num_running += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_running -= 1
                if self._num_running == 0:
                    self.model.train(self._was_training)


def _check_array(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray):
        raise ImageReadError(f"An image must be a path or an array, found {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageReadError(
            "An image array must be (height, width, 3) uint8 with at least one pixel, "
            f"found {image.shape} {image.dtype}"
        )


def find_classes(cfg: CfgNode, saved: object, names: Sequence[str] | None) -> ClassInfo:
    """Find the classes of a model; see `Predictor`.

    Args:
        cfg: MODEL.WEIGHTS and DATASETS are read.
        saved: the checkpoint's entry "classes"; None where it has none.
        names: of the classes, where the model has them.

    Raises:
        ValueError: the entry or classes.json is wrong, or has another number of classes than the model.
    """
    key, num_classes = config.num_classes(cfg) or (None, None)
    weights = cfg.MODEL.WEIGHTS
    classes_file = Path(weights).parent / "classes.json"
    classes = None
    if saved is not None:
        source = f"The checkpoint {weights}"
        classes = ClassInfo.from_content(saved, source)
    elif weights and classes_file.is_file():
        source, classes = str(classes_file), ClassInfo.load(classes_file)
    if classes is not None:
        if num_classes is not None and len(classes.names) != num_classes:
            raise ValueError(
                f"{source} has {len(classes.names)} classes and {key} is "
                f"{num_classes}; set it to the number that the model was trained with"
            )
        return classes
    for dataset_name in (*cfg.DATASETS.TEST[:1], *cfg.DATASETS.TRAIN[:1]):
        # The data may be missing on this machine, and its metadata unknown.
        with contextlib.suppress(ValueError):
            classes = class_info(dataset_name)
            if names is not None:
                return ClassInfo(list(names), classes.category_ids_of(names, dataset_name))
            if num_classes in (None, len(classes.names)):
                return classes
    if names is not None:
        return ClassInfo(list(names), list(range(1, len(names) + 1)))
    # Without a key there are names for more classes than any data set has.
    num_classes = 10_000 if num_classes is None else num_classes
    return ClassInfo([f"class {index}" for index in range(num_classes)], list(range(num_classes)))
