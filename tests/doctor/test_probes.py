"""unitdist.doctor.probes: what hangs or crashes is told, and does not take the doctor with it."""

from pathlib import Path

import pytest

from tests.doctor.checking import check
from unitdist.doctor import probes, software


def test_a_hanging_import_and_a_crashing_one_are_survived() -> None:
    assert probes.run_python("import time; time.sleep(60)", timeout_s=0.5) == ("", "no answer within 0.5 s")
    assert probes.run_python("print(1, flush=True); import time; time.sleep(60)", timeout_s=2)[0] == "1"
    assert probes.run_python("import os; os.kill(os.getpid(), 11)")[1] == "killed by SIGSEGV (signal 11)"
    assert probes.run_python("import no_such_package")[1] == "ModuleNotFoundError: No module named 'no_such_package'"


WORKS_UNTIL_THE_GPU = """
class version:
    cuda = "13.0"
class cuda:
    def is_available(): return True
    def device_count(): return 1
    def get_device_name(i): return "H100"
    class nccl:
        def version(): return (2, 30, 7)
__version__ = "2.15.0"
def ones(*shape, device):
    import os
    os.abort()
"""


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> Path:
    """A torch of our own before the real one, for the processes that the probes start."""
    package = folder / "torch"
    (package / "distributed").mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    (package / "distributed" / "__init__.py").write_text("def is_nccl_available(): return True\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return package


def test_a_torch_that_crashes_on_a_gpu_is_not_taken_for_one_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(monkeypatch, tmp_path, WORKS_UNTIL_THE_GPU)
    torch = probes.torch_facts()
    assert (torch.version, torch.cuda, torch.nccl, torch.import_error) == ("2.15.0", "13.0", "2.30.7", "")
    check(software.check_torch(torch), "ok", "built for CUDA 13.0")
    check(software.check_gpus(torch), "fault", "torch crashed on a GPU: killed by SIGABRT (signal 6)", "dmesg")
    assert software.check_torch_imports(torch) is None


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise ImportError('libcudart.so.13: no such file')", "cannot be imported from"),
        ("import os; os.kill(os.getpid(), 4)", "killed by SIGILL (signal 4)"),
        ("raise SystemExit(0)", "the process ended without a word"),
        ("", "AttributeError"),
    ],
)
def test_a_torch_that_does_not_import_is_told_with_its_reason_and_place(
    source: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = plant(monkeypatch, tmp_path, source)
    monkeypatch.setattr(probes, "torch_place", lambda: str(package))  # this process has imported the real one
    check(software.check_torch_imports(probes.torch_facts()), "fault", words, str(package))


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
