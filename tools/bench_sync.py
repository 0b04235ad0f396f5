"""Cost of synchronized statistics: torchrun --nproc-per-node 2 tools/bench_sync.py [--json FILE].

One norm + ReLU per shape, forward and backward, without synchronization, synchronized, and as one node with the
convolution that follows; collectives and bytes are counted. Refuses to report if the ranks do not agree with one process.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from measurement import environment, ratio, write_json  # noqa: E402
from sync_benchmark import check_against_one_process, count_collectives, time_forms  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8, help="images per rank")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if use_cuda else "gloo")
    torch.set_num_threads(1)
    error = check_against_one_process(device)
    if error > 1e-10:
        raise SystemExit(f"synchronized gradients differ from one process by {error:.1e}: no time is reported")
    shapes = (256, 56), (256, 14), (1024, 14)
    rows = [time_forms(*shape, options.samples, options.rounds, device) for shape in shapes]
    counts = count_collectives(device)
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        print(f"{ranks} ranks; against one process in float64: {error:.0e}; per layer and step: {counts}")
        for row in rows:
            for name in row["times"]:
                seen = ratio(row["times"], name, "unsynchronized")
                text = f"{seen['median']:.2f} x unsynchronized ({seen['low']:.2f} to {seen['high']:.2f}), wall clock"
                print(f"C {row['channels']:4} HW {row['side']:2} {name:>16}: {text}")
        results = {"environment": environment(device), "ranks": ranks, "collectives": counts, "rows": rows}
        write_json(options.json, results)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
