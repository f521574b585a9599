"""One target module through the stages of a method: factors → merged delta. Pure; this is where surveys and spaces meet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.errors import PlanError
from plait.linalg.blocks import CACHED_ELEMENTS, RowBlocks, block_ranges
from plait.linalg.keyed import Key
from plait.merging.kept import FRAME_BYTES, KeptResults
from plait.merging.module_notes import ModuleNotes
from plait.merging.moments import Moments
from plait.merging.prepared import MatrixFactors, PreparedAdapters
from plait.merging.weighting import module_weights
from plait.methods import METHODS
from plait.methods.auto import values_to_find
from plait.recipes.schema import Recipe
from plait.recipes.writing import recipe_json
from plait.spaces import SPACES
from plait.spaces.base import Array, Frame, MergedMatrix
from plait.stages.base import Block, DeltaCombine, EntryCombine, GramCombine, LinearCombine, Reduction, Site, Survey
from plait.stages.pipeline import Pipeline
from plait.stages.solve import IndefiniteMomentsError

_AFTERWARD = ("scale", "base_model", "heads", "output", "tasks", "eval")  # keys of a recipe that come after its merge
Statistics = tuple[Mapping[str, Tensor] | None, ...]  # per survey: array name → values; None when it is per module


@dataclass(frozen=True)
class Combiner:
    """Merges target modules, one at a time and in any order.

    Attributes:
        recipe: what was asked for.
        prepared: the factors.
        statistics: results of the surveys over the complete model.
        gram: ⟨ΔWᵢ, ΔWⱼ⟩ over the complete model, (T, T) float64, where coefficients depend on it.
        moments: second moments of the modules' inputs, where the recipe names them.
        notes: notes of stages on modules so far.
        kept: results that merges of the same adapters share; a module whose result is there is not read, and has no notes.
        frames: coordinates of modules that this merge has made, as far as there is room; surveys and passes ask for them again.
        small: what is kept of the others, from which their arrays are had.
    """

    recipe: Recipe
    prepared: PreparedAdapters
    statistics: Statistics = ()
    gram: Tensor | None = None
    moments: Moments | None = None
    notes: ModuleNotes = field(default_factory=ModuleNotes)
    kept: KeptResults | None = None
    frames: KeptResults = field(default_factory=lambda: KeptResults(FRAME_BYTES))
    small: KeptResults = field(default_factory=lambda: KeptResults(FRAME_BYTES))

    @cached_property
    def pipeline(self) -> Pipeline:
        """The stages of the recipe's method."""
        return pipeline_of(self.recipe)

    def coefficients(self, module: str) -> Tensor:
        """Return what each adapter's delta is multiplied by under a linear method, (T,) float64, `scale` included.

        Under any other method: its weight times `scale`, which is what biases are merged with.
        """
        return self._shares(module) * self.recipe.factor

    def _shares(self, module: str) -> Tensor:
        weights, combine = self._weights(module), self.pipeline.combine
        if isinstance(combine, LinearCombine):
            return combine.coefficients(weights, module)
        if isinstance(combine, GramCombine):
            gram = self.gram if combine.scope == "model" else self.module_gram(module)
            if gram is None:
                raise AssertionError(f"{combine} needs inner products over the model, which were not taken")
            return combine.coefficients(weights, gram)
        return weights

    def _weights(self, module: str) -> Tensor:
        return torch.tensor(module_weights(self.recipe, module, self.prepared.towers), dtype=torch.float64)

    def module_gram(self, module: str) -> Tensor:
        """Return ⟨ΔWᵢ, ΔWⱼ⟩ of one module, (T, T) float64."""
        sites = self._sites(module, self.prepared.read(module))
        return sum((_gram(site.deltas) for site in sites), torch.zeros((), dtype=torch.float64))

    def merge(self, module: str) -> list[MergedMatrix]:
        """Return the merged delta of every matrix of a module: low rank, or row blocks of a dense one."""
        if self.pipeline.is_linear and self.recipe.space_name != "factors":
            c = self.coefficients(module).tolist()
            scaled = [(f.deltas, [x * s for x, s in zip(c, f.scalings, strict=True)]) for f in self.read(module)]
            return [LowRank.concatenate(deltas, shares) for deltas, shares in scaled]
        return [part.scaled(self.recipe.factor) for part in self.unscaled(module)]

    def unscaled(self, module: str) -> list[MergedMatrix]:
        """Return what `merge` returns of a method that is not linear, before `scale`."""
        if self.kept is None:
            return self._unscaled(module)
        return self.kept.result(self.settings(module), module, lambda: self._unscaled(module), _bytes)

    def settings(self, module: str) -> str:
        """Return all that `unscaled` depends on besides the adapters and the module."""
        return f"{self.without_weights} {self._all_weights if self.pipeline.weighs_model else self._weights(module).tolist()}"

    @cached_property
    def _all_weights(self) -> str:
        data = recipe_json(self.recipe)
        return json.dumps([data["weights"], [adapter["weight"] for adapter in data["adapters"]]], sort_keys=True)

    @cached_property
    def without_weights(self) -> str:
        """All that a merge depends on besides the adapters, their weights and `scale`, which comes last."""
        data = {k: v for k, v in recipe_json(self.recipe).items() if k not in (*_AFTERWARD, "weights")}
        data["adapters"] = [{k: v for k, v in adapter.items() if k != "weight"} for adapter in data["adapters"]]
        return f"{self.prepared.dtype} {json.dumps(data, sort_keys=True)}"

    def _unscaled(self, module: str) -> list[MergedMatrix]:
        """Return what `merge` returns, before `scale`."""
        pipeline = self.pipeline
        by_entry = pipeline.needs_coordinates(self.recipe.space_name)
        sites = [] if by_entry and not pipeline.post else self._sites(module, self.read(module))
        if by_entry:
            frames = self._coordinates(module)
            statistics = self._local(module, [frame.arrays for frame in frames])
            merged = [self._merge_frame(module, i, frame, statistics) for i, frame in enumerate(frames)]
        elif isinstance(pipeline.combine, DeltaCombine):
            merged = [self._combine(pipeline.combine, site, i if len(sites) > 1 else None) for i, site in enumerate(sites)]
        else:
            c = self._shares(module).tolist()
            merged = [LowRank.concatenate(site.deltas, c) for site in sites]
        return [self._finish(part, site) for part, site in zip(merged, sites, strict=True)] if sites else merged

    def _coordinates(self, module: str) -> list[Frame]:
        """Return the coordinates of every matrix of a module."""

        def frames() -> list[Frame]:
            stack, space = self.read(module), SPACES[self.recipe.space_name]
            if space.name == "factors":  # its coordinates are the unscaled factors themselves
                return [space.frame(f.deltas, f.scalings) for f in stack]
            return [space.frame(site.deltas, [1.0] * len(site.deltas)) for site in self._sites(module, stack)]

        def size(found: Sequence[Frame]) -> int | None:
            return _total([frame.bytes for frame in found])

        if self.kept is None or self.pipeline.on_deltas:  # which depend on parameters, weights and the seed
            return self.frames.result("", module, frames, size) if self._asks_again else frames()
        transforms = json.dumps([t.model_dump(mode="json") for t in self.recipe.transforms], sort_keys=True)
        settings = f"{self.recipe.space_name} {self.prepared.dtype} {transforms}"
        return self.kept.result(settings, module, frames, size)

    @cached_property
    def _asks_again(self) -> bool:
        """Whether there are passes over the model before the one that merges."""
        return self.pipeline.asks_model or self.recipe.output.energy is not None

    def _arrays(self, module: str) -> list[tuple[Array, ...]]:
        """Return the arrays of every matrix of a module: of its coordinates, or from the few values that were kept of these."""
        small: list[tuple[Tensor, ...]] | None = self.small.find("", module)
        if small is None:
            frames = self._coordinates(module)
            if self.kept is None and self.frames.find("", module) is None and frames[0].small is not None:
                found = [frame.small or () for frame in frames]
                self.small.result("", module, lambda: found, lambda few: sum(x.nbytes for parts in few for x in parts))
            return [frame.arrays for frame in frames]
        sites = cache(lambda: self._sites(module, self.read(module)))
        space = SPACES[self.recipe.space_name]
        return [space.arrays_again(few, lambda i=i: sites()[i].deltas) for i, few in enumerate(small)]  # type: ignore[misc]

    def read(self, module: str) -> list[MatrixFactors]:
        """Return a module's factors, with a remark where they are computed with otherwise than those of other modules."""
        stack = self.prepared.read(module)
        for extreme in self.prepared.extremes.get(module, ()):
            self.notes.add(module, extreme.note)
        return stack

    def _combine(self, combine: DeltaCombine, site: Site, matrix: int | None) -> MergedMatrix:
        try:
            return combine.combine(site)
        except IndefiniteMomentsError as error:
            files = [] if self.moments is None else self.moments.indefinite_files(site.module, site.shape[1], matrix)
            raise PlanError(f"{''.join(f'{path}: ' for path in files)}{error}") from None

    def _finish(self, merged: MergedMatrix, site: Site) -> MergedMatrix:
        for stage in self.pipeline.post:
            if not isinstance(merged, LowRank):
                raise AssertionError(f"{stage} needs a low-rank delta")
            merged = stage.apply(merged, site)
        return merged

    def _sites(self, module: str, stack: Sequence[MatrixFactors]) -> list[Site]:
        """Return what stages on deltas see of every matrix of a module, with the deltas after those that run before."""
        weights = self._weights(module)
        key = Key(self.recipe.seed).child("stages", module)
        sites = []
        for index, factors in enumerate(stack):
            deltas = tuple(factors.scaled())
            moments = None
            if self.moments is not None and self.pipeline.needs_moments:
                moments = self.moments.of(module, deltas[0].shape[1], index if len(stack) > 1 else None)
            site = Site(module, deltas, weights, key.child(str(index)), moments, deltas, partial(self.notes.add, module))
            for stage in self.pipeline.on_deltas:
                site = replace(site, deltas=tuple(stage.apply(site)))
            sites.append(site)
        return sites

    def _merge_frame(self, module: str, index: int, frame: Frame, statistics: Mapping[str, tuple[Tensor, ...]]) -> MergedMatrix:
        merged = []
        for array in frame.arrays:
            block = self._blocks(module, index, array, statistics[array.name])
            rows = self._weighed_rows(module, index, array, frame.dtype, block) or self._rows(block)
            merged.append(RowBlocks(array.shape, rows, frame.dtype, array.range_hint))
        return frame.lift(merged)

    def _rows(self, block: Callable[[int, int], Block]) -> Callable[[int, int], Tensor]:
        def rows(start: int, stop: int) -> Tensor:
            merged = [self.pipeline.combine_block(piece) for piece in _pieces(block(start, stop))]
            return merged[0] if len(merged) == 1 else torch.cat(merged)  # as they are: `RowBlocks` checks shape and dtype

        return rows

    def _weighed_rows(
        self, module: str, index: int, array: Array, dtype: torch.dtype, block: Callable[[int, int], Block]
    ) -> Callable[[int, int], Tensor] | None:
        """Return what `_rows` does, from what is kept for merges at other weights; None where nothing is, or it has no room."""
        store, settings = None if self.kept is None else self.kept.unweighted, f"{dtype} {self.without_weights}"
        most = array.shape[0] * array.shape[1] * (len(self.recipe.adapters) * dtype.itemsize + 1)
        place = f"{module} {index} {array.name}"
        if store is None or not self.pipeline.weighs_last or not store.has_room(settings, place, most):
            return None

        def made() -> tuple[Tensor, ...]:
            whole: tuple[Tensor, ...] = ()
            for piece in (piece for rows in block_ranges(*array.shape) for piece in _pieces(block(*rows))):
                parts, end = self.pipeline.unweighted(piece), piece.start + piece.x.shape[-2]
                whole = whole or tuple(x.new_empty(*x.shape[:-2], *array.shape) for x in parts)
                for all_rows, rows in zip(whole, parts, strict=True):
                    all_rows[..., piece.start : end, :] = rows
            return whole

        found = store.result(settings, place, made, lambda parts: sum(x.nbytes for x in parts))
        weights = block(0, 0).weights
        return lambda start, stop: self.pipeline.weigh([x[..., start:stop, :] for x in found], weights)

    def _blocks(self, module: str, index: int, array: Array, statistics: tuple[Tensor, ...]) -> Callable[..., Block]:
        key = Key(self.recipe.seed)
        keys = tuple(key.child(a.name, module, str(index), array.name) for a in self.recipe.adapters)
        entrywise = isinstance(self.pipeline.combine, EntryCombine)
        weights = array.weight_transform(self._weights(module) if entrywise else self._shares(module))
        return lambda start, stop, stride=1: Block(array.rows(start, stop, stride), weights, start, keys, statistics)

    def _local(self, module: str, matrices: Sequence[tuple[Array, ...]]) -> dict[str, tuple[Tensor, ...]]:
        """Return each array's statistics, as far as surveys are done: the model's as given, the module's computed now."""
        found: dict[str, tuple[Tensor, ...]] = {array.name: () for array in matrices[0]}
        # shorter than the surveys while a later one of them is being made
        for survey, over_model in zip(self.pipeline.surveys(), self.statistics, strict=False):
            for name, earlier in found.items():
                value = None if over_model is None else over_model[name]
                found[name] = (*earlier, self._answer(module, matrices, name, survey, earlier) if value is None else value)
        return found

    def _answer(
        self, module: str, matrices: Sequence[tuple[Array, ...]], name: str, survey: Survey, earlier: tuple[Tensor, ...]
    ) -> Tensor:
        """Return what a survey finds in one module; merges that share results ask once what does not depend on weights."""
        ask = partial(self._survey_module, module, matrices, name, survey, earlier)
        if self.kept is None or survey.weighed:
            return ask()
        in_double = module in self.prepared.extremes
        asked = f"survey {len(earlier)} of {name} {in_double} {self.without_weights}"
        return self.kept.result(asked, module, ask, lambda values: values.nbytes)

    def _survey_module(
        self, module: str, matrices: Sequence[tuple[Array, ...]], name: str, survey: Survey, earlier: tuple[Tensor, ...]
    ) -> Tensor:
        reduction = survey.start(len(self.recipe.adapters))
        while True:
            for index, arrays in enumerate(matrices):
                for array in arrays:
                    if array.name == name:
                        self._observe(reduction, module, index, array, earlier)
            if reduction.end_pass():
                return reduction.values

    def _observe(self, reduction: Reduction, module: str, index: int, array: Array, earlier: tuple[Tensor, ...]) -> None:
        block = self._blocks(module, index, array, earlier)
        stride = getattr(reduction, "stride", 1)
        for start, stop in block_ranges(*array.shape, stride):
            reduction.observe(block(start, stop, stride))

    def observe(self, module: str, reductions: Mapping[str, Reduction]) -> None:
        """Show one module's coordinates to reductions over the complete model, one per array name."""
        matrices = self._arrays(module)
        statistics = self._local(module, matrices)
        for index, arrays in enumerate(matrices):
            for array in arrays:
                self._observe(reductions[array.name], module, index, array, statistics[array.name])


def pipeline_of(recipe: Recipe) -> Pipeline:
    """Return the stages of a recipe's method.

    Raises:
        PlanError: a parameter is still to be found.
    """
    if lacking := values_to_find(recipe.method):
        keys = ", ".join(f"method.{name}" for name in lacking)
        raise PlanError(f"{keys}: 'auto' is found by a merge or a bake with tasks (--tasks, tasks=…); give a number here.")
    return METHODS[recipe.method_name].pipeline(recipe.method)


def _bytes(merged: Sequence[MergedMatrix]) -> int | None:
    """Return the bytes of merged deltas; None where one of them is dense."""
    return _total([m.a.nbytes + m.b.nbytes if isinstance(m, LowRank) else None for m in merged])


def _total(counts: Sequence[int | None]) -> int | None:
    """Return their sum; None where one of them is None."""
    return None if None in counts else sum(count or 0 for count in counts)


def _pieces(block: Block) -> Iterator[Block]:
    """Yield a block as blocks of so few rows that work on single entries stays in the cache."""
    adapters, rows, columns = block.x.shape
    step = max(1, CACHED_ELEMENTS // (adapters * max(1, columns)))
    for i in range(0, rows, step):
        yield block.of(block.x[:, i : i + step], block.statistics, i)


def _gram(deltas: Sequence[LowRank]) -> Tensor:
    """Return ⟨ΔWᵢ, ΔWⱼ⟩, (T, T) float64, from the Gram matrices of the joined factors."""
    b = torch.cat([d.b for d in deltas], dim=1).double()
    a = torch.cat([d.a for d in deltas]).double()
    products = (b.mT @ b) * (a @ a.mT)  # (R, R), one block per pair
    ranks = [d.rank for d in deltas]
    owners = torch.block_diag(*(torch.ones(r, 1, dtype=b.dtype) for r in ranks))  # type: ignore[no-untyped-call]
    gram: Tensor = owners.mT @ products @ owners
    return gram
