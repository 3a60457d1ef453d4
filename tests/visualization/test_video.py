import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_api

from sparseinst.structures.rle_masks import RLEMasks
from sparseinst.visualization import VideoDrawer
from sparseinst.visualization.video import REMEMBERED_FRAMES, ObjectTracker

METADATA = Metadata(name="video_test", thing_classes=["bar", "disc"])


def instances_of(boxes, classes, size=(97, 131)):
    """Rectangles that fill their boxes."""
    masks = torch.zeros((len(boxes), *size), dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = True
    instances = Instances(size, pred_masks=masks, scores=torch.full((len(boxes),), 0.9))
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


def numbers_of(frames):
    """What the tracker calls the objects of frames, each a list of (x, class): boxes 20 wide and 10 high."""
    tracker = ObjectTracker()
    return [
        tracker.update(
            torch.tensor([[x, 0, x + 20, 10] for x, _ in frame], dtype=torch.float32).reshape(-1, 4),
            np.array([cls for _, cls in frame], dtype=np.int64),
        )
        for frame in frames
    ]


def test_objects_keep_their_numbers_whatever_their_order():
    frames = [[(0, 0), (100, 0)], [(102, 0), (3, 0)], [(6, 0), (104, 0), (200, 0)]]
    assert numbers_of(frames) == [[0, 1], [1, 0], [0, 1, 2]]


def test_of_two_candidates_the_nearer_one_is_it():
    # Boxes 5 and 8 apart overlap by an IoU of 15 / 25 and 12 / 28.
    assert numbers_of([[(100, 0)], [(108, 0), (95, 0)]]) == [[0], [1, 0]]
    assert numbers_of([[(100, 0), (92, 0)], [(95, 0)]]) == [[0, 1], [1]]


def test_objects_of_another_class_or_far_away_are_new():
    assert numbers_of([[(0, 0)], [(0, 1)]]) == [[0], [1]]
    # An IoU of 9 / 31, just below the least, and of 10 / 30.
    assert numbers_of([[(0, 0)], [(11, 0)]]) == [[0], [1]]
    assert numbers_of([[(0, 0)], [(10, 0)]]) == [[0], [0]]


def test_an_object_that_is_missed_is_remembered_for_a_while():
    for missed, number in ((REMEMBERED_FRAMES, 0), (REMEMBERED_FRAMES + 1, 1)):
        frames = [[(0, 0), (100, 0)], *[[(100, 0)]] * missed, [(100, 0), (200, 0), (0, 0)]]
        last = numbers_of(frames)[-1]
        # A new object takes no number that is still remembered.
        assert last == ([1, 2, 0] if missed == REMEMBERED_FRAMES else [1, 0, 2]), number


def test_empty_frames_and_empty_boxes():
    assert numbers_of([[], [(0, 0)], [], [(1, 0)]]) == [[], [0], [], [0]]
    tracker = ObjectTracker()
    for _ in range(2):
        assert tracker.update(torch.zeros(2, 4), np.zeros(2, np.int64))
    assert len(set(tracker.update(torch.zeros(3, 4), np.zeros(3, np.int64)))) == 3


def test_an_object_keeps_its_colour_and_the_frame_its_size():
    def predictions():
        for index in range(4):
            instances = instances_of([[index, 20, 40 + index, 60]], [0])
            # The second frame misses the object.
            yield np.full((97, 131, 3), 128, np.uint8), instances[:0] if index == 1 else instances

    def drawn(frames):
        drawer = VideoDrawer(METADATA)
        return [drawer.draw(frame, instances) for frame, instances in frames]

    pictures = drawn(predictions())
    assert [picture.shape for picture in pictures] == [(97, 131, 3)] * 4
    assert (pictures[1] == 128).all()
    colours = [pictures[index][55, 30].astype(int) for index in (0, 2, 3)]
    assert np.abs(colours[0] - 128).max() > 20
    assert all(np.array_equal(colour, colours[0]) for colour in colours)

    def encoded():
        for frame, instances in predictions():
            rles = [mask_api.encode(np.asfortranarray(mask.numpy(), np.uint8)) for mask in instances.pred_masks]
            fields = {**instances.get_fields(), "pred_masks": RLEMasks(rles, (97, 131))}
            yield frame, Instances((97, 131), **fields)

    of_encoded = drawn(encoded())
    assert all(np.array_equal(*both) for both in zip(pictures, of_encoded))


def test_colours_of_two_objects_that_pass_one_another():
    pictures = []
    drawer = VideoDrawer(METADATA)
    for step in range(12):
        boxes = [[10 * step, 5, 10 * step + 20, 45], [110 - 10 * step, 50, 130 - 10 * step, 90]]
        order = [0, 1] if step % 2 else [1, 0]
        instances = instances_of([boxes[index] for index in order], [order[0], order[1]])
        frame = np.zeros((97, 131, 3), np.uint8)
        pictures.append(drawer.draw(frame, instances))
        assert not frame.any()
    # Rows that no label reaches.
    first, second = (
        [tuple(picture[y, x].tolist()) for picture, x in zip(pictures, xs)]
        for y, xs in ((10, range(10, 131, 10)), (70, range(120, -1, -10)))
    )
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]
