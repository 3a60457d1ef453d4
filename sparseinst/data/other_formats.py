"""Recognize annotations of other formats than COCO, and name the command that converts them."""

import os
import re
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

from sparseinst.data.image_formats import IMAGE_SUFFIXES
from sparseinst.data.json_file import read_json

# Formats that sparseinst.tools.to_coco converts.
LABELME, VIA, YOLO, MASKS = "labelme", "VIA", "YOLO", "masks"

_EXPECTED = "; expected a COCO json in the instances format"
_EXPORT = f"{_EXPECTED}: export the data as 'COCO' from the annotation tool, see docs/data_formats.md"


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files of a folder and its subfolders with one of the suffixes in lower or upper case, sorted."""
    names = ((parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sorted(Path(*name) for name in names if os.path.splitext(name[1])[1].lower() in suffixes)


def convert_hint(source: str | Path) -> str:
    """Return the end of a message that names the command for a source."""
    command = f"python -m sparseinst.tools.to_coco {source} IMAGES --output train.json"
    return f"{_EXPECTED}. Convert it: {command} (see docs/data_formats.md)"


def content_format(content: Any) -> str | None:
    """Return LABELME or VIA where a parsed json has this format, else None."""
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("shapes"), list) and "imagePath" in content:
        return LABELME
    entries = content.get("_via_img_metadata", content)
    values = list(islice(entries.values(), 3)) if isinstance(entries, dict) else []
    is_via = values and all(isinstance(value, dict) and {"filename", "regions"} <= set(value) for value in values)
    return VIA if is_via or "_via_settings" in content else None


def describe_other_format(content: Any) -> str | None:
    """Return a message about a parsed json of another format, with the remedy; None where it may be COCO."""
    kind = content_format(content)
    if kind == LABELME:
        return f"is a labelme file, the annotations of one image{convert_hint('FOLDER')} with the folder of these files"
    if kind == VIA:
        return f"is a project of the VGG Image Annotator (VIA){convert_hint('THIS_FILE')}"
    entries = content if isinstance(content, list) else []
    first = entries[0] if entries and isinstance(entries[0], dict) else {}
    if {"image_id", "category_id", "score"} <= set(first):
        return f"is a list of COCO results (predictions), not a data set{_EXPECTED} with the images' list"
    if {"data", "annotations"} <= set(first) or {"data", "completions"} <= set(first):
        return f"is an export of Label Studio in its own format{_EXPORT}"
    if isinstance(content, dict):
        annotations = content.get("annotations")
        if isinstance(annotations, list) and annotations and isinstance(annotations[0], dict):
            if "segments_info" in annotations[0]:
                return f"is a COCO json in the panoptic format{_EXPECTED}"
        if content.get("type") == "FeatureCollection":
            return f"is GeoJSON{_EXPORT}"
        if isinstance(content.get("objects"), list) and "size" in content:
            return f"is a Supervisely file, the annotations of one image{_EXPORT}"
    return None


def path_format(path: Path) -> str | None:
    """Return LABELME, VIA, YOLO or MASKS for a file or folder, else None."""
    if path.is_file():
        if path.suffix.lower() == ".json":
            return content_format(read_json(path))
        if path.suffix.lower() in (".yaml", ".yml"):
            return YOLO
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return MASKS
        return YOLO if path.suffix.lower() == ".txt" and is_yolo(path) else None
    # All names, because annotations may follow thousands of images; contents only up to the first annotation.
    if any(map(is_yolo, list_files(path, (".txt",)))):
        return YOLO
    kinds = (content_format(read_json(file)) for file in list_files(path, (".json",)))
    return next(filter(None, kinds), MASKS if list_files(path, IMAGE_SUFFIXES) else None)


def describe_path(path: Path) -> str | None:
    """Return a message about a path that is not a JSON file, with the remedy; None where the path is one."""
    if path.is_file() and path.suffix.lower() in (".xml", ".csv", ".zip", ".tar", ".gz"):
        return f"{path} is a {path.suffix.lower()} file{_EXPORT}" + ", and unpack it" * (path.suffix != ".xml")
    if not path.exists() or (path.is_file() and path.suffix.lower() not in (".txt", ".yaml", ".yml", *IMAGE_SUFFIXES)):
        return None
    kind = path_format(path)
    source = path if path.is_dir() or kind == VIA else path.parent
    names = {LABELME: "labelme files", VIA: "a VIA project", YOLO: "YOLO labels", MASKS: "images (masks?)"}
    if kind is None or (kind == MASKS and path.is_dir() and list_files(path, (".json",))):
        return f"{path} is a folder{_EXPECTED}" if path.is_dir() else None
    start = f"{path} is a folder with {names[kind]}" if path.is_dir() else f"{path} belongs to {names[kind]}"
    return start + convert_hint(source)


def is_yolo(path: Path) -> bool:
    """Return whether a text file's first line is a class, also a name or negative, and at least four coordinates."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        start = file.read(10_000)
    return re.match(r"\s*[\w-]+([^\S\n]+-?[\d.]+(e[+-]?\d+)?){4,}", start) is not None
