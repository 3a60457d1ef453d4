"""Keys of SOLO and SOLOv2 that do not fit together: one line names them."""

import pytest

from sparseinst.config import load_config
from sparseinst.modeling.solo.config import SOLO_NODE, SOLOV2_NODE, check_levels


def check(node, key, value):
    cfg = load_config("solov2/solov2_r50_3x", [f"{node}.{key}", value])
    check_levels(cfg.MODEL[node.removeprefix("MODEL.")], node)


@pytest.mark.parametrize(
    ("node", "key", "value", "message"),
    [
        (SOLO_NODE, "CHANNELS", 48, "MODEL.SOLO.CHANNELS is 48; MODEL.SOLO.NORM GN needs another width"),
        (SOLOV2_NODE, "KERNEL_DIM", 8, "MODEL.SOLOV2.KERNEL_DIM is 8"),
        (SOLOV2_NODE, "MASK_FEATURES.CHANNELS", 100, "MODEL.SOLOV2.MASK_FEATURES.CHANNELS is 100"),
        (SOLOV2_NODE, "NORM", "none", "MODEL.SOLOV2.NORM is 'none'; it must be one of"),
    ],
)
def test_norms_and_widths(node, key, value, message):
    with pytest.raises(ValueError, match=message):
        check(node, key, value)


@pytest.mark.parametrize("norm", ["", "BN", "GN"])
def test_valid_norms(norm):
    check(SOLOV2_NODE, "NORM", norm)
