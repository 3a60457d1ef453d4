"""Import the modules that a config names in IMPORTS, such as a user's own decoder."""

import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

from detectron2.config import CfgNode
from detectron2.utils import comm

logger = logging.getLogger(__name__)


def resolve_imports(names: Sequence[str], folder: str = "") -> list[str]:
    """Return the absolute paths of .py files, and dotted names as they are; each once.

    Args:
        names: ``my_decoder.py``, ``my_decoder`` or ``package.module``. A name without ending is a file where that file
            exists.
        folder: files are relative to this folder, else to the working directory.
    """
    return list(dict.fromkeys(_resolve(name, folder) for name in names))


def run_imports(names: Sequence[str], cfg: CfgNode, source: str) -> None:
    """Import modules, and let each add its keys by ``add_config(cfg)`` where it has that function.

    Args:
        names: resolved.
        cfg: the config that gets the keys, in place.
        source: file that names the modules, for messages.

    Raises:
        ValueError: a module is missing, or its code fails.
    """
    # All names come first, because code that runs can hide the next line. Every process runs it, and one logs.
    if names and comm.is_main_process():
        logger.warning("IMPORTS runs the code of %s", ", ".join(names))
    for name in names:
        if name.endswith(".py") and not os.path.isfile(name):
            raise ValueError(
                f"IMPORTS names the file {name[:300]}, which does not exist. If it was moved, name the new path in "
                f"{source}, or add IMPORTS \"['NEW.py']\" to the KEY VALUE overrides"
            )
        try:
            getattr(import_module(name), "add_config", lambda cfg: None)(cfg)
        # A module can raise any exception, or call sys.exit().
        except (Exception, SystemExit) as error:
            cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if isinstance(error, ModuleNotFoundError) and error.name and name.startswith(error.name):
                cause += ". Install it, or name its .py file"
            raise ValueError(
                f"IMPORTS of {source}, or --import, names {name[:300]!r}, which cannot be imported: {cause}"
            ) from error


def import_module(name: str) -> ModuleType:
    """Import a dotted name, or a .py file under a name made of its path."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = os.path.realpath(name)
    name = "config_import_" + re.sub(r"\W", "_", path)
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _resolve(name: str, folder: str) -> str:
    file = f"{os.path.expanduser(name).removesuffix('.py')}.py"
    paths = [os.path.abspath(os.path.join(root, file)) for root in (folder, "")]
    found = next(filter(os.path.isfile, paths), None)
    return found or (paths[0] if name.endswith(".py") else name)
