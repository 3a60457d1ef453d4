"""Progress of work on many items, for commands that take minutes."""

import datetime
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

# Seconds between two lines.
PERIOD = 5.0
_Item = TypeVar("_Item")


class WithProgress(Generic[_Item]):
    """Iterate over items, and log how many are done and the time that the others will take.

    Args:
        items: may be iterated several times.
        name: of the work, the first word of each line.
    """

    def __init__(self, items: Sequence[_Item], name: str) -> None:
        self._items = items
        self._name = name

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[_Item]:
        start = last = time.monotonic()
        for done, item in enumerate(self._items):
            now = time.monotonic()
            if done and now - last >= PERIOD:
                remaining = (now - start) / done * (len(self._items) - done)
                eta = datetime.timedelta(seconds=round(remaining))
                logger.info("%s: %d of %d, eta: %s", self._name, done, len(self._items), eta)
                last = now
            yield item
