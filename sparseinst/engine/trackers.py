"""Send the scalars of a training to Weights & Biases or MLflow (TRACKERS)."""

import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from detectron2.utils.events import EventWriter

from sparseinst.checkpoint.atomic_write import write_text_atomically
from sparseinst.engine.metrics_file import OptionalWriter, new_scalars

logger = logging.getLogger(__name__)

# Ids of the runs, in OUTPUT_DIR: a resumed training goes on in the same ones.
RUNS_FILE = "trackers.json"


class TrackerWriter(EventWriter):
    """Pass the new scalars of each iteration to a tracker.

    Args:
        log: called with an iteration and its scalars.
        close: ends the run; called with the error that ended the training, or None.
        run_id: of the tracker.
    """

    def __init__(
        self,
        log: Callable[[int, Mapping[str, float]], object],
        close: Callable[[BaseException | None], object],
        run_id: str,
    ) -> None:
        self.run_id = run_id
        self._log = log
        self._close = close
        self._last: int | None = None

    def write(self) -> None:
        """Send the scalars that are newer than the last call."""
        for iteration, scalars in sorted(new_scalars(self._last).items()):
            self._log(iteration, scalars)
            self._last = iteration

    def close(self) -> None:
        """End the run, as failed where an error ends the training: hooks are called while it is raised."""
        self._close(sys.exc_info()[1])


def wandb_writer(output_dir: str, config: str, run_id: str | None) -> TrackerWriter:
    """Start or continue a run of Weights & Biases; its environment variables set project and mode."""
    # In a terminal it asks for a login, and the training waits.
    os.environ.setdefault("WANDB_LOGIN_TIMEOUT", "60")
    import wandb
    import yaml

    run = wandb.init(dir=output_dir, config=yaml.safe_load(config), id=run_id, resume="allow")

    def close(error: BaseException | None) -> None:
        run.finish(exit_code=0 if error is None else 1)

    return TrackerWriter(lambda iteration, scalars: run.log(dict(scalars), step=iteration), close, run.id)


def mlflow_writer(output_dir: str, config: str, run_id: str | None) -> TrackerWriter:
    """Start or continue a run of MLflow; its environment variables set server and experiment."""
    # A server that does not answer would stop the training for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import mlflow

    run = mlflow.start_run(run_id, run_name=Path(output_dir).name)
    mlflow.log_text(config, "config.yaml")

    def log(iteration: int, scalars: Mapping[str, float]) -> None:
        # The names of classes can have characters that MLflow refuses.
        mlflow.log_metrics({re.sub(r"[^\w\-./ ]", "_", name): scalars[name] for name in scalars}, step=iteration)

    def close(error: BaseException | None) -> None:
        # KeyboardInterrupt and TrainingInterrupted are not Exceptions.
        mlflow.end_run("FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED")

    return TrackerWriter(log, close, run.info.run_id)


TRACKERS = {"wandb": wandb_writer, "mlflow": mlflow_writer}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ImportError where the package of a tracker is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # wandb writes a folder of its own name, which Python finds as a package without a file.
        if spec is None or spec.origin is None:
            raise ImportError(f"TRACKERS names {name}, which is not installed: pip install 'sparseinst[{name}]'")


def build_trackers(names: Sequence[str], output_dir: str, config: str, is_resumed: bool) -> list[EventWriter]:
    """Return a writer for each tracker; one that cannot start or fails later costs a WARNING, not the training.

    Args:
        names: keys of TRACKERS.
        output_dir: holds the ids of the runs, and the files of Weights & Biases.
        config: of the training, as YAML.
        is_resumed: go on in the runs of the folder; otherwise their ids are removed.
    """
    path = Path(output_dir) / RUNS_FILE
    runs = _read_runs(path) if is_resumed else {}
    if not is_resumed:
        path.unlink(missing_ok=True)
    writers: list[EventWriter] = []
    for name in names:
        try:
            writer = TRACKERS[name](output_dir, config, runs.get(name))
            runs[name] = writer.run_id
            write_text_atomically(path, json.dumps(runs) + "\n")
        # Packages of others raise errors of their own, also without a login or a network.
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            logger.warning("TRACKERS %s cannot start, and the training goes on without it: %s", name, text)
        else:
            writers.append(OptionalWriter(writer, name, errors=(Exception,)))
    return writers


def _read_runs(path: Path) -> dict[str, str]:
    """Read the ids of the runs; a damaged file costs a WARNING."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(runs, dict):
            raise ValueError("expected a JSON object")
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read, so the trackers start new runs: %s", path, error)
        return {}
    return runs
