"""Full tensors of adapters that go into the model: heads, resized embeddings, trained token rows, trained biases."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from plait.adapters.adapter import Adapter
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.deferred import Tensor, torch
from plait.merging.heads import same_full_tensors
from plait.recipes.schema import Heads
from plait.tensorfiles.blocks import TENSOR_BLOCK_ELEMENTS
from plait.tensorfiles.reader import torch_dtype

_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class FullTensor:
    """One full tensor, or the mean of several adapters'.

    Attributes:
        names: (adapter, tensor in its file), for messages and for comparing.
        shape: of it.
        indices: which rows of an embedding these are; empty for a complete tensor.
        adapters: whose.
        table: the table that the rows are put into, where the adapter brings it (a resized vocabulary); else the base's.
    """

    names: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]
    indices: tuple[int, ...] = ()
    adapters: tuple[Adapter, ...] = field(default=(), repr=False, compare=False)
    table: FullTensor | None = field(default=None, repr=False)

    def values(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Return `count` values from the value `first` on, flat; the mean over adapters is accumulated in float64."""
        named = zip(self.adapters, self.names, strict=True)
        parts = [a.finite(name, a.file.values(name, first, count)) for a, (_, name) in named]
        return parts[0].to(dtype) if len(parts) == 1 else torch.stack([p.double() for p in parts]).mean(0).to(dtype)

    def equals(self, checkpoint: BaseCheckpoint, name: str) -> bool:
        """Return whether a tensor of the base has these values, as far as the dtype of these can show."""
        if checkpoint.info(name).shape != self.shape or len(self.adapters) != 1:
            return False
        dtype = torch_dtype(self.adapters[0].file.tensors[self.names[0][1]].dtype)
        size = math.prod(self.shape)
        return all(
            torch.equal(self.values(i, n, dtype), checkpoint.values(name, i, n).to(dtype))
            for i in range(0, size, TENSOR_BLOCK_ELEMENTS)
            for n in [min(TENSOR_BLOCK_ELEMENTS, size - i)]
        )

    def same_values(self, other: FullTensor) -> bool:
        """Return whether two tensors have equal values."""
        size = math.prod(self.shape)
        return self.shape == other.shape and all(
            torch.equal(self.values(i, n, torch.float64), other.values(i, n, torch.float64))
            for i in range(0, size, TENSOR_BLOCK_ELEMENTS)
            for n in [min(TENSOR_BLOCK_ELEMENTS, size - i)]
        )


def effective_heads(adapters: Sequence[Adapter], heads: Heads) -> Heads:
    """Return the policy for a model: one adapter's own tensors are part of it, those of several follow the recipe.

    Where several adapt a tensor of their own (a resized vocabulary) the recipe must name whose it is, unless all have the same.
    """
    own = any(".base_layer." in path for adapter in adapters for path in adapter.full_tensors)
    if heads.policy == "separate" and (len(adapters) == 1 or (own and same_full_tensors(adapters))):
        return Heads(policy="from", adapter=adapters[0].name)
    return heads


def full_tensors(adapters: Sequence[Adapter], heads: Heads) -> tuple[dict[str, FullTensor], list[str]]:
    """Return parameter → full tensor that goes into the model, and what is wrong with them."""
    if heads.policy == "separate":
        return {}, []
    have = [a for a in adapters if a.full_tensors and heads.adapter in (None, a.name)]
    found: dict[str, FullTensor] = {}
    problems = []
    for path in sorted({p for a in have for p in a.full_tensors}):
        parameter = parameter_of(path)
        tensor = full_tensor(parameter, path, tuple(a for a in have if path in a.full_tensors))
        if path.endswith(_TOKENS) and len(tensor.indices) != tensor.shape[0]:
            problems.append(
                f"{path} has {tensor.shape[0]} rows, trainable_token_indices of {tensor.names[0][0]!r} names "
                f"{len(tensor.indices)}; the adapter contradicts itself."
            )
        elif parameter in found and bool(tensor.indices) != bool(found[parameter].indices):
            rows, table = sorted((tensor, found[parameter]), key=lambda t: not t.indices)
            found[parameter] = replace(rows, table=table)
        elif parameter in found:
            problems.append(f"{path} and {found[parameter].names[0][1]!r} are both the values of {parameter}; keep one.")
        else:
            found[parameter] = tensor
    return found, problems


def full_tensor(parameter: str, path: str, owners: tuple[Adapter, ...]) -> FullTensor:
    """Return the full tensor of adapters that have it under the same path."""
    names = tuple((a.name, a.full_tensors[path]) for a in owners)
    shape = owners[0].file.tensors[names[0][1]].shape
    indices = _indices(owners[0], parameter) if path.endswith(_TOKENS) else ()
    return FullTensor(names, shape, indices, owners)


def parameter_of(path: str) -> str:
    """Return the model's parameter that a full tensor of an adapter replaces."""
    if path.endswith(_TOKENS):
        return path.removesuffix(_TOKENS) + ".weight"
    return re.sub(r"\.base_layer(?=\.)", "", path)


def _indices(adapter: Adapter, parameter: str) -> tuple[int, ...]:
    declared = adapter.config.raw.get("trainable_token_indices") or []
    if isinstance(declared, Mapping):
        module = parameter.removesuffix(".weight")
        declared = next((v for k, v in declared.items() if module == k or module.endswith("." + k)), [])
    return tuple(int(i) for i in declared)
