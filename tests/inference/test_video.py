import contextlib
import itertools

import cv2
import numpy as np
import pytest

from sparseinst.inference import VideoReader, VideoWriter
from sparseinst.inference.video import without_password


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
    with pytest.raises(ValueError, match="video file .*none.mp4 does not exist"):
        VideoReader(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="text.mp4"):
        VideoReader(tmp_path / "text.mp4")


@pytest.mark.parametrize(("share", "message"), [(1, ""), (0.5, "clip.avi ends after 30 of the 60 frames")])
def test_a_video_that_ends_before_its_header_says(tmp_path, caplog, share, message):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (128, 128))
    rng = np.random.default_rng(0)
    for _ in range(60):
        writer.write(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8))
    writer.release()
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with VideoReader(path) as reader:
        assert len(list(itertools.islice(reader, 5))) == 5
    # The caller stopped, not the video.
    assert not caplog.records
    with VideoReader(path) as reader:
        assert len(list(reader)) == 60 * share
    assert [record.levelname for record in caplog.records] == ["WARNING"] * bool(message)
    assert message in caplog.text
    with VideoReader(path) as reader:
        assert reader.has_last_frame() == (share == 1)


def test_a_password_is_not_shown():
    assert without_password("rtsp://me:secret@door:554/hall?x=1") == "rtsp://door:554/hall?x=1"
    assert without_password("videos/a@b.mp4") == "videos/a@b.mp4"


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


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_a_video_is_whole_or_not_there(tmp_path, error):
    path = tmp_path / "clip.mp4"
    path.write_text("an earlier one")
    expected = pytest.raises(error) if error else contextlib.nullcontext()
    with expected, VideoWriter(path, 10) as writer:
        for index, frame in enumerate(frames_of(48, 64)):
            if error and index == 4:
                raise error
            writer.write(frame)
            # Until its end it stands beside its place.
            assert path.read_text() == "an earlier one"
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    if error is ValueError:
        assert path.read_text() == "an earlier one"
        return
    with VideoReader(path) as reader:
        assert len(list(reader)) == writer.num_frames == (4 if error else 6)


def test_a_video_without_frames_leaves_what_was_there(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_text("an earlier one")
    with VideoWriter(path, 10):
        pass
    assert path.read_text() == "an earlier one" and len(list(tmp_path.iterdir())) == 1


def test_where_a_video_cannot_be_put_is_told_before_it_is_written(tmp_path):
    (tmp_path / "clip.mp4").mkdir()
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer, pytest.raises(ValueError, match="Cannot write.*folder"):
        writer.write(np.zeros((32, 32, 3), np.uint8))
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_video_that_cannot_take_its_name_is_not_lost(tmp_path):
    path = tmp_path / "clip.mp4"
    with pytest.raises(ValueError, match=r"Cannot write .*clip\.mp4.* its 1 frames are in .*\.part\.mp4"):
        with VideoWriter(path, 10) as writer:
            writer.write(np.zeros((32, 32, 3), np.uint8))
            path.mkdir()
    (part,) = (file for file in tmp_path.iterdir() if file.is_file())
    with VideoReader(part) as reader:
        assert len(list(reader)) == 1
