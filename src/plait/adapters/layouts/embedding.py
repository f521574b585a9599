"""`torch.nn.Embedding`: a weight (tokens, features), so ΔWᵀ; factors that are parameters, under names of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from plait.adapters.layouts.base import Layout
from plait.deferred import torch


@dataclass(frozen=True)
class Embedding(Layout):
    """A (r, tokens), B (features, r)."""

    kind = "embedding"
    a_part = "lora_embedding_A"
    b_part = "lora_embedding_B"
    suffix = ""
    is_stored_transposed = True
    reads_tokens = True
    takes_bias = False

    @classmethod
    def claims(cls, shapes: Mapping[str, tuple[int, ...]], *, is_parameter: bool) -> bool:
        """Return whether a part has an embedding's name."""
        return cls.a_part in shapes or cls.b_part in shapes

    @classmethod
    def of_module(cls, module: Any) -> Self | None:
        """Return the layout of factors on a `torch.nn.Embedding`."""
        return cls(module.embedding_dim, module.num_embeddings) if isinstance(module, torch.nn.Embedding) else None
