"""Addresses of the published checkpoints of the package's configs, as their authors list them."""

# The files are on Google Drive, by id; original repository: github.com/hustvl/SparseInst.
_SPARSE_INST = {
    "sparse_inst_r50_base": "12RQLHD5EZKIOvlqW3avUCeYjFG1NPKDy",
    "sparse_inst_r50vd_base": "1fjPFy35X2iJu3tYwVdAq4Bel82PfH5kx",
    "sparse_inst_r50_giam": "1pXU7Dsa1L7nUiLU9ULG2F6Pl5m5NEguL",
    "sparse_inst_r50_giam_soft": "1doterrG89SjmLxDyU8IhLYRGxVH69sR2",
    "sparse_inst_r50_giam_aug": "1MK8rO3qtA7vN9KVSBdp0VvZHCNq8-bvz",
    "sparse_inst_r50_dcn_giam_aug": "1qxdLRRHbIWEwRYn-NPPeCCk6fhBjc946",
    "sparse_inst_r50vd_giam_aug": "1dlamg7ych_BdWpPUCuiBXbwE0SXpsfGx",
    "sparse_inst_r50vd_dcn_giam_aug": "1clYPdCNrDNZLbmlAEJ7wjsrOLn1igOpT",
    "sparse_inst_cspdarknet53_giam": "1rcUJWUbusM216Zbtmo_xB774jdjb3qSt",
    "sparse_inst_r101_giam": "1EZZck-UNfom652iyDhdaGYbxS0MrO__z",
    "sparse_inst_r101_dcn_giam": "1shkFvyBmDlWRxl1ActD6VfZJTJYBGBjv",
    "sparse_inst_pvt_b1_giam": "13l9JgTz3sF6j3vSVHOOhAYJnCf-QuNe_",
    "sparse_inst_pvt_b2_li_giam": "1DFxQnFg_UL6kmMoNC4StUKo79RXVHyNF",
}
# The files are on Hugging Face, for non-commercial use only; original repository: github.com/WXinlong/SOLO.
_SOLO = {
    "solo/solo_r50_1x": "SOLO_R50_1x",
    "solo/solo_r50_3x": "SOLO_R50_3x",
    "solo/solo_r101_3x": "SOLO_R101_3x",
    "solo/decoupled_solo_r50_1x": "DECOUPLED_SOLO_R50_1x",
    "solo/decoupled_solo_r50_3x": "DECOUPLED_SOLO_R50_3x",
    "solo/decoupled_solo_r101_3x": "DECOUPLED_SOLO_R101_3x",
    "solo/decoupled_solo_light_r50_3x": "DECOUPLED_SOLO_LIGHT_R50_3x",
    "solo/decoupled_solo_light_dcn_r50_3x": "DECOUPLED_SOLO_LIGHT_DCN_R50_3x",
    "solov2/solov2_r50_1x": "SOLOv2_R50_1x",
    "solov2/solov2_r50_3x": "SOLOv2_R50_3x",
    "solov2/solov2_r101_3x": "SOLOv2_R101_3x",
    "solov2/solov2_r101_dcn_3x": "SOLOv2_R101_DCN_3x",
    "solov2/solov2_x101_dcn_3x": "SOLOv2_X101_DCN_3x",
    "solov2/solov2_light_448_r18_3x": "SOLOv2_LIGHT_448_R18_3x",
    "solov2/solov2_light_448_r34_3x": "SOLOv2_LIGHT_448_R34_3x",
    "solov2/solov2_light_448_r50_3x": "SOLOv2_LIGHT_448_R50_3x",
    "solov2/solov2_light_512_dcn_r50_3x": "SOLOv2_LIGHT_512_DCN_R50_3x",
}
# Config name -> address.
PUBLISHED = {
    **{name: f"https://drive.google.com/file/d/{file_id}/view" for name, file_id in _SPARSE_INST.items()},
    **{name: f"hf://xinlongwang/SOLO/{file}.pth" for name, file in _SOLO.items()},
}
NON_COMMERCIAL = frozenset(_SOLO)
