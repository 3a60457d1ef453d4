"""Training hooks beside Detectron2's own."""

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from torch import nn

from sparseinst.inference.visualization import draw_iams, draw_instances
from sparseinst.modeling.mask_resize import masks_to_boxes
from sparseinst.modeling.sparse_inst import gt_masks_tensor

MAX_DRAWN = 20


class VisualizationHook(HookBase):
    """Puts pictures of a training image into the event storage, so into TensorBoard, every ``period`` iterations.

    Three pictures: ground truth, predictions, and the activation maps of the best predictions.

    Args:
        period: iterations.
        model: the model that is trained, without DistributedDataParallel.
        image_format: channel order of the batch's images, "RGB" or "BGR".
        dataset_name: whose class names are drawn.
    """

    def __init__(self, period: int, model: nn.Module, image_format: str, dataset_name: str) -> None:
        self.period = period
        self.model = model
        self.image_format = image_format
        self.metadata = MetadataCatalog.get(dataset_name)

    def after_step(self) -> None:
        """Draw the first image of the step's first batch, every ``period`` steps."""
        if (self.trainer.iter + 1) % self.period == 0:
            for name, picture in self.draw(self.trainer.batches[0][0]).items():
                self.trainer.storage.put_image(f"train/{name}", picture.transpose(2, 0, 1))

    def draw(self, x: dict) -> dict[str, np.ndarray]:
        """Draw one image of a training batch.

        Args:
            x: as the mapper makes it, with ``image`` and ``instances``.

        Returns:
            "ground_truth", "predictions" and, where the decoder gives them, "activation_maps"; (h, w, 3) uint8 RGB.
        """
        image = x["image"].permute(1, 2, 0).to("cpu", torch.uint8).numpy()
        if self.image_format == "BGR":
            image = np.ascontiguousarray(image[:, :, ::-1])
        predictions = self._predict({"image": x["image"]})[:MAX_DRAWN]
        pictures = {
            "ground_truth": draw_instances(image, _as_predictions(x["instances"]), self.metadata),
            "predictions": draw_instances(image, predictions, self.metadata),
        }
        if predictions.has("pred_iams"):
            pictures["activation_maps"] = draw_iams(image, predictions, self.metadata)
        return pictures

    def _predict(self, x: dict) -> Instances:
        decoder = self.model.decoder
        output_iam = getattr(decoder, "output_iam", False)
        was_training = self.model.training
        self.model.eval()
        if hasattr(decoder, "output_iam"):
            decoder.output_iam = True
        try:
            with torch.no_grad():
                return self.model([x])[0]["instances"].to("cpu")
        finally:
            if hasattr(decoder, "output_iam"):
                decoder.output_iam = output_iam
            self.model.train(was_training)


def _as_predictions(instances: Instances) -> Instances:
    masks = gt_masks_tensor(instances.to("cpu")).bool()
    return Instances(
        instances.image_size,
        pred_boxes=Boxes(masks_to_boxes(masks)),
        pred_masks=masks,
        scores=torch.ones(len(masks)),
        pred_classes=instances.gt_classes.cpu(),
    )
