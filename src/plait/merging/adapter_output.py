"""A merge as an adapter: what of the sources goes into its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.adapters.formats import ModuleFactors
from plait.adapters.lowrank import LowRank
from plait.adapters.writing import AdapterWriter, output_dtype, tensors_in_memory
from plait.deferred import Tensor
from plait.merging.engine import MergedModule
from plait.merging.heads import main_heads
from plait.merging.inventory import Inventory
from plait.merging.output_format import outgoing_merge, output_format, settings_of
from plait.merging.truncation import rounded

if TYPE_CHECKING:
    from numpy.typing import NDArray


class OtherAdapter:
    """Writes the adapter of a merge in a format that is not PEFT's, or for a component of a pipeline.

    Args:
        inventory: the sources, and what is asked for.
        ranks: target → rank of one of its matrices.
    """

    def __init__(self, inventory: Inventory, ranks: Mapping[str, int]) -> None:
        self._format = output_format(inventory)
        self._outgoing = outgoing_merge(inventory, ranks)
        self._dtype, self._ranks = output_dtype(inventory.recipe.output.dtype), ranks
        self._names = dict(zip(ranks, self._outgoing.targets, strict=True))
        self.rank = max(ranks.values())

    def tensors(self, merged: MergedModule) -> ModuleFactors:
        """Return one merged module's factors in the output's dtype; errors as `MergedAdapter.tensors`."""
        if merged.factors is None:
            raise AssertionError(f"{merged.target!r} has no factors")
        target, dtype = merged.target, self._dtype
        parts = [s.normal_in(dtype).padded(self._ranks[target]) for s in merged.factors.slices]
        slices = [LowRank(rounded(target, s.a, dtype), rounded(target, s.b, dtype)) for s in parts]
        bias, magnitude = (None if x is None else rounded(target, x, dtype) for x in (merged.bias, merged.magnitude))
        return ModuleFactors(self._names[target], slices, bias, magnitude)

    def write(self, folder: Path, modules: Iterable[ModuleFactors]) -> dict[str, str]:
        """Write every module; return the sha256 of the tensor file by its name."""
        return self._format.write(folder, self._outgoing, modules)


class MergedAdapter:
    """Writes the adapter of a merge.

    Args:
        inventory: the sources, and what is asked for.
        ranks: target → rank of one of its matrices.
    """

    def __init__(self, inventory: Inventory, ranks: Mapping[str, int]) -> None:
        output, targets = inventory.recipe.output, [a.targets[t] for a in inventory.adapters for t in ranks if t in a.targets]
        self._inventory, self._dtype = inventory, output.dtype
        self._layouts = {t: inventory.layouts[t] for t in ranks}
        self._writer = AdapterWriter(
            self._layouts,
            ranks,
            dtype=self._dtype,  # its name: torch's own would import it
            uniform=output.layout == "uniform",
            has_bias=any(t.has_bias for t in targets),
            is_dora=any(t.is_dora for t in targets),
        )
        self.rank = self._writer.rank  # PEFT's r

    def tensors(self, merged: MergedModule) -> dict[str, Tensor]:
        """Return one merged module's tensors by their names, in the output's dtype.

        Raises:
            PlanError: a value overflows there, or all of them vanish.
        """
        if merged.factors is None:
            raise AssertionError(f"{merged.target!r} has no factors")
        found = self._writer.tensors(merged.target, merged.factors.slices, bias=merged.bias, magnitude=merged.magnitude)
        dtype = output_dtype(self._dtype)
        return {name: rounded(merged.target, tensor, dtype) for name, tensor in found.items()}

    def arrays(self, target: str, a: NDArray[Any], b: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return one linear module's factors, which are in the output's dtype, by their names."""
        return self._writer.arrays(target, a, b)

    def write(self, folder: Path, modules: Iterable[dict[str, Tensor] | dict[str, NDArray[Any]]]) -> dict[str, str]:
        """Write every module's tensors, the heads that the adapter itself holds, and `adapter_config.json`.

        Returns:
            The sha256 of the tensor file by its name.
        """
        adapters, recipe = self._inventory.adapters, self._inventory.recipe
        heads, declared = main_heads(adapters, recipe.heads)
        settings = {**settings_of(adapters, self._layouts, self._inventory.base_model), **declared}
        return self._writer.write(folder, modules, self._writer.config(settings), tensors_in_memory(heads))
