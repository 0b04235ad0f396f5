"""Train under a seeded schedule of faults, and compare with an undisturbed run: python tools/chaos.py --seed 0 --faults 20.

Two ranks on the CPU; as root on Linux on two network namespaces and a small tmpfs, so that the network can be cut and the
disk filled. Exit code 0: weights, optimizer and metrics are identical, bit for bit. 1: they are not, or something hung.
"""

import argparse
import random
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import chaos_faults
import torch
from chaos_compare import differences
from chaos_job import ROOT, SETTINGS, Job
from sample_data import make_sample_data
from two_nodes import two_nodes, why_not

STEPS_PER_EPOCH, TMPFS_BYTES = 12, 96 * 2**20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--kinds", help="only these, with commas between (default: all that can be had here)")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "chaos", help="emptied, then written to")
    parser.add_argument("--one-node", action="store_true", help="no network namespaces, no tmpfs: nothing needs root")
    return parser.parse_args()


def schedule(draw: random.Random, kinds: list[str], faults: int) -> list[tuple[int, str]]:
    """(step, kind) of every fault. Each kind comes before any comes twice; two to six steps lie between two faults."""
    order: list[str] = []
    while len(order) < faults:
        order += draw.sample(kinds, len(kinds))
    step, plan = 3, []
    for kind in order[:faults]:
        step += draw.randrange(2, 7)
        plan.append((step, kind))
    return plan


def main() -> int:
    arguments = parse_arguments()
    reason = "--one-node" if arguments.one_node else why_not()
    faults = list(chaos_faults.ANYWHERE + chaos_faults.WITH_CHECKPOINTS)
    faults += [] if reason else chaos_faults.ON_TWO_NODES + chaos_faults.ON_TMPFS
    known = {fault.__name__: fault for fault in faults}
    kinds = arguments.kinds.split(",") if arguments.kinds else list(known)
    if unknown := [kind for kind in kinds if kind not in known]:
        print(f"chaos.py: error: cannot do {', '.join(unknown)} here ({reason}); choose among {', '.join(known)}")
        return 2
    draw, folder = random.Random(arguments.seed), arguments.folder.resolve()
    plan = schedule(draw, kinds, arguments.faults)
    epochs = (plan[-1][0] + 6) // STEPS_PER_EPOCH + 1
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    print(
        f"seed {arguments.seed}, {len(plan)} faults, {epochs} epochs of {STEPS_PER_EPOCH} steps; commit {commit}, torch {torch.__version__}"
    )
    print(f"kinds: {', '.join(kinds)}" + (f" (no namespaces and tmpfs: {reason})" if reason else ""), flush=True)
    with ExitStack() as resources:
        nodes = None if reason else resources.enter_context(two_nodes())
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "runs").mkdir(parents=True)
        make_sample_data(folder / "data", seed=0, train_per_class=STEPS_PER_EPOCH, val_per_class=5)
        if not reason:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder / "runs")]
            subprocess.run(mount, check=True, timeout=60)
            resources.callback(subprocess.run, ["umount", "-l", str(folder / "runs")], timeout=60)
        jobs = {}
        for name in ("undisturbed", "disturbed"):
            more = [
                f"data.path={folder / 'data'}",
                f"run.folder={folder / 'runs'}",
                f"run.name={name}",
                f"train.epochs={epochs}",
            ]
            jobs[name] = Job(
                run=folder / "runs" / name, arguments=[*SETTINGS, *more], output=folder / f"{name}.log", nodes=nodes
            )
            resources.callback(jobs[name].kill)
        started = time.monotonic()
        jobs["undisturbed"].start()
        jobs["undisturbed"].wait_until_finished()
        print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
        disturb(jobs["disturbed"], plan, known, draw)
        found = differences(jobs["disturbed"].run, jobs["undisturbed"].run)
        for line in found:
            print(f"differs: {line}")
        starts = jobs["disturbed"].rank_starts()
        print(
            f"{len(plan)} faults, {starts} starts: "
            + ("NOT identical" if found else "weights, optimizer and metrics identical")
        )
        return 1 if found else 0


def disturb(job: Job, plan: list[tuple[int, str]], known: dict[str, object], draw: random.Random) -> None:
    """Run the job to its end through all faults of the plan."""
    job.start()
    for number, (step, kind) in enumerate(plan, 1):
        job.wait_for_step(step)
        reached = job.step()
        outcome = known[kind](job, draw)  # type: ignore[operator]
        print(f"{number:3d}  step {reached:4d}  {kind:<16}{outcome}", flush=True)
    job.wait_until_finished()


if __name__ == "__main__":
    sys.exit(main())
