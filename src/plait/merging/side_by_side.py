"""A weighted sum whose factors are written side by side, by numpy: importing torch takes longer than the sum.

Only what is plain is done here: linear layers of safetensors files, whose values stay normal numbers. Every other module is
merged by the engine, which gives the same bytes where both can; errors are its own, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from plait.adapters.adapter import Adapter
from plait.adapters.layouts.linear import Linear
from plait.deferred import np
from plait.merging.adapter_output import MergedAdapter
from plait.merging.combine import Combiner, pipeline_of
from plait.merging.engine import Engine, MergedModule, is_side_by_side
from plait.merging.inventory import Inventory
from plait.merging.output_format import writes_peft
from plait.merging.plan import MergePlan, ModulePlan
from plait.merging.record import WrittenMerge, module_record
from plait.merging.weighting import module_weights, towers_of
from plait.results.progress import Progress
from plait.results.records import ModuleRecord
from plait.results.threads import InThisThread, ahead
from plait.stages.sums import Mean, Sum
from plait.tensorfiles.reader import SafetensorsFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_LOOKED_AT = 8  # rows that show of most columns that they are normal


class _Limits(NamedTuple):
    """Of a dtype: the smallest normal number, and the largest."""

    tiny: float
    largest: float


_LIMITS = {
    "float32": _Limits(2.0**-126, (2 - 2.0**-23) * 2.0**127),
    "bfloat16": _Limits(2.0**-126, (2 - 2.0**-7) * 2.0**127),
    "float16": _Limits(2.0**-14, 65504.0),
}


class SideBySide:
    """Merges and writes such a sum.

    Args:
        inventory: the adapters; `fits` says of which.
        plan: what to do.
        engine: merges the modules that are not plain.
        workers: modules worked on at a time; never changes a byte.
        progress: receives the stage and its steps.
    """

    def __init__(self, inventory: Inventory, plan: MergePlan, engine: Engine, *, workers: int, progress: Progress) -> None:
        self._inventory, self._plan, self._engine = inventory, plan, engine
        self._workers, self._progress = workers, progress
        self._towers = towers_of(inventory.layouts)
        self._ranks = {m.target: m.rank or 0 for m in plan.modules}
        combine = pipeline_of(inventory.recipe).combine
        if not isinstance(combine, (Sum, Mean)):
            raise AssertionError(f"{combine} is not such a sum")
        self._combine = combine

    @staticmethod
    def fits(inventory: Inventory, plan: MergePlan) -> bool:
        """Return whether a merge is such a sum, of adapters that hold nothing but factors."""
        output, adapters = inventory.recipe.output, inventory.adapters
        if output.kind != "adapter" or output.dtype not in _LIMITS or not is_side_by_side(inventory, plan):
            return False
        if not isinstance(pipeline_of(inventory.recipe).combine, (Sum, Mean)) or not writes_peft(inventory):
            return False
        return not any("F64" in a.dtypes or a.full_tensors or any(t.has_bias for t in a.targets.values()) for a in adapters)

    def write(self, place: Path) -> WrittenMerge:
        """Write the adapter into a folder.

        Raises:
            PlaitError: as the engine does.
        """
        adapter, done = MergedAdapter(self._inventory, self._ranks), list[ModuleRecord]()

        def one(module: ModulePlan) -> tuple[ModuleRecord, dict[str, Any]]:
            found = self._factors(module.target)
            if found is None:

                def finish(merged: MergedModule) -> tuple[ModuleRecord, dict[str, Any]]:
                    return module_record(merged, module.exact_rank), adapter.tensors(merged)

                return self._engine.one(self._combiner, module.target, self._ranks[module.target], finish)
            a, b = found
            record = ModuleRecord(target=module.target, rank=len(a), result="exact", energy=None, kept=1.0)
            return record, adapter.arrays(module.target, a, b)

        def tensors() -> Iterator[dict[str, Any]]:
            with _pool(self._workers) as pool:
                for record, found in ahead("merge", one, self._plan.modules, pool, 2 * self._workers + 2, self._progress):
                    done.append(record)
                    yield found

        digests = adapter.write(place, tensors())
        return WrittenMerge(tuple(done), adapter.rank, digests, notes=())  # nothing is remarked of what is written as it is

    @cached_property
    def _combiner(self) -> Combiner:
        return self._engine.prepare()

    def _factors(self, target: str) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Return A (r, d_in) and B (d_out, r) of a merged module as they are stored; None where the module is not plain."""
        if type(self._inventory.layouts[target]) is not Linear:
            return None
        parts: list[tuple[Floats, Floats, float]] = []
        for adapter, share in zip(self._inventory.adapters, self._shares(target), strict=True):
            if target not in adapter.targets:
                continue
            found = [_read(adapter, adapter.targets[target].tensors[part]) for part in (Linear.a_part, Linear.b_part)]
            a, b = found
            if a is None or b is None:
                return None
            if share != 0:
                parts.append((a, b, share))
        if not parts or not all(_are_normal(b, 0, "float32", share) for _, b, share in parts):
            return None
        joined = np.empty((len(parts[0][1]), sum(len(a) for a, _, _ in parts)), dtype=np.float32)
        start = 0
        for a, b, share in parts:
            np.multiply(b, np.float32(share), out=joined[:, start : start + len(a)])
            start += len(a)
        both = np.concatenate([a for a, _, _ in parts]), joined
        dtype = self._inventory.recipe.output.dtype
        if not all(_are_normal(x, axis, dtype) for x, axis in zip(both, (1, 0), strict=True)):
            return None
        stored = [_stored(x, dtype) for x in both]
        return None if stored[0] is None or stored[1] is None else (stored[0], stored[1])

    def _shares(self, target: str) -> list[float]:
        """Return what every adapter's B is multiplied by: coefficient, `scale` and the adapter's own scaling."""
        recipe = self._inventory.recipe
        weights: Any = np.array(module_weights(recipe, target, self._towers))  # of which `Sum` and `Mean` need only arithmetic
        c = (self._combine.coefficients(weights, target) * recipe.factor).tolist()
        adapters = self._inventory.adapters
        return [x * a.targets[target].scaling if target in a.targets else x for x, a in zip(c, adapters, strict=True)]


def _read(adapter: Adapter, name: str) -> Floats | None:
    """Return one of an adapter's matrices; None where it is not to be had as numpy's float32, or not finite."""
    file = adapter.file
    if not isinstance(file, SafetensorsFile) or not file.is_in_order(name):
        return None
    stored = file.array(name)
    if stored.dtype == np.uint16:  # bfloat16 is the upper half of float32
        stored = np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    x: Floats = stored.astype(np.float32, copy=False)
    return x if x.size and _extent(x) <= _LIMITS["float32"].largest else None


def _extent(x: Floats) -> float:
    """Return the largest magnitude; NaN where an entry is NaN."""
    return float(max(x.max(), -x.min()))  # of NaN among numbers both are NaN


def _are_normal(x: Floats, axis: int, dtype: str, factor: float = 1.0) -> bool:
    """Return whether all columns (0) or rows (1) of x · factor keep their digits in a dtype, by the rule of `LowRank`."""
    tiny, largest = _LIMITS[dtype]
    if _extent(x) * abs(factor) > largest / 4:
        return False
    some = x[:_LOOKED_AT] if axis == 0 else x[:, :_LOOKED_AT]
    for looked_at in (some, x):
        sizes = np.abs(looked_at).max(axis=axis).astype(np.float64) * abs(factor)
        if bool((sizes >= 4 * tiny).all()):
            return True
    return bool(((sizes == 0) | (sizes >= 4 * tiny)).all())


def _stored(x: Floats, dtype: str) -> NDArray[Any] | None:
    """Return x in a dtype, bfloat16 as its bits in uint16; None where it overflows there, or all of it is 0."""
    bits: NDArray[Any]
    if dtype == "float32":
        found, bits, infinite = x, x.view(np.uint32), 0x7F800000
    elif dtype == "float16":
        with np.errstate(over="ignore"):
            found = x.astype(np.float16)
        bits, infinite = found.view(np.uint16), 0x7C00
    else:
        wide = x.view(np.uint32)
        wide = wide + (np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1)))  # to nearest, ties to even
        found = bits = (wide >> np.uint32(16)).astype(np.uint16)
        infinite = 0x7F80
    most = int((bits & bits.dtype.type(~(1 << (8 * bits.itemsize - 1)) & ((1 << 8 * bits.itemsize) - 1))).max())
    return found if 0 < most < infinite else None


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    if workers == 1:
        yield InThisThread()
        return
    pool = ThreadPoolExecutor(workers, "plait-work")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
