"""Load batches for training and evaluation in a reproducible order, and skip images that cannot be read.

The n-th batch of a training is a function of the data, the seed and n alone. Samples are grouped into batches before
an image is read, and a sample's augmentation is drawn from the seed and the sample's position, not from the state of
the worker that reads it. So a resumed run continues with the same batches for any number of workers, and a checkpoint
only needs the seed and the number of batches.
"""

import contextlib
import itertools
import logging
import random
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from sparseinst import config
from sparseinst.data.broken_images import BrokenImages, EvaluationLoader, Failure, SafeMapper
from sparseinst.data.coco_json import unreadable_data
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from sparseinst.data.images import DataError

_logger = logging.getLogger(__name__)

# Most images that are tried in place of a broken one.
_SUBSTITUTES = 20


def derive_seed(*numbers: int) -> int:
    """Return a 32-bit seed, a hash of non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_cpu(seed: int) -> None:
    """Seed the random number generators of Python, NumPy and PyTorch on the CPU."""
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed also touches the GPUs, which a worker must not, and is a hundred times slower.
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def _restored_random_state() -> Iterator[None]:
    """Restore the random state of Python, NumPy and PyTorch on the CPU on exit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class WorkerDiedError(RuntimeError):
    """A process that reads images was killed."""


class TrainLoader:
    """Iterate over endless batches of mapped images for one rank, from the first batch.

    Replaces Detectron2's `build_detection_train_loader`, which starts at its first batch again on --resume, draws
    augmentations from the workers' states, and ends the training at the first unreadable image. With this loader all
    runs of docs/reliability.md, which were killed 146 times, ended with the weights of an uninterrupted run.

    Another image of the data set, drawn from the seed and the sample's position, replaces a broken one, so batches keep
    their size and order. With ``replace_empty`` it replaces a sample without ``instances`` too.

    Args:
        images: Detectron2's dicts; with ``width`` and ``height`` where images are grouped.
        mapper: maps a dict to a sample; raises one of BROKEN_IMAGE_ERRORS where the image is broken.
        build_sampler: maps a seed to this rank's endless indices of ``images``.
        batch_size: of this rank.
        seed: not negative, the same on all ranks. May be set until the first batch is read.
        group_by_aspect_ratio: batch wide and tall images separately, as AspectRatioGroupedDataset does.
        num_workers: processes that read and map images; 0: this process reads them.
        max_broken_images: most different images that are skipped.
        pin_memory: copy samples to pinned memory, for training on CUDA.
        replace_empty: replace samples without an object.

    Attributes:
        seed: as given.
        broken: the images that were skipped.

    Raises:
        ValueError: images are grouped, and one has no size.
    """

    def __init__(
        self,
        images: Sequence[dict[str, Any]],
        mapper: Callable[[dict], dict],
        build_sampler: Callable[[int], Iterable[int]],
        *,
        batch_size: int,
        seed: int,
        group_by_aspect_ratio: bool = True,
        num_workers: int = 0,
        max_broken_images: int = 0,
        pin_memory: bool = False,
        replace_empty: bool = False,
    ) -> None:
        self._bucket_of_image = np.zeros(len(images), dtype=np.uint8)
        if group_by_aspect_ratio:
            for index, image in enumerate(images):
                if "width" not in image or "height" not in image:
                    raise ValueError(
                        f"{image.get('file_name')} has no 'width' and 'height' in the data set, which grouping needs; "
                        "add them, or set DATALOADER.ASPECT_RATIO_GROUPING False"
                    )
                self._bucket_of_image[index] = image["width"] > image["height"]
        self.num_images = len(images)
        self.checksum = zlib.crc32("\n".join(str(image.get("file_name")) for image in images).encode())
        # Serialized, so that workers share its memory.
        self._images = DatasetFromList(images, copy=False)
        self._mapper = mapper
        self._build_sampler = build_sampler
        self.batch_size = batch_size
        self.seed = seed
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._replace_empty = replace_empty
        self.broken = BrokenImages(max_broken_images)

    def __iter__(self) -> Iterator[list[dict]]:
        return self.batches()

    def batches(self, start: int = 0, num_workers: int | None = None) -> Iterator[list[dict]]:
        """Iterate over the batches from number ``start`` on.

        Args:
            start: not negative.
            num_workers: overrides the number of processes; the batches are the same.

        Raises:
            DataError: too many images are broken.
            WorkerDiedError: a process that reads images was killed.
        """
        loader = DataLoader(
            _MappedImages(self._images, self._mapper, self.seed, self._replace_empty),
            batch_sampler=itertools.islice(self._sample_batches(), start, None),
            num_workers=self._num_workers if num_workers is None else num_workers,
            collate_fn=_Samples,
            pin_memory=self._pin_memory,
            # The default draws from the global generator.
            generator=torch.Generator().manual_seed(self.seed),
        )
        try:
            with _one_opencv_thread():
                batches = iter(loader)
            for samples in batches:
                for sample, failures in samples:
                    self.broken.add(failures)
                    if sample is None:
                        raise DataError(
                            f"{len(failures)} images in a row cannot be used, for example {failures[-1].message}. "
                            "python -m sparseinst.tools.check_dataset lists the problems of a data set"
                        )
                yield [sample for sample, _ in samples]
        except RuntimeError as error:
            # PyTorch has no class for this error.
            if "DataLoader worker" not in str(error):
                raise
            raise WorkerDiedError(
                f"A process that reads images died: {str(error).strip().splitlines()[0]} Usually the memory is full: "
                f"lower DATALOADER.NUM_WORKERS ({self._num_workers} here), or free memory, and continue with --resume"
            ) from error

    def state_dict(self) -> dict[str, int]:
        """Return everything that the order of the batches depends on."""
        return {
            "seed": self.seed,
            "num_images": self.num_images,
            "checksum": self.checksum,
            "batch_size": self.batch_size,
            "world_size": comm.get_world_size(),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the seed of an interrupted run; warn where the batches still differ from those of that run."""
        self.seed = state["seed"]
        now = self.state_dict()
        changed = [f"{name} {state[name]} -> {now[name]}" for name in now if state[name] != now[name]]
        if changed:
            _logger.warning(
                "The data or their division among processes differ from those of the interrupted run (%s): the run "
                "continues with other batches",
                ", ".join(changed),
            )

    def _sample_batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yield batches of (position, index); positions count the samples of all ranks."""
        rank, world_size = comm.get_rank(), comm.get_world_size()
        buckets: tuple[list, list] = ([], [])
        for count, index in enumerate(self._build_sampler(self.seed)):
            bucket = buckets[self._bucket_of_image[index]]
            bucket.append((count * world_size + rank, index))
            if len(bucket) == self.batch_size:
                yield bucket.copy()
                bucket.clear()


class _MappedImages(Dataset):
    """Read samples by (position, index), each with the failures that preceded it."""

    def __init__(
        self, images: Sequence[dict], mapper: Callable[[dict], dict], seed: int, replace_empty: bool = False
    ) -> None:
        self._images = images
        self._mapper = SafeMapper(mapper)
        self._seed = seed
        self._replace_empty = replace_empty

    def __getitems__(self, batch: list[tuple[int, int]]) -> list[tuple[dict | None, list[Failure]]]:
        """Read a batch, for PyTorch's loader. The random state is saved once per batch, because saving is slow."""
        with _restored_random_state():
            return [self._read(position, index) for position, index in batch]

    def _read(self, position: int, index: int) -> tuple[dict | None, list[Failure]]:
        failures: list[Failure] = []
        for attempt in range(_SUBSTITUTES + 1):
            seed = derive_seed(self._seed, position, attempt)
            if attempt > 0:
                index = seed % len(self._images)
            seed_cpu(seed)
            sample, failure = self._mapper(self._images[index])
            if sample is None:
                failures.append(failure)
            elif not self._replace_empty or len(sample["instances"]):
                break
        return sample, failures


def build_train_loader(cfg: CfgNode, seed: int) -> TrainLoader:
    """Return a loader of IMS_PER_BATCH / ACCUMULATE_STEPS images over all ranks, mapped by DATASET_MAPPER.

    Args:
        cfg: DATASETS, DATALOADER, INPUT and SOLVER are read; its data sets are registered.
        seed: the same on all ranks, see :class:`TrainLoader`.

    Raises:
        ValueError: an unknown mapper or sampler, data sets of different classes, or no image to train on.
    """
    mappers = {"SparseInstDatasetMapper": SparseInstDatasetMapper, "DatasetMapper": DatasetMapper}
    key, name = config.dataset_mapper(cfg)
    if name not in mappers:
        raise ValueError(f"{key} is {name!r}; it must be one of {sorted(mappers)}")
    names = ", ".join(map(repr, cfg.DATASETS.TRAIN))
    try:
        # Detectron2 logs four lines about classes that differ.
        images = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, check_consistency=False
        )
    except OSError as error:
        raise unreadable_data(names, error) from error
    except AssertionError as error:
        raise ValueError(
            f"DATASETS.TRAIN {names} has no image to train on: {error} Images without annotations, or with crowds "
            "only, are left out unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
        ) from error
    if not isinstance(images, list):
        raise ValueError(f"DATASETS.TRAIN {names} is a {type(images).__name__}; a registered list of dicts is needed")
    if len({tuple(MetadataCatalog.get(dataset).get("thing_classes") or ()) for dataset in cfg.DATASETS.TRAIN}) > 1:
        raise ValueError(f"The data sets {names} of DATASETS.TRAIN have different classes")
    return TrainLoader(
        images,
        mappers[name](cfg, is_train=True),
        _sampler_builder(cfg, images),
        batch_size=cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATE_STEPS // comm.get_world_size(),
        seed=seed,
        group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        max_broken_images=cfg.DATALOADER.MAX_BROKEN_IMAGES,
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
        replace_empty=cfg.DATALOADER.REPLACE_EMPTY,
    )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> EvaluationLoader:
    """Return a loader of a data set's images, mapped by SparseInstDatasetMapper, without the broken ones.

    Args:
        cfg: DATALOADER and INPUT are read.
        dataset_name: a registered one.
    """
    mapper = SafeMapper(SparseInstDatasetMapper(cfg, is_train=False))
    loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
    return EvaluationLoader(loader, BrokenImages(cfg.DATALOADER.MAX_BROKEN_IMAGES))


def _sampler_builder(cfg: CfgNode, images: Sequence[dict]) -> Callable[[int], Iterable[int]]:
    """Return a function from a seed to the sampler of DATALOADER.SAMPLER_TRAIN."""
    config.check_keys(cfg, "DATALOADER.SAMPLER_TRAIN")
    if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
        return lambda seed: TrainingSampler(len(images), seed=seed)
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        images, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
    )
    return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)


class _Samples(list):
    """A batch of _MappedImages."""

    def pin_memory(self) -> "_Samples":
        """Copy the batch to pinned memory, for PyTorch's loader."""
        return _Samples((None if sample is None else _pinned(sample), failures) for sample, failures in self)


def _pinned(value: Any) -> Any:
    """Copy a sample's tensors to pinned memory, including those of its Instances and masks."""
    if isinstance(value, dict):
        return {key: _pinned(item) for key, item in value.items()}
    if isinstance(value, Instances):
        fields = {name: _pinned(field) for name, field in value.get_fields().items()}
        return Instances(value.image_size, **fields)
    if isinstance(value, BitMasks | Boxes):
        return type(value)(value.tensor.pin_memory())
    return value.pin_memory() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def _one_opencv_thread() -> Iterator[None]:
    """Limit OpenCV to one thread in processes that are started inside, as PyTorch does for its own threads.

    The limit must be set before the fork, because a forked OpenCV waits for threads that it does not have.
    """
    # OpenCV is optional; Detectron2 imports it where it is installed.
    cv2 = sys.modules.get("cv2")
    if cv2 is None:
        yield
        return
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
