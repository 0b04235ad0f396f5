"""Unitization1d and Unitization2d: batch normalization followed by unitization, as modules.

They keep BatchNorm's names (`weight, bias, running_mean, running_var, num_batches_tracked`) and add `alpha` and
`norm_divisor`. They are no subclasses of torch's BatchNorm, whose converters would seize them and drop alpha.
"""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unitdist.errors import CheckpointError, ConfigError
from unitdist.functional.moments import accumulation_dtype, pixels_of
from unitdist.functional.unitization import NormScope, unitization_images
from unitdist.kernels.parameters import Running
from unitdist.kernels.passes import update_running_statistics
from unitdist.layers.node import runs_eagerly, unitization, unitization_eagerly
from unitdist.sync import DEFAULT_GROUP, NO_GROUP, group_from_name

UNKNOWN = 0
"""Value of the buffer `norm_divisor` before the first training batch."""


class _Unitization(nn.Module):
    """What vectors and images share. alpha starts at 0: the layer is batch normalization until alpha moves.

    Training uses mean and variance of the batch over all ranks of the process group; evaluation
    uses the running ones. The norm always comes from the sample at hand, divided by the fixed divisor n.
    """

    _version = 2
    norm_divisor: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        norm_divisor: int | None = None,
        norm_scope: NormScope = "image",
        activation: Literal["relu"] | None = None,
        process_group: dist.ProcessGroup | None = None,
        sync: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer for `num_features` channels; weight is 1, bias 0, alpha 0.

        - `eps`: added to the variance and to the squared norm.
        - `momentum`: of the running statistics, torch's convention (None: the mean over all batches).
        - `norm_divisor`: n >= 1 of Alg. 2 line 3.
        - `norm_scope`: `image`, one norm per sample over channels and pixels; `pixel`, one per pixel over channels.
        - `activation`: None, or `relu`, fused.
        - `process_group`: ranks over which statistics are taken (None: all); `sync=False`: this rank alone.
        - `device`, `dtype`: of weight, bias and alpha; running statistics are float32 or wider.

        Raises ConfigError for a value that is not allowed.
        """
        super().__init__()
        if norm_scope not in ("image", "pixel"):
            raise ConfigError(f"norm_scope={norm_scope!r}: allowed are 'image' and 'pixel'")
        if activation not in (None, "relu"):
            raise ConfigError(f"activation={activation!r}: allowed are None and 'relu'")
        if norm_divisor is not None and norm_divisor < 1:
            raise ConfigError(f"norm_divisor={norm_divisor}: must be >= 1, or None (fixed by the first training batch)")
        if norm_divisor is None and norm_scope == "pixel":
            norm_divisor = 1
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.norm_scope = norm_scope
        self.activation = activation
        self.sync = sync
        self.compiled = False  # by Inductor's pieces, set by `compile_norms`
        self.group_name = DEFAULT_GROUP if process_group is None else process_group.group_name
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.alpha = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        statistics = accumulation_dtype(dtype or torch.get_default_dtype())
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=statistics))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=statistics))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        self.register_buffer("norm_divisor", torch.tensor(norm_divisor or UNKNOWN, dtype=torch.long, device=device))
        # The arithmetic follows the buffer, on the device; this flag spares the host from reading it.
        self._norm_divisor_is_known = norm_divisor is not None

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group over which batch statistics are synchronized; None: the default group."""
        return None if self.group_name == DEFAULT_GROUP else group_from_name(self.group_name)

    def reset_running_stats(self) -> None:
        """Forget the running mean and variance."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Back to batch normalization: weight 1, bias 0, alpha 0, no running statistics. Keeps the norm divisor."""
        self.reset_running_stats()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.alpha)

    def set_norm_divisor(self, norm_divisor: int) -> None:
        """Fix n of Alg. 2 line 3 to `norm_divisor` >= 1."""
        if norm_divisor < 1:
            raise ConfigError(f"norm divisor {norm_divisor}: must be >= 1")
        self.norm_divisor.fill_(norm_divisor)
        self._norm_divisor_is_known = True

    def knows_norm_divisor(self) -> bool:
        """Whether n is fixed. Reads the buffer (host synchronization) only while the answer is not yet yes."""
        if not self._norm_divisor_is_known and not self.norm_divisor.is_meta:
            self._norm_divisor_is_known = int(self.norm_divisor) != UNKNOWN
        return self._norm_divisor_is_known

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y = weight [p alpha + 1 - alpha] xh + bias (Alg. 1 line 5, Alg. 2 line 5), then the activation.

        x: (N, C, *spatial), any floating type; y has x's type and memory format. With `residual` (same shape) the sum
        x + residual is normalized, in the same pass that adds, and (y, x + residual) is returned. Training: ValueError
        if there is a single value per channel and no other rank. Evaluation: CheckpointError while n is unknown.
        """
        self.prepare(x)
        if torch.compiler.is_compiling() and x.dim() == 2 and residual is None and not self._has_peers():
            return self._forward_compiled_vectors(x)
        inputs = (
            x,
            residual,
            self.weight,
            self.bias,
            self.alpha,
            self.running_mean,
            self.running_var,
            self.norm_divisor,
            self.eps,
            self.activation == "relu",
            self.norm_scope == "pixel",
            self.training,
            self.compiled,
            self.sync_group_name(),
        )
        if runs_eagerly(x):
            return unitization_eagerly(self.running_statistics() if self.training else None, *inputs)
        y, total, _, _, mean_c, var_c, packed, _ = unitization(*inputs)
        if self.training:
            self.update_running_statistics(mean_c, var_c, packed)
        return y if residual is None else (y, total)

    def _has_peers(self) -> bool:
        return self.training and self.sync and dist.is_available() and dist.is_initialized()

    def _forward_compiled_vectors(self, x: Tensor) -> Tensor:
        """Algorithm 1 in plain operations, which the compiler fuses with their neighbours and differentiates.

        For vectors there is nothing to gain from the operator: x is as large as its tables.
        """
        dtype = accumulation_dtype(x.dtype)
        mean_c, var_c = self.running_mean.to(dtype), self.running_var.to(dtype)
        if self.training:
            var_c, mean_c = torch.var_mean(x.to(dtype), 0, correction=0)
        y = unitization_images(
            x.to(dtype),
            self.weight.to(dtype),
            self.bias.to(dtype),
            self.alpha.to(dtype),
            norm_divisor=self.norm_divisor,
            norm_scope=self.norm_scope,
            eps=self.eps,
            mean_c=mean_c,
            var_c=var_c,
        )
        if self.training:
            count = torch.full((1,), x.shape[0], dtype=torch.float64, device=x.device)
            self.update_running_statistics(mean_c.detach(), var_c.detach(), count)
        return (y.relu() if self.activation == "relu" else y).to(x.dtype)

    def prepare(self, x: Tensor) -> None:
        """Refuse an input that cannot be normalized; in training fix the norm divisor if it is unknown."""
        self._check_input(x)
        if self.training:
            self._check_enough_values(x)
            if not self._norm_divisor_is_known:
                self._fix_norm_divisor(pixels_of(x))
        elif not self._norm_divisor_is_known:
            self._require_norm_divisor()

    def sync_group_name(self) -> str:
        """The name of the group that the next forward pass talks to, NO_GROUP in evaluation and without `sync`."""
        return self.group_name if self.training and self.sync else NO_GROUP

    def _check_input(self, x: Tensor) -> None:
        raise AssertionError("Unitization1d and Unitization2d say which shapes they take")

    def _check_enough_values(self, x: Tensor) -> None:
        alone = not (self.sync and dist.is_available() and dist.is_initialized())
        if alone and x.shape[0] * pixels_of(x) == 1:
            raise ValueError(
                f"expected more than 1 value per channel in training, got an input of shape {tuple(x.shape)}"
            )

    def _fix_norm_divisor(self, pixels: int) -> None:
        # On the device, without reading: the buffer may hold a value that came in past load_state_dict.
        self.norm_divisor.copy_(torch.where(self.norm_divisor == UNKNOWN, pixels, self.norm_divisor))
        self._norm_divisor_is_known = True

    def _require_norm_divisor(self) -> None:
        if not self.knows_norm_divisor():
            raise CheckpointError(
                f"{type(self).__name__}({self.num_features}) is evaluated before its norm divisor is known: train it for a "
                "batch, load a checkpoint that has norm_divisor, or call unitdist.set_norm_divisors(model, image_size)"
            )

    @torch.no_grad()
    def update_running_statistics(self, mean_c: Tensor, var_c: Tensor, packed: Tensor) -> None:
        """PyTorch's convention: exponential average with `momentum`, or plain average if None; unbiased variance.

        mean_c, var_c: the batch's, (C,). packed: its last number is the count, over all ranks; 0 changes nothing.
        """
        update_running_statistics(mean_c, var_c, packed, self.running_statistics())

    def running_statistics(self) -> Running:
        """The buffers that training moves, and how."""
        return Running(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Unitization":
        """As nn.Module, but statistics stay float32 or wider under .half() and .bfloat16()."""
        statistics = {name: self._buffers[name] for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in statistics.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As nn.Module; a batch normalization's state (neither alpha nor norm_divisor) loads with alpha = 0.

        It leaves the norm divisor as it is. A Unitization's state without norm_divisor is reported as missing.
        """
        names = ("running_mean", "alpha", "norm_divisor")
        has_statistics, has_alpha, has_divisor = (prefix + name in state_dict for name in names)
        added = {}
        if has_statistics and not has_alpha and not has_divisor:
            added = {"alpha": torch.zeros_like(self.alpha), "norm_divisor": self.norm_divisor.clone()}
            if prefix + "num_batches_tracked" not in state_dict:
                added["num_batches_tracked"] = torch.zeros_like(self.num_batches_tracked)
        state_dict.update({prefix + name: value for name, value in added.items()})
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            for name in added:
                del state_dict[prefix + name]
        if not self.norm_divisor.is_meta:
            self._norm_divisor_is_known = int(self.norm_divisor) != UNKNOWN

    def extra_repr(self) -> str:
        """All settings, the norm divisor among them ('unknown' before the first training batch)."""
        divisor = "on meta" if self.norm_divisor.is_meta else int(self.norm_divisor) or "unknown"
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, norm_divisor={divisor}"
        text += f", norm_scope={self.norm_scope}, activation={self.activation}"
        group = "default" if self.group_name == DEFAULT_GROUP else self.group_name
        return text + (f", sync_group={group}" if self.sync else ", sync=False")


class Unitization1d(_Unitization):
    """Alg. 1: Unitization of vectors (N, C), or of sequences (N, C, L); n = 1 unless given."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        norm_divisor: int | None = None,
        norm_scope: NormScope = "image",
        activation: Literal["relu"] | None = None,
        process_group: dist.ProcessGroup | None = None,
        sync: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As Unitization2d's; `norm_divisor` is 1 unless given."""
        super().__init__(
            num_features,
            eps,
            momentum,
            norm_divisor=1 if norm_divisor is None else norm_divisor,
            norm_scope=norm_scope,
            activation=activation,
            process_group=process_group,
            sync=sync,
            device=device,
            dtype=dtype,
        )

    def _check_input(self, x: Tensor) -> None:
        if x.dim() not in (2, 3) or x.shape[1] != self.num_features:
            raise ValueError(f"expected (N, {self.num_features}) or (N, {self.num_features}, L), got {tuple(x.shape)}")


class Unitization2d(_Unitization):
    """Alg. 2: Unitization of images (N, C, H, W), one norm per image (Fig. 1c) or per pixel (Fig. 1b).

    `norm_divisor=None`: n is H*W of the first training batch and is then fixed, saved and loaded; it never follows
    the test image (paper, section 4.3). With `norm_scope="pixel"` n is 1 unless given.
    """

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"expected (N, {self.num_features}, H, W), got {tuple(x.shape)}")
