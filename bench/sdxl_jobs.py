"""Jobs of `formats.py` in fresh processes: `python bench/sdxl_jobs.py JOB ARGUMENTS RESULT`, as those of `jobs.py`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sdxl
from measuring import measured

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = 32.0


def make(paths: list[str]) -> dict[str, Any]:
    """Make the adapters, where they are not there, and read them into the page cache."""
    import torch
    from safetensors.torch import save_file

    for seed, path in enumerate(map(Path, paths)):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            random, held = torch.Generator().manual_seed(seed), {}
            for name, (rows, columns) in sdxl.modules().items():
                down, up = (sdxl.RANK, columns), (rows, sdxl.RANK)
                held[f"{name}.lora_down.weight"] = (torch.randn(down, generator=random) / columns**0.5).half()
                held[f"{name}.lora_up.weight"] = (torch.randn(up, generator=random) / sdxl.RANK).half()
                held[f"{name}.alpha"] = torch.tensor(ALPHA).half()
            save_file(held, path, {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora"})
        path.read_bytes()
    return {}


def dense(paths: list[str], modules: list[str], weights: list[float]) -> dict[str, Any]:
    """Merge some modules the way of the common scripts; return what each took, and how far it is from the sum."""
    import torch

    torch.linalg.svd(torch.randn(64, 64))  # what the first call alone costs
    found = {}
    for name in modules:
        with measured() as usage:
            factors = [_factors(path, name) for path in paths]
            total = sum(
                w * (ALPHA / sdxl.RANK) * (up.float() @ down.float()) for w, (up, down) in zip(weights, factors, strict=True)
            )
            u, s, v = torch.linalg.svd(total, full_matrices=False)
            up, down = u[:, : sdxl.RANK] * s[: sdxl.RANK], v[: sdxl.RANK]
        found[name] = asdict(usage) | {"error": float((up @ down - total).norm() / total.norm())}
    return {"modules": found}


def errors(paths: list[str], modules: list[str], weights: list[float], results: dict[str, str]) -> dict[str, Any]:
    """Return per result and module the distance to the sum in float64: over the sum's norm, and over the best of rank 64."""
    import torch

    relative: dict[str, list[float]] = {label: [] for label in results}
    over: dict[str, list[float]] = {label: [] for label in results}
    for name in modules:
        parts = [(w * ALPHA / sdxl.RANK, *_factors(path, name)) for w, path in zip(weights, paths, strict=True)]
        up, down = torch.cat([s * u.double() for s, u, _ in parts], 1), torch.cat([d.double() for _, _, d in parts])
        values = _singular_values(up, down)
        norm, best = float(values.norm()), float(values[sdxl.RANK :].norm())
        for label, path in results.items():
            own_up, own_down, alpha = (t.double() for t in _stored(path, name))
            scale = float(alpha) / own_down.shape[0]
            far = float(_singular_values(torch.cat([up, -scale * own_up], 1), torch.cat([down, own_down])).norm())
            relative[label].append(far / norm)
            over[label].append(far / best)
    return {"relative": relative, "over best": over}


def _singular_values(up: Tensor, down: Tensor) -> Tensor:
    """Return the singular values of a product from its factors."""
    import torch

    return torch.linalg.svdvals(torch.linalg.qr(up).R @ torch.linalg.qr(down.mT).R.mT)


def _factors(path: str, name: str) -> tuple[Tensor, Tensor]:
    up, down, _ = _stored(path, name)
    return up, down


def _stored(path: str, name: str) -> tuple[Tensor, ...]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return tuple(file.get_tensor(f"{name}.{part}") for part in ("lora_up.weight", "lora_down.weight", "alpha"))


if __name__ == "__main__":
    job, given, target = sys.argv[1:]
    Path(target).write_text(
        json.dumps({"make": make, "dense": dense, "errors": errors}[job](**json.loads(given))), encoding="utf-8"
    )
