"""A search → panels of dots and lines: its history, each parameter, all parameters at once, and the front.

Positions are in a panel's own units, from its lower left corner's opposite, as SVG has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from plait.recipes.candidates import recipe_path
from plait.recipes.search import SearchSpec
from plait.records import Record
from plait.reports.colors import css, sequential
from plait.search.record import Run, StudyRecord

_WIDTH, _HEIGHT = 640.0, 220.0
# distinguishable without red and green (Okabe and Ito 2008)
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_STOPPED = "#7f7f7f"
_MARGIN = 0.04  # of a range, beyond its ends


class Dot(Record):
    """One candidate, or one task of it.

    Attributes:
        x: from the left.
        y: from above.
        color: of the dot.
        filled: whether it was asked everything.
        title: in words.
        low: lower end of its interval, from above; None where there is none.
        high: upper end.
    """

    x: float
    y: float
    color: str
    filled: bool
    title: str
    low: float | None = None
    high: float | None = None


class Stroke(Record):
    """A line through points, as SVG takes them."""

    points: str
    color: str
    title: str = ""


class Panel(Record):
    """Dots and lines on two axes.

    Attributes:
        title: above it.
        about: how to read it.
        width: of the drawing.
        height: of the drawing.
        dots: candidates.
        strokes: lines.
        left: (position from the left, words) below the drawing.
        up: (position from above, words) to the left of it.
        names: name → color, where colors are tasks.
    """

    title: str
    about: str
    width: float = _WIDTH
    height: float = _HEIGHT
    dots: tuple[Dot, ...] = ()
    strokes: tuple[Stroke, ...] = ()
    left: tuple[tuple[float, str], ...] = ()
    up: tuple[tuple[float, str], ...] = ()
    names: tuple[tuple[str, str], ...] = ()


class Scale(Record):
    """Values → positions along an axis of a length.

    Attributes:
        low: at the beginning.
        high: at the end.
        log: whether positions are of the logarithm.
        choices: in place of numbers: words at equal distances.
        shares: whether numbers are recoveries, written in percent.
    """

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[str, ...] = ()
    shares: bool = False

    def at(self, value: object) -> float:
        """Return where a value is, from 0 to 1."""
        if self.choices:
            return (self.choices.index(str(value)) + 0.5) / len(self.choices)
        number = float(value) if isinstance(value, (int, float)) else self.low
        low, high, x = (math.log(v) for v in (self.low, self.high, number)) if self.log else (self.low, self.high, number)
        return (x - low) / (high - low) if high > low else 0.5

    def marks(self) -> tuple[tuple[float, str], ...]:
        """Return positions from 0 to 1 and what is written there."""
        if self.choices:
            return tuple((self.at(word), word) for word in self.choices)
        return ((0.0, self._mark(self.low)), (1.0, self._mark(self.high)))

    def _mark(self, value: float) -> str:
        return _percent(value) if self.shares else f"{value:.3g}"


def study_panels(study: StudyRecord) -> tuple[Panel, ...]:
    """Return what a page shows of a search; panels without anything to show are left out."""
    complete = [run for run in study.runs if run.complete and run.phase != "zero"]
    scales = parameter_scales(study)
    curves = [_parameter(path, scale, complete, study) for path, scale in scales.items()]
    several = [_parallel(scales, complete, study)] if len(scales) > 1 and len(complete) > 1 else []
    return (_history(study), *curves, *several, _front(study))


def parameter_scales(study: StudyRecord) -> dict[str, Scale]:
    """Return path → scale of every parameter that some candidate has."""
    logs = {recipe_path(key): found.log for key, found in SearchSpec.model_validate(study.search).ranges.items()}
    values: dict[str, list[object]] = {}
    for run in study.runs:
        for path, value in run.params.items():
            values.setdefault(path, []).append(value)
    found = {}
    for path, given in values.items():
        numbers = [float(v) for v in given if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if len(numbers) < len(given):
            found[path] = Scale(choices=tuple(dict.fromkeys(map(str, given))))
        else:
            low, high = min(numbers), max(numbers)
            found[path] = Scale(low=low, high=high, log=logs.get(path, False) and low > 0)
    return found


def _history(study: StudyRecord) -> Panel:
    runs = [run for run in study.runs if run.score is not None and run.phase != "zero"]
    y = _range([run.score or 0.0 for run in runs])
    x = Scale(low=0, high=max(1, len(runs) - 1))
    dots = tuple(_dot(run, x.at(i), y, _COLORS[0] if run.complete else _STOPPED) for i, run in enumerate(runs))
    best, steps = -math.inf, []
    for i, run in enumerate(runs):
        best = max(best, run.score or 0.0) if run.complete else best
        if math.isfinite(best):
            steps.append((x.at(i), y.at(best)))
    return Panel(
        title="History",
        about=f"{study.maximize[0]} of every candidate in its order, and the best so far. Hollow: stopped, with its estimate.",
        dots=dots,
        strokes=(Stroke(points=_path(steps), color=_COLORS[1], title="best so far"),),
        left=_along(x.marks()[1:], lambda text: f"{len(runs)} candidates"),
        up=_upward(y),
    )


def _parameter(path: str, scale: Scale, runs: Sequence[Run], study: StudyRecord) -> Panel:
    """Return every task's recovery over one parameter."""
    colors = dict(zip(study.eval_tasks, _COLORS * (1 + len(study.eval_tasks) // len(_COLORS)), strict=False))
    shown = [run for run in runs if path in run.params]
    y = _range([outcome.recovery for run in shown for outcome in run.results.values() if outcome.recovery is not None])
    dots = []
    for run in shown:
        for task, outcome in run.results.items():
            if outcome.recovery is not None:
                low, high = outcome.interval or (outcome.recovery, outcome.recovery)
                dot = _dot(run, scale.at(run.params[path]), y, colors[task], outcome.recovery, task)
                ends = {"low": _HEIGHT * (1 - max(0.0, y.at(low))), "high": _HEIGHT * (1 - min(1.0, y.at(high)))}
                dots.append(dot.model_copy(update=ends))
    return Panel(
        title=path,
        about="Recovery of every task, with its 95 % interval as far as it is in the drawing, of the candidates that were "
        "asked everything.",
        dots=tuple(dots),
        left=_along(scale.marks()),
        up=_upward(y),
        names=tuple(colors.items()),
    )


def _parallel(scales: Mapping[str, Scale], runs: Sequence[Run], study: StudyRecord) -> Panel:
    """Return one line per candidate through all of its values."""
    scores = _range([run.score or 0.0 for run in runs])
    axes = {**scales, study.maximize[0]: scores}
    places = {path: i / (len(axes) - 1) for i, path in enumerate(axes)}
    strokes = []
    for run in sorted(runs, key=lambda run: run.score or 0.0):
        values = {**run.params, study.maximize[0]: run.score or 0.0}
        points = [(places[path], scale.at(values[path])) for path, scale in axes.items() if path in values]
        shade = css(sequential(scores.at(run.score or 0.0)))
        strokes.append(Stroke(points=_path(points), color=shade, title=_words(run)))
    return Panel(
        title="All parameters",
        about="One line per candidate that was asked everything, from its values to its score; the darker, the better.",
        strokes=tuple(strokes),
        left=tuple((_WIDTH * place, path) for path, place in places.items()),
    )


def _front(study: StudyRecord) -> Panel:
    """Return the candidates by two of what is maximized, and those that no other surpasses."""
    one, two = (*study.maximize, *(g for g in ("mean_recovery", "worst_recovery") if g not in study.maximize))[:2]
    runs = [run for run in study.runs if run.complete and run.phase != "zero"]
    x, y = (_range([run.goal(goal) or 0.0 for run in runs]) for goal in (one, two))
    dots = [
        _dot(run, x.at(run.goal(one) or 0.0), y, _COLORS[1] if i in study.front else _COLORS[0], run.goal(two) or 0.0)
        for i, run in enumerate(study.runs)
        if run in runs
    ]
    best = sorted((study.runs[i] for i in study.front), key=lambda run: run.goal(one) or 0.0)
    return Panel(
        title="Front",
        about=f"{two} over {one}. Orange: candidates that no other surpasses in both.",
        dots=tuple(dots),
        strokes=(Stroke(points=_path([(x.at(r.goal(one) or 0.0), y.at(r.goal(two) or 0.0)) for r in best]), color=_COLORS[1]),),
        left=_along(x.marks()),
        up=_upward(y),
    )


def _dot(run: Run, x: float, y: Scale, color: str, value: float | None = None, task: str = "") -> Dot:
    shown = run.score if value is None else value
    title = f"{task + ': ' if task else ''}{_percent(shown or 0.0)} at {_words(run)}"
    return Dot(x=_WIDTH * x, y=_HEIGHT * (1 - y.at(shown or 0.0)), color=color, filled=run.complete, title=title)


def _words(run: Run) -> str:
    values = (f"{p} {v:.3g}" if isinstance(v, float) else f"{p} {v}" for p, v in run.params.items())
    return ", ".join(values) or "the start"


def _percent(share: float) -> str:
    """Write a recovery finer than the verdict does: candidates differ in little."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _range(values: Sequence[float]) -> Scale:
    """Return the scale of some recoveries."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = _MARGIN * (high - low or 1.0)
    return Scale(low=low - room, high=high + room, shares=True)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_WIDTH * x:.1f},{_HEIGHT * (1 - y):.1f}" for x, y in points)


def _along(marks: Sequence[tuple[float, str]], words: Callable[[str], str] = str) -> tuple[tuple[float, str], ...]:
    return tuple((_WIDTH * x, words(text)) for x, text in marks)


def _upward(scale: Scale) -> tuple[tuple[float, str], ...]:
    return tuple((_HEIGHT * (1 - y), text) for y, text in scale.marks())
