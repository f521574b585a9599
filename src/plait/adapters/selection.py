"""Which modules PEFT wraps: the selections of several adapters as one, and full paths where there is no shorter way."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from plait.adapters.adapter import Adapter
from plait.adapters.layouts import Layout
from plait.adapters.names import pattern_of
from plait.adapters.patterns import PatternError, full_path_pattern

_SHORTHAND = "all-linear"
_SELECTORS = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
# what narrows `target_modules` down, in a way that holds for one adapter and not for the union
_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters", "modules_to_save")


def selection_of(adapters: Sequence[Adapter], layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """Return the keys of `adapter_config.json` that make PEFT wrap exactly these targets.

    An adapter with the same targets got them by its own selection, which is short, and right where it names them all (modules
    that it saved in full are exempt from it, and would be wrapped now). So did all adapters together: their selections side by
    side mean the union, whatever the modules are called in the version of the model that loads it. Where neither holds, full
    paths name them.

    Args:
        adapters: whose selections may serve.
        layouts: of the targets.
    """
    for adapter in adapters:
        raw = adapter.config.raw
        selected = (raw.get("target_modules") or raw.get("target_parameters")) and not raw.get("modules_to_save")
        if selected and set(adapter.targets) == set(layouts) and unselected(adapter) == []:
            return {k: sorted(v) if isinstance(v := raw.get(k), list) and k != "layers_to_transform" else v for k in _SELECTORS}
    selection = dict.fromkeys(_SELECTORS)
    joined = joined_selection(adapters, set(layouts))
    if joined is not None:
        return selection | {"target_modules": joined}
    modules = [t for t, layout in layouts.items() if not layout.names_parameter]
    return selection | {
        "target_modules": full_paths(modules),
        "target_parameters": [t for t in layouts if t not in modules] or None,
    }


def names_or_paths(targets: Collection[str], layers: Collection[str]) -> list[str]:
    """Return `target_modules` for some modules: the ends of their paths where these mean exactly them, else full paths.

    Args:
        targets: paths of modules.
        layers: every layer of the model.
    """
    ends = {t.rpartition(".")[2] for t in targets}
    modules: set[str] = set()  # with those that only hold others
    for layer in layers:
        words = layer.split(".")
        modules |= {".".join(words[: i + 1]) for i in range(len(words))}
    meant = {m for m in modules if m.rpartition(".")[2] in ends}
    return sorted(ends if meant == set(targets) else targets)


def joined_selection(adapters: Sequence[Adapter], targets: Collection[str]) -> list[str] | str | None:
    """Return `target_modules` for the union of some adapters' targets: the entries of all, or one regular expression.

    None where the selections do not mean that: they are narrowed down, an adapter lacks a module that its own selection names
    or has one that it does not, or the union is not what is wanted.

    Args:
        adapters: opened.
        targets: what is to be wrapped.
    """
    selecting = [a for a in adapters if a.targets]
    if {path for a in selecting for path in a.targets} != set(targets):
        return None
    selections = [_plain(a) for a in selecting]
    known = [s for s in selections if s is not None]
    if len(known) < len(selections):
        return None
    try:
        others = [p for a, s in zip(selecting, known, strict=True) for p in targets if selects(s, p) is not (p in a.targets)]
    except PatternError:  # an expression that cannot be matched here: full paths are equivalent
        return None
    if others:
        return None
    lists = [s for s in known if isinstance(s, list)]
    if len(lists) == len(known):
        return sorted({entry for s in lists for entry in s})
    patterns = dict.fromkeys(
        s if isinstance(s, str) else rf"(?:.*\.)?(?:{'|'.join(re.escape(entry) for entry in sorted(s))})" for s in known
    )
    joined = "|".join(f"(?:{p})" for p in patterns) if len(patterns) > 1 else next(iter(patterns))
    try:
        re.compile(joined)
    except re.error:  # flags at the beginning of an expression are not allowed in its middle
        return None
    return joined


def selects(selection: list[str] | str, path: str) -> bool:
    """Return whether PEFT wraps a module for this `target_modules`.

    Raises:
        PatternError: an expression that cannot be matched in bounded time.
    """
    if isinstance(selection, str):
        return full_path_pattern(selection)(path)
    return any(path == entry or path.endswith(f".{entry}") for entry in selection)


def unselected(adapter: Adapter) -> list[str] | None:
    """Return the modules of an adapter's file that PEFT would not wrap for its configuration, and so not load.

    None where that is not known: the modules are named by the architecture, by a shorthand, or by an expression that cannot be
    matched in bounded time. Parameters are matched by `target_parameters` when an adapter is opened.
    """
    raw, modules = adapter.config.raw, [t.path for t in adapter.targets.values() if not t.layout.names_parameter]
    selection = raw.get("target_modules")
    if not modules:
        return []
    if not selection or selection == _SHORTHAND:
        return None
    try:
        return [path for path in modules if not (selects(selection, path) and _is_kept(raw, path))]
    except PatternError:
        return None


def _is_kept(raw: Mapping[str, Any], path: str) -> bool:
    """Return whether the keys that narrow `target_modules` down leave a module in, by PEFT's rules.

    Raises:
        PatternError: an expression that cannot be matched in bounded time.
    """
    if (exclude := raw.get("exclude_modules")) and selects(exclude, path):
        return False
    layers, selection = raw.get("layers_to_transform"), raw["target_modules"]
    if layers is None or layers == [] or isinstance(selection, str) or path in selection:
        return True
    pattern = raw.get("layers_pattern") or ()
    containers = (pattern,) if isinstance(pattern, str) else pattern
    if not all(re.fullmatch(r"\w+", name) for name in containers):
        raise PatternError("layers_pattern has more than words")
    words = path.split(".")
    indices = [i for i in range(2, len(words) - 1) if words[i].isdecimal() and (not containers or words[i - 1] in containers)]
    return bool(indices) and int(words[indices[-1]]) in ([layers] if isinstance(layers, int) else layers)


def full_paths(paths: list[str]) -> list[str] | str:
    """Return `target_modules` for exactly some modules: their paths, or a pattern where versions of a model differ in them."""
    if all(pattern_of(path) == path for path in paths):
        return paths
    return rf"(?:.*\.)?(?:{'|'.join(p if (p := pattern_of(path)) != path else re.escape(path) for path in paths)})"


def _plain(adapter: Adapter) -> list[str] | str | None:
    """Return an adapter's selection where it consists of names or a pattern alone."""
    raw = adapter.config.raw
    selection = raw.get("target_modules")
    if any(raw.get(key) for key in _NARROWING) or not selection or selection == _SHORTHAND:
        return None
    if isinstance(selection, str):
        return selection
    entries = isinstance(selection, list) and all(isinstance(entry, str) for entry in selection)
    return selection if entries else None
