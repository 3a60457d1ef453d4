"""The meta-architectures SOLO and SOLOv2. Letters: sparseinst.structures."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from sparseinst.config import check_values, value
from sparseinst.modeling.auxiliary import SemSegHead, build_backbone, with_every_parameter
from sparseinst.modeling.meta_arch import InstanceSegmenter, OutputOptions
from sparseinst.modeling.solo import config
from sparseinst.modeling.solo.criterion import build_solo_criterion, count_targets
from sparseinst.modeling.solo.data_fit import describe_fit, size_warnings
from sparseinst.modeling.solo.dynamic_head import build_mask_feature_head
from sparseinst.modeling.solo.example_outputs import draw_outputs
from sparseinst.modeling.solo.heads import GridHead, build_solo_head
from sparseinst.modeling.solo.postprocessing import DetectionOptions, dense_detections, detect
from sparseinst.modeling.solo.targets import GridSpec, GridTargets, grid_targets
from sparseinst.ops.precision import no_autocast
from sparseinst.structures.detections import Detections
from sparseinst.structures.image_objects import ImageObjects

logger = logging.getLogger(__name__)

# Images are padded to a multiple of this and of the strides, as the released models were trained.
SIZE_DIVISIBILITY = 32


@META_ARCH_REGISTRY.register()
class SOLO(InstanceSegmenter):
    """Segment objects by locations: each cell of a grid predicts a category and a mask (ECCV 2020, arXiv 1912.04488).

    Args:
        backbone: computes the feature pyramid.
        head: predicts categories and masks for cells.
        criterion: computes the losses.
        pixel_mean: per channel, subtracted from the image, in [0, 255].
        pixel_std: per channel, divides the image.
        scale_ranges: smallest and largest sqrt(width * height) of the objects of each level, pixels of the input.
        sigma: share of an object's box around its center of mass whose cells learn it.
        detection: thresholds and limits of the detections.
        mask_feature_head: computes the features that kernels are applied to (SOLOv2).
        sem_seg_head: semantic segmentation of the head's finest feature, in training only.
        sem_seg_weight: weight of its loss.
        output: how predictions are returned.
    """

    node_name: ClassVar[str] = config.SOLO_NODE
    float_layers: ClassVar[tuple[str, ...]] = ("cate_pred", "kernel_pred", "mask_pred_x", "mask_pred_y")
    num_classes_key: ClassVar[str] = f"{config.SOLO_NODE}.{config.NUM_CLASSES}"
    max_detections_key: ClassVar[str] = f"{config.SOLO_NODE}.{config.MAX_DETECTIONS}"
    geometry_keys: ClassVar[tuple[str, ...]] = tuple(f"{config.SOLO_NODE}.{name}" for name in config.GEOMETRY)

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: GridHead,
        criterion: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        scale_ranges: Sequence[Sequence[float]],
        sigma: float = 0.2,
        detection: DetectionOptions | None = None,
        mask_feature_head: nn.Module | None = None,
        sem_seg_head: SemSegHead | None = None,
        sem_seg_weight: float = 0.0,
        output: OutputOptions | None = None,
    ) -> None:
        if head.needs_mask_features != (mask_feature_head is not None):
            raise ValueError(
                f"{type(head).__name__} is not a head of {type(self).__name__}: MODEL.SOLO.HEAD names a head of SOLO, "
                "MODEL.SOLOV2.HEAD one of SOLOv2, which needs a mask_feature_head"
            )
        divisibility = math.lcm(SIZE_DIVISIBILITY, *head.strides)
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std, size_divisibility=divisibility, output=output)
        self.backbone = backbone
        self.head = head
        self.mask_feature_head = mask_feature_head
        self.criterion = criterion
        self.sem_seg_head = sem_seg_head
        self.sem_seg_weight = sem_seg_weight
        self.detection = detection or DetectionOptions()
        self.grid = GridSpec(
            num_grids=head.num_grids,
            scale_ranges=tuple((low, high) for low, high in scale_ranges),
            mask_strides=head.mask_strides,
            sigma=sigma,
            keeps_every_pair=head.keeps_every_pair,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        if not cfg.MODEL.MASK_ON:
            raise ValueError(f"MODEL.MASK_ON is False: {cls.__name__} predicts masks; set it to True")
        check_values(cfg)
        node = value(cfg, cls.node_name)
        config.check_levels(node, cls.node_name)
        backbone = build_backbone(cfg)
        input_shape = backbone.output_shape()
        sem_seg_head = None
        if node.LOSS.SEM_SEG_WEIGHT > 0:
            sem_seg_head = SemSegHead(input_shape[node.IN_FEATURES[0]].channels, node.NUM_CLASSES)
        return {
            "backbone": backbone,
            "head": build_solo_head(cfg, input_shape, cls.node_name),
            "criterion": build_solo_criterion(cfg, cls.node_name),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "scale_ranges": node.SCALE_RANGES,
            "sigma": node.SIGMA,
            "sem_seg_head": sem_seg_head,
            "sem_seg_weight": node.LOSS.SEM_SEG_WEIGHT,
            "detection": DetectionOptions(
                score_threshold=node.SCORE_THRESHOLD,
                mask_threshold=node.MASK_THRESHOLD,
                nms_type=node.NMS.TYPE,
                nms_kernel=node.NMS.KERNEL,
                nms_sigma=node.NMS.SIGMA,
                nms_pre=node.NMS.PRE,
                update_threshold=node.NMS.UPDATE_THRESHOLD,
                iou_threshold=node.NMS.IOU_THRESHOLD,
                max_detections=node.MAX_DETECTIONS,
            ),
            "output": OutputOptions.from_config(cfg),
        }

    @classmethod
    def describe_objects(cls, cfg: CfgNode, images: Sequence[ImageObjects]) -> Iterator[str]:
        """Yield the shares of objects in no range, on one level, in shared cells; see the base class."""
        node = value(cfg, cls.node_name)
        yield from describe_fit(images, cls.node_name, node.STRIDES, node.NUM_GRIDS, node.SCALE_RANGES, node.SIGMA)

    @classmethod
    def training_warnings(cls, cfg: CfgNode) -> Iterator[str]:
        """Yield warnings where ranges and image sizes do not fit; see the base class."""
        sizes = cfg.INPUT.MIN_SIZE_TRAIN
        yield from size_warnings(
            cls.node_name,
            value(cfg, cls.node_name).SCALE_RANGES,
            [sizes] if isinstance(sizes, int) else sizes,
            cfg.INPUT.MAX_SIZE_TRAIN,
        )

    @classmethod
    def trained_keys(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return the number of classes; see the base class."""
        bias = tensors.get("head.cate_pred.bias")
        return {} if bias is None or bias.dim() != 1 or len(bias) == 0 else {cls.num_classes_key: len(bias)}

    def network(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run backbone and heads.

        Args:
            images: (B, 3, h, w), normalized and padded.

        Returns:
            ``cate_logits`` (B, K, all cells), level after level, and what the head's masks are computed from; see the
            head's class. In training also ``sem_seg_logits`` (B, K, H, W) where the model has such a head.
        """
        features = self.backbone(images)
        outputs = self.head(features)
        if self.mask_feature_head is not None:
            outputs["mask_features"] = self.mask_feature_head(features)
        if self.training and self.sem_seg_head is not None:
            outputs["sem_seg_logits"] = self.sem_seg_head(features[self.head.in_features[0]])
        return outputs

    def prepare_targets(self, batched_inputs: list[dict], images: ImageList) -> list[GridTargets]:
        """Assign the objects of each image to the cells of the grids, which cover the padded input as published."""
        padded_size = tuple(images.tensor.shape[-2:])
        return [grid_targets(x["instances"], padded_size, self.grid, self.device) for x in batched_inputs]

    def loss_counts(self, targets: list[GridTargets]) -> dict[str, torch.Tensor]:
        """Count positive cells, and pairs of a cell and an object; for the semantic loss images."""
        num_images = {} if self.sem_seg_head is None else {"num_images": torch.tensor(len(targets))}
        return {**count_targets(targets), **num_images}

    def losses(
        self,
        outputs: dict[str, torch.Tensor],
        targets: list[GridTargets],
        counts: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the criterion's weighted losses, and log how many cells an object has taken from an earlier one."""
        if self.training and has_event_storage():
            overwritten = sum(level.num_overwritten for image in targets for level in image.levels)
            get_event_storage().put_scalar("solo/overwritten_cells", overwritten)
        losses = self.criterion(self.head, outputs, targets, counts)
        if self.sem_seg_head is not None:
            masks_and_classes = [(target.masks[min(target.masks)], target.classes) for target in targets]
            loss = self.sem_seg_head.loss(outputs["sem_seg_logits"], masks_and_classes, counts)
            losses["loss_sem_seg"] = self.sem_seg_weight * loss
        # Levels of the pyramid may be unused, and levels of the head without an object.
        return with_every_parameter(losses, self)

    def postprocess(
        self, outputs: dict[str, torch.Tensor], batched_inputs: list[dict], images: ImageList
    ) -> list[dict]:
        """Turn the network's dict into Instances, image by image."""
        padded_size = tuple(images.tensor.shape[-2:])

        def detect_image(index: int, image_size: tuple[int, int], output_size: tuple[int, int]) -> Detections:
            return detect(
                self.head,
                outputs,
                index,
                self.detection,
                padded_size=padded_size,
                image_size=image_size,
                output_size=output_size,
                score_threshold=self.output.score_threshold,
                mask_format=self.output.mask_format,
                max_mask_gib=self.output.max_mask_gib,
            )

        # Areas and overlaps need more than the 11 bits of float16.
        with no_autocast(self.device):
            return [{"instances": found} for found, _ in self.detect_each(detect_image, batched_inputs, images)]

    def dense_detections(
        self, outputs: dict[str, torch.Tensor], padded_size: tuple[int, int], max_detections: int
    ) -> dict[str, torch.Tensor]:
        """Return a fixed number of detections; see the base class."""
        if self.detection.nms_type != "matrix":
            raise ValueError(
                f"{self.node_name}.NMS.TYPE is {self.detection.nms_type}; --end-to-end supports matrix only"
            )
        return dense_detections(
            self.head,
            outputs,
            self.detection,
            padded_size=padded_size,
            max_detections=max_detections,
            score_threshold=self.output.score_threshold,
        )

    @property
    def postprocessing_options(self) -> dict[str, float | int | str]:
        """Return thresholds and limits; see the base class."""
        # "score_threshold" is that of candidates.
        return {**self.detection._asdict(), "final_score_threshold": self.output.score_threshold}

    def example_outputs(
        self, outputs: dict[str, torch.Tensor], num_objects: int, median_area: float
    ) -> dict[str, torch.Tensor]:
        """Return outputs with drawn objects and as many candidates as enter NMS; see the base class."""
        return draw_outputs(self.head, outputs, num_objects, self.detection, median_area)


class SOLOv2(SOLO):
    """Apply a kernel predicted for each cell to shared mask features (NeurIPS 2020, arXiv 2003.10152).

    Takes the arguments of `SOLO`; ``mask_feature_head`` is needed.
    """

    node_name: ClassVar[str] = config.SOLOV2_NODE
    num_classes_key: ClassVar[str] = f"{config.SOLOV2_NODE}.{config.NUM_CLASSES}"
    max_detections_key: ClassVar[str] = f"{config.SOLOV2_NODE}.{config.MAX_DETECTIONS}"
    geometry_keys: ClassVar[tuple[str, ...]] = tuple(
        f"{config.SOLOV2_NODE}.{name}" for name in (*config.GEOMETRY, "MASK_FEATURES.IN_FEATURES")
    )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        arguments = super().from_config(cfg)
        return {**arguments, "mask_feature_head": build_mask_feature_head(cfg, arguments["backbone"].output_shape())}


def _register_solov2() -> None:
    """Register SOLOv2, under another name where AdelaiDet's class of this name is registered already."""
    if "SOLOv2" in META_ARCH_REGISTRY:
        logger.warning("Another SOLOv2 is registered; this one is MODEL.META_ARCHITECTURE SOLOv2Segmenter")
        SOLOv2.__name__ = "SOLOv2Segmenter"
    META_ARCH_REGISTRY.register(SOLOv2)


_register_solov2()
