"""Masks of one image that stay encoded, in the place that Detectron2's BitMasks and PolygonMasks have."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from pycocotools import mask as mask_api


class RLEMasks:
    """Masks as COCO's compressed run-length encodings; one is decoded when it is asked for.

    It can be the ``pred_masks`` of Instances. Iterating gives each mask as an array (height, width) uint8, as
    Detectron2's evaluators and visualizers take it; indexing gives RLEMasks, as PolygonMasks do;
    ``numpy.asarray`` gives all masks at once.

    Args:
        rles: one dict for each mask, ``size`` [height, width] and ``counts`` bytes.
        image_size: (height, width), of all of them.
    """

    def __init__(self, rles: Sequence[dict], image_size: tuple[int, int]) -> None:
        self.rles = list(rles)
        self.image_size = tuple(image_size)

    @staticmethod
    def encode(masks: torch.Tensor) -> "RLEMasks":
        """Boolean masks (n, height, width), encoded one by one."""
        arrays = (np.asfortranarray(mask, dtype=np.uint8) for mask in masks.cpu().numpy())
        return RLEMasks([mask_api.encode(array) for array in arrays], tuple(masks.shape[1:]))

    def __len__(self) -> int:
        return len(self.rles)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(mask_api.decode, self.rles)

    def __getitem__(self, item: int | slice | Sequence[int] | Sequence[bool] | np.ndarray | torch.Tensor) -> "RLEMasks":
        """One mask, a slice, those of some indices, or those where an array of booleans is True."""
        if isinstance(item, torch.Tensor):
            item = item.cpu().numpy()
        # Not on an array of the dicts: NumPy would look into them.
        chosen = np.atleast_1d(np.arange(len(self))[item])
        return RLEMasks([self.rles[index] for index in chosen], self.image_size)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """All masks, (n, height, width) bool."""
        masks = np.zeros((len(self), *self.image_size), dtype=bool)
        for index, mask in enumerate(self):
            masks[index] = mask
        return masks if dtype is None else masks.astype(dtype)

    def __repr__(self) -> str:
        return f"RLEMasks(num_instances={len(self)}, image_size={self.image_size})"

    def to(self, *args: object, **kwargs: object) -> "RLEMasks":
        """Itself: encodings are on the host."""
        return self

    def areas(self) -> np.ndarray:
        """Pixels of each mask, (n,)."""
        return np.asarray(mask_api.area(self.rles), dtype=np.int64)

    def as_json(self) -> list[dict]:
        """The encodings as plain types: ``counts`` a str."""
        return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in self.rles]

    @staticmethod
    def cat(masks: Sequence["RLEMasks"]) -> "RLEMasks":
        """The masks of several, of images of one size, as Instances.cat wants it."""
        return RLEMasks(list(itertools.chain.from_iterable(m.rles for m in masks)), masks[0].image_size)
