"""Looks that can hang or crash, each in a process of its own with a time limit; what comes back is plain values."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from unitdist.doctor.software import DALI_WHEELS, Package, Torch

TIMEOUT_S = 120
"""For one import. DeepSpeed's takes up to half a minute on a cold disk."""

_TORCH = """
import ctypes, json
driver = None
try:
    number = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value:
        driver = [number.value // 1000, number.value % 1000 // 10]
except OSError:
    pass
print("driver", json.dumps(driver), flush=True)
import torch, torch.distributed as dist
nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() and torch.version.cuda else ""
print("build", json.dumps([torch.__version__, torch.version.cuda, nccl]), flush=True)
gpus, error = [], ""
try:
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpus.append(torch.cuda.get_device_name(i))
        x = torch.ones(256, 256, device=f"cuda:{i}")
        if float((x @ x)[0, 0]) != 256:
            error = f"GPU {i} computes wrong numbers"
except Exception as failure:
    error = str(failure).strip().partition("\\n")[0]
print("gpus", json.dumps([gpus, error]), flush=True)
"""
"""A line for each stage, so that one that crashes shows how far it came."""
_IMPORTS = {
    "torchvision": "import torchvision, torchvision.ops",
    "timm": "import timm",
    "accelerate": "import accelerate",
    "Triton": "import triton",
    "DALI": "import nvidia.dali.fn, nvidia.dali.types",
    "DeepSpeed": "import deepspeed; print(deepspeed.get_accelerator()._name)",
}
"""Name on the screen -> what has to work; the last line that it prints is the package's detail."""

PACKAGES = tuple(_IMPORTS)
NEED_TORCH = tuple(name for name in PACKAGES if name != "DALI")

_TOGETHER = ("torchvision", "timm", "accelerate", "Triton")
"""Imported in one process, since each imports torch; only where that fails does each get its own."""


def torch_facts() -> Torch:
    """What torch says of itself, the driver and the GPUs; `import_error` or `gpu_error` say where it failed."""
    output, error = run_python(_TORCH)
    stages = dict(line.split(" ", 1) for line in output.splitlines() if line.startswith(("driver ", "build ", "gpus ")))
    driver = json.loads(stages.get("driver", "null"))
    driver_cuda = None if driver is None else (driver[0], driver[1])
    devices = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    error = error or "the process ended without a word"  # where a stage is missing
    if "build" not in stages:
        return Torch(
            version=installed_version("torch") or "",
            cuda=None,
            nccl="",
            driver_cuda=driver_cuda,
            gpus=(),
            import_error=error,
            place=torch_place(),
            num_devices=devices,
        )
    number, cuda, nccl = json.loads(stages["build"])
    gpus, gpu_error = json.loads(stages["gpus"]) if "gpus" in stages else ((), error)
    return Torch(
        version=number,
        cuda=cuda,
        nccl=nccl,
        driver_cuda=driver_cuda,
        gpus=tuple(gpus),
        gpu_error=gpu_error,
        num_devices=max(devices, len(gpus)),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def torch_place() -> str:
    """The file or folder that `import torch` takes, "" if there is none."""
    spec = find_spec("torch")  # not imported: this process would share its fate
    if spec is None:
        return ""
    return spec.origin or next(iter(spec.submodule_search_locations or ()), "")


def package_facts(names: Sequence[str]) -> dict[str, Package]:
    """Name on the screen -> how it imports; two processes at a time."""
    together = [name for name in names if name in _TOGETHER and installed_version(name.lower())]
    _, error = run_python("; ".join(_IMPORTS[name] for name in together))
    good = {} if error else {name: Package(name=name, version=installed_version(name.lower())) for name in together}
    rest = [name for name in names if name not in good]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return good | dict(zip(rest, pool.map(_package, rest), strict=True))


def _package(name: str) -> Package:
    installed = "; ".join(dali_wheels()) if name == "DALI" else installed_version(name.lower())
    if not installed:
        return Package(name=name, version=None)
    output, error = run_python(_IMPORTS[name])
    return Package(name=name, version=installed, error=error, detail=(output.splitlines() or [""])[-1])


def installed_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def dali_wheels() -> dict[str, str]:
    """Wheel -> version, of DALI's wheels that are installed."""
    found = {name: installed_version(name) for name in DALI_WHEELS}
    return {name: number for name, number in found.items() if number is not None}


def run_python(code: str, *, timeout_s: float = TIMEOUT_S) -> tuple[str, str]:
    """(what `code` printed in a fresh Python, why it failed: its last line, a signal, or the time limit; "" if it did not)."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as stopped:
        printed = stopped.stdout or b""  # bytes, whatever `text` says
        return printed.decode(errors="replace").strip(), f"no answer within {timeout_s:g} s"
    error = ""
    if done.returncode < 0:
        name = next((known.name for known in signal.Signals if known == -done.returncode), "a real-time signal")
        error = f"killed by {name} (signal {-done.returncode})"
    elif done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done.stdout.strip(), error


def compiler_facts() -> tuple[str | None, str, bool]:
    """(path of the C++ compiler or None, why a small program did not compile or "", whether ninja is there)."""
    ninja = shutil.which("ninja") is not None or installed_version("ninja") is not None
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        return None, "", ninja
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(
            "#include <Python.h>\n#include <vector>\nint probe() { return int(std::vector<int>(1).size()); }\n"
        )
        command = [
            compiler,
            "-c",
            str(source),
            "-o",
            str(source.with_suffix(".o")),
            "-I",
            sysconfig.get_path("include"),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return compiler, f"no answer within {TIMEOUT_S} s", ninja
    complaint = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
    return compiler, complaint if done.returncode else "", ninja


def extension_locks() -> dict[str, float]:
    """Path -> age in seconds of the locks in torch's folder of compiled extensions on which a build would wait.

    Empty where torch locks through the kernel (2.15 does), which frees the lock of a killed build; the file then stays and says nothing.
    """
    if locks_by_kernel():
        return {}
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(given) if given else Path.home() / ".cache" / "torch_extensions"
    now = time.time()
    return {str(path): now - path.stat().st_mtime for path in folder.glob("**/lock")}


def locks_by_kernel() -> bool:
    """Whether the installed torch's extension builds hold an advisory lock instead of a file that merely exists."""
    spec = find_spec("torch")  # not imported: this process stays light
    assert spec is not None and spec.origin is not None
    return "FileLock(" in (Path(spec.origin).parent / "utils" / "cpp_extension.py").read_text(encoding="utf-8")


def write_error(folder: Path) -> str:
    """Why a file cannot be made in `folder` (or, as long as it is not there, in its nearest parent that is), "" if it can."""
    place = nearest_existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".unitdist_doctor"):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def nearest_existing(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    return next(
        place for place in (folder, *folder.parents) if os.path.exists(place)
    )  # False behind a folder that may not be entered
