"""The training losses of YOLACT and YOLACT++. Letters: sparseinst.structures; P positive anchors of the batch."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from fvcore.nn import smooth_l1_loss
from torch import nn
from torch.nn import functional as F

from sparseinst.config import registered
from sparseinst.modeling.auxiliary import divisor_sums
from sparseinst.modeling.yolact.anchors import BOX_TRANSFORM
from sparseinst.modeling.yolact.masks import crop_masks, mask_logits
from sparseinst.modeling.yolact.targets import AnchorTargets
from sparseinst.ops.losses import binary_mask_iou, sem_seg_loss
from sparseinst.ops.precision import no_autocast

YOLACT_CRITERION_REGISTRY = Registry("YOLACT_CRITERION")
YOLACT_CRITERION_REGISTRY.__doc__ = """
Criteria of YOLACT: modules called as ``criterion(outputs, targets, anchors, counts, mask_iou_head)`` with the network's
dict, the AnchorTargets of each image, the anchors (N, 4), the counts of the whole step or None, and the head of
YOLACT++ or None; return a dict of weighted scalar losses. Built as ``Name(cfg)``.
"""


@YOLACT_CRITERION_REGISTRY.register()
class YOLACTCriterion(nn.Module):
    """Compute the losses of boxes, classes, masks, semantic segmentation and mask IoU (YOLACT, section 3.1; ++, 6.3).

    Everything runs in float32 under autocast too. All losses are sums divided by the number of positive anchors, except
    ``loss_sem_seg``, which is divided by the number of images.

    Args:
        box_weight, cls_weight, mask_weight, sem_seg_weight, mask_iou_weight: weights of the losses.
        mask_iou_min_area: the IoU of objects with more cells than this is trained.
        neg_pos_ratio: background anchors for each positive one.
        max_train_masks: most masks of an image.
        global_normalization: divide by the counts of all ranks together.
    """

    @configurable
    def __init__(
        self,
        *,
        box_weight: float = 1.5,
        cls_weight: float = 1.0,
        mask_weight: float = 6.125,
        sem_seg_weight: float = 1.0,
        mask_iou_weight: float = 25.0,
        mask_iou_min_area: float = 25,
        neg_pos_ratio: float = 3,
        max_train_masks: int = 100,
        global_normalization: bool = False,
    ) -> None:
        super().__init__()
        self.box_weight, self.cls_weight, self.mask_weight = box_weight, cls_weight, mask_weight
        self.sem_seg_weight, self.mask_iou_weight = sem_seg_weight, mask_iou_weight
        self.mask_iou_min_area = mask_iou_min_area
        self.neg_pos_ratio = neg_pos_ratio
        self.max_train_masks = max_train_masks
        self.global_normalization = global_normalization

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        loss = cfg.MODEL.YOLACT.LOSS
        return {
            "box_weight": loss.BOX_WEIGHT,
            "cls_weight": loss.CLS_WEIGHT,
            "mask_weight": loss.MASK_WEIGHT,
            "sem_seg_weight": loss.SEM_SEG_WEIGHT,
            "mask_iou_weight": loss.MASK_IOU_WEIGHT,
            "mask_iou_min_area": loss.MASK_IOU_MIN_AREA,
            "neg_pos_ratio": loss.NEG_POS_RATIO,
            "max_train_masks": loss.MAX_TRAIN_MASKS,
            "global_normalization": loss.GLOBAL_NORMALIZATION,
        }

    def forward(
        self,
        outputs: dict[str, torch.Tensor],
        targets: Sequence[AnchorTargets],
        anchors: torch.Tensor,
        counts: dict[str, torch.Tensor] | None = None,
        mask_iou_head: nn.Module | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of one batch.

        Args:
            outputs: of the network.
            targets: of each image.
            anchors: (N, 4) x0, y0, x1, y1 in fractions of the image.
            counts: ``num_positive`` and ``num_images`` of the whole step in this process; None: those of this batch.
            mask_iou_head: from soft masks (n, Hp, Wp) to IoUs (n, K).

        Returns:
            ``loss_box``, ``loss_cls``, ``loss_mask``; ``loss_sem_seg`` and ``loss_mask_iou`` where their heads exist.
            Without any positive anchor the sums are divided by 1.
        """
        device = anchors.device
        with no_autocast(device):
            counts = count_targets(targets) if counts is None else counts
            (num_positive, num_images), num_ranks = divisor_sums(
                counts, ("num_positive", "num_images"), device, self.global_normalization
            )
            num_positive, num_images = max(1.0, num_positive) / num_ranks, num_images / num_ranks
            labels = torch.stack([target.labels for target in targets])
            class_logits = outputs["class_logits"].float()
            is_positive = torch.stack([target.is_positive for target in targets])

            image, anchor = is_positive.nonzero(as_tuple=True)
            boxes = [target.gt_boxes[target.gt_idx[kept]] for target, kept in zip(targets, is_positive)]
            expected = BOX_TRANSFORM.get_deltas(anchors[anchor], torch.cat(boxes))
            box_loss = smooth_l1_loss(outputs["box_deltas"].float()[image, anchor], expected, beta=1.0, reduction="sum")

            losses = {
                "loss_box": self.box_weight * box_loss / num_positive,
                "loss_cls": self.cls_weight * self._class_loss(class_logits, labels, is_positive) / num_positive,
            }
            mask_loss, iou_loss = self._mask_losses(outputs, targets, is_positive, mask_iou_head)
            losses["loss_mask"] = self.mask_weight * mask_loss / num_positive
            if mask_iou_head is not None:
                losses["loss_mask_iou"] = self.mask_iou_weight * iou_loss / num_positive
            if "sem_seg_logits" in outputs:
                expected = torch.stack([target.sem_seg for target in targets])
                loss = sem_seg_loss(outputs["sem_seg_logits"].float(), expected)
                losses["loss_sem_seg"] = self.sem_seg_weight * loss / num_images
        return losses

    def _class_loss(self, class_logits: torch.Tensor, labels: torch.Tensor, is_positive: torch.Tensor) -> torch.Tensor:
        """Sum the cross-entropy of positive anchors and of the background anchors with the largest loss."""
        num_classes = class_logits.shape[2] - 1
        is_used = is_positive.clone()
        # Published: shifted by the maximum of the whole batch, so that rows far below it were never chosen.
        background_loss = (class_logits.logsumexp(2) - class_logits[:, :, -1]).detach()
        background_loss = background_loss.masked_fill(labels != num_classes, -torch.inf)
        for used, loss, label in zip(is_used, background_loss, labels):
            # An image without objects has no positive anchor: it gets as many negatives as for one.
            wanted = int(self.neg_pos_ratio * max(1, int(used.sum())))
            used[loss.topk(min(wanted, int((label == num_classes).sum()))).indices] = True
        return F.cross_entropy(class_logits[is_used], labels[is_used], reduction="sum")

    def _mask_losses(
        self,
        outputs: dict[str, torch.Tensor],
        targets: Sequence[AnchorTargets],
        is_positive: torch.Tensor,
        mask_iou_head: nn.Module | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the losses of masks and of their predicted IoUs over the positive anchors."""
        mask_loss, iou_loss = outputs["prototypes"].new_zeros(2, dtype=torch.float32)
        for image, (target, positive) in enumerate(zip(targets, is_positive)):
            positive = positive.nonzero().squeeze(1)
            num_positive = len(positive)
            if num_positive == 0:
                continue
            if num_positive > self.max_train_masks:
                positive = positive[torch.randperm(num_positive, device=positive.device)[: self.max_train_masks]]
            gt_idx = target.gt_idx[positive]
            boxes, gt_masks = target.gt_boxes[gt_idx], target.gt_masks[gt_idx]
            logits = mask_logits(outputs["prototypes"][image].float(), outputs["coefficients"][image, positive].float())
            crops = crop_masks(boxes, logits.shape[1:])
            # With logits, where the published code has probabilities: a wholly wrong pixel has a gradient. Masks
            # outside of the crop do not count, where the published code adds 100 for each pixel.
            losses = F.binary_cross_entropy_with_logits(logits, gt_masks.float(), reduction="none")
            sides = (boxes[:, 2:] - boxes[:, :2]) * losses.new_tensor(logits.shape[:0:-1])
            losses = (losses * crops).sum((1, 2)) / sides.prod(1)
            mask_loss = mask_loss + losses.sum() * (num_positive / len(positive))
            if mask_iou_head is not None:
                soft_masks = logits.sigmoid() * crops
                is_large = gt_masks.sum((1, 2)) > self.mask_iou_min_area
                iou_loss = iou_loss + mask_iou_loss(
                    mask_iou_head, soft_masks[is_large], gt_masks[is_large], target.labels[positive][is_large]
                )
        return mask_loss, iou_loss


def mask_iou_loss(
    mask_iou_head: nn.Module, mask_probs: torch.Tensor, gt_masks: torch.Tensor, gt_classes: torch.Tensor
) -> torch.Tensor:
    """Sum the smooth L1 loss of the predicted IoUs. Its gradient reaches the masks too, as published.

    Args:
        mask_iou_head: from soft masks (n, Hp, Wp) to IoUs (n, K).
        mask_probs: (n, Hp, Wp), cropped.
        gt_masks: (n, Hp, Wp) bool, not cropped.
        gt_classes: (n,).
    """
    if len(mask_probs) == 0:
        return mask_probs.sum()
    predicted = mask_iou_head(mask_probs).gather(1, gt_classes[:, None])[:, 0]
    # The published threshold excludes 0.5 itself.
    expected = binary_mask_iou((mask_probs > 0.5).float(), gt_masks.float(), prob_threshold=0.5)
    return smooth_l1_loss(predicted, expected, beta=1.0, reduction="sum")


def count_targets(targets: Sequence[AnchorTargets]) -> dict[str, torch.Tensor]:
    """Return ``num_positive``, the positive anchors of a batch, and ``num_images``."""
    num_positive = sum(target.is_positive.sum() for target in targets)
    return {"num_positive": num_positive, "num_images": torch.tensor(len(targets))}


def build_yolact_criterion(cfg: CfgNode) -> nn.Module:
    """Build the criterion named by MODEL.YOLACT.LOSS.NAME."""
    return registered(YOLACT_CRITERION_REGISTRY, cfg, "MODEL.YOLACT.LOSS.NAME")(cfg)
