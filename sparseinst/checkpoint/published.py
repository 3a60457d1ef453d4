"""Addresses of published checkpoints, by the name of their config file.

The addresses are the authors' own lists. None was tried when this table was written.
"""

# Terms of use that the authors name, by the start of the files' addresses in a browser.
_TERMS = {"https://huggingface.co/xinlongwang/SOLO/": "for non-commercial use only"}
_DRIVE = "https://drive.google.com/uc?id="
# Config name -> an address that MODEL.WEIGHTS takes: Google Drive, hf://OWNER/NAME/FILE, or any other.
CHECKPOINTS = {
    "sparse_inst_r50_base": f"{_DRIVE}12RQLHD5EZKIOvlqW3avUCeYjFG1NPKDy",
    "sparse_inst_r50_giam": f"{_DRIVE}1pXU7Dsa1L7nUiLU9ULG2F6Pl5m5NEguL",
    "sparse_inst_r50_giam_soft": f"{_DRIVE}1doterrG89SjmLxDyU8IhLYRGxVH69sR2",
    "sparse_inst_r50_giam_aug": f"{_DRIVE}1MK8rO3qtA7vN9KVSBdp0VvZHCNq8-bvz",
    "sparse_inst_r50_dcn_giam_aug": f"{_DRIVE}1qxdLRRHbIWEwRYn-NPPeCCk6fhBjc946",
    "sparse_inst_r50vd_base": f"{_DRIVE}1fjPFy35X2iJu3tYwVdAq4Bel82PfH5kx",
    "sparse_inst_r50vd_giam_aug": f"{_DRIVE}1dlamg7ych_BdWpPUCuiBXbwE0SXpsfGx",
    "sparse_inst_r50vd_dcn_giam_aug": f"{_DRIVE}1clYPdCNrDNZLbmlAEJ7wjsrOLn1igOpT",
    "sparse_inst_r101_giam": f"{_DRIVE}1EZZck-UNfom652iyDhdaGYbxS0MrO__z",
    "sparse_inst_r101_dcn_giam": f"{_DRIVE}1shkFvyBmDlWRxl1ActD6VfZJTJYBGBjv",
    "sparse_inst_cspdarknet53_giam": f"{_DRIVE}1rcUJWUbusM216Zbtmo_xB774jdjb3qSt",
    "sparse_inst_pvt_b1_giam": f"{_DRIVE}13l9JgTz3sF6j3vSVHOOhAYJnCf-QuNe_",
    "sparse_inst_pvt_b2_li_giam": f"{_DRIVE}1DFxQnFg_UL6kmMoNC4StUKo79RXVHyNF",
}

_SOLO = "hf://xinlongwang/SOLO/"
# For non-commercial use only.
CHECKPOINTS |= {
    "solo/solo_r50_1x": f"{_SOLO}SOLO_R50_1x.pth",
    "solo/solo_r50_3x": f"{_SOLO}SOLO_R50_3x.pth",
    "solo/solo_r101_3x": f"{_SOLO}SOLO_R101_3x.pth",
    "solo/decoupled_solo_r50_1x": f"{_SOLO}DECOUPLED_SOLO_R50_1x.pth",
    "solo/decoupled_solo_r50_3x": f"{_SOLO}DECOUPLED_SOLO_R50_3x.pth",
    "solo/decoupled_solo_r101_3x": f"{_SOLO}DECOUPLED_SOLO_R101_3x.pth",
    "solo/decoupled_solo_light_r50_3x": f"{_SOLO}DECOUPLED_SOLO_LIGHT_R50_3x.pth",
    "solo/decoupled_solo_light_dcn_r50_3x": f"{_SOLO}DECOUPLED_SOLO_LIGHT_DCN_R50_3x.pth",
    "solov2/solov2_r50_1x": f"{_SOLO}SOLOv2_R50_1x.pth",
    "solov2/solov2_r50_3x": f"{_SOLO}SOLOv2_R50_3x.pth",
    "solov2/solov2_r101_3x": f"{_SOLO}SOLOv2_R101_3x.pth",
    "solov2/solov2_r101_dcn_3x": f"{_SOLO}SOLOv2_R101_DCN_3x.pth",
    "solov2/solov2_x101_dcn_3x": f"{_SOLO}SOLOv2_X101_DCN_3x.pth",
    "solov2/solov2_light_448_r18_3x": f"{_SOLO}SOLOv2_LIGHT_448_R18_3x.pth",
    "solov2/solov2_light_448_r34_3x": f"{_SOLO}SOLOv2_LIGHT_448_R34_3x.pth",
    "solov2/solov2_light_448_r50_3x": f"{_SOLO}SOLOv2_LIGHT_448_R50_3x.pth",
    "solov2/solov2_light_512_dcn_r50_3x": f"{_SOLO}SOLOv2_LIGHT_512_DCN_R50_3x.pth",
}

_YOLACT = "hf://dbolya/yolact-"
# No file was published for yolact_im400.
CHECKPOINTS |= {
    f"yolact/yolact_{name}": f"{_YOLACT}{name.replace('_', '-')}/yolact_{name}_54_800000.pth"
    for name in ("resnet50", "darknet53", "base", "im700", "plus_resnet50", "plus_base")
}


def checkpoint_name(config: str) -> str:
    """Return the name under which a config's checkpoint is listed: without ``configs/`` and ``.yaml``."""
    return config.removesuffix(".yaml").removeprefix("configs/")


def published_address(config: str) -> str:
    """Return the address of a config's published checkpoint, as MODEL.WEIGHTS takes it.

    Args:
        config: name of the config file, with or without ``.yaml``.

    Raises:
        ValueError: no checkpoint was published for it; the message lists the names.
    """
    name = checkpoint_name(config)
    if name not in CHECKPOINTS:
        raise ValueError(f"No published checkpoint is named {name[:100]!r}; the names are {', '.join(CHECKPOINTS)}")
    return CHECKPOINTS[name]


def terms_of_use(address: str) -> str:
    """Return the terms that the authors of a file name, "" where none are known."""
    return next((terms for start, terms in _TERMS.items() if address.startswith(start)), "")
