"""Objectives, links, samplers, criteria, schedules and trees of `plait tune`, each against a literal reading in float64."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.adapters.lowrank import LowRank
from plait.calibration.teachers import keep_distributions
from plait.errors import PlanError
from plait.linalg.blocks import RowBlocks
from plait.mixture import Mixture
from plait.recipes.tuning import TuneSpec
from plait.tuning.held_out import split_off
from plait.tuning.hierarchy import levels, similarity
from plait.tuning.learners import CoefficientLearner
from plait.tuning.learning import learning_rate
from plait.tuning.links import LINKS, normalized
from plait.tuning.objectives import (
    OBJECTIVES,
    BatchOutputs,
    ReferenceLosses,
    regret_weights,
    regrets,
    smooth_maximum,
    task_weights,
)
from plait.tuning.sampling import class_weight, draw_texts
from plait.tuning.selection import CRITERIA, hypervolume, selection_score
from tests.every import every
from tests.mixtures import IDS, PLAIN, cohort, dense_output, opened
from tests.small_models import net
from tests.tuned import SPEC

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("granularity", ["task", "layer", "module"])
def test_columns_act_as_the_dense_merge_and_so_do_their_gradients(tmp_path: Path, granularity: Any) -> None:
    written = cohort(tmp_path, {name: PLAIN for name in "abc"})
    mixture = Mixture(net().double(), opened(written))
    deltas = {
        a.name: {t: [s.scaled(e.scaling) for s in a.read(t, torch.float64)] for t, e in a.targets.items()}
        for a in opened(written)
    }
    columns = mixture.columns(deltas)
    torch.manual_seed(0)
    values = torch.randn(columns.axes.shape(granularity), dtype=torch.float64, requires_grad=True)
    with mixture.combined(columns, values, granularity) as model:
        message = model(IDS)
        message.square().sum().backward()
    free = values.detach().clone().requires_grad_()
    rows = dict(zip(columns.deltas, columns.row_of_module().tolist(), strict=True))
    at = {"task": lambda p: free, "layer": lambda p: free[rows[p]], "module": lambda p: free[list(rows).index(p)]}[granularity]
    wanted = dense_output(written, lambda name, path: at(path)["abc".index(name)])
    wanted.square().sum().backward()
    torch.testing.assert_close(message.detach(), wanted.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(values.grad, free.grad, rtol=1e-8, atol=1e-8)


def test_coefficients_per_direction_have_the_gradients_of_the_singular_directions(tmp_path: Path) -> None:
    written = cohort(tmp_path, {name: {"layers.0.q_proj": PLAIN["layers.0.q_proj"]} for name in "ab"})
    mixture = Mixture(net().double(), opened(written))
    deltas = {
        a.name: {t: [s.scaled(e.scaling) for s in a.read(t, torch.float64)] for t, e in a.targets.items()}
        for a in opened(written)
    }
    columns = mixture.columns(deltas, factors="canonical")
    values = torch.linspace(-1, 1, 5, dtype=torch.float64).reshape(1, 5).requires_grad_()
    with mixture.combined(columns, values, "direction") as model:
        model(IDS).square().sum().backward()
    free = values.detach().clone().requires_grad_()
    parts = []
    for name in "ab":
        u, s, v = torch.linalg.svd(torch.tensor(written[name].deltas["layers.0.q_proj"], dtype=torch.float64))
        parts += [s[i] * torch.outer(u[:, i], v[i]) for i in range(2 if name == "a" else 3)]
    total = sum(free[0, i] * part for i, part in enumerate(parts))
    base = net().double()
    weights = {**dict(base.named_parameters()), "layers.0.q_proj.weight": base.get_parameter("layers.0.q_proj.weight") + total}
    torch.func.functional_call(base, weights, (IDS,)).square().sum().backward()
    torch.testing.assert_close(values.grad, free.grad, rtol=1e-8, atol=1e-8)
    (merged,) = columns.merged(values, "direction")["layers.0.q_proj"]
    torch.testing.assert_close(merged.dense(), total.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("granularity", ["task", "layer", "module", "direction"])
def test_what_acts_with_coefficients_can_be_taken_out(tmp_path: Path, granularity: Any) -> None:
    written = cohort(tmp_path, {name: PLAIN for name in "ab"})
    mixture = Mixture(net().double(), opened(written), factors="canonical")
    torch.manual_seed(0)
    values = torch.randn(mixture.axes.shape(granularity), dtype=torch.float64)
    with mixture.mixed(values, granularity) as model, torch.no_grad():
        message = model(IDS).clone()
    with mixture.attached(mixture.merged(values, granularity)) as model, torch.no_grad():
        torch.testing.assert_close(model(IDS), message, rtol=1e-9, atol=1e-9)


def test_dense_columns_are_refused(tmp_path: Path) -> None:
    mixture = Mixture(net(), opened(cohort(tmp_path, {"a": {"head": PLAIN["head"]}})))
    with pytest.raises(PlanError, match="only the factors of a low-rank delta can be combined"):
        mixture.columns({"x": {"head": [RowBlocks((4, 6), lambda start, stop: torch.zeros(stop - start, 6), torch.float32)]}})


def message(**changes: Any) -> BatchOutputs:
    torch.manual_seed(1)
    return replace(BatchOutputs(torch.randn(5, 7), torch.tensor([0, 2, 3]), targets=torch.tensor([1, 6, 0, 3, 3])), **changes)


def softmax(row: Tensor) -> list[float]:
    raised = [math.exp(float(x)) for x in row.double()]
    return [r / sum(raised) for r in raised]


def close(found: Tensor, wanted: list[float]) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_distill() -> None:
    torch.manual_seed(2)
    own = 3 * torch.randn(5, 30)
    found = message(logits=torch.randn(5, 30), teacher=keep_distributions(own, positions=5))
    plain = [
        sum(p * math.log(p / q) for p, q in zip(softmax(a), softmax(b), strict=True))
        for a, b in zip(own, found.logits, strict=True)
    ]
    close(OBJECTIVES["distill"].loss(found, SPEC), plain)  # of coefficients
    softened = []
    for a, b in zip(own, found.logits, strict=True):
        at = a.argsort(descending=True)[:16]
        rows = (softmax(a[at] / 2), softmax(b[at] / 2))
        softened.append(4 * sum(p * math.log(p / q) for p, q in zip(*rows, strict=True)))
    for spec, weight in ((SPEC.model_copy(update={"soft_weight": 0.5}), 0.5), (TuneSpec(train="factors"), 1.0)):
        wanted = [a + weight * b for a, b in zip(plain, softened, strict=True)]
        close(OBJECTIVES["distill"].loss(found, spec.model_copy(update={"soft_temperature": 2.0})), wanted)


def test_cross_entropy() -> None:
    found = message()
    rows = [softmax(r) for r in found.logits]
    plain = [-math.log(p[y]) for p, y in zip(rows, [1, 6, 0, 3, 3], strict=True)]
    close(OBJECTIVES["gradient"].loss(found, SPEC), plain)
    smooth = [0.9 * own + 0.1 * sum(-math.log(q) for q in p) / 7 for own, p in zip(plain, rows, strict=True)]
    close(OBJECTIVES["supermerge"].loss(found, SPEC.model_copy(update={"label_smoothing": 0.1})), smooth)


def test_entropy() -> None:
    labels = torch.tensor([[2, 5, -1], [0, 1, 4], [3, 6, 2]])
    found = message(labels=labels)
    for over, chosen in {"labels": [[2, 5], [0, 1, 4], [3, 6, 2]], "vocabulary": [range(7)] * 3}.items():
        spec = SPEC.model_copy(update={"entropy_over": over, "entropy_temperature": 2.0})
        rows = [softmax(found.logits[i][list(c)] / 2.0) for i, c in zip([0, 2, 3], chosen, strict=True)]
        close(OBJECTIVES["adamerging"].loss(found, spec), [-sum(p * math.log(p) for p in row) for row in rows])


def test_the_entropy_of_missing_labels_has_gradients() -> None:
    found = message(labels=torch.tensor([[2, 5, -1], [0, 1, 4], [3, 6, 2]]))
    logits = found.logits.requires_grad_()
    OBJECTIVES["adamerging"].loss(found, SPEC).sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_hidden() -> None:
    torch.manual_seed(2)
    h, w = ([torch.randn(5, 3) for _ in range(2)] for _ in range(2))
    found = message(hidden=tuple(h), wanted=tuple(w))
    literal = [
        sum(float((a[i] - b[i]).double().square().sum() / b[i].double().square().sum()) for a, b in zip(h, w, strict=True)) / 2
        for i in range(5)
    ]
    close(OBJECTIVES["hidden"].loss(found, SPEC), literal)


def test_task_weights() -> None:
    losses, references = {"a": 0.0, "b": 0.0}, ReferenceLosses({}, {"a": 0.5, "b": 4.0})
    assert task_weights(losses, references, SPEC) == {"a": 0.5, "b": 0.5}

    def given(**changes: Any) -> dict[str, float]:
        return task_weights(losses, references, SPEC.model_copy(update=changes))

    assert given(task_weights={"a": 1.0, "b": 3.0}) == {"a": 0.25, "b": 0.75}
    assert given(task_weights="baseline_normalized") == {"a": 1.0, "b": 0.125}
    assert given(task_weights="baseline_normalized", weight_cap=0.6) == {"a": 0.6, "b": 0.125}
    assert given(task_weights="baseline_normalized", baseline_floor=10.0) == {"a": 0.05, "b": 0.05}
    assert given(task_weights={"a": 1.0, "b": 1.0, "c": 2.0}) == {"a": 0.5, "b": 0.5}  # a group of a tree
    assert given(task_weights={"a": 0.0, "b": 0.0, "c": 2.0}) == {"a": 0.0, "b": 0.0}


def test_the_weights_of_regrets_are_the_gradient_of_their_smooth_maximum() -> None:
    spec = SPEC.model_copy(update={"tau": 0.1, "regret_eps": 1e-4})
    own, references = (
        {"a": 0.2, "b": 0.1, "c": 1.0},
        ReferenceLosses({"a": 2.0, "b": 0.6, "c": 0.9}, {"a": 0.3, "b": 0.1, "c": 1.0}),
    )
    losses = torch.tensor([0.9, 0.4, 3.0], dtype=torch.float64, requires_grad=True)
    r = [(losses[0] - 0.2) / (1.7 + 1e-4), (losses[1] - 0.1) / (0.5 + 1e-4)]  # c has no headroom
    value = 0.1 * torch.logsumexp(torch.stack(r) / 0.1, 0)
    value.backward()
    plain = dict(zip("abc", losses.tolist(), strict=True))
    found = regrets(plain, own, references, spec)
    assert smooth_maximum(list(found.values()), 0.1) == pytest.approx(float(value.detach()))
    weights = regret_weights(plain, own, references, spec)
    assert losses.grad is not None
    assert list(weights.values()) == pytest.approx(losses.grad.tolist())


@every("name", sorted(LINKS))
def test_links_begin_where_they_are_told(name: str) -> None:
    values = torch.tensor([[0.3, 0.2], [0.6, 0.1]])
    link = LINKS[name](SPEC)
    found = link.values(link.begin(values))
    shares = values / values.sum(-1, keepdim=True)
    torch.testing.assert_close(found, shares if name == "softmax" else values, rtol=1e-4, atol=1e-5)


def test_links_hold_their_bounds() -> None:
    for name, low, high in (("sigmoid", 0.0, 1.0), ("tanh", -1.0, 1.0)):
        link = LINKS[name](SPEC)
        found = link.values({"u": torch.tensor([-3.0, 3.0])})
        assert low < float(found[0]) < float(found[1]) < high
        wanted = {"sigmoid": 1 / (1 + math.exp(-3.0)), "tanh": math.tanh(3.0)}[name]
        assert float(found[1]) == pytest.approx(wanted)
    spec = SPEC.model_copy(update={"lowest": -0.5, "highest": 0.25})
    u = {"u": torch.tensor([-3.0, 0.1, 3.0])}
    LINKS["projected"](spec).settle(u)
    assert u["u"].tolist() == pytest.approx([-0.5, 0.1, 0.25])


@pytest.mark.parametrize(("magnitude", "shape"), [("global", (1, 1)), ("per_layer", (2, 1)), ("per_task", (2, 3))])
def test_magnitudes(magnitude: str, shape: tuple[int, ...]) -> None:
    spec = SPEC.model_copy(update={"magnitude": magnitude, "magnitude_initial": 2.0})
    link = LINKS["simplex_scaled"](spec)
    parameters = link.begin(torch.full((2, 3), 0.3))
    assert parameters["m"].shape == shape
    torch.testing.assert_close(link.values(parameters), torch.full((2, 3), 2 / 3))
    leaves = {k: v.requires_grad_() for k, v in parameters.items()}
    LINKS["simplex_scaled"](spec.model_copy(update={"learn_magnitude": False})).values(leaves)[0, 0].backward()
    assert leaves["m"].grad is None


def test_normalized() -> None:
    torch.testing.assert_close(normalized(torch.tensor([[1.0, 3.0]])), torch.tensor([[0.25, 0.75]]))


def test_samplers() -> None:
    classes = ["a"] * 8 + ["b"] * 2
    assert class_weight("inverse", 8, 10, 2) == 1 / 8
    assert class_weight("sqrt_inverse", 9, 10, 2) == pytest.approx(1 / 3)
    assert class_weight("balanced", 8, 10, 2) == 10 / 16
    for sampler, share in {"inverse": 0.5, "balanced": 0.5, "sqrt_inverse": 2**0.5 / (8**0.5 + 2**0.5)}.items():
        counts: Counter[str] = Counter()
        for step in range(1, 401):
            counts.update(classes[i] for i in draw_texts(range(10), classes, sampler, 10, step, "k"))  # type: ignore[arg-type]
        assert counts["b"] / 4000 == pytest.approx(share, abs=0.03)
    for sampler in ("uniform", "none"):
        read = [i for step in range(1, 6) for i in draw_texts(range(10), classes, sampler, 4, step, "k")]  # type: ignore[arg-type]
        assert Counter(read) == dict.fromkeys(range(10), 2)  # all in turn
    assert draw_texts(range(10), classes, "inverse", 4, 7, "k") == draw_texts(range(10), classes, "inverse", 4, 7, "k")


def test_criteria() -> None:
    kept = [0.5, 0.8]
    assert CRITERIA["mean"](kept) == 0.65
    assert CRITERIA["worst"](kept) == 0.5
    assert CRITERIA["geometric"](kept) == pytest.approx(0.4**0.5)
    assert CRITERIA["geometric"]([-0.5, 2.0]) == -0.5
    assert CRITERIA["l2_shortfall"]([0.5, 1.4]) == pytest.approx(-((0.25 / 2) ** 0.5))


def test_the_hypervolume_is_that_of_all_looks() -> None:
    assert hypervolume([[0.5, 0.8]]) == pytest.approx(0.4)
    assert hypervolume([[-1.0, -1.0]]) == 0
    assert hypervolume([[0.5, 0.8], [0.8, 0.5]]) == pytest.approx(0.4 + 0.4 - 0.25)
    assert hypervolume([[0.5, 0.8], [0.4, 0.7], [0.5, 0.8]]) == pytest.approx(0.4)  # dominated, and twice
    for tasks in (2, 3, 4):  # by counting the cells of a fine grid
        rng = random.Random(tasks)
        points = [[rng.randrange(-1, 6) / 5 for _ in range(tasks)] for _ in range(6)]
        cells = product(range(5), repeat=tasks)
        covered = sum(any(all(5 * p > c + 0.5 for p, c in zip(point, cell, strict=True)) for point in points) for cell in cells)
        assert hypervolume(points) == pytest.approx(covered / 5**tasks)
    looks = [{"a": 0.9, "b": 0.1}, {"b": 0.5, "a": 0.5}, {"a": 0.4, "b": 0.4}]
    scores = [selection_score(look, "hypervolume", looks[:i]) for i, look in enumerate(looks)]
    assert scores == pytest.approx([0.09, 0.09 + 0.25 - 0.05, 0.29])  # the third adds nothing: the second is kept


def test_schedules() -> None:
    def rates(**changes: Any) -> list[float]:
        spec = TuneSpec(learning_rate=1.0, steps=10, **changes)
        return [learning_rate(spec, step, 10) for step in range(1, 11)]

    assert rates(schedule="constant", warmup=0) == [1.0] * 10
    assert rates(schedule="constant", warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(warmup=0) == pytest.approx([(11 - s) / 11 for s in range(1, 11)])
    cosine = rates(schedule="cosine", warmup=2)
    assert cosine[:2] == [0.5, 1.0]
    assert cosine[5] == pytest.approx(0.5 * (1 + math.cos(math.pi * 4 / 9)))


def test_trees() -> None:
    gram = torch.eye(5, dtype=torch.float64)
    for i, j, cos in ((0, 3, 0.9), (1, 4, -0.8), (0, 2, 0.1)):  # a negative cosine is a similarity too
        gram[i, j] = gram[j, i] = cos
    found = levels(similarity(gram * 4), 2)
    assert found[0] == [((0,), (3,)), ((1,), (4,))]
    assert [len(level) for level in found] == [2, 1, 1]
    assert sorted(leaf for child in found[-1][0] for leaf in child) == [0, 1, 2, 3, 4]
    assert all(len(node) <= 2 for level in found for node in level)
    assert levels(similarity(gram), 8) == [[((0,), (1,), (2,), (3,), (4,))]]


def test_grams(tmp_path: Path) -> None:
    written = cohort(tmp_path, {name: PLAIN for name in "ab"})
    mixture = Mixture(net(), opened(written))
    columns = mixture.columns(
        {a.name: {t: [s.scaled(e.scaling) for s in a.read(t)] for t, e in a.targets.items()} for a in opened(written)}
    )
    dense = {
        name: torch.cat([torch.tensor(d).double().flatten() for _, d in sorted(w.deltas.items())])
        for name, w in written.items()
    }
    wanted = torch.stack([torch.stack([dense[s] @ dense[t] for t in "ab"]) for s in "ab"])
    torch.testing.assert_close(columns.gram(), wanted, rtol=1e-4, atol=1e-5)


def test_a_node_of_a_tree_is_the_explicit_product(tmp_path: Path) -> None:
    written = cohort(tmp_path, {name: PLAIN for name in "abc"})
    mixture = Mixture(net().double(), opened(written))
    columns = mixture.columns(
        {
            a.name: {t: [s.scaled(e.scaling) for s in a.read(t, torch.float64)] for t, e in a.targets.items()}
            for a in opened(written)
        }
    )
    spec = TuneSpec(objective="supermerge", granularity="task")
    lower = torch.tensor([0.5, 0.25, 0.8])
    node = CoefficientLearner(
        mixture, columns, "task", torch.tensor([0.9, 0.6]), spec, fixed=lower, groups=torch.tensor([0, 0, 1])
    )
    torch.testing.assert_close(node.values().detach(), torch.tensor([0.45, 0.225, 0.48]), rtol=1e-5, atol=1e-6)
    with node.acting() as model, torch.no_grad():
        said_ = model(IDS)
    shares = dict(zip("abc", [0.45, 0.225, 0.48], strict=True))
    torch.testing.assert_close(said_, dense_output(written, lambda n, p: shares[n]).detach(), rtol=1e-5, atol=1e-6)


def test_exact_sums_have_the_rank_of_what_they_span() -> None:
    from plait.tuning.coefficients import needed_rank

    torch.manual_seed(0)
    b = torch.randn(9, 3)
    one, two = LowRank(torch.randn(3, 8), b), LowRank(torch.randn(3, 8), b @ torch.randn(3, 3))
    assert needed_rank({"x": (LowRank.concatenate([one, two], [1.0, 0.5]),)}) == 3


def test_fewer_than_four_held_out_texts_choose_nothing() -> None:
    """17 texts: a fifth is 3, so that all are learned from and looked at; of 18, 4 are held out."""
    for texts, held in ((8, 0), (17, 0), (18, 4), (200, 24)):
        of_task: Any = SimpleNamespace(task="sort", passages=tuple(range(texts)))
        taught = split_off([of_task], share=0.2, most=24, seed=0)
        learned, looked_at = set(taught.learn["sort"]), set(taught.held["sort"])
        assert learned | looked_at == set(range(texts))
        assert len(learned) == texts - held
        assert len(looked_at) == (held or texts)
        assert bool(learned & looked_at) == (held == 0)
