"""Solve for the merged matrix by least squares: what stays close to every adapter's outputs on that adapter's inputs.

One solver, three descriptions of the inputs: their second moments; the same, seen from the adapters' joint row space; and the
deltas' own rows, which need no data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.errors import PlanError
from plait.linalg.factored import left_basis
from plait.linalg.inputs import InputRows, RowGram
from plait.linalg.solve import IndefiniteError, RidgeSystem
from plait.records import Record
from plait.stages.base import DeltaCombine, Site, StageParams, register_stage

Ridge = Annotated[
    float, Field(ge=0, le=1e6, description="Ridge, as a share of the mean eigenvalue of the summed Gram matrices.")
]
_ROUND_OFF = 1e-6  # directions below this share of a delta's largest are not among its rows
_RAISES = 12  # tenfold each: at 10¹² times the mean eigenvalue nothing is left but the mean


Term = tuple[Tensor, Tensor | RowGram]  # an adapter's rows (r, n) and the Gram matrix of its inputs (n, n), both float64


class RidgeFields(Record):
    """What every solver takes."""

    ridge: Ridge = 1e-2


class IndefiniteMomentsError(PlanError):
    """The second moments of a module are none; the text does not say whose."""


class SolveInputsFields(RidgeFields):
    """Parameters of `solve_inputs` and of RegMean."""

    off_diagonal: Annotated[
        float, Field(ge=0, le=1, description="Factor on the off-diagonal entries of every Gram matrix (the paper's α).")
    ] = 0.9


class _Solve(RidgeFields, StageParams, DeltaCombine):
    """M (Σ Gₜ + ρI) = Σ wₜ ΔWₜ Gₜ + ρ (1/T) Σ wₜ ΔWₜ; the kinds differ in Gₜ.

    Weights multiply the deltas, not the inputs: an adapter of weight ½ is followed at half strength on its inputs, one of
    weight −1 is undone there. Where the Gram matrices are zero, the ridge leaves the mean of the deltas.

    The ridge is raised tenfold at a time while ‖M‖_F > 2 √T · mean ‖wₜ ΔWₜ‖_F: √T is what T orthogonal deltas add up to. Beyond
    it M is made of differences between inputs that hardly differ, as adapters of one initialization have them.
    """

    solves: ClassVar[bool] = True

    def _solved(self, site: Site, term: Callable[[int], Term | None], basis: Tensor | None = None) -> LowRank:
        """Return the solution, of rank at most Σ rₜ.

        Args:
            site: what is merged.
            term: adapter index → its rows and Gram matrix; None when it takes no part.
            basis: (n, k) orthonormal, in whose coordinates the rows are; None for all n.

        Raises:
            PlanError: the second moments are none.
        """
        system = RidgeSystem(site.shape[1] if basis is None else basis.shape[1])

        def take(index: int) -> bool:
            found = term(index)
            if found is not None:
                system.add(*found)
            return found is not None  # and the Gram matrix is dropped, before the next one is read

        parts = [delta.b for index, delta in enumerate(site.weighted()) if take(index)]
        dtype = site.deltas[0].a.dtype
        if not parts:
            return LowRank.zero(site.shape, dtype)
        b, sizes = torch.cat(parts, dim=1), [d.energy() ** 0.5 for d in site.weighted()]
        sane = 2 * sum(sizes) / len(sizes) ** 0.5
        for raised in count():
            try:
                rows = system.solve(max(self.ridge, 1e-6) * 10.0**raised if raised else self.ridge)
            except IndefiniteError:
                raise IndefiniteMomentsError(
                    f"{site.module}: its second moments are not positive semidefinite, so they are not averages of x xᵀ. "
                    "Collect them again, in float32 or better."
                ) from None
            merged = LowRank((rows if basis is None else rows @ basis.mT).to(dtype), b)
            if raised == _RAISES or merged.energy() ** 0.5 <= sane:
                if raised:
                    site.remark("the ridge was raised tenfold or more, to keep the solution of the deltas' size")
                return merged
        raise AssertionError("a count has no end")


@register_stage
class SolveInputs(SolveInputsFields, _Solve):
    """Keep every adapter's outputs on its own inputs: Gₜ = E[x xᵀ], (d_in, d_in) (RegMean)."""

    needs_moments: ClassVar[bool] = True

    name: Literal["solve_inputs"] = "solve_inputs"

    def combine(self, site: Site) -> LowRank:
        """Return the solution over all rows."""

        def term(index: int) -> Term | None:
            gram = _moments(site, index)
            return None if gram is None else (site.deltas[index].a.double(), self._damped(gram))

        return self._solved(site, term)

    def _damped(self, gram: Tensor | InputRows) -> Tensor | RowGram:
        """Return the Gram matrix with smaller off-diagonal entries; a matrix in place."""
        if isinstance(gram, InputRows):
            return gram.damped(self.off_diagonal)
        diagonal = gram.diagonal().clone()
        gram.mul_(self.off_diagonal).diagonal().copy_(diagonal)
        return gram


@register_stage
class SolveCoreInputs(_Solve):
    """Keep every adapter's outputs on its own inputs, with rows from the adapters' joint row space only (SSR)."""

    needs_moments: ClassVar[bool] = True

    name: Literal["solve_core_inputs"] = "solve_core_inputs"

    def combine(self, site: Site) -> LowRank:
        """Return the solution over the joint row space: its Gram matrices are k × k, k ≤ Σ rₜ."""
        v = _row_space(site.deltas)

        def term(index: int) -> Term | None:
            gram = _moments(site, index)
            if gram is None:
                return None
            seen = gram.seen(v) if isinstance(gram, InputRows) else v.mT @ (gram @ v)
            return site.deltas[index].a.double() @ v, seen

        return self._solved(site, term, v)


@register_stage
class SolveDeltas(_Solve):
    """Keep every adapter's outputs on the inputs that it was made for, read off its own rows: Gₜ = ΔWₜᵀ ΔWₜ / ‖ΔWₜ‖² (WUDI)."""

    name: Literal["solve_deltas"] = "solve_deltas"

    def combine(self, site: Site) -> LowRank:
        """Return the solution over the joint row space; every Gₜ is zero outside of it."""
        v = _row_space(site.deltas)

        def term(index: int) -> Term:
            delta = site.deltas[index]
            rows, b, energy = delta.a.double() @ v, delta.b.double(), delta.energy()
            gram = rows.mT @ (b.mT @ b) @ rows
            return rows, gram / energy if energy else torch.zeros_like(gram)  # a zero delta asks for nothing

        return self._solved(site, term, v)


def _moments(site: Site, index: int) -> Tensor | InputRows | None:
    """Return E[x xᵀ] of an adapter's inputs; None for one that lacks the module and has none: it does not count."""
    if site.moments is None:
        raise AssertionError(f"{site.module}: a merge without second moments reached the solver")
    return site.moments(index)


def _row_space(deltas: Sequence[LowRank]) -> Tensor:
    """Return an orthonormal basis of the rows of all deltas, (n, k), float64; every delta counts alike, whatever its norm."""
    found = [d.svd() for d in deltas if d.rank]
    spaces = [svd.vh[svd.s > _ROUND_OFF * svd.s[0]] for svd in found if svd.s[0] > 0]
    if not spaces:
        return torch.zeros(deltas[0].shape[1], 0, dtype=torch.float64)
    return left_basis(torch.cat(spaces).mT.double(), tolerance=_ROUND_OFF)
