"""Remember which keys of a config the user set."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from detectron2.config import CfgNode

from sparseinst.config.defaults import CONFIG_FOLDERS

_EXPLICIT = "explicit_keys"


def is_explicit(cfg: CfgNode, key: str) -> bool:
    """Return whether the user set a key: by KEY VALUE, or in a config file that does not come with the package.

    False for configs that :func:`~sparseinst.config.load_config` did not load.
    """
    return key in vars(cfg).get(_EXPLICIT, ())


def mark_explicit(cfg: CfgNode, keys: Iterable[str]) -> None:
    """Count these keys as set by the user. Clones of the config remember them; files do not."""
    # Not an entry of the config, which would be saved with it.
    vars(cfg)[_EXPLICIT] = frozenset(vars(cfg).get(_EXPLICIT, ())).union(keys)


def keys_of(content: dict, group: str = "") -> Iterator[str]:
    """Yield the full name of each key that holds a value."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{group}{name}.")
        else:
            yield f"{group}{name}"


def is_shipped(path: str) -> bool:
    """Return whether a config file comes with the package."""
    return any(Path(path).resolve().is_relative_to(folder.resolve()) for folder in CONFIG_FOLDERS)
