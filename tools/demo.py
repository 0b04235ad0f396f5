"""The main job in small: make the sample data, train, evaluate with multi-scale crops, and show what came out.

`make demo` runs this. It trains on the GPUs, as many as divide its batch, or else on two CPU processes.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "sample_data"
RUN = ROOT / "runs" / "demo"
BATCH = 32
"""data.global_batch_size of demo.yaml."""


def stage(name: str, command: list[str], seconds: dict[str, float]) -> None:
    """Run one command in the repository's root, shown as a user would type it; leave with its code if it fails."""
    print(f"\n$ {' '.join(Path(part).name if part == sys.executable else part for part in command)}", flush=True)
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    seconds[name] = time.perf_counter() - started
    if code:
        sys.exit(code)


def main() -> None:
    seconds: dict[str, float] = {}
    on_gpu = torch.cuda.is_available()
    ranks = usable_ranks(torch.cuda.device_count()) if on_gpu else 2
    for folder in (RUN, DATA):  # a demo that was interrupted may have left half of them
        shutil.rmtree(folder, ignore_errors=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    stage(
        "sample data", [sys.executable, "tools/make_sample_data.py", "--output", "sample_data", "--seed", "0"], seconds
    )
    stage("training", [*torchrun, "launch/train.py", "--config", "demo.yaml"], seconds)
    evaluate = ["evaluation/multi_scale.py", "--checkpoint", "runs/demo/best.pt", "--data", "sample_data/val"]
    stage("evaluation", [*torchrun, *evaluate, "--output", "runs/demo/evaluation"], seconds)
    show(seconds, ranks, "GPU" if on_gpu else "CPU process")


def usable_ranks(gpus: int) -> int:
    """The most GPUs, one rank each, that share the batch evenly: 8 of 8, 2 of 3."""
    return max(ranks for ranks in range(1, gpus + 1) if BATCH % ranks == 0)


def show(seconds: dict[str, float], ranks: int, kind: str) -> None:
    """The table at the end: top-1, top-5, images/s, seconds per stage, and where the run lies."""
    events = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    epochs = [event for event in events if event["event"] == "epoch"]
    best = max(epochs, key=lambda event: event["val_top1"])
    report = json.loads((RUN / "evaluation" / "report.json").read_text())
    print(f"\n{'protocol':<24}{'images':>8}{'top-1':>9}{'top-5':>9}")
    print(f"{'single crop (training)':<24}{best['val_count']:>8}{best['val_top1']:>9.2f}{best['val_top5']:>9.2f}")
    for name, result in report["protocols"].items():
        print(f"{name:<24}{result['count']:>8}{result['top1']:>9.2f}{result['top5']:>9.2f}")
    rate = sum(event["images_per_s"] for event in epochs) / len(epochs)
    print(f"\ntraining: {rate:.0f} images/s on {ranks} x {kind}; chance is {100 / 16:.2f} %")
    for name, value in seconds.items():
        print(f"{name:<24}{value:>8.1f} s")
    run = RUN.relative_to(ROOT)
    print(f"\nrun folder: {run} (tensorboard --logdir {run}/tensorboard; pictures and errors in {run}/evaluation)")


if __name__ == "__main__":
    main()
