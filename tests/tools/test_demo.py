"""`make demo` itself is run by hand; what it decides on machines that are not here is tested."""

import runpy
from pathlib import Path

import pytest

from unitdist.config_file import load_config
from unitdist.train.batch_split import split_batch
from unitdist.world import World

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo.py"


@pytest.mark.parametrize(("gpus", "ranks"), [(1, 1), (2, 2), (3, 2), (6, 4), (7, 4), (8, 8), (10, 8)])
def test_demo_takes_as_many_gpus_as_its_batch_can_be_shared_by(gpus: int, ranks: int) -> None:
    demo = runpy.run_path(str(DEMO))
    config = load_config("demo.yaml", [])
    assert config.data.global_batch_size == demo["BATCH"]
    assert demo["usable_ranks"](gpus) == ranks
    split_batch(config, World(rank=0, local_rank=0, size=ranks, local_size=ranks))
