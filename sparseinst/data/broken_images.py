"""Skip images that cannot be used, log each once, and stop above a limit."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from detectron2.data.detection_utils import SizeMismatchError

from sparseinst.data.images import DataError

_logger = logging.getLogger(__name__)

# Errors of a mapper about one image; Detectron2's own mapper raises the last two.
BROKEN_IMAGE_ERRORS = (DataError, OSError, SizeMismatchError)


class Failure(NamedTuple):
    """An image that cannot be used, and the reason, one line that names the file."""

    file_name: str
    message: str


def describe_failure(file_name: str, error: Exception) -> str:
    """Return an error in one line that names the file."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if file_name in message else f"{file_name}: {message}"


class SafeMapper:
    """Wrap a mapper; return BROKEN_IMAGE_ERRORS as failures in place of raising them."""

    def __init__(self, mapper: Callable[[dict], dict]) -> None:
        self._mapper = mapper

    def __call__(self, image: dict[str, Any]) -> tuple[dict | None, Failure | None]:
        """Return the sample and None, or None and the failure."""
        try:
            return self._mapper(image), None
        except BROKEN_IMAGE_ERRORS as error:
            file_name = str(image.get("file_name"))
            return None, Failure(file_name, describe_failure(file_name, error))


class BrokenImages:
    """Count the images of a data set that cannot be used, log each once, and stop above a limit.

    Args:
        limit: most different images that are skipped.

    Attributes:
        messages: the reasons, by file name.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.messages: dict[str, str] = {}

    def add(self, failures: Iterable[Failure]) -> None:
        """Add failures. Raise DataError, which lists all broken images, where they are more than the limit."""
        for file_name, message in failures:
            if file_name in self.messages:
                continue
            self.messages[file_name] = message
            count = len(self.messages)
            if count > self.limit:
                listed = "; ".join(self.messages.values())
                raise DataError(
                    f"{count} images cannot be used, and DATALOADER.MAX_BROKEN_IMAGES is {self.limit}. Repair them, or "
                    "raise it; python -m sparseinst.tools.check_dataset finds all broken images: " + listed
                )
            _logger.warning("Broken image %d, skipped (the limit is %d): %s", count, self.limit, message)


class EvaluationLoader:
    """Iterate over the batches of an evaluation, without the broken images.

    Detectron2's evaluators count the objects of a skipped image as missed.

    Args:
        loader: batches of the results of a :class:`SafeMapper`.
        broken: counts the failures.
    """

    def __init__(self, loader: Iterable[list], broken: BrokenImages) -> None:
        self._loader = loader
        self.broken = broken

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in self._loader:
            self.broken.add(
                failure._replace(message=f"{failure.message}; the objects in it count as missed")
                for _, failure in batch
                if failure is not None
            )
            samples = [sample for sample, _ in batch if sample is not None]
            if samples:
                yield samples
