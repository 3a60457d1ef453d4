"""Split a data set into images to train on and images to evaluate on."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import PurePath

from detectron2.data import DatasetCatalog, MetadataCatalog

# Endings that tools append to the name of a photo for its crops, tiles and augmented copies. Series have similar names:
# good_part_017, wood-slice-003, 2023_05_01_0001.
_PARTS = "crop|tile|patch|slice|chip|part"
_SUFFIXES = re.compile(
    rf"""(
        [._-](jpe?g|png|bmp|tiff?|webp|gif)(\.rf\.\w+)?            # Roboflow: photo_jpg.rf.HASH
        | \.rf\.\w+
        | (?<=\d)[._ -]+({_PARTS})[._ -]?\d*([._x-]\d+)*
        | [._ -]+({_PARTS})([._ -]?(?!0\d)\d+([._x-]\d+)*)?
        | [._ -]+(aug|augmented|copy|flip|rot|rotated)[._ -]?\d*([._x-]\d+)*
        | [._-]x-?\d+[._-]?y-?\d+([._-]w\d+[._-]?h\d+)?           # photo_x0_y512
        | [._-](r|row)[._-]?\d+[._-]?(c|col)[._-]?\d+              # photo_row0_col1
        | (_(0|[1-9]\d*)){{4}}                                      # photo_0_0_512_512
    )$""",
    re.IGNORECASE | re.VERBOSE,
)
# Windows numbers a whole series so, too.
_COPY = re.compile(r"[ ]?\(\d+\)$")


def photo_name(file_name: str, others: Collection[str] = ()) -> str:
    """Return the name of the photo that an image file shows a part or a copy of: "photo_0001" of photo_0001_crop3.jpg.

    Args:
        file_name: of the image, with folders, which belong to the name.
        others: names of images without their suffixes; "photo (2)" is a copy where they have "photo".
    """
    path = _without_suffix(file_name)
    while True:
        shorter = _SUFFIXES.sub("", path.name)
        if shorter == path.name and str(path.with_name(_COPY.sub("", path.name) or path.name)) in others:
            shorter = _COPY.sub("", path.name)
        if shorter in ("", path.name):
            return str(path)
        path = path.with_name(shorter)


def _without_suffix(file_name: str) -> PurePath:
    path = PurePath(file_name.replace("\\", "/"))
    return path.with_name(path.stem)


def choose_images(file_names: Sequence[str], share: float) -> set[int]:
    """Choose images to evaluate on: whole photos, in an order that depends on their names alone.

    Args:
        file_names: of the images.
        share: of the images, in (0, 1).

    Returns:
        Indices of the images.

    Raises:
        ValueError: the share is out of range, or all images are of one photo.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"DATASETS.VAL_SHARE (--val-share) is {share}; it is the share of the images that are evaluated on, in "
            "(0, 1), such as 0.2"
        )
    photos: dict[str, list[int]] = {}
    names = {str(_without_suffix(file_name)) for file_name in file_names}
    for index, file_name in enumerate(file_names):
        photos.setdefault(photo_name(file_name, names), []).append(index)
    if len(photos) < 2:
        raise ValueError(
            f"DATASETS.VAL_SHARE (--val-share): the {len(file_names)} images are, by their names, of one photo "
            f"({next(iter(photos), 'none')!r}), so they cannot be split; give --test-json and --test-images"
        )
    num_wanted = min(max(1, round(share * len(file_names))), len(file_names) - 1)
    chosen: set[int] = set()
    for name in sorted(photos, key=lambda name: hashlib.sha1(name.encode()).digest()):
        # Somewhat more images than wanted are better than a handful, where at least half of the others stay.
        missing, num_images = num_wanted - len(chosen), len(photos[name])
        num_left = len(file_names) - len(chosen) - num_images
        if num_images <= missing or (2 * num_images <= 3 * missing and 2 * num_left >= len(file_names) - num_wanted):
            chosen.update(photos[name])
    return chosen or set(min(photos.values(), key=len))


def register_parts(name: str, share: float) -> tuple[str, str]:
    """Register the two parts of a registered COCO json as data sets of their own.

    Metadata of the parts: ``image_ids``, to which the evaluation is limited; ``data_notes`` and ``data_warnings``.

    Args:
        name: of the whole data set.
        share: see `choose_images`.

    Returns:
        The names of the data sets to train on and to evaluate on.

    Raises:
        ValueError: as `choose_images`; or the part to train on has no objects.
    """
    whole = MetadataCatalog.get(name)
    images = DatasetCatalog.get(name)
    chosen = choose_images([os.path.relpath(image["file_name"], whole.image_root) for image in images], share)
    parts = {
        "train": [image for index, image in enumerate(images) if index not in chosen],
        "val": [image for index, image in enumerate(images) if index in chosen],
    }
    num_wanted = max(1, round(share * len(images)))
    note = (
        f"DATASETS.VAL_SHARE {share}: {len(parts['train'])} images of {whole.json_file} are trained on, "
        f"{len(parts['val'])} are evaluated on"
    )
    num_objects = {part: _objects_of_classes(part_images) for part, part_images in parts.items()}
    if not num_objects["train"]:
        raise ValueError(f"{note}, and those to train on have no objects. Give --test-json in place of --val-share")
    classes = sorted(num_objects["train"] | num_objects["val"])
    for part, use in (("train", "to train on"), ("val", "to evaluate on")):
        lacking = [whole.thing_classes[index] for index in classes if index not in num_objects[part]]
        warnings = list(whole.get("data_warnings", ())) if part == "train" else []
        if part == "val" and not 0.5 <= len(chosen) / num_wanted <= 2:
            warnings.append(f"{note}; images of one photo stay together: give --test-json for other numbers")
        if not num_objects[part]:
            warnings.append(f"{note}; the images {use} have no objects")
        elif lacking:
            shown = ", ".join(lacking[:10]) + ", ..." * (len(lacking) > 10)
            warnings.append(f"{note}; the images {use} have no object of {len(lacking)} classes: {shown}")
        _register_part(f"{name}_{part}", name, parts[part], warnings, [note] if part == "train" else [])
    return f"{name}_train", f"{name}_val"


def _objects_of_classes(images: list[dict]) -> Counter[int]:
    annotations = (annotation for image in images for annotation in image["annotations"])
    return Counter(annotation["category_id"] for annotation in annotations if not annotation.get("iscrowd", 0))


def _register_part(part: str, whole: str, images: list[dict], warnings: list[str], notes: list[str]) -> None:
    ids = {image["image_id"] for image in images}
    entries = MetadataCatalog.get(whole).as_dict()
    entries.pop("name", None)
    num_instances, sides = (entries.pop(name, {}) for name in ("num_instances", "object_sides"))
    # Metadata cannot be changed once set.
    DatasetCatalog.pop(part, None)
    MetadataCatalog.pop(part, None)
    DatasetCatalog.register(part, lambda: [image for image in DatasetCatalog.get(whole) if image["image_id"] in ids])
    MetadataCatalog.get(part).set(
        **{
            **entries,
            "image_ids": sorted(ids),
            "num_instances": Counter({key: count for key, count in num_instances.items() if key in ids}),
            "object_sides": {key: each for key, each in sides.items() if key in ids},
            "data_warnings": warnings,
            "data_notes": notes,
        }
    )
