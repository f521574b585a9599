"""Heads, trained token rows and trained biases: full tensors that belong to one adapter and its task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from plait.adapters.adapter import Adapter
from plait.adapters.names import PREFIX
from plait.deferred import Tensor, torch
from plait.recipes.schema import Heads
from plait.tensorfiles.writer import write_tensors

FOLDER = "heads"
_CARRIED = ("modules_to_save", "trainable_token_indices", "bias", "task_type")


def head_problems(adapters: Sequence[Adapter], heads: Heads) -> list[str]:
    """Return why a policy cannot be carried out."""
    if heads.policy != "average":
        return []
    have = [a for a in adapters if a.full_tensors]
    problems = [
        f"heads: average: {path!r} is not in every adapter that has heads ({', '.join(a.name for a in have)})"
        for path in sorted({p for a in have for p in a.full_tensors})
        if not all(path in a.full_tensors for a in have)
    ]
    for path in {p for a in have for p in a.full_tensors}:
        shapes = {a.name: a.file.tensors[a.full_tensors[path]].shape for a in have if path in a.full_tensors}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{n} {list(s)}" for n, s in shapes.items())
            problems.append(
                f"heads: average: {path!r} has different shapes ({listed}); heads of different tasks do not average"
            )
    if any("token_adapter" in p for a in have for p in a.full_tensors):
        indices = {a.name: a.config.raw.get("trainable_token_indices") for a in have}
        if len({json.dumps(i, sort_keys=True) for i in indices.values()}) > 1:
            problems.append("heads: average: the adapters trained different token rows; keep them separate")
    return problems


def same_full_tensors(adapters: Sequence[Adapter]) -> bool:
    """Return whether all adapters hold the same full tensors with the same values: it does not matter whose are taken."""
    first, *others = adapters
    indices = json.dumps(first.config.raw.get("trainable_token_indices"), sort_keys=True)
    for other in others:
        if other.full_tensors.keys() != first.full_tensors.keys():
            return False
        if json.dumps(other.config.raw.get("trainable_token_indices"), sort_keys=True) != indices:
            return False
    return all(torch.equal(first.read_full(path), other.read_full(path)) for path in first.full_tensors for other in others)


def main_heads(adapters: Sequence[Adapter], heads: Heads) -> tuple[dict[str, Tensor], Mapping[str, object]]:
    """Return the full tensors that go into the merged adapter itself, and the configuration keys that declare them."""
    have = [a for a in adapters if a.full_tensors]
    if heads.policy == "from":
        chosen = next(a for a in adapters if a.name == heads.adapter)
        return {p: chosen.read_full(p) for p in chosen.full_tensors}, _declared(chosen)
    if heads.policy == "average" and have:
        tensors = {}
        for path in have[0].full_tensors:
            stack = [a.read_full(path) for a in have]
            mean = torch.stack([t.to(torch.float64) for t in stack]).mean(0)
            tensors[path] = mean.to(stack[0].dtype)
        return tensors, _declared(have[0])
    return {}, {}


def main_head_bytes(adapters: Sequence[Adapter], heads: Heads) -> int:
    """Return the size of the full tensors that go into the merged adapter itself."""
    if heads.policy == "from":
        have = [a for a in adapters if a.name == heads.adapter]
    else:
        have = [a for a in adapters if a.full_tensors and heads.policy == "average"]
    return sum(have[0].file.tensors[name].nbytes for name in have[0].full_tensors.values()) if have else 0


def write_heads(adapters: Sequence[Adapter], heads: Heads, folder: Path) -> None:
    """Write each adapter's full tensors under `folder/heads/<name>/`, with what is needed to use them again."""
    if heads.policy != "separate":
        return
    for adapter in adapters:
        if adapter.full_tensors:
            place = folder / FOLDER / adapter.name
            place.mkdir(parents=True)
            write_tensors(place / "heads.safetensors", {PREFIX + p: adapter.read_full(p) for p in adapter.full_tensors})
            text = json.dumps({"adapter": adapter.name, **_declared(adapter)}, indent=2, sort_keys=True)
            (place / "heads.json").write_text(text + "\n", encoding="utf-8")


def _declared(adapter: Adapter) -> dict[str, object]:
    return {key: adapter.config.raw[key] for key in _CARRIED if adapter.config.raw.get(key) is not None}
