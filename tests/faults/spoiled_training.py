"""A training on 2 ranks that is disturbed from outside: arguments are FAULT and launch/train.py's overrides.

pixel: rank 1 gets an infinite pixel at step 3, and one bit of one of its weights flips after step 5.
gradient: rank 1's own gradient has a nan at step 7, before it is reduced; nothing else is wrong.
full_disk: rank 0 fills the disk of the run folder before step 5.
monitor: rank 1 cannot read the live monitor's images while the run is built.
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from unitdist.analysis import monitor  # noqa: E402
from unitdist.config_file import load_config  # noqa: E402
from unitdist.errors import DataError  # noqa: E402
from unitdist.train import epoch  # noqa: E402
from unitdist.train.agreement import reporting_errors  # noqa: E402
from unitdist.train.loop import train  # noqa: E402
from unitdist.world import World  # noqa: E402

real = epoch.take_step
build_val_loader = monitor.build_val_loader


def spoil_pixel(run, watcher, batches):
    step, rank = run.state.step + 1, run.engine.world.rank
    if (step, rank) == (3, 1):
        images = batches[0].images.clone()
        images[0, 0, 0, 0] = math.inf
        batches = [dataclasses.replace(batches[0], images=images)]
    real(run, watcher, batches)
    if (step, rank) == (5, 1):
        with torch.no_grad():
            next(run.engine.module.parameters()).view(torch.int32)[0, 0, 0, 0] ^= 1


def spoil_gradient(run, watcher, batches):
    hooks = []
    if (run.state.step + 1, run.engine.world.rank) == (7, 1):
        first = next(run.engine.module.parameters())
        hooks.append(first.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(0), math.nan)))
    real(run, watcher, batches)
    for hook in hooks:
        hook.remove()


def fill_disk(run, watcher, batches):
    if (run.state.step + 1, run.engine.world.rank) == (5, 0):
        run.writer.wait()
        with open(run.folder.path.parent / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"0" * 4096)
            except OSError:
                pass
    real(run, watcher, batches)


def without_images(config, world, **rest):
    if world.rank == 1:
        raise DataError("unreadable image, put in by a test")
    return build_val_loader(config, world, **rest)


if sys.argv[1] == "monitor":
    monitor.build_val_loader = without_images
else:
    epoch.take_step = {"pixel": spoil_pixel, "gradient": spoil_gradient, "full_disk": fill_disk}[sys.argv[1]]
with reporting_errors(World.from_environment(), debug=False):
    train(load_config(sys.argv[2], sys.argv[3:]))
