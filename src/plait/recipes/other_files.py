"""Files that are taken for a recipe and are not one: what each is, and where it belongs."""

from __future__ import annotations

from collections.abc import Mapping

from plait.recipes.paths import Plain

#: Keys that no recipe has together → what has them, and what to do with it.
_KINDS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"kind", "data"}), "a task's file. Give it with --tasks; `plait tasks check` checks it."),
    (
        frozenset({"recipe", "inputs", "outputs"}),
        "the lock of a result. `plait verify FOLDER` makes that again; the recipe is under its key `recipe`.",
    ),
    (frozenset({"recipe", "sources"}), "the record of a finished run. The recipe is under its key `recipe`."),
    (frozenset({"target_modules", "source_tasks"}), "the summary of a merge. Its recipe is in the lock of the same folder."),
    (
        frozenset({"peft_type"}),
        "an adapter's configuration. Give the adapter's folder in its place: plait merge FOLDER FOLDER.",
    ),
    (
        frozenset({"architectures", "model_type"}),
        "a model's configuration. Give the model's folder as --base-id, or base_model.",
    ),
    (frozenset({"weight_map"}), "the index of a model's files. Give the model's folder as --base-id, or base_model."),
)


def other_file(data: Mapping[str, Plain]) -> str | None:
    """Return what data is that is not a recipe, with advice; None where it may be one."""
    if "adapters" in data and "kind" not in data and "source_tasks" not in data:
        return None
    return next((what for keys, what in _KINDS if keys <= data.keys()), None)
