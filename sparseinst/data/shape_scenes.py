"""What a drawing of shapes shows: which objects, where, in which textures and colours, and what hides what.

Colour, texture, area and position are drawn without knowing the class, so nothing but the outline tells a class. What
depends on the outline (do two shapes touch, how much is hidden) is settled by drawing the rotations again, and only
where that fails (about 1 % of the images) by drawing areas and places again.

Coordinates are COCO's: x right, y down, in pixels; pixel (x, y) covers [x, x + 1) x [y, y + 1).
"""

from typing import NamedTuple

import numpy as np
import shapely
from shapely.geometry import MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

from sparseinst.data.shape_textures import BACKGROUNDS, TEXTURES


def _unit_outline(points: list[tuple[float, float]]) -> np.ndarray:
    """The polygon (P, 2) moved to have its centroid at the origin and scaled to area 1."""
    polygon = Polygon(points)
    return (np.array(points) - np.array(polygon.centroid.coords[0])) / np.sqrt(polygon.area)


def _regular_polygon(num_corners: int) -> list[tuple[float, float]]:
    angles = 2 * np.pi * np.arange(num_corners) / num_corners
    return list(zip(np.cos(angles).tolist(), np.sin(angles).tolist(), strict=True))


_PLUS = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]

# Another class is another line. Category ids are 1, 2, ... in this order.
SHAPES: dict[str, np.ndarray] = {
    "disc": _unit_outline(_regular_polygon(64)),
    "triangle": _unit_outline(_regular_polygon(3)),
    "cross": _unit_outline(_PLUS),
    "bar": _unit_outline([(0, 0), (4, 0), (4, 1), (0, 1)]),
}
CLASS_NAMES = list(SHAPES)

MIN_SIZE = 64  # pixels; below it the smallest object would have fewer than 20
MAX_OBJECTS = 8
EMPTY_SHARE = 0.05  # of images without any object
MIN_VISIBLE = 0.5  # of an object's full area

# Full area over image area. A little inside the promised 0.5 % to 20 %, because rasterising adds or takes a few pixels.
_AREA_RANGE = (0.0056, 0.195)
_MAX_COVERAGE = 0.46  # sum of all full areas over image area; more cannot be placed
_MIN_HIDDEN_AREA = 0.0125  # an object that may be hidden by half is at least this large
_PAIR_SHARE = 0.265  # of the possible pairs; makes about a quarter of the objects overlap another

# The largest extent of a shape of area 1, over all classes: what an object's distance to the border is judged by.
_REACH = max(float(np.linalg.norm(outline, axis=1).max()) for outline in SHAPES.values())
_DISC_RADIUS = 1 / np.sqrt(np.pi)  # of area 1
_CLEARANCE = 0.72  # centres of apart objects: at least this times the sum of their sides
_ROTATION_ROUNDS = 10  # before areas and centres are drawn again too
_GAP = 1.5  # pixels between objects that are to be apart
_MIN_PART = 6.0  # pixels; an object cut in parts has none that is smaller

_MIN_COLOUR_DISTANCE = 110.0  # of two first tones in RGB, object to background and object to the object it overlaps
_TONE_SPREAD = (20.0, 50.0)  # RGB distance of the second tone from the first


class ShapeObject(NamedTuple):
    """One drawn object, or one member of the crowd.

    centre: (x, y) of the centroid, pixels. outline: the full one, (P, 2) x and y in pixels. visible: polygons of what
    no other object hides, each (P, 2). texture: a key of TEXTURES. tones: (2, 3) the two RGB colours of the texture.
    """

    class_index: int
    is_crowd: bool
    centre: np.ndarray
    outline: np.ndarray
    visible: list[np.ndarray]
    texture: str
    tones: np.ndarray


class ShapeScene(NamedTuple):
    """What is to be drawn: objects from the lowest to the uppermost over a background of two RGB tones (2, 3)."""

    image_size: tuple[int, int]
    background: str
    background_tones: np.ndarray
    objects: list[ShapeObject]


class _Slot(NamedTuple):
    """Place of an object before its class is known.

    side: square root of its area, pixels. partner: the earlier slot it overlaps. stays_above: too small to be hidden.
    """

    side: float
    centre: np.ndarray
    partner: int | None
    stays_above: bool


def _draw_tones(rng: np.random.Generator, others: list[np.ndarray]) -> np.ndarray:
    """Two RGB tones (2, 3), the first one far from the first tones of the others."""
    candidates = rng.uniform(15, 240, (64, 3))
    others_first = np.array([tones[0] for tones in others]).reshape(-1, 1, 3)
    distances = np.linalg.norm(candidates - others_first, axis=2).min(axis=0, initial=np.inf)
    far_enough = distances >= _MIN_COLOUR_DISTANCE
    first = candidates[np.argmax(far_enough) if far_enough.any() else np.argmax(distances)]
    direction = rng.normal(size=3)
    second = first + direction / np.linalg.norm(direction) * rng.uniform(*_TONE_SPREAD)
    return np.stack([first, np.clip(second, 0, 255)])


def _draw_slots(rng: np.random.Generator, image_size: tuple[int, int], num_slots: int, crowd: bool) -> list[_Slot]:
    """Areas and centres of all objects, classes unknown; a crowd is the last slot."""
    height, width = image_size
    scale = np.sqrt(height * width)
    # In a long narrow image the largest areas would not fit in every class's shape.
    largest = min(np.sqrt(_AREA_RANGE[1]) * scale, (min(height, width) / 2 - 1) / _REACH)
    smallest = np.sqrt(_AREA_RANGE[0]) * scale
    while True:
        num_pairs = int(rng.binomial((num_slots - crowd) // 2, _PAIR_SHARE))
        # Large ones are drawn more often: layouts that hold many of them are the ones that find no room.
        rows = smallest + (largest - smallest) * np.sqrt(rng.uniform(size=(32, num_slots)))
        if crowd:
            rows[:, -1] = rng.uniform(0.55, 0.75) * largest
        fitting = np.flatnonzero((rows**2).sum(axis=1) <= _MAX_COVERAGE * height * width)
        if not len(fitting):
            continue
        sides = rows[fitting[0]]
        # Large ones are placed before small ones, or few layouts of many objects would come about.
        sides[2 * num_pairs : num_slots - crowd][::-1].sort()
        slots = _place(rng, image_size, sides, num_pairs)
        if slots is not None:
            return slots


def _place(
    rng: np.random.Generator, image_size: tuple[int, int], sides: np.ndarray, num_pairs: int
) -> list[_Slot] | None:
    """Centres for the sides (n,), of which the first 2 * num_pairs overlap two by two; None where there is no room."""
    height, width = image_size
    slots: list[_Slot] = []
    for index, side in enumerate(sides):
        margin = _REACH * side + 1
        partner = index - 1 if index < 2 * num_pairs and index % 2 else None
        if partner is None:
            centres = rng.uniform((margin, margin), (width - margin, height - margin), (48, 2))
        else:
            # Discs of the two areas would overlap by this share of the smaller one's radius.
            depth = rng.uniform(0.3, 0.8, 48) * min(side, slots[partner].side)
            distance = _DISC_RADIUS * (side + slots[partner].side - depth)
            angle = rng.uniform(0, 2 * np.pi, 48)
            centres = slots[partner].centre + distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        free = (centres >= margin).all(axis=1) & (centres <= (width - margin, height - margin)).all(axis=1)
        apart = [slot for other, slot in enumerate(slots) if other != partner]
        if apart:
            offsets = centres[:, None] - np.array([slot.centre for slot in apart])
            clearance = _CLEARANCE * (side + np.array([slot.side for slot in apart]))
            free &= ((offsets**2).sum(axis=2) >= clearance**2).all(axis=1)
        if not free.any():
            return None
        stays_above = bool(side**2 < _MIN_HIDDEN_AREA * height * width)
        if stays_above and partner is not None and slots[partner].stays_above:
            return None
        slots.append(_Slot(float(side), centres[np.argmax(free)], partner, stays_above))
    return slots


def _turned_outline(rng: np.random.Generator, class_index: int, side: float, centre: np.ndarray) -> np.ndarray:
    """Outline (P, 2) of a shape of area side ** 2 in a random rotation."""
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return SHAPES[CLASS_NAMES[class_index]] @ rotation * side + centre


def _crowd_outlines(rng: np.random.Generator, class_index: int, slot: _Slot) -> list[np.ndarray]:
    """Seven shapes of one class, one in the middle of six, touching each other, within the slot's reach."""
    spacing = 2 * _DISC_RADIUS * 0.9  # of members of side 1; a little less than discs that just touch
    side = slot.side * _REACH / (_REACH + spacing)
    ring = rng.uniform(0, 2 * np.pi) + np.pi / 3 * np.arange(6)
    offsets = np.concatenate([np.zeros((1, 2)), np.stack([np.cos(ring), np.sin(ring)], axis=1)])
    centres = slot.centre + spacing * side * offsets
    return [_turned_outline(rng, class_index, side, centre) for centre in centres]


def _polygons(geometry: BaseGeometry) -> list[Polygon] | None:
    """The parts of a polygonal geometry, or None where COCO's polygons cannot say it: holes, specks, nothing."""
    if isinstance(geometry, Polygon):
        parts = [geometry]
    elif isinstance(geometry, MultiPolygon):
        parts = list(geometry.geoms)
    else:
        return None
    if geometry.is_empty or any(len(part.interiors) or part.area < _MIN_PART for part in parts):
        return None
    return parts


def _hide(lower: Polygon, upper: Polygon) -> list[Polygon] | None:
    """What is visible of the lower polygon, or None where they do not overlap well."""
    visible = lower.difference(upper)
    if not MIN_VISIBLE * lower.area <= visible.area <= lower.area - _MIN_PART:
        return None
    return _polygons(visible)


def _turn_group(
    rng: np.random.Generator, slots: list[_Slot], classes: list[int], placed: list[Polygon]
) -> list[tuple[np.ndarray, list[Polygon]]] | None:
    """Outline and visible polygons of one object, or of two that overlap, the lower first; clear of what is placed.

    The rotations are drawn again until it fits; None where it never did.
    """
    for _ in range(80):
        outlines = [
            _turned_outline(rng, class_index, slot.side, slot.centre)
            for slot, class_index in zip(slots, classes, strict=True)
        ]
        polygons = [Polygon(outline) for outline in outlines]
        if placed and any(shapely.dwithin(polygon, placed, _GAP).any() for polygon in polygons):
            continue
        if len(polygons) == 1:
            return [(outlines[0], polygons)]
        visible = _hide(*polygons)
        if visible is not None:
            return [(outlines[0], visible), (outlines[1], polygons[1:])]
    return None


def compose_scene(rng: np.random.Generator, height: int, width: int, *, with_crowd: bool = False) -> ShapeScene:
    """Decide what one image shows.

    Args:
        rng: the only source of chance.
        height, width: of the image, pixels, each at least MIN_SIZE.
        with_crowd: add a group of touching shapes of one class, annotated as one crowd; there are fewer objects then.

    Returns:
        The scene.

    Raises:
        ValueError: the image is too small.
    """
    if min(height, width) < MIN_SIZE:
        raise ValueError(f"Images of shapes need a size of at least {MIN_SIZE} pixels, not {height} x {width}")
    most = MAX_OBJECTS // 2 if with_crowd else MAX_OBJECTS
    is_empty = rng.random() < EMPTY_SHARE and not with_crowd
    # Few objects are likelier than many, since many leave no room for large ones.
    counts = np.arange(1, most + 1)
    num_objects = 0 if is_empty else int(rng.choice(counts, p=counts[::-1] / counts.sum()))
    background = str(rng.choice(list(BACKGROUNDS)))
    background_tones = _draw_tones(rng, [])
    # Classes are drawn once: drawn again with every layout that failed, those that fit easily would be more common.
    classes = rng.integers(len(SHAPES), size=num_objects + with_crowd).tolist()
    objects = None
    while objects is None:
        slots = _draw_slots(rng, (height, width), len(classes), with_crowd)
        for _ in range(_ROTATION_ROUNDS):
            objects = _compose_objects(rng, slots, classes, with_crowd, background_tones)
            if objects is not None:
                break
    return ShapeScene((height, width), background, background_tones, objects)


def _compose_objects(
    rng: np.random.Generator, slots: list[_Slot], classes: list[int], with_crowd: bool, background_tones: np.ndarray
) -> list[ShapeObject] | None:
    """Objects from the lowest to the uppermost; None where the shapes do not fit their places."""
    objects: list[ShapeObject] = []
    placed: list[Polygon] = []
    if with_crowd:
        for outline in _crowd_outlines(rng, classes[-1], slots[-1]):
            tones = _draw_tones(rng, [background_tones])
            texture = str(rng.choice(list(TEXTURES)))
            centre = outline.mean(axis=0)
            objects.append(ShapeObject(classes[-1], True, centre, outline, [outline], texture, tones))
            placed.append(Polygon(outline))
    for group in _groups(rng, slots[: len(slots) - with_crowd]):
        turned = _turn_group(rng, [slots[i] for i in group], [classes[i] for i in group], placed)
        if turned is None:
            return None
        avoid = [background_tones]
        for i, (outline, visible) in zip(group, turned, strict=True):
            tones = _draw_tones(rng, avoid)
            avoid.append(tones)
            texture = str(rng.choice(list(TEXTURES)))
            parts = [np.array(part.exterior.coords[:-1]) for part in visible]
            objects.append(ShapeObject(classes[i], False, slots[i].centre, outline, parts, texture, tones))
            placed.append(Polygon(outline))
    return objects


def _groups(rng: np.random.Generator, slots: list[_Slot]) -> list[list[int]]:
    """Slots that overlap, the lower first, and single ones."""
    partners = {slot.partner for slot in slots}
    groups = []
    for index, slot in enumerate(slots):
        if slot.partner is not None:
            group = [index, slot.partner]
            rng.shuffle(group)
            if slots[group[0]].stays_above:
                group.reverse()
            groups.append(group)
        elif index not in partners:
            groups.append([index])
    return groups
