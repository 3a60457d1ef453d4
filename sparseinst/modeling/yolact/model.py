"""The meta-architecture YOLACT. Letters: sparseinst.structures; N is the number of anchors, k of prototypes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import nn
from torch.nn import functional as F

from sparseinst.config import check_values
from sparseinst.modeling.auxiliary import SemSegHead, build_backbone, with_every_parameter
from sparseinst.modeling.meta_arch import InstanceSegmenter, OutputOptions
from sparseinst.modeling.yolact import config
from sparseinst.modeling.yolact.anchors import AnchorSpec, grid_sizes
from sparseinst.modeling.yolact.criterion import build_yolact_criterion, count_targets
from sparseinst.modeling.yolact.example_outputs import draw_outputs
from sparseinst.modeling.yolact.fpn import YOLACTPyramid
from sparseinst.modeling.yolact.heads import MaskIoUHead, build_prototype_net, build_yolact_head
from sparseinst.modeling.yolact.matcher import MatcherOptions
from sparseinst.modeling.yolact.postprocessing import DetectionOptions, dense_detections, detect
from sparseinst.modeling.yolact.targets import AnchorTargets, anchor_targets
from sparseinst.ops.precision import no_autocast
from sparseinst.structures.detections import Detections

# The smallest side of the prototypes that the five strided convolutions of the mask-IoU head can read.
_MASK_IOU_SIDE = 63


@META_ARCH_REGISTRY.register()
class YOLACT(InstanceSegmenter):
    """Combine prototype masks by coefficients of anchors (ICCV 2019, arXiv 1904.02689; ++: arXiv 1912.06218).

    Args:
        backbone: a `YOLACTPyramid`.
        protonet: computes the prototypes from the finest level.
        head: predicts classes, boxes and coefficients of the anchors.
        criterion: computes the losses.
        pixel_mean: per channel, subtracted from the image, in [0, 255].
        pixel_std: per channel, divides the image.
        side: of the square that images are resized to, pixels.
        anchors: sizes, scales and ratios.
        matcher: thresholds of the matching.
        detection: thresholds and limits of the detections.
        sem_seg_head: semantic segmentation of the finest level, in training only.
        mask_iou_head: predicts the IoU of masks (YOLACT++).
        freeze_norms: batch norms keep their statistics in training, and their weights are not trained.
        output: how predictions are returned.
    """

    num_classes_key: ClassVar[str] = config.NUM_CLASSES_KEY
    max_detections_key: ClassVar[str] = config.MAX_DETECTIONS_KEY
    float_layers: ClassVar[tuple[str, ...]] = ("cls_score", "bbox_pred", "coeff_pred")
    postprocessing_modules: ClassVar[tuple[str, ...]] = ("mask_iou_head",)
    geometry_keys: ClassVar[tuple[str, ...]] = (
        "INPUT.SQUARE_SIZE",
        "MODEL.FPN.IN_FEATURES",
        *(f"{config.NODE}.{name}" for name in ("ANCHOR_SIZES", "ANCHOR_SCALES", "ANCHOR_RATIOS", "SQUARE_ANCHORS")),
    )

    @configurable
    def __init__(
        self,
        *,
        backbone: YOLACTPyramid,
        protonet: nn.Module,
        head: nn.Module,
        criterion: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        side: int = 550,
        anchors: AnchorSpec,
        matcher: MatcherOptions | None = None,
        detection: DetectionOptions | None = None,
        sem_seg_head: nn.Module | None = None,
        mask_iou_head: nn.Module | None = None,
        freeze_norms: bool = False,
        output: OutputOptions | None = None,
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std, size_divisibility=1, output=output)
        self.backbone = backbone
        self.protonet = protonet
        self.head = head
        self.criterion = criterion
        self.sem_seg_head = sem_seg_head
        self.mask_iou_head = mask_iou_head
        self.matcher = matcher or MatcherOptions()
        self.detection = detection or DetectionOptions()
        self.side = side
        self.grid_sizes = grid_sizes(side, backbone.levels)
        self.register_buffer("anchors", anchors.boxes(self.grid_sizes, side), persistent=False)
        if mask_iou_head is not None and self.mask_side < _MASK_IOU_SIDE:
            raise ValueError(
                f"{config.SQUARE_SIZE_KEY} is {side}, which gives prototypes of {self.mask_side} cells a side; with "
                f"{config.NODE}.MASK_IOU_ON they need {_MASK_IOU_SIDE}: enlarge the input"
            )
        self.freeze_norms = freeze_norms
        if freeze_norms:
            for norm in self._batch_norms():
                norm.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        if not cfg.MODEL.MASK_ON:
            raise ValueError("MODEL.MASK_ON is False: YOLACT predicts masks; set it to True")
        check_values(cfg)
        side = cfg.INPUT.SQUARE_SIZE
        if side == 0:
            raise ValueError(f"{config.SQUARE_SIZE_KEY} is 0: YOLACT needs the side of its square input, such as 550")
        node = cfg.MODEL.YOLACT
        anchors = AnchorSpec(
            *map(tuple, (node.ANCHOR_SIZES, node.ANCHOR_SCALES, node.ANCHOR_RATIOS)), node.SQUARE_ANCHORS
        )
        backbone = YOLACTPyramid(
            build_backbone(cfg), cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS, len(node.ANCHOR_SIZES)
        )
        levels = backbone.output_shape()
        finest = next(iter(levels.values()))
        return {
            "backbone": backbone,
            "protonet": build_prototype_net(cfg, finest),
            "head": build_yolact_head(cfg, levels, anchors.num_anchors),
            "criterion": build_yolact_criterion(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "side": side,
            "anchors": anchors,
            "matcher": MatcherOptions(
                tuple(node.MATCHER.IOU_THRESHOLDS), node.MATCHER.CROWD_IOA, node.MATCHER.MIN_BOX_SIDE
            ),
            "detection": DetectionOptions(
                score_threshold=node.SCORE_THRESHOLD,
                mask_threshold=node.MASK_THRESHOLD,
                nms_type=node.NMS.TYPE,
                iou_threshold=node.NMS.IOU_THRESHOLD,
                top_k=node.NMS.TOP_K,
                second_threshold=node.NMS.SECOND_THRESHOLD,
                max_detections=node.MAX_DETECTIONS,
            ),
            "sem_seg_head": SemSegHead(finest.channels, node.NUM_CLASSES) if node.LOSS.SEM_SEG_WEIGHT > 0 else None,
            "mask_iou_head": MaskIoUHead(node.NUM_CLASSES) if node.MASK_IOU_ON else None,
            "freeze_norms": _images_per_pass(cfg) < node.FREEZE_NORM_BELOW,
            "output": OutputOptions.from_config(cfg),
        }

    @classmethod
    def training_warnings(cls, cfg: CfgNode) -> Iterator[str]:
        """Yield a warning where few images freeze the batch norms, and one where anchors are square."""
        node, num_images = cfg.MODEL.YOLACT, _images_per_pass(cfg)
        if num_images < node.FREEZE_NORM_BELOW:
            yield (
                f"Batch norms are frozen: {num_images} images per process and pass, fewer than "
                f"{config.NODE}.FREEZE_NORM_BELOW {node.FREEZE_NORM_BELOW}"
            )
        if node.SQUARE_ANCHORS:
            yield f"{config.NODE}.SQUARE_ANCHORS is True: only the published weights need it; else train with False"

    @classmethod
    def trained_keys(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return the number of classes; see the base class."""
        bias, boxes = (tensors.get(f"head.{name}.bias") for name in ("cls_score", "bbox_pred"))
        if any(values is None or values.dim() != 1 or len(values) < 4 for values in (bias, boxes)):
            return {}
        num_classes = len(bias) // (len(boxes) // 4) - 1
        return {cls.num_classes_key: num_classes} if num_classes > 0 else {}

    @property
    def mask_side(self) -> int:
        """Return the cells along a side of the prototypes."""
        return self.protonet.scale * self.grid_sizes[0]

    def train(self, mode: bool = True) -> "YOLACT":
        """Set the mode, and leave frozen batch norms in eval mode."""
        super().train(mode)
        if mode and self.freeze_norms:
            for norm in self._batch_norms():
                norm.eval()
        return self

    def _batch_norms(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm))

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Resize the images to the square in float32, without regard to their shape, and normalize them.

        The list keeps the sizes of the images before the resize.
        """
        squares, sizes = [], []
        for x in batched_inputs:
            image = x["image"].to(self.device, non_blocking=True).float()
            sizes.append(tuple(image.shape[-2:]))
            if sizes[-1] != (self.side, self.side):
                image = F.interpolate(image[None], (self.side, self.side), mode="bilinear", align_corners=False)[0]
            squares.append((image - self.pixel_mean) / self.pixel_std)
        return ImageList(torch.stack(squares), sizes)

    def network(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run backbone, prototype net and head.

        Args:
            images: (B, 3, side, side), normalized.

        Returns:
            ``class_logits`` (B, N, K + 1), background last; ``box_deltas`` (B, N, 4); ``coefficients`` (B, N, k) in
            [-1, 1]; ``prototypes`` (B, k, Hp, Wp), at least 0; in training also ``sem_seg_logits`` (B, K, H, W) of the
            finest level.
        """
        levels = self.backbone(images)
        finest = next(iter(levels.values()))
        outputs = {**self.head(levels), "prototypes": self.protonet(finest)}
        if self.training and self.sem_seg_head is not None:
            outputs["sem_seg_logits"] = self.sem_seg_head(finest)
        return outputs

    def prepare_targets(self, batched_inputs: list[dict], images: ImageList) -> list[AnchorTargets]:
        """Match the objects with the anchors, and resize the masks to the prototypes and the finest level.

        ``instances`` may have ``gt_boxes``, else the masks' own are taken. Boxes in ``crowd_boxes`` (n, 4), pixels of
        the image, make the anchors in them neutral.
        """
        return [
            anchor_targets(
                x["instances"],
                x.get("crowd_boxes"),
                self.anchors,
                side=self.side,
                mask_size=(self.mask_side, self.mask_side),
                sem_seg_size=None if self.sem_seg_head is None else (self.grid_sizes[0], self.grid_sizes[0]),
                num_classes=self.head.num_classes,
                options=self.matcher,
            )
            for x in batched_inputs
        ]

    def loss_counts(self, targets: list[AnchorTargets]) -> dict[str, torch.Tensor]:
        """Count positive anchors and images."""
        return count_targets(targets)

    def losses(
        self,
        outputs: dict[str, torch.Tensor],
        targets: list[AnchorTargets],
        counts: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the criterion's weighted losses."""
        self._check_anchors(outputs)
        losses = self.criterion(outputs, targets, self.anchors, counts, self.mask_iou_head)
        return with_every_parameter(losses, self)

    def postprocess(
        self, outputs: dict[str, torch.Tensor], batched_inputs: list[dict], images: ImageList
    ) -> list[dict]:
        """Turn the network's dict into Instances, image by image.

        With a mask-IoU head ``scores`` are the products with the predicted IoU, and ``pred_class_scores`` the
        probabilities of the classes, which the published code ranks boxes by.
        """
        self._check_anchors(outputs)

        def detect_image(index: int, _: tuple[int, int], output_size: tuple[int, int]) -> Detections:
            return detect(
                outputs,
                index,
                self.anchors,
                self.detection,
                side=self.side,
                output_size=output_size,
                mask_iou_head=self.mask_iou_head,
                score_threshold=self.output.score_threshold,
                mask_format=self.output.mask_format,
                max_mask_gib=self.output.max_mask_gib,
            )

        results = []
        # Areas and overlaps need more than the 11 bits of float16.
        with no_autocast(self.device):
            for index, (instances, found) in enumerate(self.detect_each(detect_image, batched_inputs, images)):
                if self.mask_iou_head is not None:
                    probs = outputs["class_logits"][index, found.prediction_idx].float().softmax(1)
                    instances.pred_class_scores = probs.gather(1, found.classes[:, None])[:, 0]
                results.append({"instances": instances})
        return results

    @property
    def postprocessing_options(self) -> dict[str, float | int | str]:
        """Return thresholds and limits; see the base class."""
        # "score_threshold" is that of candidates.
        return {**self.detection._asdict(), "final_score_threshold": self.output.score_threshold}

    def dense_detections(
        self, outputs: dict[str, torch.Tensor], padded_size: tuple[int, int], max_detections: int
    ) -> dict[str, torch.Tensor]:
        """Return a fixed number of detections; see the base class."""
        if self.detection.nms_type == "greedy":
            raise ValueError(f"{config.NODE}.NMS.TYPE is greedy; --end-to-end supports fast and cross_class only")
        self._check_anchors(outputs)
        return dense_detections(
            outputs,
            self.anchors,
            self.detection,
            padded_size=padded_size,
            max_detections=max_detections,
            mask_iou_head=self.mask_iou_head,
            score_threshold=self.output.score_threshold,
        )

    def example_outputs(
        self, outputs: dict[str, torch.Tensor], num_objects: int, median_area: float
    ) -> dict[str, torch.Tensor]:
        """Return outputs with drawn objects; see the base class."""
        return draw_outputs(outputs, self.anchors, num_objects, median_area)

    def _check_anchors(self, outputs: dict[str, torch.Tensor]) -> None:
        found, expected = outputs["class_logits"].shape[1], len(self.anchors)
        if found != expected:
            raise ValueError(
                f"The network returns {found} predictions for {expected} anchors: with {config.SQUARE_SIZE_KEY} "
                f"{self.side} the backbone's features have other sides than {self.grid_sizes}. Set a multiple of "
                f"{2 ** self.backbone.levels[-1]}"
            )


def _images_per_pass(cfg: CfgNode) -> int:
    return cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATE_STEPS // comm.get_world_size()
