"""The post-processing of SOLO and SOLOv2 in straightforward PyTorch: all candidates at once, masks resized whole.

``python -m tests.oracles.solo_postprocessing`` times it beside ours: steps from soft masks to masks of the output.
"""

import argparse

import numpy as np
import torch
from detectron2.modeling import build_model
from torch.nn import functional as F

from sparseinst.config import load_config
from sparseinst.engine.host_memory import keep_freed_memory_for_inference
from sparseinst.evaluation.stage_timer import now
from sparseinst.modeling.solo.heads import GridHead
from sparseinst.modeling.solo.postprocessing import DetectionOptions, candidate_cells, detect


def straightforward_detect(
    head: GridHead,
    outputs: dict[str, torch.Tensor],
    image: int,
    options: DetectionOptions,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scores, classes and masks (n, *output_size) bool; matrix NMS with the gaussian kernel. As `detect`."""
    cells, classes, scores = candidate_cells(outputs["cate_logits"][image], head.num_grids, options.score_threshold)
    size = tuple(side // 4 for side in padded_size)
    masks, strides, start = [torch.zeros(0, *size)], [torch.zeros(0)], 0
    for level, count in enumerate(head.level_sizes):
        own = cells[(cells >= start) & (cells < start + count)] - start
        if len(own):
            masks.append(head.mask_probs(outputs, image, level, own, size))
            strides.append(torch.full((len(own),), float(head.strides[level])))
        start += count
    masks, strides = torch.cat(masks), torch.cat(strides)
    binary = masks > options.mask_threshold
    areas = binary.sum((1, 2)).float()
    large = areas > strides
    masks, binary, areas, classes, scores = masks[large], binary[large], areas[large], classes[large], scores[large]
    scores = scores * (masks * binary.float()).sum((1, 2)) / areas
    order = scores.argsort(descending=True, stable=True)[: options.nms_pre]
    masks, binary, areas, classes, scores = masks[order], binary[order], areas[order], classes[order], scores[order]
    flat = binary.flatten(1).float()
    intersections = flat @ flat.T
    iou = intersections / (areas[:, None] + areas[None] - intersections)
    iou = (iou * (classes[:, None] == classes[None])).triu(1)
    worst = iou.max(0).values if len(iou) else iou.sum(0)
    decay = torch.exp(-options.nms_sigma * iou**2) / torch.exp(-options.nms_sigma * worst[:, None] ** 2)
    scores = scores * (decay.min(0).values if len(iou) else 1)
    kept = (scores >= options.update_threshold).nonzero()[:, 0]
    kept = kept[scores[kept].argsort(descending=True, stable=True)][: options.max_detections]
    found = F.interpolate(masks[None, kept], size=padded_size, mode="bilinear")[:, :, : image_size[0], : image_size[1]]
    found = F.interpolate(found, size=output_size, mode="bilinear")[0] > options.mask_threshold
    has_pixels = found.flatten(1).any(1)
    return scores[kept][has_pixels], classes[kept][has_pixels], found[has_pixels]


class GivenMasks:
    """A head whose soft masks are computed once, so that both programs are timed from the soft masks on."""

    def __init__(self, head: GridHead) -> None:
        self.num_grids, self.strides, self.mask_strides = head.num_grids, head.strides, head.mask_strides
        self.level_sizes, self._head, self._known = head.level_sizes, head, {}

    def mask_probs(self, outputs: dict, image: int, level: int, cells: torch.Tensor, size: tuple[int, int]):
        """Return the masks of these cells; those of a level are computed when they are asked for first."""
        if level not in self._known:
            self._known[level] = {}
        known = self._known[level]
        if missing := [cell for cell in cells.tolist() if cell not in known]:
            masks = self._head.mask_probs(outputs, image, level, torch.tensor(missing), size)
            known.update(zip(missing, masks))
        return torch.stack([known[cell] for cell in cells.tolist()])


def main() -> None:
    """Time both on drawn objects, in turn, and compare their results."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config-file", default="solov2/solov2_r50_3x")
    add("--detections", type=int, default=100)
    add("--size", type=int, nargs=2, default=[1080, 1920])
    add("--threads", type=int, default=torch.get_num_threads())
    add("--repetitions", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu"])
    keep_freed_memory_for_inference(cfg)
    model = build_model(cfg).eval()
    scale = min(cfg.INPUT.MIN_SIZE_TEST / min(args.size), cfg.INPUT.MAX_SIZE_TEST / max(args.size))
    image_size = tuple(round(side * scale) for side in args.size)
    with torch.inference_mode():
        images = model.preprocess([{"image": torch.zeros(3, *image_size)}])
        padded_size = tuple(images.tensor.shape[-2:])
        outputs = model.network(images.tensor)
        outputs = model.example_outputs(outputs, args.detections, 0.05)
        sizes = {"padded_size": padded_size, "image_size": image_size, "output_size": tuple(args.size)}
        head = GivenMasks(model.head)
        seconds = {"straightforward": [], "ours": []}
        for _ in range(args.repetitions + 1):
            for name, function in (("straightforward", straightforward_detect), ("ours", detect)):
                since = now(model.device)
                result = function(head, outputs, 0, model.detection, **sizes)
                seconds[name].append(now(model.device) - since)
                if name == "straightforward":
                    expected = result
    different = (result.masks != expected[2]).sum().item() if result.masks.shape == expected[2].shape else "all"
    candidates = len(candidate_cells(outputs["cate_logits"][0], head.num_grids, model.detection.score_threshold)[0])
    print(f"{args.config_file}, {candidates} candidates, {len(result.scores)} masks of {args.size[0]}x{args.size[1]}")
    print(f"{different} of {result.masks.numel()} pixels differ, scores by {(result.scores - expected[0]).abs().max()}")
    for name, values in seconds.items():
        low, median, high = 1e3 * np.percentile(values[1:], [5, 50, 95])
        print(f"{name}: {median:.1f} ms ({low:.1f}, {high:.1f})")
    ratios = np.array(seconds["straightforward"][1:]) / seconds["ours"][1:]
    print(f"{np.median(ratios):.1f} times as fast, {args.threads} threads")


if __name__ == "__main__":
    main()
