"""Options that several commands have; and one flag for every key of a recipe, read off the table of `recipe_keys.json`.

The table is written by `make docs` from the recipe's schema, whose import takes longer than `plait --help` may.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import typer

if TYPE_CHECKING:
    from plait.commands.request import RecipeSource, Request

TABLE = Path(__file__).with_name("recipe_keys.json")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="PATH", help="Where to write.", show_default=False)]
MaybeOut = Annotated[Path | None, typer.Option("--out", "-o", metavar="PATH", help="Where to write.", show_default=False)]
Workers = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Modules worked on at a time; never changes a byte.", show_default=False)
]
Cluster = Annotated[
    str | None,
    typer.Option(metavar="RAY", help="Work on an existing Ray cluster: ray, or ray://HOST:PORT.", show_default=False),
]
Private = Annotated[bool, typer.Option("--private", help="Create the repository as private.")]
Moments = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Second moments, <adapter>.safetensors each (regmean, ssr).", show_default=False),
]
Energy = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Lowest rank that keeps this share of ‖ΔW‖² in every module.", show_default=False),
]
RecipeOrSeveral = Annotated[
    list[str], typer.Argument(metavar="RECIPE|ADAPTER...", help="A recipe, or several adapters.", show_default=False)
]
MergeOrResult = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE|ADAPTER...|MODEL",
        help="A recipe or several adapters: their merge, in memory. One adapter or model: as its files are.",
        show_default=False,
    ),
]
RecipeOrAdapters = Annotated[
    list[str],
    typer.Argument(
        metavar="[RECIPE] [ADAPTER]...",
        help=r"A recipe (.yaml), and/or adapters: \[name=]FOLDER or \[name=]org/repo\[@revision]\[/subfolder].",
        show_default=False,
    ),
]


class Loading(NamedTuple):
    """How the base model is loaded on this machine."""

    load_dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Dtype of the base model in memory: stored, float32, …; auto: as stored, or float32 where that is slow here.",
        ),
    ] = "auto"
    device_map: Annotated[
        str,
        typer.Option(metavar="DEVICE", help="Where the base model is placed, as in transformers: auto, cpu, cuda:0, balanced."),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the base's weights.")
    ] = False


class Pushing(NamedTuple):
    """Where a full model is uploaded, and how."""

    push_baked_repo: Annotated[
        str | None,
        typer.Option("--push-baked-repo", metavar="REPO", help="Hub repository to upload the model to.", show_default=False),
    ] = None
    private: Private = False


class Writing(NamedTuple):
    """What commands have that write a result."""

    workers: Workers = None
    json: Json = False
    force: Force = False


#: Command → the parts of a recipe that have an effect there, its own first; "" are the keys at the top.
_PARTS = {
    "merge": ("", "output", "heads", "calibration", "method"),
    "bake": ("", "heads", "calibration", "method"),
    "eval": ("eval", "", "output", "heads", "calibration", "method"),
    "ask": ("", "output", "heads", "calibration", "method"),
    "mix": ("eval", "", "output", "heads", "calibration", "method"),
    "tune": ("tune", "", "output", "heads", "method"),
    "sweep": ("search", "", "output", "heads", "eval", "method"),
    "calibrate": ("calibration", "base_model", "tasks"),
    "compress": ("output.rank", "output.dtype", "output.layout", "base_model"),
}
_NOT_FLAGS = ("version", "adapters")  # the arguments of the command are the adapters
#: Parts whose keys are flags with the part's name before theirs, except in the part's own command.
_PREFIXED = ("heads", "calibration", "eval", "tune", "search")
_NAMED = {
    "output.format": "--to",
    "base_model": "--base-id",
    "method.name": "--method",
    "search.subset.max_samples": "--subset",
    "eval.subset.max_samples": "--subset",
    "eval.subset.seed": "--seed",
}
_ALIASES = {"tune.granularity": "--coefficients"}
_DEFAULTS = {
    ("compress", "output.rank"): "",
    ("tune", "method.name"): "regmean",
    ("tune", "scale"): "the one nearest to the adapters",
    ("tune", "output.rank"): "the largest source's",
}
#: Where a command takes other values than a recipe, or another one where none is given.
_DESCRIPTIONS = {
    ("mix", "eval.subset.max_samples"): "Examples per task on which a setting is scored, at most; 24 when not given.",
    ("sweep", "search.subset.max_samples"): "Examples per task to compare candidates on, at most; the best is asked all.",
    ("tune", "output.rank"): "Rank of the result: a number, or `auto`.",
    ("tune", "output.kind"): "A tuning writes a LoRA adapter, and nothing else.",
}
_EXAMPLES = dict.fromkeys(("merge", "bake", "eval", "ask", "mix"), "method.density=0.3") | {
    "tune": "tune.prompts=8",
    "sweep": "search.early_stop.patience=5",
    "calibrate": "calibration.tokens=1024",
}
_PAIR_EXAMPLES = {"search.space": "scale=0..2", "search.grid": "density=0.2,0.5"}
#: What most users of a command need: in the first panel of its help, in this order, after --out; of parts, its own alone.
_FIRST = (
    "tasks", "texts", "count", "split", "subset.max_samples", "steps", "space", "grid", "type", "budget", "maximize",
    "method.name", "weights", "scale", "base_model", "output.rank",
)  # fmt: skip
_PANELS = {
    "": "The merge",
    "output": "What is written",
    "heads": "Heads",
    "calibration": "Texts on which moments and scale are taken",
    "eval": "Evaluation",
    "tune": "Tuning",
    "search": "Search",
    "method": "Parameters of methods (`plait methods NAME` has those of one)",
}


class RecipeKey(NamedTuple):
    """A key of a recipe; see `plait.recipes.keys`."""

    path: str
    description: str
    default: str
    allowed: str

    @property
    def part(self) -> str:
        """The part of the recipe that it is in; of the merge, "method.name" and "method.space" are at the top."""
        first, dot, _ = self.path.partition(".")
        return first if dot and self.path not in ("method.name", "method.space") else ""

    @property
    def pairs(self) -> bool:
        """Whether it maps names to values, and nothing else."""
        return self.allowed.startswith("mapping of name")

    @property
    def words(self) -> bool:
        """Whether it is text, or one of a few words: what is given is not read as YAML."""
        kinds = self.allowed.split(" | ")
        return not any(kind.partition(" ")[0] in ("number", "integer", "list", "mapping", "true", "false") for kind in kinds)


@dataclass(frozen=True)
class Keys:
    """What a command line gives for the keys of a recipe.

    Attributes:
        values: path → value.
        given_sets: `--set PATH=VALUE`, in order.
    """

    values: Mapping[str, Any]
    given_sets: Sequence[str]

    @property
    def settings(self) -> dict[str, Any]:
        """Keys as Python's functions name them: of the recipe, its output and the method."""
        named: dict[str, Any] = {}
        for path, value in self.values.items():
            part, _, name = path.rpartition(".")
            if part in ("", "output") and path != "tasks":
                named[path.rpartition(".")[2]] = value
            elif part == "method":
                key = "method" if name == "name" else name
                named[key if key in ("method", "space") or not _taken(name) else path] = value
        return named

    @property
    def sets(self) -> list[str]:
        """The others, as `PATH=VALUE`; then `--set`, which comes last."""
        parts = [path for path in self.values if path.partition(".")[0] in ("heads", "calibration", "tune", "search")]
        return [*(f"{path}={json.dumps(self.values[path], ensure_ascii=False)}" for path in parts), *self.given_sets]

    @property
    def tasks(self) -> list[str] | None:
        """The task files; None for the recipe's."""
        return self.values.get("tasks") or None

    def request(self, inputs: RecipeSource, moments: Path | None = None, **how: Any) -> Request:
        """Return the recipe that is asked for; `how` as `Request` takes it."""
        from plait.commands.request import Request

        return Request(inputs, self.settings, self.sets, moments, tasks=self.tasks, **how)

    def of(self, part: str) -> dict[str, Any]:
        """Return the keys of a part: name, or names with dots between them → value."""
        return {path.partition(".")[2]: value for path, value in self.values.items() if path.startswith(f"{part}.")}


@cache
def recipe_keys() -> tuple[RecipeKey, ...]:
    """Return the keys that have flags."""
    rows = (RecipeKey(**row) for row in json.loads(TABLE.read_text(encoding="utf-8")))
    return tuple(key for key in rows if key.path not in _NOT_FLAGS)


def _taken(name: str) -> bool:
    """Whether a parameter of a method is called as a key of the recipe or its output."""
    return any(key.path in (name, f"output.{name}") for key in recipe_keys())


def flags_of(command: str) -> dict[str, RecipeKey]:
    """Return flag → key of a command: of keys with one last name, the first part's has that alone."""
    parts = _PARTS[command]
    found: dict[str, RecipeKey] = {}
    for part in parts:
        for key in recipe_keys():
            if part in (key.part, key.path):
                found[_flag(command, key, found)] = key
    return found


def switches_of(command: str) -> set[str]:
    """Return the flags of a command whose keys are true or false."""
    return {flag for flag, key in flags_of(command).items() if key.allowed == "true | false"} if command in _PARTS else set()


def _flag(command: str, key: RecipeKey, taken: Mapping[str, RecipeKey]) -> str:
    if (named := _NAMED.get(key.path)) and named not in taken:
        return named
    full = f"--{key.path}" if "." in key.path else f"--merge-{key.path}"
    short = f"--{key.path.rpartition('.')[2]}"
    prefixed = key.part in _PREFIXED and key.part != _PARTS[command][0]
    confusing = key.path == "eval.seed" or (key.part == "method" and _taken(key.path.partition(".")[2]))
    word = full if prefixed or confusing or short.replace("_", "-") in taken else short
    return word.replace(".", "-").replace("_", "-")


def with_options(command: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags that its groups of options hold, and one for every key of the recipe with an effect there.

    A parameter that is annotated with a named tuple becomes its fields; `keys` becomes the recipe's keys.
    """

    def extend(function: Callable[..., None]) -> Callable[..., None]:
        flags = flags_of(command) if command else {}
        hints = get_type_hints(function, include_extras=True)
        given = inspect.signature(function).parameters.values()
        groups = {name: _fields(hint) for name, hint in hints.items() if hasattr(hint, "_fields")}
        keys = [_parameter(name, annotation) for name, annotation in _flags(command, flags)]
        own = [_parameter(p.name, hints[p.name], p.default) for p in given if p.name != "keys" and p.name not in groups]
        grouped = [parameter for group in groups.values() for parameter in group]
        first = sum(_place(command, key) < len(_FIRST) for key in flags.values())
        out, others = [p for p in own if p.name == "out"], [p for p in own if p.name != "out"]
        ordered = [*out, *keys[:first], *others, *grouped, *keys[first:]]

        @wraps(function)
        def run(**values: Any) -> None:
            texts = {p.name: values.pop(p.name) for p in keys}
            for name, group in groups.items():
                values[name] = hints[name](**{p.name: values.pop(p.name) for p in group})
            function(**values, **({"keys": _read(flags, texts)} if command else {}))

        run.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in ordered} | {"return": None}
        return run

    return extend


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _fields(group: Any) -> list[inspect.Parameter]:
    """Return the parameters that a group of options becomes."""
    hints = get_type_hints(group, include_extras=True)
    return [_parameter(name, hints[name], group._field_defaults[name]) for name in group._fields]


def _flags(command: str, flags: Mapping[str, RecipeKey]) -> Iterator[tuple[str, Any]]:
    for flag, key in sorted(flags.items(), key=lambda item: _place(command, item[1])):
        several = key.pairs or key.path == "tasks" or key.path.endswith(".texts")
        kind: Any = list[str] | None if several else str | None
        panel = None if _place(command, key) < len(_FIRST) else _PANELS[key.part]
        option = typer.Option(flag, metavar=_metavar(key), help=_help(command, key), show_default=False, rich_help_panel=panel)
        yield parameter_name(key.path), Annotated[kind, option]
        if key.path in _ALIASES:
            yield f"{parameter_name(key.path)}_alias", Annotated[kind, typer.Option(_ALIASES[key.path], hidden=True)]
    if command in _EXAMPLES:
        text = f"Set any key of the recipe: --set {_EXAMPLES[command]}"
        yield "set_", Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help=text)]


def _place(command: str, key: RecipeKey) -> int:
    """Return where a key is among those that come first; behind them all when it is not."""
    name = key.path.removeprefix(f"{_PARTS[command][0]}.")
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def parameter_name(path: str) -> str:
    """Return what the parameter of a key's flag is called."""
    return path.replace(".", "__")


def _metavar(key: RecipeKey) -> str:
    own = {"tasks": "TASK...", "weights": "NUMBERS", "method.name": "NAME", "base_model": "MODEL", "output.rank": "RANK",
           "search.space": "PATH=LOW..HIGH", "search.grid": "PATH=A,B"}  # fmt: skip
    if key.path in own:
        return own[key.path]
    if key.pairs:
        return "NAME=…"
    words = {"list": "YAML", "mapping": "YAML", "number": "NUMBER", "integer": "N", "true": "BOOL", "string": "TEXT"}
    kinds = {kind.partition(" ")[0] for kind in key.allowed.split(" | ")}
    return next((word for kind, word in words.items() if kind in kinds), "WORD")


def _help(command: str, key: RecipeKey) -> str:
    """Return the field's description, the words that are allowed, and the default."""
    words = [w for w in key.allowed.split(" | ") if w != "null"]
    words += ["or TASK=FILE"] if key.path.endswith(".texts") else []
    shown = f" ({', '.join(words)})" if key.words and words != ["string"] else ""
    default = _DEFAULTS.get((command, key.path), key.default).strip("[]")
    return (_DESCRIPTIONS.get((command, key.path), key.description) + shown).replace("[", r"\[") + (
        rf" \[{default}]" if default else ""
    )


def _read(flags: Mapping[str, RecipeKey], given: Mapping[str, Any]) -> Keys:
    """Read what is given as the recipe's keys have it."""
    values: dict[str, Any] = {}
    for flag, key in flags.items():
        text = given[parameter_name(key.path)] or given.get(f"{parameter_name(key.path)}_alias")
        if text is None or text == []:
            continue
        if key.path.endswith(".texts"):
            kind, files = text_source(flag, text)
            values |= {path: value for path, value in ((key.path, kind), (key.path[:-5] + "files", files)) if value}
        else:
            values[key.path] = _value(flag, key, text)
    return Keys(values, given.get("set_") or [])


def _value(flag: str, key: RecipeKey, text: Any) -> Any:
    from plait.cli.arguments import named_paths, task_files
    from plait.recipes.overrides import parse_override

    if key.path == "tasks":
        return task_files(text)
    if key.pairs:
        if "string" in key.allowed:
            return named_paths(flag, text)
        pairs = named_paths(flag, text, "NAME=VALUE", _PAIR_EXAMPLES.get(key.path, "math=1"))
        return {name: parse_override(f"x={value}")[1] for name, value in pairs.items()}
    if key.words or (key.path == "weights" and not text.lstrip().startswith("{")):
        return text
    return parse_override(f"{key.path}={text}")[1]


def text_source(flag: str, given: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Return the kind of texts that a flag names, and task → file.

    Raises:
        RecipeError: neither.
    """
    from plait.errors import RecipeError

    parts = [text.partition("=") for text in given]
    files = {name: path for name, _, path in parts if name and path}
    kinds = ["".join(part) for part in parts if not (part[0] and part[2])]
    if len(kinds) > 1 or not {*kinds} <= {"split", "lines", "template"}:
        found = ", ".join(kinds)
        raise RecipeError(f"{flag} must be split, lines or template, and TASK=FILE for single tasks; got {found}.")
    return (kinds[0] if kinds else None), files
