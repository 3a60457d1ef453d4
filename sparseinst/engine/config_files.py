"""YAML config files, looked through before Detectron2 reads them: they run no code, and are no larger than a config."""

import os
from collections.abc import Iterator
from pathlib import Path

import yaml
from detectron2.config import CfgNode

_BASE = "_BASE_"
# Of a config with all that it inherits from; Detectron2's whole defaults are 12 kB with 700 values.
_MAX_BYTES = 64 * 1024
_MAX_FILES = 32
# Aliases count as what they stand for.
_MAX_VALUES = 20_000
_MAX_NESTING = 32
# What Detectron2 can read. It guesses where there is none.
_VERSIONS = (1, 2)

# Of PyYAML, the last four for explicit tags: "!!int ''", "!!bool x", "!!timestamp x", "!!float 1:1:1:...".
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError)


def check_config_file(path: str, cfg: CfgNode) -> None:
    """Check that a YAML file, with the files that it inherits from by ``_BASE_``, is a config and nothing else.

    Args:
        path: of a file on this machine.
        cfg: the defaults that it is meant to change.

    Raises:
        ValueError: a file is missing, not YAML, too large, inherits from itself or from a URL, names Python code, gives
            a key twice, or has something else than text as a key.
    """
    sizes = []
    for file, content in _read_with_bases(path, ()):
        sizes.append(os.path.getsize(file))
        if len(sizes) > _MAX_FILES or sum(sizes) > _MAX_BYTES:
            raise ValueError(
                f"The config file {path} reads {len(sizes)} files with {sum(sizes)} bytes, itself and what it inherits "
                f"from by {_BASE}; a config has at most {_MAX_FILES} with {_MAX_BYTES}"
            )
        _check_keys(file, content)
        for key, value in content.items():
            if isinstance(cfg.get(key), CfgNode) and not isinstance(value, dict):
                raise ValueError(
                    f"In the config file {file}: {key} is a group of keys, and {str(value)[:50]!r} is none"
                )
        version = content.get("VERSION", _VERSIONS[-1])
        if type(version) is not int or version not in _VERSIONS:
            raise ValueError(
                f"In the config file {file}: VERSION is {str(version)[:50]!r}; expected one of {_VERSIONS}"
            )


def _read_with_bases(path: str, inherited_by: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """The file and what it inherits from, in the order of reading; as often as Detectron2 reads them."""
    content = _read(path)
    yield path, content
    bases = content.pop(_BASE, [])
    chain = (*inherited_by, os.path.realpath(path))
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or "://" in base:
            raise ValueError(
                f"In the config file {path}: {_BASE} is {str(base)[:200]!r}; expected a file on this machine, and a "
                "file from the internet has to be downloaded first"
            )
        # As Detectron2 finds it.
        file = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if not os.path.isfile(file):
            raise ValueError(
                f"In the config file {path}: {_BASE} names {base[:200]!r}, and there is no file {file[:300]}"
            )
        if os.path.realpath(file) in chain:
            raise ValueError(f"The config file {path} inherits from itself: {_BASE} names {base!r}")
        yield from _read_with_bases(file, chain)


def _read(path: str) -> dict:
    """The content of one file; YAML that names Python code is not read."""
    if Path(path).suffix == ".py":
        raise ValueError(
            f"The config file {path} is Python code (a LazyConfig), which is never run here. Name a YAML file; from "
            "Python a LazyConfig of your own is loaded by detectron2.config.LazyConfig.load"
        )
    try:
        size = os.path.getsize(path)
        if size > _MAX_BYTES:
            raise ValueError(f"The config file {path} has {size} bytes; a config has at most {_MAX_BYTES}")
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"The config file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The config file {path} is no text in UTF-8: {error}") from error
    loader = None
    try:
        # A safe loader in two steps: structure first, values once it has been looked at.
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is not None:
            _measure(root, {}, 0)
            content = loader.construct_document(root)
    except RecursionError as error:
        raise ValueError(f"The config file {path} is nested more than {_MAX_NESTING} deep") from error
    except _YAML_ERRORS as error:
        # PyYAML's messages have several lines.
        raise ValueError(f"In the config file {path}: {' '.join(str(error).split())[:500]}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if root is None or not isinstance(content, dict):
        found = "nothing" if root is None else f"a {type(content).__name__}"
        raise ValueError(f"The config file {path} holds {found}; expected keys and values, as KEY: value")
    return content


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """How many values a node stands for, and how deep they are nested, with aliases as what they stand for.

    Args:
        known: what was found, by the node's id.
        depth: of the node.

    Raises:
        ValueError: that is too much; a node has a Python tag, or a key twice.
    """
    if id(node) not in known:
        _check_tag(node)
        if depth > _MAX_NESTING:
            raise ValueError(f"line {_line(node)}: nested more than {_MAX_NESTING} deep, or in a circle")
        inner = []
        if isinstance(node, yaml.MappingNode):
            _check_unique(node)
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        # Text beyond the usual counts, since an alias repeats it.
        count, height = 1 + (len(node.value) // 1000 if isinstance(node.value, str) else 0), 0
        for part in inner:
            part_count, part_height = _measure(part, known, depth + 1)
            count, height = count + part_count, max(height, part_height + 1)
            if count > _MAX_VALUES:
                raise ValueError(
                    f"line {_line(node)}: more than {_MAX_VALUES} values, with aliases as what they stand for"
                )
        known[id(node)] = count, height
    count, height = known[id(node)]
    if depth + height > _MAX_NESTING:
        raise ValueError(f"line {_line(node)}: nested more than {_MAX_NESTING} deep")
    return count, height


def _check_tag(node: yaml.Node) -> None:
    _, is_python, name = node.tag.partition("tag:yaml.org,2002:python/")
    if is_python:
        raise ValueError(
            f"line {_line(node)}: !!python/{name} asks for Python's objects, and could run code; a config runs none. "
            "Write the value itself (a list for a tuple), or ask the author of the file for one without"
        )


def _check_unique(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise ValueError(f"line {_line(key)}: the key {key.value[:100]!r} is given a second time")
            seen.add(key.value)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _check_keys(path: str, content: dict) -> None:
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"In the config file {path}: the key {str(key)[:100]!r} is no text")
        if "." in key:
            raise ValueError(
                f"In the config file {path}: the key {key[:100]!r} has a point; write MODEL: {{DEVICE: cpu}}, each key "
                "in a line of its own and further in, where the command line has MODEL.DEVICE"
            )
        if isinstance(value, dict):
            _check_keys(path, value)
