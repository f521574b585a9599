"""The dense output: one tensor per target module, ΔW in the orientation of the base model's weight."""

from __future__ import annotations

from plait.adapters.layouts.conv1d import has_conv1d
from plait.adapters.writing import output_dtype
from plait.merging.engine import MergedModule
from plait.merging.inventory import Inventory
from plait.merging.plan import MergePlan
from plait.merging.truncation import rounded
from plait.tensorfiles.writer import TensorEntry, TensorWriter

NAME = "delta.safetensors"


class DeltaFile:
    """Names and shapes of a dense delta; writes merged modules by blocks of rows.

    Tensors are called `<module>.weight` (for fused experts, by the parameter), and `<module>.bias`
    for `lora_bias`. Layers that store their weight as (d_in, d_out),
    embeddings and GPT-2's Conv1D, are transposed here too, and so are held in memory while they are written.

    Args:
        inventory: the sources.
        plan: what is merged.
    """

    def __init__(self, inventory: Inventory, plan: MergePlan) -> None:
        self._layouts = {m.target: inventory.layouts[m.target] for m in plan.modules}
        self._has_bias = any(t.has_bias for a in inventory.adapters for t in a.targets.values())
        self._dtype = output_dtype(inventory.recipe.output.dtype)
        conv1d, flag = has_conv1d(inventory.base_config, {}), any(a.config.flag("fan_in_fan_out") for a in inventory.adapters)
        self._transposed = {
            t for t, layout in self._layouts.items() if layout.is_transposed(t, stored=None, conv1d=conv1d, flag=flag)
        }

    def entries(self) -> list[TensorEntry]:
        """Return every tensor of the file."""
        weights = [TensorEntry(self._name(t), self._dtype, self._shape(t)) for t in self._layouts]
        biases = [
            TensorEntry(f"{t}.bias", self._dtype, (layout.outputs,)) for t, layout in self._layouts.items() if self._has_bias
        ]
        return weights + biases

    def write(self, merged: MergedModule, writer: TensorWriter) -> None:
        """Write one merged module."""
        if merged.dense is None:
            raise AssertionError(f"{merged.target!r} has no dense delta")
        name, shape = self._name(merged.target), self._shape(merged.target)
        if merged.bias is not None:
            writer.write(f"{merged.target}.bias", rounded(merged.target, merged.bias, self._dtype))
        if merged.target in self._transposed:
            writer.write(name, rounded(merged.target, merged.dense[0].dense(), self._dtype).mT)
            return
        layout = self._layouts[merged.target]
        for index, matrix in enumerate(merged.dense):
            if layout.names_parameter:
                writer.write(name, rounded(merged.target, matrix.dense(), self._dtype).reshape(1, *shape[1:]), row=index)
                continue
            for start, block in matrix:
                rows = rounded(merged.target, block, self._dtype)
                writer.write(name, rows.reshape(len(block), *shape[1:]), row=index * layout.d_out + start)

    def _name(self, target: str) -> str:
        return self._layouts[target].weight_name(target)

    def _shape(self, target: str) -> tuple[int, ...]:
        layout = self._layouts[target]
        return tuple(reversed(layout.dense_shape)) if target in self._transposed else layout.dense_shape
