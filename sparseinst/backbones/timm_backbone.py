"""Any model of timm that gives feature maps as a Detectron2 backbone. timm is imported only when one is built."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from torch import nn

from sparseinst.backbones.feature_pyramid import build_feature_pyramid
from sparseinst.backbones.same_padding import replace_same_padding
from sparseinst.backbones.state_dict_names import rename_state_dict

NORMS = ("", "BN", "FrozenBN", "SyncBN")
# Arguments of timm.create_model that a config may give. Others read files or download (checkpoint_path, pretrained,
# pretrained_cfg), or belong to this module (features_only, out_indices).
MODEL_ARGS = (
    "act_layer", "aa_layer", "attn_drop_rate", "avg_down", "base_width", "bn_eps", "bn_momentum", "cardinality",
    "class_token", "conv_mlp", "depth", "depths", "dims", "drop_block_rate", "drop_path_rate", "drop_rate",
    "dynamic_img_pad", "dynamic_img_size", "embed_dim", "embed_dims", "global_pool", "img_size", "init_values",
    "kernel_sizes", "ls_init_value", "mlp_ratio", "mlp_ratios", "norm_layer", "num_heads", "output_stride", "pad_type",
    "patch_drop_rate", "patch_size", "pos_drop_rate", "proj_drop_rate", "qkv_bias", "reg_tokens", "stem_type",
    "stem_width", "strict_img_size", "window_size", "zero_init_last",
)  # fmt: skip
# Names of the features of `build_timm_backbone`, as Detectron2's ResNet has them, and their strides.
STRIDES = {"res1": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}


class TimmBackbone(Backbone):
    """A timm model's feature maps, by name.

    Its state dict has the names of the whole timm model (``stages.0.blocks.1.conv.weight``), so that weights files of
    timm fit; the parameters themselves are found under ``body``.

    Args:
        model_name: as ``timm.list_models()`` has it.
        strides: stride of each feature to return, by the name to return it under.
        in_channels: channels of the images.
        norm: "" or "BN" leaves the model's norms as they are; "FrozenBN" freezes its batch norms, "SyncBN"
            synchronizes them.
        freeze_at: everything up to the last map of stride ``2 ** freeze_at`` is frozen, 0 for nothing. In a ResNet 2 is
            the stem and the first stage, as Detectron2 counts.
        to_published, from_published: change a name of the timm model into that of the state dict, and back.
        model_args: further keyword arguments of ``timm.create_model``.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model, or it does not give feature maps, or not of these strides; an unknown norm;
            arguments that the model does not take; a model that cannot be frozen in part.
    """

    def __init__(
        self,
        model_name: str,
        strides: Mapping[str, int],
        *,
        in_channels: int = 3,
        norm: str = "",
        freeze_at: int = 0,
        to_published: Callable[[str], str] = str,
        from_published: Callable[[str], str] = str,
        model_args: Mapping | None = None,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"The norm of the backbone {model_name} is {norm!r}; it must be one of {NORMS}")
        model_args = {"in_chans": in_channels, **(model_args or {})}
        whole = _create_model(model_name, model_args)
        levels = getattr(whole, "feature_info", None) or []
        # Of several maps of one stride the last.
        indices = {level["reduction"]: index for index, level in enumerate(levels)}
        missing = [f"{name} (stride {stride})" for name, stride in strides.items() if stride not in indices]
        if missing:
            raise ValueError(
                f"The backbone {model_name} has no {', '.join(missing)}; its maps have the strides "
                f"{', '.join(map(str, indices)) or 'none'}. Choose others as OUT_FEATURES and ENCODER.IN_FEATURES, or "
                "another model"
            )
        # timm returns the features in the network's order, not in the order of the request.
        self._strides = dict(sorted(strides.items(), key=lambda item: indices[item[1]]))
        self.body = _create_features(model_name, [indices[stride] for stride in self._strides.values()], model_args)
        replace_same_padding(self.body, _import_timm().layers.Conv2dSame)
        self._channels = dict(zip(self._strides, self.body.feature_info.channels()))
        self._is_channels_last = str(getattr(self.body, "output_fmt", "")).endswith("NHWC")

        if norm == "FrozenBN":
            _freeze_batch_norms(self.body, list(self.body.modules()))
        elif norm == "SyncBN":
            self.body = _import_timm().layers.convert_sync_batchnorm(self.body)
        prefixes = _prefixes(self.body, whole)
        needed = _names_up_to(whole, levels, max(indices[stride] for stride in strides.values()))
        if needed is not None:
            _drop_unneeded(self.body, prefixes, needed)
        frozen_levels = [index for stride, index in indices.items() if stride <= 2**freeze_at]
        if freeze_at > 0 and frozen_levels:
            frozen = _names_up_to(whole, levels, max(frozen_levels))
            if frozen is None:
                raise ValueError(
                    f"The backbone {model_name} cannot be frozen in part, since timm does not say where its stages "
                    "end; set MODEL.BACKBONE.FREEZE_AT to 0"
                )
            _freeze(self.body, prefixes, frozen)
        rename_state_dict(
            self,
            lambda name: to_published(_whole_name(prefixes, name.removeprefix("body."))),
            lambda name: "body." + _body_name(prefixes, from_published(name)),
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map images (B, in_channels, ., .) to the features (B, C, ., .) by name."""
        features = self.body(images)
        if self._is_channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return dict(zip(self._strides, features))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each feature."""
        return {name: ShapeSpec(channels=self._channels[name], stride=stride) for name, stride in self._strides.items()}


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build the model MODEL.TIMM.NAME; its features res1 to res5 are the maps of stride 2 to 32.

    Raises:
        ImportError: timm is not installed.
        ValueError: a key of MODEL.TIMM that cannot be used.
    """
    timm_cfg = cfg.MODEL.TIMM
    return TimmBackbone(
        timm_cfg.NAME,
        select_strides("MODEL.TIMM.OUT_FEATURES", timm_cfg.OUT_FEATURES, STRIDES),
        in_channels=input_shape.channels,
        norm=timm_cfg.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        model_args=_checked_args(timm_cfg.ARGS),
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's feature pyramid (p2 to p6) around the model of `build_timm_backbone`.

    Raises:
        ImportError: as `build_timm_backbone`.
        ValueError: as that; or MODEL.FPN.IN_FEATURES does not fit MODEL.TIMM.OUT_FEATURES.
    """
    return build_feature_pyramid(cfg, build_timm_backbone(cfg, input_shape))


def _checked_args(model_args: Mapping) -> dict:
    """Return the arguments. Raise ValueError for a name outside MODEL_ARGS, or a value other than numbers and texts."""
    for name, value in model_args.items():
        if name not in MODEL_ARGS:
            raise ValueError(
                f"MODEL.TIMM.ARGS has {str(name)[:100]!r}; it must be one of {', '.join(MODEL_ARGS)}. To load "
                "weights set MODEL.WEIGHTS"
            )
        values = value if isinstance(value, list | tuple) else [value]
        if not all(part is None or isinstance(part, int | float | str) for part in values):
            raise ValueError(f"MODEL.TIMM.ARGS.{name} is {value!r}; it must be a number, a text or a list of them")
    return dict(model_args)


def select_strides(key: str, names: Sequence[str], strides: Mapping[str, int]) -> dict[str, int]:
    """Return those strides whose names a config lists.

    Args:
        key: the config's key, for the message.
        names: the key's list.
        strides: of all names that the key may list.

    Raises:
        ValueError: the key lists nothing, or an unknown name.
    """
    if not names or any(name not in strides for name in names):
        raise ValueError(f"{key} is {list(names)}; it must have one or more of {', '.join(strides)}")
    return {name: strides[name] for name in names}


def _import_timm() -> ModuleType:
    try:
        import timm
        import timm.layers
    except ImportError as error:
        raise ImportError(
            f"This backbone comes from the package timm, which cannot be imported ({error}). "
            "Install it: pip install 'sparseinst[timm]', or pip install 'timm>=1.0.26,<2'"
        ) from error
    return timm


def _create_model(model_name: str, model_args: Mapping) -> nn.Module:
    timm = _import_timm()
    if not timm.is_model(model_name):
        similar = difflib.get_close_matches(model_name, timm.list_models(), 5)
        raise ValueError(
            f"timm {timm.__version__} has no model {model_name!r}. Similar names: {', '.join(similar) or 'none'}; "
            "all: timm.list_models()"
        )
    try:
        return timm.create_model(model_name, **model_args)
    except TypeError as error:
        raise ValueError(f"timm's {model_name} does not take these MODEL.TIMM.ARGS: {error}") from error


def _create_features(model_name: str, out_indices: Sequence[int], model_args: Mapping) -> nn.Module:
    arguments = {**model_args, "features_only": True, "out_indices": tuple(out_indices)}
    try:
        try:
            # Models with windows and tables of positions otherwise take one size only.
            return _import_timm().create_model(model_name, strict_img_size=False, **arguments)
        except TypeError:
            return _import_timm().create_model(model_name, **arguments)
    except (AssertionError, AttributeError, RuntimeError) as error:
        raise ValueError(f"timm's {model_name} cannot be a backbone: {error}") from error


def _freeze_batch_norms(body: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Freeze those batch norms of the body that are among the parts."""
    freeze = _import_timm().layers.freeze_batch_norm_2d
    norms = {part for part in parts if isinstance(part, nn.BatchNorm2d | nn.SyncBatchNorm)}
    for parent in list(body.modules()):
        for name, child in parent.named_children():
            if child in norms:
                if child.affine and not child.weight.any():
                    # A frozen zero would cut its branch off for ever where no weights are loaded.
                    nn.init.ones_(child.weight)
                setattr(parent, name, freeze(child))


def _names_up_to(whole: nn.Module, levels: Sequence[Mapping], index: int) -> set[str] | None:
    """Return the names of the modules that are defined before the end of a level; in timm's models they run before it.

    Return None where the levels are not named after parts of the model, because their ends are unknown then.
    """
    names = [name for name, _ in whole.named_modules()]
    if any(level.get("module") not in names for level in levels):
        return None
    inside = f"{levels[index]['module']}."
    return set(names[: max(i for i, name in enumerate(names) if f"{name}.".startswith(inside)) + 1])


def _drop_unneeded(body: nn.Module, prefixes: Mapping[str, str], needed: set[str]) -> None:
    """Delete the last parts of a sequence that no feature needs: EfficientNets and MobileNets come with all of them."""
    for name, sequence in body.named_children():
        if isinstance(sequence, nn.Sequential):
            for part in reversed(list(dict(sequence.named_children()))):
                if _whole_name(prefixes, f"{name}.{part}.").removesuffix(".") in needed:
                    break
                delattr(sequence, part)


def _freeze(body: nn.Module, prefixes: Mapping[str, str], names: set[str]) -> None:
    frozen = [
        module for name, module in body.named_modules() if _whole_name(prefixes, f"{name}.").removesuffix(".") in names
    ]
    for module in frozen:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
    _freeze_batch_norms(body, frozen)


def _prefixes(body: nn.Module, whole: nn.Module) -> dict[str, str]:
    """Map the beginnings of names in the body to those in the whole model, where the two differ.

    To collect features timm takes a model apart, or wraps it: the parts of a sequence `stages` become `stages_0`,
    `stages_1`, or the model itself becomes the one child of the body.
    """
    children = dict(whole.named_children())
    flattened = {
        f"{name}_{part}": f"{name}.{part}"
        for name, child in children.items()
        if isinstance(child, nn.Sequential)
        for part, _ in child.named_children()
    }
    names = [name for name, _ in body.named_children()]
    if len(names) == 1 and names[0] not in {**children, **flattened}:
        return {f"{names[0]}.": ""}
    return {f"{name}.": f"{flattened[name]}." for name in names if name not in children and name in flattened}


def _whole_name(prefixes: Mapping[str, str], body_name: str) -> str:
    for ours, theirs in prefixes.items():
        if body_name.startswith(ours):
            return theirs + body_name.removeprefix(ours)
    return body_name


def _body_name(prefixes: Mapping[str, str], whole_name: str) -> str:
    for ours, theirs in prefixes.items():
        if whole_name.startswith(theirs):
            return ours + whole_name.removeprefix(theirs)
    return whole_name
