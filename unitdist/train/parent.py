"""Workers that end with their launcher."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel (Linux; elsewhere nothing happens) to send this process a signal when its launcher dies.

    SIGKILL for the ranks of a job, whose peers are gone too; SIGTERM lets a training by itself save and stop.
    Launchers start workers in sessions of their own: a SIGKILL of torchrun would leave them training, or waiting for
    peers for ever, holding ports, memory and the run folder.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the kernel was asked
        os.kill(os.getpid(), signal_number)
