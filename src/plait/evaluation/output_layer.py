"""The layer that turns states into logits, kept from copying its matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def plain_states(model: Any) -> Iterator[None]:
    """Give the output layer of a language model states without gaps in memory, while the block runs.

    What `logits_to_keep` cuts out of the states of a batch has gaps. For such a product with a frozen matrix, torch on a
    processor makes a copy of the matrix, (vocabulary, width), for every row of the batch, which takes several times as long as
    all other layers together.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        yield
        return
    # not contiguous(): it leaves the strides of a dimension of size 1 as they are, and they count here
    hook = layer.register_forward_pre_hook(lambda _, x: (x[0].clone(memory_format=torch.contiguous_format), *x[1:]))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def only_positions(model: Any, rows: Tensor, columns: Tensor) -> Iterator[bool]:
    """Let the output layer see some positions only, as (1, N, width), in the block; the value is whether it can be done.

    Scores of all positions over the vocabulary are by far the largest tensor of a forward pass, and nearly all unused.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        yield False
        return

    def pick(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][rows, columns].unsqueeze(0), *inputs[1:])

    hook = layer.register_forward_pre_hook(pick)
    try:
        yield True
    finally:
        hook.remove()
