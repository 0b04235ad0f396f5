"""Python packages, GPUs and compilers: verdicts on what `probes` saw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unitdist.doctor.finding import Finding, fault, note, ok, warning

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
_INSTALL = "pip install -c constraints.txt -e ."
_REINSTALL = "pip install --force-reinstall torch -c constraints.txt, or a fresh virtual environment"
DALI_WHEELS = ("nvidia-dali-cuda110", "nvidia-dali-cuda120", "nvidia-dali-cuda130")


@dataclass(frozen=True, kw_only=True)
class Package:
    """`version`: installed, or None. `error`: the last line of a failed import, "" if it imports. `detail`: what it printed."""

    name: str
    version: str | None
    error: str = ""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Torch:
    """`cuda`: the CUDA that torch was built for, such as "13.0"; None for a CPU or ROCm build. `nccl`: its version or "".

    `driver_cuda`: the newest CUDA that the driver can do, as (13, 0); None without a driver. `gpus`: those that
    torch sees; `gpu_error`: why a computation on one of them failed. `visible`: CUDA_VISIBLE_DEVICES, None if not set.
    `num_devices`: GPUs that the driver lists, whatever torch sees.
    `import_error`: why torch does not import, "" if it does; then `place` is the file or folder that the import takes, "" for
    none, `version` that of the installed package, "" for none, and what only torch could tell is empty.
    """

    version: str
    cuda: str | None
    nccl: str
    driver_cuda: tuple[int, int] | None
    gpus: tuple[str, ...]
    gpu_error: str = ""
    import_error: str = ""
    place: str = ""
    num_devices: int = 0
    visible: str | None = None

    @property
    def cuda_major(self) -> int | None:
        return None if self.cuda is None else int(self.cuda.partition(".")[0])


def check_python(version: Sequence[int]) -> Finding:
    """`version`: as in sys.version_info."""
    text = ".".join(map(str, version[:3]))
    if tuple(version[:2]) < OLDEST_PYTHON:
        return fault("Python", text, "unitdist needs Python >= 3.11: make a virtual environment with it")
    return ok("Python", text)


def check_torch_imports(torch: Torch) -> Finding | None:
    """None where torch imports."""
    if not torch.import_error:
        return None
    if not torch.place:
        return fault("torch", "not installed" if not torch.version else torch.import_error, _INSTALL)
    version = f"{torch.version} " if torch.version else ""
    if torch.import_error.startswith("killed by"):
        why = f"{version}crashes when it is imported from {torch.place}: {torch.import_error}"
    else:
        why = f"{version}cannot be imported from {torch.place}: {torch.import_error}"
    return fault("torch", why, _after(torch.import_error))


def _after(error: str) -> str:
    """The remedy for a torch that does not import."""
    if "SIGKILL" in error:
        return "memory ran out, or something killed it: dmesg, the container's memory limit"
    if "SIGILL" in error:
        return "this CPU lacks instructions that the build uses: install another build (pytorch.org/get-started)"
    if "SIGBUS" in error:
        return "look for a full disk or /dev/shm (df -h) and disk errors (dmesg), then: " + _REINSTALL
    return f"if that is no installed torch, rename it or leave its folder; else {_REINSTALL}"


def check_torch(torch: Torch) -> Finding:
    build = f"built for CUDA {torch.cuda}" if torch.cuda else "a build without CUDA"
    driver = f"; the driver can do CUDA {_dotted(torch.driver_cuda)}" if torch.driver_cuda else "; no NVIDIA driver"
    text = f"{torch.version}, {build}{driver}"
    if tuple(int(part) for part in torch.version.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        return fault("torch", text, f"unitdist needs torch >= 2.11: {_INSTALL}")
    return ok("torch", text)


def check_gpus(torch: Torch) -> Finding:
    if torch.gpu_error:
        crashed = torch.gpu_error.startswith("killed by")
        return fault(
            "GPUs",
            f"{'torch crashed on a GPU' if crashed else 'a computation on a GPU failed'}: {torch.gpu_error}",
            "install a torch build for this GPU and driver (pytorch.org/get-started); look at nvidia-smi and dmesg",
        )
    if torch.gpus:
        kinds = {name: torch.gpus.count(name) for name in torch.gpus}
        return ok("GPUs", ", ".join(f"{count} x {name}" for name, count in kinds.items()))
    if torch.num_devices and torch.visible is not None:
        return warning(
            "GPUs",
            f"{torch.num_devices} in the machine, none visible (CUDA_VISIBLE_DEVICES={torch.visible!r})",
            "unset CUDA_VISIBLE_DEVICES, or list the GPUs to use",
        )
    if torch.num_devices and torch.cuda is None:
        return fault(
            "GPUs",
            f"{torch.num_devices} in the machine, but this torch is a build without CUDA",
            "pip install a torch built for CUDA (pytorch.org/get-started)",
        )
    if torch.num_devices:
        can = "" if torch.driver_cuda is None else f" (CUDA {_dotted(torch.driver_cuda)})"
        return fault(
            "GPUs",
            f"{torch.num_devices} in the machine, but torch for CUDA {torch.cuda} cannot use them with this driver{can}",
            f"update the NVIDIA driver, or install a torch built for CUDA{can or ' of this driver'}",
        )
    return note("GPUs", "none: a training here runs on CPU processes")


def check_nccl(torch: Torch) -> Finding:
    if torch.nccl:
        return ok("NCCL", f"{torch.nccl}{'' if torch.gpus else ' (not used without a GPU; gloo is)'}")
    if len(torch.gpus) > 1:
        return fault(
            "NCCL", f"not in this torch, with {len(torch.gpus)} GPUs", "pip install an official torch build for Linux"
        )
    return note("NCCL", "not in this torch: one GPU, or CPU processes over gloo")


def check_package(package: Package, *, required: bool, install: str, purpose: str) -> Finding:
    """A package that has to import. `install`: the command that brings it."""
    missing = fault if required else note
    if package.version is None:
        return missing(package.name, f"not installed: {purpose}", install)
    if package.error:
        broken = fault if required else warning
        return broken(package.name, f"{package.version} does not import: {package.error}", f"reinstall it: {install}")
    return ok(package.name, package.version + (f", {package.detail}" if package.detail else ""))


def check_dali(package: Package, wheels: Mapping[str, str], torch: Torch, *, required: bool) -> Finding:
    """`package`: how nvidia.dali imports. `wheels`: wheel name -> version of those installed."""
    major = torch.driver_cuda[0] if torch.driver_cuda else torch.cuda_major
    fitting = "nvidia-dali-cuda120" if major == 12 else "nvidia-dali-cuda130"
    install = f"pip install -c constraints.txt -e '.[dali-cuda{fitting[-3:-1]}]'"
    if not wheels:
        missing = fault if required else warning
        return missing(
            "DALI", f"not installed; {fitting} is the build for this machine", f"{install}; or data.loader=torchvision"
        )
    listed = ", ".join(f"{name} {version}" for name, version in wheels.items())
    if len(wheels) > 1:
        return fault(
            "DALI", f"{listed}: they overwrite each other's files", f"pip uninstall -y {' '.join(wheels)}; {install}"
        )
    built_for = int(next(iter(wheels))[-3:-1])
    if torch.driver_cuda and built_for > torch.driver_cuda[0]:
        return fault(
            "DALI",
            f"{listed} needs a driver for CUDA {built_for}, this one can do {_dotted(torch.driver_cuda)}",
            f"pip uninstall -y {next(iter(wheels))}; {install}; or update the driver",
        )
    if package.error:
        broken = fault if required else warning
        return broken("DALI", f"{listed} does not import: {package.error}", f"reinstall it: {install}")
    if torch.gpus and torch.cuda_major and built_for < torch.cuda_major:
        return warning(
            "DALI",
            f"{listed} beside torch for CUDA {torch.cuda}: runs, with a second set of CUDA libraries",
            f"pip uninstall -y {next(iter(wheels))}; {install}",
        )
    return ok("DALI", f"{listed}{'' if torch.gpus else ', on the CPU'}")


def check_deepspeed(package: Package, torch: Torch, *, has_transformers: bool, required: bool) -> Finding:
    """`package.detail`: the name of DeepSpeed's accelerator."""
    install = "pip install -c constraints.txt -e '.[deepspeed]'"
    finding = check_package(package, required=required, install=install, purpose="needed for train.engine=deepspeed")
    if finding.level != "ok":
        return finding
    complain = fault if required else warning
    if not has_transformers:
        return complain(
            "DeepSpeed", f"{package.version}, but Accelerate's DeepSpeed path imports transformers", install
        )
    expected = "cuda" if torch.gpus else "cpu"
    text = f"{package.version}, accelerator {package.detail}"
    if package.detail != expected:
        return complain("DeepSpeed", f"{text}, expected {expected}", f"export DS_ACCELERATOR={expected}")
    return ok("DeepSpeed", text)


def check_compiler(compiler: str | None, error: str, *, has_ninja: bool, required: bool) -> Finding:
    """`compiler`: its path. `error`: why a small program with Python.h did not compile, "" if it did."""
    complain = fault if required else warning
    what = "torch.compile, Triton and DeepSpeed's extension need one"
    if compiler is None:
        return complain("compiler", f"no C++ compiler: {what}", "apt install g++ python3-dev, or set CXX")
    if error:
        return complain(
            "compiler", f"{compiler} cannot compile against Python.h: {error}", "apt install g++ python3-dev"
        )
    if not has_ninja:
        return note("compiler", f"{compiler}; no ninja, which DeepSpeed's extension needs", "pip install ninja")
    return ok("compiler", f"{compiler}, ninja")


def check_extension_locks(locks: Mapping[str, float]) -> Finding | None:
    """`locks`: path of a lock -> its age in seconds. A killed build leaves one, and every later build waits for it."""
    old = [path for path, age_s in locks.items() if age_s > 900]
    if not old:
        return None
    return fault(
        "extensions", f"an interrupted build left {old[0]}: later builds wait for it forever", f"rm {' '.join(old)}"
    )


def _dotted(version: tuple[int, int] | None) -> str:
    return "unknown" if version is None else f"{version[0]}.{version[1]}"
