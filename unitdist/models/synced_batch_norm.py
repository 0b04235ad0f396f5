"""torch's SyncBatchNorm, on the CPU too, so that the batchnorm arm is trained alike on every device.

torch's layer refuses CPU tensors in training. On CUDA this class is torch's layer, unchanged. On the CPU it is
Unitization's own operator at alpha = 0, which is batch normalization: one all_reduce of 2C+1 numbers
forward and one of 2C backward.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unitdist.layers.node import unitization
from unitdist.sync import DEFAULT_GROUP, group_from_name


class SyncedBatchNorm(nn.SyncBatchNorm):
    """nn.SyncBatchNorm with a CPU path. x (N, C) or (N, C, *spatial); state dict and formulas are BatchNorm's.

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
        assert self.running_mean is not None and self.running_var is not None
        y, mean_c, var_c, count, _, _ = unitization(
            input,
            self.weight,
            self.bias,
            torch.zeros_like(self.weight),
            self.running_mean,
            self.running_var,
            torch.ones((), dtype=torch.long),
            self.eps,
            False,
            False,
            True,
            self._group_name,
        )
        self._update_running_statistics(mean_c, var_c, count)
        return y

    @torch.no_grad()
    def _update_running_statistics(self, mean_c: Tensor, var_c: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased_c = var_c * (count / (count - 1).clamp(min=1)).to(var_c.dtype)
        self.running_mean.lerp_(mean_c.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_c.to(self.running_var.dtype), momentum)
