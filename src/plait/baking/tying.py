"""Tensors that a model uses twice, as input embedding and as output head: each use gets its own change.

PEFT adapts one use and leaves the other; a checkpoint can express that only with two tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from plait.adapters.adapter import Adapter
from plait.adapters.layouts import Layout
from plait.baking.changes import AddedTensor, Placement, RowRange, TensorChange
from plait.baking.full import FullTensor
from plait.checkpoints.architecture import ArchitectureUnknown
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.checkpoints.files import sections
from plait.checkpoints.names import ParameterFinder
from plait.deferred import torch
from plait.merging.combine import pipeline_of
from plait.merging.inventory import Inventory


def stored_tensor(names: ParameterFinder, parameter: str) -> str | None:
    """Return the tensor under which the checkpoint stores a parameter (as the model's code calls it), if it does."""
    parts = names.architecture.parts.get(parameter, ()) if names.architecture else ()
    return parts[0].tensor if len(parts) == 1 else None


class Untying:
    """The changes of tensors that are used twice, once everything else has its place.

    Args:
        inventory: the adapters.
        checkpoint: the base model.
        names: where its parameters are.
        layouts: of the target modules that are merged.
        full: full tensors that go into the model: parameter → tensor.
        result: of all other tensors; what is found here is put into it.
    """

    def __init__(
        self,
        inventory: Inventory,
        checkpoint: BaseCheckpoint,
        names: ParameterFinder,
        layouts: Mapping[str, Layout],
        full: Mapping[str, FullTensor],
        result: Placement,
    ) -> None:
        self._inventory, self._checkpoint, self._names = inventory, checkpoint, names
        self._layouts, self._full, self._result = layouts, full, result
        #: Target modules whose deltas have their place in such a tensor.
        self.placed: set[str] = set()

    def run(self) -> None:
        """Give each use its own change, where something touches such a tensor."""
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
        for owner, *copies in groups if self._result.untied else ():  # the flag unties all: the head's bias too
            stored = stored_tensor(self._names, owner)
            for name in copies:
                if stored is not None and stored_tensor(self._names, name) is None and name not in self._result.added:
                    change = self._result.changes.get(stored, TensorChange())
                    shape = change.replaced.shape if change.replaced else self._checkpoint.info(stored).shape
                    self._result.added[name] = AddedTensor(shape, stored, change)

    def _may_touch_tied(self) -> bool:
        vocabulary = [part.get("vocab_size") for part in sections(self._checkpoint.config)]
        touched = {self._checkpoint.info(t).shape[:1] for t in self._result.changes}
        embeddings = any(layout.reads_tokens for layout in self._layouts.values())
        orphan = any(not self._names.parts(layout.weight_name(t)) for t, layout in self._layouts.items())
        orphan = orphan or any(not self._names.parts(p) for p in self._full)
        return embeddings or orphan or any((size,) in touched for size in vocabulary if isinstance(size, int))

    def _untie_group(self, group: tuple[str, ...]) -> None:
        owner = group[0]
        stored = stored_tensor(self._names, owner)
        uses = {name: self._use(name) for name in group}
        if stored is None or not any(uses.values()):
            return
        if (own := uses[owner]) is not None and own.tokens is not None:  # PEFT ties trained rows to every use, below its LoRA
            for name, use in uses.items():
                if use is not None and use.ranges and use.tokens is None:
                    uses[name] = replace(use, tokens=own.tokens)
        self.placed |= {target for use in uses.values() if use is not None for target in use.targets}
        if self._check_agreement(list(uses.values())):
            for name in group[1:]:
                self._result.added.pop(name, None)
            made = [c for c in uses.values() if c is not None]
            self._result.changes[stored] = next((c for c in made if c.tokens), made[0])
            return
        if len(group) > 2:
            self._untie_some(owner, stored, uses)
            return
        self._untie_both(owner, group[1], stored, uses)

    def _untie_both(self, owner: str, copy: str, stored: str, uses: Mapping[str, TensorChange | None]) -> None:
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
        if stored_tensor(self._names, copy) is None:
            self._result.added[copy] = AddedTensor(other.replaced.shape if other.replaced else shape, stored, other)
        self._result.untied = True
        self._result.notes.append(
            f"{owner} and {copy} share one tensor in the base model and are changed differently: both are written, and "
            "tie_word_embeddings is false in the baked model."
        )

    def _untie_some(self, owner: str, stored: str, uses: Mapping[str, TensorChange | None]) -> None:
        """Write the uses of a tensor that are changed otherwise than the one that owns it; the rest stay one with it.

        A configuration has no word for half a tie. It needs none where the loader looks at the values: transformers 5 does not
        tie what is stored separately with other values.
        """
        shape = self._checkpoint.info(stored).shape
        if len(rows := {u.tokens.names for u in uses.values() if u is not None and u.tokens is not None}) > 1:
            self._result.problems.append(
                f"{', '.join(uses)} share one tensor, and the adapters have trained token rows of {len(rows)} of them: PEFT "
                "then ties none to the other uses, which no checkpoint can express. Merge into an adapter instead."
            )
            return
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
            if stored_tensor(self._names, name) is None:
                self._result.added[name] = AddedTensor(shape, stored, change or TensorChange())
        self._result.notes.append(
            f"{', '.join(copies)} no longer {'shares' if len(copies) == 1 else 'share'} the values of {owner} and "
            f"{'is' if len(copies) == 1 else 'are'} stored separately. transformers 5 loads that; older ones tie them again."
        )

    def _use(self, name: str) -> TensorChange | None:
        """Return the change of one use of a tied tensor."""
        stored = stored_tensor(self._names, name)
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
        stored, full = stored_tensor(self._names, owner), self._full.get(layout.weight_name(target))
        shape = full.shape if full else self._checkpoint.info(stored).shape if stored else ()
        wanted = layout.stored_shape(transposed=transposed)
        if shape != wanted:
            self._result.problems.append(
                f"{target}: {stored!r} of the base model, whose values it shares, is {list(shape)}, the adapters need "
                f"{list(wanted)}. Is this the base model that they were trained on?"
            )

    def _check_agreement(self, uses: list[TensorChange | None]) -> bool:
        """Return whether all uses of a tensor are changed alike, so that they can stay one.

        Trained token rows of the first, the embedding, always are: PEFT ties their adapter to the head where the model ties
        the weights, and not the other way round.
        """
        made = [u for u in uses if u is not None]
        tokens, tables = {u.tokens.names for u in made if u.tokens}, [u.replaced for u in made if u.replaced]
        if tokens and (uses[0] is None or uses[0].tokens is None):
            return False
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


def _same_factors(adapter: Adapter, one: RowRange, two: RowRange) -> bool:
    if (one.target in adapter.targets) != (two.target in adapter.targets):
        return False
    if one.target not in adapter.targets:
        return True
    if any(adapter.targets[p.target].is_dora for p in (one, two)):
        return False  # magnitudes are of columns in an embedding, of rows in a head
    (x,), (y,) = adapter.read(one.target), adapter.read(two.target)
    same_form = one.transposed == two.transposed
    a, b = (y.a, y.b) if same_form else (y.b.mT, y.a.mT)
    scalings = {adapter.targets[p.target].scaling for p in (one, two)}
    return len(scalings) == 1 and x.a.shape == a.shape and torch.equal(x.a, a) and torch.equal(x.b, b)
