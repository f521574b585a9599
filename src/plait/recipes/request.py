"""What a command line or a Python call asks for, as a recipe: both give the same settings, and so make the same bytes.

Knows which short settings represent which keys of a recipe; checks nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.errors import AddressError, RecipeError, collect
from plait.folders import absolute, expanded
from plait.hub.references import parse_reference
from plait.parsing import DOCUMENT_SUFFIXES
from plait.recipes.importers.other_tools import keyword_hints
from plait.recipes.loading import build_recipe, read_recipe
from plait.recipes.overrides import apply_overrides, parse_override
from plait.recipes.schema import Recipe

_OUTPUT = ("kind", "rank", "dtype", "layout", "format")
_TOP = tuple(name for name in Recipe.model_fields if name not in ("method", "weights", "output", "adapters"))

_PARTS = ("eval", "calibration", "tune", "search")  # whose keys are set one by one

_FILES = (*DOCUMENT_SUFFIXES, ".lock")  # plait.lock is not a recipe: reading it refuses it

Adapters = Sequence[str | Path] | Mapping[str, str | Path]


def is_recipe_file(text: str | Path) -> bool:
    """Whether a reference is a recipe's file, and not an adapter or a model."""
    return Path(text).suffix.lower() in _FILES


def read_request(
    file: Path | None, adapters: Adapters, settings: Mapping[str, Any], sets: Sequence[str] = (), *, method: str = "linear"
) -> tuple[Recipe, Path | None]:
    """Return the recipe that is asked for, and the folder that its relative paths start from.

    Args:
        file: a recipe to start from.
        adapters: references, or name → reference; they replace the file's.
        settings: recipe keys (`scale`, `seed`, `tune.steps`, …), keys of `output` (`rank`, …), `space`, `weights` (numbers in
            the order of the adapters, name → number, or a complete policy), `moments` (a folder of `<name>.safetensors`, or
            name → file), and parameters of the method.
        sets: `PATH=VALUE`, applied last.
        method: where there is no file and nothing else names one.

    Raises:
        RecipeError: with everything that is wrong.
    """
    entries = _entries(adapters)
    if file is not None:
        if settings.get("base_model") is not None:
            settings = {**settings, "base_model": base_from_here(str(settings["base_model"]))}
        entries = [{**entry, "path": _from_here(entry["path"])} for entry in entries]
    overrides = [*_overrides(settings), *(parse_override(text) for text in sets)]
    try:
        weights = _checked(_weights(settings.get("weights")), entries)
    except RecipeError as error:
        _add_other_problems(str(error), file, adapters, settings, sets)
        raise
    if file is None:
        data = apply_overrides({"adapters": _weighed(entries, weights), "method": method}, overrides)
        return _with_moments(build_recipe(data, source="the request"), settings.get("moments")), None
    if entries:
        overrides.insert(0, ("adapters", _weighed(entries, weights)))
    elif weights is not None:
        pairs = weights.items() if isinstance(weights, dict) else enumerate(weights)
        overrides += [(f"adapters.{key}.weight", weight) for key, weight in pairs]
    recipe, folder = read_recipe(file, overrides=overrides)
    return _with_moments(recipe, settings.get("moments"), from_here=True), folder


def extend_request(
    earlier: Mapping[str, Any], adapters: Adapters, settings: Mapping[str, Any], sets: Sequence[str] = ()
) -> Recipe:
    """Return an earlier recipe with more adapters after its own.

    Args:
        earlier: a recipe as plain data; its relative paths start from the working directory.
        adapters: references, or name → reference, of those that are added.
        settings: as in `read_request`; `weights` are those of the added adapters.
        sets: `PATH=VALUE`, applied last.

    Raises:
        RecipeError: with everything that is wrong.
    """
    entries = _entries(adapters)
    added = _weighed(entries, _checked(_weights(settings.get("weights")), entries))
    data = {**earlier, "adapters": [*earlier["adapters"], *added]}
    overrides = [*_overrides(settings), *(parse_override(text) for text in sets)]
    return build_recipe(apply_overrides(data, overrides), source="the request")


def check_one_base(base: str | Path | None, settings: Mapping[str, Any]) -> None:
    """Refuse a base model that is given twice, which only a call in Python can do.

    Raises:
        RecipeError: it is.
    """
    if base is not None and settings.get("base_model") is not None:
        raise RecipeError(
            f"base= is {str(base)!r} and base_model= is {settings['base_model']!r}: they mean the same; give one."
        )


def base_from_here(text: str) -> str:
    """Return a base model's reference for a recipe with a folder of its own: a local path is made absolute."""
    try:
        return _from_here(text, allow_bare=True)
    except AddressError:  # reported where it is followed; most merges need no more than a name
        return text


def _add_other_problems(
    problem: str, file: Path | None, adapters: Adapters, settings: Mapping[str, Any], sets: Sequence[str]
) -> None:
    """Raise what is wrong besides the weights together with `problem`; return when there is nothing else."""
    try:
        read_request(file, adapters, {k: v for k, v in settings.items() if k != "weights"}, sets)
    except RecipeError as other:
        raise RecipeError(f"{problem}\n{other}") from None


def _entries(adapters: Adapters) -> list[dict[str, Any]]:
    if isinstance(adapters, Mapping):
        return [{"name": name, "path": str(path)} for name, path in adapters.items()]
    return [{"path": str(path)} for path in adapters]


def _from_here(text: str, *, allow_bare: bool = False) -> str:
    """Make a local path absolute: next to a recipe, relative paths would start at the recipe's folder."""
    reference = parse_reference(text, allow_bare=allow_bare)
    if reference.path is None:
        return text
    name = f"{reference.name}=" if reference.name else ""
    return name + str(absolute(expanded(reference.path)))


def _overrides(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Translate settings to paths in a recipe; the method comes first, its parameters go into it."""
    hints = keyword_hints([key for key in settings if settings[key] is not None])
    collect(RecipeError, hints, "these keywords are those of other tools")
    if settings.get("grid") is not None:
        raise RecipeError("grid: a merge has one value of everything; `plait sweep` (plait.sweep) tries several.")
    found: list[tuple[str, Any]] = []
    if settings.get("method") is not None:
        found.append(("method", settings["method"]))
    for key, value in settings.items():
        if key in ("method", "weights", "moments"):
            continue
        if key in _PARTS and isinstance(value, Mapping):
            found += [(f"{key}.{name}", part) for name, part in value.items()]
            continue
        is_path = key.partition(".")[0] in (*_TOP, "method")
        found.append((f"output.{key}" if key in _OUTPUT else key if is_path else f"method.{key}", value))
    if isinstance(settings.get("weights"), Mapping) and "policy" in settings["weights"]:
        found.append(("weights", dict(settings["weights"])))
    return found


def _with_moments(recipe: Recipe, given: Any, *, from_here: bool = False) -> Recipe:
    """Return the recipe with files of second moments: `<name>.safetensors` in a folder, or name → file.

    Args:
        recipe: what is asked for.
        given: folder or files; None for those that the recipe has.
        from_here: next to a recipe's file relative paths would start at its folder.
    """
    if given is None:
        return recipe
    if not isinstance(given, (str, Path, Mapping)):
        raise RecipeError(
            f"moments: {given!r} is neither a folder nor a mapping of names to files; a recipe holds nothing else."
        )
    names = [entry.name for entry in recipe.adapters]
    files = dict(given) if isinstance(given, Mapping) else {name: Path(given) / f"{name}.safetensors" for name in names}
    if unknown := [name for name in files if name not in names]:
        raise RecipeError(
            f"moments: {', '.join(map(repr, unknown))} is not an adapter of this merge; there are {', '.join(names)}."
        )
    texts = {name: str(absolute(expanded(file)) if from_here else file) for name, file in files.items()}
    entries = (entry.model_copy(update={"moments": texts.get(entry.name, entry.moments)}) for entry in recipe.adapters)
    return recipe.changed(*(("adapters", i, "moments") for i in range(len(names))), adapters=tuple(entries))


def _weights(value: Any) -> list[Any] | dict[str, Any] | None:
    """Read the adapters' weights: numbers in order (also as text, `0.7,0.3`) or name → number; a policy is none."""
    if isinstance(value, str):
        return [_number(word) for word in value.replace(",", " ").split()]
    if isinstance(value, Mapping):
        return None if "policy" in value else dict(value)
    return None if value is None else list(value)


def _checked(weights: list[Any] | dict[str, Any] | None, entries: list[dict[str, Any]]) -> list[Any] | dict[str, Any] | None:
    """Return weights that suit the adapters given next to them; those of a recipe's file are checked by the recipe."""
    if isinstance(weights, dict) and entries:
        unknown = [name for name in weights if name not in {e.get("name") for e in entries}]
        if unknown:
            raise RecipeError(f"weights: {', '.join(map(repr, unknown))} is not a name given to an adapter (name=path).")
    if isinstance(weights, list) and entries and len(weights) != len(entries):
        raise RecipeError(f"weights: {len(weights)} numbers for {len(entries)} adapters; give one for each, in their order.")
    return weights


def _weighed(entries: list[dict[str, Any]], weights: list[Any] | dict[str, Any] | None) -> list[dict[str, Any]]:
    if weights is None:
        return entries
    if isinstance(weights, dict):
        return [{**e, "weight": weights[e["name"]]} if e.get("name") in weights else e for e in entries]
    return [{**entry, "weight": weight} for entry, weight in zip(entries, weights, strict=True)]


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise RecipeError(f"weights: {word!r} is not a number; write 0.7 0.3 or 0.7,0.3.") from None
