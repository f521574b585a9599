"""Synthetic adapters, written with safetensors alone, and what they mean, computed here from PEFT's formulas.

    written = write_adapter(tmp_path / "a", {"layers.0.q_proj": Linear(8, 6), "embed": Embedding(20, 8)}, seed=1)
    written.deltas["layers.0.q_proj"]    # ΔW in float64, in the orientation of the base model's weight

Nothing of plait and nothing of PEFT is used, so that neither can hide its own mistake.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
Arrays = tuple[np.ndarray, np.ndarray]  # A and B as stored


@dataclass(frozen=True, kw_only=True)
class Module:
    """One target module.

    Attributes:
        rank: PEFT's r of this module; the adapter's when None.
        alpha: lora_alpha of this module; the adapter's when None.
        values: A and B as stored, in place of random ones.
        bias: (d_out,) of `lora_bias`.
        magnitude: (d_out,) of DoRA.
    """

    rank: int | None = None
    alpha: float | None = None
    values: Arrays | None = None
    bias: np.ndarray | None = None
    magnitude: np.ndarray | None = None

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B on disk."""
        raise NotImplementedError

    def delta(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return ΔW / s, in the orientation of the base model's weight."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Module):
    """`nn.Linear`, or GPT-2's Conv1D, whose factors are stored alike."""

    d_out: int
    d_in: int

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.d_in), (self.d_out, rank)

    def delta(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return b @ a


@dataclass(frozen=True)
class Embedding(Module):
    """`nn.Embedding`: the weight is (tokens, width), B A is its transpose."""

    tokens: int
    width: int

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.tokens), (self.width, rank)

    def delta(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (b @ a).T


@dataclass(frozen=True)
class Conv(Module):
    """A convolution: A convolves r channels out of the input, B mixes them with a kernel of size 1."""

    channels_out: int
    channels_in: int
    kernel: tuple[int, ...]
    groups: int = 1

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ones = (1,) * len(self.kernel)
        return (rank, self.channels_in // self.groups, *self.kernel), (self.channels_out, rank // self.groups, *ones)

    def delta(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Group g computes its share of the outputs from its share of the ranks."""
        parts = []
        for rows_b, rows_a in zip(np.split(b, self.groups), np.split(a, self.groups), strict=True):
            parts.append(np.einsum("or,ri...->oi...", rows_b.reshape(rows_b.shape[:2]), rows_a))
        return np.concatenate(parts)


@dataclass(frozen=True)
class Experts(Module):
    """One fused parameter of a mixture of experts: A stacks experts of ranks, B has ranks of experts in its columns."""

    count: int
    d_out: int
    d_in: int

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.count * rank, self.d_in), (self.d_out, self.count * rank)

    def delta(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        rank = a.shape[0] // self.count
        delta = np.zeros((self.count, self.d_out, self.d_in))
        for expert in range(self.count):
            for k in range(rank):
                delta[expert] += np.outer(b[:, k * self.count + expert], a[expert * rank + k])
        return delta


@dataclass(frozen=True)
class Written:
    """An adapter on disk.

    Attributes:
        folder: where it lies.
        deltas: target → s · B A in float64, from the values as stored.
        config: as written.
        scalings: target → s.
    """

    folder: Path
    deltas: dict[str, np.ndarray]
    config: dict[str, Any]
    scalings: dict[str, float]


def write_adapter(
    folder: Path,
    modules: Mapping[str, Module],
    *,
    r: int = 2,
    alpha: float = 4.0,
    rslora: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    base: str | None = "tiny/base",
    extra: Mapping[str, torch.Tensor] | None = None,
    **config: Any,
) -> Written:
    """Write an adapter with random values.

    Args:
        folder: to make.
        modules: target path → kind and shape. The paths of experts end in the parameter's name; those of one container are
            wrapped in the order given, the first innermost.
        r: rank of modules without their own.
        alpha: lora_alpha of modules without their own.
        rslora: scale by alpha / √r.
        seed: of the values, which depend on it and on the path alone.
        dtype: as stored.
        base: base_model_name_or_path.
        extra: further tensors, by their names in the base model (heads, token tables).
        **config: further keys of `adapter_config.json`.
    """
    tensors: dict[str, torch.Tensor] = {}
    deltas, scalings = {}, {}
    for path, module in modules.items():
        rank = r if module.rank is None else module.rank
        a, b = (torch.tensor(x).to(dtype) for x in module.values or _random(module, rank, path, seed))
        strength = alpha if module.alpha is None else module.alpha
        scalings[path] = strength / (math.sqrt(rank) if rslora else rank)
        deltas[path] = scalings[path] * module.delta(a.double().numpy(), b.double().numpy())
        tensors |= _named(PREFIX + _key(path, modules), module, a.contiguous(), b.contiguous())
    tensors |= {PREFIX + name: tensor for name, tensor in (extra or {}).items()}
    written = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "use_dora": any(m.magnitude is not None for m in modules.values()),
        "lora_bias": any(m.bias is not None for m in modules.values()),
        "rank_pattern": {p: m.rank for p, m in modules.items() if m.rank is not None},
        "alpha_pattern": {p: m.alpha for p, m in modules.items() if m.alpha is not None},
        "target_modules": sorted(p for p, m in modules.items() if not isinstance(m, Experts)),
        "target_parameters": [p for p, m in modules.items() if isinstance(m, Experts)] or None,
        **config,
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(written), encoding="utf-8")
    return Written(folder, deltas, written, scalings)


def read_deltas(folder: Path, modules: Mapping[str, Module]) -> dict[str, np.ndarray]:
    """Return target → s · B A of an adapter on disk, float64: for what plait wrote. Patterns must be full paths."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    deltas = {}
    for path, module in modules.items():
        rank = (config.get("rank_pattern") or {}).get(path, config["r"])
        strength = (config.get("alpha_pattern") or {}).get(path, config["lora_alpha"])
        scaling = strength / (math.sqrt(rank) if config.get("use_rslora") else rank)
        names = list(_named(PREFIX + _key(path, modules), module, None, None))
        a, b = (tensors[n].double().numpy() for n in names[:2])
        deltas[path] = scaling * module.delta(a, b)
    return deltas


def layers(count: int, shapes: Mapping[str, tuple[int, int]], **options: Any) -> dict[str, Module]:
    """Return `model.layers.<i>.<name>` for every layer and name."""
    return {f"model.layers.{i}.{name}": Linear(*shape, **options) for i in range(count) for name, shape in shapes.items()}


def _random(module: Module, rank: int, path: str, seed: int) -> Sequence[np.ndarray]:
    generator = np.random.default_rng([seed, *path.encode()])
    return [generator.standard_normal(shape) for shape in module.shapes(rank)]


def _key(path: str, modules: Mapping[str, Module]) -> str:
    """Return the module path in the tensor names: wrappers of the parameters of one container nest."""
    if not isinstance(modules[path], Experts):
        return path
    container = path.rpartition(".")[0]
    siblings = [p for p, m in modules.items() if isinstance(m, Experts) and p.rpartition(".")[0] == container]
    return container + ".base_layer" * (len(siblings) - 1 - siblings.index(path))


def _named(path: str, module: Module, a: Any, b: Any) -> dict[str, Any]:
    if isinstance(module, Embedding):
        named = {f"{path}.lora_embedding_A": a, f"{path}.lora_embedding_B": b}
    else:
        named = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    if module.bias is not None:
        named[f"{path}.lora_B.bias"] = torch.tensor(module.bias, dtype=torch.float32)
    if module.magnitude is not None:
        named[f"{path}.lora_magnitude_vector"] = torch.tensor(module.magnitude, dtype=torch.float32)
    return named
