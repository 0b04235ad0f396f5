"""torch's SyncBatchNorm, on the CPU too, so that the batchnorm arm is trained alike on every device.

torch's layer refuses CPU tensors in training. On CUDA this class is torch's layer, unchanged. On the CPU the
tensors go through Unitization with alpha = 0, which is batch normalization: one all_reduce of 2C+1 numbers forward
and one of 2C backward.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from unitdist.layers import Unitization1d, Unitization2d
from unitdist.sync import DEFAULT_GROUP, group_from_name


class SyncedBatchNorm(nn.SyncBatchNorm):
    """nn.SyncBatchNorm with a CPU path. x (N, C), (N, C, L) or (N, C, H, W); state dict and formulas are BatchNorm's.

    Training: mean and biased variance over batch, space and the ranks of the process group, weighted by their
    counts; running variance unbiased. Evaluation: the running statistics, no communication. Has weight and bias.
    """

    _group_name: str

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group, found by its name: a layer that holds no group object can be copied (EMA) and pickled."""
        return None if self._group_name == DEFAULT_GROUP else group_from_name(self._group_name)

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._group_name = DEFAULT_GROUP if group is None else group.group_name

    def forward(self, input: Tensor) -> Tensor:
        """Normalized input, of the input's shape and type."""
        if input.is_cuda or not self.training:
            y: Tensor = super().forward(input)
            return y
        kind = Unitization2d if input.dim() == 4 else Unitization1d
        # A frame without memory: every tensor that it computes with, and every statistic that it updates, is ours.
        frame = kind(
            self.num_features,
            self.eps,
            self.momentum,
            norm_divisor=1,
            process_group=self.process_group,
            device="meta",
        )
        constants = {"alpha": torch.zeros_like(self.weight), "norm_divisor": torch.ones((), dtype=torch.long)}
        ours = {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}
        y = functional_call(frame, {**ours, **constants}, (input,))
        return y
