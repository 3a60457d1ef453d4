"""Textures of the drawn shapes and of their backgrounds."""

from collections.abc import Callable

import cv2
import numpy as np

# Textures: functions of the random generator, the (height, width) to fill and the length in pixels that their random
# scale is relative to. They give a pattern (H, W) in [0, 1]: 0 is the first tone, 1 the second.


def _flat(rng: np.random.Generator, size: tuple[int, int], length: float) -> np.ndarray:
    return np.full(size, 0.5, np.float32)


def _wave(rng: np.random.Generator, size: tuple[int, int], wavelength: float, angle: float) -> np.ndarray:
    """Square wave (H, W) in [-1, 1] with soft edges and a random phase."""
    x = np.arange(size[1], dtype=np.float32) * np.float32(2 * np.pi / wavelength * np.cos(angle))
    y = np.arange(size[0], dtype=np.float32) * np.float32(2 * np.pi / wavelength * np.sin(angle))
    return np.clip(3 * np.sin(x + (y[:, None] + np.float32(rng.uniform(0, 2 * np.pi)))), -1, 1)


def _stripes(rng: np.random.Generator, size: tuple[int, int], length: float) -> np.ndarray:
    return (_wave(rng, size, length * rng.uniform(0.05, 0.13), rng.uniform(0, np.pi)) + 1) / 2


def _checks(rng: np.random.Generator, size: tuple[int, int], length: float) -> np.ndarray:
    wavelength, angle = length * rng.uniform(0.06, 0.16), rng.uniform(0, np.pi)
    return (_wave(rng, size, wavelength, angle) * _wave(rng, size, wavelength, angle + np.pi / 2) + 1) / 2


def _noise(rng: np.random.Generator, size: tuple[int, int], length: float) -> np.ndarray:
    cell = length * rng.uniform(0.025, 0.12)
    cells = rng.random((int(size[0] / cell) + 2, int(size[1] / cell) + 2), dtype=np.float32)
    return np.clip(cv2.resize(cells, size[::-1], interpolation=cv2.INTER_CUBIC), 0, 1)


def _gradient(rng: np.random.Generator, size: tuple[int, int], length: float) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    x = np.arange(size[1], dtype=np.float32) * np.float32(np.cos(angle))
    y = np.arange(size[0], dtype=np.float32) * np.float32(np.sin(angle))
    ramp = x + y[:, None]
    return (ramp - ramp.min()) / (ramp.max() - ramp.min())


_Texture = Callable[[np.random.Generator, tuple[int, int], float], np.ndarray]
TEXTURES: dict[str, _Texture] = {"flat": _flat, "stripes": _stripes, "checks": _checks, "noise": _noise}
BACKGROUNDS: dict[str, _Texture] = {"gradient": _gradient, "stripes": _stripes, "checks": _checks, "noise": _noise}
