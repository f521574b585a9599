"""How fast dtypes are here: only what holds on every processor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from plait.evaluation.loaded_base import with_used_dtype
from plait.hub.pretrained import LoadOptions
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


def checkpoint(folder: Path, dtype: torch.dtype, config: str = "{}", *, large: bool = True) -> Path:
    """Write a checkpoint of a large or small model in a sparse file: only its header is read."""
    shape = [10_000, 10_000] if large else [10, 10]
    length = math.prod(shape) * dtype.itemsize
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    header = json.dumps({"a.weight": {"dtype": name, "shape": shape, "data_offsets": [0, length]}}).encode()
    folder.mkdir()
    (folder / "config.json").write_text(config)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + length)
    return folder


def memory(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))


def test_a_dtype_that_is_slow_here_is_not_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "slowness", lambda dtype: 5.2)
    memory(monkeypatch, 1e9)
    own = checkpoint(tmp_path / "own", torch.bfloat16)
    with pytest.warns(PlaitWarning, match=r"computed in float32.*bfloat16, 5\.2 times slower; --load-dtype stored"):
        assert with_used_dtype(LoadOptions(), own) == LoadOptions("float32")
    for given, used in (("stored", "auto"), ("bfloat16", "bfloat16"), ("float16", "float16")):
        assert with_used_dtype(LoadOptions(given), own).dtype == used
    assert with_used_dtype(LoadOptions(device_map="cuda:0"), own).dtype == "auto"


def test_a_dtype_is_kept_where_float32_is_not_faster_or_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "slowness", lambda dtype: 5.2)
    memory(monkeypatch, 1e9)
    quantized = json.dumps({"quantization_config": {"quant_method": "gptq"}})
    kept = [
        checkpoint(tmp_path / "small", torch.bfloat16, large=False),
        checkpoint(tmp_path / "wide", torch.float32),
        checkpoint(tmp_path / "quantized", torch.float16, quantized),
        tmp_path / "missing",
    ]
    own = checkpoint(tmp_path / "own", torch.float16)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"x")
    for folder in (*kept, tmp_path / "cut"):
        assert with_used_dtype(LoadOptions(), folder) == LoadOptions()  # any warning is an error here
    memory(monkeypatch, 3e8)
    with pytest.warns(
        PlaitWarning, match=r"float16, which .* 5\.2 times slower than float32: that needs 0\.6 GB .* are 0\.3 GB"
    ):
        assert with_used_dtype(LoadOptions(), own) == LoadOptions()
    monkeypatch.setattr(speed, "slowness", lambda dtype: 0.5)
    assert with_used_dtype(LoadOptions(), own) == LoadOptions()
