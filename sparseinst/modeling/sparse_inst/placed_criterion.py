"""The training losses of a PlacedIAMDecoder (not in the paper). Letters: sparseinst.structures."""

import torch
from detectron2.config import CfgNode, configurable

from sparseinst.config import registered
from sparseinst.modeling.sparse_inst.criterion import SPARSE_INST_CRITERION_REGISTRY, SparseInstCriterion
from sparseinst.modeling.sparse_inst.decoder import SPARSE_INST_DECODER_REGISTRY
from sparseinst.modeling.sparse_inst.placed_decoder import NUM_CELLS
from sparseinst.ops.losses import box_loss, center_focal_loss
from sparseinst.ops.precision import no_autocast
from sparseinst.structures.targets import InstanceTargets


@SPARSE_INST_CRITERION_REGISTRY.register()
class PlacedCriterion(SparseInstCriterion):
    """Compute five weighted losses of predictions at the centers of the ground truth; nothing is matched.

    ``loss_heatmap`` (CenterNet's focal loss, for the classes), ``loss_box``, and the mask losses of the base class on
    the crops around the instances. They are divided as the base class divides ``loss_ce``, and its losses of pairs. For
    the objectness a pixel belongs to an instance above half of the instance's maximum.

    Args:
        box_weight: weight of ``loss_box``.
        kwargs: as those of the base class; ``class_weight`` is the weight of ``loss_heatmap``.
    """

    @configurable
    def __init__(self, *, box_weight: float = 1.0, **kwargs: object) -> None:
        super().__init__(matcher=None, **kwargs)
        self.box_weight = box_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        decoder = registered(SPARSE_INST_DECODER_REGISTRY, cfg, "MODEL.SPARSE_INST.DECODER.NAME")
        if isinstance(decoder, type) and not hasattr(decoder, "training_outputs"):
            raise ValueError(
                f"MODEL.SPARSE_INST.LOSS.NAME is PlacedCriterion with DECODER.NAME {decoder.__name__}; set it to "
                "SparseInstCriterion, or DECODER.NAME to PlacedIAMDecoder"
            )
        arguments = super().from_config(cfg)
        del arguments["matcher"]
        return {**arguments, "box_weight": cfg.MODEL.SPARSE_INST.LOSS.BOX_WEIGHT}

    def forward(
        self,
        outputs: dict[str, torch.Tensor],
        targets: list[InstanceTargets],
        counts: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of one batch.

        Args:
            outputs: what `PlacedIAMDecoder.training_outputs` returned.
            targets, counts: as in the base class.

        Returns:
            Scalars, weighted. Without any instance the losses of pairs are 0, with a gradient of 0.
        """
        device = outputs["boxes"].device
        with no_autocast(device):
            scores, boxes, gt_boxes, masks, gt_masks = (
                outputs[name].float() for name in ("pred_scores", "boxes", "gt_boxes", "pred_masks", "gt_masks")
            )
            divisors = self.divisors(counts, targets, len(boxes) // NUM_CELLS, device)
            of_pairs = [NUM_CELLS * divisor for divisor in divisors]
            # A line of one pixel covers its cells by half at most.
            half = 0.5 * gt_masks.flatten(1).amax(1, keepdim=True)
            heat_loss = center_focal_loss(outputs["heat_logits"].float(), outputs["heat"], outputs["is_center"])
            return {
                "loss_heatmap": self.class_weight * heat_loss / divisors[0],
                "loss_box": self.box_weight * box_loss(boxes, gt_boxes) / of_pairs[1],
                **self.mask_losses(masks, scores, gt_masks, *of_pairs, gt_threshold=half),
            }
