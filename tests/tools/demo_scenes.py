"""Pictures for the demo's tests, and the command on the model of red_segmenter.py."""

import json

import numpy as np
from PIL import Image

from sparseinst.tools import demo


def save_scene(path, background=(90, 160, 90), red=True, size=(48, 64)):
    """A red block at x 8..39, y 8..23, and a blue one that is found with a low score."""
    pixels = np.full((*size, 3), background, np.uint8)
    if red:
        pixels[8:24, 8:40] = (250, 20, 20)
        pixels[30:40, 40:60] = (20, 20, 250)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def run(config_file, *arguments):
    return demo.main(["--config-file", config_file, *map(str, arguments)])


def ground_truth_json(tmp_path, names=("red thing", "blue thing")):
    """One block of class 1, category id 8, at the blue block's place in in/a.png."""
    content = {
        "images": [{"id": 5, "file_name": "in/a.png", "height": 48, "width": 64}],
        "categories": [{"id": id, "name": name} for id, name in zip((3, 8), names)],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 8, "bbox": [40, 30, 20, 10], "area": 200, "iscrowd": 0,
             "segmentation": [[40, 30, 60, 30, 60, 40, 40, 40]]}
        ],
    }  # fmt: skip
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return path
