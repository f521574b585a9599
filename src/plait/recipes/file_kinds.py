"""What a YAML or JSON file is, where it is not what it was given as: known by its keys.

Independent of what is valid: a file of the kind that is wanted is read, and checked, by others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plait.errors import PlaitError, RecipeError
from plait.recipes.paths import Plain

Wanted = Literal["a recipe", "a task", "a file of phases"]


@dataclass(frozen=True)
class FileKind:
    """One kind of file.

    Attributes:
        name: what messages call it.
        keys: sets of keys, one of which every file of the kind has completely, and no file of a kind after it.
        advice: what takes it, as a sentence.
    """

    name: str
    keys: tuple[frozenset[str], ...]
    advice: str


def _any_of(*texts: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(text.split()) for text in texts)


# The first that matches is taken.
_KINDS = (
    FileKind(
        "a lock, the record of a result's inputs and outputs",
        _any_of("inputs outputs recipe"),
        "`plait verify FOLDER`, with the folder that holds it, checks the result or makes it again.",
    ),
    FileKind(
        "the record of a search",
        _any_of("study runs"),
        "`plait report FOLDER`, with the folder that holds it, shows it; recipe.yaml next to it is the best recipe.",
    ),
    FileKind(
        "the record of a training",
        _any_of("plait job"),
        "Give the folder of the adapter that was trained, next to other adapters: `plait merge FOLDER OTHER -o OUT`.",
    ),
    FileKind(
        "a record of what plait did",
        _any_of("plait finished", "plait recipe", "finished seconds timestamp"),
        "`plait report FOLDER`, with the folder that holds it, shows a result; `plait verify FOLDER` makes it again.",
    ),
    FileKind(
        "the configuration of an adapter",
        _any_of("peft_type", "lora_alpha target_modules"),
        "Give the folder that holds it, next to other adapters: `plait merge FOLDER OTHER -o OUT`.",
    ),
    FileKind(
        "the configuration of a model",
        _any_of("model_type", "architectures"),
        "Give the folder that holds it as the base: `--base-id FOLDER`.",
    ),
    FileKind("a file of phases", _any_of("phases"), "`plait train FILE -o OUT` takes it."),
    FileKind(
        "a recipe",
        _any_of("adapters", "merge_method models", "merge_method slices"),
        "`plait merge FILE -o OUT`, `plait eval FILE` and the other commands that merge take it, before their options.",
    ),
    FileKind(
        "a task",
        _any_of("kind data", "kind splits", "kind target", "kind prompt", "prompt", "messages"),
        "Commands take it next to adapters: `plait eval ADAPTER... --tasks FILE`, and plait tune, plait sweep and plait "
        "calibrate likewise.",
    ),
)


def refuse_other_kind(data: Plain, wanted: Wanted, source: str, error: type[PlaitError] = RecipeError) -> None:
    """Refuse a file that is of another kind, by its name; do nothing where its keys are of the wanted kind, or of none.

    Args:
        data: what the file holds.
        wanted: the kind it was given as.
        source: what messages call the file.
        error: what a refusal raises.

    Raises:
        PlaitError: (`error`) it is of another kind.
    """
    if not isinstance(data, dict):
        return
    kind = next((kind for kind in _KINDS if any(keys <= data.keys() for keys in kind.keys)), None)
    if kind is not None and kind.name != wanted:
        raise error(f"{source} is {kind.name}, not {wanted}. {kind.advice}")
