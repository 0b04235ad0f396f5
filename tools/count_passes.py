"""Exact numbers of passes over the tensor (one read or one write of N*C*H*W elements) of norm + ReLU.

Eager forms: every ATen operation is intercepted, also inside Unitization's operator. Kernels: Triton's interpreter runs
them and every element loaded or stored of x's size is counted; `python tools/count_passes.py` in a process of its own,
because the interpreter must be chosen before triton is imported.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

SHAPE = (4, 32, 12, 12)
# Kernels that read an argument twice: batch normalization takes statistics first and normalizes afterwards.
READ_TWICE = {"native_batch_norm", "native_batch_norm_backward", "cudnn_batch_norm", "cudnn_batch_norm_backward"}


def count_eager(name: str) -> dict[str, float]:
    """Passes of a candidate of `norm_candidates` on the CPU, float32, channels_last: forward and backward."""
    import torch
    from norm_candidates import make_candidate
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from unitdist.layers.node import unitization, unitization_backward

    operators = {op._opoverload: op._init_fn for op in (unitization, unitization_backward)}

    class Counter(TorchDispatchMode):
        elements = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in operators:
                with self:
                    return operators[func](*args, **kwargs)
            out = func(*args, **kwargs)
            if not (func.is_view or func.__name__.startswith(("empty", "detach", "new_empty", "_unsafe_view"))):
                base = func.overloadpacket.__name__
                skips_grad_x = base == "native_batch_norm_backward" and not args[-1][0]
                evaluates = base == "native_batch_norm" and not args[5]
                factor = 2 if base in READ_TWICE and not skips_grad_x and not evaluates else 1
                written = {id(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
                read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
                read = [] if base.startswith("new_") else read  # new_zeros asks a tensor for its type alone
                in_place = [t for t in read if id(t) in written and not base.endswith("_")]
                read = [t for t in read if all(t is not other for other in in_place)]
                for tensor in (*read * factor, *(t for t in tree_leaves(out) if isinstance(t, torch.Tensor))):
                    self.elements += tensor.numel() if tensor.numel() >= x[:1].numel() else 0
            return out

    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad_y = torch.randn_like(x)
    candidate = make_candidate(name, SHAPE[1], SHAPE[2], x.device)
    with Counter() as forward:
        y = candidate.function(x)
    with Counter() as backward:
        torch.autograd.grad(y, [x, *candidate.parameters], grad_y)
    return {"forward": forward.elements / x.numel(), "backward": backward.elements / x.numel()}


def count_kernels(residual: bool) -> dict[str, float]:
    """Passes of the Triton kernels, bfloat16, by counting interpreted loads and stores of 16-bit elements."""
    import torch
    from triton.runtime import interpreter

    from unitdist.kernels import triton_nhwc
    from unitdist.kernels.parameters import Parameters, Saved

    seen = {"elements": 0}
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def is_large(pointers: Any) -> bool:
        return bool(pointers.get_element_ty().primitive_bitwidth == 16)

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        seen["elements"] += int(mask.data.sum()) if is_large(pointers) else 0
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen["elements"] += int(mask.data.sum()) if is_large(pointers) else 0
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    x, skip = (torch.randn(SHAPE).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(2))
    values = [torch.ones(SHAPE[1]) for _ in range(3)]
    parameters = Parameters(values[0], values[1], values[2], torch.tensor(9), 1e-5, True)
    total, mean_nc, centred_nc, packed = triton_nhwc.moments(x, skip if residual else None)
    y, mean_c, var_c, inverse = triton_nhwc.normalize(total, mean_nc, centred_nc, packed, parameters)
    forward = seen["elements"] / x.numel()
    saved = Saved(mean_nc, centred_nc, mean_c, var_c, packed, inverse)
    tables, carry = triton_nhwc.gradients(y, total, saved, parameters)
    skip_gradient = skip if residual else None
    triton_nhwc.input_gradient(carry, total, saved, parameters, tables.norm_n, tables.sums_2c, skip_gradient)
    return {"forward": forward, "backward": seen["elements"] / x.numel() - forward}


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    eager = {name: count_eager(name) for name in ("batchnorm", "composite", "literal", "unitization")}
    eager["unitization, plain path"] = eager.pop("unitization")
    kernels = {"unitization, kernels": count_kernels(False), "kernels with the residual folded in": count_kernels(True)}
    print(json.dumps({**eager, **kernels}))


if __name__ == "__main__":
    main()
