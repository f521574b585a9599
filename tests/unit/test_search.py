"""Searches: what may be searched, what a candidate is, what is suggested, which one is the best, and when a search ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice, product
from typing import Any

import optuna
import pytest
from optuna.trial import create_trial

from plait.errors import RecipeError
from plait.libraries.optuna import quiet_optuna
from plait.recipes.candidates import recipe_path
from plait.recipes.loading import load_recipe
from plait.recipes.schema import Recipe
from plait.recipes.search import SearchSpec
from plait.recipes.writing import recipe_json, to_yaml
from plait.search.judging import shares_of
from plait.search.outcome import FOUND, Outcome, as_told, studied
from plait.search.record import Run, TaskOutcome
from plait.search.sampling import sampler_of
from plait.search.selection import front, ranked, reason_to_stop
from plait.search.space import SearchSpace, point_key
from tests.every import every

PAIR = "version: 1\nadapters: [a=./a, b=./b]\n"


def recipe(search: str, more: str = "method: ties") -> Recipe:
    return load_recipe(f"{PAIR}{more}\nsearch: {search}\n")


def space(search: str, more: str = "method: ties") -> SearchSpace:
    return SearchSpace(recipe(search, more))


@every(
    "text, expected",
    [
        ("scale: 0..2", ("float", 0.0, 2.0, False)),
        ("scale: 0.1..3:log", ("float", 0.1, 3.0, True)),
        ("rank: 1..64", ("int", 1.0, 64.0, False)),
        ("output.rank: 1..64:log", ("int", 1.0, 64.0, True)),
        ("density: {min: 0.1, max: 1}", ("float", 0.1, 1.0, False)),
        ("scale: -1..1e0", ("float", -1.0, 1.0, False)),
        ("seed: 0..5", ("int", 0.0, 5.0, False)),
    ],
)
def test_ranges(text: str, expected: tuple[object, ...]) -> None:
    (found,) = space(f"{{space: {{{text}}}}}").parameters
    assert (found.kind, found.low, found.high, found.log) == expected


@every(
    "text, expected",
    [
        ("{space: {density: '0.2,0.5'}}", [0.2, 0.5]),
        ("{space: {density: [0.2, 0.5]}}", [0.2, 0.5]),
        ("{grid: {density: '0.2, 0.5'}}", [0.2, 0.5]),
        ("{grid: {density: 0.2}}", [0.2]),
        ("{space: {method: 'ties,linear'}}", ["ties", "linear"]),
        ("{grid: {transforms: [[], [identity]]}}", [[], ["identity"]]),
    ],
)
def test_values(text: str, expected: list[object]) -> None:
    (found,) = space(text).parameters
    assert list(found.choices.values()) == expected


@every(
    "key, path",
    [
        ("density", "method.density"),
        ("space", "method.space"),
        ("rank", "output.rank"),
        ("scale", "scale"),
        ("method.name", "method"),
        ("adapters.a.weight", "adapters.a.weight"),
    ],
)
def test_short_keys(key: str, path: str) -> None:
    assert recipe_path(key) == path


@every(
    "search, expected",
    [
        ("{budget: 0}", "4: search.budget: budget is 0; it must be >= 1."),
        ("{spaces: {}}", "4: search.spaces: 'spaces' is not known here"),
        ("{space: {scale: 2..1}}", "4: search.space.scale: min is 2 and max 1; min must be smaller."),
        ("{space: {scale: 0..2:log}}", "4: search.space.scale: min is 0; with 'log' it must be > 0."),
        ("{space: {scale: 0..}}", "4: search.space.scale: '0..' is not a range: write LOW..HIGH"),
        ("{space: {scale: 0..2:cubic}}", "4: search.space.scale: '0..2:cubic': 'cubic' is not known; write LOW..HIGH"),
        ("{space: {scale: {min: 0}}}", "4: search.space.scale: a range needs 'min' and 'max', or 'values'."),
        ("{space: {density: 0..1}}", "4: search.space.density: at 0.0: density is 0.0; it must be > 0 and <= 1."),
        ("{space: {desnity: 0.1..1}}", "4: search.space.desnity: 'desnity' is neither a part of a merge"),
        ("{space: {eval.split: [test]}}", "4: search.space.\"eval.split\": 'eval.split' is neither a part of a merge"),
        ("{space: {adapters.c.weight: 0..1}}", "4: search.space.\"adapters.c.weight\": at 0.0: adapters has no item 'c'"),
        ("{space: {adapters.a.path: [x]}}", "4: search.space.\"adapters.a.path\": 'adapters.a.path' is not searched"),
        ("{space: {output.kind: [delta]}}", "4: search.space.\"output.kind\": 'output.kind' is not searched"),
        ("{space: {epsilon: 0..1}}", "4: search.space.epsilon: no method of this search (ties) has method.epsilon."),
        ("{grid: {method: [ties, tize]}}", "4: search.grid.method: at 'tize': "),
        ("{space: {density: 0.1..1}, grid: {density: [0.5]}}", "4: search: 'density' is in 'space' and in 'grid'; keep one."),
        (
            "{grid: {density: [1], method.density: [1]}}",
            "4: search.grid.\"method.density\": 'method.density' and 'density' mean the same",
        ),
        ("{type: grid, space: {scale: 0..1}}", "4: search: a grid has values, and scale a range"),
        ("{split: test, space: {scale: 0..1}}", "4: search: split 'test' judges the result"),
        ("{budget: 3, init_points: 4, space: {scale: 0..1}}", "4: search: init_points is 4 and budget 3"),
        (
            "{space: {scale: 0..1}, points: [{density: 1}]}",
            "4: search.points.0.density: 'density' is not searched; there are scale.",
        ),
        ("{space: {scale: 0..1}, points: [{scale: 3}]}", "4: search.points.0.scale: 3 is not among the values"),
        ("{space: {scale: 1..2}, zero_baseline: true}", "4: search.zero_baseline: scale 0 is not among the values"),
        ("{maximize: [best]}", "4: search.maximize.0: maximize.0 is 'best'; it must"),
        (
            "{space: {scale: 0..1}, early_stop: {resolution: {density: 1}}}",
            "4: search.early_stop.resolution.density: 'density' is not",
        ),
    ],
)
def test_messages_name_line_and_key(search: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(search)
    assert expected in str(error.value)


def test_a_search_is_no_part_of_a_merge() -> None:
    found = recipe("{space: {scale: 0..2}, budget: 5}")
    assert "search" not in recipe_json(found)
    assert load_recipe(to_yaml(found)) == found


def test_parameters_of_methods_belong_to_those_that_have_them() -> None:
    found = space("{grid: {method: [ties, linear], density: [0.2, 0.5], scale: [1, 2]}}")
    assert found.is_conditional
    assert len(found.grid()) == found.size == 2 * 2 + 2
    assert len({point_key(p) for p in found.grid()}) == found.size
    assert {tuple(p) for p in found.grid()} == {("method", "method.density", "scale"), ("method", "scale")}
    linear = found.recipe({"method": "linear", "scale": 2})
    assert (linear.method_name, linear.scale) == ("linear", 2)


def test_the_recipes_own_method_keeps_its_parameters() -> None:
    found = space("{space: {method: [ties, dare_ties]}}", "method: {name: ties, density: 0.3}")
    assert found.recipe({"method": "ties"}).method.density == 0.3  # type: ignore[attr-defined]
    assert found.recipe({"method": "dare_ties"}).method.density != 0.3  # type: ignore[attr-defined]


def test_every_weight() -> None:
    found = space("{space: {'adapters.*.weight': 0..2}}")
    assert [p.path for p in found.parameters] == ["adapters.a.weight", "adapters.b.weight"]
    assert [a.weight for a in found.recipe({"adapters.a.weight": 0.5, "adapters.b.weight": 2.0}).adapters] == [0.5, 2.0]
    assert found.start == {"adapters.a.weight": 1.0, "adapters.b.weight": 1.0}


def test_a_point_is_completed_by_the_recipes_own_values() -> None:
    found = space("{space: {scale: 0..2, density: 0.1..1}}", "method: {name: ties, density: 0.3}")
    assert found.wanted({"scale": 0.5}) == {"scale": 0.5, "method.density": 0.3}
    assert found.start == {"scale": 1.0, "method.density": 0.3}
    assert space("{space: {scale: 2..3}}").start is None


Recoveries = Callable[[dict[str, Any]], dict[str, float]]


def near_seven_tenths(point: dict[str, Any]) -> dict[str, float]:
    return {"t": 1 - abs(point["scale"] - 0.7)}


def suggestions(text: str, count: int, *, again_at: int = -1) -> list[dict[str, Any]]:
    return list(suggested(recipe(text), count, near_seven_tenths, again_at=again_at))


def suggested(asked: Recipe, count: int, of: Recoveries, *, again_at: int = -1) -> Iterator[dict[str, Any]]:
    """Yield what is suggested, where the process ends before trial `again_at` and another goes on."""
    found = SearchSpace(asked)
    study = optuna.create_study(directions=["maximize"] * len(asked.search.maximize))
    with quiet_optuna():
        sampler = sampler_of(asked.search, found)
        for number in range(count):
            if number == again_at:
                sampler = sampler_of(asked.search, found)
            study.sampler = sampler
            trial = study.ask()
            point = found.suggest(trial)
            yield point
            outcome = outcome_of(point, of(point))
            trial.set_user_attr(FOUND, outcome.model_dump(mode="json"))
            study.tell(trial, [as_told(outcome.worst or 0.0)] * len(study.directions))


def outcome_of(point: dict[str, Any], recoveries: dict[str, float], **more: Any) -> Outcome:
    results = {name: TaskOutcome(metric=0.5, recovery=value, interval=None) for name, value in recoveries.items()}
    worst, mean = min(recoveries.values()), sum(recoveries.values()) / len(recoveries)
    return Outcome(params=point, score=worst, worst=worst, mean=mean, results=results, **more)


@pytest.mark.parametrize("kind", ["random", "bayes"])
def test_what_is_suggested_depends_on_the_seed_and_the_trials_alone(kind: str) -> None:
    text = f"{{type: {kind}, init_points: 3, budget: 6, seed: 5, space: {{scale: 0..2}}}}"
    first = suggestions(text, 6)
    assert first == suggestions(text, 6, again_at=4)
    assert first != suggestions(text.replace("seed: 5", "seed: 6"), 6)
    assert len({p["scale"] for p in first}) == 6
    if kind == "bayes":  # it has seen where the best is
        assert min(abs(p["scale"] - 0.7) for p in first[3:]) < 0.2


@every("maximize", ["worst_recovery", "worst_recovery, mean_recovery"])
def test_methods_with_parameters_of_their_own(maximize: str) -> None:
    text = "{type: bayes, init_points: 2, budget: 4, space: {method: [ties, linear], density: 0.1..1, scale: 0..2}"
    several = "," in maximize
    with pytest.warns(UserWarning, match="tree-structured Parzen estimator") if several else nullcontext():
        points = suggestions(f"{text}, maximize: '{maximize}'}}", 8)
    assert {p["method"] for p in points} == {"ties", "linear"}
    assert all(("method.density" in p) == (p["method"] == "ties") for p in points)


def three_tasks(point: dict[str, Any]) -> dict[str, float]:
    """Return recoveries that grow with a task's own weight until it is large enough, and fall with those of the others."""
    own = [float(point[f"adapters.{name}.weight"]) for name in "abc"]
    found = {}
    for i, (enough, harm) in enumerate(((0.3, 0.5), (0.5, 1.5), (0.9, 0.25))):
        others = sum(own) - own[i]
        found[f"task{i}"] = math.tanh(2 * own[i] / enough) - harm * others**2
    return found


def test_weights_of_three_adapters_are_found_that_no_grid_of_27_has() -> None:
    more, levels = "adapters: [a=./a, b=./b, c=./c]\nmethod: linear\n", (0.1, 0.2, 0.4)
    names = [f"adapters.{name}.weight" for name in "abc"]
    grid = max(min(three_tasks(dict(zip(names, at, strict=True))).values()) for at in product(levels, repeat=3))
    for seed in range(3):
        search = f"{{budget: 20, seed: {seed}, space: {{'adapters.*.weight': 0.05..1:log}}}}"
        asked = load_recipe(f"version: 1\n{more}search: {search}\n")
        later = islice(suggested(asked, 20, three_tasks), 6, None)  # asked no further than the first that is better
        assert any(min(three_tasks(point).values()) > grid for point in later), "the search knows of every task"


def test_what_is_known_of_stopped_candidates_counts() -> None:
    asked = recipe("{budget: 9, init_points: 1, seed: 1, space: {scale: 0..2}}")
    found = SearchSpace(asked)

    def suggested_after(stopped: list[tuple[float, float]]) -> float:
        study = optuna.create_study(direction="maximize")
        known = [outcome_of({"scale": x}, {"t": y, "u": 0.9}) for x, y in ((0.2, 0.2), (0.5, 0.4), (0.8, 0.5))]
        for scale, t in stopped:  # nothing was asked of the other task
            cut = outcome_of({"scale": scale}, {"t": 0.1}, stopped=True, expected={"t": (t, 0.01)})
            known.append(cut)
        for outcome in known:
            attributes, at = {FOUND: outcome.model_dump(mode="json")}, found.distributions(outcome.params)
            study.add_trial(create_trial(params=outcome.params, distributions=at, value=outcome.score, user_attrs=attributes))
        study.sampler = sampler_of(asked.search, found)
        return float(found.suggest(study.ask())["scale"])  # type: ignore[arg-type]

    with quiet_optuna():
        assert suggested_after([]) > 0.8
        assert suggested_after([(0.9, 0.3), (1.3, -0.2), (1.8, -0.6)]) < 0.9


def test_suggestions_keep_apart_from_what_could_not_be_merged() -> None:
    asked = recipe("{budget: 9, init_points: 1, seed: 1, space: {scale: 0..2}}")
    found, study = SearchSpace(asked), optuna.create_study(direction="maximize")

    def add(x: float, **outcome: Any) -> None:
        at = found.distributions({"scale"})
        study.add_trial(create_trial(params={"scale": x}, distributions=at, **outcome))

    for x, y in ((0.2, 0.2), (0.5, 0.4), (0.8, 0.5)):
        attributes = {FOUND: outcome_of({"scale": x}, {"t": y}).model_dump(mode="json")}
        add(x, value=y, user_attrs=attributes)
    with quiet_optuna():
        study.sampler = sampler_of(asked.search, found)
        for _ in range(3):
            trial = study.ask()
            tried = [t.params["scale"] for t in study.get_trials() if t.number != trial.number]
            suggested_now = float(found.suggest(trial)["scale"])  # type: ignore[arg-type]
            assert min(abs(suggested_now - x) for x in tried) >= 0.03 * 2 - 1e-9
            study.tell(trial, state=optuna.trial.TrialState.FAIL)


def run(number: int, worst: float, mean: float, **changes: Any) -> Run:
    results = {"t": TaskOutcome(metric=0.5, recovery=worst, interval=None)}
    plain = {
        "number": number, "phase": "search", "params": {"scale": float(number)}, "score": worst, "results": results, "key": "",
        "score_details": {"min_interference_delta": worst, "mean_interference_delta": mean}, "examples": 1, "stopped": False,
        "nonnegative": worst >= 0, "seconds": 0.0,
    }  # fmt: skip
    return Run.model_validate({**plain, **changes})


def test_the_largest_worst_recovery_wins_and_ties_go_to_the_mean() -> None:
    runs = [run(0, 0.5, 0.6), run(1, 0.5, 0.7), run(2, 0.9, 0.9, stopped=True), run(3, 0.4, 0.9), run(4, 0.5, 0.7)]
    assert ranked(runs, SearchSpec()) == [1, 4, 0, 3]  # one that was stopped has an estimate, and is not chosen
    assert front(runs, SearchSpec()) == [1, 3]


def test_the_sampler_gets_scores_in_their_order_and_none_far_below_the_others() -> None:
    values = [as_told(value) for value in (-40.0, -4.0, -0.5, 0.0, 0.25, 1.5)]
    assert values == sorted(values)
    assert values[0] > -1
    assert values[3:] == [0.0, 0.25, 1.5]


def test_a_candidate_below_the_base_is_read_as_it_was_told() -> None:
    found = Outcome(params={}, key="0", score=-4.0, worst=-4.0, mean=-1.0, examples=8)
    trial = create_trial(values=[as_told(-4.0)], user_attrs={FOUND: found.model_dump(mode="json")})
    assert studied(trial, "study.db").outcome.score == -4.0


def test_candidates_below_the_base_rank_last_and_keep_their_score() -> None:
    runs = [run(0, -0.1, 0.9, score=0.9), run(1, 0.1, 0.2, score=0.2)]
    assert ranked(runs, SearchSpec(maximize=("mean_recovery",))) == [1, 0]
    assert ranked(runs, SearchSpec(maximize=("mean_recovery",), constraint_nonnegative=False)) == [0, 1]
    assert runs[0].score == 0.9


def test_a_search_ends_on_a_plateau_and_within_a_resolution() -> None:
    asked = recipe("{space: {scale: 0..20}, early_stop: {patience: 2, min_trials: 3, resolution: {scale: 1}}}")
    parameters = SearchSpace(asked).parameters
    near = [
        run(0, 0.5, 0.5),
        run(5, 0.8, 0.8),
        run(9, 0.7, 0.7, params={"scale": 5.2}),
        run(9, 0.7, 0.7, params={"scale": 4.9}),
    ]
    assert reason_to_stop(near, asked.search, parameters) == (
        "the last 2 trials gained less than 0.0005 and the last 2 trials round to the values of the best"
    )
    far = [*near[:3], run(9, 0.7, 0.7)]
    assert reason_to_stop(far, asked.search, parameters) is None
    either = asked.search.model_copy(update={"early_stop": asked.search.early_stop.model_copy(update={"require_both": False})})  # type: ignore[union-attr]
    assert reason_to_stop(far, either, parameters) == "the last 2 trials gained less than 0.0005"
    assert reason_to_stop([*near[:3], run(4, 0.9, 0.9)], either, parameters) is None


def test_candidates_are_compared_early_only_on_enough_examples() -> None:
    assert shares_of(11) == (1.0,)
    assert shares_of(24) == (0.5, 0.75, 1.0)
    assert shares_of(400) == (0.125, 0.25, 0.5, 0.75, 1.0)
