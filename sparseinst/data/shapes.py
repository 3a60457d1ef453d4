"""Draw shapes: a small instance segmentation data set of four classes that differ only in shape.

Color, texture, area and position do not depend on the class. Rotations are redrawn until the shapes fit; areas and
positions are redrawn only where no rotation fits (about 1 % of the images), because that would favor some classes.
Coordinates are COCO's: x right, y down, in pixels; pixel (x, y) covers [x, x + 1) x [y, y + 1).
"""

from typing import Any, NamedTuple

import cv2
import numpy as np
import shapely
from pycocotools import mask as coco_mask
from shapely.geometry import Polygon

Rng = np.random.Generator
Annotations = list[dict[str, Any]]
_Member = tuple[int, float, np.ndarray]  # class, side, center


def _unit_outline(points: list[tuple[float, float]] | np.ndarray) -> np.ndarray:
    """Move a polygon's centroid to the origin and scale its area to 1; return (P, 2)."""
    polygon = Polygon(points)
    return (np.array(points) - np.array(polygon.centroid.coords[0])) / np.sqrt(polygon.area)


def _on_circle(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


_PLUS = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]
# Category ids are 1, 2, ... in this order.
SHAPES: dict[str, np.ndarray] = {
    "disc": _unit_outline(_on_circle(2 * np.pi * np.arange(64) / 64)),
    "triangle": _unit_outline(_on_circle(2 * np.pi * np.arange(3) / 3)),
    "cross": _unit_outline(_PLUS),
    "bar": _unit_outline([(0, 0), (4, 0), (4, 1), (0, 1)]),
}
CLASS_NAMES = list(SHAPES)
TEXTURES = ("flat", "stripes", "checks", "noise")
BACKGROUNDS = ("gradient", "stripes", "checks", "noise")
MIN_SIZE = 64  # pixels; in smaller images the smallest object would have fewer than 20
MAX_OBJECTS = 8
EMPTY_SHARE = 0.05  # share of the images that have no object
MIN_VISIBLE = 0.5  # least visible share of an object's full area

_AREA_RANGE = (0.0056, 0.195)  # share of the image; rasterization changes the promised 0.5 % to 20 % by a few pixels
_MAX_COVERAGE = 0.46  # sum of all full areas over image area; more cannot be placed
_MIN_HIDDEN_AREA = 0.0125  # least share of the image of an object that may be half hidden
_PAIR_SHARE = 0.265  # of the possible pairs; makes about a quarter of the objects overlap another
_REACH = max(float(np.linalg.norm(outline, axis=1).max()) for outline in SHAPES.values())  # at area 1
_DISC_RADIUS = 1 / np.sqrt(np.pi)  # at area 1
_CLEARANCE = 0.72  # least distance of the centers of separate objects, over the sum of their sides
_GAP = 1.5  # pixels between separate objects
_MIN_PART = 6.0  # pixels of each visible part
_MIN_COLOR_DISTANCE = 110.0  # RGB distance of the first tones of an object, its background and its partner
_TONE_SPREAD = (20.0, 50.0)  # RGB distance of the second tone from the first
_SUPERSAMPLING = 8
_SUBPIXEL_BITS = 6  # of OpenCV's fixed-point coordinates


class ShapeObject(NamedTuple):
    """Describe one object, or one member of the crowd.

    outline: the full one, (P, 2) x and y in pixels. visible: polygons (P, 2) of the part that no other object hides.
    texture: one of TEXTURES. tones: (2, 3) the two RGB colors of the texture.
    """

    class_index: int
    is_crowd: bool
    outline: np.ndarray
    visible: list[np.ndarray]
    texture: str
    tones: np.ndarray


class ShapeScene(NamedTuple):
    """Describe an image: objects from the lowest to the uppermost over a background of two RGB tones (2, 3)."""

    image_size: tuple[int, int]
    background: str
    background_tones: np.ndarray
    objects: list[ShapeObject]


def _pattern(rng: Rng, texture: str, size: tuple[int, int], length: int) -> np.ndarray:
    """Draw a texture (H, W) in [0, 1], 0 for the first tone and 1 for the second; its scale is relative to length."""

    def ramp(angle: float, frequency: float = 1.0, phase: float = 0.0) -> np.ndarray:
        x = np.arange(size[1], dtype=np.float32) * np.float32(frequency * np.cos(angle))
        y = np.arange(size[0], dtype=np.float32) * np.float32(frequency * np.sin(angle))
        return x + (y[:, None] + np.float32(phase))

    def wave(wavelength: float, angle: float) -> np.ndarray:
        return np.clip(3 * np.sin(ramp(angle, 2 * np.pi / wavelength, rng.uniform(0, 2 * np.pi))), -1, 1)

    if texture == "flat":
        return np.full(size, 0.5, np.float32)
    if texture == "stripes":
        return (wave(length * rng.uniform(0.05, 0.13), rng.uniform(0, np.pi)) + 1) / 2
    if texture == "checks":
        wavelength, angle = length * rng.uniform(0.06, 0.16), rng.uniform(0, np.pi)
        return (wave(wavelength, angle) * wave(wavelength, angle + np.pi / 2) + 1) / 2
    if texture == "noise":
        cell = length * rng.uniform(0.025, 0.12)
        cells = rng.random((int(size[0] / cell) + 2, int(size[1] / cell) + 2), dtype=np.float32)
        return np.clip(cv2.resize(cells, size[::-1], interpolation=cv2.INTER_CUBIC), 0, 1)
    values = ramp(rng.uniform(0, 2 * np.pi))
    return (values - values.min()) / (values.max() - values.min())


def _draw_tones(rng: Rng, others: list[np.ndarray]) -> np.ndarray:
    """Draw two RGB tones (2, 3), the first one far from the first tones of the others."""
    candidates = rng.uniform(15, 240, (64, 3))
    others_first = np.array([tones[0] for tones in others]).reshape(-1, 1, 3)
    distances = np.linalg.norm(candidates - others_first, axis=2).min(axis=0, initial=np.inf)
    far_enough = distances >= _MIN_COLOR_DISTANCE
    first = candidates[np.argmax(far_enough if far_enough.any() else distances)]
    direction = rng.normal(size=3)
    second = first + direction / np.linalg.norm(direction) * rng.uniform(*_TONE_SPREAD)
    return np.stack([first, np.clip(second, 0, 255)])


def _draw_layout(rng: Rng, image_size: tuple[int, int], num: int, crowd: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Draw sides (N,), the roots of the areas, centers (N, 2) and the number of overlapping pairs.

    Pairs come first, a crowd last.
    """
    height, width = image_size
    scale = np.sqrt(height * width)
    # In a long narrow image the largest areas would not fit in every class's shape.
    largest = min(np.sqrt(_AREA_RANGE[1]) * scale, (min(height, width) / 2 - 1) / _REACH)
    smallest = np.sqrt(_AREA_RANGE[0]) * scale
    while True:
        num_pairs = int(rng.binomial((num - crowd) // 2, _PAIR_SHARE))
        # Large objects are drawn more often, because layouts with many of them are more likely to be rejected.
        rows = smallest + (largest - smallest) * np.sqrt(rng.uniform(size=(32, num)))
        if crowd:
            rows[:, -1] = rng.uniform(0.55, 0.75) * largest
        fitting = np.flatnonzero((rows**2).sum(axis=1) <= _MAX_COVERAGE * height * width)
        if len(fitting):
            sides = rows[fitting[0]]
            # Large objects are placed first, because few layouts of many objects would succeed otherwise.
            sides[2 * num_pairs : num - crowd][::-1].sort()
            centers = _place(rng, image_size, sides, num_pairs)
            if centers is not None:
                return sides, centers, num_pairs


def _place(rng: Rng, image_size: tuple[int, int], sides: np.ndarray, num_pairs: int) -> np.ndarray | None:
    """Draw centers (N, 2) for :func:`_draw_layout`; None without enough room."""
    height, width = image_size
    placed = np.zeros((len(sides), 2))
    for index, side in enumerate(sides):
        margin = _REACH * side + 1
        is_partner = index < 2 * num_pairs and index % 2 == 1
        if is_partner:
            # Discs of the two areas would overlap by this share of the smaller one's radius.
            depth = rng.uniform(0.3, 0.8, 48) * min(side, sides[index - 1])
            distance = _DISC_RADIUS * (side + sides[index - 1] - depth)
            centers = placed[index - 1] + distance[:, None] * _on_circle(rng.uniform(0, 2 * np.pi, 48))
        else:
            centers = rng.uniform((margin, margin), (width - margin, height - margin), (48, 2))
        free = (centers >= margin).all(axis=1) & (centers <= (width - margin, height - margin)).all(axis=1)
        others = index - is_partner
        clearance = _CLEARANCE * (side + sides[:others])
        free &= (((centers[:, None] - placed[:others]) ** 2).sum(axis=2) >= clearance**2).all(axis=1)
        if not free.any() or (is_partner and max(side, sides[index - 1]) ** 2 < _MIN_HIDDEN_AREA * height * width):
            return None
        placed[index] = centers[np.argmax(free)]
    return placed


def _rotated_outline(rng: Rng, class_index: int, side: float, center: np.ndarray) -> np.ndarray:
    """Return the outline (P, 2) of a shape of area side ** 2 in a random rotation."""
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return SHAPES[CLASS_NAMES[class_index]] @ rotation * side + center


def _crowd_outlines(rng: Rng, class_index: int, side: float, center: np.ndarray) -> list[np.ndarray]:
    """Draw seven shapes of one class that touch each other, one in the middle of six, within the reach of the side."""
    spacing = 2 * _DISC_RADIUS * 0.9  # of members of side 1; a little less than discs that just touch
    side = side * _REACH / (_REACH + spacing)
    ring = rng.uniform(0, 2 * np.pi) + np.pi / 3 * np.arange(6)
    offsets = np.concatenate([np.zeros((1, 2)), _on_circle(ring)])
    return [_rotated_outline(rng, class_index, side, place) for place in center + spacing * side * offsets]


def _visible_parts(lower: Polygon, upper: Polygon | None = None) -> list[Polygon] | None:
    """Return the visible polygons of the lower one; None where the two do not overlap well, or with holes or specks."""
    if upper is None:
        return [lower]
    visible = lower.difference(upper)
    parts = list(shapely.get_parts(visible))
    is_good = MIN_VISIBLE * lower.area <= visible.area <= lower.area - _MIN_PART and all(
        part.geom_type == "Polygon" and not len(part.interiors) and part.area >= _MIN_PART for part in parts
    )
    return parts if is_good else None


def compose_scene(rng: Rng, height: int, width: int, *, with_crowd: bool = False) -> ShapeScene:
    """Draw the objects of one image with their positions, textures and colors.

    Args:
        rng: the only source of chance.
        height, width: of the image, pixels, each at least MIN_SIZE.
        with_crowd: add a group of touching shapes of one class, annotated as one crowd; there are fewer objects then.

    Raises:
        ValueError: the image is too small.
    """
    if min(height, width) < MIN_SIZE:
        raise ValueError(f"Images of shapes need a size of at least {MIN_SIZE} pixels, not {height} x {width}")
    is_empty = rng.random() < EMPTY_SHARE and not with_crowd
    # Few objects are more likely than many, since many leave no room for large ones.
    counts = np.arange(1, (MAX_OBJECTS // 2 if with_crowd else MAX_OBJECTS) + 1)
    num_objects = 0 if is_empty else int(rng.choice(counts, p=counts[::-1] / counts.sum()))
    background = str(rng.choice(BACKGROUNDS))
    background_tones = _draw_tones(rng, [])
    # Classes are drawn once. Redrawing them with each rejected layout would favor classes that fit easily.
    classes = rng.integers(len(SHAPES), size=num_objects + with_crowd).tolist()
    while True:
        sides, centers, num_pairs = _draw_layout(rng, (height, width), len(classes), with_crowd)
        members = list(zip(classes, sides, centers))
        for _ in range(10):
            shapes = _rotate_members(rng, members, num_pairs, with_crowd, height * width, background_tones)
            if shapes is not None:
                return ShapeScene((height, width), background, background_tones, shapes)


def _rotate_members(
    rng: Rng, members: list[_Member], num_pairs: int, with_crowd: bool, image_area: int, background_tones: np.ndarray
) -> list[ShapeObject] | None:
    """Draw rotations, tones and textures, from the lowest to the uppermost; None where the shapes do not fit."""
    objects: list[ShapeObject] = []

    def add(class_index: int, is_crowd: bool, outline: np.ndarray, visible: list[np.ndarray], avoid: list) -> None:
        avoid.append(_draw_tones(rng, avoid))
        objects.append(ShapeObject(class_index, is_crowd, outline, visible, str(rng.choice(TEXTURES)), avoid[-1]))

    if with_crowd:
        *members, crowd = members
        for outline in _crowd_outlines(rng, *crowd):
            add(crowd[0], True, outline, [outline], [background_tones])
    groups = [members[index : index + 2][::-1] for index in range(0, 2 * num_pairs, 2)]
    for group in groups:
        rng.shuffle(group)
        if group[0][1] ** 2 < _MIN_HIDDEN_AREA * image_area:
            group.reverse()
    for group in groups + [[member] for member in members[2 * num_pairs :]]:
        placed = [Polygon(shape.outline) for shape in objects]
        for _ in range(80):
            outlines = [_rotated_outline(rng, *member) for member in group]
            polygons = [Polygon(outline) for outline in outlines]
            if placed and any(shapely.dwithin(polygon, placed, _GAP).any() for polygon in polygons):
                continue
            visible = _visible_parts(*polygons)
            if visible is not None:
                break
        else:
            return None
        avoid = [background_tones]
        for member, outline, parts in zip(group, outlines, [visible, polygons[1:]]):
            add(member[0], False, outline, [np.array(part.exterior.coords[:-1]) for part in parts], avoid)
    return objects


def rasterize(outlines: list[np.ndarray], image_size: tuple[int, int]) -> np.ndarray:
    """Return the share (H, W) of each pixel that polygons (P, 2) cover together, float32; ``> 0.5`` gives a mask."""
    height, width = image_size
    fine = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    for outline in outlines:
        # OpenCV puts pixel centers at whole numbers, COCO at halves.
        corners = (outline * _SUPERSAMPLING - 0.5) * 2**_SUBPIXEL_BITS
        cv2.fillPoly(fine, [np.round(corners).astype(np.int32)], 255, shift=_SUBPIXEL_BITS)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _mix(pattern: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """Return the image (H, W, 3) of a pattern (H, W) in the tones (2, 3)."""
    first, second = tones.astype(np.float32)
    return first + pattern[..., None] * (second - first)


def paint_scene(rng: Rng, scene: ShapeScene) -> np.ndarray:
    """Draw a scene (H, W, 3) uint8 RGB: textured background, thin lines, objects with smooth edges, blur, noise."""
    height, width = scene.image_size
    length = min(height, width)
    image = _mix(_pattern(rng, scene.background, scene.image_size, length), scene.background_tones)
    for _ in range(rng.integers(0, 5)):
        ends = rng.uniform((0, 0), (width, height), (2, 2)).astype(int).tolist()
        cv2.line(image, ends[0], ends[1], rng.uniform(0, 255, 3).tolist(), 1)
    for shape in scene.objects:
        left, top = np.maximum(np.floor(shape.outline.min(axis=0)).astype(int) - 1, 0)
        right, bottom = np.ceil(shape.outline.max(axis=0)).astype(int) + 1
        window = image[top:bottom, left:right]
        coverage = rasterize([shape.outline - (left, top)], window.shape[:2])[..., None]
        window += coverage * (_mix(_pattern(rng, shape.texture, window.shape[:2], length), shape.tones) - window)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.7))
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(1, 7))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _annotation(class_index: int, segmentation: list | dict, size: tuple[int, int], is_crowd: bool) -> dict[str, Any]:
    encoded = coco_mask.frPyObjects(segmentation, *size)
    encoded = encoded if is_crowd else coco_mask.merge(encoded)
    return {
        "category_id": class_index + 1,
        "segmentation": segmentation,
        "area": int(coco_mask.area(encoded)),
        "bbox": coco_mask.toBbox(encoded).tolist(),
        "iscrowd": int(is_crowd),
    }


def annotate_scene(scene: ShapeScene) -> Annotations:
    """Return COCO annotations of a scene's visible objects, without ``id`` and ``image_id``; the crowd comes first.

    Objects have polygons, the crowd has uncompressed RLE; the rasterized mask gives ``area`` and ``bbox``.
    """
    annotations = []
    crowd = [shape for shape in scene.objects if shape.is_crowd]
    if crowd:
        mask = rasterize([shape.outline for shape in crowd], scene.image_size) > 0.5
        changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
        counts = np.diff(changes, prepend=0, append=mask.size).tolist()
        rle = {"counts": counts, "size": list(scene.image_size)}
        annotations.append(_annotation(crowd[0].class_index, rle, scene.image_size, True))
    for shape in scene.objects[len(crowd) :]:
        polygons = [polygon.round(2).ravel().tolist() for polygon in shape.visible]
        annotations.append(_annotation(shape.class_index, polygons, scene.image_size, False))
    return annotations


def draw_shapes_image(rng: Rng, height: int, width: int, *, with_crowd: bool = False) -> tuple[np.ndarray, Annotations]:
    """Draw an image (H, W, 3) uint8 RGB and its annotations; arguments and errors as :func:`compose_scene`."""
    scene = compose_scene(rng, height, width, with_crowd=with_crowd)
    return paint_scene(rng, scene), annotate_scene(scene)


def random_ellipses(rng: Rng, image_size: tuple[int, int], num: int, median_area: float = 0.05) -> list[np.ndarray]:
    """Draw outlines (P, 2) of ellipses inside the image, which may overlap; median_area is a share of the image."""
    height, width = image_size
    outlines = []
    for _ in range(num):
        side = np.sqrt(height * width * median_area * np.exp(rng.standard_normal()))
        stretch = np.exp(0.2 * rng.standard_normal())
        center = rng.uniform((1, 1), (width - 1, height - 1))
        outlines.append(np.clip(SHAPES["disc"] * side * (stretch, 1 / stretch) + center, 0, (width, height)))
    return outlines


def draw_ellipses_image(rng: Rng, size: tuple[int, int], num: int, num_classes: int) -> tuple[np.ndarray, Annotations]:
    """Draw an image of noise (H, W, 3) uint8 in size (H, W) and COCO annotations of :func:`random_ellipses`."""
    # Blocks of 8 pixels give about as many bytes as a photograph.
    cells = rng.integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8)
    polygons = [[outline.round(2).ravel().tolist()] for outline in random_ellipses(rng, size, num)]
    classes = rng.integers(num_classes, size=num).tolist()
    annotations = [_annotation(*item, size, False) for item in zip(classes, polygons)]
    return cells.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]], annotations
