"""SparseInst's own names, which need no renaming: the config keys behind the shapes of its tensors."""

from sparseinst.checkpoint.names.source import KeyHint

_DECODER = "MODEL.SPARSE_INST.DECODER."
_NUM_CHANNELS = "MODEL.SPARSE_INST.ENCODER.NUM_CHANNELS"

# The first that fits is the hint.
KEY_HINTS = (
    KeyHint(r"^encoder\.", f"{_NUM_CHANNELS}, or another backbone"),
    KeyHint(r"^decoder\..*\bcls_score\.\w+$", f"{_DECODER}NUM_CLASSES", first_axis=True),
    KeyHint(r"^decoder\..*\biam_conv\.\w+$", f"{_DECODER}NUM_MASKS or GROUPS", first_axis=True),
    KeyHint(r"^decoder\..*\b(mask_kernel|projection)\.\w+$", f"{_DECODER}KERNEL_DIM", first_axis=True),
    KeyHint(r"^decoder\..*\b(cls_score|iam_conv|mask_kernel|objectness|fc)\.\w+$", f"{_DECODER}GROUPS or INST.DIM"),
    KeyHint(r"^decoder\.inst_branch\.levels$", f"{_DECODER}NUM_LEVELS", first_axis=True),
    KeyHint(r"^decoder\.", f"{_DECODER}INST.DIM or MASK.DIM, or {_NUM_CHANNELS}"),
)
