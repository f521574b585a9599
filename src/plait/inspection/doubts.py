"""What looks wrong with an adapter and stops nothing: a contradictory configuration, a training that left no trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from plait.adapters.adapter import Adapter, Target
from plait.adapters.config import PLAIN_INITIALIZATIONS
from plait.adapters.names import layer_key
from plait.adapters.selection import unselected
from plait.errors import AdapterError, listed
from plait.parsing import shown
from plait.tensorfiles.formats import TENSOR_FORMATS

_CLASSIFIERS = ("classifier", "score")  # PEFT names both for a classifier, and a model has one of them


def adapter_doubts(adapters: Sequence[Adapter]) -> list[str]:
    """Return everything that looks wrong, as complete sentences that name the adapter.

    Of tensors only so many are read as it takes to see that an adapter was trained: one module per tower, unless it was not.
    """
    return [f"{a.name!r}: {text}" for a in adapters for text in (*config_problems(a), *other_file(a), *_untrained(a))]


def config_problems(adapter: Adapter) -> Iterator[str]:
    """Yield where the configuration contradicts the tensors; reads headers alone."""
    config, targets = adapter.config, adapter.targets
    ruled = [t for t in targets.values() if not t.own_scaling]
    other = [t for t in ruled if t.stored_rank != config.rank(t.path)]
    if other:
        first = other[0]
        yield (
            f"the configuration gives {len(other)} of {len(targets)} modules another rank than their tensors have (such as "
            f"{first.path!r}: {config.rank(first.path)}, in the file {first.stored_rank}). PEFT does not load that. The "
            f"tensors count, for the scaling too ({config.alpha(first.path):g} as alpha gives {first.scaling:g} there)."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        idle = config.idle_patterns(key, targets)
        if idle and targets:
            yield f"{key} has {listed(map(shown, idle))}, which no module of the file has as its name."
    lost = unselected(adapter) or []
    if config.flag("ensure_weight_tying"):  # PEFT then adapts a head too whose weights the model ties to an adapted embedding
        lost = [path for path in lost if layer_key(path) is not None]
    if lost:
        yield (
            f"the configuration does not select {len(lost)} of {len(targets)} modules of the file (such as {lost[0]!r}): PEFT "
            "loads nothing of them. The tensors count."
        )
    if absent := _lost_tensors(adapter):
        yield (
            f"{' and '.join(absent)} in the configuration, but the file has no such tensors: they were lost on saving, and the "
            "base model's act in their place."
        )
    init = config.raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in PLAIN_INITIALIZATIONS:
        yield (
            f"init_lora_weights is {shown(init)}, which is not known here. Its deltas are taken as relative to the published "
            "base model; if this initialization changed that, they are not."
        )
    if unknown := config.unknown_keys:
        yield (
            f"the configuration has {listed(map(shown, unknown))}, which no release of PEFT up to 0.21 has. Its factors are "
            "taken as those of plain LoRA; if that changes what they mean, the merge is wrong."
        )
    nothing = [t.path for t in targets.values() if t.scaling == 0]
    if nothing:
        yield f"alpha is 0 for {len(nothing)} of {len(targets)} modules (such as {nothing[0]!r}): their delta is zero."
    against = [t.path for t in targets.values() if t.scaling < 0]
    if against:
        yield f"alpha is negative for {len(against)} of {len(targets)} modules (such as {against[0]!r}): they are subtracted."


def _lost_tensors(adapter: Adapter) -> list[str]:
    """Return keys with the modules that they name as trained in full, or as token rows, of which the file has nothing."""
    raw, held = adapter.config.raw, [f".{path}." for path in (*adapter.full_tensors, *adapter.targets)]

    def lacking(names: Iterable[str], end: str = "") -> list[str]:
        return [name for name in names if not any(f".{name}." in path and path.endswith(end) for path in held)]

    saved = raw.get("modules_to_save") or ()
    heads = lacking(saved)
    if any(name in saved and name not in heads for name in _CLASSIFIERS):
        heads = [name for name in heads if name not in _CLASSIFIERS]
    rows = raw.get("trainable_token_indices")
    tables = lacking(rows if isinstance(rows, dict) else ("token_adapter",) * bool(rows), ".trainable_tokens_delta.")
    which = listed(map(shown, tables)) if isinstance(rows, dict) else "rows"
    found = {"modules_to_save": heads and listed(map(shown, heads)), "trainable_token_indices": tables and which}
    return [f"{key} has {names}" for key, names in found.items() if names]


def other_file(adapter: Adapter) -> Iterator[str]:
    """Report a file of tensors in another format next to the one that is read, where the two differ."""
    read = adapter.file
    for kind in TENSOR_FORMATS:
        path = adapter.folder / kind.adapter_name
        if path == read.path or not path.is_file():
            continue
        try:
            other = kind(path)
            equal = other.tensors.keys() == read.tensors.keys() and all(
                (a := other.read(name)).shape == (b := read.read(name)).shape and bool((a == b).all()) for name in read.tensors
            )
            why = "" if equal else "it holds other tensors, as a file of another training does"
        except AdapterError as error:
            why = f"it cannot be compared ({error})"
        if why:
            yield f"{read.path.name} is read, as in PEFT, and not the {path.name} next to it: {why}."


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
    return any(adapter.file.is_zero(target.tensors[part]) for part in parts)
