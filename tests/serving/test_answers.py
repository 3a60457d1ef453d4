"""The answers are the Predictor's, as RLE, polygons, drawings and activation maps."""

import base64
import io
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from sparseinst.data.images import ImageReadError, ImageTooLargeError, read_image
from sparseinst.inference import Predictor, draw_instances, to_coco_results
from sparseinst.structures.rle_masks import RLEMasks
from sparseinst.visualization import heat_maps

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from sparseinst.serving import answers  # noqa: E402
from sparseinst.serving.answers import answer, drawing, predict  # noqa: E402
from tests.serving.service import image_bytes, stub_predictor  # noqa: E402
from tests.tiny_model import tiny_cfg, tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def predictor():
    cfg = tiny_cfg("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0)
    return Predictor(cfg, model=tiny_model("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0))


@pytest.fixture(scope="module")
def data():
    return image_bytes("JPEG", 60, 90)


def instances_of(predictor, data):
    return predictor([read_image(io.BytesIO(data))], "RGB")[0]


def test_rle_is_that_of_the_predictor(predictor, data):
    expected = instances_of(predictor, data)
    content = answer(predictor, data, threshold=0.0, image_id=7)
    results = content["instances"]
    assert len(results) > 1 and content["image"] == {"id": 7, "height": 60, "width": 90}
    names = [predictor.classes.names[index] for index in expected.pred_classes]
    assert [result.pop("category_name") for result in results] == names
    assert results == to_coco_results(expected, 7, predictor.classes.category_ids)
    json.dumps(content)


def test_an_image_is_converted_without_a_prediction(predictor, data, monkeypatch):
    """A model can be certain: YOLACT has scores of exactly 1."""
    expected = read_image(io.BytesIO(data))
    monkeypatch.setattr(answers, "find_instances", None)
    for kind in ("JPEG", "TIFF"):
        converted = drawing(predictor, image_bytes(kind, 60, 90), threshold=0.0, with_instances=False)
        pixels = np.asarray(Image.open(io.BytesIO(converted)), dtype=int)
        assert pixels.shape == expected.shape and np.abs(pixels - expected).mean() < 3


def test_the_threshold_keeps_equal_scores_and_computes_no_mask_below_it(predictor, data):
    scores = instances_of(predictor, data).scores
    middle = float(scores[len(scores) // 2])
    found = predict(predictor, data, middle)[1]
    assert torch.equal(found.scores, scores[scores >= middle]) and len(found) < len(scores)
    assert isinstance(found.pred_masks, RLEMasks)
    # The options of one request do not reach the next one.
    assert predictor.model.output.score_threshold == 0 and isinstance(
        instances_of(predictor, data).pred_masks, torch.Tensor
    )


def test_no_masks(predictor, data):
    results = answer(predictor, data, threshold=0.0, masks="none")["instances"]
    assert results and all("segmentation" not in result and "bbox" in result for result in results)


def test_polygons_cover_the_masks():
    # A block of 12 x 16 pixels: the outline misses each edge by a quarter of a pixel.
    predictor, data = stub_predictor(), image_bytes(seed=1)
    expected = instances_of(predictor, data)
    results = answer(predictor, data, threshold=0.0, masks="polygons")["instances"]
    assert len(results) == 2
    for result, mask, box in zip(results, expected.pred_masks.numpy(), expected.pred_boxes.tensor.tolist()):
        (polygon,) = result["segmentation"]
        x0, y0, x1, y1 = box
        points = set(zip(polygon[::2], polygon[1::2]))
        assert points == {(x, y) for x in (x0 + 0.25, x1 - 0.25) for y in (y0 + 0.25, y1 - 0.25)}
        assert np.array_equal(mask_api.decode(mask_api.frPyObjects([polygon], *mask.shape))[..., 0], mask)
    assert answer(predictor, data, threshold=0.5, masks="polygons")["instances"] == results[:1]


def test_polygons_of_a_pixel_and_of_two_parts():
    predictor = stub_predictor("INPUT.MIN_SIZE_TEST", 40)
    pixels = np.full((40, 40, 3), 128, np.uint8)
    pixels[3, 5] = pixels[20:25, 30:38] = (255, 0, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    (result,) = answer(predictor, buffer.getvalue(), threshold=0.0, masks="polygons")["instances"]
    areas = sorted(mask_api.area(mask_api.frPyObjects([polygon], 40, 40))[0] for polygon in result["segmentation"])
    assert areas == [1, 40]


def test_polygons_of_a_large_object(monkeypatch):
    """Its mask is not enlarged, so the outline joins the centers of its pixels."""
    predictor, data = stub_predictor(), image_bytes(seed=1)
    expected = instances_of(predictor, data)
    monkeypatch.setattr(answers, "_MAX_ENLARGED_PIXELS", 100)
    results = answer(predictor, data, threshold=0.0, masks="polygons")["instances"]
    for result, mask, (x0, y0, x1, y1) in zip(
        results, expected.pred_masks.numpy(), expected.pred_boxes.tensor.tolist()
    ):
        (polygon,) = result["segmentation"]
        points = set(zip(polygon[::2], polygon[1::2]))
        assert points == {(x, y) for x in (x0 + 0.5, x1 - 0.5) for y in (y0 + 0.5, y1 - 0.5)}
        assert mask_api.decode(mask_api.frPyObjects([polygon], *mask.shape)).sum() == (x1 - x0 - 1) * (y1 - y0 - 1)


def test_no_jpeg_has_such_a_side():
    predictor, buffer = stub_predictor(), io.BytesIO()
    Image.new("RGB", (65_501, 2), "gray").save(buffer, format="PNG")
    predictor.model.error = AssertionError("predicted")
    with pytest.raises(ImageTooLargeError, match="2 x 65501 pixels, and the drawing is a JPEG.* at most 65500"):
        drawing(predictor, buffer.getvalue(), threshold=0.5)


def test_nothing_found():
    predictor, buffer = stub_predictor(), io.BytesIO()
    Image.new("RGB", (30, 20), "gray").save(buffer, format="PNG")
    for options in ({}, {"masks": "polygons"}, {"masks": "none"}, {"with_maps": True}):
        assert answer(predictor, buffer.getvalue(), threshold=0.0, **options)["instances"] == []
    assert Image.open(io.BytesIO(drawing(predictor, buffer.getvalue(), threshold=0.0))).size == (720, 480)


def test_activation_maps_are_those_that_are_drawn(predictor, data):
    with predictor.model.output_as(with_maps=True):
        expected = instances_of(predictor, data)
    results = answer(predictor, data, threshold=0.0, with_maps=True)["instances"]
    assert len(results) == len(expected)
    for result, logits in zip(results, expected.pred_iams):
        maps = result["activation_maps"]
        assert len(maps["maps"]) == 2  # GROUPS
        size = (maps["height"], maps["width"])
        levels = np.stack([np.frombuffer(base64.b64decode(one), np.uint8).reshape(size) for one in maps["maps"]])
        assert levels.max() == 255
        assert np.abs(levels / 255 - heat_maps(logits, size, predictor.iam_normalization)).max() <= 0.5 / 255 + 1e-6
    assert "activation_maps" not in answer(predictor, data, threshold=0.0)["instances"][0]


def test_maps_of_a_model_without_them():
    results = answer(stub_predictor(), image_bytes(), threshold=0.0, with_maps=True)["instances"]
    assert results and "activation_maps" not in results[0]


def test_the_drawing_is_the_projects(predictor, data):
    image, expected = read_image(io.BytesIO(data)), instances_of(predictor, data)
    drawn = np.asarray(Image.open(io.BytesIO(drawing(predictor, data, threshold=0.0)))).astype(int)
    # A JPEG changes the levels slightly.
    assert np.abs(drawn - draw_instances(image, expected, predictor.metadata)).mean() < 3


def test_images_are_refused_with_the_reason():
    with pytest.raises(ImageReadError, match="not an image"):
        answer(stub_predictor(), b"text", threshold=0.5)
    predictor = stub_predictor()
    predictor.max_image_pixels = 45 * 70 - 1
    with pytest.raises(ImageTooLargeError, match="45 x 70 = 3150 pixels, and INPUT.MAX_IMAGE_PIXELS is 3149"):
        answer(predictor, image_bytes(), threshold=0.5)


@pytest.mark.parametrize("kind", ["QOI", "PPM text", "PPM maximum", "BMP RLE"])
def test_images_that_pillow_decodes_in_python_are_refused(kind):
    rle = struct.pack("<2sIIIIiiHHIIIIII", b"BM", 58 + 4 * 2, 0, 58, 40, 2, 1, 1, 8, 1, 4, 0, 0, 1, 0)
    data = {
        "QOI": b"qoif" + struct.pack(">IIBB", 2, 1, 3, 0) + 2 * b"\xfe\1\2\3" + bytes(7) + b"\1",
        "PPM text": b"P3 2 1 255 1 2 3 4 5 6\n",
        "PPM maximum": b"P6 2 1 254\n\1\2\3\4\5\6",
        "BMP RLE": rle + bytes(4) + b"\2\0\0\1",
    }[kind]
    assert read_image(io.BytesIO(data)).shape == (1, 2, 3)
    predictor = stub_predictor()
    for job in (answer, drawing):
        with pytest.raises(ImageReadError, match=f"{kind[:3]} files of this kind are decoded too slowly; convert"):
            job(predictor, data, threshold=0.5)
