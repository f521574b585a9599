"""What plait reads of an adapter of any format, to be compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from plait.adapters import Adapter

Arrays = dict[str, np.ndarray]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def deltas(place: Path) -> Arrays:
    """Return what plait reads, in float64."""
    adapter = Adapter.open(place, "it")
    return {p: t.scaling * adapter.read(p, torch.float64)[0].dense().numpy() for p, t in adapter.targets.items()}


def close(found: Arrays, wanted: Arrays, tolerance: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        assert np.abs(found[path] - value).max() <= tolerance * np.abs(value).max(), path
