"""Load a config file and KEY VALUE overrides into a config."""

import ast
import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path

import yaml
from detectron2.config import CfgNode, downgrade_config, get_cfg, upgrade_config

import sparseinst
from sparseinst.config.defaults import add_sparse_inst_config, get_config_file
from sparseinst.config.explicit import is_explicit, is_shipped, keys_of, mark_explicit
from sparseinst.config.imports import import_module, resolve_imports, run_imports
from sparseinst.config.model_keys import max_detections, meta_architecture
from sparseinst.config.renamed_keys import refuse_old_keys, rename_keys
from sparseinst.config.values import check_values

logger = logging.getLogger(__name__)

# yacs raises KeyError and AssertionError for unknown keys and TypeError for a key below a value (SOLVER.MAX_ITER.X).
# Python reads the values, which raises MemoryError or RecursionError for some ("-----...").
_MERGE_ERRORS = (KeyError, AssertionError, ValueError, TypeError, MemoryError, RecursionError)
# PyYAML raises all but the first for explicit tags: "!!int ''", "!!bool x", "!!timestamp x", "!!float 1:1:1:...".
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError, RecursionError)
# A config has about 700 values. Nested aliases can expand to more values than fit into memory.
_MAX_VALUES = 20_000
# Detectron2's default.
_DETECTIONS_PER_IMAGE = 100
# Attribute of a config: the MODEL.DEVICE that `choose_device` replaced.
_REPLACED_DEVICE = "replaced_device"
_PYTHON_TAG = "tag:yaml.org,2002:python/"


def resolve_config_file(config_file: str) -> str:
    """Return the path of a config file, given its path or the name of a config file of the package.

    Raises:
        ValueError: neither exists.
    """
    if os.path.isfile(config_file):
        return config_file
    try:
        return get_config_file(config_file)
    except OSError as error:
        raise ValueError(f"No config file can be named {config_file[:100]!r}: {error.strerror}") from error


def load_config(
    config_file: str, opts: Sequence[str] = (), *, imports: Sequence[str] = (), allow_imports: bool = True
) -> CfgNode:
    """Merge a config file and overrides into the defaults of Detectron2 and SparseInst.

    YAML that names Python objects and LazyConfigs are refused: a config runs only the code of the modules in IMPORTS,
    which one line of the log names first. Renamed keys in files are translated, with one warning per file. A
    ``MODEL.DEVICE`` of CUDA becomes "cpu" on a machine without CUDA, with one line in the log. The config remembers
    which keys the user set, see :func:`~sparseinst.config.is_explicit`.

    Args:
        config_file: path of a YAML file, or the name of one that comes with the package.
        opts: KEY VALUE KEY VALUE ... The value of a group of keys is a dict.
        imports: modules to import besides those of IMPORTS, as there; files relative to the working directory.
        allow_imports: False refuses a config with modules to import, for files from strangers.

    Returns:
        The config, not frozen.

    Raises:
        ValueError: the file does not exist or is not a config, a key is unknown, a value has the wrong type or is out
            of range, MODEL.META_ARCHITECTURE is not registered, or a module cannot be imported.
    """
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    path = resolve_config_file(config_file)
    explicit = set(opts[::2])
    try:
        content = _read_with_bases(path, explicit=explicit)
    except RecursionError as error:
        raise ValueError(f"The config file {path} inherits through too many files by _BASE_") from error
    opts = list(opts)
    modules = _imported(content, opts, imports)
    if modules and not allow_imports:
        raise ValueError(
            f"The config of {path} imports {', '.join(modules)[:300]} (IMPORTS), which is not allowed here"
        )
    run_imports(modules, cfg, path)
    refuse_old_keys(opts)
    if flags := [opt for opt in opts[::2] if isinstance(opt, str) and opt.startswith("--")]:
        raise ValueError(f"In the KEY VALUE overrides: {flags[0]} is a flag; put flags before the first KEY VALUE pair")
    if ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model") in zip(opts[::2], opts[1::2]):
        raise ValueError(
            "In the KEY VALUE overrides: SOLVER.CLIP_GRADIENTS.CLIP_TYPE full_model was renamed: set "
            "SOLVER.CLIP_TOTAL_NORM to the largest norm"
        )
    _merge(lambda: _merge_file(cfg, content), f"In the config file {path}")
    _merge(lambda: _merge_overrides(cfg, opts), "In the KEY VALUE overrides")
    cfg.IMPORTS = modules
    mark_explicit(cfg, explicit)
    _limit_detections(cfg)
    # A training writes its config, and YAML cannot represent every Python value.
    _merge(cfg.dump, f"The config of {path} and the KEY VALUE overrides cannot be written as YAML")
    try:
        check_values(cfg)
        meta_architecture(cfg)
    except ValueError as error:
        # The message begins with the key.
        key = str(error).partition(" ")[0]
        if any(f"{key}.".startswith(f"{group}.") for group in opts[::2]):
            raise
        raise ValueError(f"In the config file {path}: {error}") from error
    choose_device(cfg)
    return cfg


def choose_device(cfg: CfgNode) -> None:
    """Set a MODEL.DEVICE of CUDA to "cpu" in a process without CUDA, in place, with one line in the log.

    In a process with CUDA, undo that for a config that a process without CUDA loaded.
    """
    device = cfg.MODEL.DEVICE
    if device == "cpu":
        device = vars(cfg).get(_REPLACED_DEVICE, device)
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            logger.warning("MODEL.DEVICE is %s and PyTorch finds no CUDA device: running on the CPU", device)
            # Not an entry of the config, which would be saved with it.
            vars(cfg)[_REPLACED_DEVICE] = device
            device = "cpu"
    cfg.MODEL.DEVICE = device


def register_models(cfg: CfgNode) -> None:
    """Register the plugin's models and import the modules of IMPORTS, in a process that got a loaded config."""
    sparseinst.register()
    for name in cfg.IMPORTS:
        import_module(name)


def _merge(merge: Callable[[], object], where: str) -> None:
    try:
        merge()
    except (*_MERGE_ERRORS, yaml.YAMLError) as error:
        text = str(error.args[0] if len(error.args) == 1 else error)
        if isinstance(error, MemoryError | RecursionError):
            text = "a value that is nested too deeply to be read"
        raise ValueError(f"{where}: {' '.join(text.split())[:500]}") from error


def _merge_file(cfg: CfgNode, content: dict) -> None:
    """Merge a file's content in place as ``CfgNode.merge_from_file`` does, which would read the file itself.

    Detectron2's reader ignores duplicate keys silently and does not return from a file that inherits from itself.
    """
    for key, value in content.items():
        if isinstance(cfg.get(key), CfgNode) and not isinstance(value, dict):
            raise ValueError(f"{key} is a group of keys, and {str(value)[:50]!r} is not")
    version = content.get("VERSION", cfg.VERSION)
    if type(version) is not int or version not in (1, 2):
        raise ValueError(f"VERSION is {str(version)[:50]!r}; expected one of (1, 2)")
    if version == cfg.VERSION:
        cfg.merge_from_other_cfg(CfgNode(content))
    else:
        old = downgrade_config(cfg, to_version=version)
        old.merge_from_other_cfg(CfgNode(content))
        cfg.update(upgrade_config(old))


def _merge_overrides(cfg: CfgNode, opts: list[str]) -> None:
    """Merge KEY VALUE pairs in place as ``CfgNode.merge_from_list`` does, and dicts into groups of explicit keys."""
    cfg.merge_from_list(opts[len(opts) // 2 * 2 :])
    for key, value in zip(opts[::2], opts[1::2]):
        *groups, name = key.split(".")
        node = reduce(lambda inner, group: inner.get(group, {}) if isinstance(inner, dict) else {}, groups, cfg)
        if isinstance(node, dict) and isinstance(node.get(name), CfgNode):
            with contextlib.suppress(SyntaxError, ValueError):
                value = ast.literal_eval(value) if isinstance(value, str) else value
            if isinstance(value, dict):
                nested = reduce(lambda inner, group: {group: inner}, reversed(groups), {name: value})
                cfg.merge_from_other_cfg(CfgNode(nested))
                mark_explicit(cfg, keys_of(nested))
                continue
        cfg.merge_from_list([key, value])


def _limit_detections(cfg: CfgNode) -> None:
    """Let Detectron2's TEST.DETECTIONS_PER_IMAGE set the model's own key, unless the user set that one."""
    most = cfg.TEST.DETECTIONS_PER_IMAGE
    if not is_explicit(cfg, "TEST.DETECTIONS_PER_IMAGE") or most == _DETECTIONS_PER_IMAGE:
        return
    declared = max_detections(cfg)
    if declared is not None and not is_explicit(cfg, declared[0]):
        cfg.merge_from_list([declared[0], most])
        mark_explicit(cfg, [declared[0]])


def _read_with_bases(
    path: str, chain: tuple[str, ...] = (), known: dict[str, dict] | None = None, explicit: set[str] | None = None
) -> dict:
    """Return the content of a YAML file, merged into that of the files that its ``_BASE_`` names.

    Args:
        path: of the file.
        chain: the files that inherit from it.
        known: contents by real path, so that each file is read once.
        explicit: receives the keys of all files that do not come with the package.
    """
    known = {} if known is None else known
    explicit = set() if explicit is None else explicit
    chain = (*chain, os.path.realpath(path))
    if chain[-1] in known:
        return known[chain[-1]]
    content = _read(path)
    bases = content.pop("_BASE_", [])
    _resolve_imports(content, path)
    merged: dict = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or "://" in base:
            raise ValueError(
                f"In the config file {path}: _BASE_ is {str(base)[:200]!r}; expected a file on this machine. Download "
                "a file from the internet first"
            )
        file = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if not os.path.isfile(file):
            raise ValueError(
                f"In the config file {path}: _BASE_ names {base[:200]!r}, but the file {file[:300]} does not exist"
            )
        if os.path.realpath(file) in chain:
            raise ValueError(f"The config file {path} inherits from itself: _BASE_ names {base!r}")
        _update(merged, copy.deepcopy(_read_with_bases(file, chain, known, explicit)))
    renamed = [*rename_keys(content, path), *_translate_clipping(content, merged)]
    if renamed:
        logger.warning("The config file %s uses keys that were renamed: %s", path, "; ".join(renamed))
    if not is_shipped(path):
        explicit.update(keys_of(content))
    _update(merged, content)
    known[chain[-1]] = merged
    return merged


def _update(target: dict, source: dict) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _update(target[key], value)
        else:
            target[key] = value


def _read(path: str) -> dict:
    """Return the content of one file. The safe loader rejects tags that run code."""
    if Path(path).suffix == ".py":
        raise ValueError(
            f"The config file {path} is Python code (a LazyConfig), which is never run here. Name a YAML file; from "
            "Python a LazyConfig of your own is loaded by detectron2.config.LazyConfig.load"
        )
    try:
        text = Path(path).read_text(encoding="utf-8")
        if "_target_:" in text:
            raise ValueError(
                "the file was saved by a training of a LazyConfig and names functions to call. Name the YAML file of "
                "the same model, such as sparse_inst_r50_giam, and set MODEL.WEIGHTS to the checkpoint"
            )
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        _check_nodes(root)
        content = None if root is None else loader.construct_document(root)
        _check_keys(content)
    except OSError as error:
        raise ValueError(f"The config file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The config file {path} is not text in UTF-8: {error}") from error
    except _YAML_ERRORS as error:
        text = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:500]
        raise ValueError(f"In the config file {path}: {text}") from error
    return content


def _check_nodes(root: yaml.Node | None) -> None:
    """Raise ValueError for a tag of Python, a key that is given twice, or aliases that expand to too many values."""
    nodes, count = [root] if root else [], 0
    while nodes:
        node, count = nodes.pop(), count + 1
        line = node.start_mark.line + 1
        if node.tag.startswith(_PYTHON_TAG):
            raise ValueError(
                f"line {line}: !!python/{node.tag.removeprefix(_PYTHON_TAG)} is a Python object, which could run code. "
                "Write the value itself (a list for a tuple)"
            )
        if count > _MAX_VALUES:
            raise ValueError(f"line {line}: more than {_MAX_VALUES} values with aliases expanded, or a circle of them")
        if isinstance(node, yaml.MappingNode):
            known = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in known:
                    line = key.start_mark.line + 1
                    raise ValueError(f"line {line}: the key {key.value[:100]!r} is given a second time")
                known.add(key.value)
            nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def _check_keys(content: object) -> None:
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"the file holds {found}; expected keys and values, such as KEY: value")
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"the key {str(key)[:100]!r} is not text")
        if "." in key:
            raise ValueError(
                f"the key {key[:100]!r} has a point; write MODEL: {{DEVICE: cpu}}, or each key on a line of its own, "
                "indented, where the command line has MODEL.DEVICE"
            )
        if isinstance(value, dict):
            _check_keys(value)


def _translate_clipping(content: dict, inherited: dict) -> Iterator[str]:
    """Replace CLIP_TYPE full_model, which Detectron2 does not know, in place; yield "old -> new".

    A file that inherits SOLVER.CLIP_TOTAL_NORM and changes CLIP_GRADIENTS without a type means the same clipping.
    """
    solver = content.get("SOLVER")
    clip = solver.get("CLIP_GRADIENTS") if isinstance(solver, dict) else None
    if not isinstance(clip, dict) or "CLIP_TOTAL_NORM" in solver:
        return
    base = inherited["SOLVER"].get("CLIP_TOTAL_NORM", 0.0) if isinstance(inherited.get("SOLVER"), dict) else 0.0
    if clip.get("CLIP_TYPE", "full_model" if base else "value") != "full_model":
        return
    if clip.get("NORM_TYPE", 2.0) != 2:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.NORM_TYPE is {clip['NORM_TYPE']}; SOLVER.CLIP_TOTAL_NORM has only 2.0")
    del solver["CLIP_GRADIENTS"]
    norm = clip.get("CLIP_VALUE", base or 1.0) if clip.get("ENABLED", bool(base)) else 0.0
    solver["CLIP_TOTAL_NORM"] = float(norm) if isinstance(norm, int) else norm
    yield f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE full_model -> SOLVER.CLIP_TOTAL_NORM {norm}"


def _resolve_imports(content: dict, path: str) -> None:
    imports = content.get("IMPORTS", [])
    if not isinstance(imports, list) or not all(isinstance(name, str) for name in imports):
        raise ValueError(f"In the config file {path}: IMPORTS is {str(imports)[:100]!r}; expected a list of modules")
    if imports:
        content["IMPORTS"] = resolve_imports(imports, os.path.dirname(path))


def _imported(content: dict, opts: list[str], imports: Sequence[str]) -> list[str]:
    """Return the modules of IMPORTS in the file or, where they have it, the overrides; then ``imports``."""
    # Only IMPORTS: the modules may add the other keys.
    node = CfgNode({"IMPORTS": content.get("IMPORTS", [])})
    overrides = [part for key, value in zip(opts[::2], opts[1::2]) if key == "IMPORTS" for part in (key, value)]
    _merge(lambda: node.merge_from_list(overrides), "In the KEY VALUE overrides")
    if not all(isinstance(name, str) for name in node.IMPORTS):
        raise ValueError(f"In the KEY VALUE overrides: IMPORTS is {node.IMPORTS}; expected a list of modules")
    return resolve_imports([*node.IMPORTS, *imports])
