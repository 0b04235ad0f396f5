"""Which form takes a tensor."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from unitdist.kernels import passes


def cuda_tensor(**changes: object) -> SimpleNamespace:
    """What `passes` looks at in a tensor on a GPU."""
    return SimpleNamespace(**{"is_cuda": True, "dtype": torch.float32, "dim": lambda: 4, "numel": lambda: 7, **changes})


def test_the_kernels_take_what_they_can_on_cuda_unless_compiled_pieces_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes, "_triton_form", lambda: SimpleNamespace(takes=lambda x: True))
    assert passes._takes_triton(cuda_tensor(), compiled=False)
    assert not passes._takes_triton(cuda_tensor(), compiled=True)
    assert not passes._takes_triton(cuda_tensor(is_cuda=False), compiled=False)


def test_another_memory_format_on_cuda_is_said_once_per_kind_and_an_empty_batch_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes, "_triton_form", lambda: SimpleNamespace(takes=lambda x: False))
    passes._say_slow.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert not passes._takes_triton(cuda_tensor(numel=lambda: 0), compiled=False)
        assert seen == []
        for _ in range(3):
            assert not passes._takes_triton(cuda_tensor(), compiled=False)
    assert len(seen) == 1 and "channels_last takes the slow plain path" in str(seen[0].message)
