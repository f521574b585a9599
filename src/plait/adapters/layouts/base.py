"""`Layout`: what every kind of layer answers for itself, and the defaults, which are those of a linear layer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor


class TensorNames(NamedTuple):
    """The tensors of one target in PEFT's file; the last two are there only with `lora_bias` and DoRA."""

    a: str
    b: str
    bias: str
    magnitude: str


@dataclass(frozen=True)
class Layout(ABC):
    """How A and B of one target are stored, what its weight looks like, and what is supported there.

    A target is one matrix (d_out, d_in), or a stack of matrices of one shape whose factors are interleaved on disk and must be
    taken apart before ranks are joined. Layouts are equal when all of this is.

    Attributes:
        d_out: rows of one matrix.
        d_in: columns of one matrix.
        stack: how many matrices.
    """

    d_out: int
    d_in: int
    stack: int = 1

    kind: ClassVar[str]  #: in plans, records and messages
    several: ClassVar[str] = ""  #: what several stacked ones are called
    a_part: ClassVar[str] = "lora_A"
    b_part: ClassVar[str] = "lora_B"
    suffix: ClassVar[str] = ".weight"  #: of A and B: they are layers in PEFT, or parameters ("")
    names_parameter: ClassVar[bool] = False  #: an adapter's target is the path of a parameter, not of a module
    is_stored_transposed: ClassVar[bool | None] = None  #: the base has (d_in, d_out); None: `is_transposed` decides
    reads_tokens: ClassVar[bool] = False  #: its inputs are indices, not vectors
    fan_in_fan_out: ClassVar[bool] = False  #: the flag that PEFT needs in the configuration
    takes_bias: ClassVar[bool] = True  #: PEFT has a `lora_bias` there
    served_by_vllm: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def claims(cls, shapes: Mapping[str, tuple[int, ...]], *, is_parameter: bool) -> bool:
        """Return whether a target is of this kind.

        Args:
            shapes: part of the target (`lora_A`, …) → shape on disk.
            is_parameter: whether the configuration names it in `target_parameters`.
        """

    @classmethod
    def of(cls, a: tuple[int, ...], b: tuple[int, ...], rank: int) -> tuple[Self, int]:
        """Return the layout of factors of some shapes, with the rank of one matrix.

        Args:
            a: shape of A on disk.
            b: shape of B on disk.
            rank: as the configuration gives it.

        Raises:
            ValueError: the shapes contradict each other; the text says how.
        """
        if len(a) != len(b) or len(a) < 2:
            raise ValueError(f"A is {list(a)} and B is {list(b)}; both need the same number of dimensions, at least 2")
        return cls._of(a, b, rank)

    @classmethod
    def _of(cls, a: tuple[int, ...], b: tuple[int, ...], rank: int) -> tuple[Self, int]:
        if a[0] != b[1]:
            raise ValueError(f"A is {list(a)} and B is {list(b)}; the rank must be A's first and B's second dimension")
        return cls(b[0], a[1]), a[0]

    @classmethod
    def of_module(cls, module: Any) -> Self | None:
        """Return the layout of factors on a module of a live model; None where it is not of this kind."""
        return None

    @classmethod
    def of_weight(cls, d_out: int, d_in: int, stack: int, shape: tuple[int, ...]) -> Self:
        """Return the layout of factors on a weight of the base.

        Args:
            d_out: rows of each of its matrices, as ΔW.
            d_in: columns of each.
            stack: how many matrices it holds.
            shape: of it.
        """
        return cls(d_out, d_in, stack)

    @classmethod
    def module_keys(cls, targets: Sequence[str]) -> dict[str, str]:
        """Return target → the module under which PEFT stores its tensors."""
        return {target: target for target in targets}

    @classmethod
    def tensor_names(cls, module: str) -> TensorNames:
        """Return the names of the tensors that are stored under a module."""
        a, b = (f"{module}.{part}{cls.suffix}" for part in (cls.a_part, cls.b_part))
        return TensorNames(a, b, f"{module}.lora_B.bias", f"{module}.lora_magnitude_vector")

    @classmethod
    def weight_name(cls, target: str) -> str:
        """Return the parameter of the base model that a target changes."""
        return target if cls.names_parameter else f"{target}.weight"

    @property
    def rank_unit(self) -> int:
        """How many ranks of PEFT's `r` make one rank of every matrix."""
        return 1

    @property
    def entries(self) -> int:
        """Number of entries of the dense delta."""
        return self.stack * self.d_out * self.d_in

    @property
    def full_rank(self) -> int:
        """The largest rank that a delta can have."""
        return min(self.d_out, self.d_in)

    @property
    def outputs(self) -> int:
        """Length of a bias and of DoRA's magnitudes."""
        return self.stack * self.d_out

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """Shape of DoRA's magnitudes on disk."""
        return (self.outputs,)

    @property
    def takes_dora(self) -> bool:
        """Whether DoRA has a form there."""
        return self.stack == 1 and not self.names_parameter

    @property
    def reads_vectors(self) -> bool:
        """Whether one matrix reads all inputs of the module, so that they have second moments which a hook can collect."""
        return self.stack == 1 and not (self.reads_tokens or self.names_parameter)

    @property
    def fits_weight(self) -> bool:
        """Whether the base's weight has an entry for every entry of the delta."""
        return True

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense delta, rows before columns, a stack in front."""
        return (self.d_out, self.d_in)

    def stored_shape(self, *, transposed: bool) -> tuple[int, ...]:
        """Return the shape of the base's weight."""
        shape = self.dense_shape
        return (*shape[:-2], shape[-1], shape[-2]) if transposed else shape

    def fits(self, shape: tuple[int, ...], *, transposed: bool) -> bool:
        """Return whether a weight of the base has the shape of the delta."""
        return shape == self.stored_shape(transposed=transposed)

    def own_columns(self, shape: tuple[int, ...]) -> list[tuple[int, int]] | None:
        """Return, per matrix, the columns (first, one past the last) of the delta that a weight of this shape holds.

        None where it holds all of them, as it does but for grouped convolutions.
        """
        return None

    def is_transposed(self, target: str, *, stored: tuple[int, ...] | None, conv1d: bool | None, flag: bool) -> bool | None:
        """Return whether the base stores the weight as (…, d_in, d_out); None where only the model's code knows.

        Args:
            target: its path.
            stored: shape of the weight, where it is known.
            conv1d: what `has_conv1d` says of the model.
            flag: `fan_in_fan_out` of some adapter of the target; believed only where nothing else decides.
        """
        return self.is_stored_transposed

    def matrices(self, weight: Tensor, *, transposed: bool) -> list[Tensor]:
        """Return a tensor of the weight's shape as matrices (d_out, d_in); views of a contiguous one."""
        return [weight.mT if transposed else weight]

    def as_matrix(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the rows and columns that a stored weight is seen as, matrices of a stack below each other."""
        return math.prod(shape[:-1]), shape[-1]

    def as_factors(self, slices: Sequence[LowRank]) -> list[LowRank]:
        """Return the deltas of a weight's matrices as deltas of this layout's: they differ for grouped convolutions alone."""
        return list(slices)

    def unpack(self, a: Tensor, b: Tensor) -> list[LowRank]:
        """Take the stored A and B separately into one `LowRank` per matrix of the stack."""
        return [LowRank(a, b)]

    def pack(self, slices: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
        """Put the matrices back into the stored A and B; all must have one rank."""
        return slices[0].a, slices[0].b

    def packed_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes that `pack` yields for a rank."""
        return (self.stack * rank, self.d_in), (self.d_out, self.stack * rank)

    def __str__(self) -> str:
        return f"{self.kind} {list(self.dense_shape)}"


def uniform_rank(ranks: Mapping[str, int], layouts: Mapping[str, Layout]) -> int:
    """Return the smallest r that PEFT can give to all targets at once.

    Args:
        ranks: target → rank of one of its matrices.
        layouts: of these targets; a grouped convolution needs an r that its groups divide.
    """
    unit = math.lcm(*(layouts[t].rank_unit for t in ranks))
    return -(-max(rank * layouts[t].rank_unit for t, rank in ranks.items()) // unit) * unit
