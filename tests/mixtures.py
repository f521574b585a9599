"""A small network, adapters for all of its layers, and what they mean together, computed on dense weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plait.adapters import Adapter
from tests.adapters_on_disk import Conv, Embedding, Experts, Linear, Module, Written, write_adapter
from tests.small_models import net

IDS = torch.arange(48).reshape(3, 16) % 20
PLAIN: dict[str, Module] = {
    "embed": Embedding(20, 8),
    "layers.0.q_proj": Linear(8, 8),
    "layers.0.v_proj": Linear(6, 8),
    "layers.1.q_proj": Linear(8, 8),
    "layers.1.c_attn": Linear(8, 8),
    "conv1": Conv(6, 8, (3,)),
    "conv2": Conv(4, 1, (3, 2)),
    "head": Linear(4, 6),
}
FUSED: dict[str, Module] = {
    "layers.0.experts.gate_up_proj": Experts(3, 10, 8),
    "layers.0.experts.down_proj": Experts(3, 8, 10),
}
EVERY = PLAIN | FUSED


def part(*paths: str) -> dict[str, Module]:
    return {p: EVERY[p] for p in paths}


def cohort(folder: Path, modules: Mapping[str, Mapping[str, Module]] | None = None) -> dict[str, Written]:
    """Write three adapters of different rank, scaling and reach."""
    chosen = modules or {"a": EVERY, "b": {p: m for p, m in EVERY.items() if "layers.1" not in p}, "c": EVERY}
    return {
        name: write_adapter(folder / name, held, r=2 + i, alpha=1.0 + i, rslora=i == 1, seed=i, fan_in_fan_out=True)
        for i, (name, held) in enumerate(chosen.items())
    }


def opened(cohort: Mapping[str, Written]) -> list[Adapter]:
    return [Adapter.open(w.folder, name) for name, w in cohort.items()]


def dense_output(cohort: Mapping[str, Written], share: Callable[[str, str], Tensor | float], ids: Tensor = IDS) -> Tensor:
    """Return the float64 output of the base whose weights are W + Σₜ share(adapter, target) ΔWₜ."""
    model = net().double()
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for name, written in cohort.items():
        for path, delta in written.deltas.items():
            key = path if path in weights else f"{path}.weight"
            oriented = torch.tensor(delta).mT if path.endswith("c_attn") else torch.tensor(delta)
            weights[key] = weights[key] + share(name, path) * oriented
    output: Tensor = functional_call(model, weights, (ids,))
    return output


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Return everything that a live model may have changed: tensors (identity and values), classes, hooks, attributes."""
    return tuple(
        (
            path,
            type(module),
            sorted(module.__dict__),
            [
                (n, id(p), p.requires_grad, p.detach().clone().numpy().tobytes())
                for n, p in module._parameters.items()
                if p is not None
            ],
            [(n, id(b)) for n, b in module._buffers.items()],
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_with_kwargs),
            len(module._forward_hooks_always_called),
            getattr(module, "out_features", None),
        )
        for path, module in model.named_modules()
    )
