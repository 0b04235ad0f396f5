"""Ranks that agree: on an error during set-up, on who speaks, on what rank 0 read."""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from unitdist.errors import TrainingError, UnitdistError
from unitdist.train.failure import raise_first
from unitdist.train.stopping import Stopped
from unitdist.world import World

T = TypeVar("T")


@contextlib.contextmanager
def agreed(world: World) -> Iterator[None]:
    """Around set-up work without collectives: if it fails on any rank, all ranks raise the first failing rank's error.

    So a file that is missing on one node ends the whole job at once, and one rank says why.
    """
    own: UnitdistError | None = None
    try:
        yield
    except UnitdistError as error:
        own = error
    if world.size == 1:
        if own is not None:
            raise own
        return
    raise_first(own)


def from_rank_zero(world: World, make: Callable[[], T]) -> T:
    """`make()` is called on rank 0, and what it returns reaches every rank; so does an error of unitdist."""
    box: list[T | None] = [None]
    with agreed(world):
        if world.is_main:
            box[0] = make()
    if world.size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


_AFTER_ITS_CAUSE_S = 10
"""torchrun takes the earliest failure, in whole seconds, for the root cause, and sees a killed rank a moment later than its
peers do: a rank that only lost contact dates its failure so much later."""


@contextlib.contextmanager
def reporting_errors(world: World, *, debug: bool) -> Iterator[None]:
    """Around a script's main: an error of unitdist becomes one line by one rank and its exit code, never a hang.

    A rank that only notices that another one has gone says that, in one line. With `debug` tracebacks are shown.
    Anything else is our own mistake and keeps its traceback. torchrun's own summary names the error too.
    """
    try:
        yield
    except UnitdistError as error:
        alike = error.speaker is None and not dist.is_initialized()  # every rank of this node read the same command
        if error.speaker == world.rank or (error.speaker is None and (world.local_rank == 0 or not alike)):
            if debug:
                traceback.print_exc()
            _say(world, str(error), kind="" if isinstance(error, Stopped) else "error: ")
        if not isinstance(error, Stopped):
            # On every rank: of those in the same second torchrun takes the lowest for the root cause.
            _tell_torchrun(f"{type(error).__name__}: {error}")
        # torchrun restarts workers that leave with another code than 0; what a stop left behind says status.json.
        _leave(0 if isinstance(error, Stopped) and "TORCHELASTIC_RUN_ID" in os.environ else error.exit_code)
    except KeyboardInterrupt:
        _say(world, "interrupted")
        _leave(130)
    except Exception as error:
        if not (isinstance(error, RuntimeError) and lost_contact(error)):
            if not dist.is_initialized():
                raise
            traceback.print_exc()
            get_error_handler().record_exception(error)
            _leave(TrainingError.exit_code)
        if debug:
            traceback.print_exc()
        reason = str(error).strip().partition("\n")[0]
        text = f"lost contact with another rank, whose own message says why it left ({reason})"
        _say(world, text)
        _tell_torchrun(text, later_s=_AFTER_ITS_CAUSE_S)
        _leave(TrainingError.exit_code)


def lost_contact(error: RuntimeError) -> bool:
    """True for the errors that gloo and NCCL raise when a peer has gone or does not answer in time."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Timed out waiting",
        "Broken pipe",
        "NCCL",
        "Socket closed",
    )
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or any(sign in str(error) for sign in signs)


def warn(world: World, message: str) -> None:
    """What goes wrong without ending the run: one loud line on stderr."""
    _say(world, message, kind="warning: ")


def _say(world: World, message: str, kind: str = "error: ") -> None:
    prefix = f"unitdist [rank {world.rank}]" if world.size > 1 else "unitdist"
    print(f"{prefix}: {kind}{message}", file=sys.stderr, flush=True)


def _tell_torchrun(message: str, *, later_s: int = 0) -> None:
    """For torchrun's own summary, in the format of its error files; without the traceback that torch would add."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        reply = {"message": message, "extraInfo": {"timestamp": str(int(time.time()) + later_s)}}
        Path(path).write_text(json.dumps({"message": reply}), encoding="utf-8")


def _leave(code: int) -> None:
    """No farewell to the process group: it would wait for ranks that may be gone, and so does Python's own way out."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
