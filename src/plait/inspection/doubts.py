"""What looks wrong with an adapter and stops nothing: a contradictory configuration, a training that left no trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from plait.adapters.adapter import ALPHA, Adapter, Target
from plait.adapters.names import layer_key
from plait.adapters.patterns import module_pattern


def adapter_doubts(adapters: Sequence[Adapter]) -> list[str]:
    """Return everything that looks wrong, as complete sentences that name the adapter.

    Of tensors only so many are read as it takes to see that an adapter was trained: one module per tower, unless it was not.
    """
    return [f"{a.name!r}: {text}" for a in adapters for text in (*config_problems(a), *_untrained(a))]


def config_problems(adapter: Adapter) -> Iterator[str]:
    """Yield where the configuration contradicts the tensors; reads headers alone."""
    config, targets = adapter.config, adapter.targets
    # an alpha of a module's own makes the configuration's rank and alpha void
    ruled = [t for t in targets.values() if ALPHA not in t.tensors]
    other = [t for t in ruled if stored_rank(t) != config.rank(t.path)]
    if other:
        first = other[0]
        yield (
            f"the configuration gives {len(other)} of {len(targets)} modules another rank than their tensors have (such as "
            f"{first.path!r}: {config.rank(first.path)}, in the file {stored_rank(first)}). PEFT does not load that. The "
            f"tensors count, for the scaling too ({config.alpha(first.path):g} as alpha gives {first.scaling:g} there)."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        idle = [p for p in config.raw.get(key) or {} if not any(map(module_pattern(p), targets))]
        if idle and targets:
            yield f"{key} has {', '.join(map(repr, idle[:4]))}, which no module of the file has as its name."
    nothing = [t.path for t in targets.values() if t.scaling == 0]
    if nothing:
        yield f"alpha is 0 for {len(nothing)} of {len(targets)} modules (such as {nothing[0]!r}): their delta is zero."
    against = [t.path for t in targets.values() if t.scaling < 0]
    if against:
        yield f"alpha is negative for {len(against)} of {len(targets)} modules (such as {against[0]!r}): they are subtracted."


def stored_rank(target: Target) -> int:
    """Return the rank as PEFT counts it: a grouped convolution's is spread over its groups."""
    return target.rank * target.layout.rank_unit


def _untrained(adapter: Adapter) -> Iterator[str]:
    """Report which towers of an adapter have a zero delta in every module: they were not trained, or lost on saving."""
    towers: dict[str, list[Target]] = defaultdict(list)
    for path, target in adapter.targets.items():
        key = layer_key(path)
        towers[key.tower if key else ""].append(target)
    zero = [t.path for members in towers.values() if all(_is_zero(adapter, t) for t in members) for t in members]
    if zero:
        yield (
            f"{len(zero)} of {len(adapter.targets)} modules have a zero delta (such as {zero[0]!r}): they were not trained, or "
            "what they learned was lost on saving. A zero delta takes its share of a mean, and rank."
        )


def _is_zero(adapter: Adapter, target: Target) -> bool:
    # DoRA acts through its magnitudes, lora_bias through its bias
    if target.is_dora or target.has_bias:
        return False
    parts = (target.layout.b_part, target.layout.a_part)
    return any(not bool(adapter.file.read(target.tensors[part]).any()) for part in parts)
