"""Test that the order of batches is a function of seed and number, and that broken images are skipped."""

import itertools
import logging
import random
import signal
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm

from sparseinst.data.broken_images import BrokenImages, EvaluationLoader, SafeMapper
from sparseinst.data.images import DataError
from sparseinst.data.loader import TrainLoader, build_test_loader, build_train_loader, derive_seed
from tests.shapes_data import register_shapes
from tests.tiny_model import tiny_cfg

IMAGES = [
    {"file_name": f"{index}.jpg", "width": 10 + 20 * (index % 3), "height": 20, "index": index} for index in range(11)
]


def own_messages(caplog):
    """Messages of this project: whether Detectron2's are recorded depends on the tests before."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("sparseinst")]


class RandomMapper:
    """Add a draw of each random number generator; refuse images whose index is in ``broken``."""

    def __init__(self, broken=()):
        self.broken = set(broken)

    def __call__(self, image):
        if image["index"] in self.broken:
            raise DataError(f"{image['file_name']} is\ncut off")
        return {**image, "draws": (random.random(), float(np.random.rand()), float(torch.rand(())))}


def make_loader(broken=(), images=IMAGES, **kwargs):
    options = {"batch_size": 3, "seed": 5, "max_broken_images": 4, **kwargs}
    mapper = options.pop("mapper", None) or RandomMapper(broken)
    return TrainLoader(images, mapper, lambda seed: TrainingSampler(len(images), seed=seed), **options)


class ThreadsMapper(RandomMapper):
    """Add the numbers of threads of the process that maps."""

    def __call__(self, image):
        return {**super().__call__(image), "threads": (torch.get_num_threads(), cv2.getNumThreads())}


def take(batches, count):
    return list(itertools.islice(batches, count))


def test_batches_are_those_of_detectron2s_sampler_and_grouping():
    order = [dict(IMAGES[index]) for index in itertools.islice(TrainingSampler(len(IMAGES), seed=5), 60)]
    expected = [[image["index"] for image in batch] for batch in AspectRatioGroupedDataset(order, 3)]
    found = [[image["index"] for image in batch] for batch in take(make_loader(), len(expected))]
    assert found == expected
    assert all(len({image["width"] > image["height"] for image in batch}) == 1 for batch in take(make_loader(), 20))
    ungrouped = take(make_loader(group_by_aspect_ratio=False), 5)
    assert [image["index"] for batch in ungrouped for image in batch] == [image["index"] for image in order[:15]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_later_start_gives_the_batches_that_were_to_come(num_workers):
    whole = take(make_loader(broken=[4]), 12)
    assert take(make_loader(broken=[4], num_workers=num_workers).batches(7), 5) == whole[7:]
    assert take(make_loader(broken=[4], seed=6), 12) != whole


def test_workers_use_one_thread_each():
    def give_up(*_):
        raise TimeoutError("the workers hang")

    before = torch.get_num_threads(), cv2.getNumThreads()
    cv2.setNumThreads(3)
    # A forked process does not have the threads that this starts.
    cv2.GaussianBlur(np.zeros((2000, 2000), np.uint8), (9, 9), 0)
    handler = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        loader = make_loader(mapper=ThreadsMapper(), num_workers=1)
        assert {sample["threads"] for batch in take(loader, 2) for sample in batch} == {(1, 1)}
        assert cv2.getNumThreads() == 3
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        cv2.setNumThreads(before[1])
    assert torch.get_num_threads() == before[0]


def test_what_a_gpu_fetches_is_pinned(monkeypatch):
    class Mapper(RandomMapper):
        def __call__(self, image):
            super().__call__(image)
            instances = Instances(
                (4, 5),
                gt_masks=BitMasks(torch.ones(2, 4, 5, dtype=torch.bool)),
                gt_boxes=Boxes(torch.ones(2, 4)),
                gt_classes=torch.tensor([1, 2]),
            )
            return {**image, "image": torch.ones(3, 4, 5), "instances": instances}

    # Without a GPU nothing can be pinned: marked copies stand for what would be.
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))

    def is_pinned(tensor):
        return any(tensor is other for other in pinned)

    loader = make_loader(mapper=Mapper(broken=[2]), max_broken_images=1, pin_memory=True)
    for sample in itertools.chain.from_iterable(take(loader, 8)):
        instances = sample["instances"]
        assert sample["file_name"] == f"{sample['index']}.jpg" and instances.image_size == (4, 5)
        assert isinstance(instances.gt_masks, BitMasks) and isinstance(instances.gt_boxes, Boxes)
        tensors = (sample["image"], instances.gt_classes, instances.gt_masks.tensor, instances.gt_boxes.tensor)
        assert all(map(is_pinned, tensors))
        assert instances.gt_classes.tolist() == [1, 2]


def test_samples_differ_from_epoch_to_epoch_and_the_global_random_numbers_stay():
    def global_draws():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1)
    expected = global_draws()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1)
    draws = [image["draws"] for batch in take(make_loader(), 20) for image in batch]
    assert len(set(draws)) == len(draws) == 60
    assert global_draws() == expected


def test_a_samples_random_numbers_depend_on_its_own_position_alone():
    # Batches of another size have other neighbors.
    samples = [x for batch in take(make_loader(batch_size=2, group_by_aspect_ratio=False), 6) for x in batch]
    others = [x for batch in take(make_loader(batch_size=3, group_by_aspect_ratio=False), 4) for x in batch]
    assert samples == others


def test_ranks_share_one_stream(monkeypatch):
    whole = take(make_loader(group_by_aspect_ratio=False, batch_size=2), 6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append([x for batch in take(make_loader(group_by_aspect_ratio=False), 2) for x in batch])
    assert [x for pair in zip(*parts) for x in pair] == [x for batch in whole for x in batch]


def test_broken_images_are_replaced_and_named_once(caplog):
    loader = make_loader(broken=[2, 7])
    with caplog.at_level(logging.WARNING):
        batches = take(loader, 30)
    assert all(len(batch) == 3 for batch in batches)
    counts = Counter(image["index"] for batch in batches for image in batch)
    assert set(counts) == set(range(11)) - {2, 7}
    assert set(loader.broken.messages) == {"2.jpg", "7.jpg"}
    assert len(own_messages(caplog)) == 2 and all("is cut off" in message for message in own_messages(caplog))


def test_too_many_broken_images_stop_with_all_of_them_named():
    with pytest.raises(DataError, match="MAX_BROKEN_IMAGES is 1") as caught:
        take(make_loader(broken=[2, 7], max_broken_images=1), 30)
    assert "2.jpg is cut off" in str(caught.value) and "7.jpg is cut off" in str(caught.value)
    # No image can be used, and the limit is not reached.
    with pytest.raises(DataError, match="in a row"):
        take(make_loader(broken=range(11), max_broken_images=100), 1)
    # This process reports the errors of a worker process.
    with pytest.raises(DataError, match="^1 images cannot be used"):
        take(make_loader(broken=[2], max_broken_images=0, num_workers=1), 30)


def test_a_restored_run_takes_the_seed_and_says_what_changed(caplog):
    first, second = make_loader(seed=5), make_loader(seed=9)
    second.load_state_dict(first.state_dict())
    assert second.seed == 5 and not own_messages(caplog)
    assert take(second, 4) == take(first, 4)
    make_loader(batch_size=2).load_state_dict(first.state_dict())
    assert "batch_size 3 -> 2" in caplog.text
    caplog.clear()
    renamed = [{**image, "file_name": "x" + image["file_name"]} for image in IMAGES]
    make_loader(images=renamed).load_state_dict(first.state_dict())
    assert "checksum" in caplog.text and "num_images" not in caplog.text


def test_sizes_are_needed_for_grouping_only():
    images = [{"file_name": "a.jpg", "index": 0}]
    with pytest.raises(ValueError, match="a.jpg.*ASPECT_RATIO_GROUPING"):
        make_loader(images=images)
    assert take(make_loader(images=images, group_by_aspect_ratio=False), 1)


def test_seeds_depend_on_every_number():
    assert len({derive_seed(a, b, c) for a in range(3) for b in range(3) for c in range(3)}) == 27


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return register_shapes(tmp_path_factory.mktemp("loader"), "loader_shapes", 6)


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_every_sampler_of_detectron2s_config(shapes, sampler):
    cfg = tiny_cfg(
        "DATASETS.TRAIN", (shapes,), "DATALOADER.SAMPLER_TRAIN", sampler, "SOLVER.IMS_PER_BATCH", 2,
        "DATALOADER.REPEAT_THRESHOLD", 1.0,
    )  # fmt: skip
    names = [[x["file_name"] for x in batch] for batch in take(build_train_loader(cfg, 1), 12)]
    assert names == [[x["file_name"] for x in batch] for batch in take(build_train_loader(cfg, 1), 12)]
    counts = Counter(name for batch in names for name in batch)
    assert len(counts) == 6
    # Each image twice, or images of rare classes more often.
    assert (set(counts.values()) == {4}) == (sampler == "TrainingSampler")


@pytest.mark.parametrize("sqrt", [True, False])
def test_repeat_sqrt_is_read(shapes, sqrt):
    cfg = tiny_cfg(
        "DATASETS.TRAIN", (shapes,), "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler",
        "DATALOADER.REPEAT_THRESHOLD", 3.0, "DATALOADER.REPEAT_SQRT", sqrt, "SOLVER.IMS_PER_BATCH", 2,
    )  # fmt: skip
    images = DatasetCatalog.get(shapes)
    expected = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(images, 3.0, sqrt=sqrt).sum()
    sampler = build_train_loader(cfg, 1)._build_sampler(1)
    assert (sampler._int_part + sampler._frac_part).sum() == pytest.approx(expected.item())


def test_unknown_names_and_empty_data_are_refused(shapes):
    cfg = tiny_cfg("DATASETS.TRAIN", (shapes,), "DATALOADER.SAMPLER_TRAIN", "Mine")
    with pytest.raises(ValueError, match="SAMPLER_TRAIN is 'Mine'"):
        build_train_loader(cfg, 0)
    DatasetCatalog.register("loader_empty", lambda: [{"file_name": "a.jpg", "annotations": []}])
    DatasetCatalog.register("loader_other", lambda: DatasetCatalog.get(shapes))
    MetadataCatalog.get("loader_other").thing_classes = ["dog"]
    try:
        with pytest.raises(ValueError, match="loader_empty.*FILTER_EMPTY_ANNOTATIONS"):
            build_train_loader(tiny_cfg("DATASETS.TRAIN", ("loader_empty",)), 0)
        with pytest.raises(ValueError, match="loader_other.*different classes"):
            build_train_loader(tiny_cfg("DATASETS.TRAIN", (shapes, "loader_other")), 0)
    finally:
        DatasetCatalog.remove("loader_empty")
        DatasetCatalog.remove("loader_other")
        MetadataCatalog.remove("loader_other")


def test_an_evaluation_sees_what_detectron2s_mapper_gives(shapes):
    cfg = tiny_cfg("DATASETS.TEST", (shapes,))
    loader = build_test_loader(cfg, shapes)
    stock = DatasetMapper(cfg, is_train=False)
    images = DatasetCatalog.get(shapes)
    batches = list(loader)
    assert len(loader) == len(batches) == len(images) == 6
    for (x,), image in zip(batches, images, strict=True):
        assert x["image_id"] == image["image_id"] and torch.equal(x["image"], stock(image)["image"])


def test_an_evaluation_skips_broken_images(caplog):
    safe = SafeMapper(RandomMapper([1, 2]))
    loader = EvaluationLoader([[safe(image)] for image in IMAGES[:4]], BrokenImages(2))
    assert [[x["index"] for x in batch] for batch in loader] == [[0], [3]]
    messages = own_messages(caplog)
    assert len(messages) == 2 and "1.jpg is cut off; the objects in it count as missed" in messages[0]
    with pytest.raises(DataError, match="MAX_BROKEN_IMAGES is 1"):
        list(EvaluationLoader([[safe(image)] for image in IMAGES[:4]], BrokenImages(1)))


class EmptyMapper(RandomMapper):
    """Leave the images without objects whose index is in ``empty``."""

    def __init__(self, empty, broken=()):
        super().__init__(broken)
        self.empty = set(empty)

    def __call__(self, image):
        return {**super().__call__(image), "instances": [] if image["index"] in self.empty else [image["index"]]}


def test_images_without_objects_are_replaced_on_demand():
    options = {"mapper": EmptyMapper({0, 4, 7}, broken={2}), "group_by_aspect_ratio": False}
    plain, replaced = (take(make_loader(**options, replace_empty=value).batches(), 12) for value in (False, True))
    for before, after in zip(itertools.chain(*plain), itertools.chain(*replaced), strict=True):
        assert after["instances"]
        # Others keep their place and their draws.
        assert before == after or not before["instances"]
    assert any(not sample["instances"] for sample in itertools.chain(*plain))
    # A function of seed and number.
    again = take(make_loader(**options, replace_empty=True).batches(start=4), 8)
    assert again == replaced[4:]


def test_a_data_set_without_any_object_still_trains():
    mapper = EmptyMapper(range(11))
    ((sample, *_),) = take(make_loader(mapper=mapper, replace_empty=True).batches(), 1)
    assert sample["instances"] == []
