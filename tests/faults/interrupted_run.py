"""A short training in a child process, to be interrupted: what it runs, and in which phase it is."""

from pathlib import Path

import torch

from sparseinst.checkpoint import checkpointer
from sparseinst.tools import train_net
from tests.tiny_model import tiny_cfg

MAX_ITER = 12
CHECKPOINT_PERIOD = 3
EVAL_PERIOD = 6


def write_config(path: Path, train: tuple[str, str], test: tuple[str, str]) -> None:
    """The config of a run with everything that a checkpoint has to restore."""
    cfg = tiny_cfg(
        "DATASETS.TRAIN_JSON", train[0], "DATASETS.TRAIN_IMAGES", train[1],
        "DATASETS.TEST_JSON", test[0], "DATASETS.TEST_IMAGES", test[1],
        "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, "DATALOADER.NUM_WORKERS", 1,
        "SOLVER.IMS_PER_BATCH", 3, "SOLVER.MAX_ITER", MAX_ITER, "SOLVER.STEPS", (8,), "SOLVER.WARMUP_ITERS", 3,
        "SOLVER.CHECKPOINT_PERIOD", CHECKPOINT_PERIOD, "TEST.EVAL_PERIOD", EVAL_PERIOD,
        "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2,
        "MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0, "MODEL.SPARSE_INST.MASK_THRESHOLD", 0.001,
    )  # fmt: skip
    path.write_text(cfg.dump(), encoding="utf-8")


def train(config: Path, output: Path, slow: bool, seed: int) -> None:
    """Train, going on where a checkpoint is; ``slow``: writing one takes half a second."""
    torch.set_num_threads(1)
    if slow:
        checkpointer.write_atomically = write_slowly
    arguments = ["--config-file", str(config), "--resume", "OUTPUT_DIR", str(output), "SEED", str(seed)]
    train_net.main(train_net.build_parser().parse_args(arguments))


_write_atomically = checkpointer.write_atomically


class _SlowFile:
    """Passes everything on to a file, and takes its time for it."""

    def __init__(self, file) -> None:
        self._file = file

    def write(self, data) -> int:
        import time

        time.sleep(0.5 * len(data) / 4e6)
        count = self._file.write(data)
        self._file.flush()
        return count

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def write_slowly(path, write) -> None:
    """As write_atomically, with a writer that takes half a second for 4 MB."""
    _write_atomically(path, lambda file: write(_SlowFile(file)))


def phase(output: Path, log: str) -> str:
    """What a run is doing: starting, training, saving or evaluating."""
    if any(output.glob(".model_*.partial")):
        return "saving"
    start = max(log.rfind("Starting training"), log.rfind("precise-BN"))
    if start < 0:
        return "starting"
    begun, done = log.rfind("Start inference"), log.rfind("Results and speed are in")
    return "evaluating" if begun > max(done, log.rfind("eta:")) else "training"
