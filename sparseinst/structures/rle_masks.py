"""Hold the masks of one image encoded, in place of Detectron2's BitMasks and PolygonMasks."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from pycocotools import mask as mask_api

from sparseinst.structures.mask_memory import check_mask_memory

_REMEDY = "Iterate over the masks, which decodes them one by one; or select some of them, or raise MAX_MASK_GIB"


class RLEMasks:
    """Masks as COCO's compressed run-length encodings, decoded one by one on access.

    For the ``pred_masks`` of Instances. Iterating yields arrays (height, width) uint8, which Detectron2's evaluators
    and visualizers accept; indexing returns RLEMasks, as PolygonMasks do; ``numpy.asarray`` returns all masks at once,
    and so does ``masks.cpu().numpy()``, as of a tensor.

    Args:
        rles: one dict per mask, ``size`` [height, width] and ``counts`` bytes.
        image_size: (height, width) of all masks.
        max_mask_gib: most memory that all masks decoded at once may take, in GiB.
    """

    def __init__(self, rles: Sequence[dict], image_size: tuple[int, int], max_mask_gib: float = float("inf")) -> None:
        self.rles = list(rles)
        self.image_size = tuple(image_size)
        self.max_mask_gib = max_mask_gib

    @staticmethod
    def encode(masks: torch.Tensor) -> "RLEMasks":
        """Encode boolean masks (n, height, width) one by one."""
        arrays = (np.asfortranarray(mask, dtype=np.uint8) for mask in masks.cpu().numpy())
        return RLEMasks([mask_api.encode(array) for array in arrays], tuple(masks.shape[1:]))

    def __len__(self) -> int:
        return len(self.rles)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(mask_api.decode, self.rles)

    def __getitem__(self, item: int | slice | Sequence[int] | Sequence[bool] | np.ndarray | torch.Tensor) -> "RLEMasks":
        """Select by an index, a slice, indices, or an array of booleans."""
        if isinstance(item, torch.Tensor):
            item = item.cpu().numpy()
        # NumPy would convert an array of dicts.
        chosen = np.atleast_1d(np.arange(len(self))[item])
        return RLEMasks([self.rles[index] for index in chosen], self.image_size, self.max_mask_gib)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """Return all masks, (n, height, width), by default bool.

        Raises:
            MaskMemoryError: they take more than max_mask_gib.
        """
        dtype = np.dtype(bool if dtype is None else dtype)
        check_mask_memory(len(self), self.image_size, self.max_mask_gib, _REMEDY, dtype.itemsize)
        masks = np.zeros((len(self), *self.image_size), dtype)
        for index, mask in enumerate(self):
            masks[index] = mask
        return masks

    def __repr__(self) -> str:
        return f"RLEMasks(num_instances={len(self)}, image_size={self.image_size})"

    def to(self, *args: object, **kwargs: object) -> "RLEMasks":
        """Return itself: encodings stay on the host."""
        return self

    def cpu(self) -> "RLEMasks":
        """Return itself."""
        return self

    def numpy(self) -> np.ndarray:
        """Return all masks as ``numpy.asarray`` does, for libraries that expect a tensor."""
        return np.asarray(self)

    def areas(self) -> np.ndarray:
        """Return the number of pixels of each mask, (n,) int64."""
        # One by one: with numpy 2, pycocotools 2.0.11 ends in an OverflowError for lists of more than 255.
        return np.fromiter((mask_api.area(rle) for rle in self.rles), dtype=np.int64, count=len(self.rles))

    def as_json(self) -> list[dict]:
        """Return the encodings for json.dump, with ``counts`` as str."""
        return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in self.rles]

    @staticmethod
    def cat(masks: Sequence["RLEMasks"]) -> "RLEMasks":
        """Concatenate masks of images of one size, for Instances.cat."""
        return RLEMasks(
            list(itertools.chain.from_iterable(m.rles for m in masks)), masks[0].image_size, masks[0].max_mask_gib
        )
