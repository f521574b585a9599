"""What a tuning reads, learns from and steps by, on a small language model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.adapters import Adapter
from plait.calibration.texts import Texts
from plait.errors import PlanError
from plait.mixture import Mixture
from plait.recipes.tuning import TuneSpec
from plait.tasks.examples import Examples
from plait.tasks.inputs import Example
from plait.tasks.loading import load_tasks
from plait.tuning.held_out import (
    HeldOutScore,
    SplitLessons,
    evaluate_held_out,
    split_off,
    text_losses,
    with_references,
)
from plait.tuning.learners import CoefficientLearner
from plait.tuning.learning import run_loop
from plait.tuning.objectives import OBJECTIVES
from plait.tuning.teaching import Lesson, make_lesson
from tests.language_models import LABELS, WORDS, label, language_model, tokenizer, train_adapter, write_task
from tests.tuned import SPEC, literal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lessons")
    for task in LABELS:
        train_adapter(folder / task, task)
        write_task(folder, task, splits={"test": "test.jsonl"}, labels=[f"{LABELS[task][0]} very", LABELS[task][1]])
    return folder


@pytest.fixture
def mixture(place: Path) -> Mixture:
    return Mixture(language_model(), [Adapter.open(place / t, t) for t in LABELS], tokenizer())


def lesson(mixture: Mixture, place: Path, task: str, *, labeled: bool) -> Lesson:
    (found,) = load_tasks([str(place / f"{task}.yaml")])
    choices = (f"{LABELS[task][0]} very", LABELS[task][1])  # one of two tokens
    asked = tuple(Example.of(f"{task} {w} :", "", choices) for w in WORDS)
    texts = Texts(found, "split", "x", Examples(found, "x", asked))  # type: ignore[arg-type]
    right = [choices[LABELS[task].index(label(task, w))] for w in WORDS] if labeled else None
    return make_lesson(mixture, texts, task, right=right)


def test_the_loss_is_the_models_own_shifted_cross_entropy(mixture: Mixture, place: Path) -> None:
    found = lesson(mixture, place, "sort", labeled=True)
    assert {len(p.answer) for p in found.passages} == {1, 2}
    every = range(len(found.passages))
    got = text_losses(found, lambda: mixture.active({"rate": 0.5}), OBJECTIVES["gradient"], SPEC, every)
    for shift in (1, 0):
        wanted = {}
        for i in every:
            log_p, tokens = literal(mixture, {"rate": 0.5}, found.passages[i], shift=shift)
            wanted[i] = (-float(log_p.gather(1, tokens.unsqueeze(1)).sum()), len(tokens))
        near = all(got[i] == (pytest.approx(wanted[i][0], abs=1e-4), wanted[i][1]) for i in every)
        assert near == (shift == 1)  # a loss that is not shifted is another


def test_the_teacher_is_the_tasks_own_adapter(mixture: Mixture, place: Path) -> None:
    found = lesson(mixture, place, "rate", labeled=False)
    some = list(range(6))
    with mixture.active({"sort": 0.3}) as model, torch.no_grad():
        got = OBJECTIVES["distill"].loss(found.outputs(model, some), SPEC)
    for teacher in ("rate", "sort"):
        rows = []
        for i in some:
            p, _ = literal(mixture, {teacher: 1.0}, found.passages[i])
            q, _ = literal(mixture, {"sort": 0.3}, found.passages[i])
            rows += (p.exp() * (p - q)).sum(-1).tolist()
        assert (got.tolist() == pytest.approx(rows, abs=1e-4)) == (teacher == "rate")  # another teacher is another loss


def test_the_own_adapter_reads_every_text_once(mixture: Mixture, place: Path) -> None:
    lesson(mixture, place, "rate", labeled=False)  # whether rows can be packed is tried once
    read: list[int] = []
    note = lambda _, given, keywords: read.append(keywords["input_ids"].numel())  # noqa: E731
    hook = mixture.model.register_forward_pre_hook(note, with_kwargs=True)
    found = lesson(mixture, place, "rate", labeled=False)
    hook.remove()
    assert sum(read) <= sum(
        p.tokens for p in found.passages
    )  # labels begin differently; no more than their first token is read
    assert len(read) == -(-len(WORDS) // 16)


def test_answers_of_one_and_of_two_passes_are_the_same(mixture: Mixture, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = lesson(mixture, place, "rate", labeled=False)
    monkeypatch.setattr("plait.calibration.teachers.likeliest_answers", lambda *args, **more: None)
    two = lesson(mixture, place, "rate", labeled=False)
    assert one.passages == two.passages
    assert one.labels == two.labels
    torch.testing.assert_close(one.answers.log_p, two.answers.log_p, rtol=1e-4, atol=1e-4)


def test_labels_are_not_in_lessons_that_read_none(mixture: Mixture, place: Path) -> None:
    found = lesson(mixture, place, "rate", labeled=False)
    with mixture.active(None) as model, torch.no_grad():
        answers = found.outputs(model, [0, 1, 2])
    assert answers.targets is None
    tokens = tokenizer().convert_tokens_to_ids(LABELS["rate"])
    assert answers.labels is not None
    assert answers.labels.tolist() == [tokens] * 3  # those that the task offers
    assert found.targets == ()


def test_hidden_states_are_those_behind_every_layer(mixture: Mixture, place: Path) -> None:
    found = lesson(mixture, place, "sort", labeled=True)
    with mixture.active({"sort": 1.0}) as model:
        states = found.states(model, [3, 20])
        with torch.no_grad():
            at = 0
            for i in (3, 20):
                p = found.passages[i]
                out = model(input_ids=torch.tensor([[*p.prompt, *p.answer]]), output_hidden_states=True).hidden_states[1:]
                for got, layer in zip(states, out, strict=True):
                    part = layer[0, len(p.prompt) - 1 : len(p.prompt) - 1 + len(p.answer)]
                    torch.testing.assert_close(got[at : at + len(p.answer)], part, rtol=1e-4, atol=1e-4)
                at += len(p.answer)


def ready(mixture: Mixture, place: Path, spec: TuneSpec) -> tuple[CoefficientLearner, SplitLessons]:
    labeled = OBJECTIVES[spec.objective].needs == "labels"
    taught = split_off([lesson(mixture, place, t, labeled=labeled) for t in LABELS], share=0, most=8, seed=0)
    deltas = {}
    for t in LABELS:
        a = Adapter.open(place / t, t)
        deltas[t] = {path: [s.scaled(e.scaling) for s in a.read(path)] for path, e in a.targets.items()}
    columns = mixture.columns(deltas)
    start = torch.full(columns.axes.shape(spec.used_granularity), 0.4)
    return CoefficientLearner(mixture, columns, spec.used_granularity, start, spec), with_references(mixture, taught, spec)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_a_step_is_the_same_in_several_passes(
    mixture: Mixture, place: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fewer texts each, or with every task in a pass of its own."""
    from plait.tuning import learning

    found = []
    for prompts, accumulate, tokens in ((8, 1, 10**6), (2, 4, 10**6), (8, 1, 1)):
        monkeypatch.setattr(learning, "_TOKENS", tokens)
        spec = SPEC.model_copy(update={"prompts": prompts, "accumulate": accumulate, "objective": objective, "steps": 1})
        learner, taught = ready(mixture, place, spec)
        run = run_loop(
            mixture,
            learner,
            taught,
            spec.model_copy(update={"restore_best": False}),
            evaluate_held_out(learner, taught, 0, spec),
        )
        found.append((run.losses[0], learner.values().detach()))
    for loss, values in found[1:]:
        assert found[0][0] == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(found[0][1], values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_the_gradient_is_that_of_finite_differences(mixture: Mixture, place: Path, objective: str) -> None:
    """Of J itself, its task weights included, at task granularity, through the model."""
    from plait.tuning import learning

    spec = SPEC.model_copy(update={"objective": objective, "granularity": "task", "clip": None, "prompts": 24, "link": "raw"})
    double = Mixture(language_model().double(), [Adapter.open(place / t, t) for t in LABELS], tokenizer())
    learner, taught = ready(double, place, spec)

    def value() -> float:
        frozen = torch.optim.SGD(learner.parameters(), lr=0.0)
        return learning._step(double, learner, taught, spec, 1, frozen)

    value()
    u = learner.named()["u"]
    assert u.grad is not None
    gradient = u.grad.clone()
    for i in range(2):
        u.data[i] += 1e-2
        up = value()
        u.data[i] -= 2e-2
        down = value()
        u.data[i] += 1e-2
        assert float(gradient[i]) == pytest.approx((up - down) / 2e-2, rel=2e-2, abs=1e-4)


def test_activations_that_are_computed_again_change_nothing(mixture: Mixture, place: Path) -> None:
    found = []
    for again in (False, True):
        spec = SPEC.model_copy(update={"checkpointing": again, "steps": 3, "restore_best": False})
        learner, taught = ready(mixture, place, spec)
        run_loop(mixture, learner, taught, spec, evaluate_held_out(learner, taught, 0, spec))
        found.append(learner.values().detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert not any(m.training for m in mixture.model.modules())


def test_products_of_another_dtype_are_near(mixture: Mixture, place: Path) -> None:
    losses = {}
    for dtype in ("auto", "float32", "bfloat16"):
        spec = SPEC.model_copy(update={"compute_dtype": dtype, "steps": 1})
        learner, taught = ready(mixture, place, spec)
        losses[dtype] = run_loop(mixture, learner, taught, spec, evaluate_held_out(learner, taught, 0, spec)).losses[0]
    assert losses["auto"] == losses["float32"]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)


def test_patience_counts_looks_and_threshold_and_warm_up_hold(mixture: Mixture, place: Path) -> None:
    def steps(**changes: Any) -> int:
        spec = SPEC.model_copy(
            update={"steps": 12, "look_every": 1, "min_steps": 0, "stop_warmup": 0, "threshold": 10.0, **changes}
        )
        learner, taught = ready(mixture, place, spec)
        return run_loop(mixture, learner, taught, spec, evaluate_held_out(learner, taught, 0, spec)).step

    assert steps() == 12  # never
    assert steps(patience=2) == 2
    assert steps(patience=2, look_every=3) == 6
    assert steps(patience=2, min_steps=7) == 7
    assert steps(patience=2, stop_warmup=4) == 6
    assert steps(patience=2, threshold=0.0) > 2


@pytest.mark.parametrize(
    ("tolerance", "criterion", "start", "step"),
    [
        (1.0, "worst", 0.0, 3),
        (0.0, "worst", 0.0, 2),
        (1e9, "worst", 0.0, 4),
        (1e9, "worst", 0.75, 3),
        (1.0, "worst", 0.7995, 2),
        (1.0, "hypervolume", 0.0, 2),
    ],
)
def test_the_last_look_that_is_not_clearly_worse_is_kept(
    mixture: Mixture, place: Path, tolerance: float, criterion: str, start: float, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third is .001 below the best where texts differ by .1, the fourth .1; none that is below the start is kept."""
    from plait.tuning import learning

    noise = torch.linspace(-0.1, 0.1, 20).tolist()
    shown = {1: [0.5] * 20, 2: [0.8 + x for x in noise], 3: [0.799 - x for x in noise], 4: [0.7 - x for x in noise]}
    values: dict[int, torch.Tensor] = {}

    def look(learner: CoefficientLearner, taught: SplitLessons, at: int, *of: Any) -> HeldOutScore:
        values[at] = learner.values().detach().clone()
        texts = {"sort": tuple((x, 1) for x in shown[at]), "rate": ((0.9, 1), (0.95, 2))}
        score = sum(shown[at]) / 20
        return HeldOutScore(step=at, divergence={"sort": 1 - score}, share=0.1, score=score, texts=texts)

    monkeypatch.setattr(learning, "evaluate_held_out", look)
    changes = {"steps": 4, "look_every": 1, "tolerance": tolerance, "criterion": criterion}
    spec = SPEC.model_copy(update=changes)
    learner, taught = ready(mixture, place, spec)
    shown[0] = [start] * 20
    run = run_loop(mixture, learner, taught, spec, look(learner, taught, 0))
    assert (run.best.step, run.kept.step) == (2, step)
    assert torch.equal(learner.values().detach(), values[step])


def test_an_objective_that_is_no_number_stops(mixture: Mixture, place: Path) -> None:
    spec = SPEC.model_copy(update={"steps": 3, "learning_rate": 1.0})
    learner, taught = ready(mixture, place, spec)
    with torch.no_grad():
        learner.named()["u"].fill_(math.nan)
    with pytest.raises(PlanError, match="learning_rate"):
        run_loop(mixture, learner, taught, spec, HeldOutScore(step=0, divergence={}, share=1.0))


def test_an_adapter_that_is_nearly_the_base_does_not_decide(mixture: Mixture, place: Path) -> None:
    learner, taught = ready(mixture, place, SPEC)
    first = taught.lessons[0]
    taught = replace(taught, base={**taught.base, first.task: 1e-9})
    found = evaluate_held_out(learner, taught, 0, SPEC)
    assert found.kept[first.task] == pytest.approx(1 - found.divergence[first.task] / 0.01)


def test_what_is_kept_is_compared_with_the_base_on_the_same_texts(mixture: Mixture, place: Path) -> None:
    taught = split_off([lesson(mixture, place, t, labeled=False) for t in LABELS], share=0.25, most=5, seed=1)
    taught = with_references(mixture, taught, SPEC)
    assert {len(h) for h in taught.held.values()} == {5}
    for one in taught.lessons:
        with mixture.active(None) as model:
            assert taught.base[one.task] == one.divergence(model, taught.held[one.task])
            assert taught.base[one.task] != pytest.approx(one.divergence(model, range(len(one.passages))), rel=1e-3)


def test_without_headroom_there_is_nothing_to_regret(mixture: Mixture, place: Path) -> None:
    spec = SPEC.model_copy(update={"objective": "regret_smoothmax", "regret_eps": 100.0})
    with pytest.raises(PlanError, match="no adapter has a smaller loss"):
        ready(mixture, place, spec)


def test_labels_judge_where_they_are_read(mixture: Mixture, place: Path) -> None:
    spec = SPEC.model_copy(update={"objective": "gradient", "judge": "loss", "granularity": "task", "link": "raw"})
    learner, taught = ready(mixture, place, spec)
    with torch.no_grad():
        learner.named()["u"].copy_(torch.tensor([1.0, 0.0]))
    kept = evaluate_held_out(learner, taught, 0, spec).kept
    assert kept["sort"] == pytest.approx(1.0, abs=1e-3)
    with torch.no_grad():
        learner.named()["u"].zero_()
    assert evaluate_held_out(learner, taught, 0, spec).kept["sort"] == pytest.approx(0.0, abs=1e-3)
