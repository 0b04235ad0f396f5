"""unitdist.doctor.software: planted faults of packages, GPUs and compilers, as plain values; each is named and has a remedy of one line."""

import pytest

from tests.doctor.checking import check
from unitdist.doctor import software
from unitdist.doctor.software import Package, Torch

CPU = Torch(version="2.15.0", cuda="13.0", nccl="2.30.7", driver_cuda=None, gpus=())
GPU = Torch(version="2.15.0", cuda="13.0", nccl="2.30.7", driver_cuda=(13, 1), gpus=("H100",) * 2, num_devices=2)
OLD_DRIVER = Torch(version="2.15.0", cuda="12.8", nccl="2.30", driver_cuda=(12, 4), gpus=("A100",), num_devices=1)
DALI = Package(name="DALI", version="2.4.0")
DEEPSPEED = Package(name="DeepSpeed", version="0.19.8", detail="cuda")


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
    ("place", "error", "text", "remedy"),
    [
        ("", "ModuleNotFoundError: No module named 'torch'", "not installed", "pip install -c constraints.txt -e ."),
        (
            "/v/torch/__init__.py",
            "ImportError: libcudart.so.13",
            "cannot be imported from /v/torch",
            "--force-reinstall",
        ),
        ("/v/torch/__init__.py", "killed by SIGSEGV (signal 11)", "crashes when it is imported", "--force-reinstall"),
        ("/v/torch/__init__.py", "killed by SIGILL (signal 4)", "SIGILL", "this CPU lacks instructions"),
        ("/v/torch/__init__.py", "killed by SIGKILL (signal 9)", "SIGKILL", "memory"),
        ("/v/torch/__init__.py", "killed by SIGBUS (signal 7)", "SIGBUS", "/dev/shm"),
    ],
)
def test_torch_that_does_not_import(place: str, error: str, text: str, remedy: str) -> None:
    version = "2.15.0" if place else ""
    torch = Torch(version=version, cuda=None, nccl="", driver_cuda=None, gpus=(), import_error=error, place=place)
    check(software.check_torch_imports(torch), "fault", text, remedy)


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
