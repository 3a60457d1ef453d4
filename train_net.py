from sparseinst.tools.train_net import cli

if __name__ == "__main__":
    cli()
