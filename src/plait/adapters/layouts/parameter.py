"""Parameters that an adapter targets by their own name (`target_parameters`): fused experts, and matrices such as a router's.

PEFT wraps a module once per targeted parameter, in the order of the module's parameters, the first innermost:
`….experts.base_layer.lora_A` is then `gate_up_proj` and `….experts.lora_A` is `down_proj`. The key alone does not decide which;
the number of wrappers, the configuration's `target_parameters` and the usual order of an expert's parameters do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from plait.adapters.layouts.base import Layout
from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.libraries.transformers.layers import EXPERT_PARAMETERS

WRAPPED = ".base_layer"  #: what PEFT adds to a path for every wrapper around a layer


@dataclass(frozen=True)
class Parameter(Layout):
    """A stack of matrices, one per expert. A (experts · r, d_in) is expert-major, B (d_out, r · experts) rank-major."""

    kind = "experts"
    several = "fused experts"
    names_parameter = True
    takes_bias = False

    @classmethod
    def claims(cls, shapes: Mapping[str, tuple[int, ...]], *, is_parameter: bool) -> bool:
        """Return whether the configuration names it."""
        return is_parameter

    @classmethod
    def _of(cls, a: tuple[int, ...], b: tuple[int, ...], rank: int) -> tuple[Self, int]:
        if a[0] != b[1] or a[0] % rank:
            raise ValueError(f"A is {list(a)} and B is {list(b)}; both need experts × rank {rank} in common")
        return cls(b[0], a[1], a[0] // rank), rank

    @classmethod
    def module_keys(cls, targets: Sequence[str]) -> dict[str, str]:
        """Return target → the module under which PEFT stores it: nested wrappers, the first parameter innermost."""
        modules: dict[str, list[str]] = defaultdict(list)
        for target in targets:
            modules[target.rpartition(".")[0]].append(target)
        keys = {}
        for module, members in modules.items():
            ordered = sorted(members, key=lambda t: _declared(t.rpartition(".")[2]))
            for depth, target in enumerate(reversed(ordered)):
                keys[target] = module + WRAPPED * depth
        return keys

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense delta."""
        return (self.stack, self.d_out, self.d_in)

    def fits(self, shape: tuple[int, ...], *, transposed: bool) -> bool:
        """Return whether a weight of the base has the shape of the delta; a single matrix may lack the stack dimension."""
        wanted = self.stored_shape(transposed=transposed)
        return shape == wanted or (self.stack == 1 and shape == wanted[1:])

    def is_transposed(self, target: str, *, stored: tuple[int, ...] | None, conv1d: bool | None, flag: bool) -> bool | None:
        """Return whether the base has (…, d_in, d_out): by the shape of the parameter; None where it is square."""
        return None if stored is None or self.d_out == self.d_in else stored[-2:] == (self.d_in, self.d_out)

    def matrices(self, weight: Tensor, *, transposed: bool) -> list[Tensor]:
        """Return a parameter as the matrices of its experts, or as its only one."""
        stack = list(weight) if weight.ndim == 3 else [weight]
        return [m.mT for m in stack] if transposed else stack

    def unpack(self, a: Tensor, b: Tensor) -> list[LowRank]:
        """Take the stored A and B separately into one `LowRank` per expert."""
        of_a = a.reshape(self.stack, -1, self.d_in)
        of_b = b.reshape(self.d_out, -1, self.stack).permute(2, 0, 1)
        return [LowRank(x, y) for x, y in zip(of_a, of_b, strict=True)]

    def pack(self, slices: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
        """Put the experts' matrices back into the stored A and B; all must have one rank."""
        a, b = torch.stack([s.a for s in slices]), torch.stack([s.b for s in slices])  # (experts, r, d_in), (…, d_out, r)
        return a.reshape(-1, self.d_in), b.permute(1, 2, 0).reshape(self.d_out, -1)


class ParameterNaming:
    """Names the parameters behind the keys of one adapter.

    Args:
        target_parameters: of the configuration, such as `mlp.experts.gate_up_proj`.
        modules: module paths as the keys spell them, with the parts found there.

    Attributes:
        problems: keys that cannot be assigned to parameters; empty when all can.
    """

    def __init__(self, target_parameters: tuple[str, ...], modules: Mapping[str, object]) -> None:
        self.problems: list[str] = []
        self._paths: dict[str, str] = {}
        depths: dict[str, list[str]] = defaultdict(list)
        for module in modules:
            bare = module
            while bare.endswith(WRAPPED):
                bare = bare.removesuffix(WRAPPED)
            depths[bare].append(module)
        for bare, wrappers in depths.items():
            names = sorted({t.rpartition(".")[2] for t in target_parameters if _targets(t, bare)}, key=_declared)
            if not names:
                continue
            wrappers.sort(key=len, reverse=True)  # innermost first
            known = all(name in EXPERT_PARAMETERS for name in names) or len(names) == 1
            if len(wrappers) != len(names) or not known:
                self.problems.append(
                    f"{bare!r}: {len(wrappers)} LoRA layers for parameters {', '.join(names)}; which is whose is not known"
                )
                continue
            self._paths |= {module: f"{bare}.{name}" for module, name in zip(wrappers, names, strict=True)}

    def parameter(self, module: str) -> str | None:
        """Return the path of the parameter behind a key; None for a module that is adapted as such."""
        return self._paths.get(module)


def _targets(parameter: str, module: str) -> bool:
    """Return whether a `target_parameters` entry names a parameter of a module: by exact path or by suffix, as PEFT does.

    An entry without an owner (`gate_up_proj`) can only mean a container of experts.
    """
    owner = parameter.rpartition(".")[0] or "experts"
    return module == owner or module.endswith("." + owner)


def _declared(name: str) -> tuple[int, str]:
    return (EXPERT_PARAMETERS.index(name) if name in EXPERT_PARAMETERS else len(EXPERT_PARAMETERS), name)
