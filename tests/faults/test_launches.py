"""Every way to start several processes: they train to the same weights; what is wrong with a setup is said once."""

import pytest
import torch

from tests.distributed.commands import Command, by_launch, by_torchrun, by_two_machines, free_port, write_workspace
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import OPTS, train
from tests.faults.child import num_cases
from tests.shapes_data import write_shapes


def nodes(port, rank, num_nodes=2):
    return ["--nnodes", num_nodes, "--node_rank", rank, "--nproc_per_node", 1, "--master_addr", "127.0.0.1",
            "--master_port", port]  # fmt: skip


LAUNCHES = {
    "torchrun": lambda port, *args: [by_torchrun(*args)],
    "launch on two machines": lambda port, *args: [by_two_machines(port, machine, *args) for machine in range(2)],
    "launch": lambda port, *args: [by_launch(*args)],
    "torchrun on two machines": lambda port, *args: [by_torchrun(*args, nodes=nodes(port, node)) for node in range(2)],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Weights of two ranks that this process has started itself."""
    folder = tmp_path_factory.mktemp("reference")
    return run_ranks(2, train, write_shapes(folder, 6), str(folder))[0]


@pytest.mark.parametrize("name", list(LAUNCHES)[: num_cases(1, 4)])
def test_trains_to_the_same_weights(reference, tmp_path, name):
    args = [*write_workspace(tmp_path, *OPTS), "OUTPUT_DIR", tmp_path / "out"]
    launched = LAUNCHES[name](free_port(), *args)
    commands = [Command(command, tmp_path / str(index)) for index, command in enumerate(launched)]
    try:
        assert [command.wait() for command in commands] == [0] * len(commands), commands[0].stderr
    finally:
        for command in commands:
            command.kill()
    saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    assert saved.keys() == reference.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in reference.items())
    # Only the first machine's first process speaks.
    assert commands[0].stdout.count("Results and speed are in") == 1
    assert all("Results" not in command.stdout for command in commands[1:])


@pytest.mark.parametrize("name", ["launch", "torchrun"][: num_cases(1, 2)])
def test_an_error_in_the_setup_is_said_once(tmp_path, name):
    args = [*write_workspace(tmp_path), "OUTPUT_DIR", tmp_path / "out", "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 80]
    (command,) = LAUNCHES[name](0, *args)
    command = Command(command, tmp_path / "command")
    try:
        assert command.wait() == 1
    finally:
        command.kill()
    lines = [line for line in command.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "MODEL.SPARSE_INST.DECODER.NUM_CLASSES 4" in lines[0]
    assert name == "torchrun" or "Traceback" not in command.stderr
