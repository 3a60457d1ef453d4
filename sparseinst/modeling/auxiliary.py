"""Functions that families of models share when they are built."""

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from sparseinst.config import registered


def build_backbone(cfg: CfgNode) -> Backbone:
    """Build the backbone named by MODEL.BACKBONE.NAME.

    Raises:
        ValueError: the name is not registered, or Detectron2 refuses the backbone's keys.
        ImportError: it needs Detectron2's compiled operators and they are missing; the message names the replacement.
    """
    registered(BACKBONE_REGISTRY, cfg, "MODEL.BACKBONE.NAME")
    try:
        return modeling.build_backbone(cfg)
    except ImportError as error:
        if "detectron2._C" not in str(error):
            raise
        raise ImportError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE}, and MODEL.BACKBONE.NAME "
            f"{cfg.MODEL.BACKBONE.NAME} needs Detectron2's compiled operators, which are missing here. Set "
            "MODEL.BACKBONE.NAME to build_resnet_dcn_backbone: the same ResNet and the same weights, with "
            "torchvision's operator"
        ) from error
    # Detectron2's builders assert what a config must hold, and look names up.
    except (AssertionError, KeyError) as error:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} cannot be built with these keys: "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from error
