"""Read and write the frames of video files."""

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

logger = logging.getLogger(__name__)

FALLBACK_FPS = 25.0
# Share of the frames that a header may declare in excess: some containers only estimate their number.
HEADER_TOLERANCE = 0.01


def without_password(source: str) -> str:
    """Return an address without its user and password, for messages and files; a path unchanged."""
    return re.sub(r"(?<=://)[^/]*@", "", source)


class VideoReader:
    """Iterate over the frames of a video file, of a network stream or of a camera, in RGB; a context manager.

    A WARNING is logged where the source ends before the number of frames that its header declares.

    Args:
        source: path of a file, address of a stream (``rtsp://``, ``http://``), or the index of a camera.

    Attributes:
        fps: frames per second; 25 where the source has no rate.
        num_frames: from the header of the file; None where it is missing (cameras).

    Raises:
        ValueError: the source cannot be opened.
    """

    def __init__(self, source: str | os.PathLike | int) -> None:
        if isinstance(source, int):
            name = f"camera {source}"
        else:
            source = os.fspath(source)
            name = without_password(source)
            if "://" not in source and not Path(source).is_file():
                raise ValueError(f"The video file {name} does not exist")
        self._name = name
        self._capture = cv2.VideoCapture(source)
        if not self._capture.isOpened():
            raise ValueError(f"OpenCV cannot open {name} as a video")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if fps > 0 else FALLBACK_FPS
        num_frames = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.num_frames = num_frames if num_frames > 0 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield frames (height, width, 3), uint8 in RGB, until the source ends."""
        count = 0
        while True:
            found, frame = self._capture.read()
            if not found:
                break
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            count += 1
        declared = self.num_frames or 0
        if declared - count > max(1, HEADER_TOLERANCE * declared):
            logger.warning(
                "%s ends after %d of the %d frames that its header declares: it is cut off or damaged",
                self._name, count, declared,
            )  # fmt: skip

    def has_last_frame(self) -> bool:
        """Return whether the last frame that the header declares can be read; the next frame read is then undefined."""
        self._capture.set(cv2.CAP_PROP_POS_FRAMES, (self.num_frames or 1) - 1)
        return self._capture.grab()

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.release()


class VideoWriter:
    """Write frames to an .mp4 file atomically; a context manager.

    The frames go to a temporary file in the same folder, which is renamed when the context ends. An error in the
    context removes it and leaves an existing file unchanged; after Ctrl-C the frames so far are kept.

    OpenCV writes even sizes only, so an odd height or width loses its last row or column.

    Args:
        path: of the file, with the suffix .mp4; its folder is created.
        fps: frames per second.
        codec: four letters; OpenCV's PyPI wheels have "mp4v" and lack "avc1".

    Attributes:
        num_frames: written so far.

    Raises:
        ValueError: the suffix is wrong; at the first frame: the file cannot be written, or OpenCV lacks the codec; at
            the end: frames are missing, as on a full disk, or the file cannot be renamed.
    """

    def __init__(self, path: str | os.PathLike, fps: float, codec: str = "mp4v") -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"A video is written as .mp4; the name {self.path} ends in {self.path.suffix!r}")
        self.num_frames = 0
        # OpenCV chooses the container by the suffix.
        self._part = self.path.with_name(f".{secrets.token_hex(8)}.part.mp4")
        self._fps = fps
        self._codec = codec
        self._writer: cv2.VideoWriter | None = None
        self._size: tuple[int, int] | None = None

    def write(self, frame_rgb: np.ndarray) -> None:
        """Append a frame (height, width, 3) uint8 in RGB.

        Raises:
            ValueError: OpenCV cannot open the file with this codec, or the frame has another size than the first one.
        """
        size = frame_rgb.shape[:2]
        if self._writer is None:
            # The header of a rotated phone video has another size than its frames.
            self._open(size)
        if size != self._size:
            raise ValueError(f"The frames of {self.path} are {self._size} (height, width); found one of {size}")
        self._writer.write(cv2.cvtColor(frame_rgb, cv2.COLOR_RGB2BGR))
        self.num_frames += 1

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is None:
            return
        self._writer.release()
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self._check_part()
            self._put_in_place()
        else:
            self._remove_part()

    def _check_part(self) -> None:
        # OpenCV does not report disk errors.
        try:
            with VideoReader(self._part) as reader:
                num_frames = reader.num_frames if reader.has_last_frame() else None
        except ValueError:
            num_frames = None
        if num_frames != self.num_frames:
            self._remove_part()
            raise ValueError(
                f"Cannot write {self.path}: OpenCV wrote {num_frames or 'none'} of {self.num_frames} frames; make room "
                "on the disk"
            )

    def _put_in_place(self) -> None:
        try:
            # replace() replaces a link and does not follow it.
            self._part.replace(self.path)
        except OSError as error:
            raise ValueError(
                f"Cannot write {self.path}: {error.strerror or error}; its {self.num_frames} frames are in {self._part}"
            ) from error

    def _remove_part(self) -> None:
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)

    def _open(self, size: tuple[int, int]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():
                raise IsADirectoryError("it is a folder")
        except OSError as error:
            raise ValueError(f"Cannot write {self.path}: {error.strerror or error}") from error
        fourcc = cv2.VideoWriter.fourcc(*self._codec)
        writer = cv2.VideoWriter(str(self._part), fourcc, self._fps, size[::-1])
        if not writer.isOpened():
            self._remove_part()
            raise ValueError(
                f"OpenCV {cv2.__version__} cannot write {self.path} with the codec {self._codec!r}: the codec is not "
                "in this build, or the file cannot be made"
            )
        self._writer, self._size = writer, size
