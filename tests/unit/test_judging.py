"""Races: which part is asked next, when a candidate is stopped, how seldom that is wrong, and what it saves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from plait.recipes.search import SearchSpec
from plait.search.judging import Judged, _parts, _TaskParts, cannot_win, estimate, shares_of
from plait.tasks.answers import Answer
from plait.tasks.metrics import METRICS

COUNT = 100  # examples per task
BASE, OWN = 0.4, 0.8  # accuracies
NAMES = ("s", "t", "u")
ACCURACY: Any = METRICS["accuracy"](SimpleNamespace(labels=("yes", "no"), metric="accuracy"))  # type: ignore[arg-type]


def answers(right: np.ndarray) -> tuple[Answer, ...]:
    return tuple(Answer(id=str(i), target="yes", given="yes" if x else "no") for i, x in enumerate(right))


class World:
    """Tasks whose examples a candidate answers rightly where its skill is above their difficulty, up to some noise."""

    def __init__(self, seed: int, goal: str = "worst_recovery") -> None:
        self._draw = np.random.default_rng(seed)
        self._difficulty = {name: self._draw.random(COUNT) for name in NAMES}
        self.asked: list[str] = []
        self.examples = 0
        self._right: dict[int, dict[str, np.ndarray]] = {}
        spec = SimpleNamespace(draws=300, seed=0)
        session = SimpleNamespace(answers=self._answers)
        self.judge: Any = SimpleNamespace(
            spec=SearchSpec(maximize=(goal,)), races=True, evaluator=SimpleNamespace(spec=spec, session=session)
        )
        self.judge.tasks = tuple(self._task(name) for name in NAMES)

    def judged(self, recoveries: tuple[float, ...], noise: float = 0.1) -> Judged:
        """Return a candidate of these recoveries, about."""
        candidate: Any = SimpleNamespace()
        self._right[id(candidate)] = {
            name: self._difficulty[name] + noise * self._draw.normal(size=COUNT) < BASE + r * (OWN - BASE)
            for name, r in zip(NAMES, recoveries, strict=True)
        }
        self._kept = [*getattr(self, "_kept", []), candidate]  # an id belongs to one that lives
        return Judged(self.judge, candidate)

    def whole(self, recoveries: tuple[float, ...], noise: float = 0.1) -> Judged:
        """Return one that was asked everything."""
        found = self.judged(recoveries, noise)
        while left := found.left():
            found.ask(left)
        self.asked.clear()
        return found

    def _task(self, name: str) -> _TaskParts:
        items = tuple(SimpleNamespace(id=str(i)) for i in range(COUNT))
        pieces, begin = [], 0
        for share in shares_of(COUNT):
            end = round(COUNT * share)
            pieces.append(SimpleNamespace(name=name, begin=begin, examples=SimpleNamespace(items=items[begin:end])))
            begin = end
        task = SimpleNamespace(name=name, own_metric=lambda: ACCURACY)
        entry: Any = SimpleNamespace(task=task, examples=SimpleNamespace(items=items))
        base, own = (answers(self._difficulty[name] < level) for level in (BASE, OWN))
        return _TaskParts(entry, tuple(pieces), base, own)  # type: ignore[arg-type]

    def _answers(self, candidate: Any, part: Any) -> tuple[Answer, ...]:
        self.asked.append(part.name)
        self.examples += len(part.examples.items)
        right = self._right[id(candidate)][part.name]
        return answers(right)[part.begin : part.begin + len(part.examples.items)]


def race(candidate: Judged, best: Judged) -> bool:
    """Ask until it is known; return whether it was stopped."""
    while not candidate.complete and not cannot_win(candidate, best):
        candidate.ask(candidate.next(best))
    return not candidate.complete


def test_the_task_that_decides_is_asked_first_and_ends_the_race() -> None:
    world = World(0)
    best = world.whole((0.9, 0.8, 0.7))
    bad = world.judged((0.9, 0.8, 0.0))
    assert race(bad, best)
    assert set(world.asked) == {"u"}, "the best is weakest there"
    assert estimate(bad, best) < 0.4
    world.asked.clear()
    other = world.judged((0.9, 0.1, 0.9))
    assert race(other, best)
    assert world.asked[0] == "u"
    assert set(world.asked) == {"t", "u"}, "what is known of u leads to t"
    assert [name for name in other.expected(best)] == ["t", "u"]


def test_one_answer_decides_where_all_were_asked() -> None:
    world = World(1)
    best = world.whole((1.0, 1.0, 0.7), noise=0.0)
    slightly_worse = world.judged((1.0, 1.0, 0.66), noise=0.0)
    assert race(slightly_worse, best)
    assert set(world.asked) == {"u"}
    twin = world.judged((1.0, 1.0, 0.7), noise=0.0)
    assert not race(twin, best), "one with the same answers is not behind"


@pytest.mark.parametrize("goal", ["worst_recovery", "mean_recovery", "t.recovery"])
def test_better_candidates_are_seldom_stopped_and_bad_ones_cost_little(goal: str) -> None:
    wrongly, better, asked = 0, 0, 0
    for seed in range(40):
        world = World(seed, goal)
        draw = np.random.default_rng(seed)
        best = world.whole((0.7, 0.7, 0.7))
        near = tuple(draw.normal(0.72, 0.03, 3))
        end = world.judged(near)
        stopped = race(end, best)
        while left := end.left():
            end.ask(left)
        if end.goal > best.goal:
            better += 1
            wrongly += stopped
        world.examples = 0
        race(world.judged((0.3, 0.35, 0.3)), best)
        asked += world.examples
    assert better > 10
    assert wrongly <= 0.15 * better, "a look is wrong in 2.5 % at most, and there are up to four"
    assert asked / 40 < {"worst_recovery": 60, "t.recovery": 60, "mean_recovery": 180}[goal]


def test_parts_hold_every_example_once() -> None:
    entry: Any = SimpleNamespace(examples=SimpleNamespace(items=tuple(range(5))))
    parts, order = _parts(entry, (1.0,))
    assert parts == (entry,)
    assert order == list(range(5))
