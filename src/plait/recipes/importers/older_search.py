"""What a recipe of the older framework asks of its sweeps, in the present form: the part `search`.

Every key that its sweeps had is carried over, noted with what it means here, or refused with the reason; what is in no table is
not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plait.recipes.paths import KeyPath, Plain, is_number
from plait.recipes.problems import Problem, show_value, spell_value
from plait.recipes.search import SearchSpec
from plait.recipes.validation import unknown_key

KEYS = ("search", "grid", "post_sweep_eval")
#: Keys of `search` whose values are taken as they are: there → here.
_SAME = {"type": "type", "budget": "budget", "init_points": "init_points", "seed": "seed"}
_EARLY = {
    "patience": "patience",
    "min_evals": "min_trials",
    "min_score_delta": "min_gain",
    "require_both": "require_both",
    "param_resolution": "resolution",
}
_RANGE = ("type", "min", "max", "log", "scale", "values", "choices")
_KINDS = {"continuous": "float", "integer": "int", "cat": "categorical", "choice": "categorical", "enum": "categorical"}
_WORDS = ("categorical", *(word for word, kind in _KINDS.items() if kind == "categorical"))
#: Keys that mean nothing here, and why.
_ELSEWHERE = {
    "warm_start_sweeps": "a summary of that framework does not tell what its candidates were asked; give studies of plait "
    "(--warm-start STUDY)",
    "warm_start_from": "a summary of that framework does not tell what its candidates were asked; give studies of plait "
    "(--warm-start STUDY)",
    "warm_start_max_points": "all candidates that match are taken",
    "known_points_consume_budget": "known points are evaluated here, within the budget",
    "n_candidates": "how many candidates an expectation is computed for is fixed",
    "xi": "the improvement is expected over the best so far, without a margin",
}
_POINTS = ("initial_points", "known_points")
_NOT_OF_GRIDS = ("budget", "init_points", "seed", "early_stop", "inject_zero_baseline", *_POINTS)
_ALLOWED = (*_SAME, "space", "grid", "early_stop", "inject_zero_baseline", *_POINTS, *_ELSEWHERE)
_PRESENT = frozenset(SearchSpec.model_fields) - {*_ALLOWED}
_POST = ("enabled", "split", "eval_tasks", "save_merged")
_BEST = " The merge of the best is written to STUDY/merged; those of other candidates are not."


@dataclass
class OlderSearch:
    """An older recipe's wishes for a search.

    Attributes:
        search: the part `search`; empty where nothing is searched.
        first: parameter of the method → the value that the search starts from, for those that the recipe needs and lacks.
        judged: split on which the best is judged, where the recipe says so.
        notes: what was found, what it is now, and what to know of it.
        moved: path in the recipe → the path where its user wrote it.
        problems: what cannot be carried over.
        remarks: where scores differ.
    """

    search: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Plain] = field(default_factory=dict)
    judged: str | None = None
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    moved: dict[KeyPath, KeyPath] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def take_search(data: dict[str, Plain], params: Mapping[str, Plain], method: str | None) -> OlderSearch:
    """Take `search`, `grid` and `post_sweep_eval` out of a recipe; return them in the present form.

    Args:
        data: the recipe, with its transforms as they are written now; loses these keys.
        params: of its method, as they are called now.
        method: its name.
    """
    old = {key: value for key in KEYS if (value := data.pop(key, None)) is not None}
    found = _SearchReader(old, params, method).run()
    if found.search and data.pop("constraint_nonnegative", None) is False:
        found.search["constraint_nonnegative"] = False
    if found.search and data.get("save_merged"):
        found.search["save_merged"] = saved = data.pop("save_merged")
        found.moved["search", "save_merged"] = ("save_merged",)
        found.notes.append((f"save_merged: {spell_value(saved)}", f"search: {{save_merged: {spell_value(saved)}}}", _BEST))
    if found.search:
        found.remarks += _other_scores(found.search, data.get("transforms"), params, method)
    return found


def _other_scores(search: Mapping[str, Any], transforms: Plain, params: Mapping[str, Plain], method: str | None) -> list[str]:
    """Report what a sweep left out without a word, and plait does not."""
    acting = [t for t in transforms if t != {"name": "identity"} and t != "identity"] if isinstance(transforms, list) else []
    remarks = []
    if acting:
        remarks.append(
            "the scores of this search differ from before: its sweeps left `transforms` out; every candidate has them."
        )
    searched = {**search.get("grid", {}), **search.get("space", {})}
    if method == "weighted" and "lambda" in params and "method.lambda" in searched:
        remarks.append(
            "the scores of this search differ from before: where `lambda` was given as well, every candidate of 'weighted' had "
            "that one; each has its own."
        )
    return remarks


class _SearchReader:
    """One recipe's search."""

    def __init__(self, old: Mapping[str, Plain], params: Mapping[str, Plain], method: str | None) -> None:
        self._old, self._params, self._method = old, params, method
        self._found = OlderSearch()
        self._remarks: list[str] = []
        self._saved: Plain = None  # what asks for the merge of the best

    def run(self) -> OlderSearch:
        """Take every key."""
        old = self._section("search")
        self._take_post()
        top = self._section("grid")
        if top and isinstance(old.get("grid"), Mapping) and old["grid"]:
            self._problem(("grid",), "grid and search.grid mean the same; keep search.grid.")
        for key in old.keys() - {*_ALLOWED}:
            self._problem(("search", key), unknown_key(str(key), _ALLOWED))
        place: KeyPath = ("grid",) if top else ("search", "grid")
        grid = self._named("grid", top or old.get("grid"), place, lambda value, path: self._values(value, path))
        space = self._named("space", old.get("space"), ("search", "space"), self._range)
        kind = str(old.get("type", "grid")).lower()
        unused = ("space", space) if kind == "grid" else ("grid", grid)
        if unused[1]:
            self._remarks.append(f"{unused[0]} (it had no effect with type {kind})")
        wanted = {"grid": grid} if kind == "grid" else {"space": space}
        if any(wanted.values()):
            self._search(old, wanted, kind)
            return self._found
        given = {key: value for key, value in (("search", dict(old)), ("grid", dict(top))) if value}
        for key, value in given.items():
            self._found.notes.append((f"{key}: {spell_value(value)}", "", " It searches nothing."))
        return self._found

    def _search(self, old: Mapping[str, Plain], wanted: Mapping[str, Any], kind: str) -> None:
        search = self._found.search
        if kind == "grid":
            self._remarks += [f"{key} (it had no effect with type grid)" for key in _NOT_OF_GRIDS if old.get(key)]
            old = {key: value for key, value in old.items() if key not in _NOT_OF_GRIDS}
        search |= {new: old[key] for key, new in _SAME.items() if old.get(key) is not None} | {"type": kind} | dict(wanted)
        self._found.moved |= {("search", new): ("search", key) for key, new in _SAME.items()}
        points = [self._point(p) for key in _POINTS for p in _listed(old.get(key))]
        if points:
            search["points"] = points
        if _listed(old.get("known_points")):
            self._remarks.append("the scores of known_points (they are evaluated like others)")
        if early := self._early(old.get("early_stop")):
            search["early_stop"] = early
        if self._saved is not None:
            search["save_merged"] = self._saved
            self._found.moved["search", "save_merged"] = ("post_sweep_eval", "save_merged")
        if old.get("inject_zero_baseline"):
            if "method.scale" in wanted.get("space", {}):
                search["zero_baseline"] = True
            else:
                self._remarks.append("inject_zero_baseline (it had an effect on 'uniform_scalar_delta' alone)")
        self._remarks += [f"{key} ({why})" for key, why in _ELSEWHERE.items() if old.get(key) is not None]
        self._start({**wanted.get("grid", {}), **wanted.get("space", {})})
        left = f" Not carried over: {'; '.join(self._remarks)}." if self._remarks else ""
        more = " `plait sweep` searches; other commands take the recipe's own values." + left
        given = {key: self._old[key] for key in ("search", "grid") if key in self._old}
        self._found.notes.append((spell_value(given)[1:-1], f"search: {spell_value(search)}", more))

    def _start(self, paths: Mapping[str, Any]) -> None:
        """Give the method what it needs and only the search had: the first value, or the smallest."""
        if self._method in ("weighted", "weighted_delta") and "lambda" not in self._params and "method.lambda" in paths:
            given = paths["method.lambda"]
            values = given if isinstance(given, list) else given.get("values")
            self._found.first["lambda"] = values[0] if values else given.get("min")

    def _named(self, key: str, given: Plain, place: KeyPath, read: Any) -> dict[str, Any]:
        """Return path → values of a mapping by parameters."""
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            self._problem(place, f"{key} is {show_value(given)}; it must be a mapping.")
            return {}
        found = {}
        for name, value in given.items():
            path, factor = self._path(str(name))
            self._found.moved["search", key, path] = (*place, name)
            found[path] = read(value, (*place, name)) if factor is None else _scaled(read(value, (*place, name)), factor)
        return found

    def _path(self, name: str) -> tuple[str, float | None]:
        """Return the path that a parameter of the method is now, and what its values are multiplied by."""
        if self._method == "ties":
            return {"lambda": ("scale", None), "k": ("method.density", 0.01)}.get(name, (f"method.{name}", None))
        return ("seed", None) if (self._method, name) == ("dare", "seed") else (f"method.{name}", None)

    @staticmethod
    def _values(value: Plain, path: KeyPath) -> list[Plain]:
        return list(value) if isinstance(value, list) else [value]

    def _range(self, value: Plain, path: KeyPath) -> Any:
        if not isinstance(value, Mapping):
            return self._values(value, path)
        for key in value.keys() - {*_RANGE}:
            self._problem((*path, key), unknown_key(str(key), _RANGE))
        kind = str(value.get("type", "float"))
        values = value.get("values", value.get("choices"))
        bounds = [key for key in ("min", "max", "log") if value.get(key) is not None]
        if values is not None and bounds:
            unused = "values" if kind not in _WORDS else " and ".join(bounds)
            self._remarks.append(f"{unused} of {path[-1]} (no effect with type {kind})")
        if values is not None and (kind in _WORDS or not bounds):
            return {"values": self._values(values, path)}
        found = {key: value[key] for key in ("min", "max") if key in value} | {"type": _KINDS.get(kind, kind)}
        return found | ({"log": True} if value.get("log") is True or value.get("scale") == "log" else {})

    def _point(self, point: Plain) -> Plain:
        params = point.get("params", point) if isinstance(point, Mapping) else point
        if not isinstance(params, Mapping):
            return point
        named = ((self._path(str(name)), value) for name, value in params.items())
        return {path: value if factor is None else _scaled(value, factor) for (path, factor), value in named}

    def _early(self, early: Plain) -> dict[str, Plain]:
        if not isinstance(early, Mapping):
            if early:
                self._problem(("search", "early_stop"), f"early_stop is {show_value(early)}; it must be a mapping.")
            return {}
        if early.get("enabled", False) is not True:
            self._remarks.append("early_stop (it was not enabled)")
            return {}
        for key in early.keys() - {"enabled", *_EARLY}:
            self._problem(("search", "early_stop", key), unknown_key(str(key), ("enabled", *_EARLY)))
        found = {new: early[key] for key, new in _EARLY.items() if early.get(key) is not None}
        steps = found.get("resolution")
        if isinstance(steps, Mapping):
            named = ((self._path(str(name)), value) for name, value in steps.items())
            found["resolution"] = {path: value if factor is None else _scaled(value, factor) for (path, factor), value in named}
        return found

    def _take_post(self) -> None:
        post = self._old.get("post_sweep_eval")
        if post is None:
            return
        if not isinstance(post, Mapping):
            if post:
                self._problem(("post_sweep_eval",), f"post_sweep_eval is {show_value(post)}; it must be a mapping.")
            return
        for key in post.keys() - {*_POST}:
            self._problem(("post_sweep_eval", key), unknown_key(str(key), _POST))
        more = " The best of a search is always asked once on the split of eval."
        if post.get("enabled", False):
            self._found.judged = str(post.get("split") or "test")
            new = f"eval: {{split: {self._found.judged}}}"
            if post.get("eval_tasks") is not None:
                more += " It is judged on the tasks that it was searched on."
            if (saved := post.get("save_merged", True)) is not False:  # true was the default
                self._saved = saved
                new += f"` and `search: {{save_merged: {spell_value(saved)}}}"
                more += _BEST
            self._found.notes.append((f"post_sweep_eval: {spell_value(dict(post))}", new, more))
        else:
            self._found.notes.append((f"post_sweep_eval: {spell_value(dict(post))}", "", more))

    def _section(self, key: str) -> Mapping[str, Plain]:
        value = self._old.get(key)
        if value is None or isinstance(value, Mapping):
            return value or {}
        if value:
            self._problem((key,), f"{key} is {show_value(value)}; it must be a mapping.")
        return {}

    def _problem(self, path: KeyPath, text: str) -> None:
        self._found.problems.append(Problem(path, text))


def _listed(value: Plain) -> list[Plain]:
    return list(value) if isinstance(value, list) else []


def _scaled(value: Any, factor: float) -> Any:
    """Return percents as shares, in decimals as they are written: numbers, lists, or the ends and values of a range."""
    if isinstance(value, list):
        return [_scaled(v, factor) for v in value]
    if isinstance(value, Mapping):
        return {key: _scaled(v, factor) if key in ("min", "max", "values") else v for key, v in value.items() if key != "type"}
    return round(value * factor, 12) if is_number(value) else value


def searched_split(found: OlderSearch, asked: Mapping[str, Plain]) -> tuple[dict[str, Plain], list[str]]:
    """Divide what an older recipe evaluated on into what candidates are compared on and what the best is judged on.

    Args:
        found: its search, which gets split and sample.
        asked: its `eval`, in the present form.

    Returns:
        What is left for `eval`, and remarks.
    """
    left, remarks = dict(asked), list[str]()
    if (subset := left.pop("subset", None)) is not None:
        found.search["subset"] = subset
        found.moved |= {
            ("search", "subset", key): ("eval_subset", key) for key in (subset if isinstance(subset, Mapping) else ())
        }
    split = left.pop("split", None)
    if split not in (None, "test"):
        found.search["split"] = split
        found.moved["search", "split"] = ("split",)
    elif split == "test":
        remarks.append(
            "the scores of this search differ from before. Its candidates were compared on the split 'test', and nothing else "
            "judged the best; they are compared on 'validation' now, and the best is asked once on 'test'."
        )
    if found.judged is not None:
        left["split"] = found.judged
    return left, remarks


def is_older(search: Plain) -> bool:
    """Return whether a recipe's `search` has keys that only the older framework's sweeps had."""
    if not isinstance(search, Mapping):
        return False
    older = {*_ELSEWHERE, *_POINTS, "inject_zero_baseline"}
    early = search.get("early_stop")
    return not older.isdisjoint(search) or (isinstance(early, Mapping) and "enabled" in early)


def is_present(search: Plain) -> bool:
    """Return whether a recipe's `search` has keys that those sweeps did not have."""
    return isinstance(search, Mapping) and not _PRESENT.isdisjoint(search)
