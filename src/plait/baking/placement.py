"""Every delta, bias and head of a merge gets its place in the base model's tensors, or a problem is reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from plait.adapters.adapter import Adapter
from plait.adapters.layouts import Layout
from plait.baking.changes import AddedTensor, Placement, RowRange, TensorChange
from plait.baking.full import FullTensor, full_tensor, parameter_of
from plait.baking.tying import Untying, stored_tensor
from plait.checkpoints.architecture import Architecture, ArchitectureUnknown, Part
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.checkpoints.files import sections
from plait.checkpoints.names import parameter_finder
from plait.errors import listed
from plait.libraries.transformers.kinds import HEADED_TASKS, head_class, media_classes
from plait.merging.inventory import Inventory
from plait.merging.plan import MergePlan
from plait.tensorfiles.reader import FLOATS

_LABEL_WEIGHTS = ("classifier.weight", "classifier.out_proj.weight")  # of classifiers of images and sounds
_TRANSPOSED = "is stored as (d_in, d_out) and cut into several tensors"


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
    if problems := checkpoint.unchangeable([m.target for m in plan.modules]):
        return Placement(problems=problems)
    return _Placing(inventory, plan, checkpoint, full).run()


class _Placing:
    def __init__(
        self, inventory: Inventory, plan: MergePlan, checkpoint: BaseCheckpoint, full: Mapping[str, FullTensor]
    ) -> None:
        self._inventory, self._checkpoint, self._full = inventory, checkpoint, dict(full)
        self._layouts = {m.target: inventory.layouts[m.target] for m in plan.modules}
        self._names = parameter_finder(checkpoint, [layout.weight_name(t) for t, layout in self._layouts.items()])
        self._result = Placement()
        self._placed: set[str] = set()
        self._copies: dict[str, None] = {}  # parameters of which adapters bring the base's own values

    def run(self) -> Placement:
        self._full = {p: t for p, t in self._full.items() if not self._is_copy(p, t)}
        for parameter, tensor in self._full.items():
            if tensor.table is not None and self._is_copy(parameter, tensor.table):  # trained rows, in the base's own table
                self._full[parameter] = replace(tensor, table=None)
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
            untying = Untying(self._inventory, self._checkpoint, self._names, self._layouts, self._full, self._result)
            untying.run()
            self._placed |= untying.placed
            self._change_class()
        self._result.problems += [*self._conflicts(), *self._half_resized()]
        if not self._result.problems:
            self._result.problems += [
                f"{t}: no tensor was found for its delta" for t in sorted(set(self._layouts) - self._placed)
            ]
        self._note_copies()
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

    def _is_copy(self, parameter: str, tensor: FullTensor) -> bool:
        """Return whether a full tensor is the base's own: PEFT saves a copy of an embedding that LoRA adapts."""
        if tensor.indices:
            return False
        parts = self._names.parts(parameter)
        if not parts and (tied := self._names.source_of(parameter)) is not None:
            parts = tuple(Part(stored) for stored in [stored_tensor(self._names, tied[1])] if stored)
        if len(parts) != 1 or parts[0] != Part(parts[0].tensor):
            return False
        if not tensor.equals(self._checkpoint, parts[0].tensor):
            return False
        self._copies[parameter] = None
        return True

    def _note_copies(self) -> None:
        if self._copies:
            self._result.notes.append(f"adapters' copies of {listed(sorted(self._copies))} are the base's own: no change.")

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
                "has the base's. heads: {policy: from, adapter: NAME} in a recipe (--heads-policy from --heads-adapter NAME) "
                "bakes one adapter's."
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
        if self._names.architecture is None or tasks & HEADED_TASKS or all(map(self._media_class, tensor.adapters)):
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

    def _media_class(self, adapter: Adapter) -> str | None:
        """Return the class of classifiers of images or sounds whose head an adapter brings; None where it brings none."""
        if adapter.config.raw.get("task_type") or not any(path.endswith(_LABEL_WEIGHTS) for path in adapter.full_tensors):
            return None
        found, noted = media_classes(str(self._checkpoint.config.get("model_type"))), adapter.config.noted_class
        return found[1] if found is not None and (noted is None or noted[1] == found[1]) else None

    def _change_class(self) -> None:
        """Find the class that has the added heads, leave out what it has not, and refuse what nothing has the values of."""
        result, home = self._result, self._checkpoint.home
        owners = {a.name: a for c in result.added.values() if c.change.replaced for a in c.change.replaced.adapters}
        tasks = {a.config.raw.get("task_type") for a in self._inventory.adapters} - {None}
        task = tasks.pop() if len(tasks) == 1 else None
        if owners and task in HEADED_TASKS:
            result.head_class = head_class(str(self._checkpoint.config.get("model_type")), task)
        elif owners and self._names.architecture is not None:
            result.head_class = self._media_class(next(iter(owners.values())))
        if result.head_class is None:
            return
        try:
            shapes = {name: shard.file.tensors[name].shape for name, shard in home.items()}
            architecture = Architecture.of(self._checkpoint.folder, shapes, result.head_class)
        except ArchitectureUnknown as error:
            result.notes.append(f"the result is a {result.head_class}; it is not known whether it has all tensors: {error}.")
            return
        used = {name: {part.tensor for part in parts} for name, parts in architecture.parts.items()}
        for name in architecture.parameters - used.keys():  # a checkpoint of a model without its head, or with its prefix
            found = next((t for t in (name, name.partition(".")[2]) if t in home or t in result.added), None)
            used |= {} if found is None else {name: {found}}
        known = used.keys() | architecture.tied.keys() | architecture.unknown.keys()
        if lacking := sorted(architecture.parameters - known):
            result.problems.append(
                f"the adapter's head makes the result a {result.head_class}, which also has {listed(lacking)}; neither the "
                "base model nor an adapter has them, and transformers would fill them at random. Train them with the head "
                "(modules_to_save), or give the base model that has them."
            )
            return
        left = home.keys() - set().union(*used.values()) - result.changes.keys()
        if left and not architecture.unknown:
            result.left_out = frozenset(left)
            result.notes.append(f"the result is a {result.head_class}, which does not have {listed(sorted(left))}: left out.")

    def _half_resized(self) -> list[str]:
        """Return tensors that a resized vocabulary would leave at the old size."""
        changes, problems = self._result.changes, []
        for config in sections(self._checkpoint.config):
            rows = config.get("vocab_size")
            if not isinstance(rows, int):  # none, or a value that is left to the model's own code
                continue
            tables = [n for n in self._checkpoint.home if (s := self._checkpoint.info(n).shape)[:1] == (rows,) and len(s) == 2]
            replaced = {n: c.replaced for n in tables if (c := changes.get(n)) is not None and c.replaced is not None}
            sizes = {n: tensor.shape[0] for n, tensor in replaced.items() if tensor.shape}
            new = set(sizes.values()) - {rows}
            left = [n for n in tables if sizes.get(n, rows) not in new and n not in self._result.left_out]
            if new and left:
                resized = next(n for n, size in sizes.items() if size in new)
                owner = replaced[resized].names[0][0]
                problems.append(
                    f"{resized} has {sizes[resized]} rows in {owner!r}, but {', '.join(left)} keeps the base's {rows}: a "
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
            partial = (
                any(p.row or p.count < self._checkpoint.info(tensor).shape[0] for p in change.ranges) and not change.replaced
            )
            if dora and (len(set(targets)) > 1 or (partial and not self._checkpoint.form.has_code)):
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
