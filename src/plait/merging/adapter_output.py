"""A merge as an adapter: what of the sources goes into its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.adapters.adapter import Adapter
from plait.adapters.layouts import Layout
from plait.adapters.selection import selection_of
from plait.adapters.writing import OUTPUT_DTYPES, AdapterWriter, tensors_in_memory
from plait.merging.engine import MergedModule
from plait.merging.heads import main_heads
from plait.merging.inventory import Inventory
from plait.merging.truncation import rounded


class MergedAdapter:
    """Writes the adapter of a merge.

    Args:
        inventory: the sources, and what is asked for.
        ranks: target → rank of one of its matrices.
    """

    def __init__(self, inventory: Inventory, ranks: Mapping[str, int]) -> None:
        output, targets = inventory.recipe.output, [a.targets[t] for a in inventory.adapters for t in ranks if t in a.targets]
        self._inventory, self._dtype = inventory, OUTPUT_DTYPES[output.dtype]
        self._layouts = {t: inventory.layouts[t] for t in ranks}
        self._writer = AdapterWriter(
            self._layouts,
            ranks,
            dtype=self._dtype,
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
        return {name: rounded(merged.target, tensor, self._dtype) for name, tensor in found.items()}

    def write(self, folder: Path, modules: Iterable[dict[str, Tensor]]) -> dict[str, str]:
        """Write every module's tensors, the heads that the adapter itself holds, and `adapter_config.json`.

        Returns:
            The sha256 of the tensor file by its name.
        """
        adapters, recipe = self._inventory.adapters, self._inventory.recipe
        heads, declared = main_heads(adapters, recipe.heads)
        settings = {**settings_of(adapters, self._layouts, self._inventory.base_model), **declared}
        return self._writer.write(folder, modules, self._writer.config(settings), tensors_in_memory(heads))


def settings_of(adapters: Sequence[Adapter], layouts: Mapping[str, Layout], base_model: str | None) -> dict[str, Any]:
    """Return the keys of `adapter_config.json` that a merge of adapters on these targets has from them."""
    # keys that change what the base model is or when the adapter acts; the sources agree on them (`inventory`)
    keys = ("layer_replication", "alora_invocation_tokens")
    return {
        "task_type": next((t for a in adapters if (t := a.config.raw.get("task_type"))), None),
        "base_model_name_or_path": base_model,
        "revision": next((a.config.revision for a in adapters if a.config.revision), None),
        "fan_in_fan_out": any(a.config.flag("fan_in_fan_out") for a in adapters),
        **selection_of(adapters, layouts),
        **{key: value for key in keys if (value := adapters[0].config.raw.get(key)) is not None},
    }
