import cv2
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_api

from sparseinst.data.rle_masks import RLEMasks
from sparseinst.inference import VideoReader, VideoWriter, draw_video


def frames_of(height, width, count=6):
    """Red frames with a green bar that moves to the right."""
    for index in range(count):
        frame = np.full((height, width, 3), (250, 10, 10), np.uint8)
        frame[:, index * 8 : index * 8 + 16] = (10, 250, 10)
        yield frame


@pytest.mark.parametrize("size", [(48, 64), (47, 65)])
def test_frames_come_back_in_colour_order_and_number(tmp_path, size):
    path = tmp_path / "made" / "clip.mp4"
    with VideoWriter(path, 12.5) as writer:
        for frame in frames_of(*size):
            writer.write(frame)
    with VideoReader(path) as reader:
        assert reader.fps == pytest.approx(12.5) and reader.num_frames == 6
        frames = list(reader)
    assert len(frames) == 6
    for index, (frame, written) in enumerate(zip(frames, frames_of(*size), strict=True)):
        # OpenCV writes even sizes only.
        assert frame.shape == (size[0] // 2 * 2, size[1] // 2 * 2, 3) and frame.dtype == np.uint8
        # mp4v loses some colour.
        assert np.abs(frame[24, index * 8 + 8].astype(int) - written[24, index * 8 + 8]).max() < 60
        assert np.abs(frame[24, 62].astype(int) - written[24, 62]).max() < 60


def test_without_a_frame_rate_it_is_25(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 10) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8))

    class Silent:
        def __init__(self, source):
            self.capture = real(source)

        def isOpened(self):
            return self.capture.isOpened()

        def get(self, key):
            return 0.0

        def release(self):
            self.capture.release()

    real = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Silent)
    with VideoReader(path) as reader:
        assert reader.fps == 25 and reader.num_frames is None


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ValueError, match="no video file.*none.mp4"):
        VideoReader(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="text.mp4"):
        VideoReader(tmp_path / "text.mp4")


def test_extension_codec_and_size_are_checked(tmp_path):
    frame = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match=r"\.mp4.*'\.avi'"):
        VideoWriter(tmp_path / "clip.avi", 10)
    with VideoWriter(tmp_path / "clip.mp4", 10, codec="none") as writer:
        with pytest.raises(ValueError, match="codec 'none'"):
            writer.write(frame)
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        writer.write(frame)
        with pytest.raises(ValueError, match=r"\(32, 32\).*\(16, 32\)"):
            writer.write(frame[:16])


def test_an_object_keeps_its_colour_and_the_frame_its_size():
    # Detectron2 draws each new object's colour at random, and one of them is the frame's grey.
    np.random.seed(0)

    def predictions():
        for index in range(4):
            mask = torch.zeros((1, 97, 131), dtype=torch.bool)
            mask[0, 20:60, index : 40 + index] = True
            instances = Instances((97, 131), pred_masks=mask, scores=torch.tensor([0.9]))
            instances.pred_boxes = Boxes(torch.tensor([[index, 20, 40 + index, 60]], dtype=torch.float32))
            instances.pred_classes = torch.tensor([0])
            # The second frame misses the object.
            yield np.full((97, 131, 3), 128, np.uint8), instances[:0] if index == 1 else instances

    pictures = list(draw_video(predictions(), Metadata(name="video_test", thing_classes=["bar"])))
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

    np.random.seed(0)
    of_encoded = list(draw_video(encoded(), Metadata(name="video_test", thing_classes=["bar"])))
    assert all(np.array_equal(*both) for both in zip(pictures, of_encoded))
