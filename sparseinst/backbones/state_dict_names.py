"""State dicts whose names are not those of the modules: a checkpoint's names outlive the code that made them."""

from collections.abc import Callable

import torch
from torch import nn


def rename_state_dict(
    module: nn.Module, to_published: Callable[[str], str], from_published: Callable[[str], str]
) -> None:
    """Have a module save and load its state dict under other names, wherever in a model it stands.

    Also what a load reports as missing or left over has the published names. Parameters keep their own names in
    ``named_parameters()``; ``state_dict(keep_vars=True)`` lists them under the published ones.

    Args:
        module: gets hooks for this, once and for all.
        to_published: from the module's own name of a tensor to the published one; one to one.
        from_published: the reverse; names that the module does not know may become anything.
    """
    # Of the load that is going on: PyTorch does not tell the last hook where the module stands.
    loading_prefix = ""

    def after_saving(_: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, __) -> None:
        _rename_keys(state_dict, prefix, to_published)

    def before_loading(_: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *__) -> None:
        nonlocal loading_prefix
        loading_prefix = prefix
        _rename_keys(state_dict, prefix, from_published)

    def after_loading(_: nn.Module, incompatible_keys) -> None:
        for names in (incompatible_keys.missing_keys, incompatible_keys.unexpected_keys):
            for index, name in enumerate(names):
                if name.startswith(loading_prefix):
                    names[index] = loading_prefix + to_published(name.removeprefix(loading_prefix))

    module.register_state_dict_post_hook(after_saving)
    module.register_load_state_dict_pre_hook(before_loading)
    module.register_load_state_dict_post_hook(after_loading)


def _rename_keys(state_dict: dict[str, torch.Tensor], prefix: str, new_name: Callable[[str], str]) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        value = state_dict.pop(name)
        state_dict[prefix + new_name(name.removeprefix(prefix))] = value
