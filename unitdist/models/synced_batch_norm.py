"""torch's SyncBatchNorm, on the CPU too, so that the batchnorm arm is trained alike on every device.

torch's layer refuses CPU tensors in training, and DistributedDataParallel refuses its subclasses on the CPU. On CUDA
this class runs torch's own forward pass, unchanged. On the CPU the tensors go through Unitization with alpha = 0,
which is batch normalization: one all_reduce of 2C+1 numbers forward and one of 2C backward.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from unitdist.layers import Unitization1d, Unitization2d
from unitdist.sync import DEFAULT_GROUP, group_from_name


class SyncedBatchNorm(_BatchNorm):
    """nn.SyncBatchNorm with a CPU path. x (N, C), (N, C, L) or (N, C, H, W); state dict and formulas are BatchNorm's.

    Training: mean and biased variance over batch, space and the ranks of the process group, weighted by their
    counts; running variance unbiased. Evaluation: the running statistics, no communication. Has weight and bias.
    """

    # What torch's forward pass calls on itself.
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum)
        # By its name: a layer that holds no group object can be copied (EMA) and pickled.
        self.group_name = DEFAULT_GROUP if process_group is None else process_group.group_name

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group over which batch statistics are synchronized; None: the default group."""
        return None if self.group_name == DEFAULT_GROUP else group_from_name(self.group_name)

    def forward(self, input: Tensor) -> Tensor:
        """Normalized input, of the input's shape and type."""
        if input.is_cuda or not self.training:
            torchs_layer: Any = self
            y: Tensor = nn.SyncBatchNorm.forward(torchs_layer, input)
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
