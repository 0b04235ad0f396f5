"""synthetic.py: a fixed batch on the device, with the counts of a real set."""

import torch

from unitdist.config import DataConfig
from unitdist.data.build import build_train_loader, build_val_loader
from unitdist.world import World

CONFIG = DataConfig(dataset="synthetic", loader="synthetic", image_size_px=8, synthetic_samples=50, synthetic_classes=7)


def test_every_training_batch_is_the_same_tensor() -> None:
    loader = build_train_loader(CONFIG, World.single(), per_rank_batch_size=12, seed=0, device=torch.device("cpu"))
    batches = list(loader.iterate(0))
    assert len(batches) == loader.batches_per_epoch == 4
    assert all(batch.images is batches[0].images for batch in batches)
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert batches[0].labels.tolist() == [row % 7 for row in range(12)]
    assert len(list(loader.iterate(0, start_sample=24))) == 2
    assert len(loader.class_to_idx) == 7


def test_validation_counts_each_sample_once() -> None:
    seen = []
    for rank in range(3):
        world = World(rank=rank, local_rank=rank, size=3, local_size=3)
        loader = build_val_loader(CONFIG, world, per_rank_batch_size=4, device=torch.device("cpu"))
        for batch in loader.iterate(0):
            seen += batch.sample_ids[batch.valid].tolist()
    assert sorted(seen) == list(range(50))
