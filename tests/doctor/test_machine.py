"""unitdist.doctor.machine: planted faults of disk, memory, ports, names and cores, as plain values."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doctor.checking import check
from unitdist.doctor import machine

GIB = 2**30


def test_disk_against_what_the_checkpoints_need() -> None:
    check(machine.check_disk(GIB, GIB // 2, files=3), "fault", "3 checkpoints of 512 MiB need 1.5 GiB")
    check(machine.check_disk(2 * GIB, GIB // 2, files=3), "warning")
    check(machine.check_disk(9 * GIB, GIB // 2, files=3), "ok")
    check(machine.check_disk(GIB // 9, None, files=3), "warning", "make room")


def test_small_shared_memory() -> None:
    check(machine.check_shared_memory(64 * 2**20, torchvision_workers=False), "fault", "--shm-size")  # Docker's default
    check(machine.check_shared_memory(512 * 2**20, torchvision_workers=True), "warning")
    check(machine.check_shared_memory(512 * 2**20, torchvision_workers=False), "note")
    check(machine.check_shared_memory(None, torchvision_workers=False), "warning", "no /dev/shm")
    check(machine.check_shared_memory(GIB, torchvision_workers=True), "ok")


def test_few_open_files() -> None:
    check(machine.check_open_files(128), "fault", "ulimit -n 65536")
    check(machine.check_open_files(1024), "note")
    check(machine.check_open_files(65536), "ok")


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_that_something_listens_on(busy_port: int) -> None:
    check(
        machine.check_port(busy_port, machine.port_error(busy_port), asked_for=True),
        "fault",
        "in use",
        "--rdzv-endpoint",
    )
    check(machine.check_port(busy_port, "in use", asked_for=False), "warning")


def test_a_free_port(busy_port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        free = probe.getsockname()[1]
    check(machine.check_port(free, machine.port_error(free), asked_for=True), "ok", str(free))


def test_host_name() -> None:
    check(
        machine.check_host_name("gpu7", machine.addresses_of("no-such-host.invalid")),
        "fault",
        "does not resolve",
        "/etc/hosts",
    )
    check(machine.check_host_name("gpu7", ["127.0.1.1", "::1"]), "note", "other nodes cannot reach it")
    check(machine.check_host_name("gpu7", ["10.0.0.7"]), "ok")


def test_cores_and_threads() -> None:
    check(machine.check_cores(4, 8, threads_per_rank=0, omp_threads="1"), "warning", "at most 4 ranks")
    check(machine.check_cores(8, 8, threads_per_rank=4, omp_threads="1"), "warning", "data.num_threads=1")
    check(machine.check_cores(8, 2, threads_per_rank=4, omp_threads="8"), "warning", "OMP_NUM_THREADS=4")
    check(machine.check_cores(64, 8, threads_per_rank=4, omp_threads=None), "ok")


def test_cores_of_a_container_are_its_quota(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000\n")
    assert machine.usable_cores(quota) == 1
    quota.write_text("max 100000\n")
    assert machine.usable_cores(quota) == machine.usable_cores(tmp_path / "none")


def test_restarts() -> None:
    check(
        machine.check_restarts({"TORCHELASTIC_MAX_RESTARTS": "3"}),
        "fault",
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    )
    check(machine.check_restarts({}), "note")
    check(machine.check_restarts({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}), "ok")
