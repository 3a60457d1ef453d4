"""The meta-architecture: Detectron2's structures in, Detectron2's structures out. Letters: see structures.py."""

import math
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks, polygons_to_bitmask
from torch import nn
from torch.nn import functional as F

from sparseinst.config import registered
from sparseinst.data.grid_masks import GRID_STRIDES, GridMasks, MaskGrid
from sparseinst.data.rle_masks import RLEMasks
from sparseinst.modeling.criterion import build_sparse_inst_criterion
from sparseinst.modeling.decoder import build_sparse_inst_decoder
from sparseinst.modeling.encoder import build_sparse_inst_encoder
from sparseinst.modeling.losses import masks_on_grid
from sparseinst.modeling.postprocessing import MASK_FORMATS, MaskMemoryError, detect
from sparseinst.modeling.sparse_inst_config import (
    MAX_DETECTIONS_KEY,
    MAX_INSTANCES_KEY,
    NUM_CLASSES_KEY,
    check_sparse_inst_keys,
)
from sparseinst.modeling.structures import InstanceTargets, LossNormalizer

# The input is padded to a multiple of this, whatever the backbone: the published checkpoints were trained so.
SIZE_DIVISIBILITY = 32
# Whole masks are reduced in parts of about so many pixels, of which each takes four bytes.
PIXELS_AT_ONCE = 2**21


@META_ARCH_REGISTRY.register()
class SparseInst(nn.Module):
    """Real-time instance segmentation by sparse instance activation (CVPR 2022, arXiv 2203.12827).

    Args:
        backbone: gives the encoder's features.
        encoder: fuses them into one map.
        decoder: predicts the instances.
        criterion: computes the losses.
        pixel_mean: per channel, subtracted from the image, in [0, 255].
        pixel_std: per channel, the image is divided by it.
        cls_threshold: predictions with a score above this are kept; before rescoring.
        mask_threshold: a pixel belongs to a mask where its probability is above this.
        max_detections: most instances per image.
        mask_nms_threshold: IoU above which the worse of two masks of a class is dropped; 0: off.
        output_mask_format: "bitmask": boolean masks; "rle": RLEMasks, each made, encoded and freed on its own.
        max_mask_gib: most memory that the boolean masks of one image may take, in GiB.
        antialiased_targets: see :meth:`prepare_targets`.

    Raises:
        ValueError: another mask format.
    """

    num_classes_key = NUM_CLASSES_KEY
    max_instances_key = MAX_INSTANCES_KEY
    max_detections_key = MAX_DETECTIONS_KEY

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
        output_mask_format: str = "bitmask",
        max_mask_gib: float = 4.0,
        antialiased_targets: bool = False,
    ) -> None:
        super().__init__()
        if output_mask_format not in MASK_FORMATS:
            raise ValueError(
                f"MODEL.OUTPUT.MASK_FORMAT is {output_mask_format!r}; it must be one of {', '.join(MASK_FORMATS)}"
            )
        self.backbone = backbone
        self.encoder = encoder
        self.decoder = decoder
        self.criterion = criterion
        # Not persistent: the published checkpoints do not hold them.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.cls_threshold = cls_threshold
        self.mask_threshold = mask_threshold
        self.max_detections = max_detections
        self.mask_nms_threshold = mask_nms_threshold
        self.output_mask_format = output_mask_format
        self.max_mask_gib = max_mask_gib
        self.antialiased_targets = antialiased_targets
        # What runs in place of plain_network where something is learned; see sparseinst.modeling.training_network.
        self.training_network: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        if not cfg.MODEL.MASK_ON:
            raise ValueError("MODEL.MASK_ON is False: SparseInst predicts masks and nothing else; set it to True")
        check_sparse_inst_keys(cfg)
        registered(BACKBONE_REGISTRY, cfg, "MODEL.BACKBONE.NAME")
        backbone = _build_backbone(cfg)
        encoder = build_sparse_inst_encoder(cfg, backbone.output_shape())
        sparse_inst = cfg.MODEL.SPARSE_INST
        return {
            "backbone": backbone,
            "encoder": encoder,
            "decoder": build_sparse_inst_decoder(cfg, encoder.output_shape()),
            "criterion": build_sparse_inst_criterion(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "cls_threshold": sparse_inst.CLS_THRESHOLD,
            "mask_threshold": sparse_inst.MASK_THRESHOLD,
            "max_detections": sparse_inst.MAX_DETECTIONS,
            "mask_nms_threshold": sparse_inst.MASK_NMS_THRESHOLD,
            "output_mask_format": cfg.MODEL.OUTPUT.MASK_FORMAT,
            "max_mask_gib": cfg.MODEL.OUTPUT.MAX_MASK_GIB,
            "antialiased_targets": sparse_inst.ANTIALIASED_TARGETS,
        }

    @property
    def device(self) -> torch.device:
        """Where the model's tensors are, and images are moved to."""
        return self.pixel_mean.device

    @property
    def mask_grid(self) -> MaskGrid | None:
        """What a mapper can reduce the ground truth to; None: it has to give whole masks."""
        stride, scale_factor = self.encoder.output_shape().stride, getattr(self.decoder, "scale_factor", None)
        if stride is None or scale_factor is None or stride / scale_factor not in GRID_STRIDES:
            return None
        return MaskGrid(int(stride / scale_factor), self.antialiased_targets)

    def forward(
        self, batched_inputs: list[dict], normalizer: LossNormalizer | None = None
    ) -> dict[str, torch.Tensor] | list[dict]:
        """Losses in training mode, predictions otherwise.

        Args:
            batched_inputs: one dict per image, as Detectron2's DatasetMapper makes them. ``image``: (3, h, w) in
                [0, 255], channels as INPUT.FORMAT has them. ``height``, ``width``: output size, the image's own where
                absent. In training, ``instances`` with ``gt_classes`` (M,) and ``gt_masks``: GridMasks, PolygonMasks,
                BitMasks or a tensor (M, h, w); it may be absent where M is 0.
            normalizer: in training, what the losses are divided by where the batch is a part of a larger one.

        Returns:
            In training a dict of weighted losses. Otherwise one dict per image, ``instances``: Instances of the output
            size with ``pred_boxes`` (tight boxes of the masks), ``pred_masks`` (n, height, width) bool, ``scores`` and
            ``pred_classes``, sorted by score; where the decoder gives the activation maps also ``pred_iams``
            (n, G, ., .), their raw logits over the image. ``pred_masks`` are RLEMasks where ``output_mask_format`` says
            "rle".

        Raises:
            MaskMemoryError: the boolean masks of an image would take more than ``max_mask_gib``.
        """
        images = self.preprocess_image(batched_inputs)
        outputs = self.network(images.tensor)
        if self.training:
            targets = self.prepare_targets(batched_inputs, images, outputs["pred_masks"].shape[-2:])
            return self.criterion(outputs, targets, *([] if normalizer is None else [normalizer]))
        return self.postprocess(outputs, batched_inputs, images)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the images, then pad them with zeros, right and bottom, to one size."""
        images = [
            (x["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        # Of Detectron2's Swin alone, without an FPN around it, the property raises an AttributeError.
        divisibility = math.lcm(SIZE_DIVISIBILITY, getattr(self.backbone, "size_divisibility", 0) or 1)
        constraints = {**self.backbone.padding_constraints, "size_divisibility": divisibility}
        return ImageList.from_tensors(images, padding_constraints=constraints)

    def network(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Normalised, padded images (B, 3, ., .) to the decoder's dict."""
        if self.training and torch.is_grad_enabled() and self.training_network is not None:
            return self.training_network(images)
        return self.plain_network(images)

    def plain_network(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """As :meth:`network`, whatever a training has chosen."""
        return self.decoder(self.encoder(self.backbone(images)))

    def prepare_targets(
        self, batched_inputs: list[dict], images: ImageList, mask_size: Sequence[int]
    ) -> list[InstanceTargets]:
        """Ground truth on the mask grid: padded as the images are, then reduced.

        As published bilinearly, which looks at the two pixels on either side of a cell's centre; antialiased: to the
        share of each cell that the instance covers.
        """
        padded_size, mask_size = tuple(images.tensor.shape[-2:]), tuple(mask_size)
        targets = []
        for x in batched_inputs:
            instances = x["instances"]
            masks = instances.gt_masks if instances.has("gt_masks") else None
            if (
                isinstance(masks, GridMasks)
                and masks.grid.antialiased == self.antialiased_targets
                and padded_size == tuple(masks.grid.stride * side for side in mask_size)
            ):
                masks = masks.to(self.device, non_blocking=True).on_grid(mask_size)
            else:
                masks = self._reduce_masks(instances, padded_size, mask_size)
            # Nothing here waits for the device, which is busy with the network.
            targets.append(InstanceTargets(instances.gt_classes.to(self.device, non_blocking=True), masks))
        return targets

    def _reduce_masks(
        self, instances: Instances, padded_size: tuple[int, int], mask_size: tuple[int, int]
    ) -> torch.Tensor:
        """Whole masks of any type to (M, *mask_size), a few at a time."""
        height, width = instances.image_size
        reduced = torch.empty((len(instances), *mask_size), device=self.device)
        at_once = max(1, PIXELS_AT_ONCE // math.prod(padded_size))
        for start in range(0, len(instances), at_once):
            part = slice(start, start + at_once)
            masks = gt_masks_tensor(instances[part]).to(self.device, non_blocking=True)
            padded = torch.zeros((len(masks), *padded_size), device=self.device)
            padded[:, :height, :width] = masks
            if self.antialiased_targets:
                reduced[part] = masks_on_grid(padded, mask_size)
            else:
                padded = padded[:, None]
                reduced[part] = F.interpolate(padded, size=mask_size, mode="bilinear", align_corners=False)[:, 0]
        return reduced

    def postprocess(
        self, outputs: dict[str, torch.Tensor], batched_inputs: list[dict], images: ImageList
    ) -> list[dict]:
        """The decoder's dict to Instances, image by image."""
        padded_size = tuple(images.tensor.shape[-2:])
        results = []
        for index, (x, image_size) in enumerate(zip(batched_inputs, images.image_sizes)):
            output_size = (x.get("height", image_size[0]), x.get("width", image_size[1]))
            try:
                detections = detect(
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
                    mask_format=self.output_mask_format,
                    max_mask_bytes=self.max_mask_gib * 2**30,
                )
            except MaskMemoryError as error:
                if "file_name" not in x:
                    raise
                raise MaskMemoryError(f"{x['file_name']}: {error}") from error
            masks = detections.masks
            instances = Instances(
                output_size,
                pred_boxes=Boxes(detections.boxes),
                pred_masks=masks if isinstance(masks, torch.Tensor) else RLEMasks(masks, output_size),
                scores=detections.scores,
                pred_classes=detections.classes,
            )
            if "pred_iam" in outputs:
                num_masks = outputs["pred_logits"].shape[1]
                iams = outputs["pred_iam"][index].unflatten(0, (-1, num_masks))[:, detections.prediction_idx]
                rows, columns = (
                    math.ceil(cells * size / padded)
                    for cells, size, padded in zip(iams.shape[-2:], image_size, padded_size)
                )
                instances.pred_iams = iams.transpose(0, 1)[..., :rows, :columns]
            results.append({"instances": instances})
        return results


def _build_backbone(cfg: CfgNode) -> Backbone:
    """Detectron2's build_backbone; where its compiled operators are missing, the error says what does without."""
    try:
        return build_backbone(cfg)
    except ImportError as error:
        if "detectron2._C" not in str(error):
            raise
        raise ImportError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE}, for which "
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} needs Detectron2's compiled operators, and this Detectron2 "
            "has none that work. Set MODEL.BACKBONE.NAME to build_resnet_dcn_backbone: the same ResNet, and the same "
            "weights, with torchvision's operator"
        ) from error


def gt_masks_tensor(instances: Instances) -> torch.Tensor:
    """Ground-truth masks (M, h, w) of one image, from any type that a mapper may have made.

    Args:
        instances: with ``gt_masks``: GridMasks, PolygonMasks, BitMasks or a tensor; it may be absent where M is 0.

    Raises:
        ValueError: there are instances but no masks, or masks of another type or another size.
    """
    height, width = instances.image_size
    device = instances.gt_classes.device
    if not instances.has("gt_masks"):
        if len(instances):
            raise ValueError(
                f"{len(instances)} instances have no gt_masks: SparseInst is trained with masks. Give the annotations "
                "a segmentation, and leave MODEL.MASK_ON True, for which the mapper keeps it"
            )
        return torch.zeros((0, height, width), dtype=torch.bool, device=device)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        bitmasks = [torch.from_numpy(polygons_to_bitmask(polygons, height, width)) for polygons in masks.polygons]
        masks = torch.stack(bitmasks) if bitmasks else torch.zeros((0, height, width), dtype=torch.bool)
    elif isinstance(masks, GridMasks):
        masks = masks.whole()
    elif isinstance(masks, BitMasks):
        masks = masks.tensor
    elif not isinstance(masks, torch.Tensor):
        raise ValueError(
            f"gt_masks is a {type(masks).__name__}; GridMasks, PolygonMasks, BitMasks or a tensor is expected"
        )
    if masks.shape[-2:] != (height, width):
        raise ValueError(f"gt_masks are {tuple(masks.shape[-2:])} in an image of {(height, width)} (height, width)")
    return masks.to(device)
