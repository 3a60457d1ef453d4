"""Gradients of several ranks against those of one process with all the images, which is what they should be."""

import functools

import pytest
import torch
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm

from sparseinst.modeling.sparse_inst.criterion import divisors_over_ranks
from tests.distributed.ranks import run_ranks
from tests.tiny_model import random_input, tiny_cfg

# FrozenBN: batch statistics are each rank's own. Ten masks, so that nine instances are all matched.
OPTS = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.SPARSE_INST.DECODER.NUM_MASKS", 10)
AS_PUBLISHED, GLOBAL = False, True
# Relative; image by image and all at once differ by as much in one process.
ROUNDING = 1e-5


def make_model(global_normalization):
    torch.manual_seed(0)
    return build_model(tiny_cfg(*OPTS, "MODEL.SPARSE_INST.LOSS.GLOBAL_NORMALIZATION", global_normalization)).train()


def make_batch(counts):
    """Images of one size, so that padding is the same in every batch, with as many instances."""
    return [random_input(64, 64, count, seed=10 * index + count) for index, count in enumerate(counts)]


def gradients(model):
    """Of all parameters, one after the other; fails where one has none."""
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, missing
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def rank_gradients(counts_of_ranks, global_normalization):
    model = make_model(global_normalization)
    ddp_model = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    sum(ddp_model(make_batches(counts_of_ranks)[comm.get_rank()]).values()).backward()
    return gradients(model)


def accumulated_rank_gradients(counts_of_ranks, global_normalization):
    """As the trainer accumulates: image by image, and an exchange after the last one."""
    model = make_model(global_normalization)
    ddp_model = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    batch = make_batches(counts_of_ranks)[comm.get_rank()]
    parts = model.prepare_parts([[x] for x in batch])
    with ddp_model.no_sync():
        for x, part in zip(batch[:-1], parts):
            sum(ddp_model([x], part).values()).backward()
    sum(ddp_model(batch[-1:], parts[-1]).values()).backward()
    return gradients(model)


def make_batches(counts_of_ranks):
    images = iter(make_batch(sum(counts_of_ranks, ())))
    return [[next(images) for _ in counts] for counts in counts_of_ranks]


@functools.cache
def joint_gradients(counts_of_ranks):
    model = make_model(AS_PUBLISHED)
    sum(model(sum(make_batches(counts_of_ranks), [])).values()).backward()
    return gradients(model)


def worst_difference(counts_of_ranks, global_normalization, function=rank_gradients):
    """Between any rank's gradients and the joint batch's, over the norm of these."""
    joint = joint_gradients(counts_of_ranks)
    ranks = run_ranks(len(counts_of_ranks), function, counts_of_ranks, global_normalization)
    assert all(torch.equal(rank, ranks[0]) for rank in ranks)
    return max(float((rank - joint).norm() / joint.norm()) for rank in ranks)


@pytest.mark.parametrize("global_normalization", [AS_PUBLISHED, GLOBAL])
@pytest.mark.parametrize("counts_of_ranks", [((3, 2), (1, 4)), ((3,), (3,), (3,))])
def test_ranks_with_as_many_instances_each(counts_of_ranks, global_normalization):
    assert worst_difference(counts_of_ranks, global_normalization) < ROUNDING


@pytest.mark.parametrize(
    "counts_of_ranks",
    [
        ((1,), (9,)),
        ((1,), (9,), (2,)),
        ((0,), (4,)),  # a rank without
        ((0,), (1,)),  # a mean below 1
        ((0,), (0,)),  # nothing at all
    ],
)
def test_ranks_with_other_numbers_of_instances(counts_of_ranks):
    assert worst_difference(counts_of_ranks, GLOBAL) < ROUNDING
    # As published: no hang either, and other gradients.
    assert worst_difference(counts_of_ranks, AS_PUBLISHED) > 0.01


def test_accumulated_over_ranks_with_other_numbers_of_instances():
    counts_of_ranks = ((1, 0), (2, 7))
    assert worst_difference(counts_of_ranks, GLOBAL, accumulated_rank_gradients) < ROUNDING
    assert worst_difference(counts_of_ranks, AS_PUBLISHED, accumulated_rank_gradients) > 0.01


def test_the_number_of_a_single_process_is_its_own():
    for global_normalization in (AS_PUBLISHED, GLOBAL):
        assert divisors_over_ranks(9, 6, torch.device("cpu"), global_normalization) == (9, 6)
        assert divisors_over_ranks(0, 0, torch.device("cpu"), global_normalization) == (1, 1)
    assert make_model(GLOBAL).criterion.global_normalization
