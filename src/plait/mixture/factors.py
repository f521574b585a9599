"""Low-rank factors of a merge that act on the live base and learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from plait.adapters.lowrank import LowRank
from plait.mixture.coefficients import Coefficients, CoefficientState
from plait.mixture.deltas import AdapterDelta
from plait.mixture.layers import Adapted, adapted
from plait.mixture.modules import TargetModule
from plait.mixture.stack import Stack


@dataclass(eq=False)
class _LearnedTarget:
    """One target's factors: float32 parameters, and what acts of them.

    Attributes:
        layer: that acts.
        a: (slices, r, d_in) float32.
        bt: (slices, r, d_out) float32, B transposed.
    """

    layer: Adapted
    a: nn.Parameter
    bt: nn.Parameter


class LearnedFactors:
    """A low-rank delta per target module, as float32 parameters in place of the adapters; see `Mixture.learning`.

    What acts is the parameters rounded to the base's dtype, as of the last `refresh`. Factors begin balanced (U √σ, √σ Vᵀ), so
    that one learning rate suits A and B.

    Args:
        deltas: path → (target module, delta); a delta above `rank` is truncated by its SVD.
        rank: largest rank of a matrix; None keeps every rank.
    """

    def __init__(self, deltas: Mapping[str, tuple[TargetModule, AdapterDelta]], rank: int | None = None) -> None:
        self._state = CoefficientState(Coefficients(torch.ones(1), "task", 0, 1))
        self._learned: dict[str, _LearnedTarget] = {}
        for path, (target, delta) in deltas.items():
            widest = min(delta.rank if rank is None else rank, target.layout.full_rank)
            slices = [s.to(torch.float32).truncated(widest)[0].padded(widest) for s in delta.slices]
            balanced = replace(delta, slices=tuple(slices))
            layer = adapted(target, Stack.of(target, [balanced]), self._state)
            a, bt = torch.stack([s.a for s in slices]), torch.stack([s.b.mT for s in slices])
            device = target.home[0] if target.home is not None else None
            self._learned[path] = _LearnedTarget(
                layer, nn.Parameter(a.to(device).contiguous()), nn.Parameter(bt.to(device).contiguous())
            )
        self.refresh()

    @property
    def layers(self) -> list[Adapted]:
        """What acts on the base."""
        return [f.layer for f in self._learned.values()]

    def parameters(self) -> list[nn.Parameter]:
        """Return all that is learned: A (slices, r, d_in) and B transposed (slices, r, d_out) of every target, float32."""
        return [p for f in self._learned.values() for p in (f.a, f.bt)]

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the parameters by name, as `load` takes it."""
        return {name: p.detach().clone() for name, p in self.named()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the parameters."""
        with torch.no_grad():
            for name, p in self.named():
                p.copy_(state[name])
        self.refresh()

    def refresh(self) -> None:
        """Let the parameters, as they are now, act from the next forward pass on; gradients of that pass reach them."""
        for learned in self._learned.values():
            stack = learned.layer.stack
            dtype = stack.a.dtype
            learned.layer.stack = replace(stack, a=learned.a.to(dtype), bt=learned.bt.to(dtype))

    def scale(self, factor: float) -> None:
        """Multiply every delta by a number, √|factor| on A and the rest on B."""
        with torch.no_grad():
            root = abs(factor) ** 0.5
            for learned in self._learned.values():
                learned.a.mul_(root)
                learned.bt.mul_(factor / root if root else 0.0)
        self.refresh()

    def restart(self, seed: int) -> None:
        """Make the factors those of a fresh LoRA: A uniform as PEFT draws it (Kaiming, a = √5), B zero."""
        drawn = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for learned in self._learned.values():
                bound = learned.a.shape[-1] ** -0.5
                learned.a.copy_((torch.rand(learned.a.shape, generator=drawn) * 2 - 1) * bound)
                learned.bt.zero_()
        self.refresh()

    def deltas(self) -> dict[str, tuple[LowRank, ...]]:
        """Return target → one float32 delta per matrix, on the processor; copies."""
        return {
            target: tuple(
                LowRank(a.clone(), bt.mT.clone()) for a, bt in zip(f.a.detach().cpu(), f.bt.detach().cpu(), strict=True)
            )
            for target, f in self._learned.items()
        }

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters as `TARGET.a` and `TARGET.bt`."""
        for target, learned in self._learned.items():
            yield f"{target}.a", learned.a
            yield f"{target}.bt", learned.bt
