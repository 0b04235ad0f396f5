"""launch/train.py with a fault put in from outside: FAULT=sleep|gil|raise, FAULT_RANK, FAULT_STEP.

sleep: the loader of that rank blocks at that step. gil: it blocks in native code that holds the interpreter, and no
signal ends that. raise: it raises an error of its own.
"""

import ctypes
import os
import runpy
import sys
import time
from pathlib import Path

from unitdist.train.batches_ahead import STEPS_AHEAD, BatchesAhead


def lock_twice() -> None:
    """A deadlock with itself."""
    mutex = ctypes.create_string_buffer(64)  # zeros: an open pthread_mutex_t
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


FAULTS = {
    "sleep": lambda: time.sleep(3600),
    "gil": lock_twice,
    "raise": lambda: (_ for _ in ()).throw(ValueError("a fault put in by a test")),
}
_fetch = BatchesAhead._fetch
_calls = 0


def faulty_fetch(self: BatchesAhead) -> None:
    """The first STEPS_AHEAD calls come before the first step, then one after each step."""
    global _calls
    _calls += 1
    if os.environ["RANK"] == os.environ["FAULT_RANK"] and _calls == STEPS_AHEAD + int(os.environ["FAULT_STEP"]):
        FAULTS[os.environ["FAULT"]]()
    _fetch(self)


if __name__ == "__main__":
    BatchesAhead._fetch = faulty_fetch
    script = Path(__file__).resolve().parents[2] / "launch" / "train.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
