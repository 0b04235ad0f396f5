"""How much of Fig. 2's movement is not training at all: moments at fixed weights, while the running statistics go on.

`python tools/paper_fixed_weights.py CHECKPOINT.pt --data DIR_OF_MNIST`: no weight changes; the net sees training batches in
training mode, as in an epoch's last steps, is measured in evaluation mode as Fig. 2 measures, and so on for --rounds. Prints, per
moment, the standard deviation over the rounds of each unit of the watched layer, and their median. The running statistics
forget: with momentum 0.1 the last 50 batches (--batches) decide them to within 0.5 %, with --momentum 0.01 the last 500.
"""

import argparse
import dataclasses
import sys
from itertools import count, islice
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from em_distance import load  # noqa: E402

from unitdist.analysis.monitor import Samples, ShiftMonitor  # noqa: E402
from unitdist.config_file import config_from_dict  # noqa: E402
from unitdist.data.build import build_train_loader, build_val_loader  # noqa: E402
from unitdist.errors import UnitdistError  # noqa: E402
from unitdist.models.mlp import WATCHED_LAYER  # noqa: E402
from unitdist.train.checkpoint import read_checkpoint  # noqa: E402
from unitdist.world import World  # noqa: E402

MOMENTS = ("mean", "variance", "skewness", "kurtosis")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    parser.add_argument("--batches", type=int, default=50, metavar="N", help="training batches before each measure")
    parser.add_argument("--momentum", type=float, metavar="M", help="of the running statistics (default: as trained)")
    arguments = parser.parse_args()
    content = read_checkpoint(arguments.checkpoint)
    model = load(content, str(arguments.checkpoint))
    config = config_from_dict(content["config"])
    for module in model.modules():
        if arguments.momentum is not None and hasattr(module, "momentum"):
            module.momentum = arguments.momentum
    data = dataclasses.replace(config.data, path=arguments.data)
    train_split = dataclasses.replace(data, val_split=data.train_split)
    world, cpu = World.single(), torch.device("cpu")
    loader = build_train_loader(
        data, world, per_rank_batch_size=data.global_batch_size, seed=config.run.seed, device=cpu
    )
    measured = build_val_loader(train_split, world, per_rank_batch_size=data.val_batch_size, device=cpu)
    monitor = ShiftMonitor([WATCHED_LAYER], Samples(measured, None, world), every_epochs=1, per_unit=True)
    epochs = (batch for epoch in count(config.train.epochs) for batch in loader.iterate(epoch))
    rounds = []
    for _ in range(arguments.rounds):
        model.train()
        for batch in islice(epochs, arguments.batches):
            model(batch.images)
        metrics = monitor.measure(model).metrics
        rounds.append([metrics[f"analysis/{WATCHED_LAYER}/unit_{moment}"] for moment in MOMENTS])
    deviation = torch.tensor(rounds, dtype=torch.float64).std(dim=0)
    for moment, units in zip(MOMENTS, deviation.tolist(), strict=True):
        median = sorted(units)[len(units) // 2 - 1 : len(units) // 2 + 1]
        print(f"{moment}: median {sum(median) / 2:.4f}; units {' '.join(f'{unit:.4f}' for unit in units)}")


if __name__ == "__main__":
    try:
        main()
    except UnitdistError as error:
        print(f"paper_fixed_weights.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
