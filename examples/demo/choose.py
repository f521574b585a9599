"""Choose the demo's merge: every candidate on the validation split, the chosen one and PEFT's best on the test split.

Run by hand, ten to thirty minutes on two cores: `python examples/demo/choose.py`. The rule is fixed before looking: the
largest sum of mean and worst recovery on validation. The test split is read once, after the choice.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base_model import base_model
from rich.console import Console
from rich.table import Table
from scoring import Outcome, Split, Task, hits, intervals, load_tasks, mean_and_worst

import plait

SCALES = (1.0, 1.5, 2.0)
SUM_SCALES = (1 / 3, 0.6, 1.0)  # for methods that add the adapters up, where TIES averages them
TIES = {"method": "ties", "flavor": "core_space"}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "linear": ({"method": "linear"}, SUM_SCALES),
    "dare_linear, core .5": ({"method": "dare_linear", "space": "core", "density": 0.5}, SUM_SCALES),
    "dare_ties, core .5": ({"method": "dare_ties", "space": "core", "density": 0.5}, SCALES),
    "ties, delta .2": ({"method": "ties", "space": "delta", "density": 0.2}, SCALES),
    "ties, knots .5": ({**TIES, "space": "knots", "density": 0.5}, SCALES),
    "ties, core .2": ({**TIES, "space": "core", "density": 0.2}, (*SCALES, 2.5)),
    "ties, core .5": ({**TIES, "space": "core", "density": 0.5}, (*SCALES, 2.5)),
}
PEFT: dict[str, dict[str, Any]] = {
    "PEFT linear, weights 1/3": {"weights": [1 / 3] * 3, "combination_type": "linear"},
    "PEFT ties .2": {"weights": [1.0] * 3, "combination_type": "ties", "density": 0.2},
    "PEFT ties .5": {"weights": [1.0] * 3, "combination_type": "ties", "density": 0.5},
}
console = Console(highlight=False)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One merge to try: made by plait from `settings`, or by PEFT.

    Attributes:
        name: for people.
        settings: keyword arguments of `plait.merge`, or of PEFT's `add_weighted_adapter`.
        by_peft: who makes it. What PEFT makes is compared, never chosen.
    """

    name: str
    settings: Mapping[str, Any]
    by_peft: bool = False


def candidates() -> Iterator[Candidate]:
    """List every merge that is tried."""
    for name, (settings, scales) in FAMILIES.items():
        for scale in scales:
            yield Candidate(f"{name}, scale {scale:.2g}", {**settings, "scale": scale})
    for name, settings in PEFT.items():
        yield Candidate(name, settings, by_peft=True)


class Bench:
    """The live model, the tasks, and the references (base and own single adapters), each computed once per split."""

    def __init__(self) -> None:
        # Threads that wait asleep: on a machine with other work, spinning ones make this ten times slower. Read by torch
        # when it is first imported, hence the late import.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from live import Live

        self.tasks = load_tasks()
        self.live = Live(base_model(), {task.name: task.adapter for task in self.tasks})
        self._references: dict[Split, dict[str, tuple[Any, Any]]] = {}

    def outcomes(self, candidate: Candidate, split: Split) -> dict[str, Outcome]:
        """Make a candidate, and compare it with the references on all examples of a split."""
        references = self._of_split(split)
        self._make(candidate)
        right = {task.name: self._right("candidate", task, split) for task in self.tasks}
        self.live.remove("candidate")
        return {name: Outcome(*references[name], right[name]) for name in right}

    def _make(self, candidate: Candidate) -> None:
        if candidate.by_peft:
            names = [task.name for task in self.tasks]
            self.live.model.add_weighted_adapter(names, adapter_name="candidate", **candidate.settings)
            return
        with tempfile.TemporaryDirectory() as folder:
            sources = {task.name: task.adapter for task in self.tasks}
            merged = plait.merge(sources, out=Path(folder) / "merged", **candidate.settings)
            self.live.add("candidate", merged.folder)

    def _of_split(self, split: Split) -> dict[str, tuple[Any, Any]]:
        if split not in self._references:
            self._references[split] = {
                task.name: (self._right("base", task, split), self._right(task.name, task, split)) for task in self.tasks
            }
        return self._references[split]

    def _right(self, name: str, task: Task, split: Split) -> Any:
        examples = task.examples(split)
        return hits(examples, self.live.classify(name, task, examples))


def _summary(outcomes: Mapping[str, Outcome]) -> str:
    mean, worst = mean_and_worst(outcomes)
    shares = " ".join(f"{outcome.merged.mean():.3f}" for outcome in outcomes.values())
    return f"{shares}  {mean:+8.2f} {worst:+8.2f}"


def _validate(bench: Bench) -> dict[Candidate, dict[str, Outcome]]:
    tried = {}
    for candidate in candidates():
        tried[candidate] = bench.outcomes(candidate, "validation")
        console.print(f"{candidate.name:36s} {_summary(tried[candidate])}")
    return tried


def _best(tried: Mapping[Candidate, Mapping[str, Outcome]], *, by_peft: bool) -> Candidate:
    eligible = [candidate for candidate in tried if candidate.by_peft == by_peft]
    return max(eligible, key=lambda candidate: sum(mean_and_worst(tried[candidate])))


def _test_table(name: str, outcomes: Mapping[str, Outcome]) -> Table:
    table = Table(title=f"{name}: test split", title_justify="left", title_style="bold", box=None, header_style="bold")
    for column in ("task", "n", "base", "single", "merged", "recovery", "95 % interval"):
        table.add_column(column, justify="left" if column == "task" else "right")
    bounds = intervals(outcomes)
    for task, o in outcomes.items():
        shares = (f"{right.mean():.3f}" for right in (o.base, o.single, o.merged))
        table.add_row(task, str(len(o.base)), *shares, f"{o.recovery:.2f}", "{:.2f} – {:.2f}".format(*bounds[task]))
    for word, value in zip(("mean", "worst"), mean_and_worst(outcomes), strict=True):
        table.add_row(word, "", "", "", "", f"{value:.2f}", "{:.2f} – {:.2f}".format(*bounds[word]))
    return table


def _record(tried: Mapping[Candidate, Mapping[str, Outcome]], tested: Mapping[Candidate, Mapping[str, Outcome]]) -> str:
    def rows(results: Mapping[Candidate, Mapping[str, Outcome]]) -> list[dict[str, Any]]:
        return [
            {
                "name": candidate.name,
                "settings": dict(candidate.settings),
                "accuracy": {
                    name: {side: float(getattr(o, side).mean()) for side in ("base", "single", "merged")}
                    for name, o in outcomes.items()
                },
                "recovery": {name: o.recovery for name, o in outcomes.items()},
            }
            for candidate, outcomes in results.items()
        ]

    return json.dumps({"validation": rows(tried), "test": rows(tested)}, indent=1)


def main() -> None:
    """Validate all candidates, choose one, test it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write all numbers here, as JSON")
    options = parser.parse_args()
    bench = Bench()
    console.print("validation: accuracy on sentiment, supersense, langid; mean and worst recovery")
    tried = _validate(bench)
    chosen, rival = _best(tried, by_peft=False), _best(tried, by_peft=True)
    console.print(f"\nchosen: [bold]{chosen.name}[/bold] {dict(chosen.settings)}\nPEFT's best: [bold]{rival.name}[/bold]\n")
    tested = {candidate: bench.outcomes(candidate, "test") for candidate in (chosen, rival)}
    for candidate, outcomes in tested.items():
        console.print(_test_table(candidate.name, outcomes), "")
    if options.out:
        options.out.write_text(_record(tried, tested), encoding="utf-8")


if __name__ == "__main__":
    main()
