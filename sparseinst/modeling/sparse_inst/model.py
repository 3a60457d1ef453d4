"""The meta-architecture SparseInst. Letters: sparseinst.structures."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.structures import ImageList, Instances
from torch import nn
from torch.nn import functional as F

from sparseinst.config import check_values, registered
from sparseinst.modeling.auxiliary import SemSegHead, build_backbone
from sparseinst.modeling.meta_arch import InstanceSegmenter, OutputOptions, check_not_traced
from sparseinst.modeling.sparse_inst import config, placed_criterion, placed_decoder  # noqa: F401 (registers them)
from sparseinst.modeling.sparse_inst.criterion import build_sparse_inst_criterion
from sparseinst.modeling.sparse_inst.decoder import SPARSE_INST_DECODER_REGISTRY, build_sparse_inst_decoder
from sparseinst.modeling.sparse_inst.encoder import build_sparse_inst_encoder
from sparseinst.modeling.sparse_inst.example_outputs import draw_outputs
from sparseinst.modeling.sparse_inst.placed_levels import why_one_level
from sparseinst.modeling.sparse_inst.postprocessing import dense_detections, detect
from sparseinst.modeling.sparse_inst.target_check import target_check
from sparseinst.ops.losses import masks_on_grid
from sparseinst.structures.detections import Detections
from sparseinst.structures.gt_masks import padded_masks
from sparseinst.structures.mask_window import MaskWindow
from sparseinst.structures.targets import InstanceTargets

# Published checkpoints were trained on input padded to a multiple of this, with every backbone.
SIZE_DIVISIBILITY = 32


@META_ARCH_REGISTRY.register()
class SparseInst(InstanceSegmenter):
    """Real-time instance segmentation by sparse instance activation (CVPR 2022, arXiv 2203.12827).

    Args:
        backbone: computes the encoder's features.
        encoder: fuses them into one map.
        decoder: predicts the instances.
        criterion: computes the losses.
        pixel_mean: per channel, subtracted from the image, in [0, 255].
        pixel_std: per channel, divides the image.
        cls_threshold: predictions with a score above this are kept, before rescoring.
        mask_threshold: a pixel belongs to a mask where its probability is above this.
        max_detections: most instances for each image.
        mask_nms_threshold: IoU above which the worse of two masks of a class is dropped; 0: off.
        antialiased_targets: see :meth:`prepare_targets`.
        detail_feature: name of the backbone feature that the decoder takes besides the encoder's map; "": none.
        sem_seg_head: semantic segmentation of the encoder's map, in training only.
        sem_seg_weight: weight of its loss.
        output: how predictions are returned.
    """

    num_classes_key: ClassVar[str] = config.NUM_CLASSES_KEY
    max_instances_key: ClassVar[str] = config.MAX_INSTANCES_KEY
    max_detections_key: ClassVar[str] = config.MAX_DETECTIONS_KEY
    mask_nms_key: ClassVar[str] = config.MASK_NMS_KEY
    activation_maps_key: ClassVar[str] = config.ACTIVATION_MAPS_KEY
    lossless_targets_key: ClassVar[str] = config.LOSSLESS_TARGETS_KEY
    float_layers: ClassVar[tuple[str, ...]] = ("iam_conv", "heatmap", "saliency", "displacement")

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        encoder: nn.Module,
        decoder: nn.Module,
        criterion: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        cls_threshold: float = 0.005,
        mask_threshold: float = 0.45,
        max_detections: int = 100,
        mask_nms_threshold: float = 0.0,
        antialiased_targets: bool = False,
        detail_feature: str = "",
        sem_seg_head: SemSegHead | None = None,
        sem_seg_weight: float = 0.0,
        output: OutputOptions | None = None,
    ) -> None:
        super().__init__(pixel_mean=pixel_mean, pixel_std=pixel_std, size_divisibility=SIZE_DIVISIBILITY, output=output)
        self.backbone = backbone
        self.encoder = encoder
        self.decoder = decoder
        self.ranks_instances = getattr(decoder, "ranks_instances", False)
        self.criterion = criterion
        self.cls_threshold = cls_threshold
        self.mask_threshold = mask_threshold
        self.max_detections = max_detections
        self.mask_nms_threshold = mask_nms_threshold
        self.antialiased_targets = antialiased_targets
        self.detail_feature = detail_feature
        self.sem_seg_head = sem_seg_head
        self.sem_seg_weight = sem_seg_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        if not cfg.MODEL.MASK_ON:
            raise ValueError("MODEL.MASK_ON is False: SparseInst predicts masks and nothing else; set it to True")
        check_values(cfg)
        backbone = build_backbone(cfg)
        encoder = build_sparse_inst_encoder(cfg, backbone.output_shape())
        sparse_inst = cfg.MODEL.SPARSE_INST
        sem_seg_weight = sparse_inst.LOSS.SEM_SEG_WEIGHT
        sem_seg_head = None
        if sem_seg_weight > 0:
            sem_seg_head = SemSegHead(encoder.output_shape().channels, sparse_inst.DECODER.NUM_CLASSES)
        return {
            "backbone": backbone,
            "encoder": encoder,
            "decoder": build_sparse_inst_decoder(cfg, encoder.output_shape(), backbone.output_shape()),
            "detail_feature": sparse_inst.DECODER.MASK.DETAIL_FEATURE,
            "criterion": build_sparse_inst_criterion(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "cls_threshold": sparse_inst.CLS_THRESHOLD,
            "mask_threshold": sparse_inst.MASK_THRESHOLD,
            "max_detections": sparse_inst.MAX_DETECTIONS,
            "mask_nms_threshold": sparse_inst.MASK_NMS_THRESHOLD,
            "antialiased_targets": sparse_inst.ANTIALIASED_TARGETS,
            "sem_seg_head": sem_seg_head,
            "sem_seg_weight": sem_seg_weight,
            "output": OutputOptions.from_config(cfg, with_maps=sparse_inst.DECODER.OUTPUT_IAM),
        }

    @classmethod
    def trained_keys(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return the numbers of classes, masks and levels; see the base class."""
        branch = "decoder.inst_branch."
        heatmap = tensors.get(f"{branch}heatmap.weight")
        if heatmap is not None and heatmap.dim() == 4 and len(heatmap):
            # The number of peaks is free.
            keys = {cls.num_classes_key: len(heatmap)}
            levels = tensors.get(f"{branch}levels")
            if levels is not None and levels.dim() == 1 and len(levels):
                keys[config.NUM_LEVELS_KEY] = len(levels)
            return keys
        names = [f"{branch}{name}.weight" for name in ("cls_score", "iam_conv")]
        if any(name not in tensors for name in names):
            return {}
        class_weight, iam_weight = (tensors[name] for name in names)
        if class_weight.dim() != 2 or iam_weight.dim() != 4 or 0 in (*class_weight.shape, *iam_weight.shape):
            return {}
        # The class layer reads G * dim channels, and a group of iam_conv dim / G: the quotient is G ** 2.
        num_groups = math.isqrt(class_weight.shape[1] // iam_weight.shape[1]) or 1
        return {cls.num_classes_key: len(class_weight), cls.max_instances_key: len(iam_weight) // num_groups}

    @classmethod
    def keys_for_sides(cls, cfg: CfgNode, sides: Sequence[float]) -> dict[str, tuple[int, str]]:
        """Return the levels of a `PlacedIAMDecoder`, and for objects of about one size that no image is cropped.

        See the base class. Crops vary the objects' sizes and cost AP there: docs/own_data_experiments.md, "Crops".
        """
        decoder = registered(SPARSE_INST_DECODER_REGISTRY, cfg, "MODEL.SPARSE_INST.DECODER.NAME")
        if not (isinstance(decoder, type) and issubclass(decoder, placed_decoder.PlacedIAMDecoder)):
            return {}
        reason = why_one_level(sides)
        if not reason:
            return {config.NUM_LEVELS_KEY: (cfg.MODEL.SPARSE_INST.DECODER.NUM_LEVELS, "")}
        return {config.NUM_LEVELS_KEY: (1, reason), "INPUT.CROP.ENABLED": (False, reason)}

    @classmethod
    def target_check(cls, cfg: CfgNode) -> Callable[[MaskWindow], bool] | None:
        """Return a function that tells whether the mask grid keeps an object; see the base class."""
        return target_check(cfg)

    def network(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run backbone, encoder and decoder.

        Args:
            images: (B, 3, h, w), normalized and padded.

        Returns:
            The published dict: ``pred_logits`` (B, N, K) class logits, ``pred_masks`` (B, N, Hm, Wm) mask logits,
            ``pred_scores`` (B, N, 1) objectness logits. With ``output.with_maps`` also ``pred_iam``
            (B, G * N, Hm, Wm), raw logits of the activation maps, group-major. In training a decoder with a method
            ``training_outputs(outputs, targets)`` may return what that method turns into this dict. In training also
            ``sem_seg_logits`` (B, K, H, W) where the model has such a head.
        """
        backbone_features = self.backbone(images)
        features = self.encoder(backbone_features)
        # More arguments only where they are needed, because a user's decoder may not take them.
        arguments = {"with_iams": True} if self.with_maps else {}
        if self.detail_feature:
            arguments["detail"] = backbone_features[self.detail_feature]
        outputs = self.decoder(features, **arguments)
        if self.training and self.sem_seg_head is not None:
            outputs["sem_seg_logits"] = self.sem_seg_head(features)
        return outputs

    def prepare_targets(self, batched_inputs: list[dict], images: ImageList) -> list[InstanceTargets]:
        """Pad the ground truth as the images are padded, then reduce it to the mask grid.

        As published the reduction is bilinear, which reads the two pixels on either side of a cell's center. With
        ``antialiased_targets`` it is the share of each cell that the instance covers. A decoder with
        ``training_outputs`` gets no instance that vanishes on the grid.
        """
        padded_size = tuple(images.tensor.shape[-2:])
        mask_size = self._mask_size(padded_size)
        targets = []
        for x in batched_inputs:
            instances = x["instances"]
            masks = self._reduce_masks(instances, padded_size, mask_size)
            # Non-blocking copies let the device run ahead.
            classes = instances.gt_classes.to(self.device, non_blocking=True)
            if hasattr(self.decoder, "training_outputs"):
                # An object without a cell has no center.
                is_seen = masks.flatten(1).any(1)
                classes, masks = classes[is_seen], masks[is_seen]
            targets.append(InstanceTargets(classes, masks))
        return targets

    def loss_counts(self, targets: list[InstanceTargets]) -> dict[str, torch.Tensor]:
        """Count ground-truth instances and matched pairs, at most N for each image; for the semantic loss images."""
        counts = torch.tensor([len(target.gt_classes) for target in targets])
        # A user's decoder need not tell its number of masks.
        most = getattr(self.decoder, "num_masks", torch.iinfo(counts.dtype).max)
        num_images = {} if self.sem_seg_head is None else {"num_images": torch.tensor(len(targets))}
        return {"num_instances": counts.sum(), "num_matched": counts.clamp(max=most).sum(), **num_images}

    def losses(
        self,
        outputs: dict[str, torch.Tensor],
        targets: list[InstanceTargets],
        counts: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the criterion's weighted losses, and that of semantic segmentation.

        Where the decoder has ``training_outputs``, the criterion gets what that method returns.
        """
        sem_seg_logits = outputs.get("sem_seg_logits")
        if hasattr(self.decoder, "training_outputs"):
            outputs = self.decoder.training_outputs(outputs, targets)
        # A user's criterion need not take counts as long as each step has one part.
        losses = self.criterion(outputs, targets, *([] if counts is None else [counts]))
        if self.sem_seg_head is not None:
            masks_and_classes = [(target.gt_masks, target.gt_classes) for target in targets]
            loss = self.sem_seg_head.loss(sem_seg_logits, masks_and_classes, counts)
            losses["loss_sem_seg"] = self.sem_seg_weight * loss
        return losses

    def postprocess(
        self, outputs: dict[str, torch.Tensor], batched_inputs: list[dict], images: ImageList
    ) -> list[dict]:
        """Turn the network's dict into Instances, image by image.

        Where the dict has ``pred_iam``, the instances have ``pred_iams`` (n, G, ., .): raw logits over the image.
        """
        check_not_traced()
        padded_size = tuple(images.tensor.shape[-2:])

        def detect_image(index: int, image_size: tuple[int, int], output_size: tuple[int, int]) -> Detections:
            return detect(
                outputs["pred_logits"][index],
                outputs["pred_scores"][index, :, 0],
                outputs["pred_masks"][index],
                padded_size=padded_size,
                image_size=image_size,
                output_size=output_size,
                cls_threshold=self.cls_threshold,
                mask_threshold=self.mask_threshold,
                max_detections=self.max_detections,
                mask_nms_threshold=self.mask_nms_threshold,
                score_threshold=self.output.score_threshold,
                mask_format=self.output.mask_format,
                max_mask_gib=self.output.max_mask_gib,
            )

        results = []
        detected = self.detect_each(detect_image, batched_inputs, images)
        for index, (instances, detections) in enumerate(detected):
            if "pred_iam" in outputs:
                num_masks = outputs["pred_logits"].shape[1]
                iams = outputs["pred_iam"][index].unflatten(0, (-1, num_masks))[:, detections.prediction_idx]
                rows, columns = (
                    math.ceil(cells * size / padded)
                    for cells, size, padded in zip(iams.shape[-2:], images.image_sizes[index], padded_size)
                )
                instances.pred_iams = iams.transpose(0, 1)[..., :rows, :columns]
            results.append({"instances": instances})
        return results

    @property
    def postprocessing_options(self) -> dict[str, float | int | str]:
        """Return thresholds and limits; see the base class."""
        names = ("cls_threshold", "mask_threshold", "max_detections", "mask_nms_threshold")
        return {**{name: getattr(self, name) for name in names}, "score_threshold": self.output.score_threshold}

    def dense_detections(
        self, outputs: dict[str, torch.Tensor], padded_size: tuple[int, int], max_detections: int
    ) -> dict[str, torch.Tensor]:
        """Return a fixed number of detections; see the base class."""
        return dense_detections(
            outputs["pred_logits"],
            outputs["pred_scores"][..., 0],
            outputs["pred_masks"],
            padded_size=padded_size,
            cls_threshold=self.cls_threshold,
            mask_threshold=self.mask_threshold,
            max_detections=self.max_detections,
            num_rows=max_detections,
            mask_nms_threshold=self.mask_nms_threshold,
            score_threshold=self.output.score_threshold,
        )

    def example_outputs(
        self, outputs: dict[str, torch.Tensor], num_objects: int, median_area: float
    ) -> dict[str, torch.Tensor]:
        """Return outputs with drawn objects; see the base class."""
        return draw_outputs(outputs, num_objects, median_area)

    def _mask_size(self, padded_size: tuple[int, int]) -> tuple[int, int]:
        stride, scale_factor = self.encoder.output_shape().stride, getattr(self.decoder, "scale_factor", None)
        if stride is None or scale_factor is None:
            raise ValueError(
                f"The mask grid is unknown: the encoder's stride is {stride} and the decoder's scale_factor is "
                f"{scale_factor}. {type(self.encoder).__name__}.output_shape() must give a stride, and "
                f"{type(self.decoder).__name__} must have a scale_factor"
            )
        return tuple(math.floor(-(-side // stride) * scale_factor) for side in padded_size)

    def _reduce_masks(
        self, instances: Instances, padded_size: tuple[int, int], mask_size: tuple[int, int]
    ) -> torch.Tensor:
        """Reduce whole masks of any type to (M, *mask_size)."""
        reduced = [torch.zeros((0, *mask_size), device=self.device)]
        for masks in padded_masks(instances, padded_size, self.device):
            masks = masks.float()
            if self.antialiased_targets:
                reduced.append(masks_on_grid(masks, mask_size))
            else:
                masks = F.interpolate(masks[:, None], size=mask_size, mode="bilinear", align_corners=False)
                reduced.append(masks[:, 0])
        return torch.cat(reduced)
