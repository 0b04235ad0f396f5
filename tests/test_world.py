"""The world as each launcher announces it. The environments are recorded from the launchers, cut to what matters.

torchrun 2.15, accelerate 1.15, deepspeed 0.19.8, SLURM 22.05 and Open MPI 4.1 were recorded; MPICH and Intel MPI are from their
manuals.
"""

import os
from pathlib import Path

import pytest

from unitdist.errors import ConfigError
from unitdist.world import World, announce_world, first_slurm_node, slurm_node_address

TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "7",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "MASTER_ADDR": "gpu007",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "3",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
UNEVEN_SRUN = SRUN | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
SRUN_OF_TORCHRUN = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"} | TORCHRUN
BATCH_SHELL = {
    "SLURM_JOB_ID": "3",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
ACCELERATE_ALONE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}


@pytest.mark.parametrize(
    ("environment", "rank", "size", "local_rank", "local_size"),
    [
        pytest.param({}, 0, 1, 0, 1, id="python"),
        pytest.param(TORCHRUN, 9, 16, 1, 8, id="torchrun"),
        pytest.param(TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "no"}, 9, 16, 1, 8, id="accelerate"),
        pytest.param(ACCELERATE_ALONE, 0, 1, 0, 1, id="accelerate of one process"),
        pytest.param(DEEPSPEED, 3, 4, 1, 2, id="deepspeed"),
        pytest.param(SRUN, 2, 4, 0, 2, id="srun"),
        pytest.param(UNEVEN_SRUN, 2, 3, 0, 1, id="srun, uneven nodes"),
        pytest.param(SRUN | {"PMI_RANK": "2", "PMI_SIZE": "4"}, 2, 4, 0, 2, id="srun --mpi=pmi2"),
        pytest.param(SRUN_OF_TORCHRUN, 9, 16, 1, 8, id="srun torchrun"),
        pytest.param(BATCH_SHELL | {"SLURM_STEP_NUM_TASKS": "1"}, 0, 1, 0, 1, id="srun -n 1 on purpose"),
        pytest.param(
            {"SLURM_JOB_ID": "3", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}, 0, 1, 0, 1, id="sbatch -n 1"
        ),
        pytest.param(OPEN_MPI, 5, 8, 1, 4, id="Open MPI"),
        # Open MPI starts one daemon a node with srun: SLURM's numbers are the daemons'.
        pytest.param(SRUN | {"SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI, 5, 8, 1, 4, id="Open MPI within SLURM"),
        pytest.param(HYDRA, 1, 2, 1, 2, id="MPICH, Intel MPI"),
        pytest.param(SRUN | HYDRA, 1, 2, 1, 2, id="MPICH within SLURM"),
        pytest.param(
            SRUN | {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, 2, 4, 0, 2, id="srun, RANK exported by hand"
        ),
    ],
)
def test_world_is_what_the_launcher_announced(
    environment: dict[str, str], rank: int, size: int, local_rank: int, local_size: int
) -> None:
    world = World.from_environment(environment)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (rank, size, local_rank, local_size)


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        pytest.param(BATCH_SHELL, "has 4 tasks .SLURM_NTASKS., but one process", id="batch shell, several tasks"),
        pytest.param(BATCH_SHELL | {"SLURM_NTASKS": "1"}, "has 2 nodes", id="batch shell, several nodes"),
        pytest.param(
            SRUN_OF_TORCHRUN | {"GROUP_WORLD_SIZE": "1", "RANK": "1", "WORLD_SIZE": "8"},
            "srun started 2 tasks, each in a world of its own with 8 ranks: 2 lonely trainings",
            id="srun torchrun --standalone",
        ),
        pytest.param(
            SRUN | {"CROSS_SIZE": "1"} | {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"},
            "4 lonely",
            id="srun deepspeed",
        ),
        pytest.param(
            SRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "4 lonely", id="srun, WORLD_SIZE=1 by hand"
        ),
        pytest.param(
            OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "mpirun started 8", id="mpirun, by hand"
        ),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK, .* missing", id="mpirun, incomplete"),
        pytest.param(
            {"PMI_SIZE": "2", "PMI_RANK": "0"}, "MPI_LOCALRANKID, MPI_LOCALNRANKS missing", id="pmi, incomplete"
        ),
        pytest.param(
            {"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID missing", id="srun, incomplete"
        ),
        pytest.param(
            ACCELERATE_ALONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "use distributed_type: MULTI_GPU",
            id="MULTI_CPU",
        ),
        pytest.param({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK missing", id="RANK alone"),
        pytest.param(
            TORCHRUN | {"WORLD_SIZE": "eight"}, "WORLD_SIZE must be a whole number, got 'eight'", id="no number"
        ),
        pytest.param(TORCHRUN | {"RANK": "16"}, "impossible world", id="rank too large"),
        pytest.param(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "'two' is not a list", id="tasks per node"),
        pytest.param(UNEVEN_SRUN | {"SLURM_NODEID": "2"}, "2 is not among the 2 nodes", id="node id"),
    ],
)
def test_lonely_and_incomplete_launches_are_errors(environment: dict[str, str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        World.from_environment(environment)


def test_srun_tasks_are_announced_in_torch_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$5$4 NodeAddr=10.0.0.7 NodeHostName=x"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environment = dict(SRUN)
    world = announce_world(environment)
    announced = {name: value for name, value in environment.items() if not name.startswith("SLURM")}
    assert announced == {
        "RANK": "2",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "20021",
    }
    assert announce_world(environment) == world == World.from_environment(environment)


def test_ranks_of_a_step_agree_on_a_port_that_requeues_and_steps_do_not_share() -> None:
    ports = []
    for change in (
        {},
        {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
        {"SLURM_STEP_ID": "1"},
        {"SLURM_RESTART_COUNT": "1"},
    ):
        environment = SRUN | {"MASTER_ADDR": "here"} | change
        announce_world(environment)
        ports.append(environment["MASTER_PORT"])
        assert environment["MASTER_ADDR"] == "here"
    assert ports[0] == ports[1] and len(set(ports)) == 3


def test_mpi_on_one_node_needs_no_address_and_on_two_it_does() -> None:
    environment = dict(HYDRA)
    announce_world(environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(environment["MASTER_PORT"]) < 30000
    with pytest.raises(ConfigError, match="set it: mpirun -x MASTER_ADDR"):
        announce_world(dict(OPEN_MPI))


@pytest.mark.parametrize("environment", [{}, TORCHRUN, DEEPSPEED], ids=["python", "torchrun", "deepspeed"])
def test_nothing_is_announced_where_nothing_is_missing(environment: dict[str, str]) -> None:
    after = dict(environment)
    announce_world(after)
    assert after == environment


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007-009,12],login", "gpu007"),
        ("a-1,b", "a-1"),
        ("rack[3,5]-x", "rack3-x"),
    ],
)
def test_first_node_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_slurm_node(nodes) == first


def test_node_name_is_the_address_where_scontrol_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_node_address("gpu007") == "gpu007"


def test_restarts_that_would_hang_are_refused() -> None:
    restarting = TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "3"}
    with pytest.raises(ConfigError, match="torchrun --max-restarts=3 without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        World.from_environment(restarting)
    assert World.from_environment(restarting | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}).rank == 9
    assert World.from_environment(TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "0"}).rank == 9


@pytest.mark.parametrize(
    ("told", "local_rank"), [({}, 0), ({"LOCAL_RANK": "0"}, 0), ({"LOCAL_RANK": "3"}, 3), ({"LOCAL_RANK": "x"}, 0)]
)
def test_a_world_that_cannot_be_read_is_told_by_the_first_process_of_a_node(
    told: dict[str, str], local_rank: int
) -> None:
    assert World.unread(told).local_rank == local_rank
