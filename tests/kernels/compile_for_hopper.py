"""Compiles every Triton kernel for an H200 (sm_90) without having one; started by test_triton_nhwc.py.

The interpreter checks values and no types; the compiler checks types and no values. Writes per kernel how many of its global
loads and stores of x's type are vectorized.
"""

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unitdist.kernels import triton_backward, triton_forward

TILE = {"BLOCK_P": 64, "BLOCK_C": 64}
ROW = {**TILE, "BLOCK_ROW": 1024}
KERNELS: list[tuple[Any, dict[str, Any]]] = [
    (triton_forward.moments_kernel, {**TILE, "HAS_RESIDUAL": True}),
    (triton_forward.moments_kernel, {**TILE, "HAS_RESIDUAL": False}),
    (triton_forward.merge_moments_kernel, {"BLOCK_N": 32, "BLOCK_S": 16, "BLOCK_C": 16}),
    (triton_forward.normalize_kernel, {**ROW, "FROM_PACKED": True, "UPDATE": True, "AVERAGE": False, "RELU": True}),
    (triton_forward.normalize_kernel, {**ROW, "FROM_PACKED": True, "UPDATE": True, "AVERAGE": True, "RELU": True}),
    (triton_forward.normalize_kernel, {**ROW, "FROM_PACKED": True, "UPDATE": False, "AVERAGE": True, "RELU": True}),
    (triton_forward.normalize_kernel, {**ROW, "FROM_PACKED": False, "UPDATE": False, "AVERAGE": True, "RELU": False}),
    (triton_forward.update_running_kernel, {"BLOCK": 1024, "AVERAGE": True}),
    (triton_forward.update_running_kernel, {"BLOCK": 1024, "AVERAGE": False}),
    (triton_backward.gradients_kernel, {**TILE, "RELU": True}),
    (triton_backward.merge_gradients_kernel, {"BLOCK_N": 32, "BLOCK_S": 16, "BLOCK_C": 16, "BLOCK_W": 16}),
    (triton_backward.input_gradient_kernel, {**TILE, "BATCH_STATISTICS": True, "HAS_SKIP": True, "RELU": True}),
    (triton_backward.input_gradient_kernel, {**TILE, "BATCH_STATISTICS": False, "HAS_SKIP": False, "RELU": False}),
]
LARGE = ("x_ptr", "y_ptr", "total_ptr", "residual_ptr", "grad_ptr", "skip_ptr", "grad_x_ptr")
ONES = ("samples", "pixels", "splits", "c_blocks", "widths", "total_count", "channels", "split_pixels")


def argument_type(name: str) -> str:
    """Triton's type of a kernel argument, by our naming."""
    if name in LARGE:
        return "*bf16"
    if name in ("divisor_ptr", "batches_ptr"):
        return "*i64"
    if name == "packed_ptr":
        return "*fp64"
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name in ("eps", "momentum") else "i32"


def compiled_assembly(kernel: Any, constants: dict[str, Any], ones: tuple[str, ...]) -> str:
    """PTX of a kernel; the launcher turns arguments equal to 1 into constants, which is another program."""
    values = {name: 1 for name in kernel.arg_names if name in ones} | constants
    signature = {name: "constexpr" if name in values else argument_type(name) for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in values and (name.endswith("_ptr") or name == "channels")
    }
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=aligned)
    options = {"num_warps": 8 if kernel.__name__.startswith("merge") else 4}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


def main() -> None:
    found = {}
    for kernel, constants in KERNELS:
        ptx = compiled_assembly(kernel, constants, ())
        compiled_assembly(kernel, constants, ONES)
        name = f"{kernel.__name__} {constants}"
        found[name] = {
            "loads": len(re.findall(r"ld\.global", ptx)),
            "vectorized": len(re.findall(r"ld\.global\S*\.v[248]", ptx)),
            "fp64": "f64" in ptx,
        }
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
