"""The contract itself: methods with one fault each, and the row that has to find it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from pydantic import Field, model_validator

from plait.adapters.lowrank import LowRank
from plait.linalg.sparsify import keep_at_least
from plait.methods import METHODS, Block, ElementwiseMethod, LinearMethod, MethodParams, NoParams, Preset, Source
from plait.stages import DeltaCombine, Pipeline
from plait.stages.sums import Sum
from plait.stages.surveys import total
from plait.testing import CONTRACT, check_method, check_property, subject_of
from tests.every import every

SOURCE = Source("nobody")


def summed(block: Block) -> torch.Tensor:
    return (block.x * block.weights.to(block.x.dtype).view(-1, 1, 1)).sum(0)


def elementwise(combine, name="ours", **changes) -> ElementwiseMethod:
    fields = {"summary": "s", "equation": "e", "params": NoParams, "source": SOURCE, **changes}
    return ElementwiseMethod(name=name, combine=combine, **fields)


GOOD = elementwise(lambda block, params: summed(block))


def test_a_good_method_passes_unregistered_and_leaves_the_registry_alone() -> None:
    names = list(METHODS)
    check_method(GOOD, identity={}, copies="sum")
    assert list(METHODS) == names


def test_a_registered_name_is_given_back() -> None:
    before = METHODS["ties"]
    check_method(replace(GOOD, name="ties"), spaces=["core"], properties=["zero"])
    assert METHODS["ties"] is before


def test_everything_broken_is_told_at_once() -> None:
    def wrong(block, params):
        return summed(block) * 0 + 1

    with pytest.raises(AssertionError) as caught:
        check_method(elementwise(wrong), spaces=["delta"])
    text = str(caught.value)
    assert "method 'ours' in space 'delta' breaks 'zero' (Zero deltas merge to zero): all adapters zero: " in text
    assert "breaks 'scale'" in text
    assert "breaks 'sign'" in text


def draws(generator):
    def combine(block, params):
        generator()
        return summed(block)

    return combine


def mutates(block, params):
    block.x.mul_(block.weights.to(block.x.dtype).view(-1, 1, 1))
    return block.x.sum(0)


def mutates_weights(block, params):
    block.weights.div_(1.0)
    block.weights[0] = 1.0
    return summed(block)


def by_row(block, params):
    rows = torch.arange(block.x.shape[1], dtype=block.x.dtype)  # ignores block.start
    return summed(block) * (1 + rows).unsqueeze(1)


def unkeyed(block, params):
    mask = torch.rand(block.x.shape, generator=torch.Generator().manual_seed(0), dtype=block.x.dtype) < 0.5
    return summed(replace(block, x=block.x * mask))


def by_place(block, params):
    kept = [x * (block.uniform(0) < 0.5) if t == 0 else x for t, x in enumerate(block.x)]
    return summed(replace(block, x=torch.stack(kept)))


def keyed(block, params):
    kept = [torch.where(block.uniform(t) < 0.5, x, 0) for t, x in enumerate(block.x)]
    return summed(replace(block, x=torch.stack(kept)))


def inexact_total(params):
    """A maximum over a block is no sum: it depends on the cut."""
    return (total("module", lambda block: block.x.abs().amax((1, 2))),)


def above_mean(block, params):
    return summed(replace(block, x=keep_at_least(block.x, (block.statistics[0] / 4).to(block.x.dtype))))


class Undescribed(MethodParams):
    density: Annotated[float, Field(gt=0, le=1)] = 0.5


class Unbounded(MethodParams):
    factor: Annotated[float, Field(description="Anything.")] = 1.0


class FreeText(MethodParams):
    mode: Annotated[str, Field(description="Anything.")] = "fast"


class BadDefault(MethodParams):
    density: Annotated[float, Field(gt=0, le=1, description="Kept.")] = 1.5


class Steps(MethodParams):
    steps: Annotated[int, Field(ge=1, description="How many.")] = 3


class Nested(MethodParams):
    coefficients: Annotated[dict[str, tuple[float, ...]] | None, Field(description="Per layer.")] = None


class Checked(Nested):
    @model_validator(mode="after")
    def _finite(self):
        for row in (self.coefficients or {}).values():
            if not all(np.isfinite(row)):
                raise ValueError("finite values, please")
        return self


def crashes_on_width_1(block, params):
    return summed(block) * (1 / (block.x.shape[-1] - 1))


def divides_by_norms(block, params):
    return summed(replace(block, x=block.x / block.x.abs().amax((1, 2), keepdim=True)))


def divides_by_differences(block, params):
    apart = (block.x - block.x.mean(0)).abs().mean()
    return summed(block) * block.x.abs().mean() / apart


def prefers_plus(block, params):
    return summed(replace(block, x=block.x.clamp_min(0)))


def counts_calls():
    calls = []

    def combine(block, params):
        calls.append(None)
        return summed(block) * len(calls)

    return combine


# fault → (combine, space, the row that finds it, what it says)
FAULTS = {
    "wrong shape": (lambda b, p: summed(b).mT, "delta", "shapes", "has shape"),
    "wrong dtype": (lambda b, p: summed(b).double(), "delta", "shapes", "is torch.float64, the adapters are torch.float32"),
    "crash on width 1": (crashes_on_width_1, "delta", "shapes", "ZeroDivisionError"),
    "not finite on zeros": (divides_by_norms, "delta", "shapes", "one adapter all zero"),
    "zero is not zero": (lambda b, p: summed(b) + 1e-30, "core", "zero", "entries that are not zero"),
    "vanishes": (lambda b, p: summed(b) * 0, "delta", "nonzero", "zero everywhere"),
    "changes its block": (mutates, "knots", "inputs", "ours changed block.x in place"),
    "changes the weights": (mutates_weights, "delta", "inputs", "ours changed block.weights in place"),
    "draws from torch": (draws(lambda: torch.rand(1)), "delta", "global_state", "generator of torch was used"),
    "draws from numpy": (draws(lambda: np.random.rand()), "delta", "global_state", "generator of numpy was used"),  # noqa: NPY002
    "draws from Python": (draws(lambda: random.random()), "delta", "global_state", "generator of Python was used"),
    "not reproducible": (lambda b, p: summed(b) * torch.rand(1, dtype=b.x.dtype), "delta", "seed", "one seed twice"),
    "undeclared randomness": (keyed, "delta", "seed", "randomised is declared False, and the results differ"),
    "depends on the cut": (by_row, "delta", "row_blocks", "differs by"),
    "draws per block": (unkeyed, "delta", "row_blocks", "blocks of 1 rows"),
    "remembers (work)": (counts_calls(), "delta", "order_of_work", "modules in the opposite order"),
    "remembers (files)": (counts_calls(), "core", "workers", "adapter_model.safetensors differs from that of 1 worker"),
    "an index is a name": (by_place, "delta", "order_of_adapters", "opposite order"),
    "absolute threshold": (lambda b, p: summed(b) * (summed(b).abs() > 1e-5), "core", "scale", "c = 1e-14"),
    "prefers plus": (prefers_plus, "delta", "sign", "all adapters negated"),
    "not the adapter": (lambda b, p: summed(b) * 0.5, "delta", "lone_adapter", "differs by"),
    "divides by differences": (divides_by_differences, "core", "shared_init", "one A, B apart by 1e-06"),
    "copies add up": (lambda b, p: b.x.sum(0), "delta", "copies", "3 copies of weight 0.333"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault) -> None:
    combine, space, row, text = FAULTS[fault]
    subject = subject_of(elementwise(combine), identity={}, copies="sum")
    with pytest.raises(AssertionError) as caught:
        check_property(subject, space, row)
    assert f"in space '{space}' breaks '{row}'" in str(caught.value)
    assert text in str(caught.value)


def test_a_gauge_is_felt_where_factors_are_merged_apart() -> None:
    with pytest.raises(AssertionError, match="a random G"):
        CONTRACT["gauge"].check(subject_of("linear"), "factors")


def test_a_rank_that_is_taken_for_the_delta_is_found() -> None:
    """How many columns B has says how it was written, not what it means."""

    class Combined(DeltaCombine):
        def combine(self, site):
            return LowRank.concatenate(site.weighted(), [1 / d.rank for d in site.deltas])

    preset = Preset(
        name="ours",
        summary="s",
        equation="e",
        params=NoParams,
        source=SOURCE,
        spaces=("core",),
        combines="deltas",
        stages=lambda params: Pipeline(Combined()),
    )
    with pytest.raises(AssertionError, match=r"breaks 'factored' .*: B = ΔW, A = I: model\.layers\.0\.proj differs"):
        check_property(subject_of(preset), "core", "factored")
    check_property(subject_of(preset), "core", "gauge")


def test_squares_in_float32_are_found() -> None:
    """What plait gives is wide enough; a method that makes it narrow again is not."""

    def shares(block, params):
        energy = block.x.float().square().sum((1, 2))
        return summed(block) * (energy / energy.sum()).max().to(block.x.dtype)

    with pytest.raises(AssertionError, match=r"breaks 'extremes' .*: deltas of 1e30: model\.layers\.0\.proj differs by nan"):
        check_property(subject_of(elementwise(shares)), "delta", "extremes")
    check_property(subject_of(GOOD), "delta", "extremes")


def test_undone_randomness_is_found() -> None:
    """Declared, but not there: the run record would lie."""
    subject = subject_of(replace(GOOD, randomised=True))
    with pytest.raises(AssertionError, match="randomised is declared True, and the results are equal"):
        check_property(subject, "delta", "seed")


def test_a_preset_that_hides_something_is_found() -> None:
    """Its stage is printed, and spelled in recipes, as another one."""

    class Doubled(Sum):
        def coefficients(self, weights, module):
            return 2 * weights

    def preset(stage) -> Preset:
        return Preset(
            name="ours",
            summary="s",
            equation="e",
            params=NoParams,
            source=SOURCE,
            spaces=("delta", "core", "knots"),
            stages=lambda params: Pipeline(stage),
        )

    with pytest.raises(AssertionError, match=r"breaks 'spelled' .*: sum: model\.layers\.0\.proj differs"):
        check_property(subject_of(preset(Doubled())), "core", "spelled")
    check_property(subject_of(preset(Sum())), "core", "spelled")


def test_true_randomness_passes() -> None:
    check_method(elementwise(keyed, randomised=True), spaces=["delta", "core"])


def test_a_survey_that_depends_on_the_cut_is_found() -> None:
    subject = subject_of(elementwise(above_mean, surveys=inexact_total))
    with pytest.raises(AssertionError, match="blocks of 1 rows"):
        check_property(subject, "delta", "row_blocks")


def test_a_linear_method_that_looks_at_places_is_found() -> None:
    def first(weights, params, module):
        return weights * torch.tensor([1.0] + [0.5] * (len(weights) - 1), dtype=weights.dtype)

    method = LinearMethod(name="ours", summary="s", equation="e", params=NoParams, source=SOURCE, coefficients=first)
    with pytest.raises(AssertionError, match="breaks 'order_of_adapters'"):
        check_property(subject_of(method), "delta", "order_of_adapters")
    check_method(method, by_position=True)


@every(
    ("params", "text"),
    [
        (Undescribed, "density has no description"),
        (Unbounded, "factor is a number without bounds"),
        (FreeText, "mode takes any text"),
        (BadDefault, "the defaults are refused"),
        (Steps, "steps is an integer without two bounds"),
        (Nested, "coefficients is a number without bounds"),
    ],
)
def test_bad_parameters_are_found(params, text) -> None:
    subject = subject_of(replace(GOOD, params=params))
    with pytest.raises(AssertionError, match=text):
        check_property(subject, "delta", "parameters")


def test_good_parameters_pass() -> None:
    for params in (Checked, NoParams):
        check_property(subject_of(replace(GOOD, params=params)), "delta", "parameters")


def test_parameters_without_a_default_get_an_example() -> None:
    class Required(MethodParams):
        share: Annotated[float, Field(alias="lambda", ge=0, le=1, description="Share.")]
        mode: Annotated[Literal["a", "b"], Field(description="Mode.")]
        steps: Annotated[int, Field(ge=0, le=10, description="Steps.")]
        fast: Annotated[bool, Field(description="Fast.")]
        shown: Annotated[float, Field(description="Any.", examples=[7.0], allow_inf_nan=False)]

    subject = subject_of(replace(GOOD, params=Required))
    assert subject.params == {"lambda": 0.3, "mode": "a", "steps": 3, "fast": True, "shown": 7.0}
    assert subject_of(replace(GOOD, params=Required), {"lambda": 0.9}).params["lambda"] == 0.9
    check_property(subject, "delta", "zero")


def test_a_parameter_that_cannot_be_guessed_is_asked_for() -> None:
    class Required(MethodParams):
        factor: Annotated[float, Field(description="Any.", allow_inf_nan=False)]

    with pytest.raises(ValueError, match=r"'factor' has no default; give it an example .*params=\{'factor': …\}"):
        subject_of(replace(GOOD, params=Required))


def test_rows_say_what_they_are() -> None:
    for name, row in CONTRACT.items():
        assert row.name == name
        assert row.about.endswith(".")
        assert "\n" not in row.about
