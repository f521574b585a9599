"""How fast dtypes are here: only what holds on every processor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from plait.evaluation import loaded_base
from plait.linalg import speed
from plait.notices import PlaitWarning


def test_the_faster_dtype_is_chosen(monkeypatch):
    for seconds, chosen in ((0.5, torch.bfloat16), (5.0, torch.float32)):
        speed.slowness.cache_clear()
        monkeypatch.setattr(speed, "_seconds", lambda dtype, s=seconds: s if dtype is torch.bfloat16 else 1.0)
        assert speed.slowness(torch.bfloat16) == seconds
        assert speed.fast_dtype() is chosen
    speed.slowness.cache_clear()


def test_measuring_is_quick_and_finite():
    speed.slowness.cache_clear()
    assert 0 < speed.slowness(torch.bfloat16) < 1000


def model(parameters: int, dtype: torch.dtype, device: str = "cpu") -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, num_parameters=lambda: parameters)


def test_a_dtype_that_is_slow_here_is_announced(monkeypatch):
    monkeypatch.setattr(speed, "slowness", lambda dtype: 5.2)
    for quick in (model(10_000, torch.bfloat16), model(10**9, torch.float32), model(10**9, torch.bfloat16, "meta")):
        loaded_base._announce_a_slow_dtype(quick)  # any warning is an error here
    with pytest.warns(PlaitWarning, match=r"bfloat16, which this processor multiplies 5\.2 times slower.*--load-dtype float32"):
        loaded_base._announce_a_slow_dtype(model(10**9, torch.bfloat16))
    monkeypatch.setattr(speed, "slowness", lambda dtype: 0.5)
    loaded_base._announce_a_slow_dtype(model(10**9, torch.bfloat16))
