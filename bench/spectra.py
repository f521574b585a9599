"""Two ways to the same merge: plait's, on factors, and the papers' algorithm on dense matrices. Jobs of `methods.py`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import measured

if TYPE_CHECKING:
    from torch import Tensor

    from plait.adapters.lowrank import LowRank

DENSITY = 0.2


def merge_once(
    side: str, method: str, m: int, n: int, adapters: int, rank: int, dtype: str, out: str, repeat: int
) -> dict[str, Any]:
    """Merge random adapters of one module by one of the two ways, on one thread; keep the merged delta at `out`.

    Returns:
        CPU seconds of the quickest of `repeat` runs, after one on tiny adapters, and the memory of the first.
    """
    import torch

    torch.set_num_threads(1)  # as plait's workers, and CPU time means something
    run: Any = _plait if side == "plait" else _dense
    tiny, inputs = (_inputs(side, *shape, dtype) for shape in ((32, 24, 2, 2), (m, n, adapters, rank)))
    run(method, tiny)
    with measured() as usage:
        merged = run(method, inputs)
    seconds = [usage.cpu_seconds, *(_seconds(run, method, inputs) for _ in range(repeat - 1))]
    torch.save(merged if side == "dense" else merged.dense(), Path(out))
    return {**asdict(usage), "cpu_seconds": min(seconds)}


def merge_growing(methods: list[str], shapes: list[list[int]], dtype: str, repeat: int) -> dict[str, list[float]]:
    """Return plait's CPU seconds on one thread, per method and shape (m, n, T, r); the quickest of `repeat` runs after one."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, list[float]] = {method: [] for method in methods}
    for shape in shapes:
        inputs = _inputs("plait", *shape, dtype)
        for method in methods:
            found[method].append(min([_seconds(_plait, method, inputs) for _ in range(repeat + 1)][1:]))
    return found


def _seconds(run: Any, method: str, inputs: Any) -> float:
    start = time.process_time()
    run(method, inputs)
    return time.process_time() - start


def _inputs(side: str, m: int, n: int, adapters: int, rank: int, dtype: str) -> list[LowRank] | list[Tensor]:
    import torch

    from plait.adapters.lowrank import LowRank

    generator, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(kind)

    deltas = [LowRank(normal(rank, n), normal(m, rank)) for _ in range(adapters)]
    return deltas if side == "plait" else [d.dense() for d in deltas]


def _plait(method: str, deltas: list[LowRank]) -> LowRank:
    import torch

    from plait.adapters.lowrank import LowRank
    from plait.linalg.blocks import RowBlocks
    from plait.linalg.keyed import Key
    from plait.spaces import SPACES
    from plait.stages import Site
    from plait.stages.calibrate import Iso
    from plait.stages.polar import Polar

    site = Site("module", tuple(deltas), torch.ones(len(deltas), dtype=torch.float64), Key(0))
    if method == "tsv":
        return Polar().combine(site)
    if method == "iso_c":
        return Iso().apply(LowRank.concatenate(deltas, [1.0] * len(deltas)), site)
    frame = SPACES[method].frame(deltas, [1.0] * len(deltas))
    array = frame.arrays[0]
    merged = _ties(array.rows(0, array.shape[0]))
    lifted: Any = frame.lift([RowBlocks(array.shape, lambda start, stop: merged[start:stop], merged.dtype)])
    return lifted


def _dense(method: str, deltas: list[Tensor]) -> Tensor:
    import torch

    if method == "iso_c":
        u, s, vh = _svd(sum(deltas[1:], deltas[0]))
        return s.mean() * u @ vh
    if method == "knots":
        u, s, vh = _svd(torch.cat(deltas, dim=1))
        return u @ _ties(torch.stack((s.unsqueeze(1) * vh).chunk(len(deltas), dim=1)))
    parts = [_svd(d) for d in deltas]
    if method == "tsv":
        u, v = _polar(torch.cat([p[0] for p in parts], dim=1)), _polar(torch.cat([p[2] for p in parts]).mT)
        return (u * torch.cat([p[1] for p in parts])) @ v.mT
    u = _svd(torch.cat([u * s.sqrt() for u, s, _ in parts], dim=1))[0]
    vh = _svd(torch.cat([s.sqrt().unsqueeze(1) * vh for _, s, vh in parts]))[2]
    return u @ _ties(torch.stack([u.mT @ d @ vh.mT for d in deltas])) @ vh


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD without the null space, whose vectors are arbitrary."""
    import torch

    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = int((s > 1e-6 * s[0]).sum())
    return u[:, :kept], s[:kept], vh[:kept]


def _polar(x: Tensor) -> Tensor:
    u, _, vh = _svd(x)
    return u @ vh


def _ties(x: Tensor) -> Tensor:
    """Keep the largest entries of each adapter, elect signs, average; the same code on both sides."""
    import torch

    from plait.linalg.elect import elect_sign, merge_agreeing
    from plait.linalg.sparsify import keep_at_least

    count = max(1, int(DENSITY * x[0].numel()))
    trimmed = keep_at_least(x, x.abs().flatten(1).kthvalue(x[0].numel() - count + 1).values)
    return merge_agreeing(trimmed, trimmed, elect_sign(trimmed, "total"), torch.ones(len(x)), "count")
