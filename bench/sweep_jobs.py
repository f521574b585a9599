"""One job in a fresh process, like `jobs.py`: the trials of a search, and what they cost besides the questions."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTS = ("asked", "merged", "placed", "planned", "suggested", "recorded")
WARM_UP = 3  # trials that are not counted: what is imported or filled once for all


def trials(
    base: str, adapters: Mapping[str, str], tasks: Sequence[str], dtype: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Search, and return the CPU and wall seconds of the later trials, all in all and per part.

    Args:
        base: folder of the model.
        adapters: name → folder.
        tasks: files.
        dtype: of the base in memory.
        settings: of `plait.sweep`.
    """
    import plait
    from plait.search.trying import Trials

    clock, rounds = _Clock(), list[dict[str, dict[str, float]]]()
    run = Trials.run

    def counted(self: Any) -> Any:
        clock.restart()
        return run(self)

    def end_of_trial() -> None:
        rounds.append(clock.read())
        clock.restart()

    with _listening(clock, end_of_trial), tempfile.TemporaryDirectory() as place:
        Trials.run = counted  # type: ignore[method-assign]
        plait.sweep(
            adapters, tasks=tasks, base_model=base, load_dtype=dtype, workspace=Path(place, "answers"),
            out=Path(place, "study"), **settings,
        )  # fmt: skip
    counted_rounds = rounds[WARM_UP:]
    parts = {name: _mean([r[name] for r in counted_rounds]) for name in (*PARTS, "all")}
    return {"parts": parts, "trials": len(counted_rounds)}


class _Clock:
    """CPU and wall time since the last trial ended, and how much of it was spent in which part."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a trial."""
        self._begun = _now()
        self._spent: dict[str, Counter[str]] = {name: Counter() for name in PARTS}
        self._inner = Counter[str]()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block for a part; what a part within it takes counts for that alone."""
        begun, before, self._inner = _now(), self._inner, Counter()
        try:
            yield
        finally:
            took = Counter({k: v - begun[k] for k, v in _now().items()})
            self._spent[name].update({k: v - self._inner[k] for k, v in took.items()})
            self._inner = Counter({k: before[k] + took[k] for k in took})

    def read(self) -> dict[str, dict[str, float]]:
        """Return what there is, and all of it."""
        return {
            **{name: {k: spent[k] for k in ("cpu", "wall")} for name, spent in self._spent.items()},
            "all": {k: v - self._begun[k] for k, v in _now().items()},
        }


@contextmanager
def _listening(clock: _Clock, end_of_trial: Callable[[], None]) -> Iterator[None]:
    """Time the parts of trials where they are called."""
    from plait.evaluation import candidates, session
    from plait.mixture import Mixture
    from plait.search.request import Sweep
    from plait.search.study import Study

    def timed(owner: Any, attribute: str, name: str, after: Callable[[], None] = lambda: None) -> None:
        real = getattr(owner, attribute)

        def call(*args: Any, **keywords: Any) -> Any:
            with clock.part(name):
                found = real(*args, **keywords)
            after()
            return found

        undo.append((owner, attribute, real))
        setattr(owner, attribute, call)

    undo: list[tuple[Any, str, Any]] = []
    timed(session, "answer_examples", "asked")
    timed(candidates, "merged_modules", "merged")
    timed(Mixture, "placed", "placed")
    timed(Sweep, "subject", "planned")
    timed(Study, "next", "suggested")
    timed(Study, "tell", "recorded", end_of_trial)
    try:
        yield
    finally:
        for owner, attribute, real in reversed(undo):
            setattr(owner, attribute, real)


def _now() -> dict[str, float]:
    return {"cpu": time.process_time(), "wall": time.perf_counter()}


def _mean(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {kind: sum(t[kind] for t in times) / len(times) for kind in ("cpu", "wall")}


JOBS = {job.__name__: job for job in (trials,)}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    job, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(JOBS[job](**json.loads(arguments))), encoding="utf-8")
