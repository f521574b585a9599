"""`Mixture`: base plus adapters in one live model, with coefficients as data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from plait.adapters.adapter import Adapter, with_folder
from plait.adapters.lowrank import LowRank
from plait.adapters.names import layer_key
from plait.adapters.writing import output_dtype
from plait.errors import PlanError, TaskError, collect, did_you_mean
from plait.hub.download import resolve_model
from plait.hub.pretrained import Processors
from plait.merging.engine import MergedModule
from plait.merging.heads import same_full_tensors
from plait.mixture.arrangement import Arrangement
from plait.mixture.coefficients import Axes, Coefficients, CoefficientState, Granularity, span
from plait.mixture.columns import Columns, layers_of
from plait.mixture.deltas import AdapterDelta, low_rank_only, merged_deltas
from plait.mixture.factors import LearnedFactors
from plait.mixture.fitting import fitting_full_tensors, fitting_module, fitting_modules
from plait.mixture.layers import ParameterLayer, adapted
from plait.mixture.loading import load_base_model
from plait.mixture.modules import ModuleIndex, TargetModule
from plait.mixture.placing import PlacedMerge
from plait.mixture.saving import save_deltas
from plait.mixture.stack import Stack
from plait.mixture.swaps import FullTensorSet, Swap, dense_swaps, full_swaps
from plait.spaces.base import MergedMatrix

_ACTING: WeakKeyDictionary[nn.Module, Mixture] = WeakKeyDictionary()  # model → whose block is entered


class Mixture:
    """A base model with adapters on it, any of them active with any strength, and merge results in their place.

    y = W x + (x Aᵀ ⊙ λ) Bᵀ, all adapters' factors side by side: two small products per layer for any number of adapters, no
    matrix of W's size, and a change of strength is a change of λ. λ is float32; factors have the base's dtype. Gradients reach
    λ, never the base, which is frozen and in evaluation mode (no dropout).

    Outside its context managers the model is the bare base: no hook, no changed tensor. They nest; the inner one replaces
    the outer. Several mixtures may share a model, one at a time. Not safe for several threads at once.

        mixture = Mixture.load("org/base", adapters)
        with mixture.active({"intent": 0.7, "langid": 0.3}, heads="intent") as model:
            model.generate(...)

    Args:
        model: the base, loaded with any `device_map`, dtype or quantization; it is put into evaluation mode and frozen.
        adapters: with distinct names.
        tokenizer: kept for those who need it.
        factors: `stored`: as trained; `canonical`: balanced singular directions of every adapter's delta, which coefficients
            per direction need, since stored factors are only one of many that mean the same delta.

    Attributes:
        model: the base.
        tokenizer: its tokenizer.
        processors: what makes its inputs of images and sounds; None where it was not loaded from files.
        names: of the adapters.
        targets: paths of the target modules in the adapters, in the order of Λ per module.
        axes: what the entries of Λ mean; modules by their paths in the model.

    Raises:
        AdapterError: an adapter holds what a live model does not cover; all of them are listed.
        PlanError: adapters that do not fit the model, all reasons listed; or another mixture acts on it right now.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[Adapter],
        tokenizer: Any = None,
        *,
        factors: Literal["stored", "canonical"] = "stored",
    ) -> None:
        _check_free(model, None)
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.tokenizer = tokenizer
        self.processors: Processors | None = None
        self._adapters = tuple(adapters)
        self.names = tuple(a.name for a in adapters)
        if len(set(self.names)) < len(self.names):
            raise PlanError(f"adapters need distinct names; these are {', '.join(self.names)}.")
        self._factors = factors
        self._index = ModuleIndex(model)
        self._now: Arrangement | None = None  # what acts
        modules = fitting_modules(adapters, self._index)
        self.targets = tuple(modules)
        layers = layers_of(t.path for t in modules.values())
        self._state = CoefficientState(Coefficients(torch.zeros(len(self.names)), "task"))
        self._adapted = [
            adapted(
                target, self._stack(target, path, adapters), self._state, module=k, layer=layers.index(layer_key(target.path))
            )
            for k, (path, target) in enumerate(modules.items())
        ]
        self._heads = fitting_full_tensors(adapters, self._index)
        self.axes = Axes(
            self.names,
            tuple(str(key or "") for key in layers),
            tuple(t.path for t in modules.values()),
            tuple(a.stack.rank for a in self._adapted),
        )

    @classmethod
    def load(
        cls,
        base: str | Path,
        adapters: Sequence[Adapter],
        *,
        dtype: str = "auto",
        device_map: Any = None,
        trust_remote_code: bool = False,
        factors: Literal["stored", "canonical"] = "stored",
    ) -> Mixture:
        """Load the base with transformers, and stack the adapters on it.

        Args:
            base: a folder, or `org/repo[@revision][/subfolder]`.
            adapters: opened; their `task_type` decides the class of model.
            dtype: of the base, as transformers takes it; `auto` is the checkpoint's.
            device_map: as transformers takes it; needs accelerate.
            trust_remote_code: let transformers run code from the folder of the weights.
            factors: see the class.

        Raises:
            PlaitError: transformers is missing; otherwise as the class and `load_base_model`.
        """
        model, tokenizer = load_base_model(
            base, adapters, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
        )
        loaded = cls(model, adapters, tokenizer, factors=factors)
        loaded.processors = Processors(resolve_model(str(base)).folder, trust_remote_code=trust_remote_code)
        return loaded

    def processor(self, kind: Literal["image", "audio"], *, chats: bool = False) -> Any:
        """Return what makes the base's inputs of images, or of sounds, as transformers has it; loaded once.

        Args:
            kind: of the files.
            chats: what makes those of chats with such, its tokenizer included.

        Raises:
            TaskError: the base has none, it cannot be loaded, or the base was not loaded from files.
            MissingPackageError: what decodes such files is not installed.
        """
        if self.processors is None:
            raise TaskError(f"the base is in memory alone, without the files that say how it reads {kind} files.")
        return self.processors.find(kind, chats=chats)

    @contextmanager
    def active(self, weights: Mapping[str, float] | None, *, heads: str | bool = True) -> Iterator[nn.Module]:
        """Make exactly these adapters act.

        Args:
            weights: adapter → weight, 1.0 being as trained; empty or None for the bare base.
            heads: whose full tensors (heads, trained token rows and biases) act: True for those of the active adapter, False
                for none, a name for those of this adapter, active or not.

        Raises:
            PlanError: an unknown name, a weight that is not finite, or several active adapters with heads and no choice.
        """
        given = dict(weights or {})
        problems = [self._unknown(name) for name in given if name not in self.names]
        problems += [
            f"the weight of {n!r} is {w!r}; it must be a finite number." for n, w in given.items() if not math.isfinite(w)
        ]
        collect(PlanError, problems, "these adapters cannot be made active")
        row = [float(given.get(name, 0.0)) for name in self.names]
        swaps = self._swaps(self._own_heads(row) if heads is True else heads or None)
        first, last = span(row)
        now = Coefficients(torch.tensor(row), "task", first, last)
        with self._suspended(), self._acting(Arrangement(self._adapted if last else (), swaps), now):
            yield self.model

    @contextmanager
    def mixed(
        self, coefficients: Tensor, granularity: Granularity = "task", *, heads: str | None = None
    ) -> Iterator[nn.Module]:
        """Make all adapters act with Λ, which gradients reach; `set_coefficients` exchanges it while this lasts.

        With gradient checkpointing, call `backward` within the block: what is computed again is computed with what acts then.

        Args:
            coefficients: float32 (or float64); per task (T,), layer (L, T), module (K, T) or direction (K, max R): `axes` names
                them. The tensor itself is used: writing into it is seen by the next forward pass.
            granularity: the axes of the entries.
            heads: whose full tensors act.

        Raises:
            PlanError: a wrong shape or dtype, or an unknown name.
        """
        checked = self._checked(coefficients, granularity)
        with self._suspended(), self._acting(Arrangement(self._adapted, self._swaps(heads)), checked):
            yield self.model

    @contextmanager
    def candidates(self, rows: Tensor, granularity: Granularity = "task", *, heads: str | None = None) -> Iterator[nn.Module]:
        """Make all adapters act, with coefficients of its own for every row of the batch.

        To score P candidates in one forward pass, repeat the batch P times and give each copy its candidate's coefficients.

        Args:
            rows: (batch, *shape of Λ), see `mixed`. Layers whose input has a multiple of `batch` rows (beams, flattened
                tokens) take it that each row became as many neighboring ones.
            granularity: the axes of the entries.
            heads: whose full tensors act, for all rows.

        Raises:
            PlanError: as `mixed`; or an adapter is on a fused parameter, whose module mixes the rows of a batch.
        """
        checked = self._checked(rows, granularity, per_row=True)
        fused = [a.target.path for a in self._adapted if isinstance(a, ParameterLayer)]
        if fused:
            raise PlanError(
                f"{fused[0]!r} is a fused parameter, shared by all rows of a batch; evaluate candidates one by one."
            )
        with self._suspended(), self._acting(Arrangement(self._adapted, self._swaps(heads)), checked):
            yield self.model

    def placed(self, merged: Mapping[str, Sequence[MergedMatrix]] | Iterable[MergedModule]) -> PlacedMerge:
        """Return a merge result on the modules of this model, for `attached`: to act several times, it is prepared once.

        Args:
            merged: as `attached` takes it.

        Raises:
            PlanError: a target that the model does not have, or another shape.
        """
        with self._suspended():  # DoRA reads the base's weights
            return PlacedMerge.of(merged, self._index)

    @contextmanager
    def attached(
        self,
        merged: PlacedMerge | Mapping[str, Sequence[MergedMatrix]] | Iterable[MergedModule],
        heads: str | FullTensorSet | None = None,
    ) -> Iterator[nn.Module]:
        """Make a merge result act, and nothing else.

        Low-rank results act as the adapter would that `plait merge` writes of them, bit for bit in float32. A dense one acts
        as the baked model: W + ΔW, rounded once to the base's dtype, held in addition to W as long as this lasts.

        Args:
            merged: target → one delta per slice, or merged modules as the engine yields them; or what `placed` made of them.
            heads: whose full tensors act, or the full tensors themselves (averaged heads belong to no adapter).

        Raises:
            PlanError: a target that the model does not have, another shape, or a weight that cannot be replaced; or the merge
                result was placed on another mixture.
        """
        swaps = self._swaps(heads)
        found = merged if isinstance(merged, PlacedMerge) else self.placed(merged)
        if found.index is not self._index:
            raise PlanError("this merge result was placed on another Mixture; place it on this one.")
        with self._suspended():
            for target, delta in found.dense:
                swaps += dense_swaps(target, delta)
            with self._acting(Arrangement(found.layers, swaps), self._state.now):
                yield self.model

    def module(self, target: str) -> nn.Module:
        """Return the module that a target of the adapters names, whose inputs the delta reads.

        Raises:
            PlanError: the model has none; or it is a fused parameter, whose inputs are its module's own affair.
        """
        try:
            found = self._index.find(target)
        except ValueError as error:
            raise PlanError(str(error)) from None
        if not found.layout.reads_vectors:
            raise PlanError(
                f"{target!r} is of kind {found.layout.kind}, whose inputs cannot be collected here; use a method that needs no "
                "second moments, such as dc_merge."
            )
        return found.module

    def learned(
        self, merged: Mapping[str, Sequence[MergedMatrix]] | Iterable[MergedModule], *, rank: int | None = None
    ) -> LearnedFactors:
        """Return the factors of a low-rank merge result as parameters, for `learning`.

        Args:
            merged: as `attached` takes it; low-rank.
            rank: what is above is truncated; None keeps every rank.

        Raises:
            PlanError: a dense delta, DoRA, a target that the model does not have, or another shape.
        """
        deltas: dict[str, tuple[TargetModule, AdapterDelta]] = {}
        for target, delta in merged_deltas(merged):
            only = low_rank_only(target, delta, "learned")
            deltas[target] = (fitting_module(target, only, self._index), only)
        return LearnedFactors(deltas, rank)

    @contextmanager
    def learning(self, factors: LearnedFactors, *, heads: str | FullTensorSet | None = None) -> Iterator[nn.Module]:
        """Make learned factors act, and nothing else; gradients reach them.

        Args:
            factors: of `learned`; call their `refresh` after every change, before the forward pass.
            heads: whose full tensors act.

        Raises:
            PlanError: an unknown name.
        """
        swaps = self._swaps(heads)
        with self._suspended(), self._acting(Arrangement(factors.layers, swaps), self._state.now):
            yield self.model

    def with_folder(self, name: str) -> str:
        """Return a name, and where the adapter of that name is."""
        return with_folder(name, self._adapters)

    def columns(
        self,
        columns: Mapping[str, Mapping[str, Sequence[MergedMatrix]] | Iterable[MergedModule]],
        *,
        factors: Literal["stored", "canonical"] = "stored",
    ) -> Columns:
        """Put low-rank deltas side by side, for `combined`: adapters as a recipe prepares them, or merge results.

        Args:
            columns: name → deltas, as `attached` takes them; low-rank.
            factors: `canonical` for coefficients per direction, see the class.

        Raises:
            PlanError: a dense delta, DoRA, a target that the model does not have, or another shape.
        """
        return Columns.of(columns, self._index, canonical=factors == "canonical")

    @contextmanager
    def combined(
        self,
        columns: Columns,
        coefficients: Tensor,
        granularity: Granularity = "task",
        *,
        heads: str | FullTensorSet | None = None,
    ) -> Iterator[nn.Module]:
        """Make columns act with Λ, and nothing else; gradients reach Λ. The same as `mixed`, with other deltas.

        Args:
            columns: of `columns`, whose `axes` name the entries of Λ.
            coefficients: float32 (or float64), see `mixed`.
            granularity: the axes of the entries.
            heads: whose full tensors act.

        Raises:
            PlanError: a wrong shape or dtype, or an unknown name.
        """
        swaps = self._swaps(heads)
        columns.state.now = Coefficients.of(coefficients, granularity, columns.axes)
        with self._suspended(), self._acting(Arrangement(columns.layers, swaps), self._state.now):
            yield self.model

    def merged(self, coefficients: Tensor, granularity: Granularity = "task") -> dict[str, tuple[LowRank, ...]]:
        """Return what acts with Λ as deltas: target → one `LowRank` per matrix, of the base's dtype, on the processor.

        `attached` and `save` take them. Exact in the factors that act.

        Args:
            coefficients: see `mixed`.
            granularity: the axes of the entries.

        Raises:
            PlanError: a wrong shape or dtype; DoRA or lora_bias, which are not low-rank deltas.
        """
        checked = self._checked(coefficients.detach(), granularity)
        self._check_low_rank("low-rank deltas; merge with a recipe instead")
        layers = layers_of(self.axes.modules)
        found = {}
        for k, layer in enumerate(self._adapted):
            share = checked.share(k, layers.index(layer_key(layer.target.path)))
            found[layer.target.path] = layer.stack.weighted(share.cpu(), per_rank=granularity == "direction")
        return found

    def save(self, deltas: Mapping[str, Sequence[LowRank]], folder: str | Path, *, dtype: str = "float32") -> Path:
        """Write deltas as an adapter that PEFT loads, in the place of these adapters; no full tensor (head) is written.

        Args:
            deltas: of `merged`, or of learned factors (`LearnedFactors.deltas`).
            folder: to be made.
            dtype: `float32`, `bfloat16` or `float16`.

        Raises:
            PlanError: a target that the model does not have, or nothing to write; or a value overflows the dtype.
            OutputError: the folder exists, or cannot be written.
        """
        if not deltas or not self._adapters:
            raise PlanError("there are no deltas, or no adapters whose place they could take.")
        try:
            layouts = {path: self._index.find(path).layout for path in deltas}
        except ValueError as error:
            raise PlanError(str(error)) from None
        save_deltas(deltas, Path(folder), layouts, self._adapters, output_dtype(dtype))
        return Path(folder)

    @property
    def coefficients(self) -> Tensor:
        """Λ as it is now: the tensor that was given, not a copy."""
        return self._state.now.values

    @property
    def granularity(self) -> Granularity:
        """The axes of the entries."""
        return self._state.now.granularity

    def set_coefficients(self, coefficients: Tensor, granularity: Granularity | None = None) -> None:
        """Exchange Λ within `active`, `mixed` or `candidates`; all adapters act with it. Costs a check of its shape.

        Args:
            coefficients: see `mixed`.
            granularity: the axes of the entries; as it was when None.

        Raises:
            PlanError: a wrong shape or dtype, or nothing is active.
        """
        if self._now is None or self._now.layers is not self._adapted:
            raise PlanError(
                "coefficients act within `mixed`, `candidates`, or `active` with an adapter; enter one of them first."
            )
        self._state.now = self._checked(coefficients, granularity or self.granularity, per_row=self._state.now.per_row)

    def _checked(self, values: Tensor, granularity: Granularity, *, per_row: bool = False) -> Coefficients:
        if granularity == "direction":
            if self._factors != "canonical":
                raise PlanError("coefficients per direction need canonical factors: Mixture(..., factors='canonical').")
            self._check_low_rank("directions; use coefficients per module")
        return Coefficients.of(values, granularity, self.axes, per_row=per_row)

    def _check_low_rank(self, wanted: str) -> None:
        nonlinear = [a.target.path for a in self._adapted if a.stack.gains is not None or a.stack.biases is not None]
        if nonlinear:
            raise PlanError(f"{nonlinear[0]!r} has DoRA or lora_bias, which are not {wanted}.")

    @contextmanager
    def _suspended(self) -> Iterator[None]:
        """Take off what acts now, and put it back in the end."""
        _check_free(self.model, self)
        outer, state = self._now, self._state.now
        if outer is not None:
            outer.detach()
        self._now = None
        try:
            yield
        finally:
            self._now, self._state.now = outer, state
            if outer is not None:
                outer.attach()

    @contextmanager
    def _acting(self, arrangement: Arrangement, coefficients: Coefficients) -> Iterator[None]:
        arrangement.attach()
        self._now, self._state.now = arrangement, coefficients
        outer = _ACTING.get(self.model)
        _ACTING[self.model] = self
        try:
            yield
        finally:
            arrangement.detach()
            if outer is None:
                del _ACTING[self.model]

    def _own_heads(self, row: Sequence[float]) -> str | None:
        owners = [name for name, weight in zip(self.names, row, strict=True) if weight != 0 and name in self._heads]
        if len(owners) > 1 and not same_full_tensors([a for a in self._adapters if a.name in owners]):
            raise PlanError(
                f"{', '.join(owners)} each bring full tensors (heads, token rows, biases) of their own; "
                f"choose whose are used: heads={owners[0]!r}, or heads=False for the base's."
            )
        return owners[0] if owners else None

    def _swaps(self, heads: str | FullTensorSet | None) -> list[Swap]:
        if isinstance(heads, FullTensorSet):
            try:
                return full_swaps(heads, self._index)
            except ValueError as error:
                raise PlanError(str(error)) from None
        if heads is not None and heads not in self.names:
            raise PlanError(self._unknown(heads))
        return list(self._heads.get(heads, ())) if heads is not None else []

    def _unknown(self, name: str) -> str:
        return f"no adapter is named {name!r}; there are {', '.join(self.names) or 'none'}.{did_you_mean(name, self.names)}"

    def _stack(self, target: TargetModule, path: str, adapters: Sequence[Adapter]) -> Stack:
        dtype = torch.float64 if target.home is not None and target.home[1] == torch.float64 else torch.float32
        deltas = [AdapterDelta.read(a, path, dtype) if path in a.targets else None for a in adapters]
        if self._factors == "canonical":
            deltas = [None if d is None else d.canonical() for d in deltas]
        return Stack.of(target, deltas)


def _check_free(model: nn.Module, mixture: Mixture | None) -> None:
    """Refuse to act on, or to read, a model that another mixture has changed for now: the two would add up."""
    if _ACTING.get(model, mixture) is not mixture:
        raise PlanError(
            "another Mixture acts on this model right now. Leave its `with` block first, or put all adapters into one Mixture."
        )
