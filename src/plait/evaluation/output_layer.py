"""The layer that turns states into logits, kept from copying its matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
