"""train_net.py, where rank FAILING_RANK raises an exception in its fourth iteration."""

import os

from detectron2.utils import comm

from sparseinst.engine.trainer import Trainer
from sparseinst.tools.train_net import cli

run_step = Trainer.run_step


def failing_run_step(self):
    if self.iter == 3 and comm.get_rank() == int(os.environ["FAILING_RANK"]):
        raise RuntimeError("injected")
    run_step(self)


# At import, so that the processes that are spawned have it too.
Trainer.run_step = failing_run_step

if __name__ == "__main__":
    cli()
