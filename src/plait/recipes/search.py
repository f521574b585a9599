"""The part of a recipe that describes where a better one is searched, and what makes it better."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from plait.errors import RecipeError
from plait.recipes.documents import read_document
from plait.recipes.evaluation import SplitName, Subset
from plait.records import Record

SearchType = Literal["grid", "bayes", "random"]
RangeKind = Literal["float", "int", "categorical"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Goals = tuple[Annotated[str, Field(pattern=r"^(worst_recovery|mean_recovery|.+\.recovery)$")], ...]

_RANGE = re.compile(
    r"\s*(?P<low>[-+]?[\d.]+?(?:[eE][-+]?\d+)?)\s*\.\.\s*(?P<high>[-+]?[\d.]+(?:[eE][-+]?\d+)?)(?P<how>(?::\w+)*)\s*"
)
_FORM = "write LOW..HIGH, LOW..HIGH:log, LOW..HIGH:int, or values: a,b,c"
DEFAULT_BUDGET, DEFAULT_INIT_POINTS, MOST_PARALLEL = 20, 8, 256


class Range(Record):
    """The values of one path of a recipe that are searched: between two numbers, or among some."""

    type: Annotated[
        RangeKind | None, Field(description="Kind of the values; what the recipe has at this path, when not given.")
    ] = None
    min: Annotated[Finite | None, Field(description="Smallest number.")] = None
    max: Annotated[Finite | None, Field(description="Largest number.")] = None
    log: Annotated[bool, Field(description="Search the logarithm.")] = False
    values: Annotated[tuple[Any, ...] | None, Field(min_length=1, description="Values, in place of two bounds.")] = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        """Accept `0..2`, `0.1..3:log`, `1..64:int`, and a list of values."""
        if isinstance(data, (list, tuple)):
            return {"values": list(data)}
        return _read_range(data) if isinstance(data, str) else data

    @model_validator(mode="after")
    def _bounded(self) -> Range:
        if self.values is not None:
            if self.min is not None or self.max is not None or self.log or self.type in ("float", "int"):
                raise ValueError("'values' are searched as they are; take min, max, log and type out, or the values")
            return self
        if self.type == "categorical":
            raise ValueError("type 'categorical' needs 'values'")
        if self.min is None or self.max is None:
            raise ValueError("a range needs 'min' and 'max', or 'values'")
        if self.min >= self.max:
            raise ValueError(f"min is {self.min:g} and max {self.max:g}; min must be smaller")
        if self.log and self.min <= 0:
            raise ValueError(f"min is {self.min:g}; with 'log' it must be > 0")
        if self.type == "int" and not (self.min.is_integer() and self.max.is_integer()):
            raise ValueError(f"min is {self.min:g} and max {self.max:g}; of integers they must be integers")
        return self


class EarlyStop(Record):
    """When a search ends before its budget: the best has not changed, or candidates differ from it by too little to matter."""

    patience: Annotated[int, Field(ge=1, description="Trials without a gain after which a search stops.")] = 5
    min_gain: Annotated[float, Field(ge=0, allow_inf_nan=False, description="Smallest gain of the score that counts.")] = 5e-4
    min_trials: Annotated[
        int | None, Field(ge=1, description="Trials before which a search does not stop; the larger of 8 and `init_points`.")
    ] = None
    resolution: Annotated[
        dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]],
        Field(description="Path → step: trials that round to the same steps as the best are as good as the same."),
    ] = Field(default_factory=dict)
    require_both: Annotated[
        bool, Field(description="With `resolution`: stop only where both hold, rather than either of them.")
    ] = True


class SearchSpec(Record):
    """Which recipes are tried in the search for the best, on what, and by which score."""

    type: Annotated[
        SearchType | None,
        Field(
            description="Try all combinations, what a Gaussian process expects most of, or points at random; `grid` where only "
            "that is given, else `bayes`."
        ),
    ] = None
    space: Annotated[
        dict[str, Range],
        Field(description="Path of the recipe → range of its values: {min, max, log}, or text such as 0.1..3:log."),
    ] = Field(default_factory=dict)
    grid: Annotated[
        dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]],
        Field(description="Path of the recipe → list of the values that are tried."),
    ] = Field(default_factory=dict)
    budget: Annotated[
        int | None,
        Field(ge=1, description="New candidates that are tried, at most; 20, or all of a grid, when not given."),
    ] = None
    init_points: Annotated[
        int | None, Field(ge=1, description="Candidates before the first expected one; 8, or the budget, when not given.")
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**31, description="Seed of what is tried.")] = 0
    parallel: Annotated[
        int | None,
        Field(
            ge=1,
            le=MOST_PARALLEL,
            description="Candidates that are suggested together, before one of them is known; 1, or the workers of a cluster, "
            "when not given.",
        ),
    ] = None
    points: Annotated[
        tuple[dict[str, Any], ...],
        Field(description="Candidates that are tried first: path → value; the recipe's own values where they give none."),
    ] = ()
    split: Annotated[SplitName, Field(description="Split of the tasks on which candidates are compared.")] = "validation"
    subset: Annotated[Subset | None, Field(description="A fixed sample of that split; all of it without one.")] = None
    allow_test: Annotated[
        bool, Field(description="Compare candidates on the split `test`; the best cannot be judged on it any more.")
    ] = False
    maximize: Annotated[
        Goals,
        Field(
            min_length=1,
            max_length=3,
            description="Score: `worst_recovery`, `mean_recovery` or `TASK.recovery`; several have a Pareto front.",
        ),
    ] = ("worst_recovery",)
    constraint_nonnegative: Annotated[
        bool, Field(description="Rank candidates that are worse than the base on some task behind all others.")
    ] = True
    zero_baseline: Annotated[
        bool, Field(description="Tell the search that scale 0 is the base model, whose recovery is 0, without asking it.")
    ] = False
    race: Annotated[
        bool, Field(description="Ask candidates on growing parts of the examples, and stop where they cannot win any more.")
    ] = True
    early_stop: Annotated[EarlyStop | None, Field(description="When a search ends before its budget; never without it.")] = None
    save_merged: Annotated[
        bool, Field(description="Write the merge of the best, as `plait merge` does, to `merged` in the study's folder.")
    ] = False

    @field_validator("grid", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        """Accept a single value and text with commas in place of a list."""
        return {key: _listed(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value

    @field_validator("maximize", mode="before")
    @classmethod
    def _one_goal(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> SearchSpec:
        problems = [f"{key!r} is in 'space' and in 'grid'; keep one" for key in self.space if key in self.grid]
        ranges = [key for key, found in self.space.items() if found.values is None]
        if self.type == "grid" and ranges:
            problems.append(f"a grid has values, and {', '.join(ranges)} a range; give values, or type 'bayes' or 'random'")
        if self.split == "test" and not self.allow_test:
            problems.append(
                "split 'test' judges the result, and candidates that are chosen on it cannot be judged there; give another "
                "(validation), or allow_test: true, which every record then says"
            )
        if self.budget is not None and self.init_points is not None and self.init_points > self.budget:
            problems.append(f"init_points is {self.init_points} and budget {self.budget}; it must not be larger")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def used_type(self) -> SearchType:
        """How candidates are found."""
        return self.type or ("grid" if self.grid and not self.space else "bayes")

    @property
    def used_budget(self) -> int | None:
        """How many new candidates are tried; None for all of a grid."""
        return self.budget or (None if self.used_type == "grid" else DEFAULT_BUDGET)

    @property
    def used_init_points(self) -> int:
        """How many candidates come before the first that is expected to be good."""
        return self.init_points or min(DEFAULT_INIT_POINTS, self.used_budget or DEFAULT_INIT_POINTS)

    @property
    def ranges(self) -> dict[str, Range]:
        """Every path that is searched, as the user spelled it, with its values."""
        return {**self.space, **{key: Range(values=values) for key, values in self.grid.items()}}


def _read_range(text: str) -> dict[str, Any]:
    found = _RANGE.fullmatch(text)
    if found is None:
        if ".." in text or not text.strip():
            raise ValueError(f"{text!r} is not a range: {_FORM}")
        return {"values": _listed(text)}
    how = [word for word in found["how"].split(":") if word]
    if unknown := [word for word in how if word not in ("log", "int", "float")]:
        raise ValueError(f"{text!r}: {unknown[0]!r} is not known; {_FORM}")
    kinds = [word for word in how if word != "log"]
    try:
        low, high = float(found["low"]), float(found["high"])
    except ValueError:
        raise ValueError(f"{text!r} is not a range: {_FORM}") from None
    return {"min": low, "max": high, "log": "log" in how, "type": kinds[0] if kinds else None}


def _listed(value: Any) -> Any:
    """Return a list: what has commas outside of brackets, taken apart and read as YAML has its scalars."""
    if not isinstance(value, str):
        return value if isinstance(value, (list, tuple)) else [value]
    try:
        return read_document(f"[{value}]", value).data
    except RecipeError as error:
        raise ValueError(f"{value!r} is not a list of values: {_FORM}") from error
