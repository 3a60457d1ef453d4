"""Choose the data to evaluate on: the user's, or none."""

from detectron2.config import CfgNode

from sparseinst import config


def choose_evaluation_data(cfg: CfgNode) -> list[str]:
    """Leave out the data sets that a config file of the package names where the user gave others, in place.

    A user's training data are evaluated on a user's data, or not at all. DATASETS.VAL_SHARE precedes DATASETS.TEST.

    Args:
        cfg: not frozen; before `register_user_datasets`.

    Returns:
        Lines for the log.

    Raises:
        ValueError: DATASETS.VAL_SHARE comes with DATASETS.TEST_JSON, or without training data.
    """

    def is_given(name: str) -> bool:
        return bool(cfg.DATASETS[name]) and config.is_explicit(cfg, f"DATASETS.{name}")

    for split in ("TRAIN", "TEST"):
        if is_given(split) and not is_given(f"{split}_JSON"):
            cfg.DATASETS[f"{split}_JSON"] = cfg.DATASETS[f"{split}_IMAGES"] = ""
    if cfg.DATASETS.VAL_SHARE:
        if not cfg.DATASETS.TRAIN_JSON:
            raise ValueError("DATASETS.VAL_SHARE (--val-share) splits the data of --train-json, which is missing")
        if is_given("TEST_JSON"):
            raise ValueError(
                "--val-share (DATASETS.VAL_SHARE) and --test-json (DATASETS.TEST_JSON) are both given: evaluate on a "
                "part of the training data, or on data of their own"
            )
        cfg.DATASETS.TEST_JSON = cfg.DATASETS.TEST_IMAGES = ""
    elif is_given("TRAIN_JSON") and not any(map(is_given, ("TEST", "TEST_JSON", "TEST_IMAGES"))):
        cfg.DATASETS.TEST, cfg.DATASETS.TEST_JSON, cfg.DATASETS.TEST_IMAGES = (), "", ""
        return [
            f"The training has no evaluation{' and no early stopping' if cfg.TEST.PATIENCE else ''}, because "
            "--train-json came without data to evaluate on. Give --test-json and --test-images, or --val-share 0.2 to "
            "evaluate on a part of the images"
        ]
    return []
