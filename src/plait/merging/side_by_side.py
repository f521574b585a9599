"""A weighted sum whose factors are written side by side, by numpy: importing torch takes longer than the sum.

Only what is plain is done here: linear layers of safetensors files, whose values stay normal numbers. Every other module is
merged by the engine, which gives the same bytes where both can; errors are its own, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from plait.results.threads import ahead
from plait.stages.sums import Mean, Sum
from plait.tensorfiles.reader import SafetensorsFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_LOOKED_AT = 8  # rows that show of most columns that they are normal
_STORED = 1 << 16  # entries that are scaled and rounded at a time, in the processor's cache


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
        progress: receives the stage and its steps.
    """

    def __init__(self, inventory: Inventory, plan: MergePlan, engine: Engine, progress: Progress) -> None:
        self._inventory, self._plan, self._engine = inventory, plan, engine
        self._progress = progress
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
            # one thread: a second saves no time, and holds another module
            with ThreadPoolExecutor(1, "plait-work") as pool:
                for record, found in ahead("merge", one, self._plan.modules, pool, 2, self._progress):
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
        parts = [
            (adapter, adapter.targets[target].tensors, share)
            for adapter, share in zip(self._inventory.adapters, self._shares(target), strict=True)
            if target in adapter.targets
        ]
        a = self._joined([(adapter, names[Linear.a_part], float(share != 0)) for adapter, names, share in parts], 0)
        b = None if a is None else self._joined([(adapter, names[Linear.b_part], share) for adapter, names, share in parts], 1)
        return None if a is None or b is None else (a, b)

    def _joined(self, parts: Sequence[tuple[Adapter, str, float]], axis: int) -> NDArray[Any] | None:
        """Return matrices of adapters, each times a number, below (0) or next to (1) each other, as they are stored.

        Those times 0 are left out; None where one of them is not plain, or the result is not.
        """
        shapes = [adapter.file.tensors[name].shape for adapter, name, share in parts if share != 0]
        if not shapes or any(len(shape) != 2 for shape in shapes):
            return None
        total, other = sum(shape[axis] for shape in shapes), shapes[0][1 - axis]
        dtype = self._inventory.recipe.output.dtype
        joined = np.empty((total, other) if axis == 0 else (other, total), dtype="uint16" if dtype == "bfloat16" else dtype)
        start = 0
        for adapter, name, share in parts:
            found = _read(adapter, name)
            if found is None or (share != 0 and not found.is_normal(1 - axis, dtype, share)):
                return None
            if share != 0:
                end = start + found.values.shape[axis]
                _store(found.values, share, dtype, out=joined[start:end] if axis == 0 else joined[:, start:end])
                start = end
        return joined

    def _shares(self, target: str) -> list[float]:
        """Return what every adapter's B is multiplied by: coefficient, `scale` and the adapter's own scaling."""
        recipe = self._inventory.recipe
        weights: Any = np.array(module_weights(recipe, target, self._towers))  # of which `Sum` and `Mean` need only arithmetic
        c = (self._combine.coefficients(weights, target) * recipe.factor).tolist()
        adapters = self._inventory.adapters
        return [x * a.targets[target].scaling if target in a.targets else x for x, a in zip(c, adapters, strict=True)]


class _Matrix(NamedTuple):
    """A matrix, and its largest magnitude."""

    values: Floats
    largest: float

    def is_normal(self, axis: int, dtype: str, factor: float) -> bool:
        """Return whether all columns (0) or rows (1) times a factor keep their digits in a dtype, by the rule of `LowRank`.

        Then none of them overflows there. What is all zero, or near the rule's upper end, is not called normal.
        """
        tiny, most = _LIMITS[dtype]
        if not 0 < self.largest * abs(factor) <= most / 8:
            return False
        x = self.values
        some = x[:_LOOKED_AT] if axis == 0 else x[:, :_LOOKED_AT]
        sizes = np.abs(some).max(axis=axis).astype(np.float64) * abs(factor)
        if bool((sizes >= 4 * tiny).all()):
            return True
        sizes = np.abs(x).max(axis=axis).astype(np.float64) * abs(factor)
        return bool(((sizes == 0) | (sizes >= 4 * tiny)).all())


def _read(adapter: Adapter, name: str) -> _Matrix | None:
    """Return one of an adapter's matrices; None where it is not to be had as numpy's float32, or not finite."""
    file = adapter.file
    if not isinstance(file, SafetensorsFile) or not file.is_in_order(name):
        return None
    stored = file.array(name)
    if stored.dtype == np.uint16:  # bfloat16 is the upper half of float32
        stored = np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    x: Floats = stored.astype(np.float32, copy=False)
    largest = float(max(x.max(), -x.min())) if x.size else math.nan  # both are NaN where an entry is
    return _Matrix(x, largest) if largest <= _LIMITS["float32"].largest else None


def _store(x: Floats, factor: float, dtype: str, *, out: NDArray[Any]) -> None:
    """Write x times a number in a dtype in which nothing of it overflows; bfloat16 as its bits in uint16."""
    step = max(1, _STORED // x.shape[1])
    for top in range(0, len(x), step):
        rows = slice(top, top + step)
        scaled = x[rows] if factor == 1 else x[rows] * factor
        if dtype != "bfloat16":
            out[rows] = scaled
            continue
        wide = scaled.view(np.uint32)
        rounded = wide >> np.uint32(16)  # to nearest, ties to even
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += wide
        rounded >>= np.uint32(16)
        out[rows] = rounded
