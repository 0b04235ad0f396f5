"""Progressive resizing: training images whose side follows the epoch, by any of the other loaders."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from unitdist.config import DataConfig
from unitdist.data.batch import Batch, Loader


class ProgressiveLoader:
    """Loader (batch.py) that yields each epoch at the side that data.progressive_resizing names for it.

    `build(config)` makes the loader of one side; only the one in use is kept, and the next is built where an epoch
    needs it, so that a resume starts at its epoch's side. Samples, order and steps per epoch are those of every side.
    """

    def __init__(self, config: DataConfig, build: Callable[[DataConfig], Loader]) -> None:
        self._config, self._build = config, build
        self._side = config.image_size_px
        self._loader = build(at_side(config, self._side))
        self._fingerprint = self._loader.fingerprint()
        self._broken_before: dict[str, str] = {}

    @property
    def num_samples(self) -> int:
        """See Loader."""
        return self._loader.num_samples

    @property
    def class_to_idx(self) -> dict[str, int]:
        """See Loader."""
        return self._loader.class_to_idx

    @property
    def per_rank_batch_size(self) -> int:
        """See Loader."""
        return self._loader.per_rank_batch_size

    @property
    def batches_per_epoch(self) -> int:
        """See Loader."""
        return self._loader.batches_per_epoch

    @property
    def broken(self) -> dict[str, str]:
        """See Loader."""
        return self._broken_before | self._loader.broken

    @property
    def max_broken(self) -> int:
        """See Loader."""
        return self._loader.max_broken

    @property
    def ignored(self) -> int:
        """See Loader."""
        return self._loader.ignored

    def iterate(self, epoch: int, start_sample: int = 0) -> Iterator[Batch]:
        """See Loader. `epoch` counts from 0, as everywhere in code."""
        side = side_of_epoch(self._config, epoch)
        if side != self._side:
            self._broken_before = self.broken
            self._loader.close()
            self._loader, self._side = self._build(at_side(self._config, side)), side
        return self._loader.iterate(epoch, start_sample)

    def fingerprint(self) -> dict[str, int | float | str]:
        """See Loader. The same at every epoch: the full side's, and the stages."""
        stages = ", ".join(f"{first}: {side}" for first, side in self._config.progressive_resizing)
        return self._fingerprint | {"progressive_resizing": stages}

    def close(self) -> None:
        """See Loader."""
        self._loader.close()


def side_of_epoch(config: DataConfig, epoch: int) -> int:
    """Side of the training images, px, in `epoch`, counted from 0."""
    return max(stage for stage in config.progressive_resizing if stage[0] <= epoch + 1)[1]


def side_changes(config: DataConfig, epoch: int) -> bool:
    """Whether the training images of `epoch`, counted from 0, have another side than those of the epoch before."""
    if not config.progressive_resizing or epoch == 0:
        return False
    return side_of_epoch(config, epoch) != side_of_epoch(config, epoch - 1)


def at_side(config: DataConfig, side_px: int) -> DataConfig:
    """The configuration of the stage with this side: the images are smaller, what they show is the same.

    Shorter sides (scale_range_px, val_resize_px) shrink with the crop, rounded: a crop covers the same share of an image.
    """
    full = config.image_size_px
    low, high = (max(side_px, round(shorter * side_px / full)) for shorter in config.scale_range_px)
    return replace(
        config,
        image_size_px=side_px,
        progressive_resizing=(),
        scale_range_px=(low, high),
        val_resize_px=max(side_px, round(config.val_resize_px * side_px / full)),
    )
