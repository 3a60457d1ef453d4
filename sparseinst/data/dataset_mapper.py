"""From Detectron2's dataset dicts to the model's input: image tensor and rasterised ground truth."""

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.logger import log_first_n
from pycocotools import mask as coco_mask

_logger = logging.getLogger(__name__)

# The published crop recipe: short sides in pixels before the crop, and how often it is applied.
_SHORT_SIDES_BEFORE_CROP = (400, 500, 600)
_CROP_PROBABILITY = 0.5
# In pixels; what lies further out is a broken file, and would take gigabytes to rasterise.
_MAX_COORDINATE = 1e5


class SparseInstDatasetMapper:
    """Detectron2's `DatasetMapper` for instance masks of any format, rasterised in the data loader's worker.

    Polygons, compressed and uncompressed RLE are read whatever `INPUT.MASK_FORMAT` says, also mixed in one image.
    Polygons are transformed as polygons and rasterised once, at the final size; RLE is transformed as a bitmask.
    What a crop cuts off is cut off by the rasterisation: `CropTransform.apply_polygons` (shapely) would drop a part of
    a self-crossing outline, fill the hole of an outline that touches itself, and fail on fewer than three points.
    """

    @configurable
    def __init__(self, is_train: bool, *, augmentations: list[T.Augmentation | T.Transform], image_format: str) -> None:
        """
        Args:
            is_train: whether ground truth is wanted.
            augmentations: applied in this order.
            image_format: channel order of the image, as `detection_utils.read_image` names it.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        _logger.info("Augmentations in %s: %s", "training" if is_train else "inference", augmentations)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        augmentations = build_train_augmentations(cfg) if is_train else detection_utils.build_augmentation(cfg, False)
        return {"is_train": is_train, "augmentations": augmentations, "image_format": cfg.INPUT.FORMAT}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read and transform one image and its ground truth.

        Args:
            dataset_dict: one image in Detectron2's standard format; not modified.

        Returns:
            The dict without `annotations`, with `height` and `width` of the file, and with `image`, uint8 (3, H, W).
            In training also `instances` of size (H, W) with `gt_boxes` (tight boxes of the masks), `gt_classes`
            (int64) and `gt_masks` (BitMasks): all three also where no instance is left. Crowd annotations, and
            instances without a visible pixel, are left out.

        Raises:
            ValueError: the image cannot be read or is of another size than the dict says, or an annotation is broken;
                the message names the file, and the annotation.
        """
        result = {key: value for key, value in dataset_dict.items() if key != "annotations"}
        file_name = result["file_name"]
        try:
            image = detection_utils.read_image(file_name, format=self.image_format)
        except OSError as error:
            raise ValueError(f"Cannot read the image {file_name}: {error}") from error
        detection_utils.check_image_size(result, image)
        source_size = image.shape[:2]

        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        result["image"] = torch.from_numpy(np.array(aug_input.image.transpose(2, 0, 1), order="C"))
        if self.is_train:
            annotations = dataset_dict.get("annotations", [])
            image_size = aug_input.image.shape[:2]
            result["instances"] = _build_instances(annotations, transforms, source_size, image_size, file_name)
        return result


def build_train_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """The published recipe: flip; with INPUT.CROP.ENABLED half of the images zoomed and cropped; resize.

    Raises:
        ValueError: a value of INPUT.RANDOM_FLIP, INPUT.CROP or INPUT.MIN_SIZE_TRAIN(_SAMPLING) that has no meaning.
    """
    flip = cfg.INPUT.RANDOM_FLIP
    if flip not in ("none", "horizontal", "vertical"):
        raise ValueError(f"INPUT.RANDOM_FLIP is {flip!r}; expected 'none', 'horizontal' or 'vertical'")
    sampling, min_sizes = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING, cfg.INPUT.MIN_SIZE_TRAIN
    if sampling not in ("choice", "range"):
        raise ValueError(f"INPUT.MIN_SIZE_TRAIN_SAMPLING is {sampling!r}; expected 'choice' or 'range'")
    if sampling == "range" and not isinstance(min_sizes, int) and len(min_sizes) != 2:
        raise ValueError(f"INPUT.MIN_SIZE_TRAIN is {min_sizes}; INPUT.MIN_SIZE_TRAIN_SAMPLING 'range' takes two values")

    augmentations = []
    if flip != "none":
        augmentations.append(T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical"))
    if cfg.INPUT.CROP.ENABLED:
        crop_type, crop_size = cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE
        crop_types = ("relative", "relative_range", "absolute", "absolute_range")
        if crop_type not in crop_types:
            raise ValueError(f"INPUT.CROP.TYPE is {crop_type!r}; expected one of {crop_types}")
        in_pixels = crop_type.startswith("absolute")
        if len(crop_size) != 2 or not all(
            value > 0 and (value == int(value) if in_pixels else value <= 1) for value in crop_size
        ):
            expected = "two whole numbers of pixels" if in_pixels else "two fractions in (0, 1]"
            raise ValueError(f"INPUT.CROP.SIZE is {crop_size}; INPUT.CROP.TYPE {crop_type!r} takes {expected}")
        if crop_type == "absolute_range" and crop_size[0] > crop_size[1]:
            raise ValueError(f"INPUT.CROP.SIZE is {crop_size}; INPUT.CROP.TYPE 'absolute_range' takes (least, most)")
        zoom = T.ResizeShortestEdge(_SHORT_SIDES_BEFORE_CROP, sample_style="choice")
        zoom_and_crop = T.AugmentationList([zoom, T.RandomCrop(crop_type, crop_size)])
        augmentations.append(T.RandomApply(zoom_and_crop, prob=_CROP_PROBABILITY))
    augmentations.append(T.ResizeShortestEdge(min_sizes, cfg.INPUT.MAX_SIZE_TRAIN, sampling))
    return augmentations


class _Window(NamedTuple):
    """A part of an image-sized mask, outside of which the mask is empty."""

    mask: np.ndarray  # bool (h, w)
    top: int
    left: int

    def shrink(self) -> "_Window | None":
        """The smallest window with the same pixels, or None where there are none."""
        rows = np.flatnonzero(self.mask.any(axis=1))
        if len(rows) == 0:
            return None
        columns = np.flatnonzero(self.mask.any(axis=0))
        inner = self.mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return _Window(inner, self.top + int(rows[0]), self.left + int(columns[0]))

    def box(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) in pixels, x1 and y1 one past the last pixel."""
        height, width = self.mask.shape
        return self.left, self.top, self.left + width, self.top + height


def _build_instances(
    annotations: list[dict[str, Any]],
    transforms: T.TransformList,
    source_size: tuple[int, int],
    image_size: tuple[int, int],
    file_name: str,
) -> Instances:
    """Ground truth of one image; sizes are (height, width) before and after the transforms."""
    # A pixel that a padding or a rotation made shows nothing of the source image, whatever a polygon says.
    visible = transforms.apply_segmentation(np.ones(source_size, dtype=np.uint8)) == 1
    windows, classes = [], []
    for index, annotation in enumerate(annotations):
        if annotation.get("iscrowd", 0):
            continue
        place = f"{file_name}, annotation {index}"
        if "id" in annotation:
            place += f" (id {annotation['id']})"
        window = _read_mask(annotation.get("segmentation"), transforms, source_size, image_size, place)
        if window is not None:
            left, top, right, bottom = window.box()
            window = window._replace(mask=window.mask & visible[top:bottom, left:right]).shrink()
        if window is not None:
            windows.append(window)
            classes.append(int(annotation["category_id"]))

    masks = np.zeros((len(windows), *image_size), dtype=bool)
    for mask, window in zip(masks, windows, strict=True):
        left, top, right, bottom = window.box()
        mask[top:bottom, left:right] = window.mask
    instances = Instances(image_size)
    instances.gt_boxes = Boxes(torch.tensor([window.box() for window in windows]).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    instances.gt_masks = BitMasks(torch.from_numpy(masks))
    return instances


def _read_mask(
    segmentation: list | dict | None,
    transforms: T.TransformList,
    source_size: tuple[int, int],
    image_size: tuple[int, int],
    place: str,
) -> _Window | None:
    """The transformed mask of one annotation, None where it has none; messages name `place`."""
    if segmentation is None or (isinstance(segmentation, list) and not segmentation):
        message = f"{place}: no segmentation; such annotations are left out."
        log_first_n(logging.WARNING, message, n=1, name=__name__, key="caller")
        return None
    if isinstance(segmentation, dict):
        mask = np.ascontiguousarray(_decode_rle(segmentation, source_size, place))
        return _Window(transforms.apply_segmentation(mask).astype(bool), 0, 0)
    if isinstance(segmentation, list):
        polygons = [_read_polygon(polygon, place) for polygon in segmentation]
        # Fewer than three points enclose nothing.
        polygons = [transforms.apply_coords(polygon) for polygon in polygons if len(polygon) >= 3]
        return _rasterize(polygons, image_size)
    raise ValueError(f"{place}: a segmentation of type {type(segmentation).__name__}; expected polygons or RLE")


def _decode_rle(rle: dict[str, Any], source_size: tuple[int, int], place: str) -> np.ndarray:
    """uint8 mask of `source_size` from RLE with counts as bytes, text or a list of run lengths."""
    if not {"size", "counts"} <= rle.keys():
        raise ValueError(f"{place}: an RLE mask with keys {sorted(rle)}; expected 'size' and 'counts'")
    if tuple(rle["size"]) != tuple(source_size):
        raise ValueError(
            f"{place}: RLE of size {list(rle['size'])} on an image of {list(source_size)} (height, width); "
            "they must be equal"
        )
    try:
        if isinstance(rle["counts"], list):
            if sum(rle["counts"]) != source_size[0] * source_size[1]:
                raise ValueError(
                    f"run lengths sum to {sum(rle['counts'])}, expected height * width = "
                    f"{source_size[0] * source_size[1]}"
                )
            rle = coco_mask.frPyObjects(rle, *source_size)
        return coco_mask.decode(rle)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: RLE cannot be decoded: {error}") from error


def _read_polygon(polygon: list[float] | np.ndarray, place: str) -> np.ndarray:
    """float64 (P, 2) points x, y: a copy, because transforms work in place."""
    try:
        points = np.array(polygon, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: a polygon that is not a list of numbers: {error}") from error
    if points.ndim == 0 or points.size % 2:
        raise ValueError(
            f"{place}: a polygon of {points.size} numbers; expected segmentation [[x0, y0, x1, y1, ...], ...]"
        )
    outside = ~(np.abs(points) < _MAX_COORDINATE)  # also true for NaN
    if outside.any():
        raise ValueError(
            f"{place}: polygon coordinate {points[outside][0]}; expected finite pixel coordinates of the image"
        )
    return points.reshape(-1, 2)


def _rasterize(polygons: list[np.ndarray], image_size: tuple[int, int]) -> _Window | None:
    """Union of polygons, in pixels of an image of `image_size`, as pycocotools draws them; cut at the image's borders.

    Nothing is drawn right of and below the polygons, because most objects are small. Left of and above them would be
    cheaper still, but pycocotools rounds ties otherwise after a shift.
    """
    if not polygons:
        return None
    points = np.concatenate(polygons)
    limits = np.array(image_size)[::-1]
    left, top = (int(value) for value in np.clip(np.floor(points.min(axis=0)), 0, limits))
    right, bottom = (int(value) for value in np.clip(np.ceil(points.max(axis=0)), 0, limits))
    if right <= left or bottom <= top:
        return None
    rles = coco_mask.frPyObjects([_round_evenly(polygon).reshape(-1) for polygon in polygons], bottom, right)
    mask = coco_mask.decode(coco_mask.merge(rles))[top:, left:]
    return _Window(mask.astype(bool), top, left)


def _round_evenly(coordinates: np.ndarray) -> np.ndarray:
    """Coordinates that pycocotools takes to the nearest fifth of a pixel, also below zero.

    It takes int(5 * x + 0.5), which moves what lies left of or above a crop by a fifth of a pixel towards it.
    """
    fifths = np.floor(5 * coordinates + 0.5)
    return np.where(fifths < 0, (fifths - 0.75) / 5, coordinates)
