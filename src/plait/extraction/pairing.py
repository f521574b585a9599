"""A base model and its full fine-tune, aligned parameter by parameter from their headers. No tensor is read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from plait.adapters.layouts import Conv1D, Embedding, Layout, Linear, Parameter
from plait.adapters.layouts.conv1d import may_be_conv1d
from plait.checkpoints.architecture import Architecture, ArchitectureUnknown, Part
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.checkpoints.files import INPUT_EMBEDDING, OUTPUT_HEAD
from plait.deferred import Tensor, torch
from plait.errors import PlanError, collect, listed, take_all
from plait.libraries.peft import EXPERT_LAYERS, TASK_HEADS, reads_past_adapters
from plait.libraries.transformers.kinds import task_of
from plait.linalg.blocks import RowBlocks
from plait.tensorfiles.header import TensorInfo
from plait.tensorfiles.reader import FLOATS, TensorFile

Role = Literal["expert", "bias", "head", "other"]  # of a parameter that cannot become factors
Form = type[Layout] | Role

_EMBEDDING = re.compile(r"(embed(_tokens|_positions|_in)?|.*_?embeddings?|wte|wpe|shared|relative_attention_bias)")
_EXPERT = re.compile(r"\.experts\.(\d+\.|[^.]+$)")
# Constants that some versions of transformers store and others compute.
_CONSTANT = re.compile(r"(\.|^)(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids|token_type_ids)$")


@dataclass(frozen=True)
class PairedRows:
    """Rows of one tensor in both checkpoints, seen as rows × columns.

    Attributes:
        base: file and name in the base model.
        tuned: file and name in the fine-tune.
        first: the first row.
        count: how many.
        columns: of each.
    """

    base: tuple[TensorFile, str]
    tuned: tuple[TensorFile, str]
    first: int
    count: int
    columns: int

    def delta(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of fine-tune − base, in float32; the difference is taken in float64 where one is."""
        sides = (self.tuned, self.base)
        is_double = "F64" in {file.tensors[name].dtype for file, name in sides}
        at, size = (self.first + start) * self.columns, (stop - start) * self.columns
        tuned, base = (file.values(name, at, size).to(torch.float64 if is_double else torch.float32) for file, name in sides)
        return (tuned - base).to(torch.float32).view(-1, self.columns)


@dataclass(frozen=True)
class Pair:
    """One parameter of the model, in both checkpoints.

    Attributes:
        name: of it.
        form: the layout of the factors that it can become; or what it is, where it cannot be a LoRA: a `head` is kept as it
            is, as PEFT does for its task.
        shape: of it.
        matrices: of each matrix of its stack (experts, groups of a convolution), the rows that are put below each other; a
            tensor of any other shape is one matrix.
        is_transposed: the matrices are ΔWᵀ.
        shares: the module whose embedding it shares the values of; None for a parameter of its own.
    """

    name: str
    form: Form
    shape: tuple[int, ...]
    matrices: tuple[tuple[PairedRows, ...], ...]
    is_transposed: bool = False
    shares: str | None = None

    @property
    def kind(self) -> str:
        """What a record calls it: the layout's kind, but `parameter` for a single matrix that is adapted by its own name."""
        if not isinstance(self.form, type):
            return self.form
        return "parameter" if self.is_parameter and not self.is_experts else self.form.kind

    @property
    def is_parameter(self) -> bool:
        """Whether an adapter names the parameter (`target_parameters`), not the layer that it belongs to."""
        return isinstance(self.form, type) and self.form.names_parameter

    @property
    def is_experts(self) -> bool:
        """Whether it is a stack of fused experts."""
        return self.is_parameter and len(self.shape) == 3

    @property
    def layer(self) -> str:
        """Path of the layer that it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def module(self) -> str:
        """Path of the target: the layer, or the parameter."""
        return self.name if self.is_parameter else self.layer

    @property
    def is_stored(self) -> bool:
        """Whether one tensor of the checkpoints holds it, and nothing else."""
        rows = [part for parts in self.matrices for part in parts]
        same = len({part.tuned[1] for part in rows}) == 1
        return same and sum(part.count * part.columns for part in rows) == math.prod(self.info.shape)

    @property
    def is_outweighed(self) -> bool:
        """Whether it is a grouped convolution and the smallest LoRA there, whose groups all read all channels, is as large."""
        if not isinstance(self.form, type) or self.layout.fits_weight:
            return False
        return sum(math.prod(shape) for shape in self.layout.packed_shapes(1)) >= math.prod(self.shape)

    @property
    def tuned(self) -> tuple[TensorFile, str]:
        """File and name in the fine-tune, of a parameter that is stored as it is."""
        return self.matrices[0][0].tuned

    @property
    def info(self) -> TensorInfo:
        """Return the tensor's entry in the fine-tune's header."""
        file, name = self.tuned
        return file.tensors[name]

    @property
    def layout(self) -> Layout:
        """How factors of it are stored."""
        rows, columns = self.matrix_shape
        d_out, d_in = (columns, rows) if self.is_transposed else (rows, columns)
        if not isinstance(self.form, type):
            raise AssertionError(f"{self.name!r} cannot be a LoRA ({self.form})")
        return self.form.of_weight(d_out, d_in, len(self.matrices), self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of one matrix, as stored."""
        return sum(part.count for part in self.matrices[0]), self.matrices[0][0].columns

    def delta(self, number: int = 0) -> RowBlocks:
        """Return fine-tune − base of one matrix, as stored, read by blocks of rows."""
        return _stacked(self.matrices[number])


def _stacked(parts: tuple[PairedRows, ...]) -> RowBlocks:
    """Return the difference of rows that are put below each other."""

    def block(start: int, stop: int) -> Tensor:
        found, row = [], 0
        for part in parts:
            low, high = max(start, row), min(stop, row + part.count)
            if low < high:
                found.append(part.delta(low - row, high - row))
            row += part.count
        return torch.cat(found)

    return RowBlocks((sum(p.count for p in parts), parts[0].columns), block, torch.float32)


@dataclass(frozen=True)
class Pairing:
    """Two checkpoints, aligned.

    Attributes:
        base: the base model.
        tuned: the fine-tune.
        pairs: every parameter that both have, sorted by name; constants and integers are left out.
        copies: parameters that share the values of one of these, and are not stored.
        constants: what else both have: integers, and constants that are computed as well.
        ties_head: whether the head may be the input embedding, and the model's code could not be asked.
        task: PEFT's task type, as the base model's architecture says; None where it does not decide.
        notes: what could not be known of the names.
    """

    base: BaseCheckpoint
    tuned: BaseCheckpoint
    pairs: tuple[Pair, ...]
    copies: tuple[Pair, ...]
    constants: tuple[Pair, ...]
    ties_head: bool
    task: str | None
    notes: tuple[str, ...]


def pair_checkpoints(base: str, tuned: str) -> Pairing:
    """Open both models and align them.

    Args:
        base: reference of the base model.
        tuned: reference of the fine-tune.

    Raises:
        AddressError: a reference leads nowhere.
        AdapterError: files that are not a checkpoint.
        PlanError: a quantized model, or two models that are not a base and its fine-tune, with everything that does not fit.
    """
    one, two = take_all(PlanError, [partial(BaseCheckpoint.open, text) for text in (base, tuned)], "neither model can be used")
    names = _align(set(one.home), set(two.home))
    _tie(names, one, two)
    both = {name: (b, t) for name, (b, t) in names.items() if b is not None and t is not None}
    problems = [
        *_missing(base, tuned, names),
        *_shapes(base, tuned, {n: (one.info(b).shape, two.info(t).shape) for n, (b, t) in both.items()}),
    ]
    collect(PlanError, problems, f"{tuned} is not a full fine-tune of {base} that a LoRA can be extracted from")
    floats = {n: (b, t) for n, (b, t) in both.items() if not _CONSTANT.search(n) and one.info(b).dtype in FLOATS}
    pairs, copies, notes = _Pairs(one, two, floats).made()
    constants = _Pairs(one, two, {n: both[n] for n in both.keys() - floats.keys()}).as_stored()
    task = task_of(one.config)
    heads = TASK_HEADS.get(task or "", ())
    pairs = [replace(p, form="head") if is_saved(p.layer, heads) else p for p in pairs]
    ties = bool(notes) and not any(OUTPUT_HEAD.fullmatch(p.name) for p in pairs) and one.config.get("tie_word_embeddings", True)
    return Pairing(one, two, tuple(sorted(pairs, key=lambda p: p.name)), copies, constants, bool(ties), task, notes)


def is_saved(layer: str, names: Iterable[str]) -> bool:
    """Return whether `modules_to_save` means a layer, or what it is part of: by the end of its path, as PEFT reads it."""
    return saved_module(layer, names) is not None


def saved_module(layer: str, names: Iterable[str]) -> str | None:
    """Return the outermost module around a layer, or itself, that `modules_to_save` means."""
    words = layer.split(".")
    paths = (".".join(words[: i + 1]) for i in range(len(words)))
    names = tuple(names)
    return next((path for path in paths if path.endswith(names)), None)


class _Pairs:
    """Makes pairs of tensors that both checkpoints have: name → (in the base, in the fine-tune)."""

    def __init__(self, base: BaseCheckpoint, tuned: BaseCheckpoint, names: Mapping[str, tuple[str, str]]) -> None:
        self._base, self._tuned, self._names = base, tuned, names
        # the base's tensor → the fine-tune's; a head that is read from the embedding has a name of its own
        self._own = {
            b: t for name, (b, t) in names.items() if not (OUTPUT_HEAD.fullmatch(name) and not OUTPUT_HEAD.fullmatch(b))
        }

    def made(self) -> tuple[list[Pair], tuple[Pair, ...], tuple[str, ...]]:
        """Return the pairs, copies of embeddings among them, and notes.

        From the model's own code where it can be asked, else from the names in the checkpoint.
        """
        shapes = {b: self._base.info(b).shape for b in self._own}
        try:
            model = Architecture.of(self._base.folder, shapes)
        except ArchitectureUnknown as error:
            note = f"{error}: modules are named as in the checkpoint, which PEFT may not find."
            return [*self.as_stored()], (), (note,)
        known = {n: parts for n, parts in model.parts.items() if all(p.tensor in self._own for p in parts)}
        pairs = [self._of_parts(name, parts, model) for name, parts in known.items()]
        used = {p.tensor for parts in known.values() for p in parts}
        for name, (b, t) in self._names.items():
            if b not in used:  # the model has no such parameter, or makes several of it in a way that has no form here
                pairs.append(replace(self._as_stored(name, b, t), form="expert" if _EXPERT.search(name) else "other"))
            elif self._own[b] != t:
                pairs.append(self._as_stored(name, b, t))
        if any(p.is_experts for p in pairs):
            pairs = [replace(p, form=Parameter) if p.form is Linear and _last(p.name) in EXPERT_LAYERS else p for p in pairs]
        return pairs, tuple(self._copies(pairs, model)), ()

    def as_stored(self) -> tuple[Pair, ...]:
        """Return the pairs as the checkpoint names them, sorted."""
        return tuple(self._as_stored(name, b, t) for name, (b, t) in sorted(self._names.items()))

    @staticmethod
    def _copies(pairs: Sequence[Pair], model: Architecture) -> Iterator[Pair]:
        """Yield the other uses of an embedding, where the checkpoints store one tensor for all."""
        made = {p.name: p for p in pairs}
        for name, source in model.tied.items():
            owner = made.get(source)
            if name not in made and owner is not None and owner.form is Embedding:
                layer = model.layers.get(name.rpartition(".")[0])
                if isinstance(layer, Linear | Embedding):
                    is_transposed = bool(layer.is_stored_transposed)
                    yield replace(owner, name=name, form=type(layer), is_transposed=is_transposed, shares=owner.module)

    def _as_stored(self, name: str, base: str, tuned: str) -> Pair:
        info = self._base.info(base)
        conv1d = may_be_conv1d(name.rpartition(".")[0]) and bool(self._base.has_conv1d)
        form: Form = "expert" if _EXPERT.search(name) else _form(name, info.shape, is_conv1d=conv1d)
        return self._pair(name, form, info.shape, ((self._rows(base, tuned),),))

    def _of_parts(self, name: str, parts: tuple[Part, ...], model: Architecture) -> Pair:
        """Return a parameter of the model from the tensors that hold it."""
        module = name.rpartition(".")[0]
        if parts == (Part(parts[0].tensor),):
            shape = self._base.info(parts[0].tensor).shape
            if len(shape) == 3 and _EXPERT.search(name):
                whole = self._rows(parts[0].tensor, self._own[parts[0].tensor], matrix=True)
                experts = tuple((replace(whole, first=i * shape[1], count=shape[1]),) for i in range(shape[0]))
                return Pair(name, Parameter, shape, experts, is_transposed=module in model.transposed)
            layer = model.layers.get(module)
            form = self._form_of(name, shape, layer)
            rows = self._rows(parts[0].tensor, self._own[parts[0].tensor])
            groups = layer.stack if layer is not None and form is type(layer) else 1
            count = rows.count // groups
            return self._pair(name, form, shape, tuple((replace(rows, first=i * count, count=count),) for i in range(groups)))
        stacks: dict[int, list[Part]] = {}
        for part in sorted(parts, key=lambda p: (p.expert or 0, p.start)):
            stacks.setdefault(part.expert or 0, []).append(part)
        matrices = tuple(tuple(self._part(p) for p in stack) for stack in stacks.values())
        shape = (sum(r.count for r in matrices[0]), *self._base.info(parts[0].tensor).shape[1:])
        if parts[0].expert is None:
            return self._pair(name, self._form_of(name, shape, model.layers.get(module)), shape, matrices)
        return Pair(name, Parameter if len(shape) == 2 else "other", (len(matrices), *shape), matrices)

    def _form_of(self, name: str, shape: tuple[int, ...], layer: Layout | None) -> Form:
        """Return what a parameter can become, with its layer as PEFT sees it."""
        if not name.endswith(".weight"):
            return _form(name, shape, is_conv1d=False)
        if reads_past_adapters(self._base.config.get("model_type"), _last(name)):
            return "other"
        if layer is not None:
            return type(layer)
        # a router, for example: a layer of the model's own kind
        return Parameter if len(shape) == 2 and not _EMBEDDING.fullmatch(_last(name)) else "other"

    def _pair(self, name: str, form: Form, shape: tuple[int, ...], matrices: tuple[tuple[PairedRows, ...], ...]) -> Pair:
        return Pair(name, form, shape, matrices, is_transposed=isinstance(form, type) and bool(form.is_stored_transposed))

    def _part(self, part: Part) -> PairedRows:
        whole = self._rows(part.tensor, self._own[part.tensor])
        return whole if part.rows is None else replace(whole, first=part.row, count=part.rows)

    def _rows(self, base: str, tuned: str, *, matrix: bool = False) -> PairedRows:
        """Return all rows of a tensor: of its first dimension, or of its last matrix and all that are stacked on it."""
        shape = self._base.info(base).shape or (1,)
        columns = shape[-1] if matrix else math.prod(shape[1:])
        sides = (self._base.home[base].file, base), (self._tuned.home[tuned].file, tuned)
        return PairedRows(*sides, 0, math.prod(shape) // max(1, columns), columns)


def _align(base: set[str], tuned: set[str]) -> dict[str, tuple[str | None, str | None]]:
    """Match names; checkpoints are saved with or without the task head's prefix (`model.`, `transformer.`).

    Returns:
        the longer name → (name in the base, name in the fine-tune); None where it is missing.
    """
    named: dict[str, list[str | None]] = {}
    for side, (own, other) in enumerate(((base, tuned), (tuned, base))):
        prefix = _prefix(own, other)
        for name in sorted(own):
            longer = prefix + name
            named.setdefault(longer if prefix and longer in other else name, [None, None])[side] = name
    return {name: (sides[0], sides[1]) for name, sides in named.items()}


def _prefix(without: set[str], with_: set[str]) -> str:
    """Return what most names of `without` lack in front to be names of `with_`; empty when some are names already."""
    if without & with_:
        return ""
    found: Counter[str] = Counter()
    for name in sorted(with_):
        for dot in re.finditer(r"\.", name):
            if name[dot.end() :] in without:
                found[name[: dot.end()]] += 1
    return found.most_common(1)[0][0] if found else ""


def _tie(names: dict[str, tuple[str | None, str | None]], one: BaseCheckpoint, two: BaseCheckpoint) -> None:
    """Let a head that one side does not store, being tied to the embedding, be read from there."""
    for head in [n for n in names if OUTPUT_HEAD.fullmatch(n) and None in names[n]]:
        sides = list(names[head])
        for i, checkpoint in enumerate((one, two)):
            if sides[i] is None and checkpoint.config.get("tie_word_embeddings", True):
                sides[i] = next((n for n in sorted(checkpoint.home) if INPUT_EMBEDDING.fullmatch(n)), None)
        names[head] = (sides[0], sides[1])


def _missing(base: str, tuned: str, names: Mapping[str, tuple[str | None, str | None]]) -> list[str]:
    wanted = {n: sides for n, sides in names.items() if not _CONSTANT.search(n)}
    problems = []
    for text, other, side in ((tuned, base, 1), (base, tuned, 0)):
        lacking = [n for n, sides in wanted.items() if sides[side] is None]
        if lacking:
            problems.append(
                f"{text} lacks {len(lacking)} of {other}'s tensors: {listed(lacking)}. Is it a fine-tune of the same "
                "architecture, saved in full by the same version of transformers?"
            )
    return problems


def _shapes(base: str, tuned: str, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> list[str]:
    problems, other = [], []
    for name, (one, two) in shapes.items():
        if one == two:
            continue
        differs = f"{name!r} is {list(one)} in {base} and {list(two)} in {tuned}"
        if one[1:] == two[1:] and (INPUT_EMBEDDING.fullmatch(name) or OUTPUT_HEAD.fullmatch(name)):
            problems.append(
                f"{differs}: the vocabulary was resized. A LoRA cannot add tokens; resize the base model first "
                f"(model.resize_token_embeddings({two[0]})), save it, and extract against that."
            )
        else:
            other.append(differs)
    if other:
        problems.append(f"{len(other)} tensors have other shapes: {listed(other, separator='; ')}.")
    return problems


def _form(name: str, shape: tuple[int, ...], *, is_conv1d: bool) -> Form:
    parameter = name.rpartition(".")[2]
    if parameter == "bias":
        return "bias"
    if parameter != "weight" or len(shape) != 2:
        return "other"
    if _EMBEDDING.fullmatch(_last(name)):
        return Embedding
    return Conv1D if is_conv1d else Linear


def _last(name: str) -> str:
    """Return the name of the layer that a parameter belongs to."""
    return name.rpartition(".")[0].rpartition(".")[2]
