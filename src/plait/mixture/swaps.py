"""Tensors of the base that are replaced for a while: heads, trained token rows and biases, dense deltas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plait.adapters.adapter import Adapter
from plait.errors import PlanError
from plait.mixture.deltas import DenseDelta
from plait.mixture.modules import ModuleIndex, TargetModule

_ROWS = ".token_adapter.trainable_tokens_delta"
_WRAPPED = ".base_layer"


class Swap(Protocol):
    """A change of the base that can be undone without a trace."""

    def apply(self) -> None:
        """Change it."""

    def undo(self) -> None:
        """Put back what was there."""


class TensorSwap:
    """Another tensor in place of a parameter or buffer of one module; the very object that was there comes back.

    Modules that share the parameter (a tied head) keep theirs, as in PEFT.
    """

    def __init__(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        self._module = module
        self._name = name
        self._tensor = tensor
        self._before: Tensor | None = None

    def apply(self) -> None:
        """Put the tensor in place."""
        self._before = self._exchange(self._tensor)

    def undo(self) -> None:
        """Put back what was there."""
        self._exchange(self._before)

    def _exchange(self, new: Tensor | None) -> Tensor | None:
        if self._name in self._module._buffers:
            before: Tensor | None = self._module._buffers[self._name]
            self._module._buffers[self._name] = new
            return before
        before = self._module._parameters[self._name]
        if new is not None and not isinstance(new, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)
        self._module._parameters[self._name] = new
        return before


class RowSwap:
    """Other values in some rows of a parameter, for every module that shares it; the rows that were there come back."""

    def __init__(self, parameter: Tensor, indices: Tensor, rows: Tensor) -> None:
        self._parameter = parameter
        self._indices = indices
        self._rows = rows
        self._before: Tensor | None = None

    def apply(self) -> None:
        """Write the rows."""
        self._before = self._parameter.detach()[self._indices]  # a copy
        self._parameter.detach()[self._indices] = self._rows

    def undo(self) -> None:
        """Write back what was there."""
        if self._before is not None:
            self._parameter.detach()[self._indices] = self._before
            self._before = None


@dataclass(frozen=True, eq=False)
class FullTensorSet:
    """Heads, trained token rows and trained biases that belong together.

    Attributes:
        tensors: path in the base model → tensor, as `Adapter.full_tensors` names them.
        token_indices: which tokens the trained rows are of, as in PEFT's configuration: one list, or one per module name.
    """

    tensors: Mapping[str, Tensor]
    token_indices: Any = None

    @staticmethod
    def of(adapter: Adapter) -> FullTensorSet:
        """Read an adapter's."""
        tensors = {path: adapter.read_full(path) for path in adapter.full_tensors}
        return FullTensorSet(tensors, adapter.config.raw.get("trainable_token_indices"))


def full_swaps(full: FullTensorSet, modules: ModuleIndex) -> list[Swap]:
    """Return what makes full tensors act; copies of the model's own values change nothing, and are left out.

    Raises:
        ValueError: the model has no place for one of them; the text says which.
    """
    swaps: list[Swap] = []
    tables = [path for path in full.tensors if path.endswith(_ROWS)]
    for path, tensor in full.tensors.items():
        if path in tables:
            swaps.append(_token_rows(path, tensor, full.token_indices, modules, alone=len(tables) == 1))
            continue
        module, name = modules.tensor(path.replace(_WRAPPED, ""))
        swap = _full_swap(path, tensor, module, name)
        # trained rows of a shared tensor would reach a module that keeps the model's
        if tables or not _is_copy(tensor, getattr(module, name)):
            swaps.append(swap)
    return swaps


def _is_copy(tensor: Tensor, present: Tensor) -> bool:
    return tensor.shape == present.shape and torch.equal(tensor.to(present.device, present.dtype), present.detach())


def _full_swap(path: str, tensor: Tensor, module: nn.Module, name: str) -> Swap:
    present = getattr(module, name)
    if present is None:
        raise ValueError(f"{path!r}: the model's {type(module).__name__} has no {name}.")
    if present.is_meta:
        raise ValueError(
            f"{path!r}: the model's tensor is offloaded and cannot be exchanged; keep it on a device (device_map)."
        )
    if not present.is_floating_point() and tensor.is_floating_point():
        raise ValueError(f"{path!r}: the model's tensor is quantized; exclude this module from quantization.")
    # a head of another task may have another number of labels
    if tensor.shape != present.shape and not (isinstance(module, nn.Linear) and tensor.shape[1:] == present.shape[1:]):
        raise ValueError(f"{path!r}: the adapter's tensor is {list(tensor.shape)}, the model's is {list(present.shape)}.")
    return TensorSwap(module, name, tensor.to(present.device, present.dtype))


def _token_rows(path: str, rows: Tensor, declared: Any, modules: ModuleIndex, *, alone: bool) -> Swap:
    """Return what puts trained rows in place: in every use of the tensor where the embedding `alone` has some, as in PEFT."""
    owner = path.removesuffix(_ROWS).removesuffix(_WRAPPED)
    module, name = modules.tensor(f"{owner}.weight")
    weight, indices = getattr(module, name), _indices(declared, owner)
    if indices is None or len(indices) != len(rows):
        raise ValueError(f"{path!r}: {len(rows)} rows, but trainable_token_indices lists {indices} for {owner!r}.")
    if weight.is_meta or not weight.is_floating_point():
        raise ValueError(f"{path!r}: the model's tensor is offloaded or quantized; its rows cannot be exchanged.")
    if rows.shape[1:] != weight.shape[1:] or max(indices, default=0) >= len(weight):
        raise ValueError(f"{path!r}: rows {indices} of {list(rows.shape[1:])} do not fit the model's {list(weight.shape)}.")
    where, values = torch.tensor(indices, device=weight.device), rows.to(weight.device, weight.dtype)
    if alone and isinstance(module, nn.Embedding):
        return RowSwap(weight, where, values)
    return TensorSwap(module, name, weight.detach().index_copy(0, where, values))


def _indices(declared: Any, owner: str) -> list[int] | None:
    """Return the token ids of a module: PEFT's configuration has one list, or one per module name."""
    if isinstance(declared, Mapping):
        return next((list(v) for k, v in declared.items() if owner == k or owner.endswith(f".{k}")), None)
    return list(declared) if declared is not None else None


def dense_swaps(target: TargetModule, delta: DenseDelta) -> list[Swap]:
    """Return the weight W + ΔW, added in float32 and rounded once, as a bake writes it; and the bias, where there is one.

    Raises:
        PlanError: the weight cannot be replaced.
    """
    problem = target.dense_problem()
    if problem is not None:
        raise PlanError(f"a dense delta cannot be attached. {problem}")
    weight = target.weight.detach()
    new = weight.clone(memory_format=torch.contiguous_format)
    for matrix, blocks in zip(target.matrices(new), delta.slices, strict=True):
        for start, block in blocks:
            rows = matrix[start : start + len(block)]
            rows.copy_(rows.to(block.dtype) + block.to(rows.device))
    swaps: list[Swap] = [TensorSwap(target.module, target.parameter, new)]
    if delta.bias is not None:
        present = getattr(target.module, "bias", None)
        if "bias" not in target.module._parameters:
            raise PlanError(f"{target.path!r}: the layer takes no bias.")
        total = delta.bias.to(weight.device) + (0 if present is None else present.detach().to(delta.bias.dtype))
        swaps.append(TensorSwap(target.module, "bias", total.to(weight.dtype)))
    return swaps
