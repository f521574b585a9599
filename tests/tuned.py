"""Batches of a tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plait.mixture import Mixture
from plait.recipes.tuning import TuneSpec

SPEC = TuneSpec(held_out=0, prompts=4, granularity="module", learning_rate=0.05)


def literal(mixture: Mixture, weights: dict[str, float], passage: Any, *, shift: int = 1) -> tuple[Tensor, Tensor]:
    """Return log p (n, V) float64 of each token of the answer, and the tokens, from one plain forward pass."""
    ids = torch.tensor([[*passage.prompt, *passage.answer]])
    with mixture.active(weights) as model, torch.no_grad():
        log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
    first = len(passage.prompt) - shift
    return log_p[first : first + len(passage.answer)], torch.tensor(passage.answer)
