"""Set the keys that a model declares from the checkpoint that a run starts with, or from its data."""

from detectron2.config import CfgNode

from sparseinst.checkpoint import WeightsFileError
from sparseinst.checkpoint.resumption import find_checkpoint
from sparseinst.checkpoint.trained_keys import follow_checkpoint, trained_keys
from sparseinst.data.model_keys import follow_data, follow_sides
from sparseinst.runtime.exported_file import is_exported
from sparseinst.runtime.exported_model import follow_exported


def set_model_keys(cfg: CfgNode, *, eval_only: bool, resume: bool) -> list[str]:
    """Set the keys that a model or its family declares, and that the user left out, in place.

    A resumed or evaluated model has the numbers of classes, instances, detections and levels of its checkpoint; a new
    training those of its data. Whether images are cropped follows the data, also in a resumed training.

    Args:
        cfg: not frozen; its data sets are registered.
        eval_only: nothing is trained.
        resume: continue from OUTPUT_DIR, where it has a checkpoint.

    Returns:
        Lines for the log.

    Raises:
        ValueError: the user set another value than the checkpoint's; MODEL.WEIGHTS or the data cannot be read.
    """
    tried = set()
    while resume and (checkpoint := find_checkpoint(cfg.OUTPUT_DIR, tried)[0]):
        try:
            notes = follow_checkpoint(cfg, str(checkpoint), for_training=not eval_only)
            # No checkpoint holds how images are augmented.
            return notes if eval_only else notes + follow_sides(cfg, dict, section="INPUT.")
        except WeightsFileError:
            # The checkpointer reports it.
            tried.add(checkpoint)
    if eval_only and is_exported(cfg.MODEL.WEIGHTS):
        follow_exported(cfg)
        return []
    if eval_only:
        return follow_checkpoint(cfg, cfg.MODEL.WEIGHTS)
    return follow_data(cfg, lambda: trained_keys(cfg, cfg.MODEL.WEIGHTS))
