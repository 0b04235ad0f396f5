"""What only a machine with a GPU can show. Elsewhere these tests are skipped, aloud.

The bounds are estimates (TF32's rounding; nvJPEG's chroma): to be replaced by measured ones.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evaluation import EvaluationOptions, evaluate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here"),
]


def probabilities(model: nn.Module, data: Path, folder: Path, device: str, **changes: Any) -> np.ndarray:
    options = EvaluationOptions(scales_px=(32, 40), crop_px=32, save_scores=True, pictures=False, **changes)
    evaluate(model, data, protocols="all", output=folder, device=device, options=options, say=lambda line: None)
    names = ("crops", "fully_convolutional", "single", "ten_crop")
    return np.stack([np.load(folder / f"scores_{name}.npz")["probabilities"] for name in names])


def test_the_gpu_gives_the_cpus_probabilities(tiny_net: nn.Module, small_val: Path, tmp_path: Path) -> None:
    cpu = probabilities(tiny_net, small_val, tmp_path / "cpu", "cpu")
    gpu = probabilities(tiny_net, small_val, tmp_path / "gpu", "cuda")
    assert np.abs(cpu - gpu).max() <= 5e-3  # convolutions may run in TF32


def test_the_gpus_report_is_repeatable(tiny_net: nn.Module, small_val: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        probabilities(tiny_net, small_val, tmp_path / name, "cuda", precision="bf16")
    assert (tmp_path / "a/report.json").read_bytes() == (tmp_path / "b/report.json").read_bytes()


def test_decoding_on_the_gpu_is_close_to_the_cpus(tiny_net: nn.Module, small_val: Path, tmp_path: Path) -> None:
    on_cpu = probabilities(tiny_net, small_val, tmp_path / "cpu", "cuda", loader="dali")
    on_gpu = probabilities(tiny_net, small_val, tmp_path / "gpu", "cuda", loader="dali", decode_device="gpu")
    assert np.abs(on_cpu - on_gpu).mean() <= 5e-3
    assert np.abs(on_cpu - on_gpu).max() <= 5e-2
