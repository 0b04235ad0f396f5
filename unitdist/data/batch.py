"""What every loader yields, and what every loader can do.

Axes: n sample, c channel, h row, w column.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's micro-batch. Every batch of a loader has the same number of rows.

    images: (N, C, H, W) float32, normalized by data.mean and data.std, in channels_last strides.
    labels: (N,) int64. valid: (N,) bool, False on rows that only fill up the last validation batch.
    sample_ids: (N,) int64, the row of the sample in the data set; a row that is not valid repeats some sample.
    All four are on the loader's device.
    """

    images: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    sample_ids: torch.Tensor


class Loader(Protocol):
    """A source of batches without hidden state: what it yields depends on the arguments and the seed alone.

    num_samples: samples in the data set. class_to_idx: class name -> label. per_rank_batch_size: rows of a batch.
    batches_per_epoch: batches that iterate(epoch) yields on every rank. broken: {name: reason} of the images that this rank
    had to replace so far. max_broken: so many may be replaced on all ranks together. ignored: files
    that are left out, being no images, hidden or, in a manifest, bad.
    """

    @property
    def num_samples(self) -> int: ...

    @property
    def class_to_idx(self) -> dict[str, int]: ...

    @property
    def per_rank_batch_size(self) -> int: ...

    @property
    def batches_per_epoch(self) -> int: ...

    @property
    def broken(self) -> dict[str, str]: ...

    @property
    def max_broken(self) -> int: ...

    @property
    def ignored(self) -> int: ...

    def iterate(self, epoch: int, start_sample: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of the epoch, leaving out the first start_sample samples of the whole job."""
        ...

    def fingerprint(self) -> dict[str, int | float | str]:
        """What must be the same for another loader to yield the same samples; saved in checkpoints.

        decoder and versions: what makes the pixels, which another one makes almost alike.
        """
        ...

    def close(self) -> None:
        """End threads, processes and pipelines. The loader cannot be used afterwards."""
        ...
