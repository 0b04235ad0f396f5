"""unitdist.doctor: planted faults, given to the checks as plain values; each is named and has a remedy of one line."""

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from unitdist.config_file import load_config
from unitdist.doctor import machine, probes, ranks, screen, software
from unitdist.doctor.data_folder import check_data
from unitdist.doctor.examine import on_other_node
from unitdist.doctor.finding import Finding, fault, note, ok, warning
from unitdist.doctor.needs import Needs, needs_of
from unitdist.doctor.software import Package, Torch

GIB = 2**30
CPU = Torch(version="2.15.0", cuda="13.0", nccl="2.30.7", driver_cuda=None, gpus=())
GPU = Torch(version="2.15.0", cuda="13.0", nccl="2.30.7", driver_cuda=(13, 1), gpus=("H100",) * 2, num_devices=2)
OLD_DRIVER = Torch(version="2.15.0", cuda="12.8", nccl="2.30", driver_cuda=(12, 4), gpus=("A100",), num_devices=1)
DALI = Package(name="DALI", version="2.4.0")
DEEPSPEED = Package(name="DeepSpeed", version="0.19.8", detail="cuda")


def check(finding: Finding | None, level: str, *words: str) -> None:
    """The finding has that level, its lines hold the words, and what is wrong has a remedy."""
    assert finding is not None and finding.level == level
    for word in words:
        assert word in f"{finding.text}\n{finding.remedy}"
    assert finding.remedy or level in ("ok", "note")
    assert "\n" not in finding.text + finding.remedy


def test_old_python_and_old_torch() -> None:
    check(software.check_python((3, 10, 4)), "fault", "3.10.4", "Python >= 3.11")
    check(software.check_python((3, 11, 0)), "ok")
    check(
        software.check_torch(Torch(version="2.9.1+cu130", cuda="13.0", nccl="2", driver_cuda=None, gpus=())),
        "fault",
        "torch >= 2.11",
    )
    check(software.check_torch(GPU), "ok", "built for CUDA 13.0", "can do CUDA 13.1")


@pytest.mark.parametrize(
    ("torch", "level", "words"),
    [
        (GPU, "ok", "2 x H100"),
        (CPU, "note", "none"),
        (
            Torch(version="2.15", cuda=None, nccl="", driver_cuda=(13, 0), gpus=(), num_devices=8),
            "fault",
            "build without CUDA",
        ),
        (
            Torch(version="2.15", cuda="13.0", nccl="", driver_cuda=(12, 2), gpus=(), num_devices=8),
            "fault",
            "update the NVIDIA driver",
        ),
        (
            Torch(version="2.15", cuda="13.0", nccl="", driver_cuda=(13, 0), gpus=(), num_devices=8, visible=""),
            "warning",
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            Torch(
                version="2.15", cuda="13.0", nccl="", driver_cuda=(13, 0), gpus=("B200",), gpu_error="no kernel image"
            ),
            "fault",
            "no kernel image",
        ),
    ],
)
def test_gpus(torch: Torch, level: str, words: str) -> None:
    check(software.check_gpus(torch), level, words)


def test_nccl_missing_matters_with_several_gpus() -> None:
    check(
        software.check_nccl(Torch(version="2", cuda="13.0", nccl="", driver_cuda=(13, 0), gpus=("A", "A"))),
        "fault",
        "2 GPUs",
    )
    check(software.check_nccl(Torch(version="2", cuda=None, nccl="", driver_cuda=None, gpus=())), "note", "gloo")


def test_missing_and_broken_packages() -> None:
    missing = Package(name="timm", version=None)
    check(
        software.check_package(missing, required=True, install="pip install timm", purpose="networks"),
        "fault",
        "not installed",
        "pip install timm",
    )
    check(software.check_package(missing, required=False, install="pip install timm", purpose="networks"), "note")
    broken = Package(name="timm", version="1.0", error="ImportError: libx.so")
    check(
        software.check_package(broken, required=True, install="pip install timm", purpose="networks"),
        "fault",
        "libx.so",
        "reinstall",
    )


@pytest.mark.parametrize(
    ("wheels", "torch", "required", "level", "words"),
    [
        ({}, GPU, True, "fault", "nvidia-dali-cuda130 is the build for this machine"),
        ({}, OLD_DRIVER, False, "warning", "[dali-cuda12]"),
        (
            {"nvidia-dali-cuda130": "2.4.0"},
            OLD_DRIVER,
            False,
            "fault",
            "needs a driver for CUDA 13, this one can do 12.4",
        ),
        ({"nvidia-dali-cuda120": "2.4.0"}, GPU, False, "warning", "[dali-cuda13]"),
        (
            {"nvidia-dali-cuda120": "2.4.0", "nvidia-dali-cuda130": "2.4.0"},
            CPU,
            False,
            "fault",
            "pip uninstall -y nvidia-dali-cuda120 nvidia-dali-cuda130",
        ),
        ({"nvidia-dali-cuda130": "2.4.0"}, GPU, True, "ok", "nvidia-dali-cuda130 2.4.0"),
        ({"nvidia-dali-cuda120": "2.4.0"}, CPU, True, "ok", "on the CPU"),
    ],
)
def test_dali_has_to_fit_the_cuda_at_hand(
    wheels: dict[str, str], torch: Torch, required: bool, level: str, words: str
) -> None:
    check(software.check_dali(DALI, wheels, torch, required=required), level, words)


def test_dali_that_does_not_import_is_a_fault_where_the_config_asks_for_it() -> None:
    broken = Package(name="DALI", version="x", error="killed by signal 11")
    for required, level in ((True, "fault"), (False, "warning")):
        check(
            software.check_dali(broken, {"nvidia-dali-cuda130": "2.4.0"}, GPU, required=required),
            level,
            "killed by signal 11",
        )


def test_deepspeed() -> None:
    check(software.check_deepspeed(DEEPSPEED, GPU, has_transformers=True, required=True), "ok", "accelerator cuda")
    check(
        software.check_deepspeed(DEEPSPEED, CPU, has_transformers=True, required=True),
        "fault",
        "export DS_ACCELERATOR=cpu",
    )
    check(software.check_deepspeed(DEEPSPEED, GPU, has_transformers=False, required=True), "fault", "transformers")
    check(
        software.check_deepspeed(Package(name="DeepSpeed", version=None), GPU, has_transformers=True, required=False),
        "note",
    )
    check(
        software.check_deepspeed(Package(name="DeepSpeed", version=None), GPU, has_transformers=True, required=True),
        "fault",
    )


def test_compiler() -> None:
    check(
        software.check_compiler(None, "", has_ninja=True, required=True), "fault", "no C++ compiler", "apt install g++"
    )
    check(software.check_compiler(None, "", has_ninja=True, required=False), "warning")
    check(
        software.check_compiler("/usr/bin/g++", "Python.h: No such file", has_ninja=True, required=True),
        "fault",
        "python3-dev",
    )
    check(software.check_compiler("/usr/bin/g++", "", has_ninja=False, required=True), "note", "pip install ninja")


def test_lock_of_an_interrupted_build() -> None:
    check(software.check_extension_locks({"/x/lock": 4000.0}), "fault", "rm /x/lock")
    assert software.check_extension_locks({"/x/lock": 20.0}) is None  # a build that is going on


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


def test_clocks() -> None:
    hosts = ["a", "a", "b"]
    check(ranks.check_clocks({0: 0.0, 1: 0.001, 2: -0.002}, hosts), "ok", "3 ranks within 0.003 s")
    check(
        ranks.check_clocks({0: 0.0, 1: 0.0, 2: 2.5}, hosts), "warning", "rank 2 on b is ahead of rank 0 on a", "chrony"
    )
    check(ranks.check_clocks({0: 0.0, 1: 0.0, 2: -61.0}, hosts), "fault", "rank 0 on a is ahead of rank 2 on b")


def test_versions_between_ranks() -> None:
    check(ranks.check_same_software(["torch 2.15"] * 3, ["a", "a", "b"]), "ok")
    check(
        ranks.check_same_software(["torch 2.15", "torch 2.15", "torch 2.14"], ["a", "a", "b"]),
        "fault",
        "rank 2 on b runs torch 2.14",
    )


def test_only_what_another_node_has_of_its_own_is_told() -> None:
    known = [ok("data", "there"), fault("DALI", "not installed", "install it")]
    found = [
        fault("data", "no such folder", "mount it"),
        fault("DALI", "not installed", "install it"),
        note("port", "x"),
    ]
    assert on_other_node("b", found, known=known) == [fault("data", "b: no such folder", "mount it")]


def test_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    assert probes.write_error(tmp_path / "not" / "yet" / "there") == ""
    check(
        machine.check_run_folder(Path("/proc/nowhere"), probes.write_error(Path("/proc/nowhere"))),
        "fault",
        "run.folder=DIR",
    )


def test_a_hanging_import_and_a_crashing_one_are_survived() -> None:
    assert probes.run_python("import time; time.sleep(60)", timeout_s=0.5) == ("", "no answer within 0.5 s")
    assert probes.run_python("import os; os.kill(os.getpid(), 11)")[1] == "killed by signal 11"
    assert probes.run_python("import no_such_package")[1] == "ModuleNotFoundError: No module named 'no_such_package'"


def test_no_compiler_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert probes.compiler_facts()[0] is None


def test_a_compiler_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'probe.cpp:1: fatal error: Python.h: No such file or directory' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    path, error, _ = probes.compiler_facts()
    assert path == str(compiler) and "Python.h: No such file" in error


def test_locks_are_found_where_torch_keeps_its_extensions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "deepspeed_shm_comm").mkdir()
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.touch()
    monkeypatch.setattr(probes, "locks_by_kernel", lambda: False)
    assert list(probes.extension_locks()) == [str(lock)]


def test_a_file_that_torch_locks_through_the_kernel_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "lock").touch()
    monkeypatch.setattr(probes, "locks_by_kernel", lambda: True)
    assert probes.extension_locks() == {}


def test_the_installed_torch_is_asked_how_it_locks() -> None:
    from torch.utils import cpp_extension

    assert probes.locks_by_kernel() == hasattr(cpp_extension, "FileLock")


def test_data_folder(sample_data: Path, tmp_path: Path) -> None:
    check(check_data(sample_data), "ok", "16 classes in train and val")
    check(check_data(None), "note", "--data DIR")
    check(check_data(tmp_path / "none"), "fault", "no such folder")
    check(check_data(sample_data, val_split="validation"), "fault", "no such folder")
    check(check_data(tmp_path, image_folder=False), "note")


def test_data_folder_with_faults(sample_data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(sample_data, copy)
    (copy / "val" / "extra").mkdir()
    check(check_data(copy), "fault", "extra")
    (copy / "train" / "extra").mkdir()
    check(check_data(copy), "fault", "1 of 17 classes hold no image, extra for one")
    for split in ("train", "val"):
        shutil.rmtree(copy / split / "extra")
    first = sorted((copy / "train").iterdir())[0]
    for image in first.iterdir():
        image.write_bytes(image.read_bytes()[:300])
    check(check_data(copy), "fault", "does not decode", str(first))


def test_needs_come_from_the_config() -> None:
    assert needs_of(None, data=Path("x")) == Needs(data=Path("x"))
    needs = needs_of(load_config("demo.yaml", ["train.ema_decay=0.99"]), data=None)
    assert needs.dali and not needs.deepspeed and needs.data == Path("sample_data")
    assert needs.checkpoint_files == 4  # the last two, the best, and the one being written
    weights, moments, average = 4 * 11_185_296, 4 * 11_185_296, 4 * 11_185_296
    assert needs.checkpoint_bytes == pytest.approx(weights + moments + average, rel=0.01)
    assert needs_of(load_config("demo.yaml", ["train.engine=deepspeed"]), data=None).compiler


def test_screen_counts_and_shows_remedies() -> None:
    findings = [ok("a", "good"), warning("b", "slow", "do this"), fault("c", "broken", "do that")]
    text = screen.as_text(findings, colour=False)
    assert "FAULT    c  broken\n            -> do that" in text and "\033" not in text
    assert text.endswith("1 fault, 1 warning: mend the faults before a training")
    assert "\033[31;1mFAULT" in screen.as_text(findings, colour=True)


def test_folders_behind_one_that_may_not_be_entered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a user without the right to search the parent; root may enter everything, so `stat` says it for them."""
    stat, locked = os.stat, tmp_path / "locked"
    locked.mkdir()

    def refuse(path, *arguments, **options):
        if locked in Path(os.fsdecode(path)).parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refuse)
        finding = check_data(locked / "imagenet")
        place = probes.nearest_existing(locked / "runs" / "one")
    check(finding, "fault", f"cannot read {locked / 'imagenet'}: Permission denied")
    assert place == locked
