"""Any model of timm that gives feature maps as a Detectron2 backbone. timm is imported only when one is built."""

import functools
import re
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparseinst.backbones.state_dict_names import rename_state_dict

NORMS = ("", "BN", "FrozenBN", "SyncBN")
# Names of the features of `build_timm_backbone`, as Detectron2's ResNet has them, and their strides.
FEATURE_STRIDES = {"res1": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}


class TimmBackbone(Backbone):
    """A timm model's feature maps, by name.

    Its state dict has the names of the whole timm model (``stages.0.blocks.1.conv.weight``), so that weights files of
    timm fit; the parameters themselves are found under ``body``.

    Args:
        model_name: as ``timm.list_models()`` has it.
        strides: stride of each feature to return, by the name to return it under; finest first.
        norm: "" or "BN" leaves the model's norms as they are; "FrozenBN" freezes its batch norms, "SyncBN"
            synchronises them.
        freeze_at: everything up to the last map of stride ``2 ** freeze_at`` is frozen, 0 for nothing. In a ResNet 2 is
            the stem and the first stage, as Detectron2 counts.
        to_published, from_published: change a name of the timm model into that of the state dict, and back.
        model_args: further keyword arguments of ``timm.create_model``.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model, or not its feature maps, or not these strides; an unknown norm.
    """

    def __init__(
        self,
        model_name: str,
        strides: Mapping[str, int],
        *,
        norm: str = "",
        freeze_at: int = 0,
        to_published: Callable[[str], str] = str,
        from_published: Callable[[str], str] = str,
        model_args: Mapping | None = None,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"The norm of the backbone {model_name} is {norm!r}; it must be one of {NORMS}")
        create = functools.partial(_create_model, model_name, **(model_args or {}))
        all_levels = create().feature_info
        # Of several maps of one stride the last.
        indices = {stride: index for index, stride in enumerate(all_levels.reduction())}
        missing = [f"{name} (stride {stride})" for name, stride in strides.items() if stride not in indices]
        if missing:
            raise ValueError(
                f"The backbone {model_name} has no {', '.join(missing)}; its maps have the strides "
                f"{', '.join(map(str, indices))}. Choose others as OUT_FEATURES and ENCODER.IN_FEATURES"
            )
        out_indices = tuple(indices[stride] for stride in strides.values())
        self.body = create(out_indices=out_indices)
        self.channels_last_features = str(getattr(self.body, "output_fmt", "")).endswith("NHWC")
        self._strides = dict(strides)
        self._channels = dict(zip(strides, self.body.feature_info.channels()))

        if norm == "FrozenBN":
            _freeze_batch_norms(self.body, set(self.body.modules()))
        elif norm == "SyncBN":
            self.body = _import_timm().layers.convert_sync_batchnorm(self.body)
        frozen_levels = [index for stride, index in indices.items() if stride <= 2**freeze_at]
        if freeze_at > 0 and frozen_levels:
            _freeze_up_to(self.body, all_levels.module_name(max(frozen_levels)))

        # Where maps are collected from the model's parts, timm names `stages.0` `stages_0`.
        self._is_flattened = isinstance(self.body, nn.ModuleDict)
        rename_state_dict(
            self,
            functools.partial(_published_name, self._is_flattened, to_published),
            functools.partial(_own_name, self._is_flattened, from_published),
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (B, 3, ., .) to the features (B, C, ., .) by name."""
        features = self.body(images)
        if self.channels_last_features:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return dict(zip(self._strides, features))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature."""
        return {name: ShapeSpec(channels=self._channels[name], stride=stride) for name, stride in self._strides.items()}


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The model MODEL.TIMM.NAME; its features res1 to res5 are the maps of stride 2 to 32.

    Raises:
        ImportError: timm is not installed.
        ValueError: a key of MODEL.TIMM that cannot be used.
    """
    timm_cfg = cfg.MODEL.TIMM
    unknown = [name for name in timm_cfg.OUT_FEATURES if name not in FEATURE_STRIDES]
    if unknown:
        raise ValueError(f"MODEL.TIMM.OUT_FEATURES has {unknown}; it can have {', '.join(FEATURE_STRIDES)}")
    return TimmBackbone(
        timm_cfg.NAME,
        {name: FEATURE_STRIDES[name] for name in timm_cfg.OUT_FEATURES},
        norm=timm_cfg.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        model_args=timm_cfg.ARGS,
    )


def _import_timm() -> ModuleType:
    try:
        import timm
        import timm.layers
    except ImportError as error:
        raise ImportError(
            f"This backbone comes from the package timm, which cannot be imported ({error}). "
            "Install it: pip install 'sparseinst[timm]', or pip install 'timm>=1.0,<2'"
        ) from error
    return timm


def _create_model(model_name: str, **model_args) -> nn.Module:
    timm = _import_timm()
    if model_name not in timm.list_models() and model_name.split(".")[0] not in timm.list_models():
        raise ValueError(
            f"timm {timm.__version__} has no model {model_name!r}. Similar names: "
            f"{', '.join(timm.list_models(f'*{model_name[:6]}*')[:5]) or 'none'}; all: timm.list_models()"
        )
    create = functools.partial(timm.create_model, model_name, features_only=True, **model_args)
    try:
        try:
            # Models with position tables and windows otherwise take one size only.
            return create(strict_img_size=False)
        except TypeError as error:
            if "strict_img_size" not in str(error):
                raise
            return create()
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"timm's {model_name} cannot be a backbone: {error}") from error


def _freeze_batch_norms(body: nn.Module, parts: set[nn.Module]) -> None:
    """Freeze those batch norms of the body that are among the parts."""
    freeze = _import_timm().layers.freeze_batch_norm_2d
    for parent in list(body.modules()):
        for name, child in parent.named_children():
            if child in parts and isinstance(child, _BatchNorm):
                if not child.weight.any():
                    # A frozen zero would cut its branch off for ever where no weights are loaded.
                    nn.init.ones_(child.weight)
                setattr(parent, name, freeze(child))


def _freeze_up_to(body: nn.Module, module_name: str) -> None:
    """Freeze what is defined before the end of a module, which for timm's models is what runs before it."""
    modules = dict(body.named_modules())
    last = list((modules.get(module_name) or modules[module_name.replace(".", "_")]).modules())[-1]
    in_order = list(body.modules())
    frozen = in_order[: in_order.index(last) + 1]
    for module in frozen:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
    _freeze_batch_norms(body, set(frozen))


def _published_name(is_flattened: bool, to_published: Callable[[str], str], name: str) -> str:
    name = name.removeprefix("body.")
    return to_published(re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", name) if is_flattened else name)


def _own_name(is_flattened: bool, from_published: Callable[[str], str], name: str) -> str:
    name = from_published(name)
    return "body." + (re.sub(r"^([a-z]+)\.(\d+)\.", r"\1_\2.", name) if is_flattened else name)
