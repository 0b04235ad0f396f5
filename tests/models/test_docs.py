"""The python blocks of docs/timm.md and docs/export.md run, in their order."""

import re
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

from unitdist import hub
from unitdist.layers import missing_norm_divisors

sys.path.insert(0, str(Path(__file__).parent))
from test_hub import make_checkpoint  # noqa: E402

DOCS = Path(__file__).resolve().parents[2] / "docs"


def run_blocks(page: str) -> dict[str, object]:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert len(blocks) >= 2
    return names


def test_timm_page_runs() -> None:
    names = run_blocks("timm.md")
    for key in ("plain", "with_act", "silu"):
        assert len(missing_norm_divisors(names[key])) > 0  # type: ignore[arg-type]
    x_nchw = torch.randn(2, 3, 64, 64)
    assert names["model"].eval()(x_nchw).shape == (2, 10)  # type: ignore[attr-defined]
    assert len(names["features"](x_nchw)) == 3  # type: ignore[operator]


def test_export_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, net = make_checkpoint()
    hub.export_checkpoint(checkpoint, tmp_path / "exported" / "demo")
    run_blocks("export.md")
    x_nchw = torch.randn(2, 3, 80, 64)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": x_nchw.numpy()})[0])
    torch.testing.assert_close(found, net(x_nchw).detach(), rtol=1e-4, atol=1e-4)
