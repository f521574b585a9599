"""y + (h ⊙ λ) Bᵀ: the half of a low-rank forward pass that coefficients enter, with gradients that keep nothing but h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lift(y: Tensor, h: Tensor, coefficients: Tensor, bt: Tensor) -> Tensor:
    """Add the low-rank part to a layer's output, in place where autograd and the memory layout allow it.

    Args:
        y: (…, d_out), of the base layer; consumed.
        h: (…, R), x Aᵀ.
        coefficients: float32, (R,), or broadcastable to h; rounded to h's dtype only after the product.
        bt: (R, d_out); gradients reach it where it asks for them.

    Returns:
        y + (h ⊙ λ) Bᵀ, of y's dtype.
    """
    learned = (y, h, coefficients, bt)
    if torch.is_grad_enabled() and any(x.requires_grad for x in learned):
        lifted: Tensor = _Lift.apply(y, h, coefficients, bt)  # type: ignore[no-untyped-call]
        return lifted
    return _add(y, _scale(h, coefficients), bt)


class _Lift(torch.autograd.Function):
    """Saves h, (N, R); the adapters' separate outputs, (N, T · d_out), never exist."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, coefficients: Tensor, bt: Tensor) -> Tensor:
        ctx.save_for_backward(h, coefficients, bt)
        lifted = _add(y, _scale(h, coefficients), bt)
        if lifted is y:
            ctx.mark_dirty(y)
        return lifted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, coefficients, bt = ctx.saved_tensors
        _, needs_h, needs_coefficients, needs_bt = ctx.needs_input_grad
        dy_here = dy.to(bt.dtype)
        dh = dc = dbt = None
        if needs_h or needs_coefficients:
            g = dy_here @ bt.mT  # (…, R)
            dh = (g * coefficients).to(h.dtype) if needs_h else None
            dc = (h.to(coefficients.dtype) * g).sum_to_size(coefficients.shape) if needs_coefficients else None
        if needs_bt:
            dbt = _scale(h, coefficients).reshape(-1, h.shape[-1]).mT @ dy_here.reshape(-1, dy.shape[-1])
        return dy, dh, dc, dbt


def _scale(h: Tensor, coefficients: Tensor) -> Tensor:
    return (h * coefficients).to(h.dtype)  # the product is in float32


def _add(y: Tensor, scaled: Tensor, bt: Tensor) -> Tensor:
    # a compiler fuses the sum by itself, and autograd rebuilds the history of a view at the price of a copy
    if torch.compiler.is_compiling() or y.dtype != bt.dtype or y._is_view() or not y.is_contiguous():
        return y + (scaled @ bt).to(y.dtype)
    if y.is_leaf and y.requires_grad:  # a hook has made it one, as gradient checkpointing does; it cannot be written into
        return y + (scaled @ bt).to(y.dtype)
    y.view(-1, y.shape[-1]).addmm_(scaled.reshape(-1, scaled.shape[-1]), bt)
    return y
