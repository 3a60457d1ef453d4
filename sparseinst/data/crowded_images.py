"""Find images with more objects than the model finds."""

from collections import Counter
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from sparseinst import config

# Most instances that a training raises a key to: time and memory grow with them.
MOST_INSTANCES = 500


def instances_of_images(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> Counter[tuple[str, int]]:
    """Return the number of objects of each image, by data set and image id, for data that this project registers."""
    return Counter(
        {
            (name, image_id): count
            for split in splits
            for name in cfg.DATASETS[split]
            for image_id, count in MetadataCatalog.get(name).get("num_instances", {}).items()
        }
    )


def crowded_warning(num_instances: Counter, cfg: CfgNode, before_training: bool = False) -> str | None:
    """Return a warning where images have more objects than the model finds, else None.

    Args:
        num_instances: objects of each image.
        cfg: the model's config.
        before_training: the keys that the user left out have not been raised yet (`model_keys.follow_data`).
    """
    limits = dict(filter(None, (config.max_instances(cfg), config.max_detections(cfg))))
    crowded = [count for count in num_instances.values() if count > min(limits.values(), default=count)]
    if not crowded:
        return None
    limits_now = " and ".join(f"{key}, which is {value}" for key, value in limits.items() if value < max(crowded))
    remedy = " and ".join(f"{key} {max(value, *crowded)}" for key, value in limits.items())
    beginning = f"{len(crowded)} of {len(num_instances)} images with objects have more of them than {limits_now}: "
    low = [key for key, value in limits.items() if value < max(crowded)]
    if before_training and not any(config.is_explicit(cfg, key) for key in low):
        return (
            f"{beginning}a training sets {remedy} by itself, up to {MOST_INSTANCES}, unless MODEL.WEIGHTS determines "
            "one of them"
        )
    return f"{beginning}the model neither learns nor finds the others. {remedy} would hold all"
