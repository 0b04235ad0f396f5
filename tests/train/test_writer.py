"""unitdist.train.writer: one write at a time, beside the training, its failures told and counted."""

import threading
import time

import pytest

from unitdist.errors import CheckpointError
from unitdist.train.writer import CheckpointWriter, Stall


def writer(told: list[str], *, asynchronous: bool = True) -> CheckpointWriter:
    return CheckpointWriter(asynchronous=asynchronous, max_failed_saves=2, tell=told.append)


def failing() -> None:
    raise CheckpointError("the disk is full")


def test_start_returns_while_the_write_goes_on_and_the_next_waits_for_it() -> None:
    told: list[str] = []
    ours, gate, order = writer(told), threading.Event(), []

    def slow() -> None:
        assert gate.wait(30)
        order.append("first")

    ours.start(slow, step=1)
    ours.poll()  # does not wait
    assert order == []
    threading.Timer(0.05, gate.set).start()
    ours.start(lambda: order.append("second"), step=2)
    assert order[0] == "first"
    ours.wait()
    assert order == ["first", "second"] and told == [] and ours.failure is None
    ours.close()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_failures_are_told_once_each_and_counted_in_a_row(asynchronous: bool) -> None:
    told: list[str] = []
    ours = writer(told, asynchronous=asynchronous)
    for step, write in enumerate((failing, lambda: None, failing)):
        ours.start(write, step=step)
        ours.wait()
        ours.poll()
    assert [text.partition(";")[2] for text in told] == [" failed saves in a row: 1 of 2 allowed"] * 2
    assert ours.gives_up is None and str(ours.failure) == "the disk is full"
    assert ours.lost_steps == {0, 2}
    ours.start(failing, step=3)
    ours.wait()
    told.clear()
    for write in (failing, lambda: None):  # while the ranks agree to end
        ours.start(write, step=4)
        ours.wait()
    assert str(ours.gives_up) == (
        "2 saves in a row failed (checkpoint.max_failed_saves); the last one: the disk is full"
    )
    assert told == ["the disk is full; the run is ending"]
    ours.close()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_our_own_mistake_in_a_write_ends_the_run_at_once(asynchronous: bool) -> None:
    told: list[str] = []
    ours = writer(told, asynchronous=asynchronous)
    ours.start(lambda: {}["a"], step=1)
    ours.wait()
    assert str(ours.failure) == "writing the checkpoint of step 1 failed with KeyError: 'a'"
    assert ours.gives_up is ours.failure and isinstance(ours.gives_up.__cause__, KeyError)
    ours.start(lambda: None, step=2)
    ours.wait()
    assert ours.failure is None and ours.gives_up is not None and told == []
    assert ours.lost_steps == {1}
    ours.close()


def test_close_lets_the_write_end() -> None:
    ours, done = writer([]), []
    ours.start(lambda: (time.sleep(0.1), done.append(True)), step=1)  # type: ignore[arg-type, return-value]
    ours.close()
    assert done == [True]


def test_stall_is_summed() -> None:
    ours = writer([])
    for _ in range(2):
        with Stall(ours):
            time.sleep(0.02)
    assert ours.stall_s >= 0.04
    ours.close()
