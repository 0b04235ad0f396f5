"""A training on 2 ranks that is disturbed from outside, started by test_numerics.py: arguments are launch/train.py's overrides.

Rank 1 gets an infinite pixel at step 3; one bit of one of its weights flips after step 5.
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from unitdist.config_file import load_config  # noqa: E402
from unitdist.train import epoch  # noqa: E402
from unitdist.train.agreement import reporting_errors  # noqa: E402
from unitdist.train.loop import train  # noqa: E402
from unitdist.world import World  # noqa: E402

real = epoch.take_step


def take_step(run, watcher, batches):
    step, rank = run.state.step + 1, run.engine.world.rank
    if (step, rank) == (3, 1):
        images = batches[0].images.clone()
        images[0, 0, 0, 0] = math.inf
        batches = [dataclasses.replace(batches[0], images=images)]
    real(run, watcher, batches)
    if (step, rank) == (5, 1):
        with torch.no_grad():
            next(run.engine.module.parameters()).view(torch.int32)[0, 0, 0, 0] ^= 1


epoch.take_step = take_step
with reporting_errors(World.from_environment(), debug=False):
    train(load_config(sys.argv[1], sys.argv[2:]))
