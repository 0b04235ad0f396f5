"""Who this process is among all processes of the job, read once from the environment.

torchrun, accelerate and deepspeed say it in RANK, WORLD_SIZE, LOCAL_RANK; Open MPI, MPICH and Intel MPI in their own
variables; srun in SLURM_*. A launch that would run N lonely trainings is an error here, not a slow success.
"""

import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from unitdist.errors import ConfigError
from unitdist.wording import counted

_FIRST_PORT, _PORTS = 20000, 10000  # below the ports that Linux hands out by itself (32768 and up)


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank and size of the job as the launcher announced them.

    Fields: `rank` in [0, size), `local_rank` in [0, local_size) on this node, `size` processes in the
    job, `local_size` processes on this node.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise ConfigError(
                f"the launcher announced an impossible world: RANK={self.rank} WORLD_SIZE={self.size} "
                f"LOCAL_RANK={self.local_rank} LOCAL_WORLD_SIZE={self.local_size}"
            )

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone prints and writes what all ranks share."""
        return self.rank == 0

    @classmethod
    def single(cls) -> "World":
        """The world of one process."""
        return cls(rank=0, local_rank=0, size=1, local_size=1)

    @classmethod
    def unread(cls, environment: Mapping[str, str] | None = None) -> "World":
        """A stand-in for reporting an error of `from_environment`: the first process of a node speaks, the others are silent."""
        told = (os.environ if environment is None else environment).get("LOCAL_RANK", "0")
        local_rank = int(told) if told.isdigit() else 0
        return cls(rank=local_rank, local_rank=local_rank, size=local_rank + 1, local_size=local_rank + 1)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "World":
        """The world that torchrun, accelerate, deepspeed, mpirun or srun announced; none of them: one process.

        The nearest launcher counts: torch's names, then MPI's, then SLURM's. Raises ConfigError when
        the variables are incomplete, are not numbers, or belong to a launch of lonely trainings.
        """
        env = os.environ if environment is None else environment
        if "RANK" in env or "WORLD_SIZE" in env:
            return _from_torch(env)
        if "OMPI_COMM_WORLD_SIZE" in env:
            return _from_names(
                env,
                "mpirun (Open MPI)",
                rank="OMPI_COMM_WORLD_RANK",
                local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
                size="OMPI_COMM_WORLD_SIZE",
                local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
            )
        in_slurm_step = "SLURM_STEP_NUM_TASKS" in env
        # srun --mpi=pmi2 sets PMI_* too, but not the local ones; then SLURM's own say more.
        if "PMI_SIZE" in env and ("MPI_LOCALNRANKS" in env or not in_slurm_step):
            return _from_names(
                env,
                "mpiexec (MPICH, Intel MPI)",
                rank="PMI_RANK",
                local_rank="MPI_LOCALRANKID",
                size="PMI_SIZE",
                local_size="MPI_LOCALNRANKS",
            )
        if in_slurm_step:
            return _from_slurm_step(env)
        _refuse_lonely_process(env)
        return cls.single()


def announce_world(environment: MutableMapping[str, str] | None = None) -> World:
    """The world of this process, said again in torch's names, so that `init_process_group` and Accelerate find it.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT (what is set already stays) where
    srun or mpirun started several processes. Raises ConfigError as `World.from_environment` does,
    and where the address of rank 0 cannot be known.
    """
    env = os.environ if environment is None else environment
    world = World.from_environment(env)
    if world.size == 1 or "RANK" in env:
        return world
    address = env.get("MASTER_ADDR") or _master_address(env, world)
    port = env.get("MASTER_PORT") or _master_port(env)
    env.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.local_size),
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )
    return world


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"the environment's {name} must be a whole number, got {env[name]!r}") from None


def _from_torch(env: Mapping[str, str]) -> World:
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in env]
    if missing:
        raise ConfigError(
            f"the environment names only part of a distributed job: {', '.join(missing)} missing; "
            "start with torchrun, accelerate launch, deepspeed, srun or mpirun"
        )
    size = _number(env, "WORLD_SIZE")
    _refuse_lonely_group(env, size)
    _refuse_hanging_restarts(env)
    local_sizes = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if env.get(name)]  # the second is deepspeed's
    if local_sizes:
        local_size = _number(env, local_sizes[0])
    elif "SLURM_STEP_NUM_TASKS" in env and _number(env, "SLURM_STEP_NUM_TASKS") == size:
        local_size = _slurm_local_size(env)
    else:
        local_size = size
    return World(rank=_number(env, "RANK"), local_rank=_number(env, "LOCAL_RANK"), size=size, local_size=local_size)


def _from_names(
    env: Mapping[str, str], launcher: str, *, rank: str, local_rank: str, size: str, local_size: str
) -> World:
    missing = [name for name in (rank, local_rank, size, local_size) if name not in env]
    if missing:
        raise ConfigError(
            f"{launcher} announced only part of the job: {', '.join(missing)} missing; "
            "pass the environment on, or start torchrun on each node instead"
        )
    return World(
        rank=_number(env, rank),
        local_rank=_number(env, local_rank),
        size=_number(env, size),
        local_size=_number(env, local_size),
    )


def _from_slurm_step(env: Mapping[str, str]) -> World:
    size = _number(env, "SLURM_STEP_NUM_TASKS")
    if size == 1:
        return World.single()
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID") if name not in env]
    if missing:
        raise ConfigError(
            f"srun announced only part of the job: {', '.join(missing)} missing; start with srun or torchrun"
        )
    return World(
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID"),
        size=size,
        local_size=_slurm_local_size(env),
    )


def _slurm_local_size(env: Mapping[str, str]) -> int:
    """Tasks of this step on this node, from SLURM_STEP_TASKS_PER_NODE such as "8(x3),4"."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    per_node: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE: {text!r} is not a list such as 8(x3),4; start with srun")
        per_node += [int(match[1])] * int(match[2] or 1)
    node = _number(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
    if node >= len(per_node):
        raise ConfigError(
            f"SLURM_NODEID: {node} is not among the {counted(len(per_node), 'node')} of SLURM_STEP_TASKS_PER_NODE"
        )
    return per_node[node]


def _refuse_lonely_group(env: Mapping[str, str], size: int) -> None:
    """A scheduler started several launchers, and this one formed a group of its own."""
    for scheduler, name in (("mpirun", "OMPI_COMM_WORLD_SIZE"), ("srun", "SLURM_STEP_NUM_TASKS")):
        if name not in env:
            continue
        tasks = _number(env, name)
        # torchrun and deepspeed say how many launchers found each other.
        launchers = next((_number(env, key) for key in ("GROUP_WORLD_SIZE", "CROSS_SIZE") if env.get(key)), None)
        lonely = size < tasks if launchers is None else launchers == 1
        if tasks > 1 and lonely:
            raise ConfigError(
                f"{scheduler} started {tasks} tasks, each in a world of its own with {counted(size, 'rank')}: "
                f"{tasks} lonely trainings; give torchrun --nnodes and --rdzv-endpoint (launch/slurm does), "
                "or start train.py itself as the tasks"
            )
        return


def _refuse_hanging_restarts(env: Mapping[str, str]) -> None:
    """torchrun keeps the rendezvous store over a restart: new ranks read the dead ranks' addresses there, and many hang."""
    restarts = _number(env, "TORCHELASTIC_MAX_RESTARTS") if "TORCHELASTIC_MAX_RESTARTS" in env else 0
    if restarts > 0 and env.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise ConfigError(
            f"torchrun --max-restarts={restarts} without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: its restarts hang often; "
            "set that variable for torchrun (the files in launch/ do)"
        )


def _refuse_lonely_process(env: Mapping[str, str]) -> None:
    """No launcher spoke, but the surroundings say that several processes were wanted."""
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_PORT" in env:
        raise ConfigError(
            "accelerate launch was asked for several processes and started one (distributed_type: MULTI_CPU without mpirun); "
            "use distributed_type: MULTI_GPU, also on CPUs (launch/accelerate/ddp_cpu.yaml)"
        )
    for name, things in (("SLURM_NTASKS", "tasks"), ("SLURM_JOB_NUM_NODES", "nodes")):
        if "SLURM_JOB_ID" in env and name in env and _number(env, name) > 1:
            raise ConfigError(
                f"this SLURM job has {env[name]} {things} ({name}), but one process was started in its batch shell; start with "
                "srun python ..., or with launch/slurm/submit.py"
            )


def _master_address(env: Mapping[str, str], world: World) -> str:
    """Where rank 0 listens."""
    if world.size == world.local_size:
        return "127.0.0.1"
    nodes = env.get("SLURM_STEP_NODELIST")
    if "OMPI_COMM_WORLD_SIZE" in env or "MPI_LOCALNRANKS" in env or not nodes:
        raise ConfigError(
            "MPI does not tell the address of rank 0 on several nodes; set it: "
            "mpirun -x MASTER_ADDR=$(hostname) ... (Open MPI) or mpiexec -genv MASTER_ADDR $(hostname) ..."
        )
    return slurm_node_address(first_slurm_node(nodes))


def first_slurm_node(nodes: str) -> str:
    """The first host of a SLURM list: "gpu[007-009,12],login" -> "gpu007"."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM's node list {nodes!r} cannot be read; set MASTER_ADDR to the first node")
    return match[1] + (match[2] or "") + (match[3] or "")


def slurm_node_address(node: str) -> str:
    """The address that SLURM itself uses for `node`; where scontrol is absent, the name, which then must resolve."""
    if shutil.which("scontrol") is None:
        return node
    answer = subprocess.run(
        ["scontrol", "show", "node", "-o", node], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    match = re.search(r"\bNodeAddr=(\S+)", answer.stdout)
    return match[1] if match else node


def _master_port(env: Mapping[str, str]) -> str:
    """The same on every rank, another one for each job, step and requeue that may share a node."""
    if "SLURM_JOB_ID" in env:
        job, step = _number(env, "SLURM_JOB_ID"), int(env.get("SLURM_STEP_ID") or 0)
        key = job * 7 + step * 131 + int(env.get("SLURM_RESTART_COUNT") or 0)
    else:
        # Open MPI names its jobs; MPICH does not, and then two jobs that share a node need MASTER_PORT.
        name = env.get("OMPI_MCA_ess_base_jobid") or env.get("PMIX_NAMESPACE") or ""
        key = zlib.crc32(name.encode())
    return str(_FIRST_PORT + key % _PORTS)
