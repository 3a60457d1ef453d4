"""Convert annotations of labelme, VIA, YOLO and masks to the content of a COCO json."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath

import numpy as np
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from sparseinst.data.image_formats import FORMATS, IMAGE_SUFFIXES
from sparseinst.data.images import read_image_size
from sparseinst.data.json_file import read_json
from sparseinst.data.other_formats import LABELME, MASKS, VIA, YOLO, content_format, path_format

# The image and the class of an object, and its polygons [x0, y0, x1, y1, ...] in pixels, or its mask, bool (H, W).
Object = tuple[Path, str, list[list[float]] | np.ndarray]


def read_labelme(source: Path, find: Callable[[str], Path], args: argparse.Namespace) -> Iterator[Object]:
    """Yield the objects of labelme files; shapes of one label and group are one object."""
    for file in sorted(source.rglob("*.json")) if source.is_dir() else [source]:
        if content_format(content := read_json(file)) != LABELME:
            continue
        image, groups = find(content["imagePath"]), {}
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


def read_via(source: Path, find: Callable[[str], Path], args: argparse.Namespace) -> Iterator[Object]:
    """Yield the regions of a VIA project; the first attribute of a region is its class."""
    content = read_json(source if source.is_file() else min(source.rglob("*.json")))
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
            yield find(entry["filename"]), str(label), [points.reshape(-1).astype(float).tolist()]


def read_yolo(source: Path, find: Callable[[str], Path], args: argparse.Namespace) -> Iterator[Object]:
    """Yield the lines of YOLO segmentation labels; a data.yaml next to labels or images names the classes."""
    folders = [source, *source.resolve().parents[:2], args.images, *args.images.resolve().parents[:2]]
    for file in [] if args.classes else (file for folder in folders for file in sorted(folder.glob("*.y*ml"))):
        names = (yaml.safe_load(file.read_text(encoding="utf-8-sig")) or {}).get("names", [])
        args.classes = args.classes or list(names.values() if isinstance(names, dict) else names)
    for file in sorted(source.rglob("*.txt")):
        if file.stem in ("classes", "train", "val", "test"):
            continue
        image = find(file.stem)
        height, width = read_image_size(image)
        for line in filter(None, map(str.split, file.read_text(encoding="utf-8-sig").splitlines())):
            points = np.array(line[1:], dtype=np.float64)
            if len(points) < 6 or len(points) % 2:
                raise ValueError(f"{file}: a line of {len(points)} coordinates; expected a polygon (boxes: no masks)")
            index = int(line[0])
            label = args.classes[index] if index < len(args.classes) else f"class {index}"
            yield image, label, [(points.reshape(-1, 2) * (width, height)).reshape(-1).round(2).tolist()]


def read_masks(source: Path, find: Callable[[str], Path], args: argparse.Namespace) -> Iterator[Object]:
    """Yield the objects of masks; RGB masks have a color for each object or class."""
    for file in sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        read_image_size(file)  # refuses huge images
        with Image.open(file, formats=list(FORMATS)) as opened:
            is_index = opened.mode in ("1", "L", "P") or opened.mode.startswith("I")
            values = np.array(opened if is_index else opened.convert("RGB")).astype(np.int64)
        values = values if is_index else values @ (65536, 256, 1)
        if file.suffix.lower() in FORMATS["JPEG"]:  # its edges are blurred
            values = values > 127
        parts = file.relative_to(source).with_suffix("").parts
        image = next(filter(None, (find(part, True) for part in (*reversed(parts), parts[-1].rsplit("_", 1)[0]))), None)
        if image is None or values.shape != read_image_size(image):
            reason = "no image has its name" if image is None else f"its image has {read_image_size(image)} pixels"
            raise ValueError(f"the mask {file} has {values.shape} pixels (height, width); {reason}")
        present = np.unique(values[values > 0]).tolist()
        by_class = args.values == "classes"
        for value in present:
            regions, count = ndimage.label(values == value) if by_class or len(present) == 1 else (values == value, 1)
            for number in range(1, count + 1):
                yield image, f"class {value}" if by_class else "object", regions == number


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _ellipse(x: float, y: float, x_radius: float, y_radius: float, turn: float = 0) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    along, across = x_radius * np.cos(angles), y_radius * np.sin(angles)
    sine, cosine = np.sin(turn), np.cos(turn)
    return np.stack([x + cosine * along - sine * across, y + sine * along + cosine * across], axis=1)


READERS = {LABELME: read_labelme, VIA: read_via, YOLO: read_yolo, MASKS: read_masks}


def convert(args: argparse.Namespace) -> dict:
    """Return a COCO data set of the annotations in ``args.source``, with all images of ``args.images``.

    Raises:
        ValueError: the format is not known, an annotation has no image, or its class is not in ``args.classes``.
    """
    kind = path_format(args.source)
    if kind is None:
        raise ValueError(f"{args.source}: no labelme, VIA or YOLO annotations and no masks; see docs/data_formats.md")
    paths = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    path_of_name = {**{path.stem: path for path in paths}, **{path.name: path for path in paths}}

    def find(name: str, is_optional: bool = False) -> Path | None:
        path = path_of_name.get(PureWindowsPath(name).name) or path_of_name.get(PureWindowsPath(name).stem)
        if path is None and not is_optional:
            raise ValueError(f"{args.images} has no image {name!r}, which {args.source} annotates")
        return path

    source = args.source.parent if kind in (YOLO, MASKS) and args.source.is_file() else args.source
    objects = list(READERS[kind](source, find, args))
    found = sorted({label for _, label, _ in objects})
    classes = args.classes or found
    if unknown := set(found) - set(classes):
        raise ValueError(f"the class {min(unknown)!r} is not one of {classes}; give all of them with --classes")
    sizes = {path: read_image_size(path) for path in paths}
    ids = {path: number for number, path in enumerate(paths, 1)}
    annotations = []
    for path, label, shape in objects:
        if is_mask := isinstance(shape, np.ndarray):
            rle = coco_mask.encode(np.asfortranarray(shape, dtype=np.uint8))
            segmentation = {**rle, "counts": rle["counts"].decode()}
        elif segmentation := [polygon for polygon in shape if len(polygon) >= 6]:
            rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, *sizes[path]))
        if is_mask or segmentation:
            annotations.append({
                "id": len(annotations) + 1, "image_id": ids[path], "category_id": 1 + classes.index(label),
                "area": float(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist(), "iscrowd": 0,
                "segmentation": segmentation,
            })  # fmt: skip
    images = [
        {"id": ids[path], "file_name": path.relative_to(args.images).as_posix(), "height": size[0], "width": size[1]}
        for path, size in sizes.items()
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}
