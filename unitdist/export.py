"""A trained network as a torch.export program or an ONNX file, for a fixed or any image size.

Both are made of the folded network (`models/folding.py`), so neither needs unitdist to run. The norm divisors n
are constants inside: an image of another size has another number of pixels M in the mean, and the same n.
"""

import copy
from pathlib import Path

import torch
from torch import nn

from unitdist.errors import ConfigError
from unitdist.layers import Unitization1d, Unitization2d
from unitdist.models.folding import fold_unitization
from unitdist.wording import install_extra

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
_DYNAMIC_AXES = {0: "batch", 2: "height", 3: "width"}


def export_program(
    model: nn.Module, *, image_size_px: int, channels: int = 3, dynamic: bool = True
) -> torch.export.ExportedProgram:
    """The network in evaluation mode as a torch.export program of plain aten operations.

    images (N, channels, H, W) float32 -> logits. `dynamic`: any N, H and W that the network can take; otherwise
    N = 1 and H = W = image_size_px. Save it with torch.export.save. Raises ConfigError when `dynamic` is asked of
    a network that takes one size only.
    """
    from torch._dynamo.exc import UserError  # seconds to import, and needed only here

    folded = _for_inference(model)
    axes = {axis: torch.export.Dim.DYNAMIC for axis in _DYNAMIC_AXES}
    example = _example(image_size_px, channels, dynamic)
    try:
        with torch.no_grad():
            return torch.export.export(folded, example, dynamic_shapes=(axes,) if dynamic else None)
    except (ValueError, UserError) as error:
        if not dynamic:
            raise
        raise ConfigError(
            f"{type(model).__name__} cannot be exported for any image size; export it with dynamic=False: {error}"
        ) from None


def export_onnx(model: nn.Module, path: Path, *, image_size_px: int, channels: int = 3, dynamic: bool = True) -> Path:
    """Write the network in evaluation mode to `path` by torch's ONNX exporter; returns `path`.

    Input "images" (N, channels, H, W) float32, output "logits". `dynamic` as in `export_program`. Raises ConfigError
    when onnx and onnxscript are not installed.
    """
    _require_onnx()
    exported = export_program(model, image_size_px=image_size_px, channels=channels, dynamic=dynamic)
    program = torch.onnx.export(
        exported,
        dynamo=True,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_shapes=(_DYNAMIC_AXES,) if dynamic else None,
        verbose=False,
    )
    assert program is not None  # with dynamo=True there always is one
    program.save(str(path))
    return path


def _for_inference(model: nn.Module) -> nn.Module:
    """Folded where there is Unitization; another network is taken as it is, in evaluation mode."""
    if any(isinstance(module, Unitization1d | Unitization2d) for module in model.modules()):
        return fold_unitization(model)
    return copy.deepcopy(model).eval()


def _example(image_size_px: int, channels: int, dynamic: bool) -> tuple[torch.Tensor]:
    # Two samples, because torch.export takes an axis of 1 for a constant.
    return (torch.zeros(2 if dynamic else 1, channels, image_size_px, image_size_px),)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX export needs onnx and onnxscript ({error}): {install_extra('export')}") from None
