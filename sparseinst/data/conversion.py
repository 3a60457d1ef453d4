"""Convert annotations of labelme, VIA, YOLO and masks to the content of a COCO json."""

import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

import numpy as np
import yaml
from pycocotools import mask as coco_mask
from scipy import ndimage

from sparseinst.data.image_formats import FORMATS, IMAGE_SUFFIXES
from sparseinst.data.images import MAX_IMAGE_PIXELS, open_image, read_image_size
from sparseinst.data.json_file import read_json
from sparseinst.data.other_formats import LABELME, MASKS, VIA, YOLO, content_format, list_files, path_format

# The image and the class of an object, and its polygons [x0, y0, x1, y1, ...] in pixels, or its mask as an RLE.
Object = tuple[Path, str, list[list[float]] | dict]
# Maps an annotation file and the possible names of its image, the best first, to the image.
Find = Callable[[Path, Iterable[PurePosixPath]], Path]


def read_labelme(source: Path, find: Find) -> Iterator[Object]:
    """Yield the objects of labelme files; shapes of one label and group are one object."""
    folder = source if source.is_dir() else source.parent
    for file in list_files(source, (".json",)) if source.is_dir() else [source]:
        if content_format(content := read_json(file)) != LABELME:
            continue
        name = PureWindowsPath(file.parent.relative_to(folder)) / content["imagePath"]
        image, groups = find(file, _file_names(PurePosixPath(posixpath.normpath(name.as_posix())))), {}
        for number, shape in enumerate(content["shapes"]):
            kind, points, group = shape.get("shape_type", "polygon"), shape["points"], shape.get("group_id")
            if kind == "mask":
                raise ValueError(f"{file} has a shape of type 'mask'; expected polygons, rectangles or circles")
            if kind in ("polygon", "rectangle", "circle"):
                if kind == "rectangle" and len(points) == 2:
                    points = _rectangle(*points[0], *points[1])
                elif kind == "circle":
                    radius = np.hypot(points[1][0] - points[0][0], points[1][1] - points[0][1])
                    points = _ellipse(*points[0], radius, radius)
                key = (shape["label"], number if group is None else ("group", group))
                groups.setdefault(key, []).append(np.array(points, dtype=np.float64).reshape(-1).tolist())
        yield from ((image, label, polygons) for (label, _), polygons in groups.items())


def read_via(source: Path, find: Find) -> Iterator[Object]:
    """Yield the regions of a VIA project; the first attribute of a region is its class."""
    file = source if source.is_file() else min(source.rglob("*.json"))
    content = read_json(file)
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
            image = find(file, _file_names(PureWindowsPath(entry["filename"])))
            yield image, str(label), [points.reshape(-1).astype(float).tolist()]


def read_yolo(source: Path, find: Find, sizes: dict[Path, tuple[int, int]], classes: Sequence[str]) -> Iterator[Object]:
    """Yield the lines of YOLO segmentation labels."""
    for file in list_files(source, (".txt",)):
        if file.stem in ("classes", "train", "val", "test"):
            continue
        image = find(file, _tails(file.relative_to(source).with_suffix("")))
        height, width = sizes[image]
        for line in filter(None, map(str.split, file.read_text(encoding="utf-8-sig").splitlines())):
            points = np.array(line[1:], dtype=np.float64)
            if len(points) < 6 or len(points) % 2:
                raise ValueError(f"{file}: a line of {len(points)} coordinates; expected a polygon (boxes: no masks)")
            index = int(line[0])
            label = classes[index] if index < len(classes) else f"class {index}"
            yield image, label, [(points.reshape(-1, 2) * (width, height)).reshape(-1).round(2).tolist()]


def read_yolo_classes(source: Path, images: Path) -> list[str]:
    """Return the class names of ``source``, or of a data.yaml next to labels or images; empty without one."""
    folders = [source, *source.resolve().parents[:2], images, *images.resolve().parents[:2]]
    files = [source, *(folder / "data.yaml" for folder in folders)]
    file = next((file for file in files if file.suffix in (".yaml", ".yml") and file.is_file()), None)
    if file is None:
        return []
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not valid YAML: {reason}; correct it, or give --classes") from error
    names = content.get("names") if isinstance(content, dict) else None
    names = list(names.values()) if isinstance(names, dict) else names
    if not isinstance(names, list):
        raise ValueError(f"{file} has no class names; expected an entry such as names: [cat, dog], or give --classes")
    return list(map(str, names))


def read_masks(
    source: Path, find: Find, sizes: dict[Path, tuple[int, int]], by_class: bool, max_pixels: int
) -> Iterator[Object]:
    """Yield the objects of masks; RGB masks have a color for each object or class."""
    for file in list_files(source, IMAGE_SUFFIXES):
        image = find(file, _mask_names(file.relative_to(source).with_suffix("")))
        if file.samefile(image):
            raise ValueError(
                f"{file} is one of the images and would be read as its own mask: {source} has no labelme, VIA or YOLO "
                "annotations; give the folder of the annotations, or a folder with masks alone"
            )
        with open_image(file, max_pixels) as opened:
            is_index = opened.mode in ("1", "L", "P") or opened.mode.startswith("I")
            values = np.array(opened if is_index else opened.convert("RGB")).astype(np.int64)
        if file.suffix.lower() in FORMATS["JPEG"]:  # its edges are blurred
            values = ((values if is_index else values.max(axis=2)) > 127).astype(np.int64)
        elif not is_index:
            values = values @ (65536, 256, 1)
        if values.shape != sizes[image]:
            raise ValueError(
                f"the mask {file} has {values.shape} pixels (height, width), and its image {image} has {sizes[image]}: "
                "resize the mask"
            )
        present = np.unique(values[values > 0]).tolist()
        for value in present:
            regions, count = ndimage.label(values == value) if by_class or len(present) == 1 else (values == value, 1)
            for number in range(1, count + 1):
                rle = coco_mask.encode(np.asfortranarray(regions == number, dtype=np.uint8))
                yield image, f"class {value}" if by_class else "object", {**rle, "counts": rle["counts"].decode()}


def _tails(name: PurePath) -> Iterator[PurePosixPath]:
    """Yield /a/b, a/b and b: the name below the folder, which must fit whole, then its ends."""
    parts = PurePosixPath("/", name.as_posix()).parts
    yield from (PurePosixPath(*parts[start:]) for start in range(len(parts)))


def _file_names(name: PurePath) -> Iterator[PurePosixPath]:
    """Yield each of `_tails` with and without its suffix, because the image may have another one."""
    for tail in _tails(name):
        yield from (tail, tail.with_suffix(""))


def _mask_names(name: PurePath) -> Iterator[PurePosixPath]:
    """Yield the names that a mask a/b_1 gives its image: a/b_1, a/b, a, then b_1 and b.

    The outer folder precedes the file's name, because the masks of one image may be numbered like other images.
    """
    for tail in _tails(name):
        yield from (tail, tail.with_name(tail.name.rsplit("_", 1)[0] or tail.name), *list(tail.parents)[:-1])


def _without_masks(paths: list[Path], image_root: Path, masks: Path) -> list[Path]:
    """Return the images without those in the folder of the masks, where it is a subfolder of the images."""
    root, masks = image_root.resolve(), masks.resolve()
    if root.is_relative_to(masks):
        return paths
    return [path for path in paths if not (root / path.relative_to(image_root)).is_relative_to(masks)]


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
    by_class: bool = False,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> dict:
    """Return a COCO data set of annotations, with all images of a folder.

    Args:
        source: file or folder of the annotations.
        image_root: folder of the images.
        classes: all class names in the model's order; empty: as found.
        by_class: the values of masks are classes.
        max_pixels: larger images are refused.

    Raises:
        ValueError: the format is not known, an annotation fits no image or several, or its class is not in ``classes``.
    """
    kind = path_format(source)
    if kind is None:
        raise ValueError(f"{source}: no labelme, VIA or YOLO annotations and no masks; see docs/data_formats.md")
    folder = source.parent if source.is_file() else source
    paths = list_files(image_root, IMAGE_SUFFIXES)
    if kind == MASKS:
        paths = _without_masks(paths, image_root, folder)
    sizes = {path: read_image_size(path, max_pixels) for path in paths}
    paths_of_name: dict[PurePosixPath, list[Path]] = {}
    for path in paths:
        relative = path.relative_to(image_root)
        for name in (relative, relative.with_suffix("")):
            for tail in _tails(name):
                paths_of_name.setdefault(tail, []).append(path)

    def find(file: Path, names: Iterable[PurePosixPath]) -> Path:
        names = list(names)
        found = next((paths_of_name[name] for name in names if name in paths_of_name), [])
        name = str(names[0])[1:]
        if not found:
            raise ValueError(f"{image_root} has no image {name!r}, which {file} annotates")
        if len(found) > 1:
            raise ValueError(
                f"{file} annotates {name!r}, which may be {found[0]} or {found[1]}: convert each folder of images "
                "alone, or rename the images"
            )
        return found[0]

    if kind == LABELME:
        objects = list(read_labelme(source, find))
    elif kind == VIA:
        objects = list(read_via(source, find))
    elif kind == YOLO:
        classes = classes or read_yolo_classes(source, image_root)
        objects = list(read_yolo(folder, find, sizes, classes))
    else:
        objects = list(read_masks(folder, find, sizes, by_class, max_pixels))
    found = sorted({label for _, label, _ in objects})
    classes = classes or found
    if unknown := set(found) - set(classes):
        raise ValueError(f"the class {min(unknown)!r} is not one of {classes}; give all of them with --classes")
    ids = {path: number for number, path in enumerate(paths, 1)}
    annotations = []
    for path, label, shape in objects:
        if isinstance(shape, dict):
            segmentation = rle = shape
        elif segmentation := [polygon for polygon in shape if len(polygon) >= 6]:
            rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, *sizes[path]))
        if segmentation:
            annotations.append({
                "id": len(annotations) + 1, "image_id": ids[path], "category_id": 1 + classes.index(label),
                "area": float(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist(), "iscrowd": 0,
                "segmentation": segmentation,
            })  # fmt: skip
    images = [
        {"id": ids[path], "file_name": path.relative_to(image_root).as_posix(), "height": size[0], "width": size[1]}
        for path, size in sizes.items()
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}
