"""A real SLURM of two virtual nodes on this machine, without systemd: Debian's packages, all state in one folder.

Needs root and slurmctld, slurmd, sbatch, munged (apt-get install slurmctld slurmd slurm-client munge).
"""

import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel", "munged")

SLURM_CONF = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge/sock
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldPidFile={state}/run/slurmctld.pid
SlurmdPidFile={state}/run/slurmd.%n.pid
SlurmdSpoolDir={state}/spool.%n
StateSaveLocation={state}/ctld
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/slurmd.%n.log
ReturnToService=2
SlurmdTimeout=300
KillWait=30
JobRequeue=1
GresTypes=gpu
"""


def why_not() -> str | None:
    """The reason why no SLURM can be started here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"SLURM cannot be started: {', '.join(missing)} not installed"
    return None if os.geteuid() == 0 else "SLURM cannot be started: its daemons need root here"


@contextmanager
def running_slurm(state: Path, nodes: int = 2) -> Iterator[dict[str, str]]:
    """Start it, yield the environment with SLURM_CONF, stop it. Null devices stand in for 8 GPUs a node."""
    for name in ("ctld", "log", "run", "munge", "dev", *(f"spool.n{node}" for node in range(1, nodes + 1))):
        (state / name).mkdir(parents=True, mode=0o755)
    for parent in (state, state.parent, state.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o711)  # munge refuses a socket below folders that others cannot enter
    port = 16800 + os.getpid() % 40 * 4
    lines = [SLURM_CONF.format(host=socket.gethostname().split(".")[0], state=state, port=port)]
    for node in range(1, nodes + 1):
        lines.append(
            f"NodeName=n{node} NodeHostname={socket.gethostname().split('.')[0]} NodeAddr=127.0.0.1 Port={port + node} CPUs=64 "
            "RealMemory=8000 Gres=gpu:8 State=UNKNOWN\n"
        )
    lines.append(f"PartitionName=debug Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP\n")
    (state / "slurm.conf").write_text("".join(lines))
    for gpu in range(8):
        os.mknod(state / "dev" / f"gpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (state / "gres.conf").write_text(f"Name=gpu File={state}/dev/gpu[0-7]\n")
    key = state / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(state / "slurm.conf")}
    munge = ["munged", "--force"]
    munge += [f"--{name}={state}/munge/{file}" for name, file in MUNGE_FILES.items()]
    subprocess.run(munge, check=True, timeout=30)
    try:
        subprocess.run(["slurmctld", "-c", "-f", state / "slurm.conf"], env=environment, check=True, timeout=30)
        for node in range(1, nodes + 1):
            subprocess.run(
                ["slurmd", "-N", f"n{node}", "-f", state / "slurm.conf"], env=environment, check=True, timeout=30
            )
        _wait_until_idle(environment, nodes)
        yield environment
    finally:
        subprocess.run(["scontrol", "shutdown"], env=environment, timeout=60)
        os.kill(int((state / "munge" / "pid").read_text()), 15)


MUNGE_FILES = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def _wait_until_idle(environment: dict[str, str], nodes: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        answer = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True, timeout=30
        )
        if answer.stdout.split() == ["idle"] * nodes:
            return
        time.sleep(0.3)
    raise AssertionError(f"the nodes did not become idle: {answer.stdout} {answer.stderr}")
