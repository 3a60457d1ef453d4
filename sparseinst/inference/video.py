"""Video files: read frames, write frames."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

FALLBACK_FPS = 25.0


class VideoReader:
    """The frames of a video file or of a camera, in RGB. Iterate over it; it is a context manager too.

    Args:
        source: path of a file, or the index of a camera.

    Attributes:
        fps: frames per second; 25 where the source does not say.
        num_frames: as the file's header says, None where it does not (cameras).

    Raises:
        ValueError: it cannot be opened.
    """

    def __init__(self, source: str | os.PathLike | int) -> None:
        if isinstance(source, int):
            name = f"camera {source}"
        else:
            source = name = os.fspath(source)
            if not Path(source).is_file():
                raise ValueError(f"There is no video file {name}")
        self._capture = cv2.VideoCapture(source)
        if not self._capture.isOpened():
            raise ValueError(f"OpenCV cannot open {name} as a video")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if fps > 0 else FALLBACK_FPS
        num_frames = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.num_frames = num_frames if num_frames > 0 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Frame by frame, (height, width, 3) uint8 in RGB, until the source ends."""
        while True:
            found, frame = self._capture.read()
            if not found:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.release()


class VideoWriter:
    """Writes frames to an .mp4 file that is whole or not there; a context manager.

    The frames go to a file beside it, which takes its name when the context is left. Where an error leaves the context,
    nothing is left of it, and a file that had the name before stays; after Ctrl-C the frames so far are kept.

    OpenCV writes even sizes only: of an odd height or width the last row or column is left out.

    Args:
        path: file to write; its folder is made. It must end in .mp4.
        fps: frames per second.
        codec: four letters; OpenCV's PyPI wheels have "mp4v" and do not have "avc1".

    Attributes:
        num_frames: written so far.

    Raises:
        ValueError: another extension; at the first frame: the file cannot be written, OpenCV has no such codec; at the
            end: frames are missing, as on a full disk, or the file cannot take its name.
    """

    def __init__(self, path: str | os.PathLike, fps: float, codec: str = "mp4v") -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"A video is written as .mp4; the name {self.path} ends in {self.path.suffix!r}")
        self.num_frames = 0
        # OpenCV takes the kind of file from the ending.
        self._part = self.path.with_name(f".{secrets.token_hex(8)}.part.mp4")
        self._fps = fps
        self._codec = codec
        self._writer: cv2.VideoWriter | None = None
        self._size: tuple[int, int] | None = None

    def write(self, frame_rgb: np.ndarray) -> None:
        """Append a frame (height, width, 3) uint8 in RGB.

        Raises:
            ValueError: OpenCV cannot open the file with this codec; the frame has another size than the first one.
        """
        size = frame_rgb.shape[:2]
        if self._writer is None:
            # Only the first frame tells the size for sure: a turned phone video has another one in its header.
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
        # OpenCV reports no error of the disk.
        try:
            with VideoReader(self._part) as reader:
                num_frames = reader.num_frames
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
            # A link that has the name is replaced, not followed.
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
