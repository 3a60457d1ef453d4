"""Write predictions as JSON lines, one for each image, below a header that identifies the run.

`sparseinst predict` and the stage of Ray Data make the same lines.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.structures import Instances

import sparseinst
from sparseinst.checkpoint.locations import find_weights
from sparseinst.data.coco_json import ClassInfo
from sparseinst.data.coco_results import to_coco_results
from sparseinst.inference.output_files import find_images

LIST_SUFFIX = ".txt"
# Nodes that no prediction depends on; the categories are in the header.
_UNUSED_NODES = ("CUDNN_BENCHMARK", "DATALOADER", "DATASETS", "OUTPUT_DIR", "SEED", "SOLVER", "TRACKERS", "VIS_PERIOD")
# The same file has another name on another machine, and the same model another device.
_UNUSED_MODEL_KEYS = ("DEVICE", "WEIGHTS")
# Header entries that may differ between two parts of a run.
_UNCOMPARED = ("weights.file",)


def list_images(inputs: Sequence[str], flag: str = "--input") -> list[str]:
    """Return the images that the names stand for, each name once, in their order.

    Args:
        inputs: text files that end in .txt, with one path in each line, relative to the working directory; and the
            files, folders and patterns of `find_images`.
        flag: of the command that names them, for messages.

    Raises:
        ValueError: a list cannot be read or has no line, or a name matches no image.
    """
    names: list[str] = []
    for name in inputs:
        if name.lower().endswith(LIST_SUFFIX):
            names += _read_list(Path(name), flag)
        else:
            names += map(str, find_images([name], flag))
    return list(dict.fromkeys(names))


def check_weights_given(cfg: CfgNode) -> None:
    """Raise ValueError where MODEL.WEIGHTS is empty."""
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS is empty, and random weights predict nothing. Set it to a checkpoint")


def header(cfg: CfgNode, names: Sequence[str], classes: ClassInfo) -> dict:
    """Return what identifies a run: the images, the content of the weights file, the classes and the config.

    Args:
        cfg: of the model.
        names: of all images, in order.
        classes: of the model.

    Raises:
        ValueError: MODEL.WEIGHTS is empty or cannot be found.
    """
    check_weights_given(cfg)
    # Without tuples and numbers as keys, as it is read back.
    config = json.loads(json.dumps(yaml.safe_load(cfg.dump())))
    for key in _UNUSED_NODES:
        config.pop(key, None)
    for key in _UNUSED_MODEL_KEYS:
        config["MODEL"].pop(key)
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    return {
        "sparseinst": sparseinst.__version__,
        "images": {"count": len(names), "sha256": digest},
        "weights": {"file": cfg.MODEL.WEIGHTS, "sha256": _file_digest(find_weights(cfg.MODEL.WEIGHTS))},
        "categories": [{"id": id, "name": name} for name, id in zip(*classes, strict=True)],
        "config": config,
    }


def header_differences(found: dict, expected: dict) -> list[str]:
    """Return how the header of a file differs from the expected one, a text for each entry."""
    there, here = ({key: repr(value) for key, value in _entries(header)} for header in (found, expected))
    texts = []
    for key in [*here, *(key for key in there if key not in here)]:
        pair = [entries.get(key, "missing") for entries in (there, here)]
        if key not in _UNCOMPARED and pair[0] != pair[1]:
            # Long values are shown from shortly before their first difference on.
            start = max(0, len(os.path.commonprefix(pair)) - 40)
            texts.append("{} is {} there and {} here".format(key, *(text[start : start + 80] for text in pair)))
    return texts


def prediction_line(file_name: str, instances: Instances, category_ids: Sequence[int]) -> str:
    """Return the line of one image.

    Args:
        file_name: as in the list of images.
        instances: of that image.
        category_ids: of the model's classes.

    Returns:
        JSON with ``file_name``, ``height``, ``width`` and ``detections``: COCO results without an image id, each with
        ``category_id``, ``bbox``, ``score`` and, if there are masks, ``segmentation`` as RLE.
    """
    height, width = instances.image_size
    detections = to_coco_results(instances, 0, category_ids)
    for detection in detections:
        del detection["image_id"]
    return json.dumps({"file_name": file_name, "height": height, "width": width, "detections": detections})


def error_line(file_name: str, error: Exception) -> str:
    """Return the line of an image that cannot be used: JSON with ``file_name`` and ``error``."""
    return json.dumps({"file_name": file_name, "error": " ".join(str(error).split()) or type(error).__name__})


def _read_list(path: Path, flag: str) -> list[str]:
    try:
        # File names can be any bytes, and editors of Windows write a mark at the start.
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise ValueError(f"{flag}: the list {path} cannot be read: {error.strerror or error}") from error
    # splitlines would also split at characters that names may hold, such as U+2028.
    names = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not names:
        raise ValueError(f"{flag}: the list {path} is empty; expected one image path in each line")
    return names


def _entries(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values of nested dicts with their keys, such as "config.INPUT.FORMAT"."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _entries(part, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _file_digest(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
