"""From pictures to instances, through the very pixels that the evaluation gives the model."""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.data.catalog import Metadata
from detectron2.evaluation import inference_context
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from sparseinst.data.coco_json import ClassInfo, class_info

CHANNEL_ORDERS = ("RGB", "BGR")

logger = logging.getLogger(__name__)


class ImageReadError(ValueError):
    """A picture that cannot be read, or an array that is not a picture."""


class Predictor:
    """Instances of pictures, given as paths or as arrays.

    ``Predictor(cfg)`` builds the model and loads ``MODEL.WEIGHTS``; ``Predictor(cfg, model=model)`` takes a model as it
    is. A picture is read, resized and batched (alone, since results depend on padding) as
    ``DatasetMapper(cfg, is_train=False)`` and Detectron2's test loader do it, so predictions equal the evaluation's.

    The class names come from the checkpoint's entry "classes", else from ``classes.json`` beside it, else from the
    metadata of ``DATASETS.TEST[0]`` or ``DATASETS.TRAIN[0]``, else they are "class 0", "class 1", ...

    Args:
        model: any Detectron2 model whose output holds ``instances``. It runs in evaluation mode, on its own device; its
            mode is restored after each call.
        augmentations: what resizes the picture.
        input_format: channel order that the model was trained with, "RGB" or "BGR" (``INPUT.FORMAT``).
        classes: names and the data set's category ids, one for each class that the model predicts.

    Attributes:
        model: the model.
        classes: as given.
        metadata: the class names as Detectron2's visualizers take them.

    Raises:
        ValueError: ``INPUT.FORMAT`` is neither; ``MODEL.WEIGHTS`` is not there, belongs to another number of classes or
            lacks parameters of the model.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        augmentations: Sequence[T.Augmentation | T.Transform],
        input_format: str,
        classes: ClassInfo,
    ) -> None:
        if input_format not in CHANNEL_ORDERS:
            raise ValueError(f"INPUT.FORMAT is {input_format!r}; the predictor knows {' and '.join(CHANNEL_ORDERS)}")
        self.model = model
        self.classes = classes
        self.metadata = Metadata(name="sparseinst_predictor", thing_classes=list(classes.names))
        self._augmentations = T.AugmentationList(list(augmentations))
        self._input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module | None = None) -> dict:
        checkpoint: dict = {}
        missing: list[str] = []
        if model is None:
            model = build_model(cfg)
            model.eval()
            checkpoint, missing = _load_weights(model, cfg.MODEL.WEIGHTS)
        classes = _find_classes(cfg, checkpoint.get("classes"))
        if missing:
            num_parameters = len(list(model.parameters()))
            raise ValueError(
                f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} lacks {len(missing)} of the model's {num_parameters} parameters, "
                f"or has them in another shape; the first: {', '.join(missing[:3])}. "
                "Give the checkpoint of a trained model and the config file that it was trained with"
            )
        return {
            "model": model,
            "augmentations": detection_utils.build_augmentation(cfg, is_train=False),
            "input_format": cfg.INPUT.FORMAT,
            "classes": classes,
        }

    @property
    def iam_normalization(self) -> str:
        """How the model normalises its activation maps, "sigmoid" or "softmax"; "sigmoid" where it does not say."""
        for module in self.model.modules():
            if hasattr(module, "iam_normalization"):
                return module.iam_normalization
        return "sigmoid"

    def __call__(self, images: Iterable[str | os.PathLike | np.ndarray], channel_order: str = "BGR") -> list[Instances]:
        """Predict the instances of each picture.

        Args:
            images: paths, or arrays (height, width, 3) uint8.
            channel_order: of the arrays: "BGR", as OpenCV reads them, or "RGB".

        Returns:
            For each picture its instances, on the CPU, in the picture's own size, best score first: ``pred_boxes``,
            ``pred_masks``, ``scores``, ``pred_classes``, and ``pred_iams`` with MODEL.SPARSE_INST.DECODER.OUTPUT_IAM.

        Raises:
            ImageReadError: a picture cannot be read, or an array is not a picture.
            ValueError: another channel order; a single picture in place of several.
        """
        if isinstance(images, str | os.PathLike | np.ndarray):
            raise ValueError("Predictor takes a list of pictures; put the one picture into a list")
        return list(self.stream(images, channel_order))

    def stream(
        self, images: Iterable[str | os.PathLike | np.ndarray], channel_order: str = "BGR"
    ) -> Iterator[Instances]:
        """Predict picture by picture, each when it is asked for; arguments and errors are those of a call."""
        if channel_order not in CHANNEL_ORDERS:
            raise ValueError(f"channel_order is {channel_order!r}; it must be one of {', '.join(CHANNEL_ORDERS)}")
        for image in images:
            if isinstance(image, str | os.PathLike):
                pixels = read_image(image, self._input_format)
            else:
                _check_array(image)
                pixels = image if channel_order == self._input_format else image[:, :, ::-1]
            yield self._predict(pixels)

    def _predict(self, pixels: np.ndarray) -> Instances:
        height, width = pixels.shape[:2]
        augmentation_input = T.AugInput(pixels)
        self._augmentations(augmentation_input)
        image = torch.as_tensor(np.ascontiguousarray(augmentation_input.image.transpose(2, 0, 1)))
        with torch.no_grad(), inference_context(self.model):
            output = self.model([{"image": image, "height": height, "width": width}])[0]
        return output["instances"].to("cpu")


def read_image(path: str | os.PathLike, channel_order: str = "RGB") -> np.ndarray:
    """Read a picture file as the evaluation does: turned as its EXIF entry says.

    Args:
        path: picture file, of any format that Pillow reads.
        channel_order: "RGB" or "BGR".

    Returns:
        (height, width, 3) uint8.

    Raises:
        ImageReadError: the file is missing, no picture, or damaged; the message names it.
    """
    try:
        return detection_utils.read_image(os.fspath(path), format=channel_order)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        # Pillow tells of damaged files by all of these.
        raise ImageReadError(f"Cannot read the picture {os.fspath(path)}: {error}") from error


def to_coco_results(instances: Instances, image_id: int, category_ids: Sequence[int]) -> list[dict]:
    """The instances of one image in COCO's results format.

    Args:
        instances: what the predictor returns.
        image_id: COCO's image id.
        category_ids: COCO's category id of each class.

    Returns:
        A dict for each instance with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels), ``score``
        and ``segmentation`` (compressed RLE with ``counts`` a str); only plain types, ready for ``json.dump``.
    """
    results = instances_to_coco_json(instances, image_id)
    for result in results:
        result["category_id"] = category_ids[result["category_id"]]
    return results


def _check_array(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray):
        raise ImageReadError(f"A picture must be a path or an array, found {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ImageReadError(
            "A picture's array must be (height, width, 3) uint8 with at least one pixel, "
            f"found {image.shape} {image.dtype}"
        )


def check_weights_file(weights: str) -> None:
    """Check that MODEL.WEIGHTS, unless it is empty or a URL, names a file. Raises ValueError."""
    if weights and "://" not in weights and not Path(weights.split("?")[0]).is_file():
        raise ValueError(f"MODEL.WEIGHTS names {weights!r}, and there is no such file")


@contextlib.contextmanager
def explained_download(weights: str) -> Iterator[None]:
    """Turn a failed download of MODEL.WEIGHTS into a ValueError that says what to do instead."""
    try:
        yield
    except URLError as error:
        raise ValueError(
            f"MODEL.WEIGHTS {weights} cannot be downloaded ({error.reason}). Name a file that is on this machine, or "
            'set MODEL.WEIGHTS "" to start from random weights'
        ) from error


def _load_weights(model: nn.Module, weights: str) -> tuple[dict, list[str]]:
    """Load a checkpoint; returns what else it holds, and the names of the parameters that it did not fill."""
    if not weights:
        logger.warning("MODEL.WEIGHTS is empty: THE WEIGHTS ARE RANDOM, and so is everything that is predicted")
        return {}, []
    check_weights_file(weights)
    missing: list[str] = []

    def keep_missing(_: nn.Module, incompatible_keys) -> None:
        missing.extend(incompatible_keys.missing_keys)

    # The checkpointer only logs what it did not find; a model half random would predict nonsense without a word.
    handle = model.register_load_state_dict_post_hook(keep_missing)
    try:
        with explained_download(weights):
            checkpoint = DetectionCheckpointer(model).load(weights)
    finally:
        handle.remove()
    parameter_names = {name for name, _ in model.named_parameters()}
    return checkpoint, [name for name in missing if name in parameter_names]


def _find_classes(cfg: CfgNode, saved: dict | None) -> ClassInfo:
    num_classes = cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES
    weights = cfg.MODEL.WEIGHTS
    classes_file = Path(weights).parent / "classes.json"
    classes = None
    if saved is not None:
        source, classes = f"The checkpoint {weights}", ClassInfo(**saved)
    elif weights and classes_file.is_file():
        source, classes = str(classes_file), ClassInfo.load(classes_file)
    if classes is not None:
        if len(classes.names) != num_classes:
            raise ValueError(
                f"{source} has {len(classes.names)} classes and MODEL.SPARSE_INST.DECODER.NUM_CLASSES is "
                f"{num_classes}; set it to the number that the model was trained with"
            )
        return classes
    for dataset_name in (*cfg.DATASETS.TEST[:1], *cfg.DATASETS.TRAIN[:1]):
        # The data need not be on this machine; then, where its metadata is not known either, it tells nothing.
        with contextlib.suppress(ValueError):
            classes = class_info(dataset_name)
            if len(classes.names) == num_classes:
                return classes
    return ClassInfo([f"class {index}" for index in range(num_classes)], list(range(num_classes)))
