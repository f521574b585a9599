"""Adapters in memory: small, with every awkward shape, and changed in the ways that a merge must not notice."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from plait.adapters.adapter import Adapter, Target
from plait.adapters.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig
from plait.adapters.layouts import Layout, Linear
from plait.adapters.lowrank import LowRank
from plait.adapters.names import PREFIX
from plait.tensorfiles.header import TensorInfo
from plait.tensorfiles.reader import SafetensorsFile
from plait.tensorfiles.writer import write_tensors

MatrixShape = tuple[int, int]
MOMENTS = "moments.safetensors"  # next to an adapter's own files
_DTYPES = {torch.float32: "F32", torch.float64: "F64"}


@dataclass(frozen=True)
class Cohort:
    """Adapters of one imagined base model.

    Attributes:
        factors: adapter → target module → A and B, scaling not folded in. The order of adapters is the order of merging.
        scalings: adapter → s in ΔW = s · B A.
        weights: adapter → its weight in the merge.
        shapes: target module → (d_out, d_in); the order of modules is the order of work.
    """

    factors: Mapping[str, Mapping[str, LowRank]]
    scalings: Mapping[str, float]
    weights: Mapping[str, float]
    shapes: Mapping[str, MatrixShape]

    def map(self, change: Callable[[str, str, LowRank], LowRank]) -> Cohort:
        """Return the cohort with `change(adapter, module, factors)` in place of all factors."""
        changed = {n: {m: change(n, m, f) for m, f in modules.items()} for n, modules in self.factors.items()}
        return replace(self, factors=changed)

    def scaled(self, factor: float) -> Cohort:
        """Return the cohort with every delta times a number."""
        return self.map(lambda adapter, module, f: LowRank(f.a, f.b * factor))

    def turned(self) -> Cohort:
        """Return the same deltas from other factors: B G and G⁻¹ A with a random G per adapter and module (condition 4)."""
        generator = torch.Generator().manual_seed(1)

        def turn(adapter: str, module: str, f: LowRank) -> LowRank:
            q = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=generator, dtype=torch.float64)).Q
            stretch = 2.0 ** torch.linspace(-1, 1, f.rank, dtype=torch.float64)
            gauge, inverse = q * stretch, (q / stretch).mT
            return LowRank(inverse.to(f.a.dtype) @ f.a, f.b @ gauge.to(f.b.dtype))

        return self.map(turn)

    def zeroed(self, *adapters: str) -> Cohort:
        """Return the cohort with some adapters' deltas zero: B as LoRA initializes it."""
        return self.map(lambda adapter, module, f: LowRank(f.a, f.b * 0) if adapter in adapters else f)

    def without(self, adapter: str, module: str) -> Cohort:
        """Return the cohort with one adapter lacking one module."""
        kept = {m: f for m, f in self.factors[adapter].items() if m != module}
        return replace(self, factors={**self.factors, adapter: kept})

    def reversed_adapters(self) -> Cohort:
        """Return the same adapters in the opposite order."""
        return replace(self, factors=dict(reversed(list(self.factors.items()))))

    def reversed_modules(self) -> Cohort:
        """Return the same modules in the opposite order of work."""
        return replace(self, shapes=dict(reversed(list(self.shapes.items()))))

    def copies(self, count: int, weight: float) -> Cohort:
        """Return `count` adapters that all are the first one, with equal weights."""
        first = next(iter(self.factors))
        names = [f"{first}{i}" for i in range(count)]
        return replace(
            self,
            factors={n: self.factors[first] for n in names},
            scalings={n: self.scalings[first] for n in names},
            weights=dict.fromkeys(names, weight),
        )

    def delta(self, adapter: str, module: str) -> Tensor:
        """Return s · B A of one adapter, (d_out, d_in); zeros where it lacks the module."""
        f = self.factors[adapter].get(module)
        if f is None:
            return torch.zeros(self.shapes[module], dtype=next(self.tensors()).dtype)
        return self.scalings[adapter] * f.b @ f.a

    def moments(self, adapter: str, module: str) -> Tensor:
        """Return E[x xᵀ] of inputs that are the adapter's own, (d_in, d_in) float64; it has them of every module."""
        d_in = self.shapes[module][1]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{adapter} {module}".encode()))
        x = torch.randn(3 * d_in, d_in, generator=generator, dtype=torch.float64)
        return x.mT @ x / len(x)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor of every adapter."""
        for modules in self.factors.values():
            for f in modules.values():
                yield from (f.a, f.b)

    def adapters(self) -> tuple[Adapter, ...]:
        """Return the cohort as opened adapters whose files are in memory."""
        return tuple(self._adapter(name) for name in self.factors)

    def layouts(self) -> dict[str, Layout]:
        """Return how every module is stored, in the order of work."""
        present = {m for modules in self.factors.values() for m in modules}
        return {m: Linear(*shape) for m, shape in self.shapes.items() if m in present}

    def save(self, folder: Path) -> None:
        """Write every adapter to `folder/<name>` as PEFT would, and its moments. It needs one rank in all modules."""
        for name, modules in self.factors.items():
            place = folder / name
            place.mkdir(parents=True)
            write_tensors(place / ADAPTER_WEIGHTS, _named(modules))
            write_tensors(place / MOMENTS, {module: self.moments(name, module) for module in self.shapes})
            ranks = {f.rank for f in modules.values()}
            if len(ranks) != 1:
                raise ValueError(f"adapter {name!r} has ranks {sorted(ranks)}; one is needed to write it")
            rank = ranks.pop()
            config = {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": self.scalings[name] * rank,
                "base_model_name_or_path": "base",
            }
            (place / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")

    def _adapter(self, name: str) -> Adapter:
        file = _Held(_named(self.factors[name]))
        targets = {
            module: Target(
                path=module,
                layout=Linear(*f.shape),
                rank=f.rank,
                scaling=self.scalings[name],
                dtype=_DTYPES[f.b.dtype],
                tensors={"lora_A": _name(module, "A"), "lora_B": _name(module, "B")},
            )
            for module, f in self.factors[name].items()
        }
        return Adapter(name, Path(name), AdapterConfig({}, Path(name) / ADAPTER_CONFIG), targets, {}, file)


class _Held(SafetensorsFile):
    """A tensor file that is in memory; what it hands out is what it holds, not a copy."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.path = Path("memory")
        self.tensors = {n: TensorInfo(tuple(t.shape), _DTYPES[t.dtype], t.nbytes) for n, t in tensors.items()}
        self._held = tensors

    def is_in_order(self, name: str) -> bool:
        """Return that there are no bytes to copy."""
        return False

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._held[name]


def _named(modules: Mapping[str, LowRank]) -> dict[str, Tensor]:
    return {_name(m, part): t.contiguous() for m, f in modules.items() for part, t in (("A", f.a), ("B", f.b))}


def _name(module: str, part: str) -> str:
    return f"{PREFIX}{module}.lora_{part}.weight"


def cohort(
    shapes: Sequence[MatrixShape],
    ranks: Sequence[int],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    shared_a: bool = False,
) -> Cohort:
    """Make random adapters, one per rank; every delta has entries of the order of 1.

    Args:
        shapes: (d_out, d_in) of every target module.
        ranks: of every adapter.
        seed: of the values.
        dtype: of the factors.
        shared_a: give all adapters one A, as training scripts that share a seed do; needs equal ranks.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    modules = {f"model.layers.{i}.proj": shape for i, shape in enumerate(shapes)}
    names = [f"adapter{i}" for i in range(len(ranks))]
    factors: dict[str, dict[str, LowRank]] = {name: {} for name in names}
    for module, (d_out, d_in) in modules.items():
        common = normal(ranks[0], d_in)
        for name, rank in zip(names, ranks, strict=True):
            a = common.clone() if shared_a else normal(rank, d_in)
            factors[name][module] = LowRank(a, normal(d_out, rank) / rank**0.5)
    return Cohort(
        factors=factors,
        scalings={name: (0.5, 2.0, 1.0)[i % 3] for i, name in enumerate(names)},
        weights={name: (0.9, 0.6, -0.4)[i % 3] if len(names) > 1 else 1.0 for i, name in enumerate(names)},
        shapes=modules,
    )
