import weakref

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.visualizer import Visualizer
from pycocotools import mask as mask_api

from sparseinst.structures.rle_masks import RLEMasks
from sparseinst.visualization import draw_iams, draw_instances, ground_truth_instances
from sparseinst.visualization.instances import rank_color

METADATA = Metadata(name="visualization_test", thing_classes=["circle", "square"])


def scene(height, width):
    """A red picture with two instances, whose activation maps peak at the left and at the right."""
    image = np.full((height, width, 3), (255, 0, 0), np.uint8)
    masks = torch.zeros((2, height, width), dtype=torch.bool)
    masks[0, : height // 2, : width // 4] = True
    masks[1, height // 2 :, 3 * width // 4 :] = True
    instances = Instances((height, width))
    instances.pred_masks = masks
    instances.pred_boxes = Boxes(
        torch.tensor(
            [[0, 0, width // 4, height // 2], [3 * width // 4, height // 2, width, height]], dtype=torch.float32
        )
    )
    instances.scores = torch.tensor([0.9, 0.8])
    instances.pred_classes = torch.tensor([1, 0])
    maps = torch.full((2, 4, 6, 8), -5.0)
    maps[0, :, :, 0] = 3
    maps[1, :, :, -1] = 3
    instances.pred_iams = maps
    return image, instances


@pytest.mark.parametrize(
    ("size", "drawn_size"),
    [((480, 600), (480, 600)), ((481, 641), (481, 641)), ((100, 150), (480, 720)), ((20, 500), (64, 1600))],
)
def test_small_pictures_are_enlarged(size, drawn_size):
    image, instances = scene(*size)
    before = image.copy(), instances.pred_boxes.tensor.clone()
    picture = draw_instances(image, instances, METADATA)
    assert picture.shape == (*drawn_size, 3) and picture.dtype == np.uint8
    assert draw_instances(image, instances[:0], METADATA).shape == picture.shape
    assert np.array_equal(image, before[0]) and torch.equal(instances.pred_boxes.tensor, before[1])


@pytest.mark.parametrize("size", [(480, 600), (120, 160)])
def test_masks_are_where_they_belong_and_red_stays_red(size):
    image, instances = scene(*size)
    picture = draw_instances(image, instances, METADATA).astype(int)
    height, width = picture.shape[:2]
    changed = np.abs(picture - (255, 0, 0)).max(-1) > 40
    assert changed[height // 4, width // 8] and changed[3 * height // 4, 7 * width // 8]
    # Away from masks, boxes and names.
    assert not changed[: height // 3, width // 2 : 3 * width // 4].any()
    assert np.abs(picture[height // 6, width // 2] - (255, 0, 0)).max() <= 1


def test_names_and_boxes_of_many_instances_are_left_out():
    image, instances = scene(480, 600)
    few, many = (Instances.cat([instances] * count) for count in (20, 21))
    # A name stands in a dark box, at the instance's upper left corner.
    dark = [(draw_instances(image, each, METADATA).astype(int).max(-1) < 60).any() for each in (instances, few, many)]
    assert dark == [True, True, False]


@pytest.mark.parametrize("size", [(480, 600), (120, 160)])
def test_it_looks_like_detectron2(size):
    image, instances = scene(*size)
    image[:] = np.random.default_rng(0).integers(0, 256, (1, 1, 3))
    fast = draw_instances(image, instances, METADATA).astype(int)
    # Detectron2 is given the enlarged image, masks and boxes.
    scale = fast.shape[0] / size[0]
    visualizer = Visualizer(cv2.resize(image, fast.shape[1::-1]), METADATA, font_size_scale=1.4)
    for index in (0, 1):
        mask = cv2.resize(instances.pred_masks[index].numpy().astype(np.uint8), fast.shape[1::-1])
        visualizer.overlay_instances(
            boxes=instances.pred_boxes[index].tensor * scale,
            masks=[mask.astype(bool)],
            labels=[f"{METADATA.thing_classes[1 - index]} {90 - 10 * index}%"],
            assigned_colors=[rank_color(index)],
            alpha=0.45,
        )
    slow = visualizer.output.get_image().astype(int)
    differences = np.abs(fast - slow).max(2)
    # Where they differ much, it is by a pixel in a line's or a letter's place.
    assert np.median(differences) <= 1 and (differences > 30).mean() < 0.02
    assert np.abs(fast.mean((0, 1)) - slow.mean((0, 1))).max() < 2


def test_nothing_found_is_the_plain_picture():
    image, instances = scene(480, 500)
    image[:, :100] = (1, 2, 3)
    picture = draw_instances(image, instances[:0], METADATA)
    assert np.array_equal(picture, image) and picture is not image


@pytest.mark.parametrize("size", [(480, 600), (120, 160), (1700, 2)])
@pytest.mark.parametrize("count", [1, 30])
def test_encoded_masks_are_drawn_alike(size, count):
    image, instances = scene(*size) if size[1] > 2 else narrow_scene(*size)
    instances = Instances.cat([instances] * count)
    encoded = instances[:]
    encoded.remove("pred_masks")
    rles = [mask_api.encode(np.asfortranarray(mask.numpy(), np.uint8)) for mask in instances.pred_masks]
    encoded.pred_masks = RLEMasks(rles, size)
    drawings = [draw_instances(image, each, METADATA) for each in (instances, encoded)]
    assert np.array_equal(*drawings)
    maps = [draw_iams(image, each, METADATA) for each in (instances, encoded)]
    assert np.array_equal(*maps)


def narrow_scene(height, width):
    """Of a picture of 2 pixels' width that is not enlarged."""
    instances = Instances((height, width))
    instances.pred_masks = torch.ones((1, height, width), dtype=torch.bool)
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, width, height]]))
    instances.scores = torch.tensor([0.5])
    instances.pred_classes = torch.tensor([0])
    instances.pred_iams = torch.zeros((1, 1, 4, 1))
    return np.zeros((height, width, 3), np.uint8), instances


def test_one_mask_at_a_time_is_decoded(monkeypatch):
    # At 8000 x 8000 a decoded mask takes 64 MB, and there can be 100.
    alive, most = [], []

    def decode(rle):
        mask = original(rle)
        alive.append(weakref.ref(mask))
        most.append(sum(each() is not None for each in alive))
        return mask

    original = mask_api.decode
    monkeypatch.setattr(mask_api, "decode", decode)
    image, instances = scene(480, 600)
    rles = [mask_api.encode(np.asfortranarray(mask.numpy(), np.uint8)) for mask in instances.pred_masks]
    encoded = Instances((480, 600), **{**instances.get_fields(), "pred_masks": RLEMasks(rles, (480, 600))})
    draw_instances(image, Instances.cat([encoded] * 20), METADATA)
    assert len(most) == 40 and max(most) <= 2


def test_a_hundred_objects_are_drawn():
    image, instances = scene(480, 600)
    before = image.copy()
    picture = draw_instances(image, Instances.cat([instances] * 50), METADATA)
    # The masks lie one over the other; without them, nothing.
    masks = instances.pred_masks.any(0).numpy()
    assert (np.abs(picture.astype(int) - image).max(2) > 40)[masks].mean() > 0.99
    assert np.array_equal(image, before)


def test_drawings_repeat():
    image, instances = scene(60, 80)
    assert np.array_equal(draw_instances(image, instances, METADATA), draw_instances(image, instances, METADATA))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)])
def test_smallest_pictures(size):
    image = np.zeros((*size, 3), np.uint8)
    instances = Instances(size)
    instances.pred_masks = torch.ones((1, *size), dtype=torch.bool)
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, size[1], size[0]]]))
    instances.scores = torch.tensor([0.5])
    instances.pred_classes = torch.tensor([0])
    instances.pred_iams = torch.zeros((1, 1, 1, 1))
    assert draw_instances(image, instances, METADATA).ndim == 3
    assert draw_iams(image, instances, METADATA).ndim == 3


@pytest.mark.parametrize("normalization", ["sigmoid", "softmax"])
def test_heat_is_where_the_map_is_high(normalization):
    image, instances = scene(192, 256)
    sheet = draw_iams(image, instances, METADATA, normalization=normalization).astype(int)
    # Cells are 256 wide with gaps of 6 and captions of 22; five of them in a row, two rows.
    assert sheet.shape == (2 * (192 + 22 + 6) + 6, 5 * (256 + 6) + 6, 3)
    for row, (hot, cold) in enumerate([(5, 250), (250, 5)]):
        y = 6 + row * 220 + 22 + 96
        for column in range(1, 5):
            x = 6 + column * 262
            # The colour map goes from dark blue to dark red.
            red = sheet[y, x + hot] - sheet[y, x + cold]
            assert red[0] > 40, (row, column)
    assert np.abs(sheet[6 + 22 + 10, 6 + 128] - (255, 0, 0)).max() <= 1


def test_activation_maps_of_few_many_and_no_instances():
    image, instances = scene(100, 256)
    one = draw_iams(image, instances[:1], METADATA)
    assert one.shape == (100 + 22 + 12, 5 * (256 + 6) + 6, 3)
    many = draw_iams(image, Instances.cat([instances] * 5), METADATA)
    assert many.shape == (8 * (100 + 22 + 6) + 6, *one.shape[1:])
    assert draw_iams(image, instances[:0], METADATA).shape == (100 + 22 + 12, 256 + 12, 3)


def test_activation_maps_need_the_key():
    image, instances = scene(20, 30)
    with pytest.raises(ValueError, match="normalization is 'none'"):
        draw_iams(image, instances, METADATA, normalization="none")
    instances.remove("pred_iams")
    with pytest.raises(ValueError, match="OUTPUT_IAM"):
        draw_iams(image, instances, METADATA)


@pytest.mark.parametrize("kind", ["polygons", "bitmasks", "tensor", "absent"])
def test_ground_truth_of_any_kind_of_masks(kind):
    # A square with corners (2, 3) and (6, 9).
    mask = torch.zeros(1, 20, 30, dtype=torch.bool)
    mask[0, 3:9, 2:6] = True
    masks = {
        "polygons": PolygonMasks([[[2, 3, 6, 3, 6, 9, 2, 9]]]),
        "bitmasks": BitMasks(mask),
        "tensor": mask.float(),
    }
    count = 0 if kind == "absent" else 1
    given = Instances((20, 30), gt_classes=torch.ones(count, dtype=torch.int64))
    if count:
        given.gt_masks = masks[kind]
    drawn = ground_truth_instances(given)
    assert torch.equal(drawn.pred_masks, mask[:count]) and not drawn.has("scores")
    assert drawn.pred_boxes.tensor.tolist() == [[2, 3, 6, 9]][:count]
    assert drawn.pred_classes.tolist() == [1] * count
