"""Images that cannot be used: passed over, counted, named, and a limit to how many."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from detectron2.data.detection_utils import SizeMismatchError

from sparseinst.data.images import DataError

_logger = logging.getLogger(__name__)

# What a mapper raises where one image is broken; Detectron2's own mapper raises the latter two.
BROKEN_IMAGE_ERRORS = (DataError, OSError, SizeMismatchError)


class Failure(NamedTuple):
    """An image that cannot be used, and why, in one line that names it."""

    file_name: str
    message: str


class SafeMapper:
    """A mapper whose answer to a broken image is what is wrong with it, not an error.

    Args:
        mapper: raises one of BROKEN_IMAGE_ERRORS where an image cannot be used.
    """

    def __init__(self, mapper: Callable[[dict], dict]) -> None:
        self._mapper = mapper

    def __call__(self, image: dict[str, Any]) -> tuple[dict | None, Failure | None]:
        """The sample and None, or None and the failure."""
        try:
            return self._mapper(image), None
        except BROKEN_IMAGE_ERRORS as error:
            file_name, message = str(image.get("file_name")), " ".join(str(error).split())
            return None, Failure(file_name, message if file_name in message else f"{file_name}: {message}")


class BrokenImages:
    """Counts the images of a data set that could not be used, names each once, and stops where there are too many.

    Args:
        limit: how many different ones are passed over.

    Attributes:
        messages: what is wrong, by file name.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.messages: dict[str, str] = {}

    def add(self, failures: Iterable[Failure]) -> None:
        """Note some more.

        Raises:
            DataError: there are more than the limit.
        """
        for file_name, message in failures:
            if file_name in self.messages:
                continue
            self.messages[file_name] = message
            count = len(self.messages)
            if count > self.limit:
                listed = "\n  ".join(self.messages.values())
                raise DataError(
                    f"{count} images cannot be used, and DATALOADER.MAX_BROKEN_IMAGES is {self.limit}. Repair them, or "
                    "raise it; python -m sparseinst.tools.check_dataset finds all that are broken at once:\n  " + listed
                )
            _logger.warning("Broken image %d, passed over (the limit is %d): %s", count, self.limit, message)


class TestLoader:
    """The images of a data set that is evaluated, without those that are broken.

    Detectron2's evaluators count the objects of an image that they are not shown as missed.

    Args:
        loader: batches of what a :class:`SafeMapper` returns.
        broken: where the images that are passed over are noted.
    """

    # Not a test, whatever pytest thinks of its name.
    __test__ = False

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
