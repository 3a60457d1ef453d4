"""The base class of every model here, and all that trainer, evaluation, demo and benchmark know of a model."""

import contextlib
import dataclasses
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from sparseinst.ops.mask_output import MASK_FORMATS, MaskMemoryError
from sparseinst.structures.detections import Detections
from sparseinst.structures.image_objects import ImageObjects
from sparseinst.structures.mask_window import MaskWindow
from sparseinst.structures.rle_masks import RLEMasks

Network = Callable[[torch.Tensor], dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """How predictions are returned.

    Attributes:
        mask_format: "bitmask": boolean masks; "rle": `RLEMasks`, each mask encoded and freed before the next one.
        max_mask_gib: most memory that the boolean masks of one image may take, in GiB.
        score_threshold: instances with a final score at or below this are dropped; in [0, 1].
        with_maps: return activation maps too, where the model has them.

    Raises:
        ValueError: another mask format, or a number outside its range.
    """

    mask_format: str = "bitmask"
    max_mask_gib: float = 4.0
    score_threshold: float = 0.0
    with_maps: bool = False

    def __post_init__(self) -> None:
        if self.mask_format not in MASK_FORMATS:
            known = ", ".join(MASK_FORMATS)
            raise ValueError(f"MODEL.OUTPUT.MASK_FORMAT is {self.mask_format!r}; it must be one of {known}")
        if not self.max_mask_gib > 0:
            raise ValueError(f"MODEL.OUTPUT.MAX_MASK_GIB is {self.max_mask_gib}; it must be above 0")
        if not 0 <= self.score_threshold <= 1:
            raise ValueError(f"MODEL.OUTPUT.SCORE_THRESHOLD is {self.score_threshold}; it must lie in [0, 1]")

    @classmethod
    def from_config(cls, cfg: CfgNode, with_maps: bool = False) -> "OutputOptions":
        """Read MODEL.OUTPUT."""
        output = cfg.MODEL.OUTPUT
        return cls(output.MASK_FORMAT, output.MAX_MASK_GIB, output.SCORE_THRESHOLD, with_maps)


def check_not_traced() -> None:
    """Raise RuntimeError while a trace or an export records: the result would be that of the example image alone."""
    # PyTorch before 2.7 has no is_exporting.
    if torch.jit.is_tracing() or getattr(torch.compiler, "is_exporting", bool)():
        raise RuntimeError(
            "Post-processing cannot be traced or exported, because its steps depend on the image. Export model.network "
            "by torch.export, and call model.preprocess and model.postprocess around it"
        )


@contextlib.contextmanager
def _value_of_thread(values: dict[int, Any], value: Any) -> Iterator[None]:
    """Set the value of this thread in a with statement."""
    thread = threading.get_ident()
    before = values.get(thread)
    values[thread] = value
    try:
        yield
    finally:
        del values[thread]
        if before is not None:
            values[thread] = before


class TrainingPart(NamedTuple):
    """Inputs of one part of a training step, prepared before the network runs.

    Attributes:
        images: normalized and padded.
        targets: what the model's `prepare_targets` returned.
        counts: divisors of the losses, summed over the parts of the step in this process; None: it has one part.
    """

    images: ImageList
    targets: Any
    counts: dict[str, torch.Tensor] | None = None


class InstanceSegmenter(nn.Module, ABC):
    """A meta-architecture that finds instances and their masks.

    A subclass implements `network`, `prepare_targets`, `loss_counts`, `losses` and `postprocess`. `network` is pure and
    dense, and the shapes of its outputs depend on the shape of its input alone, so that it can be rewritten, compiled,
    exported and run by other engines. Everything that depends on the data (selection, NMS, resizing) is in
    `postprocess`, which is the same code on every engine.

    Args:
        pixel_mean: per channel, subtracted from the image, in [0, 255].
        pixel_std: per channel, divides the image.
        size_divisibility: images are padded to a multiple of this, and of what `self.backbone` asks for.
        output: how predictions are returned.

    Attributes:
        num_classes_key: config key of the number of classes; None where the model has no such key.
        max_instances_key, max_detections_key: config keys of the most instances it predicts, returns for an image.
        mask_nms_key: config key of the IoU above which the worse of two masks of a class is dropped.
        activation_maps_key: config key that makes the model return activation maps.
        lossless_targets_key: config key that makes the targets keep every object; see `target_check`.
        float_layers: names of modules that INT8 exports leave in float32, with all that reads their results.
        ranks_instances: whether the network puts its N instances in an order that its own numbers decide.
        postprocessing_modules: names of submodules that `postprocess` calls; exported files hold their weights.
        geometry_keys: config keys that pre- or post-processing reads, and that must be those of the trained network.
        class_names: of the weights, in the order of the class logits; None: unknown. Trainer and checkpointer set them.
    """

    num_classes_key: ClassVar[str | None] = None
    max_instances_key: ClassVar[str | None] = None
    max_detections_key: ClassVar[str | None] = None
    mask_nms_key: ClassVar[str | None] = None
    activation_maps_key: ClassVar[str | None] = None
    lossless_targets_key: ClassVar[str | None] = None
    float_layers: ClassVar[tuple[str, ...]] = ()
    ranks_instances: bool = False
    postprocessing_modules: ClassVar[tuple[str, ...]] = ()
    geometry_keys: ClassVar[tuple[str, ...]] = ()
    class_names: Sequence[str] | None = None

    def __init__(
        self,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int = 32,
        output: OutputOptions | None = None,
    ) -> None:
        super().__init__()
        if len(pixel_mean) != len(pixel_std) or not all(pixel_std):
            raise ValueError(
                f"MODEL.PIXEL_MEAN is {list(pixel_mean)} and MODEL.PIXEL_STD is {list(pixel_std)}: they need one value "
                "for each channel, and no standard deviation may be 0"
            )
        # Not persistent: published checkpoints do not hold them.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.size_divisibility = size_divisibility
        self._output = output or OutputOptions()
        # Options that `output_as` has changed, by thread: one model may serve several.
        self._output_of_thread: dict[int, OutputOptions] = {}
        self._maps_of_thread: dict[int, bool] = {}
        self._training_network: Network | None = None

    @classmethod
    def target_check(cls, cfg: CfgNode) -> Callable[[MaskWindow], bool] | None:
        """Return a function from an object's mask at the training size to whether the targets keep the object.

        Return None, the default, where the targets keep every object.
        """
        return None

    @classmethod
    def describe_objects(cls, cfg: CfgNode, images: Sequence[ImageObjects]) -> Iterator[str]:
        """Yield lines about how the objects of a data set fit the config; none by default."""
        yield from ()

    @classmethod
    def keys_for_sides(cls, cfg: CfgNode, sides: Sequence[float]) -> dict[str, tuple[int, str]]:
        """Return the keys that depend on the objects' sizes, each with value and reason; none by default.

        ``sides`` are the roots of the areas of the objects' boxes, in pixels at the training's largest size.
        """
        return {}

    @classmethod
    def training_warnings(cls, cfg: CfgNode) -> Iterator[str]:
        """Yield what a training's log warns of at its start; nothing by default."""
        yield from ()

    @classmethod
    def trained_keys(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return the config keys, with values, that the shapes of a weights file's tensors (by name) determine.

        Commands use them to build the model of a checkpoint. An empty dict, the default, says nothing about the file; a
        subclass returns one as well where the tensors are a backbone's.
        """
        return {}

    @property
    def device(self) -> torch.device:
        """Return the device of the model's tensors, to which images are moved."""
        return self.pixel_mean.device

    @property
    def output(self) -> OutputOptions:
        """Return the options of the predictions."""
        changed = self._output_of_thread
        return changed.get(threading.get_ident(), self._output) if changed else self._output

    @property
    def with_maps(self) -> bool:
        """Return ``output.with_maps``. Networks read this: in `output` torch.compile breaks its graph at the thread."""
        changed, own = self._maps_of_thread, self._output.with_maps
        return changed.get(threading.get_ident(), own) if changed else own

    @contextlib.contextmanager
    def output_as(self, **changes: Any) -> Iterator[None]:
        """Change fields of `output` for this thread in a with statement. Raises ValueError on a value out of range."""
        output = dataclasses.replace(self.output, **changes)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_value_of_thread(self._output_of_thread, output))
            if "with_maps" in changes:
                stack.enter_context(_value_of_thread(self._maps_of_thread, output.with_maps))
            yield

    def forward(
        self, batched_inputs: list[dict], part: TrainingPart | None = None
    ) -> dict[str, torch.Tensor] | list[dict]:
        """Compute losses in training mode, predictions otherwise.

        Args:
            batched_inputs: one dict for each image, as Detectron2's DatasetMapper returns them. ``image``: (3, h, w) in
                [0, 255], channels in the order of INPUT.FORMAT. ``height``, ``width``: output size, by default the
                image's own. In training ``instances`` with ``gt_classes`` (M,) and ``gt_masks``: PolygonMasks, BitMasks
                or a tensor (M, h, w); ``gt_masks`` may be absent where M is 0.
            part: what `prepare_parts` returned for these inputs, where they are a part of a larger training step.

        Returns:
            In training a dict of weighted scalar losses. Otherwise one dict for each image with ``instances``, sorted
            by score: Instances of the output size with ``pred_boxes`` (tight boxes of the masks, or boxes that the
            model predicts), ``pred_masks`` (n, height, width) bool or `RLEMasks`, ``scores`` and ``pred_classes``.

        Raises:
            MaskMemoryError: the boolean masks of an image would take more than ``output.max_mask_gib``.
        """
        if not self.training:
            check_not_traced()
            images = self.preprocess(batched_inputs)
            return self.postprocess(self.network(images.tensor), batched_inputs, images)
        if part is None:
            images = self.preprocess(batched_inputs)
            part = TrainingPart(images, self.prepare_targets(batched_inputs, images))
        # Statistics of norms are measured without gradients, and need no compilation.
        network = self.training_network if torch.is_grad_enabled() else self.network
        return self.losses(network(part.images.tensor), part.targets, part.counts)

    def prepare_parts(self, batches: Sequence[list[dict]]) -> list[TrainingPart]:
        """Prepare the parts of one training step, each with the counts of all of them (gradient accumulation)."""
        prepared = []
        totals: dict[str, torch.Tensor] = {}
        for batch in batches:
            images = self.preprocess(batch)
            targets = self.prepare_targets(batch, images)
            prepared.append((images, targets))
            for name, count in self.loss_counts(targets).items():
                totals[name] = totals.get(name, 0) + count
        return [TrainingPart(images, targets, totals) for images, targets in prepared]

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalize the images, then pad them with zeros at the right and the bottom to one size."""
        images = [
            (x["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        backbone = getattr(self, "backbone", None)
        # getattr: this property of Detectron2's Swin raises AttributeError where no FPN is around it.
        divisibility = math.lcm(self.size_divisibility, getattr(backbone, "size_divisibility", 0) or 1)
        constraints = {**getattr(backbone, "padding_constraints", {}), "size_divisibility": divisibility}
        return ImageList.from_tensors(images, padding_constraints=constraints)

    @abstractmethod
    def network(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the network.

        Args:
            images: (B, 3, h, w), normalized and padded.

        Returns:
            Dense tensors with B first; their shapes depend on the shape of ``images`` alone.
        """

    @abstractmethod
    def prepare_targets(self, batched_inputs: list[dict], images: ImageList) -> Any:
        """Return the targets of these images, on the model's device. Called once for each part of a step."""

    @abstractmethod
    def loss_counts(self, targets: Any) -> dict[str, torch.Tensor]:
        """Return the divisors of the losses: scalars that can be summed over parts. Nothing is exchanged."""

    @abstractmethod
    def losses(
        self, outputs: dict[str, torch.Tensor], targets: Any, counts: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute weighted scalar losses.

        Args:
            outputs: what `network` returned.
            targets: what `prepare_targets` returned.
            counts: sums of `loss_counts` over the whole step of this process; by default those of ``targets``. Only
                this method may exchange numbers with other processes, and every process calls it equally often.
        """

    @abstractmethod
    def postprocess(
        self, outputs: dict[str, torch.Tensor], batched_inputs: list[dict], images: ImageList
    ) -> list[dict]:
        """Turn the network's outputs into one dict with ``instances`` for each image."""

    @property
    def postprocessing_options(self) -> dict[str, float | int | str]:
        """Return the thresholds and limits of `postprocess` by name, for exported files; none by default."""
        return {}

    def dense_detections(
        self, outputs: dict[str, torch.Tensor], padded_size: tuple[int, int], max_detections: int
    ) -> dict[str, torch.Tensor]:
        """Post-process to a fixed number of detections at the network's size, for an export with ``--end-to-end``.

        Args:
            outputs: what `network` returned for B images.
            padded_size: of the images.
            max_detections: n, the detections of each image.

        Returns:
            ``scores`` (B, n) float32, best first, then 0 in rows without a detection; ``classes`` (B, n) int64;
            ``boxes`` (B, n, 4) float32, x0, y0, x1, y1 in pixels of the padded image, 0 in rows without a detection;
            ``masks`` (B, n, *padded_size) uint8, 0 or 1. `postprocess` returns the same detections.

        Raises:
            ValueError: the model has no such post-processing; the default.
        """
        raise ValueError(f"--end-to-end: {type(self).__name__} has no post-processing that can be exported")

    def detect_each(
        self,
        detect: Callable[[int, tuple[int, int], tuple[int, int]], Detections],
        batched_inputs: list[dict],
        images: ImageList,
    ) -> Iterator[tuple[Instances, Detections]]:
        """Yield the Instances of each image, with the detections that they were made from.

        Args:
            detect: called with the image's index in the batch, its size in the padded input, and the output's size.
            batched_inputs, images: as in `postprocess`.

        Raises:
            MaskMemoryError: from ``detect``; the image's file is added to the message.
        """
        for index, (x, image_size) in enumerate(zip(batched_inputs, images.image_sizes)):
            output_size = (x.get("height", image_size[0]), x.get("width", image_size[1]))
            try:
                detections = detect(index, image_size, output_size)
            except MaskMemoryError as error:
                if "file_name" not in x:
                    raise
                raise MaskMemoryError(f"{x['file_name']}: {error}") from error
            masks = detections.masks
            if not isinstance(masks, torch.Tensor):
                masks = RLEMasks(masks, output_size, self.output.max_mask_gib)
            instances = Instances(
                output_size,
                pred_boxes=Boxes(detections.boxes),
                pred_masks=masks,
                scores=detections.scores,
                pred_classes=detections.classes,
            )
            yield instances, detections

    def example_outputs(
        self, outputs: dict[str, torch.Tensor], num_objects: int, median_area: float
    ) -> dict[str, torch.Tensor]:
        """Return outputs of the same shapes from which `postprocess` makes a realistic number of instances.

        Benchmarks use them because random weights let all predictions pass or none. The objects are the same in each
        call. A model that does not override this method is timed with the outputs of its network.

        Args:
            outputs: what `network` returned.
            num_objects: instances in each image.
            median_area: median share of the image that an object covers, above 0.

        Raises:
            ValueError: the model cannot predict this number of instances.
        """
        return outputs

    @property
    def training_network(self) -> Network:
        """Return the callable that runs in training mode: `network`, unless `set_training_network` replaced it."""
        return self._training_network or self.network

    def set_training_network(self, network: Network) -> None:
        """Run this callable in place of `network` in training mode, for example a compiled one."""
        self._training_network = network
