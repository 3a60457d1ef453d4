"""Train and evaluate SparseInst; the same as ``python -m sparseinst.tools.train_net``."""

from sparseinst.tools.train_net import cli

if __name__ == "__main__":
    cli()
