"""The problem behind RegMean, SSR and WUDI, solved row by row by numpy's least squares on the inputs themselves, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import plait
from tests.adapters_on_disk import Written
from tests.reference.harness import Deltas
from tests.reference.harness import adapters as plain_adapters

Inputs = dict[tuple[str, str], np.ndarray]  # (adapter, module) → X (tokens, d_in)


def inputs(written: Mapping[str, Written], seed: int = 0, *, missing: bool = False) -> Inputs:
    """Return correlated inputs, of different sizes and numbers, per adapter and module; `missing`: also of modules it lacks."""
    rng = np.random.default_rng(seed)
    shapes = {m: d.shape for w in written.values() for m, d in w.deltas.items()}
    found = {}
    for t, (name, w) in enumerate(written.items()):
        for module, shape in shapes.items():
            if missing or module in w.deltas:
                d_in = shape[-1]
                mixing = rng.normal(size=(d_in, d_in)) + 2 * np.eye(d_in)
                found[name, module] = (1 + t) * rng.normal(size=(4 * d_in + 7 * t, d_in)) @ mixing
    return found


def moments(x: np.ndarray) -> np.ndarray:
    """E[x xᵀ]."""
    return x.T @ x / len(x)


def save(folder: Path, found: Mapping[tuple[str, str], np.ndarray]) -> Path:
    """Write the moments of inputs X (tokens, d_in), one file per adapter."""
    for name in dict.fromkeys(name for name, _ in found):
        of_adapter = {m: torch.from_numpy(moments(x)) for (n, m), x in found.items() if n == name}
        plait.save_moments(folder / f"{name}.safetensors", of_adapter)
    return folder


def merged(out: Path, written: Mapping[str, Written], **settings: Any) -> Deltas:
    """Merge to dense deltas with plait; float64."""
    from safetensors.numpy import load_file

    result = plait.merge({n: w.folder for n, w in written.items()}, out=out, kind="delta", workers=1, **settings)
    tensors = load_file(result.folder / "delta.safetensors")
    return {n.removesuffix(".weight"): x.astype(np.float64) for n, x in tensors.items()}


def fit(targets: Sequence[np.ndarray], xs: Sequence[np.ndarray], rho: float) -> np.ndarray:
    """Return argmin_M Σ ‖(M − ΔWₜ) Xₜᵀ‖²/Nₜ + ρ ‖M − mean ΔW‖², as one overdetermined system."""
    d_in = targets[0].shape[1]
    rows = [x / np.sqrt(len(x)) for x in xs] + [np.sqrt(rho) * np.eye(d_in)]
    wanted = [r @ d.T for r, d in zip(rows, targets, strict=False)] + [np.sqrt(rho) * np.mean(targets, axis=0).T]
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0].T


def adapters(folder: Path, count: int = 3, **options: Any) -> dict[str, Written]:
    """Write adapters of ranks 2, 1, 3."""
    return plain_adapters(folder, count, ranks=(2, 1, 3), **options)
