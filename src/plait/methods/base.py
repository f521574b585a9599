"""What a merge method is, and the registry of all of them.

A method is a name, parameters with defaults, and the `Pipeline` that they represent. There are three ways to write one:

- a `Preset` spells its pipeline with public stages;
- an `ElementwiseMethod` is one function on a block of coordinates, entry by entry, in any space that offers coordinates;
- a `LinearMethod` is one function that gives a coefficient per adapter; its result is exact in every space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, Literal

from pydantic import Field, create_model

from plait.deferred import Tensor
from plait.errors import PlanError, did_you_mean
from plait.methods.auto import searched_fields
from plait.records import Record
from plait.stages.base import Block, EntryCombine, LinearCombine, Reduction, Scope, Survey
from plait.stages.pipeline import Pipeline

__all__ = ["Block", "Reduction", "Scope", "Survey"]

AutoRank = Literal["exact", "largest"]
MethodKind = Literal["linear", "entries", "deltas"]
COORDINATES = ("delta", "core", "knots", "factors")


class MethodParams(Record):
    """Base of a method's parameters: every field has bounds, a default and a description."""


class NoParams(MethodParams):
    """A method without parameters."""


@dataclass(frozen=True)
class Source:
    """Where a method comes from.

    Attributes:
        title: authors and year, or the tool.
        url: of the paper.
    """

    title: str
    url: str = ""


@dataclass(frozen=True)
class Method(ABC):
    """A registered method; see `Preset`, `ElementwiseMethod` and `LinearMethod`.

    Attributes:
        name: as recipes spell it.
        summary: one line for people.
        equation: what it computes.
        params: its parameters: a `MethodParams`, or the record of those of a stage (`TrimFields`).
        source: paper or tool.
        deviation: where and why it differs from the source; empty when it does not.
        spaces: where it can run, the default first.
        min_adapters: fewest adapters it takes.
        max_adapters: most adapters it takes; None for any number.
        randomised: whether it draws random numbers (always from keys).
        sequential: its moments of a layer are taken with the layers below already merged, so that they belong to this merge.
        auto_rank: the rank that `rank: auto` means: the `exact` one, or PEFT's habit, the `largest` source rank.
        check: raises ValueError when parameters do not suit a number of adapters.
        layers: the layers that parameters name, so that a plan can refuse one that is not there.
    """

    name: str
    summary: str
    equation: str
    params: type[Record]
    source: Source
    deviation: str = ""
    spaces: tuple[str, ...] = COORDINATES
    min_adapters: int = 1
    max_adapters: int | None = None
    randomised: bool = False
    sequential: bool = False
    auto_rank: AutoRank = "exact"
    check: Callable[[Any, int], None] = field(default=lambda params, adapters: None, repr=False)
    layers: Callable[[Any], tuple[str, ...]] = field(default=lambda params: (), repr=False)

    @property
    @abstractmethod
    def kind(self) -> MethodKind:
        """What it combines: nothing but coefficients (`linear`), coordinates (`entries`), or complete matrices (`deltas`)."""

    @abstractmethod
    def pipeline(self, params: Any) -> Pipeline:
        """Return the stages that it represents with these parameters."""

    @cached_property
    def spec(self) -> type[Record]:
        """The shape of `method:` in a recipe: the parameters, with `name` and `space`."""
        return create_model(
            f"{self.name}_method",
            __base__=self.params,
            __doc__=self.summary,
            name=_choice((self.name,), Field(description=self.summary)),
            space=_choice(self.spaces, Field(self.spaces[0], description="Coordinates in which the merge happens.")),
            **searched_fields(self.params),
        )


@dataclass(frozen=True)
class Preset(Method):
    """A method that is spelled with public stages.

    Attributes:
        stages: params → the pipeline.
        combines: its `kind`.
    """

    stages: Callable[[Any], Pipeline] = field(kw_only=True)
    combines: MethodKind = field(default="entries", kw_only=True)

    @property
    def kind(self) -> MethodKind:
        """What it combines."""
        return self.combines

    def pipeline(self, params: Any) -> Pipeline:
        """Return the stages that it represents with these parameters."""
        return self.stages(params)


@dataclass(frozen=True)
class LinearMethod(Method):
    """Σ cₜ ΔWₜ.

    Attributes:
        coefficients: (weights (T,), params, module path) → c (T,).
    """

    coefficients: Callable[[Tensor, Any, str], Tensor] = field(kw_only=True)

    @property
    def kind(self) -> MethodKind:
        """Nothing but coefficients."""
        return "linear"

    def pipeline(self, params: Any) -> Pipeline:
        """Return the sum with this method's coefficients."""
        return Pipeline(_WeightedSum(self.coefficients, params))


@dataclass(frozen=True)
class ElementwiseMethod(Method):
    """A function of the coordinates, entry by entry.

    Attributes:
        combine: (block, params) → (p, q).
        surveys: params → what it needs to know beforehand.
    """

    combine: Callable[[Block, Any], Tensor] = field(kw_only=True)
    surveys: Callable[[Any], tuple[Survey, ...]] = field(default=lambda params: (), kw_only=True)

    @property
    def kind(self) -> MethodKind:
        """Coordinates."""
        return "entries"

    def pipeline(self, params: Any) -> Pipeline:
        """Return its one stage."""
        return Pipeline(_Entrywise(self.name, self.combine, self.surveys, params))


@dataclass(frozen=True)
class _WeightedSum(LinearCombine):
    function: Callable[[Tensor, Any, str], Tensor]
    params: Any

    def coefficients(self, weights: Tensor, module: str) -> Tensor:
        return self.function(weights, self.params, module)

    def __str__(self) -> str:
        return "weighted sum"


@dataclass(frozen=True)
class _Entrywise(EntryCombine):
    name: str
    function: Callable[[Block, Any], Tensor]
    surveys_of: Callable[[Any], tuple[Survey, ...]]
    params: Any

    def surveys(self) -> tuple[Survey, ...]:
        return self.surveys_of(self.params)

    def combine(self, block: Block) -> Tensor:
        return self.function(block, self.params)

    def __str__(self) -> str:
        return self.name


def _choice(words: tuple[str, ...], field: Any) -> Any:
    """Return the definition of a field that takes one of some words."""
    return (Literal[words], field)


class MethodRegistry(Mapping[str, Method]):
    """Methods by name, in order of registration. Third parties add theirs by the entry-point group `plait.methods`."""

    group = "plait.methods"

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}
        self._loaded = False

    def add(self, method: Method) -> None:
        """Register a method.

        Raises:
            ValueError: the name is taken.
        """
        if method.name in self._methods:
            raise ValueError(f"a method named {method.name!r} is registered already")
        self._methods[method.name] = method

    def load_plugins(self) -> None:
        """Register what installed packages offer: each entry point names a `Method` or a function of the registry."""
        if self._loaded:
            return
        self._loaded = True
        for point in sorted(entry_points(group=self.group), key=lambda p: p.name):
            offered = point.load()
            if isinstance(offered, Method):
                self.add(offered)
            else:
                offered(self)

    def __getitem__(self, name: str) -> Method:
        """Return a method by name.

        Raises:
            PlanError: no such method; the message lists all and suggests the nearest.
        """
        try:
            return self._methods[name]
        except KeyError:
            raise PlanError(f"method {name!r} is not known.{did_you_mean(name, self)} Known: {', '.join(self)}.") from None

    def __contains__(self, name: object) -> bool:
        return name in self._methods

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)


METHODS = MethodRegistry()


def register(method: Method) -> Method:
    """Add a method to the registry and return it."""
    METHODS.add(method)
    return method
