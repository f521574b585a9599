"""What a merge method is, and the registry of all of them.

A method is a small pure function with a description. There are two kinds so far:

- a `LinearMethod` gives one coefficient per adapter; its result is exact in every space, by concatenation;
- an `ElementwiseMethod` combines a block of coordinates entry by entry, in any space that offers coordinates.

No method sees a file, a module's tensors as a whole, or the order of work. What it needs to know of the whole model or the
whole module (a threshold) it asks for as a `Survey`; what it needs of chance it draws from keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, TypeVar

from pydantic import Field, create_model
from torch import Tensor

from plait.errors import PlanError, did_you_mean
from plait.linalg.keyed import Key, uniform
from plait.records import Record

Scope = Literal["model", "module"]
AutoRank = Literal["exact", "largest"]
COORDINATES = ("delta", "core", "knots", "factors")


class MethodParams(Record):
    """Base of a method's parameters: every field has bounds, a default and a description."""


P = TypeVar("P", bound=MethodParams)


class NoParams(MethodParams):
    """A method without parameters."""


@dataclass(frozen=True, eq=False)
class Block:
    """A block of coordinates, with everything a method may know about it.

    Attributes:
        x: (T, p, q), float32 or float64; zeros where an adapter lacks the module.
        weights: (T,), float64; already per module, and in `factors` space already ±√.
        start: the first row of the block within its array.
        keys: one random stream per adapter, named by (seed, adapter, module); equal for every block of an array.
        statistics: the results of the method's surveys, in their order.
    """

    x: Tensor
    weights: Tensor
    start: int
    keys: tuple[Key, ...]
    statistics: tuple[Tensor, ...]

    def uniform(self, adapter: int) -> Tensor:
        """Return (p, q) uniform numbers on [0, 1) for one adapter; they do not depend on how blocks are cut."""
        return uniform(self.keys[adapter], self.start, *self.x.shape[1:])


class Reduction(Protocol):
    """Something learnt in passes over blocks; several threads show it theirs, in any order."""

    def observe(self, block: Block) -> None:
        """Take one block of a pass in."""

    def end_pass(self) -> bool:
        """Close a pass; True when `values` are ready."""

    @property
    def values(self) -> Tensor:
        """The result."""


@dataclass(frozen=True)
class Survey:
    """A question about all entries of a model, or of a module.

    Attributes:
        scope: whose entries.
        start: returns a fresh reduction for T adapters.
    """

    scope: Scope
    start: Callable[[int], Reduction]


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
class Method:
    """A registered method; see `LinearMethod` and `ElementwiseMethod`.

    Attributes:
        name: as recipes spell it.
        summary: one line for people.
        equation: what it computes.
        params: its parameters.
        source: paper or tool.
        deviation: where and why it differs from the source; empty when it does not.
        spaces: where it can run, the default first.
        min_adapters: fewest adapters it takes.
        max_adapters: most adapters it takes; None for any number.
        randomised: whether it draws random numbers (always from keys).
        auto_rank: the rank that `rank: auto` means: the `exact` one, or PEFT's habit, the `largest` source rank.
        check: raises ValueError when parameters do not suit a number of adapters.
        layers: the layers that parameters name, so that a plan can refuse one that is not there.
    """

    name: str
    summary: str
    equation: str
    params: type[MethodParams]
    source: Source
    deviation: str = ""
    spaces: tuple[str, ...] = COORDINATES
    min_adapters: int = 1
    max_adapters: int | None = None
    randomised: bool = False
    auto_rank: AutoRank = "exact"
    check: Callable[[Any, int], None] = field(default=lambda params, adapters: None, repr=False)
    layers: Callable[[Any], tuple[str, ...]] = field(default=lambda params: (), repr=False)

    @cached_property
    def spec(self) -> type[MethodParams]:
        """The shape of `method:` in a recipe: the parameters, with `name` and `space`."""
        return create_model(
            f"{self.name}_method",
            __base__=self.params,
            __doc__=self.summary,
            name=_choice((self.name,), Field(description=self.summary)),
            space=_choice(self.spaces, Field(self.spaces[0], description="Coordinates in which the merge happens.")),
        )


@dataclass(frozen=True)
class LinearMethod(Method):
    """Σ cₜ ΔWₜ.

    Attributes:
        coefficients: (weights (T,), params, module path) → c (T,).
    """

    coefficients: Callable[[Tensor, Any, str], Tensor] = field(kw_only=True)

    def combine(self, block: Block, coefficients: Tensor) -> Tensor:
        """Return Σ cₜ xₜ, (p, q): only for spaces in which coordinates are not linear in the deltas (`factors`)."""
        return (block.x * coefficients.to(block.x.dtype).view(-1, 1, 1)).sum(0)


@dataclass(frozen=True)
class ElementwiseMethod(Method):
    """A function of the coordinates, entry by entry.

    Attributes:
        combine: (block, params) → (p, q).
        surveys: params → what it needs to know beforehand.
    """

    combine: Callable[[Block, Any], Tensor] = field(kw_only=True)
    surveys: Callable[[Any], tuple[Survey, ...]] = field(default=lambda params: (), kw_only=True)


def _choice(words: tuple[str, ...], field: Any) -> Any:
    """Return the definition of a field that takes one of some words."""
    return (Literal[words], field)


class Registry(Mapping[str, Method]):
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


METHODS = Registry()


def register(method: Method) -> Method:
    """Add a method to the registry and return it."""
    METHODS.add(method)
    return method
