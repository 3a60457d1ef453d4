"""Compare an exported file with the model that it was made from."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from detectron2.structures import ImageList

from sparseinst.modeling.meta_arch import Network
from sparseinst.ops.masks import masks_to_boxes
from sparseinst.runtime.export import MIN_CELLS, ExportableNetwork, example_images
from sparseinst.runtime.output_difference import relative_differences

# Largest difference over the largest value of the same output, by precision of the file. INT8 has no bound: rounding
# changes the order of almost equal peaks, and so the order of instances in the outputs.
BOUNDS = {"float32": 1e-4, "float16": 0.02, "int8": None}
# Scores that are further apart keep their order.
_CERTAIN_GAP = 1e-3


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
    cells = [(MIN_CELLS, MIN_CELLS), (MIN_CELLS + 1, MIN_CELLS + 3), (MIN_CELLS + 4, MIN_CELLS)]
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
    images: Sequence[torch.Tensor] = (),
) -> tuple[dict[str, float], int]:
    """Compare the detections of an end-to-end file with those of the model's own `postprocess`.

    Detections of almost equal scores may change their order, so boxes, classes and masks are compared only where the
    order is certain.

    Args:
        network, exported, shapes: as in `output_differences`.
        images: batches to compare besides random images, in which a trained model finds nothing, as the network takes
            them.

    Returns:
        Of the worst image ``scores``: largest difference; ``classes``: share of other classes; ``masks``: share of the
        pixels in all its masks that differ; ``boxes``: largest difference over the longer side. Then the number of
        detections whose classes, masks and boxes were compared.

    Raises:
        SelfCheckError: the engine fails, or the numbers of detections differ by more than one.
    """
    worst = {"scores": 0.0, "classes": 0.0, "masks": 0.0, "boxes": 0.0}
    num_compared = 0
    model = network.model
    random = (example_images(network, batch, size, seed) for seed, (batch, *size) in enumerate(shapes))
    for batch in itertools.chain(random, images):
        found = _run(exported, batch)
        size = tuple(batch.shape[-2:])
        with torch.inference_mode(), model.output_as(mask_format="bitmask"):
            normalized = network.normalized(batch)
            outputs = model.network(normalized)
            inputs = [{"height": size[0], "width": size[1]}] * len(batch)
            predicted = model.postprocess(outputs, inputs, ImageList(normalized, [size] * len(batch)))
        for index, instances in enumerate(result["instances"] for result in predicted):
            kept = (found["scores"][index] > 0).nonzero().squeeze(1)
            most = found["scores"].shape[1]
            if abs(len(kept) - min(len(instances), most)) > 1:
                raise SelfCheckError(f"The exported file has {len(kept)} detections; the model has {len(instances)}")
            count = min(len(kept), len(instances))
            kept, instances = kept[:count], instances[:count]
            if count == 0:
                continue
            scores = found["scores"][index, kept]
            worst["scores"] = _larger(worst["scores"], float((scores - instances.scores).abs().max()))
            gaps = torch.cat([scores[:1] * 0 + 1, scores[:-1] - scores[1:], scores[:1] * 0 + 1])
            certain = torch.minimum(gaps[:-1], gaps[1:]) > _CERTAIN_GAP
            num_compared += int(certain.sum())
            if certain.any():
                kept, instances = kept[certain], instances[certain]
                masks = found["masks"][index, kept].bool()
                is_other = found["classes"][index, kept] != instances.pred_classes
                worst["classes"] = _larger(worst["classes"], float(is_other.double().mean()))
                pixels = masks != instances.pred_masks
                worst["masks"] = _larger(worst["masks"], float(pixels.double().mean()))
                boxes = instances.pred_boxes.tensor
                if torch.equal(boxes, masks_to_boxes(instances.pred_masks)):
                    # A pixel at the threshold moves a tight box: the file's boxes belong to its own masks.
                    boxes = masks_to_boxes(masks)
                distance = (found["boxes"][index, kept] - boxes).abs().max() / max(size)
                worst["boxes"] = _larger(worst["boxes"], float(distance))
    return worst, num_compared


def check_differences(worst: Mapping[str, float], bound: float) -> None:
    """Raise SelfCheckError, which names the worst output, where a difference is above the bound or NaN."""
    name = max(worst, key=lambda key: float("inf") if worst[key] != worst[key] else worst[key])
    if not worst[name] <= bound:
        raise SelfCheckError(
            f"The exported file differs from the model in eager float32: {name} by {worst[name]:.2g}; at most "
            f"{bound:g} is allowed"
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
