"""Disk, memory, ports, names, cores: verdicts on plain values, and the two looks that need a socket."""

import errno
import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from unitdist.doctor.finding import Finding, fault, note, ok, warning
from unitdist.wording import counted

GIB = 2**30
MIB = 2**20
DEFAULT_PORT = 29500
SMALL_SHM_BYTES = 128 * MIB
AMPLE_SHM_BYTES = GIB
FEW_OPEN_FILES = 4096


def check_run_folder(folder: Path, error: str) -> Finding:
    """`error`: why a file could not be made there, "" if it could."""
    if error:
        return fault("run folder", f"cannot write to {folder}: {error}", "choose another: run.folder=DIR")
    return ok("run folder", f"{folder} is writable")


def check_disk(free_bytes: int, checkpoint_bytes: int | None, *, files: int) -> Finding:
    """`files`: checkpoints that lie on the disk at once, the one being written included."""
    free = f"{free_bytes / GIB:.1f} GiB free"
    if checkpoint_bytes is None:
        if free_bytes < GIB:
            return warning("disk", f"{free} at the run folder", "make room, or choose another run.folder")
        return note("disk", f"{free}; what checkpoints need is compared with --config (and with a torch that works)")
    needed = checkpoint_bytes * files
    text = f"{free}; {files} checkpoints of {checkpoint_bytes / MIB:,.0f} MiB need {needed / GIB:.1f} GiB"
    if free_bytes < needed:
        return fault("disk", text, "make room, or choose another run.folder")
    if free_bytes < 2 * needed:
        return warning("disk", text, "make room: logs, TensorBoard and further checkpoints come on top")
    return ok("disk", text)


def check_shared_memory(total_bytes: int | None, *, torchvision_workers: bool) -> Finding:
    """`total_bytes`: the size of /dev/shm, None where there is none."""
    remedy = "docker run --shm-size=8g (or --ipc=host); Kubernetes: an emptyDir of medium Memory at /dev/shm"
    if total_bytes is None:
        return warning("shared memory", "no /dev/shm", remedy)
    text = f"/dev/shm has {total_bytes / MIB:,.0f} MiB"
    if total_bytes < SMALL_SHM_BYTES:
        return fault("shared memory", f"{text}: NCCL and data workers fail with 'Bus error' or 'No space left'", remedy)
    if total_bytes < AMPLE_SHM_BYTES:
        complain = warning if torchvision_workers else note
        return complain("shared memory", f"{text}: little for data.loader=torchvision's workers", remedy)
    return ok("shared memory", text)


def check_open_files(soft_limit: int) -> Finding:
    text = f"{soft_limit:,} at most per process (ulimit -n)"
    if soft_limit < 256:
        return fault("open files", text, "ulimit -n 65536 before the start")
    if soft_limit < FEW_OPEN_FILES:
        return note("open files", f"{text}: few for many workers or ranks", "ulimit -n 65536 before the start")
    return ok("open files", text)


def port_error(port: int) -> str:
    """Why a server could not listen on `port`, "" if it could. Binds it for a moment, as the rendezvous does."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
            listener.listen()
    except OSError as error:
        return "in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
    return ""


def check_port(port: int, error: str, *, asked_for: bool) -> Finding:
    """`error`: as from `port_error`. A busy port that nobody named matters only to launches that take the default."""
    if not error:
        return ok("port", f"{port} is free on this node")
    complain = fault if asked_for else warning
    return complain(
        "port",
        f"{port}: {error}; torchrun's c10d rendezvous would wait on it in silence",
        "choose a free one: torchrun --rdzv-endpoint HOST:PORT (or --master-port); on one node torchrun --standalone",
    )


def addresses_of(name: str) -> list[str]:
    """The addresses that `name` resolves to, none if it does not."""
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError:
        return []


def check_host_name(name: str, addresses: list[str]) -> Finding:
    if not addresses:
        return fault(
            "host name",
            f"{name} does not resolve: ranks cannot find each other",
            f"add '127.0.1.1 {name}' to /etc/hosts",
        )
    text = f"{name} is {', '.join(addresses)}"
    if all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        return note("host name", f"{text}: enough for one node; other nodes cannot reach it by this name")
    return ok("host name", text)


def check_cores(cores: int, local_ranks: int, *, threads_per_rank: int, omp_threads: str | None) -> Finding:
    """`cores`: that this process may use. `omp_threads`: OMP_NUM_THREADS as set, None if it is not."""
    text = f"{cores} for {counted(local_ranks, 'rank')}"
    text += f", OMP_NUM_THREADS {omp_threads or 'not set'}"
    if local_ranks > cores:
        return warning("cores", text, f"start at most {counted(cores, 'rank')} here, or give the job more cores")
    if omp_threads and omp_threads.isdigit() and int(omp_threads) * local_ranks > cores:
        return warning("cores", text, f"export OMP_NUM_THREADS={max(1, cores // local_ranks)}")
    if threads_per_rank * local_ranks > cores:
        fitting = max(1, cores // local_ranks)
        return warning(
            "cores",
            f"{text}, data.num_threads {threads_per_rank} per rank",
            f"data.num_threads={fitting}, or more cores",
        )
    return ok("cores", text)


def check_restarts(environment: Mapping[str, str]) -> Finding:
    """torchrun's restarts come through only where workers do not share the agents' store (docs/clusters.md)."""
    safe = environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
    remedy = "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
    if safe:
        return ok("restarts", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    if int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        return fault("restarts", "torchrun is to restart ranks, and restarted ranks may hang", remedy)
    return note("restarts", "torchrun --max-restarts would hang at times as things are", remedy)


def usable_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use, by affinity and by the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
