"""Translate the keys of earlier versions and of other projects in config files.

Each family's config module may have ``RENAMED_KEYS``, a dict from old keys to `RenamedKey`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from sparseinst.config.defaults import FAMILIES


class RenamedKey(NamedTuple):
    """Describe a renamed or removed key.

    Attributes:
        new: the key that replaces it, or the same key where only values were renamed; None: the key was removed.
        convert: returns the new key's value; raises ValueError for a value without an equivalent.
        reason: why the key was removed, and the replacement.
        default: the old key stays valid, and files are translated only where they set it to another value.
    """

    new: str | None
    convert: Callable[[Any], Any] | None = None
    reason: str = ""
    default: Any = None

    def is_valid_as(self, old: str) -> bool:
        """Return whether configs still have the old key."""
        return self.new == old or self.default is not None


@cache
def renamed_keys() -> dict[str, RenamedKey]:
    """Return the rows of all families."""
    tables = (getattr(import_module(family), "RENAMED_KEYS", {}) for family in FAMILIES)
    return {old: row for table in tables for old, row in table.items()}


def refuse_old_keys(opts: Sequence[str]) -> None:
    """Raise ValueError for a renamed or removed key among KEY VALUE overrides; the message has the new key."""
    for key in opts[::2]:
        row = renamed_keys().get(key)
        if row is None or row.is_valid_as(key):
            continue
        text = f"renamed: set {row.new}" if row.new else f"removed: {row.reason}"
        raise ValueError(f"In the KEY VALUE overrides: {key} was {text}")


def rename_keys(content: dict, path: str) -> Iterator[str]:
    """Replace renamed keys in place; yield "old -> new" for each.

    Args:
        content: of a config file.
        path: of the file, for messages.

    Raises:
        ValueError: a value has no equivalent, or two keys, old or new, give one new key different values.
    """
    assigned: dict[str, tuple[str, object]] = {}
    for old, row in renamed_keys().items():
        value = pop_key(content, old)
        if value is None or value == row.default:
            continue
        try:
            new_value = row.convert(value) if row.convert else value
        except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"In the config file {path}: {old} is {str(value)[:100]!r}; {error}") from error
        if row.new is None:
            yield f"{old} -> removed ({row.reason})"
            continue
        given = _get_key(content, row.new)
        first = (old, new_value) if row.new == old or given is None else (row.new, given)
        other, other_value = assigned.setdefault(row.new, first)
        if other_value != new_value:
            raise ValueError(
                f"In the config file {path}: {other} is {other_value} and {old} is {new_value}; both are {row.new} "
                "here, so they must be equal"
            )
        _set_key(content, row.new, new_value)
        if new_value != value:
            yield f"{old} {value} -> {row.new} {new_value!r}"
        elif row.new != old:
            yield f"{old} -> {row.new}"


def pop_key(content: dict, key: str) -> object:
    """Remove a key and the groups that become empty; return its value, or None if it is absent."""
    group, _, rest = key.partition(".")
    if not rest or not isinstance(content.get(group), dict):
        return None if rest else content.pop(group, None)
    value = pop_key(content[group], rest)
    if not content[group]:
        del content[group]
    return value


def _get_key(content: dict, key: str) -> object:
    group, _, rest = key.partition(".")
    if not rest:
        return content.get(group)
    return _get_key(content[group], rest) if isinstance(content.get(group), dict) else None


def _set_key(content: dict, key: str, value: object) -> None:
    group, _, rest = key.partition(".")
    if not rest:
        content[group] = value
        return
    if not isinstance(content.get(group), dict):
        content[group] = {}
    _set_key(content[group], rest, value)
