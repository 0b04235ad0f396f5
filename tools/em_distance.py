"""EM distance of layers between two checkpoints of one run (Algorithm 3).

`python tools/em_distance.py OLD.pt NEW.pt --layers NAME ... [--data DIR] [--steps N]`; one line per layer.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unitdist.analysis.em_distance import CriticSettings, check_same_architecture, estimate_em_distances  # noqa: E402
from unitdist.analysis.probe import check_layer_names  # noqa: E402
from unitdist.config_file import config_from_dict  # noqa: E402
from unitdist.data.build import build_train_loader, build_val_loader  # noqa: E402
from unitdist.errors import UnitdistError  # noqa: E402
from unitdist.models.build import build_model  # noqa: E402
from unitdist.train.checkpoint import load_model_state, read_checkpoint  # noqa: E402
from unitdist.world import World  # noqa: E402

BATCH_SIZE = 128
"""Alg. 3's batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--layers", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--data", metavar="DIR", help="the data set's folder (default: the checkpoint's)")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="critic steps (default 1500)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    old, new = (read_checkpoint(path) for path in (arguments.old, arguments.new))
    models = [load(content, str(path)).to(device) for content, path in ((old, arguments.old), (new, arguments.new))]
    check_same_architecture(*models)
    check_layer_names(models[0], arguments.layers)  # both before the data are opened
    data = dataclasses.replace(config_from_dict(new["config"]).data, augmentation="none")
    data = dataclasses.replace(data, path=arguments.data or data.path)
    train = build_train_loader(data, World.single(), per_rank_batch_size=BATCH_SIZE, seed=0, device=device)
    test = build_val_loader(data, World.single(), per_rank_batch_size=BATCH_SIZE, device=device)
    settings = CriticSettings(steps=arguments.steps)
    distances = estimate_em_distances(*models, arguments.layers, train=train, test=test, settings=settings)
    for name, distance in distances.items():
        print(f"{name}\t{distance:.6g}")


def load(content: dict[str, Any], source: str) -> torch.nn.Module:
    """The net of a checkpoint, with its weights."""
    config = config_from_dict(content["config"])
    model = build_model(config.model, image_size_px=config.data.image_size_px, sync=False)
    load_model_state(model, content["model"], source)
    return model


if __name__ == "__main__":
    try:
        main()
    except UnitdistError as error:
        print(f"em_distance.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
