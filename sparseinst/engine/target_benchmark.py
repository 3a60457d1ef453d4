"""What ground truth, matcher and criterion cost: ``python -m sparseinst.engine.target_benchmark --config-file NAME``.

Each is timed, and their memory measured, in two ways in turn. "plain", much as the published code does it: the mapper
gives whole masks, which are padded and reduced in float32, all of a batch at once, and each prediction of a batch is
compared with each instance of it. "ours": as a training does it. The network runs once, for the outputs that both get;
it has random weights. The criterion itself, and what it does backward, is ours in both, so that the difference is
rather too small. Ground truth is ellipses, half of them smaller than 5 % of the picture.

Memory is counted, not sampled: the most bytes that PyTorch's allocator had given out at once for targets, matcher,
criterion and their backward pass, above what was there before (torch.profiler on a CPU, torch.cuda's own count on a
GPU), and the bytes of the batch's masks.
"""

import argparse
import copy
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from PIL import Image
from tabulate import tabulate
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from sparseinst.config import load_config
from sparseinst.data import SparseInstDatasetMapper
from sparseinst.data.grid_masks import GridMasks
from sparseinst.modeling import InstanceTargets, MatchedPairs, SparseInst, SparseInstMatcher
from sparseinst.modeling.losses import masks_on_grid
from sparseinst.modeling.matcher import matching_scores
from sparseinst.modeling.sparse_inst import gt_masks_tensor

STAGES = ("mapper", "targets", "matcher", "criterion", "backward")
WAYS = ("plain", "ours")


class PlainMatcher:
    """Scores of every prediction of a batch for every instance of it, of which each image's own block is used.

    Args:
        matcher: whose exponents are taken, and which assigns.
    """

    def __init__(self, matcher: SparseInstMatcher) -> None:
        self.matcher = matcher

    @torch.no_grad()
    def __call__(self, outputs: dict[str, torch.Tensor], targets: list[InstanceTargets]) -> list[MatchedPairs]:
        """As SparseInstMatcher's."""
        matcher, (num_images, num_masks) = self.matcher, outputs["pred_logits"].shape[:2]
        maps = None
        if matcher.gamma > 0:
            maps = outputs["iam_weights"].unflatten(1, (-1, num_masks)).transpose(0, 1).flatten(0, 2)
        scores = matching_scores(
            outputs["pred_logits"].flatten(0, 1),
            outputs["pred_masks"].flatten(0, 1),
            InstanceTargets(*(torch.cat(fields) for fields in zip(*targets))),
            matcher.alpha,
            matcher.beta,
            maps,
            matcher.gamma,
        )
        blocks = scores.view(num_images, num_masks, -1).split([len(target.gt_classes) for target in targets], 2)
        return matcher.assign([block[image] for image, block in enumerate(blocks)])


def plain_targets(
    model: SparseInst, batch: list[dict], images: ImageList, mask_size: Sequence[int]
) -> list[InstanceTargets]:
    """As :meth:`SparseInst.prepare_targets`, with all whole masks of the batch in float32."""
    height, width = images.tensor.shape[-2:]
    masks = [gt_masks_tensor(x["instances"].to(model.device)).float() for x in batch]
    masks = torch.cat([F.pad(m, (0, width - m.shape[2], 0, height - m.shape[1])) for m in masks])
    if model.antialiased_targets:
        masks = masks_on_grid(masks, tuple(mask_size))
    else:
        masks = F.interpolate(masks[:, None], size=tuple(mask_size), mode="bilinear", align_corners=False)[:, 0]
    classes = [x["instances"].gt_classes.to(model.device) for x in batch]
    return [InstanceTargets(*fields) for fields in zip(classes, masks.split([len(c) for c in classes]))]


def peak_bytes(function: Callable[[], None], device: torch.device) -> int:
    """Most bytes that PyTorch gave out at once while the function ran, above those before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    return max(0, *np.cumsum([change for _, change in sorted(changes)]).tolist()) if changes else 0


class TargetBenchmark:
    """One batch, and how long it takes either way.

    Args:
        model: in training mode.
        mappers: by WAYS.
        num_images: in the batch.
        size: of the pictures, (height, width).
        num_instances: in each.
    """

    def __init__(
        self,
        model: SparseInst,
        mappers: dict[str, SparseInstDatasetMapper],
        num_images: int,
        size: tuple[int, int],
        num_instances: int,
    ) -> None:
        self.model, self.mappers = model, mappers
        with tempfile.TemporaryDirectory() as folder:
            self.pictures = _drawn_pictures(Path(folder), num_images, size, num_instances)
            self.batches = {way: self._map(way)[0] for way in WAYS}
            self.mapper_seconds = {way: self._mapper_seconds(way) for way in WAYS}
        self.images = model.preprocess_image(self.batches["ours"])
        with torch.no_grad():
            outputs = model.network(self.images.tensor)
        self.outputs = {name: value.detach().requires_grad_() for name, value in outputs.items() if name != "pred_iam"}
        plain_criterion = copy.copy(model.criterion)
        plain_criterion.matcher = PlainMatcher(model.criterion.matcher)
        self.criteria = {"plain": plain_criterion, "ours": model.criterion}

    def _map(self, way: str) -> tuple[list[dict], float]:
        np.random.seed(0)
        start = time.perf_counter()
        return [self.mappers[way](picture) for picture in self.pictures], time.perf_counter() - start

    def _mapper_seconds(self, way: str, repetitions: int = 5) -> float:
        """Of the ground truth of the batch: what the mapper takes longer with it than without."""
        with_truth = min(self._map(way)[1] for _ in range(repetitions))
        pictures, self.pictures = self.pictures, [{**picture, "annotations": []} for picture in self.pictures]
        without = min(self._map(way)[1] for _ in range(repetitions))
        self.pictures = pictures
        return with_truth - without

    def step(self, way: str) -> list[float]:
        """Seconds of STAGES but the mapper's."""
        mask_size = self.outputs["pred_masks"].shape[-2:]
        criterion = copy.copy(self.criteria[way])
        for output in self.outputs.values():
            output.grad = None
        times = [self._now()]
        if way == "ours":
            targets = self.model.prepare_targets(self.batches[way], self.images, mask_size)
        else:
            targets = plain_targets(self.model, self.batches[way], self.images, mask_size)
        times.append(self._now())
        pairs = criterion.matcher(self.outputs, targets)
        times.append(self._now())
        criterion.matcher = lambda *_: pairs
        total = sum(criterion(self.outputs, targets).values())
        times.append(self._now())
        total.backward()
        times.append(self._now())
        return np.diff(times).tolist()

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def memory(self, way: str) -> int:
        """Bytes."""
        for output in self.outputs.values():
            output.grad = None
        held = 0 if self.model.device.type == "cuda" else sum(map(_masks_bytes, self.batches[way]))
        return held + peak_bytes(lambda: self.step(way), self.model.device)

    def measure(self, repetitions: int, warmup: int = 2) -> dict[str, dict[str, float]]:
        """Median milliseconds of STAGES, and "bytes", by WAYS."""
        seconds: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        for _ in range(warmup + repetitions):
            for way in WAYS:
                seconds[way].append(self.step(way))
        result = {}
        for way in WAYS:
            medians = np.median(seconds[way][warmup:], axis=0)
            stages = dict(zip(STAGES, [1e3 * self.mapper_seconds[way], *(1e3 * medians)]))
            result[way] = {**stages, "bytes": self.memory(way)}
        return result


def _masks_bytes(x: dict) -> int:
    masks = x["instances"].gt_masks
    if isinstance(masks, GridMasks):
        return masks.counts.nbytes + sum(window.bits.nbytes for window in masks.windows)
    return masks.tensor.nbytes


def _drawn_pictures(folder: Path, num_images: int, size: tuple[int, int], num_instances: int) -> list[dict]:
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * math.pi, 32, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    pictures = []
    for index in range(num_images):
        path = folder / f"{index}.jpg"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        annotations = []
        for _ in range(num_instances):
            radius = math.sqrt(math.prod(size) * 0.05 * math.exp(rng.standard_normal()) / math.pi)
            stretch = math.exp(0.4 * rng.standard_normal())
            centre = rng.uniform(1, (size[1] - 1, size[0] - 1))
            points = (centre + circle * (radius * stretch, radius / stretch)).clip(0, (size[1], size[0]))
            annotations.append({"segmentation": [points.reshape(-1).tolist()], "category_id": 0})
        pictures.append({"file_name": str(path), "annotations": annotations})
    return pictures


def _check(args: argparse.Namespace, model: torch.nn.Module) -> None:
    if not isinstance(model, SparseInst):
        raise ValueError(f"MODEL.META_ARCHITECTURE gives a {type(model).__name__}; it must be SparseInst")
    if not isinstance(getattr(model.criterion, "matcher", None), SparseInstMatcher):
        raise ValueError("MODEL.SPARSE_INST.MATCHER.NAME is another matcher; it must be SparseInstMatcher")
    if min(*args.size, *args.instances, args.images, args.repetitions) < 1:
        raise ValueError("--size, --images, --instances and --repetitions must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0; 2 where the config does not allow it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="YAML file, or a name that comes with the package")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=int, default=2, metavar="N", help="in a batch (default 2)")
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 7, 30, 100], metavar="N", help="in each image")
    parser.add_argument("--repetitions", type=int, default=10, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides")
    args = parser.parse_args(argv)
    logging.getLogger("sparseinst").setLevel(logging.WARNING)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        cfg = load_config(args.config_file, args.opts)
        model = build_model(cfg).train()
        _check(args, model)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    mappers = {
        "plain": SparseInstDatasetMapper(cfg, is_train=True),
        "ours": SparseInstDatasetMapper(cfg, is_train=True, mask_grid=model.mask_grid),
    }
    if cfg.SOLVER.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    rows, memory = [], {}
    for count in args.instances:
        measured = TargetBenchmark(model, mappers, args.images, tuple(args.size), count).measure(args.repetitions)
        for way, figures in measured.items():
            memory[count, way] = figures["bytes"] / 2**20
            rows.append([count, way, *(figures[stage] for stage in STAGES), memory[count, way]])
    print(tabulate(rows, ["instances", "", *(f"{stage} ms" for stage in STAGES), "MiB"], floatfmt=".1f"))
    least, *others = sorted(set(args.instances))
    for count in others:
        plain, ours = (memory[count, way] - memory[least, way] for way in WAYS)
        print(f"memory of {count} instances less {least}: plain {plain:.1f} MiB, ours {ours:.1f}: {ours / plain:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
