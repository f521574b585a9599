"""What the stages of a merge are, and what they see.

A merge of one target module runs `pre` → `combine` → `post`. A stage is its parameters and a pure function; which class of the
ones below it is decides what it sees:

- a `DeltaStage` replaces the adapters' deltas, in factored form;
- an `EntryStage` replaces a block of coordinates, in any space that offers coordinates;
- the combine is one of four: `LinearCombine` and `GramCombine` give one coefficient per adapter (exact, by concatenation),
  `EntryCombine` merges coordinates entry by entry, `DeltaCombine` merges factored deltas as matrices;
- a `MergedStage` changes the merged delta, in factored form.

No stage sees a file, a recipe or the order of work. What it must know of a complete module or model it asks for as a `Survey`;
what it needs of chance it draws from keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor
from plait.linalg.inputs import InputRows
from plait.linalg.keyed import Key, uniform
from plait.records import Record

Scope = Literal["model", "module"]


@dataclass(frozen=True, eq=False)
class Block:
    """A block of coordinates, with everything a stage may know about it.

    Attributes:
        x: (T, p, q), float32 or float64; zeros where an adapter lacks the module.
        weights: (T,), float64; already per module, and in `factors` space already ±√.
        start: the first row of the block within its array.
        keys: one random stream per adapter, named by (seed, adapter, module); equal for every block of an array.
        statistics: the results of the stage's surveys, in their order.
    """

    x: Tensor
    weights: Tensor
    start: int
    keys: tuple[Key, ...]
    statistics: tuple[Tensor, ...]

    def of(self, x: Tensor, statistics: tuple[Tensor, ...], skip: int = 0) -> Block:
        """Return the block with other coordinates and statistics; x begins so many rows further down."""
        return Block(x, self.weights, self.start + skip, self.keys, statistics)  # `replace` takes five times as long

    def weighted(self) -> Tensor:
        """Return wₜ xₜ, (T, p, q)."""
        return self.x * self.weights.to(self.x.dtype).view(-1, 1, 1)

    def uniform(self, adapter: int) -> Tensor:
        """Return (p, q) uniform numbers on [0, 1) for one adapter; they do not depend on how blocks are cut."""
        return uniform(self.keys[adapter], self.start, *self.x.shape[1:])


class Reduction(Protocol):
    """Something learned in passes over blocks; several threads show it theirs, in any order.

    One that has a `stride` above 1 needs to see only one row in so many in the pass that begins.
    """

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
        weighed: whether the answer may depend on the adapters' weights; one that does not is asked once for all weights.
    """

    scope: Scope
    start: Callable[[int], Reduction]
    weighed: bool = True


@dataclass(frozen=True, eq=False)
class Site:
    """One matrix of one target module: what stages on deltas see.

    Attributes:
        module: its path.
        deltas: one per adapter, scaling folded in; rank 0 where an adapter lacks the module.
        weights: (T,), float64, already per module.
        key: names a random stream of this matrix.
        moments: adapter index → E[x xᵀ] of the matrix' inputs: a new (d_in, d_in) float64, or `InputRows` (k, d_in) whose
            mean it is; or None where an adapter without the module has none; None when the recipe gives none at all.
        sources: the deltas as the adapters have them, before stages on deltas; None when those are `deltas`.
        remark: called with what is worth knowing of this module afterward; the run record counts equal remarks.
    """

    module: str
    deltas: tuple[LowRank, ...]
    weights: Tensor
    key: Key
    moments: Callable[[int], Tensor | InputRows | None] | None = None
    sources: tuple[LowRank, ...] | None = None
    remark: Callable[[str], None] = field(default=lambda text: None)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.deltas[0].shape

    def weighted(self) -> list[LowRank]:
        """Return wₜ ΔWₜ."""
        return self._weighted(self.deltas)

    def weighted_sources(self) -> list[LowRank]:
        """Return wₜ ΔWₜ as the adapters have them, whatever stages on deltas have made of them."""
        return self._weighted(self.deltas if self.sources is None else self.sources)

    def _weighted(self, deltas: Sequence[LowRank]) -> list[LowRank]:
        return [d.scaled(w) for d, w in zip(deltas, self.weights.tolist(), strict=True)]


class Stage(ABC):  # noqa: B024 (its kinds, below, are abstract each in their own way)
    """A step of a merge.

    Attributes:
        randomised: whether it draws random numbers (always from keys).
        needs_moments: whether it needs second moments of inputs.
        solves: whether it solves a system of equations, which adapters that share an initialization make ill-conditioned.
    """

    randomised: ClassVar[bool] = False
    solves: ClassVar[bool] = False
    needs_moments: ClassVar[bool] = False

    def problems(self, space: str, adapters: int) -> list[str]:
        """Return why it cannot run in a space, or with so many adapters."""
        return []


class DeltaStage(Stage):
    """Changes deltas before they are combined; it may look at all adapters at once."""

    @abstractmethod
    def apply(self, site: Site) -> Sequence[LowRank]:
        """Return one delta per adapter, of the same shape."""

    def rank(self, ranks: Sequence[int]) -> list[int]:
        """Return the largest ranks that the deltas can have afterward."""
        return list(ranks)

    def span(self, ranks: Sequence[int], shape: tuple[int, int]) -> tuple[int, int]:
        """Return the largest dimensions that the column and the row space of all deltas together can have afterward.

        Args:
            ranks: of the deltas before.
            shape: these dimensions before.
        """
        return shape


class EntryStage(Stage):
    """Changes coordinates before they are combined.

    Attributes:
        weighs: whether it may look at the adapters' weights; what it makes otherwise is made once for all weights.
    """

    weighs: ClassVar[bool] = True

    def surveys(self) -> tuple[Survey, ...]:
        """Return what it needs to know beforehand."""
        return ()

    @abstractmethod
    def apply(self, block: Block) -> Tensor:
        """Return (T, p, q); the block is not changed."""


class LinearCombine(Stage):
    """Σ cₜ ΔWₜ with coefficients that are known from the recipe."""

    @abstractmethod
    def coefficients(self, weights: Tensor, module: str) -> Tensor:
        """Return c (T,) from weights (T,), both float64."""


class GramCombine(Stage):
    """Σ cₜ ΔWₜ with coefficients that depend on the inner products of the deltas.

    Attributes:
        scope: whose inner products: each module's, or the sum over the model.
    """

    if TYPE_CHECKING:
        scope: Scope  # a subclass's field: declared here it would be before that one's name

    @abstractmethod
    def coefficients(self, weights: Tensor, gram: Tensor) -> Tensor:
        """Return c (T,) from weights (T,) and ⟨ΔWᵢ, ΔWⱼ⟩ (T, T), all float64."""


class EntryCombine(Stage):
    """Merges coordinates entry by entry, in any space that offers coordinates."""

    def surveys(self) -> tuple[Survey, ...]:
        """Return what it needs to know beforehand."""
        return ()

    @abstractmethod
    def combine(self, block: Block) -> Tensor:
        """Return (p, q) from the block's (T, p, q), which is not changed."""

    @property
    def weighs_last(self) -> bool:
        """Whether weights enter after all else, so that `unweighted` can be kept for other weights."""
        return False

    def unweighted(self, block: Block) -> tuple[Tensor, ...]:
        """Return what `combine` has made of a block before it looks at weights, (…, p, q) each; asked where `weighs_last`."""
        raise NotImplementedError

    def weigh(self, unweighted: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return what `combine` does, bit for bit, from rows of what `unweighted` returned, and weights (T,) float64."""
        raise NotImplementedError


class DeltaCombine(Stage):
    """Merges deltas as matrices, in factored form: the result does not depend on coordinates."""

    @abstractmethod
    def combine(self, site: Site) -> LowRank:
        """Return the merged delta, of rank at most `rank`."""

    def rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the largest rank that the result can have.

        Args:
            ranks: of the deltas.
            shape: dimensions of the column and the row space of all deltas together; at most (d_out, d_in).
        """
        return min(sum(ranks), *shape)


class MergedStage(Stage):
    """Changes the merged delta."""

    @abstractmethod
    def apply(self, merged: LowRank, site: Site) -> LowRank:
        """Return the changed delta; `site` holds what was combined."""

    def rank(self, rank: int) -> int:
        """Return the largest rank that the result can have."""
        return rank


Combine = LinearCombine | GramCombine | EntryCombine | DeltaCombine


class StageParams(Record):
    """Base of the stages that a recipe can spell: their fields are their parameters, `name` distinguishes them.

    Every field has bounds, a default and a description, as those of methods do; the docstring's first line is what people read.
    Parameters that methods take too are in a record of their own (`TrimFields`), of which both inherit; `StageParams` comes
    after it in the bases, so that `name` stays the first field.
    """

    name: str

    @classmethod
    def of(cls, params: Record) -> Self:
        """Return the stage with those of its parameters that `params` has under the same names."""
        return cls(**{k: getattr(params, k) for k in cls.model_fields if k != "name" and hasattr(params, k)})

    @classmethod
    def spelled(cls) -> str:
        """The name that recipes use."""
        return str(cls.model_fields["name"].default)

    def __str__(self) -> str:
        """Return it as people read it: `trim(density=0.3)`, with what differs from the defaults."""
        given = {k: v for k, v in self.model_dump(exclude_defaults=True, by_alias=True).items() if k != "name"}
        return f"{self.spelled()}({', '.join(f'{k}={_plain(v)}' for k, v in given.items())})" if given else self.spelled()


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


STAGES: dict[str, type[StageParams]] = {}


def register_stage(stage: type[StageParams]) -> type[StageParams]:
    """Add a stage to those that recipes can spell, and return it.

    Raises:
        ValueError: the name is taken, or the class is not one of the kinds of stage.
    """
    name = stage.spelled()
    if name in STAGES:
        raise ValueError(f"a stage named {name!r} is registered already")
    if not issubclass(stage, Stage):
        raise ValueError(f"stage {name!r} is not one of DeltaStage, EntryStage, MergedStage and the four kinds of combine")
    STAGES[name] = stage
    return stage


def place_of(stage: type[StageParams]) -> Literal["pre", "combine", "post"]:
    """Return where in a pipeline a stage belongs."""
    if issubclass(stage, (DeltaStage, EntryStage)):
        return "pre"
    return "post" if issubclass(stage, MergedStage) else "combine"
