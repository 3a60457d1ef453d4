"""Load the model of the service in the background."""

import contextlib
import glob
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sparseinst.inference import Predictor
from sparseinst.serving.answers import find_instances

logger = logging.getLogger(__name__)

# The files of a model that cannot be loaded are looked at again after this time; weights that are downloaded are
# loaded again after the longer one.
_RETRY_SECONDS = 5.0
_DOWNLOAD_SECONDS = 60.0


class ServedModel:
    """A predictor that loads while the service already answers.

    Where loading fails, the reason is logged, and the model is loaded again as soon as its files change; after a minute
    where its weights are downloaded.

    Args:
        load: builds the predictor.
        weights: path or address of the weights, or of an exported model.

    Attributes:
        name: of the file, without its folder.
        predictor: None while it is not loaded.
        has_maps: whether the model returns activation maps on request.
        error: one line that says why it could not be loaded; None while it is loading, and afterwards.
    """

    def __init__(self, load: Callable[[], Predictor], weights: str) -> None:
        self.name = Path(weights).name
        self.predictor: Predictor | None = None
        self.has_maps = False
        self.error: str | None = None
        self._load = load
        self._file = None if "://" in weights else Path(weights)
        self._stopped = threading.Event()

    @property
    def status(self) -> str:
        """Return "ready", "failed" or "loading"."""
        return "ready" if self.predictor is not None else "failed" if self.error is not None else "loading"

    def start(self) -> None:
        """Load in a thread of its own."""
        threading.Thread(target=self._run, name="load", daemon=True).start()

    def stop(self) -> None:
        """End the attempts."""
        self._stopped.set()

    def _run(self) -> None:
        while self.predictor is None:
            stamp = _stamps(self._file)
            try:
                predictor = self._load()
                self.has_maps = _has_maps(predictor)
                self.predictor, self.error = predictor, None
                logger.info("The model %s is loaded", self.name)
            # Weights and configs of a user can raise any error, and the service goes on.
            except Exception as error:
                self.error = one_line(error)
                time = f"in {_DOWNLOAD_SECONDS:g} s" if self._file is None else "when its files change"
                logger.error("The model cannot be loaded, and is loaded again %s: %s", time, self.error)
            seconds = _DOWNLOAD_SECONDS if self._file is None else _RETRY_SECONDS
            while self.predictor is None:
                if self._stopped.wait(seconds):
                    return
                if self._file is None or _stamps(self._file) != stamp:
                    break


def one_line(error: BaseException) -> str:
    """Return the message of an error, with its type where it is not meant for users."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, ValueError | ImportError) and text else f"{type(error).__name__}: {text}"


def _has_maps(predictor: Predictor) -> bool:
    """Predict a gray image, which shows errors of the model before the first request, and look for its maps."""
    return find_instances(predictor, np.full((64, 64, 3), 128, np.uint8), 1.0, with_maps=True).has("pred_iams")


def _stamps(file: Path | None) -> list[tuple[str, int, int]]:
    """Return values that change with the content of a file, or of a file with the same name and another ending.

    An OpenVINO model has its weights in a .bin file, a TensorRT engine its metadata in a .json file.
    """
    if file is None:
        return []
    paths, stamps = {file}, []
    # The folder may be removed meanwhile, or the file.
    with contextlib.suppress(OSError):
        paths.update(file.parent.glob(f"{glob.escape(file.stem)}.*"))
    for path in sorted(paths):
        with contextlib.suppress(OSError):
            stat = path.stat()
            stamps.append((path.name, stat.st_mtime_ns, stat.st_size))
    return stamps
