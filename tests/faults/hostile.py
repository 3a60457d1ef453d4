"""Files that were damaged at random: cases that their number makes, each read in a process of its own, and judged.

A case is right if its file is read, or refused by a ValueError that names it or a missing file. Wrong is another
exception, a signal, more than 10 seconds of the processor, or a gigabyte of memory. The number of a case is its seed,
so that one can be tried alone: SPARSEINST_CASE=17 python -m pytest tests/faults/test_hostile_images.py
"""

import os
import random
import resource
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.faults.child import Child, Outcome, num_cases

MAX_CPU_SECONDS = 10
MAX_GROWTH_KB = 2**20
# Beyond what the imports have mapped. More than the limit above, which says of what was used how much it was.
MAX_ADDRESS_SPACE = 8 * 2**30
# Against hanging; a machine that is busy with something else may be slow.
MAX_WALL_SECONDS = 90
NUM_WORKERS = 2

Prepare = Callable[[random.Random, int, Path], tuple[str, Callable[[], object]]]
# What messages name instead: of overrides, and of a json's pictures that are elsewhere.
NAMED_BESIDES = ("KEY VALUE overrides", "MODEL.DEVICE is", "/dev/zero")
# A folder that code in a file would make where the case runs.
CANARY = "made by code"


def run_cases(prepare: Prepare, folder: Path, short: int, full: int) -> None:
    """Run the cases in children, print how they ended, and fail where one is wrong.

    Args:
        prepare: makes a case in a child, from random numbers, the case's number and its folder. Returns of what kind it
            is, and what reads it.
        folder: what the cases have in common; each gets a folder of its own in it.
    """
    alone = os.environ.get("SPARSEINST_CASE")
    numbers = [int(alone)] if alone else range(num_cases(short, full))
    outcomes: dict[int, Outcome] = {}
    # From one thread: multiprocessing loses exit codes where several wait.
    running: dict[int, Child] = {}
    for number in numbers:
        running[number] = Child(_judge, prepare, number, str(folder))
        if len(running) == NUM_WORKERS:
            _wait_for_first(running, outcomes)
    while running:
        _wait_for_first(running, outcomes)
    wrong = {number: fault for number, outcome in outcomes.items() if (fault := _fault(outcome))}
    told = {number: _lines(outcome.output) for number, outcome in outcomes.items() if number not in wrong}
    seconds = {number: float(lines[-2]) for number, lines in told.items()}
    print(f"{len(outcomes)} cases, {len(wrong)} wrong")
    if seconds:
        slowest = max(seconds, key=seconds.__getitem__)
        print(f"slowest: case {slowest}, {seconds[slowest]:.2f} s")
    for line, count in sorted(Counter(lines[-1] for lines in told.values()).items()):
        print(f"{count:5} {line}")
    if alone:
        print(outcomes[int(alone)].output)
    assert not wrong, f"{len(wrong)} of {len(outcomes)}: " + "\n".join(f"case {n}: {f}" for n, f in wrong.items())


def _wait_for_first(running: dict[int, Child], outcomes: dict[int, Outcome]) -> None:
    number = next(iter(running))
    outcomes[number] = running.pop(number).wait(MAX_WALL_SECONDS)


def _judge(prepare: Prepare, number: int, folder: str) -> None:
    """In the child. Its last lines of output are how many seconds the reading took, and the outcome."""
    own = Path(folder) / f"case {number}"
    own.mkdir(exist_ok=True)
    os.chdir(own)
    kind, read = prepare(random.Random(f"{prepare.__name__} {number}"), number, own)
    names = [path.name for path in own.rglob("*")]
    _limit_resources()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = "read"
    start = time.perf_counter()
    try:
        read()
    except ValueError as error:
        text = str(error)
        # The folder is in the path of a file that the damaged one names and that does not exist.
        if not any(name in text for name in (*names, *NAMED_BESIDES, str(own))):
            raise AssertionError(f"the message names no file: {text}") from error
        print(text)
        outcome = "refused"
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > MAX_GROWTH_KB:
        raise AssertionError(f"it took {grown / 1024:.0f} MB")
    if (own / CANARY).exists():
        raise AssertionError("it ran code")
    shutil.rmtree(own)
    print(f"{seconds:.3f}\n{kind}: {outcome}")


def _limit_resources() -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = mapped + MAX_ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + MAX_CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def _fault(outcome: Outcome) -> str:
    if outcome.timed_out:
        return f"no end after {MAX_WALL_SECONDS} s"
    if outcome.signal is not None:
        return f"ended by signal {outcome.signal}"
    if outcome.exit_code != 0:
        return f"exit code {outcome.exit_code}, {_lines(outcome.output)[-1]}"
    return ""


def _lines(text: str) -> list[str]:
    return text.strip().splitlines() or [""]


def damaged(data: bytes, generator: random.Random) -> bytes:
    """Bytes with one to three damages: flipped bits, cuts, insertions, repetitions, huge numbers."""
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        if not data:
            break
        # Headers and tables are at both ends.
        size = len(data)
        place = generator.choice((generator.randrange(size), generator.randrange(min(size, 512))))
        place = generator.choice((place, place, size - 1 - place))
        length = generator.choice((1, 2, 4, 16, 100, size // 4))
        changed = bytearray(data)
        match generator.randrange(9):
            case 0 | 1:
                for _ in range(generator.choice((1, 1, 2, 8, 50))):
                    changed[generator.choice((place, generator.randrange(size)))] ^= 1 << generator.randrange(8)
            case 2:
                changed[place : place + length] = generator.randbytes(min(length, size - place))
            case 3:
                del changed[place:]
            case 4:
                del changed[place : place + length]
            case 5:
                changed[place:place] = generator.randbytes(length)
            case 6:
                changed[place:place] = changed[place : place + length] * generator.choice((1, 2, 50))
            case 7:
                changed[place : place + length] = bytes(min(length, size - place))
            case 8:
                layout = generator.choice(("<B", "<H", "<I", "<Q", ">H", ">I"))
                number = struct.pack(layout, _huge(8 * struct.calcsize(layout), generator))
                changed[place : place + len(number)] = number
        data = bytes(changed)
    return data


def _huge(num_bits: int, generator: random.Random) -> int:
    return (2 ** generator.choice((num_bits, num_bits - 1, num_bits // 2)) - generator.choice((1, 1, 2))) % 2**num_bits
