"""How much of the machine other programs took, and what the kernel says of our threads: Linux only (/proc)."""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

QUIET_SHARE = 0.05
"""Other programs may use this share of the cores during a measurement that counts."""


def own_cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def busy_cpu_seconds(stat: str) -> float:
    """Seconds of all cores that were not idle since the start, from the text of /proc/stat."""
    user, nice, system, idle, iowait, *others = (int(field) for field in stat.split("\n")[0].split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Clock, busy seconds of the machine and of this process."""

    clock: float
    machine: float
    own: float

    @classmethod
    def now(cls) -> "Moment":
        machine = busy_cpu_seconds(Path("/proc/stat").read_text())
        return cls(clock=time.perf_counter(), machine=machine, own=own_cpu_seconds())

    def others_since(self) -> float:
        """Share of all cores that other programs used since this moment, in [0, 1]; to about 0.02 within a second."""
        now = Moment.now()
        others = (now.machine - self.machine) - (now.own - self.own)
        return max(others, 0.0) / ((now.clock - self.clock) * (os.cpu_count() or 1))


def waited_for_core_s() -> float:
    """Seconds in which this thread could have run and had no core: other programs' doing, in a program with a core to spare."""
    _, waited_ns, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return int(waited_ns) / 1e9


def load_average() -> str:
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
