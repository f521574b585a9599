"""One target module through space and method: factors → merged delta. Pure; this is where surveys and spaces meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from plait.adapters.lowrank import LowRank
from plait.linalg.blocks import RowBlocks, block_ranges
from plait.linalg.keyed import Key
from plait.merging.prepared import Prepared
from plait.merging.weighting import module_weights
from plait.methods import METHODS, Block, ElementwiseMethod, LinearMethod
from plait.methods.base import Reduction, Survey
from plait.recipes.schema import Recipe
from plait.spaces import SPACES
from plait.spaces.base import Array, Frame, Merged

Statistics = tuple[Mapping[str, Tensor] | None, ...]  # per survey: array name → values; None when it is per module


@dataclass(frozen=True)
class Combiner:
    """Merges target modules, one at a time and in any order.

    Attributes:
        recipe: what was asked for.
        prepared: the factors.
        statistics: results of the surveys over the whole model.
    """

    recipe: Recipe
    prepared: Prepared
    statistics: Statistics = ()

    @property
    def method(self) -> LinearMethod | ElementwiseMethod:
        """The recipe's method."""
        method = METHODS[self.recipe.method_name]
        if not isinstance(method, (LinearMethod, ElementwiseMethod)):
            raise AssertionError(f"{type(method).__name__} is no kind of method that can be run")
        return method

    def coefficients(self, module: str) -> Tensor:
        """Return what each adapter's delta is multiplied by under a linear method, (T,) float64, `scale` included."""
        method = self.method
        if not isinstance(method, LinearMethod):
            return module_weights(self.recipe, module) * self.recipe.scale
        return method.coefficients(module_weights(self.recipe, module), self.recipe.method, module) * self.recipe.scale

    def merge(self, module: str) -> list[Merged]:
        """Return the merged delta of every matrix of a module: low rank, or row blocks of a dense one."""
        stack = self.prepared.read(module)
        if isinstance(self.method, LinearMethod) and self.recipe.space_name != "factors":
            c = self.coefficients(module).tolist()
            return [LowRank.concatenate(f.deltas, [x * s for x, s in zip(c, f.scalings, strict=True)]) for f in stack]
        frames = [SPACES[self.recipe.space_name].frame(f.deltas, f.scalings) for f in stack]
        statistics = self._local(module, frames)
        return [self._merge_frame(module, i, frame, statistics) for i, frame in enumerate(frames)]

    def _merge_frame(self, module: str, index: int, frame: Frame, statistics: Mapping[str, tuple[Tensor, ...]]) -> Merged:
        merged = []
        for array in frame.arrays:
            block = self._blocks(module, index, array, statistics[array.name])
            merged.append(RowBlocks(array.shape, self._rows(block), frame.dtype))
        lifted = frame.lift(merged)
        return lifted if isinstance(self.method, LinearMethod) else lifted.scaled(self.recipe.scale)

    def _rows(self, block: Callable[[int, int], Block]) -> Callable[[int, int], Tensor]:
        method, params = self.method, self.recipe.method

        def rows(start: int, stop: int) -> Tensor:
            here = block(start, stop)
            if isinstance(method, LinearMethod):
                return method.combine(here, here.weights)
            return method.combine(here, params)

        return rows

    def _blocks(self, module: str, index: int, array: Array, statistics: tuple[Tensor, ...]) -> Callable[[int, int], Block]:
        key = Key(self.recipe.seed)
        keys = tuple(key.child(a.name, module, str(index), array.name) for a in self.recipe.adapters)
        linear = isinstance(self.method, LinearMethod)
        weights = array.emphasis(self.coefficients(module) if linear else module_weights(self.recipe, module))
        return lambda start, stop: Block(array.rows(start, stop), weights, start, keys, statistics)

    def _local(self, module: str, frames: Sequence[Frame]) -> dict[str, tuple[Tensor, ...]]:
        """Return each array's statistics, as far as surveys are done: the model's as given, the module's computed now."""
        found: dict[str, tuple[Tensor, ...]] = {array.name: () for array in frames[0].arrays}
        # shorter than the surveys while a later one of them is being made
        for survey, over_model in zip(surveys_of(self.recipe), self.statistics, strict=False):
            for name, earlier in found.items():
                value = (
                    over_model[name] if over_model is not None else self._survey_module(module, frames, name, survey, earlier)
                )
                found[name] = (*earlier, value)
        return found

    def _survey_module(
        self, module: str, frames: Sequence[Frame], name: str, survey: Survey, earlier: tuple[Tensor, ...]
    ) -> Tensor:
        reduction = survey.start(len(self.recipe.adapters))
        while True:
            for index, frame in enumerate(frames):
                for array in frame.arrays:
                    if array.name == name:
                        self._observe(reduction, module, index, array, earlier)
            if reduction.end_pass():
                return reduction.values

    def _observe(self, reduction: Reduction, module: str, index: int, array: Array, earlier: tuple[Tensor, ...]) -> None:
        block = self._blocks(module, index, array, earlier)
        for start, stop in block_ranges(*array.shape):
            reduction.observe(block(start, stop))

    def observe(self, module: str, reductions: Mapping[str, Reduction]) -> None:
        """Show one module's coordinates to reductions over the whole model, one per array name."""
        stack = self.prepared.read(module)
        frames = [SPACES[self.recipe.space_name].frame(f.deltas, f.scalings) for f in stack]
        statistics = self._local(module, frames)
        for index, frame in enumerate(frames):
            for array in frame.arrays:
                self._observe(reductions[array.name], module, index, array, statistics[array.name])


def surveys_of(recipe: Recipe) -> tuple[Survey, ...]:
    """Return the surveys of a recipe's method."""
    method = METHODS[recipe.method_name]
    return method.surveys(recipe.method) if isinstance(method, ElementwiseMethod) else ()
