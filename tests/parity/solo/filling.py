"""Fill a SOLO model's state dict, two images and their ground truth by formula, so that two programs can be compared.

Everything comes from numpy's legacy RandomState, whose stream is fixed for good, seeded by the
CRC-32 of the tensor's name: no order of construction, no torch version, changes a value.
"""

import functools
import zlib

import numpy as np

GAIN = 0.6  # of every convolution that no line below names
# The heads get gains of their own, so that cells, instances and classes differ from one another. The first part that
# the name contains counts.
GAINS = (
    ("offset.weight", 0.3),
    ("fpn_lateral", 1.5),
    ("fpn_output", 3.0),
    ("tower", 2.0),
    ("mask_feature_head", 2.0),
    ("cate_pred.weight", 3.0),
    ("kernel_pred.weight", 0.25),
    ("mask_pred", 12.0),
)
COORDINATE_GAIN = 6.0  # times this where a weight reads coordinates: their two channels among 256 would not be seen
CATE_BIAS = -5.2  # scores are rare, as in a trained model


# Models share most of their tensors; a ResNet-50 and its heads have fewer than 400.
@functools.lru_cache(maxsize=400)
def tensor(name, shape):
    """Value of the parameter or buffer `name` (float32); not to be changed."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    if name.endswith("running_var"):
        x = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("running_mean"):
        x = 0.1 * rng.standard_normal(shape)
    elif name.endswith("bias"):
        x = 0.1 * rng.standard_normal(shape)
        if name.endswith("cate_pred.bias"):
            x = x + CATE_BIAS
    elif len(shape) == 1:
        x = rng.uniform(0.8, 1.2, shape)
    else:
        gain = next((g for part, g in GAINS if part in name), GAIN)
        x = rng.standard_normal(shape) * np.sqrt(gain / np.prod(shape[1:]))
        if shape[1] in (257, 258) and not name.endswith("offset.weight"):
            x[:, 256:] *= COORDINATE_GAIN
    return np.asarray(x, np.float32)


# (height, width) of the image as the model gets it, and of the output asked for
SIZES = (((413, 547), (310, 411)), ((384, 500), (576, 750)))
# class, centre (y, x), radii (y, x), part: fractions of the image's size; part 1: only what lies above or left of the
# centre
OBJECTS = (
    (
        (0, 0.52, 0.485, 0.44, 0.452, 0),  # large: levels 3 and 4 of the full range
        (17, 0.515, 0.49, 0.2, 0.22, 0),  # its centre falls into the same cells: levels 2 and 3
        (79, 0.303, 0.112, 0.022, 0.02, 0),
        (2, 0.151, 0.71, 0.09, 0.058, 0),
        (56, 0.77, 0.23, 0.15, 0.12, 1),  # centre of mass is not the centre of the box
        (0, 0.7717, 0.2311, 0.14, 0.121, 0),  # again the same cells, on small levels
        (41, 0.87, 0.9, 0.0037, 0.0029, 0),  # 3 pixels: nothing is left of it at stride 4 or 8
    ),
    (
        (0, 0.31, 0.283, 0.21, 0.19, 1),
        (62, 0.63, 0.71, 0.29, 0.26, 0),
        (2, 0.86, 0.12, 0.053, 0.088, 0),
        (0, 0.117, 0.887, 0.098, 0.064, 0),
    ),
)


def image(i):
    """A smooth colour image with texture, uint8 (3, height, width), channels as the model takes them."""
    height, width = SIZES[i][0]
    rng = np.random.RandomState(i)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float64)
    out = np.zeros((3, height, width))
    for c in range(3):
        for _ in range(6):
            fy, fx = rng.uniform(0.005, 0.08, 2)
            out[c] += rng.uniform(10, 30) * np.sin(fy * ys + fx * xs + rng.uniform(0, 6.28))
        out[c] += rng.uniform(-12, 12, (height, width)) + 120
    return np.clip(out, 0, 255).astype(np.uint8)


def ground_truth(i):
    """Classes (count,) int64, masks (count, height, width) bool, boxes (count, 4) float32, the last pixel plus 1."""
    height, width = SIZES[i][0]
    ys, xs = np.mgrid[0:height, 0:width]
    classes, masks, boxes = [], [], []
    for label, cy, cx, ry, rx, part in OBJECTS[i]:
        cy, cx, ry, rx = cy * height, cx * width, ry * height, rx * width
        mask = ((ys - cy) / ry) ** 2 + ((xs - cx) / rx) ** 2 <= 1
        if part:
            mask &= (ys < cy) | (xs < cx)
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        classes.append(label)
        masks.append(mask)
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return np.asarray(classes, np.int64), np.stack(masks), np.asarray(boxes, np.float32)
