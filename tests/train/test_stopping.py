"""unitdist.train.stopping: the first signal is a request, its repeats are not, a later one is an order."""

import os
import signal
import subprocess
import sys

import pytest

from unitdist.train.stopping import REPEAT_S, Stopped, StopRequest
from unitdist.world import World


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_met_at_the_next_check_and_its_repeats_change_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    request = StopRequest(World.single())
    try:
        request.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match=number.name):
            request.check()
    finally:
        request.close()
    assert signal.getsignal(number) == before


def test_a_later_second_signal_leaves_at_once() -> None:
    code = (
        "import os, signal; from unitdist.train import stopping; from unitdist.world import World; stopping.REPEAT_S = 0.0\n"
        "request = stopping.StopRequest(World.single())\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR1); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGUSR1 and "still here" not in done.stdout
    assert REPEAT_S < 30
