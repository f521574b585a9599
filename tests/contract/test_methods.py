"""Every method × every space × every property of the contract."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from plait.methods import METHODS, LinearMethod, Preset
from plait.stages import STAGES, StageParams
from plait.testing import CONTRACT, check_method, cohort, subject_of
from tests.contract.subjects import ALIASES, PROMISES, SUBJECTS, VARIANTS
from tests.every import every

# Another path through a method does not write or draw otherwise: these rows are the method's.
NOT_FOR_VARIANTS = {"parameters", "workers", "global_state"}
# Rows that no method can be excused from.
ALWAYS = {
    *("shapes", "zero", "nonzero", "inputs", "global_state", "seed", "row_blocks"),
    *("workers", "order_of_work", "scale", "recipe_scale", "missing", "rank"),
}


def spaces(label: str) -> tuple[str, ...]:
    """Variants run in one dense and in one low-rank space, as far as their stages can."""
    subject = SUBJECTS[label]
    if label not in VARIANTS:
        return subject.method.spaces
    possible = (s for s in subject.method.spaces if not subject.pipeline(s).problems(s, subject.adapters))
    return tuple(s for s in possible if s in ("delta", "core"))


# (subject, space) → the rows of the contract that it is held to
ROWS = {
    (label, space): [
        name
        for name, row in CONTRACT.items()
        if row.applies(subject, space) and not (label in VARIANTS and name in NOT_FOR_VARIANTS)
    ]
    for label, subject in SUBJECTS.items()
    for space in spaces(label)
}


@pytest.mark.parametrize(("label", "space"), ROWS)
def test_contract(label: str, space: str) -> None:
    """All rows are checked, and all that do not hold are reported."""
    check_method(SUBJECTS[label], spaces=[space], properties=ROWS[label, space])


@every(("alias", "label"), ALIASES.items())
def test_an_alias_is_the_same_pipeline(alias: str, label: str) -> None:
    """The same stages, with the same parameters, for the same adapters: what holds of the one holds of the other."""
    subject, other = subject_of(alias), SUBJECTS[label]
    method, same = subject.method, other.method
    assert type(method) is type(same)
    differing = {f.name for f in fields(method) if getattr(method, f.name) != getattr(same, f.name)}
    # `stages`, `coefficients`, `check`, `layers`, `randomised` and the numbers of adapters are then the same objects
    assert differing <= {"name", "summary", "equation", "source", "deviation", "spaces", "auto_rank", "params", "sequential"}
    assert set(method.spaces) <= {space for of, space in ROWS if of == label}
    if isinstance(method, LinearMethod):  # one stage: the method's own function and parameters
        assert subject.params == other.params
    else:
        assert all(subject.pipeline(space) == other.pipeline(space) for space in method.spaces)
    if "params" in differing:  # other defaults
        assert issubclass(method.params, same.params)
        check_method(subject, properties=["parameters"])
    if "auto_rank" in differing:  # what is written
        check_method(subject, properties=["shapes", "workers", "rank"])


def test_every_registered_method_is_under_contract() -> None:
    assert {subject.method.name for subject in SUBJECTS.values()} == set(METHODS) - set(ALIASES)
    assert set(PROMISES) | set(ALIASES) <= set(METHODS)


def test_every_stage_is_under_contract() -> None:
    pipelines = [subject.pipeline(space) for label, subject in SUBJECTS.items() for space in spaces(label)]
    used = {stage.spelled() for p in pipelines for stage in p.stages if isinstance(stage, StageParams)}
    assert used == set(STAGES) - {"cutoff"}, "an absolute threshold keeps no `scale`; tests/reference/test_consensus.py has it"


# What keeps entries by size, or as many directions as it finds, may come out below its bound.
UP_TO = {"star", "star-most", "dc_merge", "dc_merge-share", "iso_c-effective", "iso_cts-specific"}


RANKED = [label for label, s in SUBJECTS.items() if s.method.kind != "entries" or label.startswith("pipeline-")]


@pytest.mark.parametrize("label", [label for label in RANKED if label not in UP_TO])
def test_the_rank_that_is_promised_is_reached(label) -> None:
    """Where there is room for all ranks: a bound that is too high would cost memory and `max_lora_rank`."""
    subject, adapters = SUBJECTS[label], cohort([(24, 20)], [2, 1, 3][: SUBJECTS[label].adapters])
    run = subject.prepare(adapters, subject.recipe(adapters, spaces(label)[0]))
    (module,), (merged,) = run.plan.modules, run.deltas().values()
    assert torch.linalg.matrix_rank(merged, rtol=1e-9) == module.exact_rank


def test_no_row_is_lost() -> None:
    """Parametrization shrinks in silence: the rows are counted from the outside."""
    covered = {key: set(names) for key, names in ROWS.items()}
    for (label, space), names in covered.items():
        needed = ALWAYS - NOT_FOR_VARIANTS if label in VARIANTS else ALWAYS
        assert names >= needed, f"{label} in {space} lacks {needed - names}"
        assert ("gauge" in names) == (space != "factors")
        assert ("factored" in names) == (space != "factors")
    covered = {key: names for key, names in covered.items() if key[0] in {*PROMISES, *VARIANTS}}
    assert {name for _, names in covered.items() for name in names} == set(CONTRACT)
    excused = {label for (label, _), names in covered.items() if "order_of_adapters" not in names}
    assert excused == {"weighted", "weighted_delta_n-layers"}
    assert {label for (label, _), names in covered.items() if "sign" not in names} == {"ties-heads-plus"}
    alone = {label for (label, _), names in covered.items() if "lone_adapter" in names}
    promising = {label for label, _ in covered if SUBJECTS[label].identity is not None}
    assert alone == {label for label in promising if SUBJECTS[label].method.min_adapters == 1}
    copied = {label for label in promising if SUBJECTS[label].copies is not None}
    assert all(("copies" in names) == (label in copied) for (label, space), names in covered.items() if space != "factors")
    assert len(promising) > 25
    assert all("shared_init" in names for (_, space), names in covered.items() if space != "factors")
    presets = {label for label, _ in covered if isinstance(SUBJECTS[label].method, Preset)}
    assert {label for (label, _), names in covered.items() if "spelled" in names} == presets
    assert len(CONTRACT) == 24
