"""The harness itself: what it reports of a process that ends well, in an error, by a signal, or not at all."""

import os
import signal
import sys
import time

from tests.faults.child import EXIT_EXCEPTION, Child, run_in_child


def succeed(word):
    print(word)


def exit_with_message():
    sys.exit("error: no such file")


def fail():
    raise KeyError("annotation 7")


def die():
    os.kill(os.getpid(), signal.SIGSEGV)


def sleep():
    time.sleep(60)


def test_how_a_child_ends_is_told():
    done = run_in_child(succeed, "hello")
    assert (done.exit_code, done.signal, done.timed_out, done.output.strip()) == (0, None, False, "hello")
    stopped = run_in_child(exit_with_message)
    assert (stopped.exit_code, stopped.output.strip()) == (1, "error: no such file")
    failed = run_in_child(fail)
    assert failed.exit_code == EXIT_EXCEPTION and "KeyError: 'annotation 7'" in failed.output
    assert run_in_child(die).signal == signal.SIGSEGV
    late = run_in_child(sleep, timeout=0.5)
    assert late.timed_out and late.signal == signal.SIGKILL


def test_a_signal_reaches_the_child():
    child = Child(sleep)
    child.send(signal.SIGTERM)
    outcome = child.wait(10)
    assert outcome.signal == signal.SIGTERM and not outcome.timed_out
