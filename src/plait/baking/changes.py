"""What becomes of the base model's tensors: deltas that are added, tensors that are replaced, new ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from plait.baking.full import FullTensor


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
        left_out: tensors of the base that the result's class does not have.
        head_class: transformers' class of the result, where heads that are added make it another than the base's.
        untied: the output head no longer shares the input embedding's values.
        separate: adapter → its full tensors that are kept under heads/.
        problems: everything that has no place; complete messages.
        notes: what is worth knowing.
    """

    changes: dict[str, TensorChange] = field(default_factory=dict)
    added: dict[str, AddedTensor] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    head_class: str | None = None
    untied: bool = False
    separate: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, tensor: str, **more: object) -> None:
        """Put something more on a tensor's list."""
        now = self.changes.get(tensor, TensorChange())
        together = {k: getattr(now, k) + v if isinstance(v, tuple) else v for k, v in more.items()}
        self.changes[tensor] = replace(now, **together)  # type: ignore[arg-type]
