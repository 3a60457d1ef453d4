"""COCO jsons that were damaged at random: registered, read, mapped for training, and evaluated on."""

import contextlib
import io
import json
import logging
import math
import random
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from sparseinst.data import SparseInstDatasetMapper, check_num_classes, class_info, register_user_datasets
from sparseinst.evaluation import evaluate
from tests.faults.hostile import damaged, run_cases
from tests.tiny_model import tiny_cfg

HEIGHT, WIDTH = 24, 30
# Put in place of any value of the json.
VALUES = [
    None, True, False, -1, 0, 1, 2, 3, 5, 0.5, 2**31, 2**63, -(2**63), 10**30, 10**400, math.nan, math.inf, -math.inf,
    1e300, -1e300, 1e-320, "", "1", "a\0b", "\ud800", "../1.png", "/dev/zero", "x" * 5000, [], [[]], [[1, 2]],
    [1, 2, 3], [[1, 2, 3]], [[1, 2, 3, 4, 5, 6]], [[math.nan] * 6], [[1e18] * 6], [[-1e9, 0, 1e9, 0, 0, 1e9]],
    [["a"] * 6], [0] * 20_000, [[0, 0] * 20_000], [[[0, 0], [5, 0], [5, 5]]], {}, {"size": [24, 30]},
    {"counts": "a", "size": [24, 30]}, {"counts": [720], "size": [24, 30]}, {"counts": [-1, 721], "size": [24, 30]},
    {"counts": [2**32], "size": [2**16, 2**16]}, {"counts": "PPPPPPPPPPPPPPP", "size": [24, 30]},
    {"counts": "0" * 5000, "size": [24, 30]}, {"counts": "\x7f", "size": [24, 30]},
    {"counts": [0.5, 719.5], "size": [24, 30]}, {"counts": [], "size": [24, 30]},
    {"counts": [720], "size": [24, 30, 1]}, {"counts": [720], "size": 24}, {"counts": None, "size": None},
    {"counts": [[720]], "size": [[24], [30]]},
]  # fmt: skip


def whole() -> dict:
    """Three pictures with polygons, both kinds of RLE, and a crowd."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[3:9, 4:20] = 1
    compressed = coco_mask.encode(mask)
    runs = np.flatnonzero(np.diff(np.r_[0, mask.reshape(-1, order="F"), 0]))
    uncompressed = np.diff(np.r_[0, runs, mask.size]).tolist()
    segmentations = [
        [[2.0, 2.0, 12.0, 2.5, 11.0, 14.0, 3.0, 13.0]], [[1, 1, 5, 1, 5, 5], [8, 8, 12, 8, 12, 12, 8, 12]],
        {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()},
        {"size": [HEIGHT, WIDTH], "counts": uncompressed}, {"size": [HEIGHT, WIDTH], "counts": uncompressed},
    ]  # fmt: skip
    return {
        "images": [
            {"id": index + 7, "file_name": f"{index}.png", "height": HEIGHT, "width": WIDTH} for index in range(3)
        ],
        "categories": [{"id": 2, "name": "one"}, {"id": 5, "name": "two"}],
        "annotations": [
            {"id": index + 1, "image_id": 7 + index // 2, "category_id": (2, 5)[index % 2], "bbox": [1, 1, 10, 10],
             "area": 50.0, "iscrowd": int(index == 4), "segmentation": segmentation}
            for index, segmentation in enumerate(segmentations)
        ],
    }  # fmt: skip


def change(content: object, generator: random.Random) -> object:
    """The content with one place in it replaced, left out or repeated."""
    if not isinstance(content, list | dict) or not content or generator.random() < 0.05:
        return _near(content, generator) if generator.random() < 0.6 else generator.choice(VALUES)
    key = generator.choice(list(content) if isinstance(content, dict) else range(len(content)))
    changed = content.copy()
    action = generator.random()
    if action < 0.08:
        del changed[key]
    elif action < 0.14:
        if isinstance(changed, list):
            changed.insert(key, changed[key])
        else:
            changed[key] = content[generator.choice(list(content))]
    else:
        changed[key] = change(changed[key], generator)
    return changed


def _near(value: object, generator: random.Random) -> object:
    """A value that may pass where the value does."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    if isinstance(value, str):
        place = generator.randrange(len(value) + 1)
        return value[:place] + chr(generator.randrange(33, 127)) + value[place + generator.randrange(2) :]
    return generator.choice(
        (value + 1, value - 1, -value, value * 10, value / 3, value + 0.5, float(value), value * 1e6)
    )


class OnePerPicture(nn.Module):
    """Finds the same mask, whole and of the first class, in every picture."""

    def forward(self, batched_inputs):
        outputs = []
        for x in batched_inputs:
            size = (x["height"], x["width"])
            masks = torch.ones(1, *size, dtype=torch.bool)
            boxes = Boxes(torch.tensor([[0.0, 0.0, size[1], size[0]]]))
            found = Instances(size, pred_boxes=boxes, scores=torch.tensor([0.9]), pred_classes=torch.tensor([0]))
            found.pred_masks = masks
            outputs.append({"instances": found})
        return outputs


def json_case(generator: random.Random, number: int, folder: Path):
    logging.disable(logging.WARNING)
    for index in range(3):
        pixels = np.full((HEIGHT, WIDTH, 3), 50 * index, np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    content = whole()
    in_bytes = generator.random() < 0.2
    for _ in range(0 if in_bytes else generator.choice((1, 1, 2, 4))):
        content = change(content, generator)
    data = json.dumps(content).encode("utf-8", "surrogatepass")
    path = folder / "data.json"
    path.write_bytes(damaged(data, generator) if in_bytes else data)
    split = ("TRAIN", "TEST")[number % 2]
    cfg = tiny_cfg(
        f"DATASETS.{split}_JSON", str(path), f"DATASETS.{split}_IMAGES", str(folder), "INPUT.MIN_SIZE_TRAIN", (32,),
        "INPUT.CROP.ENABLED", generator.random() < 0.5, "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 2,
        "OUTPUT_DIR", str(folder / "output"),
    )  # fmt: skip

    def read():
        register_user_datasets(cfg, (split,))
        check_num_classes(cfg, (split,))
        (name,) = cfg.DATASETS[split]
        class_info(name)
        mapper = SparseInstDatasetMapper(cfg, is_train=split == "TRAIN")
        for dataset_dict in DatasetCatalog.get(name):
            mapper(dataset_dict)
        if split == "TEST":
            with contextlib.redirect_stdout(io.StringIO()):
                evaluate(cfg, OnePerPicture())

    return f"{'training' if split == 'TRAIN' else 'evaluation'}, {'bytes' if in_bytes else 'values'}", read


def test_damaged_jsons_are_read_or_refused(tmp_path):
    run_cases(json_case, tmp_path, short=16, full=800)
