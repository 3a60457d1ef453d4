"""Convert annotations of labelme, VIA, YOLO and masks to the content of a COCO json."""

import contextlib
import posixpath
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import yaml
from pycocotools import mask as coco_mask
from scipy import ndimage

from sparseinst.data.annotated_images import AnnotatedImages, file_names, mask_names, tails
from sparseinst.data.image_formats import IMAGE_SUFFIXES
from sparseinst.data.images import MAX_IMAGE_PIXELS
from sparseinst.data.json_file import read_json
from sparseinst.data.mask_decoding import TOO_FEW_POINTS, check_polygon
from sparseinst.data.mask_files import read_mask_values
from sparseinst.data.other_formats import LABELME, MASKS, VIA, YOLO, content_format, is_yolo, list_files, path_format

# The image and the class of an object, and its polygons [x0, y0, x1, y1, ...] in pixels, or its mask as an RLE.
Object = tuple[Path, str, list[list[float]] | dict]


def read_labelme(file: Path, folder: Path, images: AnnotatedImages) -> Iterator[Object]:
    """Yield the objects of a labelme file below ``folder``; shapes of one label and group are one object."""
    if content_format(content := read_json(file)) != LABELME:
        return
    name = PureWindowsPath(file.parent.relative_to(folder)) / content["imagePath"]
    image, groups = images.find(file_names(PurePosixPath(posixpath.normpath(name.as_posix())))), {}
    declared, size = (content.get("imageHeight"), content.get("imageWidth")), images.sizes[image]
    if None not in declared and declared != size:
        turned = " (the annotation tool may ignore EXIF's rotation)" * (declared == size[::-1])
        raise ValueError(
            f"imageHeight and imageWidth are {declared}, but {image} has {size}{turned}: give the images that were "
            "annotated, or scale points, imageHeight and imageWidth"
        )
    for number, shape in enumerate(content["shapes"]):
        kind, points, group = shape.get("shape_type", "polygon"), shape["points"], shape.get("group_id")
        if kind == "mask":
            raise ValueError("a shape of type 'mask'; expected polygons, rectangles or circles")
        if kind in ("polygon", "rectangle", "circle"):
            if kind == "rectangle" and len(points) == 2:
                points = _rectangle(*points[0], *points[1])
            elif kind == "circle":
                radius = np.hypot(points[1][0] - points[0][0], points[1][1] - points[0][1])
                points = _ellipse(*points[0], radius, radius)
            key = (shape["label"], number if group is None else ("group", group))
            groups.setdefault(key, []).append(np.array(points, dtype=np.float64).reshape(-1).tolist())
    yield from ((image, label, polygons) for (label, _), polygons in groups.items())


def read_via(file: Path, images: AnnotatedImages) -> Iterator[Object]:
    """Yield the regions of a VIA project; the first attribute of a region is its class."""
    if content_format(content := read_json(file)) != VIA:
        return
    for entry in content.get("_via_img_metadata", content).values():
        regions = entry["regions"]
        for region in regions.values() if isinstance(regions, dict) else regions:
            shape, label = (
                region["shape_attributes"],
                next(iter(region.get("region_attributes", {}).values()), "object"),
            )
            if isinstance(label, dict):  # of checkboxes
                label = next((name for name, is_set in label.items() if is_set), "object")
            if shape["name"] in ("polygon", "polyline"):
                points = np.stack([shape["all_points_x"], shape["all_points_y"]], axis=1)
            elif shape["name"] == "rect":
                x, y = shape["x"], shape["y"]
                points = _rectangle(x, y, x + shape["width"], y + shape["height"])
            elif shape["name"] in ("circle", "ellipse"):
                radii = (shape["r"],) * 2 if shape["name"] == "circle" else (shape["rx"], shape["ry"])
                points = _ellipse(shape["cx"], shape["cy"], *radii, shape.get("theta", 0))
            else:
                continue
            image = images.find(file_names(PureWindowsPath(entry["filename"])))
            yield image, "" if label is None else str(label), [points.reshape(-1).astype(float).tolist()]


def read_yolo(file: Path, folder: Path, images: AnnotatedImages, classes: dict[int, str]) -> Iterator[Object]:
    """Yield the lines of a file of YOLO segmentation labels below ``folder``; without ``classes`` numbers are names."""
    names = list(tails(file.relative_to(folder).with_suffix("")))
    if not images.matches(names) and not is_yolo(file):  # a list of classes or images, or a readme
        return
    image = images.find(names)
    height, width = images.sizes[image]
    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(map(str.split, lines), 1):
        if not line:
            continue
        try:
            index, points = int(line[0]), np.array(line[1:], dtype=np.float64)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}; expected the number of a class and coordinates") from error
        if len(points) < 6 or len(points) % 2:
            raise ValueError(f"line {number}: {len(points)} coordinates; expected a polygon (boxes: no masks)")
        if index < 0 or (classes and index not in classes):
            expected = f"one of {classes}: correct the line, data.yaml or --classes" if classes else "0 or more"
            raise ValueError(f"line {number}: class {index}; expected {expected}")
        label = classes.get(index, f"class {index}")
        yield image, label, [(points.reshape(-1, 2) * (width, height)).reshape(-1).round(2).tolist()]


def read_yolo_classes(source: Path, images: Path) -> dict[int, str]:
    """Return the classes of ``source``, or of a data.yaml next to labels or images, by number; empty without one."""
    folders = [source, *source.resolve().parents[:2], images, *images.resolve().parents[:2]]
    files = [source, *(folder / "data.yaml" for folder in folders)]
    file = next((file for file in files if file.suffix in (".yaml", ".yml") and file.is_file()), None)
    if file is None:
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not valid YAML: {reason}; correct it, or give --classes") from error
    names = content.get("names") if isinstance(content, dict) else None
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict):
        raise ValueError(f"{file} has no class names; expected an entry such as names: [cat, dog], or give --classes")
    try:
        return dict(sorted((int(str(key)), str(name)) for key, name in names.items()))
    except ValueError as error:
        raise ValueError(f"{file} has names with a key that is not a number: {error}; expected {{0: cat}}") from error


def read_masks(file: Path, folder: Path, images: AnnotatedImages, meaning: str, max_pixels: int) -> Iterator[Object]:
    """Yield the objects of a mask below ``folder``; RGB masks have a color for each object or class."""
    image = images.find(mask_names(file.relative_to(folder).with_suffix("")))
    if file.samefile(image):
        raise ValueError(
            f"the file is one of the images and would be read as its own mask: {folder} has no labelme, VIA or YOLO "
            "annotations; give the folder of the annotations, or a folder with masks alone"
        )
    values = read_mask_values(file, max_pixels)
    if values.shape != images.sizes[image]:
        raise ValueError(
            f"the mask has {values.shape} pixels (height, width), and its image {image} has {images.sizes[image]}: "
            "resize the mask"
        )
    if meaning == "files":
        values = values > 0
    present = np.unique(values[values > 0]).tolist()
    are_regions = meaning == "classes" or (meaning == "objects" and len(present) == 1)
    for value in present:
        regions, count = ndimage.label(values == value) if are_regions else (values == value, 1)
        for number in range(1, count + 1):
            rle = coco_mask.encode(np.asfortranarray(regions == number, dtype=np.uint8))
            yield (
                image,
                f"class {value}" if meaning == "classes" else "object",
                {**rle, "counts": rle["counts"].decode()},
            )


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _ellipse(x: float, y: float, x_radius: float, y_radius: float, turn: float = 0) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    along, across = x_radius * np.cos(angles), y_radius * np.sin(angles)
    sine, cosine = np.sin(turn), np.cos(turn)
    return np.stack([x + cosine * along - sine * across, y + sine * along + cosine * across], axis=1)


def convert(
    source: Path,
    image_root: Path,
    classes: Sequence[str] = (),
    *,
    values: str = "objects",
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> dict:
    """Return a COCO data set of annotations, with all images of a folder.

    Args:
        source: file or folder of the annotations.
        image_root: folder of the images.
        classes: all class names in the model's order; empty: as found.
        values: meaning of the values of masks: "objects", "classes", or "files": each file is one object.
        max_pixels: larger images are refused.

    Raises:
        ValueError: the format is not known, an annotation fits no image or several, or its class is not in ``classes``.
    """
    kind = path_format(source)
    if kind is None:
        raise ValueError(f"{source}: no labelme, VIA or YOLO annotations and no masks; see docs/data_formats.md")
    folder = source.parent if source.is_file() else source
    images = AnnotatedImages(image_root, max_pixels, masks=folder if kind == MASKS else None)
    suffixes: Sequence[str] = (".json",)
    if kind == LABELME:
        read = partial(read_labelme, folder=folder, images=images)
    elif kind == VIA:
        read = partial(read_via, images=images)
    elif kind == YOLO:
        class_names = dict(enumerate(classes)) or read_yolo_classes(source, image_root)
        classes, suffixes = list(class_names.values()), (".txt",)
        read = partial(read_yolo, folder=folder, images=images, classes=class_names)
    else:
        suffixes = IMAGE_SUFFIXES
        read = partial(read_masks, folder=folder, images=images, meaning=values, max_pixels=max_pixels)
    objects, sources = [], {}
    for file in [source] if source.is_file() and kind in (LABELME, VIA) else list_files(folder, suffixes):
        with _named(file):
            for image, label, shape in read(file):
                # Objects of one image may have several masks, but not two that are equal.
                key = image, shape["counts"] if isinstance(shape, dict) else ""
                if (other := sources.setdefault(key, file)) != file:
                    raise ValueError(
                        f"{image} has objects in {other} too, which would double them: remove one file, or merge them"
                    )
                if not (isinstance(label, str) and label.strip()):
                    raise ValueError(f"an object of {image} has the label {label!r}; expected the name of its class")
                objects.append((image, label, _encode(shape, images.sizes[image])))
    found = sorted({label for _, label, _ in objects})
    classes = classes or found
    if unknown := set(found) - set(classes):
        raise ValueError(f"the class {min(unknown)!r} is not one of {classes}; give all of them with --classes")
    ids = {path: number for number, path in enumerate(images.sizes, 1)}
    annotations = [
        {"id": number, "image_id": ids[image], "category_id": 1 + classes.index(label), **encoded}
        for number, (image, label, encoded) in enumerate((entry for entry in objects if entry[2]), 1)
    ]
    entries = [
        {"id": ids[path], "file_name": path.relative_to(image_root).as_posix(), "height": size[0], "width": size[1]}
        for path, size in images.sizes.items()
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    return {"images": entries, "annotations": annotations, "categories": categories}


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Add the annotation file to errors that do not name it."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"an annotation that cannot be read: {error!r}"
        raise ValueError(reason if str(file) in reason else f"{file}: {reason}") from error


def _encode(shape: list[list[float]] | dict, size: tuple[int, int]) -> dict | None:
    """Return COCO's fields of a shape in an image of a size (height, width); None without a polygon of three points."""
    if isinstance(shape, dict):
        segmentation = rle = shape
    elif segmentation := [polygon for polygon in shape if check_polygon(polygon, size) != TOO_FEW_POINTS]:
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    else:
        return None
    area, box = float(coco_mask.area(rle)), coco_mask.toBbox(rle).tolist()
    return {"area": area, "bbox": box, "iscrowd": 0, "segmentation": segmentation}
