"""Runs recipes on synthetic adapters and reads the results back, without plait's own readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from plait.merging.pipeline import MergeResult, run_recipe
from plait.recipes.schema import Recipe
from tests.adapters_on_disk import Module, Written, layers, read_deltas, write_adapter

Deltas = dict[str, np.ndarray]
SHAPES = {"q_proj": (9, 7), "v_proj": (5, 7)}
MODULES = layers(2, SHAPES)


def adapters(
    folder: Path, count: int = 3, modules: Mapping[str, Module] = MODULES, *, ranks: Sequence[int] | None = None, **options: Any
) -> dict[str, Written]:
    """Write adapters a, b, c, … of different scalings (and of different ranks, where given)."""
    made = {}
    for i, name in enumerate("abcdefgh"[:count]):
        r = ranks[i] if ranks else 2
        settings = {"r": r, "alpha": (4.0, 1.5, 3.0)[i % 3], "rslora": i == 1, "seed": i, **options}
        made[name] = write_adapter(folder / name, modules, **settings)
    return made


def recipe(written: Mapping[str, Written], coefficients: Sequence[float] | None = None, **fields: Any) -> Recipe:
    """Return a recipe; `fields` are its keys."""
    entries = [
        {"name": n, "path": str(w.folder), "weight": 1.0 if coefficients is None else coefficients[i]}
        for i, (n, w) in enumerate(written.items())
    ]
    return Recipe.model_validate({"adapters": entries, **fields})


def run(out: Path, written: Mapping[str, Written], coefficients: Sequence[float] | None = None, **fields: Any) -> MergeResult:
    """Merge into a folder that does not exist."""
    return run_recipe(recipe(written, coefficients, **fields), out=out, workers=1)


def dense(out: Path, written: Mapping[str, Written], coefficients: Sequence[float] | None = None, **fields: Any) -> Deltas:
    """Merge to dense deltas; return them, float64."""
    result = run(out, written, coefficients, output={"kind": "delta"}, **fields)
    tensors = load_file(result.folder / "delta.safetensors")
    return {n.removesuffix(".weight"): x.astype(np.float64) for n, x in tensors.items()}


def adapter(
    out: Path,
    written: Mapping[str, Written],
    coefficients: Sequence[float] | None = None,
    modules: Mapping[str, Module] = MODULES,
    **fields: Any,
) -> Deltas:
    """Merge to an adapter; return its deltas, float64."""
    return read_deltas(run(out, written, coefficients, **fields).folder, modules)


def stacks(written: Mapping[str, Written]) -> dict[str, np.ndarray]:
    """Return target → (T, …) deltas of all adapters; zeros where one lacks the module."""
    shapes = {m: d.shape for w in written.values() for m, d in w.deltas.items()}
    return {m: np.stack([w.deltas.get(m, np.zeros(s)) for w in written.values()]) for m, s in sorted(shapes.items())}


def assert_equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float = 2e-6) -> None:
    """Compare module by module; the tolerance is relative to the largest value."""
    assert set(found) == set(expected)
    for module, x in expected.items():
        assert found[module].shape == x.shape
        off, largest = np.abs(found[module] - x).max(), np.abs(x).max()
        assert off <= tolerance * max(largest, 1e-30), f"{module} differs by {off:.3g} where values reach {largest:.3g}"


def by_entry(stack: Mapping[str, np.ndarray], function: Any) -> Deltas:
    """Apply a function of the T values of one entry to every entry."""
    result = {}
    for module, x in stack.items():
        result[module] = np.zeros(x.shape[1:])
        for place in np.ndindex(x.shape[1:]):
            result[module][place] = function(x[(slice(None), *place)])
    return result
