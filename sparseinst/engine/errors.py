"""Report the errors that a user can cause in one line on stderr, with an exit code and without a traceback."""

import contextlib
import errno
import sys
from collections.abc import Iterator

from detectron2.utils import comm

from sparseinst.checkpoint import OutputError
from sparseinst.data.images import DataError
from sparseinst.data.loader import WorkerDiedError
from sparseinst.engine.finite import NonFiniteStepError
from sparseinst.engine.interruption import TrainingInterrupted
from sparseinst.engine.processes import exit_with_error
from sparseinst.ops.mask_output import MaskMemoryError

# Errors that stop a running training with a message for the user; all others are bugs.
RUN_ERRORS = (DataError, MaskMemoryError, NonFiniteStepError, OutputError, WorkerDiedError)
# The disk or the user's quota is full, or a file is too large.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def setup_errors() -> Iterator[None]:
    """End this process with one line where arguments, config, data, weights or disk are wrong, before a step is run."""
    try:
        yield
    # OSError: a builtin data set that is not on this machine, or a full disk. ImportError: an extra, such as timm.
    except (ValueError, ImportError, OSError) as error:
        exit_with_error(error)


@contextlib.contextmanager
def run_errors(output_dir: str) -> Iterator[None]:
    """End this process with one line where a training or an evaluation cannot go on, or where a signal stopped it.

    Args:
        output_dir: named in the message, because ``--resume`` continues from there.
    """
    try:
        yield
    except FloatingPointError as error:
        # A NonFiniteStepError, or that of Detectron2's trainers. All ranks raise it.
        exit_with_error(" ".join(str(error).split()))
    except RUN_ERRORS as error:
        lines = str(error).strip().splitlines()
        # An error of Detectron2's loader starts with the traceback of its worker process.
        sys.exit(f"error: {lines[-1] if lines[0].startswith('Caught ') else ' '.join(map(str.strip, lines))}")
    except TrainingInterrupted as error:
        # After an error of another rank the launcher would end rank 0, which may still be saving.
        if comm.get_local_rank() == 0:
            print(f"{error}. The training is saved in {output_dir}; go on with --resume", file=sys.stderr)
            sys.exit(128 + error.signal)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        sys.exit(f"error: {error}. Make room for OUTPUT_DIR {output_dir}, and run again (a training: with --resume)")
