"""Predict uploaded images, and write the answers."""

import base64
import contextlib
import io
import time

import cv2
import numpy as np
from detectron2.structures import Instances
from PIL import Image

from sparseinst.data.images import ImageTooLargeError, read_image
from sparseinst.inference import Predictor, draw_instances, to_coco_results
from sparseinst.visualization import heat_maps
from sparseinst.visualization.instances import mask_windows

# libjpeg's limit.
_MAX_JPEG_SIDE = 65_500
# Enlarged masks take four times their memory, and OpenCV copies them.
_MAX_ENLARGED_PIXELS = 2**24


def predict(
    predictor: Predictor, data: bytes, threshold: float, with_maps: bool = False
) -> tuple[np.ndarray, Instances]:
    """Predict an encoded image.

    Args:
        predictor: of the service.
        data: file content of an image.
        threshold: lowest score of the instances, in [0, 1].
        with_maps: return activation maps too, where the model has them.

    Returns:
        The image (height, width, 3) uint8, RGB, and its instances, best score first. The masks of models of this
        project are `RLEMasks`.

    Raises:
        ImageReadError: the data are not an image, or a larger one than allowed.
    """
    image = _read(predictor, data)
    return image, find_instances(predictor, image, threshold, with_maps)


def find_instances(predictor: Predictor, image: np.ndarray, threshold: float, with_maps: bool = False) -> Instances:
    """Predict the instances of an image (height, width, 3) uint8, RGB; arguments and result as in `predict`."""
    model = predictor.model
    options = contextlib.nullcontext()
    if hasattr(model, "output_as"):
        # Masks below the threshold are not computed. The margin allows for rounded scores.
        least = max(model.output.score_threshold, 0.999 * threshold)
        with_maps = with_maps or model.output.with_maps
        options = model.output_as(mask_format="rle", score_threshold=least, with_maps=with_maps)
    with options:
        (instances,) = predictor([image], "RGB")
    return instances[instances.scores >= threshold]


def answer(
    predictor: Predictor, data: bytes, *, threshold: float, masks: str = "rle", with_maps: bool = False,
    image_id: int = 1,
) -> dict:  # fmt: skip
    """Predict an encoded image, and return the answer of POST /predict.

    Args:
        predictor, data, threshold, with_maps: as in `predict`.
        masks: "rle", "polygons" (holes are filled) or "none".
        image_id: of the COCO results.

    Returns:
        Types of JSON only, see :class:`sparseinst.serving.schemas.Prediction`.
    """
    start = time.perf_counter()
    image, instances = predict(predictor, data, threshold, with_maps)
    results = to_coco_results(instances, image_id, predictor.classes.category_ids)
    for result, index in zip(results, instances.pred_classes.tolist()):
        result["category_name"] = predictor.classes.names[index]
    if masks == "none":
        for result in results:
            result.pop("segmentation", None)
    elif masks == "polygons" and results and instances.has("pred_masks"):
        for result, polygons in zip(results, _polygons(instances)):
            result["segmentation"] = polygons
    if with_maps and instances.has("pred_iams"):
        for result, logits in zip(results, instances.pred_iams):
            maps = heat_maps(logits, tuple(logits.shape[-2:]), predictor.iam_normalization)
            result["activation_maps"] = {
                "height": maps.shape[1],
                "width": maps.shape[2],
                "maps": [base64.b64encode(levels).decode() for levels in (maps * 255).round().astype(np.uint8)],
            }
    height, width = image.shape[:2]
    return {
        "image": {"id": image_id, "height": height, "width": width},
        "instances": results,
        "seconds": round(time.perf_counter() - start, 4),
    }


def drawing(predictor: Predictor, data: bytes, *, threshold: float, with_instances: bool = True) -> bytes:
    """Predict an encoded image, and return it as a JPEG with its instances drawn.

    Args:
        predictor, data, threshold: as in `predict`.
        with_instances: False: return the image without a prediction.

    Raises:
        ImageReadError: as `predict`. ImageTooLargeError also where a JPEG cannot have the size.
    """
    image = _read(predictor, data)
    if max(image.shape) > _MAX_JPEG_SIDE:
        raise ImageTooLargeError(
            f"The image has {image.shape[0]} x {image.shape[1]} pixels, and the drawing is a JPEG, whose sides have at "
            f"most {_MAX_JPEG_SIDE}; send a smaller image, or request /predict"
        )
    if with_instances:
        image = draw_instances(image, find_instances(predictor, image, threshold), predictor.metadata)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def _read(predictor: Predictor, data: bytes) -> np.ndarray:
    return read_image(io.BytesIO(data), max_pixels=predictor.max_image_pixels, python_decoders=False)


def _polygons(instances: Instances) -> list[list[list[float]]]:
    """Return the outer outlines of each mask, [x0, y0, x1, y1, ...] in pixels."""
    windows = mask_windows(instances.pred_masks, range(len(instances)), instances.image_size)
    return [_outlines(window.mask.view(np.uint8), window.left, window.top) for window in windows]


def _outlines(mask: np.ndarray, left: int, top: int) -> list[list[float]]:
    # OpenCV's outlines join centers of pixels. With four pixels for each they miss its edge by a quarter of a pixel,
    # and a single pixel has an area.
    scale = 2 if mask.size <= _MAX_ENLARGED_PIXELS else 1
    if scale == 2:
        mask = mask.repeat(2, 0).repeat(2, 1)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    # Without the enlargement, parts of a pixel or of a line have fewer than three points.
    return [((contour[:, 0] + 0.5) / scale + (left, top)).ravel().tolist() for contour in contours if len(contour) >= 3]
