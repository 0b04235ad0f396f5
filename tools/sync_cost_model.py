"""What synchronizing statistics costs per training step, from a latency model: python tools/sync_cost_model.py.

A model, not a measurement. Constants: NCCL's own planner (src/graph/tuning.cc): 6.7 us to start a collective, 0.6 us per NVLink
hop and 5.0 us per network hop of the low-latency protocol, 400 Gb/s per device. Measure the target with a loop of
2 kB all_reduces before trusting a row.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple


class Fabric(NamedTuple):
    """Latency and bandwidth of a cluster."""

    start_us: float = 6.7
    node_hop_us: float = 0.6
    network_hop_us: float = 5.0
    gb_per_s: float = 50.0
    ranks_per_node: int = 8


def all_reduce_us(ranks: int, numbers: int, number_bytes: int, fabric: Fabric) -> float:
    """A tree over nodes with a chain inside each: up and down once."""
    if ranks == 1:
        return 0.0
    inside = min(ranks, fabric.ranks_per_node) - 1
    depth = math.ceil(math.log2(max(ranks // fabric.ranks_per_node, 1)))
    hops = 2 * (inside * fabric.node_hop_us + depth * fabric.network_hop_us)
    return fabric.start_us + hops + 2 * numbers * number_bytes / fabric.gb_per_s / 1e3


def all_gather_us(ranks: int, numbers: int, number_bytes: int, fabric: Fabric) -> float:
    """A ring: every rank's numbers pass every rank."""
    if ranks == 1:
        return 0.0
    nodes = max(ranks // fabric.ranks_per_node, 1)
    network = nodes if nodes > 1 else 0
    hops = (ranks - 1 - network) * fabric.node_hop_us + network * fabric.network_hop_us
    return fabric.start_us + hops + (ranks - 1) * numbers * number_bytes / fabric.gb_per_s / 1e3


def table(rank_counts: list[int], layers: int, channels: int, step_ms: float, fabric: Fabric) -> list[dict[str, float]]:
    """Milliseconds per step of one all_reduce each way and layer, and of torch's SyncBatchNorm pattern."""
    rows = []
    for ranks in rank_counts:
        forward = all_reduce_us(ranks, 2 * channels + 1, 8, fabric)
        backward = all_reduce_us(ranks, 2 * channels, 4, fabric)
        node = min(ranks, fabric.ranks_per_node)
        node_only = all_reduce_us(node, 2 * channels + 1, 8, fabric) + all_reduce_us(node, 2 * channels, 4, fabric)
        gathered = all_gather_us(ranks, 2 * channels + 1, 4, fabric) + backward
        rows.append(
            {
                "ranks": ranks,
                "world_ms": layers * (forward + backward) / 1e3,
                "world_backward_hidden_ms": layers * forward / 1e3,
                "node_ms": layers * node_only / 1e3,
                "sync_batch_norm_ms": layers * gathered / 1e3,
                "step_ms": step_ms,
            }
        )
    return rows


def main() -> int:
    defaults = Fabric()
    parser = argparse.ArgumentParser(description="Latency model of synchronized statistics, per training step.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64, 256, 1024])
    parser.add_argument("--layers", type=int, default=99, help="normalized layers (ResNet-101: 99)")
    parser.add_argument("--channels", type=int, default=488, help="mean channels per layer")
    parser.add_argument("--step-ms", type=float, default=16.0, help="a step without synchronization")
    parser.add_argument("--network-hop-us", type=float, default=defaults.network_hop_us, help="100 Gb/s TCP: 15 to 30")
    parser.add_argument("--ranks-per-node", type=int, default=defaults.ranks_per_node)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    fabric = defaults._replace(network_hop_us=options.network_hop_us, ranks_per_node=options.ranks_per_node)
    rows = table(options.ranks, options.layers, options.channels, options.step_ms, fabric)
    print(f"a model, not a measurement: {fabric}")
    print(
        "ranks   sync_group: world   (backward hidden)   node   SyncBatchNorm's pattern   [ms per step; share of the step]"
    )
    for row in rows:
        cells = [row["world_ms"], row["world_backward_hidden_ms"], row["node_ms"], row["sync_batch_norm_ms"]]
        print(f"{row['ranks']:5}" + "".join(f"{cell:12.1f} ({cell / options.step_ms:4.0%})" for cell in cells))
    if options.json:
        options.json.write_text(json.dumps({"fabric": fabric._asdict(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
