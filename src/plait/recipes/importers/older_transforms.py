"""What a recipe of the older framework does to adapters before the method: its `transforms`, in the present form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from plait.recipes.paths import KeyPath, Plain
from plait.recipes.problems import Problem, show_value, spell_value


@dataclass
class OlderTransforms:
    """What became of an older recipe's transforms.

    Attributes:
        notes: what was found, what means the same now, and what to know of it.
        moved: path in the recipe → the path where its user wrote it.
        problems: what cannot be carried over.
    """

    notes: list[tuple[str, str, str]] = field(default_factory=list)
    moved: dict[KeyPath, KeyPath] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def is_old_transform(transform: Plain) -> bool:
    """Return whether one transform is in a form that only the older framework knew."""
    return name_of(transform) == "ties_scaffold" or (isinstance(transform, Mapping) and "params" in transform)


def name_of(transform: Plain) -> Plain:
    """Return the name of a transform, which is a mapping or the name itself."""
    return transform.get("name") if isinstance(transform, Mapping) else transform


def take_transforms(data: dict[str, Plain], origin: KeyPath) -> OlderTransforms:
    """Rewrite the transforms of a recipe.

    Args:
        data: the recipe.
        origin: where its user wrote them.
    """
    found = OlderTransforms()
    transforms = data.get("transforms")
    if not isinstance(transforms, list):
        return found
    flat = [_flat(t, (*origin, i), i, found) for i, t in enumerate(transforms)]
    data["transforms"] = flat
    nested = [t for t in transforms if isinstance(t, Mapping) and "params" in t]
    if nested:
        new = [f for f, t in zip(flat, transforms, strict=True) if t in nested]
        found.notes.append((f"transforms: {spell_value(nested)}", f"transforms: {spell_value(new)}", ""))
    if any(name_of(t) == "ties_scaffold" for t in transforms):
        found.notes.append(("ties_scaffold", "identity", " It never did anything."))
    return found


def _flat(transform: Plain, path: KeyPath, index: int, found: OlderTransforms) -> Plain:
    """Return a transform with its parameters next to its name."""
    if name_of(transform) == "ties_scaffold":
        return {"name": "identity"}
    if not isinstance(transform, Mapping) or "params" not in transform:
        return transform
    flat = {k: v for k, v in transform.items() if k != "params"}
    params = {} if transform["params"] is None else transform["params"]
    if not isinstance(params, Mapping):
        found.problems.append(Problem((*path, "params"), f"params is {show_value(params)}; it must be a mapping."))
        return flat
    for key, value in params.items():
        if key in flat:
            text = f"{key} is given here and next to the name; keep the latter."
            found.problems.append(Problem((*path, "params", key), text))
        found.moved["transforms", index, key] = (*path, "params", key)
        flat.setdefault(key, value)
    return flat
