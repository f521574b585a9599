"""The method under test: its parameters, what it promises, and how it is run on a cohort."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import create_model
from pydantic.fields import FieldInfo
from torch import Tensor

from plait.merging.combine import Combiner, pipeline_of
from plait.merging.engine import Engine
from plait.merging.inventory import Inventory
from plait.merging.kept import KeptResults
from plait.merging.moments import from_function
from plait.merging.plan import MergePlan, make_plan
from plait.merging.truncation import OutputFactors, as_blocks
from plait.methods import METHODS, Method
from plait.recipes.schema import AdapterEntry, Recipe
from plait.records import Record
from plait.results.progress import SilentProgress
from plait.stages.pipeline import Pipeline
from plait.testing.cohorts import MOMENTS, Cohort

Copies = Literal["sum", "mean"]


@dataclass(frozen=True)
class Subject:
    """A method, with what the contract cannot read off it.

    Attributes:
        method: under test; it need not be registered.
        params: its parameters in every case, as a recipe gives them.
        identity: changes of the parameters under which it drops nothing, so that one adapter of weight 1 comes out as it
            went in, and so do copies of it; None when it promises no such thing.
        copies: what T copies of an adapter make under `identity`: the adapter itself when each has weight 1/T (`sum`) or when
            each has weight 1 (`mean`); None when neither holds.
        by_position: parameters are in the order of the adapters, so that another order is another merge.
        odd: merging −ΔW gives −1 times the merge of ΔW.
        known: space → what the ordinary cohort merges to, once it is known.
    """

    method: Method
    params: Mapping[str, Any]
    identity: Mapping[str, Any] | None = None
    copies: Copies | None = None
    by_position: bool = False
    odd: bool = True
    known: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def adapters(self) -> int:
        """How many adapters are merged: three, or as near as the method takes."""
        most = self.method.max_adapters or 3
        return max(self.method.min_adapters, min(3, most))

    def recipe(
        self, cohort: Cohort, space: str, changes: Mapping[str, Any] | None = None, *, folder: Path | None = None, **fields: Any
    ) -> Recipe:
        """Return the recipe that merges a cohort; `changes` override the parameters, `fields` are keys of the recipe."""
        place = folder or Path("/nowhere")
        spec = {**self.params, **(changes or {}), "name": self.method.name, "space": space}
        moments = self.method.pipeline(self.method.spec.model_validate(spec)).needs_moments
        entries = [
            AdapterEntry(
                name=n, path=str(place / n), weight=cohort.weights[n], moments=str(place / n / MOMENTS) if moments else None
            )
            for n in cohort.factors
        ]
        return _recipe_type(self.method.spec).model_validate({"adapters": entries, "method": spec, **fields})

    def pipeline(self, space: str) -> Pipeline:
        """Return the stages that the method represents with its parameters, which may depend on the space."""
        spec = {**self.params, "name": self.method.name, "space": space}
        return self.method.pipeline(self.method.spec.model_validate(spec))

    def prepare(self, cohort: Cohort, recipe: Recipe, *, again: bool = False) -> MergeRun:
        """Plan a merge and make its surveys.

        Args:
            cohort: the adapters.
            recipe: what is merged how.
            again: whether every pass computes coordinates again, as a merge to files does; otherwise they are kept, as in a
                search, with the same bits.
        """
        targets = {name: modules.keys() for name, modules in cohort.factors.items()}
        moments = from_function(cohort.moments, targets) if pipeline_of(recipe).needs_moments else None
        kept = None if again else KeptResults()
        inventory = Inventory(recipe, cohort.adapters(), (), cohort.layouts(), None, moments=moments, kept=kept)
        plan = make_plan(inventory, workers=1)
        engine = Engine(inventory, plan, workers=1, progress=SilentProgress())
        return MergeRun(plan, engine, engine.prepare())

    def merge(self, cohort: Cohort, space: str, changes: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Tensor]:
        """Return the merged delta of every target module, dense and not truncated."""
        return self.prepare(cohort, self.recipe(cohort, space, changes, **fields)).deltas()


@dataclass(frozen=True)
class MergeRun:
    """A merge that is ready to run.

    Attributes:
        plan: what will happen.
        engine: what does it.
        combiner: which holds the surveys.
    """

    plan: MergePlan
    engine: Engine
    combiner: Combiner

    def deltas(self) -> dict[str, Tensor]:
        """Return the merged delta of every target module, dense and not truncated."""
        found = {}
        for module in self.plan.modules:
            (merged,) = self.combiner.merge(module.target)
            found[module.target] = as_blocks(merged).dense()
        return found

    def emitted(self) -> dict[str, OutputFactors]:
        """Return the factors of every target module as they would be written."""
        merged = self.engine.run(self.combiner, self.engine.ranks(self.combiner))
        return {m.target: m.factors for m in merged if m.factors is not None}


@contextmanager
def installed(method: Method) -> Iterator[None]:
    """Have the registry answer with this very method, registered or not; put things back afterward."""
    methods = METHODS._methods
    before = methods.get(method.name)
    methods[method.name] = method
    try:
        yield
    finally:
        if before is None:
            del methods[method.name]
        else:
            methods[method.name] = before


@cache
def _recipe_type(spec: type[Record]) -> type[Recipe]:
    """Return a recipe that takes this method alone: the one in `plait.recipes` knows registered methods only."""
    return create_model("Recipe", __base__=Recipe, method=(spec, ...))


def example_params(method: Method) -> dict[str, Any]:
    """Return a value for every parameter without a default: its first example, its first choice, or one between its bounds.

    Raises:
        ValueError: it is not known what a parameter may be.
    """
    fields = method.params.model_fields
    return {f.alias or name: _example(method, name, f) for name, f in fields.items() if f.is_required()}


def _example(method: Method, name: str, field: FieldInfo) -> Any:
    if field.examples:
        return field.examples[0]
    if get_origin(field.annotation) is Literal:
        return get_args(field.annotation)[0]
    if field.annotation is bool:
        return True
    low, high = bounds(field)
    if low is None or high is None:
        raise ValueError(
            f"method {method.name!r}: parameter {name!r} has no default; give it an example (Field(examples=[…])), two bounds, "
            f"or a value here (params={{{field.alias or name!r}: …}})"
        )
    # off the middle, where a parameter and its complement would be the same
    value = low + 0.3 * (high - low)
    return round(value) if field.annotation is int else value


def bounds(field: FieldInfo) -> tuple[float | None, float | None]:
    """Return the lowest and highest value of a numeric field, open or closed."""
    low = [getattr(m, key) for m in field.metadata for key in ("ge", "gt") if hasattr(m, key)]
    high = [getattr(m, key) for m in field.metadata for key in ("le", "lt") if hasattr(m, key)]
    return (low[0] if low else None), (high[0] if high else None)
