"""Compare an exported file with the model that it was made from."""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from detectron2.structures import ImageList, Instances
from scipy.optimize import linear_sum_assignment

from sparseinst.modeling.meta_arch import Network
from sparseinst.ops.masks import masks_to_boxes
from sparseinst.runtime.export import MIN_CELLS, ExportableNetwork, example_images
from sparseinst.runtime.output_difference import relative_differences

# Largest difference over the largest value of the same output, by precision of the file. INT8 has no bound: rounding
# changes the order of almost equal peaks, and so the order of instances in the outputs.
BOUNDS = {"float32": 1e-4, "float16": 0.02, "int8": None}
# Largest 1 - Dice of the masks of one detection, see `dice_coefficients`. YOLACT crops masks in cells of 4 pixels, and
# weights in float16 move the side of a box across a cell's edge.
MASK_BOUNDS = {"float32": 0.01, "float16": 0.5}
# Detections are compared where outputs with noise, this part of the bound over their largest value, give them too: a
# probability or an overlap at its threshold makes or drops a detection, a pixel at its threshold changes a score.
_NOISE, _NUM_NOISES = 0.1, 4
# Least Dice coefficient of two masks of one detection: of the model's with noise and without it, and of the file's and
# the model's.
_SAME_MASK, _FOUND_MASK = 0.9, 0.5


class SelfCheckError(ValueError):
    """Raised where an exported file does not return the model's numbers."""


def check_shapes(
    divisibility: int, size: Sequence[int] | None, batch: int | None, usual_size: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Return (batch, height, width) of the images to compare: values that the network was not exported with.

    A static file is run at its own size, with two batches.

    Args:
        divisibility: of dynamic sides.
        size: (height, width) of a static file; None: dynamic.
        batch: of a static file; None: dynamic.
        usual_size: (height, width) of the images that the model is made for, multiples of the divisibility.
    """
    cells = [(MIN_CELLS, MIN_CELLS), (MIN_CELLS + 1, MIN_CELLS + 4), (MIN_CELLS + 4, MIN_CELLS)]
    dynamic = [*((divisibility * y, divisibility * x) for y, x in cells), tuple(usual_size)]
    sizes = [tuple(size)] * 2 if size else dynamic
    # The export saw a batch of 2.
    batches = [batch] * len(sizes) if batch else [1, 3, *[1] * (len(sizes) - 2)]
    return [(number, *side) for number, side in zip(batches, sizes)]


def output_differences(
    network: ExportableNetwork, exported: Network, shapes: Sequence[tuple[int, int, int]], precision: str
) -> dict[str, float]:
    """Return the largest difference of each output from eager float32, see `relative_differences`.

    Args:
        network: that was exported.
        exported: the file's network, in its engine.
        shapes: (batch, height, width) of random images.
        precision: of the file.

    Raises:
        SelfCheckError: the outputs have other names, shapes or types, or the engine fails.
    """
    worst: dict[str, float] = {}
    for seed, (batch, *size) in enumerate(shapes):
        images = example_images(network, batch, size, seed)
        with torch.inference_mode():
            expected = network(images)
        found = _run(exported, images)
        if found.keys() != expected.keys():
            raise SelfCheckError(f"The outputs are {', '.join(found)}; the model has {', '.join(expected)}")
        where = f"for images {tuple(images.shape)}"
        for name, value in expected.items():
            if found[name].shape != value.shape or found[name].dtype != value.dtype:
                raise SelfCheckError(
                    f"{name} is {tuple(found[name].shape)} {found[name].dtype} {where}; the model returns "
                    f"{tuple(value.shape)} {value.dtype}"
                )
        differences = relative_differences(found, expected, network.model.ranks_instances, precision)
        worst = {name: _larger(worst.get(name, 0.0), difference) for name, difference in differences.items()}
    return worst


def end_to_end_differences(
    network: ExportableNetwork,
    exported: Network,
    shapes: Sequence[tuple[int, int, int]],
    bound: float,
    images: Sequence[torch.Tensor] = (),
) -> tuple[dict[str, float], int]:
    """Compare the detections of an end-to-end file with those of the model's own `postprocess`.

    Each detection that the model finds for certain, with small noise on the network's outputs too, must be in the file
    with its class, its score and its mask. The file may have as many others as the model finds in all runs together.

    Args:
        network, exported, shapes: as in `output_differences`.
        bound: largest difference of scores; the noise on the outputs is a part of it.
        images: batches to compare besides random images, in which a trained model finds nothing, as the network takes
            them.

    Returns:
        Of the worst image ``scores``: largest difference; ``masks``: share of the pixels in all its masks that differ;
        ``worst_mask``: largest 1 - Dice, see `dice_coefficients`; ``boxes``: largest difference over the longer side,
        from the model's box, or from that of the file's mask where boxes are tight. Then the number of detections that
        were compared.

    Raises:
        SelfCheckError: the engine fails, the file lacks a certain detection or has too many others, or its detections
            are not sorted.
    """
    worst = {"scores": 0.0, "masks": 0.0, "worst_mask": 0.0, "boxes": 0.0}
    num_compared = 0
    model = network.model
    limit = min(network.max_detections, model.postprocessing_options.get("max_detections", network.max_detections))
    random = (example_images(network, batch, size, seed) for seed, (batch, *size) in enumerate(shapes))
    for batch in itertools.chain(random, images):
        found = _run(exported, batch)
        size = tuple(batch.shape[-2:])
        with torch.inference_mode(), model.output_as(mask_format="bitmask"):
            normalized = network.normalized(batch)
            outputs = model.network(normalized)
            inputs = [{"height": size[0], "width": size[1]}] * len(batch)
            padded = ImageList(normalized, [size] * len(batch))
            noisy = (_with_noise(outputs, _NOISE * bound, seed) for seed in range(_NUM_NOISES))
            runs = [model.postprocess(each, inputs, padded) for each in (outputs, *noisy)]
        for index, results in enumerate(zip(*runs)):
            expected = results[0]["instances"]
            first, *others = (result["instances"][:limit] for result in results)
            # Rows without a detection are last, so that a consumer may stop at the first score of 0.
            if (found["scores"][index].diff() > 0).any():
                raise SelfCheckError("The detections of the exported file are not sorted by their scores")
            kept = found["scores"][index] > 0
            scores, classes, boxes, masks = (
                found[name][index, kept] for name in ("scores", "classes", "boxes", "masks")
            )
            in_file = Instances(size, scores=scores, pred_classes=classes, pred_masks=masks.bool())
            certain = first
            if len(expected) >= limit:
                # A score within the bound of the cut's may be on its other side.
                certain = certain[certain.scores > expected.scores[min(limit, len(expected) - 1)] + bound]
            for other in others:
                # The file's own rounding takes the rest of the bound.
                certain = certain[_pairs(certain, other, bound / 2)[0]]
            rows, columns, dice = _pairs(certain, in_file, bound, _FOUND_MASK)
            if len(rows) < len(certain) or _has_too_many(in_file, [first, *others], bound):
                raise SelfCheckError(
                    f"The exported file has {len(in_file)} detections for images {tuple(batch.shape)}, and lacks "
                    f"{len(certain) - len(rows)} of {len(certain)} that the model finds for certain; classes and "
                    f"scores of the file: {_described(in_file)}; of the model: {_described(certain)}"
                )
            num_compared += len(rows)
            if len(rows):
                certain, masks = certain[rows], in_file.pred_masks[columns]
                worst["scores"] = _larger(worst["scores"], float((scores[columns] - certain.scores).abs().max()))
                worst["masks"] = _larger(worst["masks"], float((masks != certain.pred_masks).double().mean()))
                worst["worst_mask"] = _larger(worst["worst_mask"], float(1 - dice.min()))
                wanted = certain.pred_boxes.tensor
                if torch.equal(wanted, masks_to_boxes(certain.pred_masks)):
                    # A pixel at the threshold moves a tight box: the file's boxes belong to its own masks.
                    wanted = masks_to_boxes(masks)
                worst["boxes"] = _larger(worst["boxes"], float((boxes[columns] - wanted).abs().max() / max(size)))
    return worst, num_compared


def _with_noise(outputs: Mapping[str, torch.Tensor], amount: float, seed: int) -> dict[str, torch.Tensor]:
    """Return the outputs with noise of up to ``amount`` times the largest value of each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + amount * value.abs().max() * (2 * torch.rand(value.shape, generator=generator) - 1)
        for name, value in outputs.items()
    }


def _pairs(
    first: Instances, second: Instances, bound: float, least_dice: float = _SAME_MASK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return pairs of one class, of scores within the bound and of masks that are as equal as possible.

    Each detection is in one pair at most. Return the indices, and the Dice coefficients, which are at least
    ``least_dice``.
    """
    dice = dice_coefficients(first.pred_masks, second.pred_masks)
    is_pair = (first.scores[:, None] - second.scores).abs() <= bound
    is_pair &= (first.pred_classes[:, None] == second.pred_classes) & (dice >= least_dice)
    # One pair more is worth more than equal masks of all others.
    rows, columns = linear_sum_assignment(torch.where(is_pair, len(first) + 1 + dice, 0.0).numpy(), maximize=True)
    is_kept = is_pair[rows, columns].numpy()
    rows, columns = torch.from_numpy(rows[is_kept]), torch.from_numpy(columns[is_kept])
    return rows, columns, dice[rows, columns]


def _has_too_many(in_file: Instances, runs: Sequence[Instances], bound: float) -> bool:
    """Return whether a file has more detections than all runs together."""
    if len(in_file) <= max(map(len, runs)):
        return False
    together = runs[0]
    for run in runs[1:]:
        is_new = torch.ones(len(run), dtype=torch.bool)
        is_new[_pairs(together, run, bound)[1]] = False
        together = Instances.cat([together, run[is_new]])
    return len(in_file) > len(together)


def _described(instances: Instances) -> str:
    shown = [f"{index} {score:.5f}" for index, score in zip(instances.pred_classes.tolist(), instances.scores.tolist())]
    return ", ".join(shown[:5]) + ("..." if len(shown) > 5 else "") or "none"


def dice_coefficients(masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the Dice coefficients (m, n) of masks (m, h, w) and (n, h, w), where one pixel may differ.

    Rounding moves a pixel across its threshold, which is much of a tiny mask.
    """
    masks, others = (each.flatten(1).float() for each in (masks, others))
    return ((2 * masks @ others.T + 1) / (masks.sum(1)[:, None] + others.sum(1)).clamp(min=1)).clamp(max=1)


def check_differences(worst: Mapping[str, float], bound: float, mask_bound: float | None = None) -> None:
    """Raise SelfCheckError, which names the worst output, where a difference is above the bound, NaN or Inf.

    Args:
        worst: largest difference by output.
        bound: of all outputs.
        mask_bound: of ``worst_mask`` of an end-to-end file.
    """
    bounds = dict.fromkeys(worst, bound) | ({} if mask_bound is None else {"worst_mask": mask_bound})
    name = max(worst, key=lambda key: worst[key] / bounds[key] if math.isfinite(worst[key]) else math.inf)
    if not (math.isfinite(worst[name]) and worst[name] <= bounds[name]):
        allowed = f"at most {bounds[name]:g} is allowed" if math.isfinite(bound) else "all values must be finite"
        raise SelfCheckError(
            f"The exported file differs from the model in eager float32: {name} by {worst[name]:.2g}; {allowed}"
        )


def _run(exported: Network, images: torch.Tensor) -> dict[str, torch.Tensor]:
    try:
        return {name: value.cpu() for name, value in exported(images).items()}
    # An engine's errors have no common class.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise SelfCheckError(f"The engine fails for images {tuple(images.shape)}: {reason}") from error


def _larger(first: float, second: float) -> float:
    """Return the larger number, or NaN where the second one is NaN."""
    return second if second != second or second > first else first
