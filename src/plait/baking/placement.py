"""Every delta, bias and head of a merge gets its place in the base model's tensors, or a problem is reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from plait.adapters.adapter import Adapter
from plait.adapters.layouts import Layout
from plait.baking.full import FullTensor, full_tensor, parameter_of
from plait.checkpoints.architecture import ArchitectureUnknown, Part
from plait.checkpoints.checkpoint import BaseCheckpoint, sections
from plait.checkpoints.names import ParameterFinder
from plait.libraries.transformers import HEADED_TASKS
from plait.merging.combine import pipeline_of
from plait.merging.inventory import Inventory
from plait.merging.plan import MergePlan
from plait.tensorfiles.reader import FLOATS

_TRANSPOSED = "is stored as (d_in, d_out) and cut into several tensors"


@dataclass(frozen=True)
class RowRange:
    """Rows of one merged matrix and where they go.

    Attributes:
        target: the target module.
        matrix: which one of its stack.
        first: the first row of ΔW; its first column when transposed.
        count: how many.
        row: the first row of the tensor, seen as rows × columns.
        transposed: the tensor stores ΔWᵀ.
        columns: first and last column of ΔW that the tensor has, beyond which it has only zeros; None for all of them.
    """

    target: str
    matrix: int
    first: int
    count: int
    row: int
    transposed: bool
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class TensorChange:
    """What becomes of one tensor.

    Attributes:
        ranges: deltas that are added.
        biases: targets whose `lora_bias` is added.
        replaced: the adapters' own tensor that takes the base's place.
        tokens: trained rows that take the place of the base's.
    """

    ranges: tuple[RowRange, ...] = ()
    biases: tuple[str, ...] = ()
    replaced: FullTensor | None = None
    tokens: FullTensor | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The target modules whose merge is needed for it."""
        return tuple(dict.fromkeys([p.target for p in self.ranges] + list(self.biases)))


@dataclass(frozen=True)
class AddedTensor:
    """A tensor that the base model does not have.

    Attributes:
        shape: of it.
        source: the base's tensor that its values start from; None when the change replaces them all.
        change: what is done to them.
    """

    shape: tuple[int, ...]
    source: str | None
    change: TensorChange


@dataclass
class Placement:
    """The outcome.

    Attributes:
        changes: tensor of the base → what becomes of it.
        added: new tensors.
        untied: the output head no longer shares the input embedding's values.
        separate: adapter → its full tensors that are kept under heads/.
        problems: everything that has no place; complete messages.
        notes: what is worth knowing.
    """

    changes: dict[str, TensorChange] = field(default_factory=dict)
    added: dict[str, AddedTensor] = field(default_factory=dict)
    untied: bool = False
    separate: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, tensor: str, **more: object) -> None:
        """Put something more on a tensor's list."""
        now = self.changes.get(tensor, TensorChange())
        together = {k: getattr(now, k) + v if isinstance(v, tuple) else v for k, v in more.items()}
        self.changes[tensor] = replace(now, **together)  # type: ignore[arg-type]


def place_deltas(
    inventory: Inventory, plan: MergePlan, checkpoint: BaseCheckpoint, full: Mapping[str, FullTensor]
) -> Placement:
    """Find the place of everything that a merge changes.

    Args:
        inventory: the adapters.
        plan: what is merged.
        checkpoint: the base model.
        full: heads and other full tensors that go into the model: parameter → tensor.
    """
    layouts = {m.target: inventory.layouts[m.target] for m in plan.modules}
    names = ParameterFinder(checkpoint, [layout.weight_name(t) for t, layout in layouts.items()])
    return _Placing(inventory, checkpoint, names, layouts, full).run()


class _Placing:
    def __init__(
        self,
        inventory: Inventory,
        checkpoint: BaseCheckpoint,
        names: ParameterFinder,
        layouts: Mapping[str, Layout],
        full: Mapping[str, FullTensor],
    ) -> None:
        self._inventory, self._checkpoint, self._names = inventory, checkpoint, names
        self._layouts, self._full = layouts, dict(full)
        self._result = Placement()
        self._placed: set[str] = set()

    def run(self) -> Placement:
        self._full = {p: self._own_table(p, t) for p, t in self._full.items() if not self._is_copy(p, t)}
        lost = []
        for target, layout in self._layouts.items():
            parts = self._names.parts(layout.weight_name(target))
            if parts:
                self._place_delta(target, layout, parts)
            elif self._names.source_of(layout.weight_name(target)) is None:
                lost.append(f"{target} ({self._names.why_not(layout.weight_name(target))})")
            if any(target in a.targets and a.targets[target].has_bias for a in self._inventory.adapters):
                self._place_bias(target)
        if lost:
            shown = "\n".join(f"      {line}" for line in lost[:20])
            more = f"\n      and {len(lost) - 20} more" if len(lost) > 20 else ""
            first = next(iter(self._checkpoint.home))
            self._result.problems.append(
                f"{len(lost)} of {len(self._layouts)} target modules have no tensor in {self._checkpoint.folder}, whose names "
                f"look like {first!r}. Is this the base model that they were trained on?\n{shown}{more}"
            )
        for parameter, tensor in self._full.items():
            self._place_full(parameter, tensor)
        if self._inventory.recipe.heads.policy == "separate":
            self._keep_separate()
        if not self._result.problems:
            self._untie()
        self._result.problems += [*self._conflicts(), *self._half_resized()]
        if not self._result.problems:
            self._result.problems += [
                f"{t}: no tensor was found for its delta" for t in sorted(set(self._layouts) - self._placed)
            ]
        return self._result

    def _place_delta(self, target: str, layout: Layout, parts: tuple[Part, ...]) -> None:
        rows = 0
        try:
            for part in parts:
                ranges = tuple(self._ranges(target, layout, part, alone=len(parts) == 1))
                self._result.add(part.tensor, ranges=ranges)
                rows += sum(r.count for r in ranges)
            wanted = layout.stack * (layout.d_in if ranges[0].transposed else layout.d_out)
            if rows != wanted:
                raise ValueError(
                    f"the base model has tensors for {rows} of its delta's {wanted} rows. Is its checkpoint complete?"
                )
            self._placed.add(target)
        except ValueError as error:
            self._result.problems.append(f"{target}: {error}")

    def _ranges(self, target: str, layout: Layout, part: Part, *, alone: bool) -> Iterator[RowRange]:
        """Yield the ranges that land in one tensor.

        Raises:
            ValueError: shapes contradict each other; the text says how.
        """
        info = self._checkpoint.info(part.tensor)
        if info.dtype not in FLOATS:
            raise ValueError(
                f"{part.tensor!r} in {self._checkpoint.home[part.tensor].file.path} is stored as {info.dtype}; deltas are "
                f"added to {', '.join(FLOATS)}"
            )
        shape = info.shape
        replaced = self._full.get(layout.weight_name(target))
        if replaced is not None:  # the deltas belong to the trained tensor that takes the base's place
            shape = replaced.shape
        whole = part.expert is None and part.row == 0 and part.rows is None and alone
        transposed = self._transposed(target, layout, shape if whole else None)
        if transposed and not whole:
            raise ValueError(f"{part.tensor!r} {_TRANSPOSED}, which plait cannot write yet")
        rows, columns = layout.as_matrix(shape)
        if whole:
            if (columns_of := layout.own_columns(shape)) is not None:
                yield from self._groups(target, layout, columns_of, part.tensor)
                return
            if not layout.fits(shape, transposed=transposed):
                wanted = list(layout.stored_shape(transposed=transposed))
                raise ValueError(
                    f"{part.tensor!r} in {self._checkpoint.folder} is {list(shape)}, the adapters need {wanted}. Is this "
                    "the base model that they were trained on?"
                )
            height = layout.d_in if transposed else layout.d_out
            yield from (RowRange(target, i, 0, height, i * height, transposed) for i in range(layout.stack))
            return
        count = rows if part.rows is None else part.rows
        if columns != layout.d_in or part.start + count > layout.d_out or (part.expert or 0) >= layout.stack:
            raise ValueError(
                f"{part.tensor!r} in {self._checkpoint.folder} is {list(shape)}, the adapters need a part of "
                f"{list(layout.dense_shape)}. Is this the base model that they were trained on?"
            )
        yield RowRange(target, part.expert or 0, part.start, count, part.row, transposed=False)

    def _groups(self, target: str, layout: Layout, columns_of: Sequence[tuple[int, int]], tensor: str) -> Iterator[RowRange]:
        """Yield the ranges of a grouped convolution under a LoRA as PEFT stores it, every group of which reads all channels.

        Raises:
            ValueError: some group reads channels of others, which the weight has no entries for.
        """
        for adapter in self._inventory.adapters:
            if target not in adapter.targets:
                continue
            for delta, (first, stop) in zip(adapter.read(target), columns_of, strict=True):
                if bool(delta.a[:, :first].any()) or bool(delta.a[:, stop:].any()):
                    raise ValueError(
                        f"{tensor!r} is a convolution in {layout.stack} groups, and the LoRA of {adapter.name!r} reads all "
                        "input channels in every group: no grouped weight can hold that. Keep the adapter, or train without "
                        "this layer"
                    )
        for i, columns in enumerate(columns_of):
            yield RowRange(target, i, 0, layout.d_out, i * layout.d_out, transposed=False, columns=columns)

    def _transposed(self, target: str, layout: Layout, shape: tuple[int, ...] | None) -> bool:
        """Return whether a tensor stores ΔWᵀ; its shape decides, the model's code where it is square."""
        if shape is None:
            return False
        flag = any(a.config.flag("fan_in_fan_out") for a in self._inventory.adapters if target in a.targets)
        found = layout.is_transposed(target, stored=shape, conv1d=self._checkpoint.has_conv1d, flag=flag)
        if found is None:
            found = self._names.is_transposed(target.rpartition(".")[0])
        if found is None:
            raise ValueError("its matrices are square, and without transformers it is not known whether they are transposed")
        return found

    def _place_bias(self, target: str) -> None:
        owners = [a for a in self._inventory.adapters if target in a.targets and a.targets[target].has_bias]
        if not any(bool(a.read_part(target, "lora_B.bias").any()) for a in owners):
            return  # PEFT has a lora_bias in all layers or none
        parts = self._names.parts(f"{target}.bias")
        if len(parts) == 1 and parts[0] == Part(parts[0].tensor):
            self._result.add(parts[0].tensor, biases=(target,))
            return
        self._result.problems.append(
            f"{target}: the adapters have a lora_bias, the base model has no bias there, and its code would load none. "
            "Merge these adapters into an adapter, or train without lora_bias."
        )

    def _own_table(self, parameter: str, tensor: FullTensor) -> FullTensor:
        """Return trained rows without the table that they are put into, where that is the base's."""
        copied = tensor.table is not None and self._is_copy(parameter, tensor.table)
        return replace(tensor, table=None) if copied else tensor

    def _is_copy(self, parameter: str, tensor: FullTensor) -> bool:
        """Return whether a full tensor is the base's own: PEFT saves a copy of an embedding that LoRA adapts."""
        if tensor.indices:
            return False
        parts = self._names.parts(parameter)
        if not parts and (tied := self._names.source_of(parameter)) is not None:
            parts = tuple(Part(stored) for stored in [self._stored(tied[1])] if stored)
        if len(parts) != 1 or parts[0] != Part(parts[0].tensor):
            return False
        return tensor.equals(self._checkpoint, parts[0].tensor)

    def _keep_separate(self) -> None:
        """Find the full tensors that are kept under heads/, one set per task."""
        for adapter in self._inventory.adapters:
            kept = []
            for path in adapter.full_tensors:
                parameter = parameter_of(path)
                if self._is_copy(parameter, full_tensor(parameter, path, (adapter,))):
                    continue
                if ".base_layer." in path and parameter.removesuffix(".weight") in adapter.targets:
                    self._result.problems.append(
                        f"{adapter.name}: its deltas on {parameter} belong to a tensor of its own, which is not the base's "
                        "(a resized vocabulary?). Say whose is baked: heads: {policy: from, adapter: NAME}."
                    )
                kept.append(path)
            if kept:
                self._result.separate[adapter.name] = tuple(kept)
        if self._result.separate:
            self._result.notes.append(
                f"heads and other full tensors of {', '.join(self._result.separate)} are kept under heads/<name>/; the model "
                "has the base's. heads: {policy: from, adapter: NAME} in a recipe bakes one adapter's."
            )

    def _place_full(self, parameter: str, tensor: FullTensor) -> None:
        kind = "tokens" if tensor.indices else "replaced"
        parts = self._names.parts(parameter)
        if len(parts) > 1 or (parts and parts[0] != Part(parts[0].tensor)):
            self._result.problems.append(
                f"{parameter}: the checkpoint stores it in pieces ({parts[0].tensor!r}, …); no full tensor can go there yet."
            )
        elif parts:
            shape = self._checkpoint.info(parts[0].tensor).shape
            if tensor.table is not None:
                problem = _shape_problem(parameter, tensor.table, shape)
                self._result.problems += [problem] if problem else []
                self._result.add(parts[0].tensor, replaced=tensor.table)
                shape = tensor.table.shape
            problem = _shape_problem(parameter, tensor, shape)
            self._result.problems += [problem] if problem else []
            self._result.add(parts[0].tensor, **{kind: tensor})
        elif self._names.source_of(parameter) is None:
            if tensor.indices:
                self._result.problems.append(f"{parameter}: trained token rows, but the base model has no such embedding.")
                return
            self._place_new(parameter, tensor)

    def _place_new(self, parameter: str, tensor: FullTensor) -> None:
        """Add a task's head to the model; a parameter that no class of this model has is kept under heads/."""
        tasks = {a.config.raw.get("task_type") for a in tensor.adapters}
        if self._names.architecture is None or tasks & HEADED_TASKS:
            self._result.added[parameter] = AddedTensor(tensor.shape, None, TensorChange(replaced=tensor))
            self._result.notes.append(f"{parameter} is not in the base model and is added.")
            return
        for adapter, (_, name) in zip(tensor.adapters, tensor.names, strict=True):
            path = next(p for p, n in adapter.full_tensors.items() if n == name)
            self._result.separate[adapter.name] = (*self._result.separate.get(adapter.name, ()), path)
        self._result.notes.append(
            f"{parameter} of {', '.join(a.name for a in tensor.adapters)} is not a parameter of the base model, whose code "
            "would not load it: it is kept under heads/<name>/."
        )

    def _untie(self) -> None:
        """See to tensors that the model uses twice, as input embedding and as output head: each use gets its own change.

        PEFT adapts one use and leaves the other; a checkpoint can express that only with two tensors.
        """
        if not self._may_touch_tied():
            return
        try:
            groups = self._names.tied_groups()
        except ArchitectureUnknown as error:
            self._result.problems.append(
                f"an embedding is changed, and whether the model uses it as its output head too is not known: {error}. "
                "Or set tie_word_embeddings in the base's config.json."
            )
            return
        for group in groups:
            self._untie_group(group)

    def _may_touch_tied(self) -> bool:
        vocabulary = {s.get("vocab_size") for s in (self._checkpoint.config, self._checkpoint.config.get("text_config") or {})}
        touched = {self._checkpoint.info(t).shape[:1] for t in self._result.changes}
        embeddings = any(layout.reads_tokens for layout in self._layouts.values())
        orphan = any(not self._names.parts(layout.weight_name(t)) for t, layout in self._layouts.items())
        orphan = orphan or any(not self._names.parts(p) for p in self._full)
        return embeddings or orphan or any((size,) in touched for size in vocabulary if size)

    def _untie_group(self, group: tuple[str, ...]) -> None:
        owner = group[0]
        stored = self._stored(owner)
        uses = {name: self._use(name) for name in group}
        if stored is None or not any(uses.values()):
            return
        self._placed |= {target for use in uses.values() if use is not None for target in use.targets}
        if self._check_agreement(list(uses.values())):
            for name in group[1:]:
                self._result.added.pop(name, None)
            made = [c for c in uses.values() if c is not None]
            self._result.changes[stored] = next((c for c in made if c.tokens), made[0])
            return
        if len(group) > 2:
            self._part(owner, stored, uses)
            return
        self._separate(owner, group[1], stored, uses)

    def _separate(self, owner: str, copy: str, stored: str, uses: Mapping[str, TensorChange | None]) -> None:
        own, other = uses[owner] or TensorChange(), uses[copy] or TensorChange()
        shape = self._checkpoint.info(stored).shape
        if other.replaced is None and own.replaced is not None and own.replaced.shape != shape:
            other = replace(other, replaced=own.replaced)  # a resized vocabulary resizes both uses
        if own.replaced is None and other.replaced is not None and other.replaced.shape != shape:
            own = replace(own, replaced=other.replaced)
        if own == other:
            self._result.changes[stored] = own
            return
        self._result.changes.pop(stored, None)
        if own != TensorChange():
            self._result.changes[stored] = own
        if self._stored(copy) is None:
            self._result.added[copy] = AddedTensor(other.replaced.shape if other.replaced else shape, stored, other)
        self._result.untied = True
        self._result.notes.append(
            f"{owner} and {copy} share one tensor in the base model and are changed differently: both are written, and "
            "tie_word_embeddings is false in the baked model."
        )

    def _part(self, owner: str, stored: str, uses: Mapping[str, TensorChange | None]) -> None:
        """Write the uses of a tensor that are changed otherwise than the one that owns it; the rest stay one with it.

        A configuration has no word for half a tie. It needs none where the loader looks at the values: transformers 5 does not
        tie what is stored separately with other values.
        """
        shape = self._checkpoint.info(stored).shape
        if any(u.replaced is not None and u.replaced.shape != shape for u in uses.values() if u is not None):
            self._result.problems.append(
                f"{', '.join(uses)} share one tensor, and the adapters give only some of them a vocabulary of another size. "
                "Save all of them (modules_to_save), or merge into an adapter instead."
            )
            return
        copies = []
        for name, change in uses.items():
            if name == owner or (change is None and uses[owner] is None):
                continue
            if self._check_agreement([uses[owner], change]):
                self._result.added.pop(name, None)
                continue
            copies.append(name)
            if self._stored(name) is None:
                self._result.added[name] = AddedTensor(shape, stored, change or TensorChange())
        self._result.notes.append(
            f"{', '.join(copies)} no longer {'shares' if len(copies) == 1 else 'share'} the values of {owner} and "
            f"{'is' if len(copies) == 1 else 'are'} stored separately. transformers 5 loads that; older ones tie them again."
        )

    def _stored(self, parameter: str) -> str | None:
        """Return the tensor under which the checkpoint stores a parameter (as the model's code calls it), if it does."""
        architecture = self._names.architecture
        parts = architecture.parts.get(parameter, ()) if architecture else ()
        return parts[0].tensor if len(parts) == 1 else None

    def _use(self, name: str) -> TensorChange | None:
        """Return the change of one use of a tied tensor."""
        stored = self._stored(name)
        if stored is not None:
            return self._result.changes.get(stored)
        ranges: tuple[RowRange, ...] = ()
        for target, layout in self._layouts.items():
            if self._names.model_name(layout.weight_name(target)) == name:
                transposed = bool(layout.is_stored_transposed)
                self._check_copy(target, layout, name, transposed=transposed)
                ranges += (RowRange(target, 0, 0, layout.d_in if transposed else layout.d_out, 0, transposed),)
        full = next((t for p, t in self._full.items() if self._names.model_name(p) == name), None)
        if not ranges and full is None:
            return None
        if full is not None and full.indices:
            return TensorChange(ranges, tokens=full, replaced=full.table)
        return TensorChange(ranges, replaced=full)

    def _check_copy(self, target: str, layout: Layout, name: str, *, transposed: bool) -> None:
        owner = next(g[0] for g in self._names.tied_groups() if name in g)
        stored, full = self._stored(owner), self._full.get(layout.weight_name(target))
        shape = full.shape if full else self._checkpoint.info(stored).shape if stored else ()
        wanted = layout.stored_shape(transposed=transposed)
        if shape != wanted:
            self._result.problems.append(
                f"{target}: {stored!r} of the base model, whose values it shares, is {list(shape)}, the adapters need "
                f"{list(wanted)}. Is this the base model that they were trained on?"
            )

    def _check_agreement(self, uses: list[TensorChange | None]) -> bool:
        """Return whether all uses of a tensor are changed alike, so that they can stay one.

        Trained token rows always are: PEFT ties their adapter to the head where the model ties the weights.
        """
        made = [u for u in uses if u is not None]
        tokens, tables = {u.tokens.names for u in made if u.tokens}, [u.replaced for u in made if u.replaced]
        if tokens and not any(u.ranges for u in made) and all(u.tokens or u.replaced for u in made):
            return len(tokens) == 1 and all(tables[0].same_values(table) for table in tables[1:])
        if len(made) < len(uses):
            return False
        if any((u.replaced is None) != (made[0].replaced is None) or len(u.ranges) != len(made[0].ranges) for u in made):
            return False
        first = made[0].replaced
        if first is not None and not all(first.same_values(u.replaced) for u in made[1:] if u.replaced is not None):
            return False
        return all(self._same_delta(made[0].ranges, u.ranges) for u in made[1:])

    def _same_delta(self, one: tuple[RowRange, ...], two: tuple[RowRange, ...]) -> bool:
        """Return whether two targets have equal deltas in every adapter: with a linear method they are merged alike."""
        if one and not pipeline_of(self._inventory.recipe).is_linear:
            return False
        return all(_same_factors(adapter, p, q) for p, q in zip(one, two, strict=True) for adapter in self._inventory.adapters)

    def _half_resized(self) -> list[str]:
        """Return tensors that a resized vocabulary would leave at the old size."""
        changes, problems = self._result.changes, []
        for config in sections(self._checkpoint.config):
            rows = config.get("vocab_size")
            tables = [n for n in self._checkpoint.home if (s := self._checkpoint.info(n).shape)[:1] == (rows,) and len(s) == 2]
            sizes = {n: c.replaced.shape[0] for n in tables if (c := changes.get(n)) is not None and c.replaced is not None}
            new = set(sizes.values()) - {rows}
            left = [n for n in tables if sizes.get(n, rows) not in new]
            if new and left:
                resized = next(n for n, size in sizes.items() if size in new)
                problems.append(
                    f"{resized} has {sizes[resized]} rows in the adapter, but {', '.join(left)} keeps the base's {rows}: a "
                    "resized vocabulary needs both. Save it with save_embedding_layers=True and modules_to_save for both."
                )
        return problems

    def _conflicts(self) -> list[str]:
        problems = []
        for tensor, change in self._result.changes.items():
            if change.tokens is not None and (change.ranges or change.replaced != change.tokens.table):
                problems.append(f"{tensor}: trained token rows on a tensor that is changed otherwise too; cannot be baked yet.")
            if change.replaced is not None and change.biases:
                problems.append(f"{tensor}: a trained bias and a lora_bias on the same tensor; cannot be baked yet.")
            targets = [p.target for p in change.ranges]
            dora = [t for t in targets for a in self._inventory.adapters if t in a.targets and a.targets[t].is_dora]
            if dora and len(set(targets)) > 1:
                problems.append(f"{tensor}: DoRA on one of several modules that share a tensor; cannot be baked yet.")
        return problems


def _shape_problem(parameter: str, tensor: FullTensor, shape: tuple[int, ...]) -> str | None:
    if tensor.indices:
        if tensor.shape[1:] != shape[1:] or max(tensor.indices) >= shape[0]:
            return (
                f"{parameter}: trained rows {min(tensor.indices)} to {max(tensor.indices)} of width {tensor.shape[-1]} do not "
                f"fit the base's {list(shape)}. Was its vocabulary resized? Bake into the resized model."
            )
    elif len(tensor.shape) != len(shape) or tensor.shape[1:] != shape[1:]:
        return f"{parameter}: the adapter's tensor is {list(tensor.shape)}, the base's {list(shape)}; only the rows may differ."
    return None


def _same_factors(adapter: Adapter, one: RowRange, two: RowRange) -> bool:
    if (one.target in adapter.targets) != (two.target in adapter.targets):
        return False
    if one.target not in adapter.targets:
        return True
    (x,), (y,) = adapter.read(one.target), adapter.read(two.target)
    same_form = one.transposed == two.transposed
    a, b = (y.a, y.b) if same_form else (y.b.mT, y.a.mT)
    scalings = {adapter.targets[p.target].scaling for p in (one, two)}
    return len(scalings) == 1 and x.a.shape == a.shape and torch.equal(x.a, a) and torch.equal(x.b, b)
