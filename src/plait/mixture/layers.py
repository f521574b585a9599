"""Hooks that make a layer of the base act as base plus adapters; one class per kind of layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.adapters.layouts import Convolution, Embedding, Layout, Linear, Parameter
from plait.errors import PlanError
from plait.libraries.transformers.layers import embedding_scale
from plait.mixture.coefficients import CoefficientState
from plait.mixture.lift import lift
from plait.mixture.modules import TargetModule
from plait.mixture.stack import Stack


class Adapted(ABC):
    """A target module with adapters on it. It does nothing until attached.

    Args:
        target: the adapted weight.
        stack: the factors.
        state: the coefficients.
        module: its row in Λ per module.
        layer: its row in Λ per layer.
    """

    def __init__(self, target: TargetModule, stack: Stack, state: CoefficientState, module: int, layer: int) -> None:
        self.target = target
        self.stack = stack
        self._state = state
        self._module = module
        self._layer = layer
        self._placed = target.home is not None

    @abstractmethod
    def attach(self, undo: ExitStack) -> None:
        """Begin to act, until `undo` is closed."""

    @property
    def acts(self) -> bool:
        """Whether any of the adapters that act has ranks here."""
        now, bounds = self._state.now, self.stack.bounds
        return bounds[now.last] > bounds[now.first]

    def per_rank(self, batch: int | None) -> tuple[Tensor, int, int]:
        """Return λ per rank, (r,) or (batch, r), and the range [first, last) of the stack's ranks that act.

        Args:
            batch: the first dimension of what the layer computes; None where it has no batch.
        """
        now, stack = self._state.now, self.stack
        first, last = stack.bounds[now.first], stack.bounds[now.last]
        share = self._rows(now.share(self._module, self._layer).to(stack.owners.device), batch)
        if now.granularity == "direction":
            return share[..., first:last], first, last
        return share.index_select(-1, stack.owners[first:last]), first, last

    def per_task(self, batch: int | None) -> Tensor:
        """Return λ per adapter, (T,) or (batch, T); adapters that do not act have 0."""
        now = self._state.now
        return self._rows(now.share(self._module, self._layer).to(self.stack.owners.device), batch)

    def _rows(self, share: Tensor, batch: int | None) -> Tensor:
        """Repeat coefficients per row as often as a row of the batch became several here (beams, flattened tokens)."""
        if not self._state.now.per_row:
            return share
        if batch is None or batch % share.shape[0]:
            found = "no rows" if batch is None else f"{batch} rows"
            raise PlanError(
                f"{self.target.path!r} sees {found}, the candidates are {share.shape[0]} rows; evaluate them one by one."
            )
        return share.repeat_interleave(batch // share.shape[0], 0) if batch != share.shape[0] else share


class _CorrectedOutput(Adapted):
    """A layer whose output is corrected after it ran, wherever and however its own weight is stored."""

    dimensions = 0  # of the output after its features

    def attach(self, undo: ExitStack) -> None:
        """Begin to act, until `undo` is closed."""
        undo.callback(self.target.module.register_forward_hook(self._correct, with_kwargs=True).remove)

    def _correct(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        if not self._placed or self.stack.a.device != y.device:  # the weight does not show it: offloaded, quantized
            self.stack = self.stack.to(y.device, self.stack.a.dtype if self._placed else y.dtype)
            self._placed = True
        x = args[0] if args else next(iter(kwargs.values()))
        return self.delta(x.to(y.device), self._corrected(y)) if self.acts else self._corrected(y)

    def _corrected(self, y: Tensor) -> Tensor:
        """Add what is not a low-rank delta: DoRA's row scaling of W x, and trained biases."""
        gains, biases = self.stack.gains, self.stack.biases
        if gains is None and biases is None:
            return y
        now, tail = self._state.now, (1,) * self.dimensions
        share = self.per_task(len(y))[..., now.first : now.last]

        def spread(rows: Tensor) -> Tensor:  # (T, d_out) → (d_out, *tail), or (batch, …, d_out, *tail)
            mixed = share @ rows[now.first : now.last].to(share.dtype)
            middle = (1,) * (y.ndim - 2 - self.dimensions) if now.per_row else ()
            return mixed.reshape(*mixed.shape[:-1], *middle, mixed.shape[-1], *tail)

        total = y.to(share.dtype)
        if gains is not None:
            bias = getattr(self.target.module, "bias", None)
            plain = total if bias is None else total - bias.to(share.dtype).view(-1, *tail)
            total = total + spread(gains) * plain
        if biases is not None:
            total = total + spread(biases)
        return total.to(y.dtype)

    @abstractmethod
    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y plus the low-rank delta's output for x."""


class LinearLayer(_CorrectedOutput):
    """`nn.Linear`, Conv1D, and quantized layers that map vectors linearly."""

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + (x Aᵀ ⊙ λ) Bᵀ."""
        share, first, last = self.per_rank(x.shape[0] if x.ndim > 1 else None)
        h = F.linear(x.to(self.stack.a.dtype), self.stack.a[0, first:last])
        return lift(y, h, _middle(share, h.ndim), self.stack.bt[0, first:last])


class EmbeddingLayer(_CorrectedOutput):
    """`nn.Embedding`, also with a scale of its own (Gemma's `embed_scale`), which the delta shares."""

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + (Aᵀ[ids] ⊙ λ) Bᵀ."""
        share, first, last = self.per_rank(x.shape[0] if x.ndim else None)
        h = F.embedding(x, self.stack.a[0, first:last].mT)
        scale = embedding_scale(self.target.module)
        if scale is not None:
            h = h * torch.as_tensor(scale, device=h.device).to(h.dtype)
        return lift(y, h, _middle(share, h.ndim), self.stack.bt[0, first:last])


class ConvolutionLayer(_CorrectedOutput):
    """`nn.Conv1d`, `Conv2d`, `Conv3d`: A convolves all channels with the base's kernel, B mixes channels within groups."""

    @property
    def dimensions(self) -> int:  # type: ignore[override]
        """Spatial dimensions."""
        return len(self._layout.kernel) - 1

    @property
    def _layout(self) -> Convolution:
        layout = self.target.layout
        if not isinstance(layout, Convolution):
            raise AssertionError(f"{self.target.path!r}: {layout} is not a convolution")
        return layout

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + B * (λ ⊙ (A * x)), * being convolution."""
        layout, stack = self._layout, self.stack
        ones = (1,) * self.dimensions
        share, first, last = self.per_rank(x.shape[0] if x.ndim == self.dimensions + 2 else None)
        a = stack.a[:, first:last].reshape(-1, *layout.kernel)
        b = stack.bt[:, first:last].mT.reshape(-1, last - first, *ones)
        h = self._convolve(x.to(a.dtype), a)
        per_channel = share.repeat(*(1,) * (share.ndim - 1), layout.stack)  # ranks group by group
        scaled = (h * per_channel.view(*per_channel.shape, *ones)).to(h.dtype)
        mixed: Tensor = _CONVOLVE[self.dimensions](scaled, b, groups=layout.stack)
        return y + mixed.to(y.dtype)

    def _convolve(self, x: Tensor, a: Tensor) -> Tensor:
        module: Any = self.target.module
        padding = module.padding
        if module.padding_mode != "zeros":
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
        h: Tensor = _CONVOLVE[self.dimensions](x, a, None, module.stride, padding, module.dilation)
        return h


_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ParameterLayer(Adapted):
    """A parameter that its module reads as it likes, such as fused experts: W + ΔW replaces it during a call.

    This is how PEFT treats `target_parameters`. It forms ΔW densely for the time of the call, and knows no rows of a batch.
    """

    def attach(self, undo: ExitStack) -> None:
        """Begin to act, until `undo` is closed."""
        undo.callback(self.target.module.register_forward_hook(self._uncover, always_call=True).remove)
        undo.callback(self.target.module.register_forward_pre_hook(self._shadow).remove)

    def _shadow(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.acts:
            return
        base = self.target.weight
        share, first, last = self.per_rank(None)
        delta = _Product.apply(self.stack.a[:, first:last], self.stack.bt[:, first:last], share)  # type: ignore[no-untyped-call]
        delta = delta.mT if self.target.transposed else delta
        # an attribute of the instance hides the parameter without touching it
        module.__dict__[self.target.parameter] = base + delta.view_as(base) if base.ndim == 2 else base + delta

    def _uncover(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        module.__dict__.pop(self.target.parameter, None)


class _Product(torch.autograd.Function):
    """Σₖ λₖ bₖ aₖ per slice, (slices, d_out, d_in)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, bt: Tensor, coefficients: Tensor) -> Tensor:
        ctx.save_for_backward(a, bt, coefficients)
        return (bt * coefficients.unsqueeze(-1)).to(bt.dtype).mT @ a

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        a, bt, coefficients = ctx.saved_tensors
        needs_a, needs_bt, needs_coefficients = ctx.needs_input_grad
        moved = bt @ dw if needs_a or needs_coefficients else None  # (slices, r, d_in)
        da = dc = dbt = None
        if moved is not None:
            da = (moved * coefficients.unsqueeze(-1)).to(a.dtype) if needs_a else None
            dc = (moved.to(coefficients.dtype) * a).sum((0, 2)) if needs_coefficients else None
        if needs_bt:
            dbt = ((a @ dw.mT) * coefficients.unsqueeze(-1)).to(bt.dtype)
        return da, dbt, dc


# Layout → what runs it, and the layouts derived from it that have no class of their own.
_LAYERS: dict[type[Layout], type[Adapted]] = {
    Linear: LinearLayer,
    Embedding: EmbeddingLayer,
    Convolution: ConvolutionLayer,
    Parameter: ParameterLayer,
}


def layer_type(layout: type[Layout]) -> type[Adapted]:
    """Return the class that runs a layout: its own, or that of the layout which it is derived from."""
    return next(_LAYERS[kind] for kind in layout.__mro__ if kind in _LAYERS)


def adapted(target: TargetModule, stack: Stack, state: CoefficientState, *, module: int = 0, layer: int = 0) -> Adapted:
    """Return what makes a stack of deltas act on a target module; arguments as `Adapted` has them."""
    return layer_type(type(target.layout))(target, stack, state, module, layer)


def _middle(share: Tensor, ndim: int) -> Tensor:
    """Put coefficients per row, (batch, r), against (batch, …, r); (r,) is broadcast as it is."""
    return share if share.ndim == 1 else share.view(share.shape[0], *(1,) * (ndim - 2), share.shape[-1])
