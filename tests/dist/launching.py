"""Starting real jobs from tests: torchrun, accelerate, deepspeed, or plain Python, on the CPU with gloo."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def environment(**extra: str) -> dict[str, str]:
    """This environment, one thread a rank, no leftovers of a surrounding launcher, no warnings as errors."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("ACCELERATE_", "PYTEST_", "TORCHELASTIC_"))
        and key
        not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONWARNINGS")
    }
    kept.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    kept["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as every launcher in launch/ sets it
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} | extra


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def launch(command: list[str], *, timeout_s: int = 240, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run to the end in the repository's root; stdout and stderr as text."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )


def train(launcher: list[str], *arguments: str, timeout_s: int = 240, **extra: str) -> subprocess.CompletedProcess[str]:
    """`launcher` launch/train.py `arguments`."""
    return launch([*launcher, "launch/train.py", *arguments], timeout_s=timeout_s, **extra)
