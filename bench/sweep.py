"""What a trial of `plait sweep` costs besides its questions, in one run: `python bench/sweep.py [--quick] [--markdown]`.

SmolLM2-135M in float32 with the demo's three adapters; the candidates of a search by a Gaussian process, each asked the
same questions. Judged is the CPU time of a whole trial (suggested, planned, merged, put on the base, asked, compared, written
down) by that of the questions alone, in the same trials; the first ones are not counted. Results go to
`bench/results/sweep.json` too.
"""

from __future__ import annotations

import sys
from typing import Any

import report
from processes import HERE, run_job
from report import Row, Section
from sweep_jobs import PARTS, WARM_UP

sys.path.insert(0, str(HERE.parent / "examples" / "demo"))
from base_model import base_model

DEMO = HERE.parent / "examples" / "demo"
RESULTS = HERE / "results" / "sweep.json"
NAMES = ("langid", "sentiment", "supersense")
MOST = 1.02
SEARCHES: dict[str, dict[str, Any]] = {
    "weights of `linear`": {"method": "linear", "space": {"adapters.*.weight": "0.05..1:log"}},
    "scale and density of `ties` in `core`": {
        "method": "ties",
        "method_space": "core",
        "space": {"scale": "0.2..2:log", "density": "0.05..1:log"},
    },
    "scale of `iso_cts`": {"method": "iso_cts", "space": {"scale": "0.2..2:log"}},
}
WORDS = {
    "asked": "questions",
    "merged": "merge",
    "placed": "on the base",
    "planned": "plan",
    "suggested": "suggestion",
    "recorded": "storage",
}


def run(trials: int, examples: int, raw: dict[str, Any]) -> list[Section]:
    """Measure everything."""
    section = Section(
        f"A trial of {len(NAMES)} × {examples} questions", (*(WORDS[p] for p in PARTS), "whole trial", "CPU time", "wall time")
    )
    for title, given in SEARCHES.items():
        settings = {k: v for k, v in given.items() if k not in ("space", "method_space")}
        if "method_space" in given:
            settings["space"] = given["method_space"]
        search = {
            "space": given["space"],
            "budget": trials + WARM_UP,
            "init_points": WARM_UP,
            "subset": {"max_samples": examples},
            "race": False,
        }
        raw[title] = found = run_job(
            "trials",
            script="sweep_jobs.py",
            base=str(base_model()),
            adapters={name: str(DEMO / "adapters" / name) for name in NAMES},
            tasks=[str(DEMO / "tasks" / f"{name}.yaml") for name in NAMES],
            dtype="float32",
            settings={**settings, "search": search, "eval": {"subset": {"max_samples": 1}}},
        )
        section.rows.append(_row(title, found["parts"]))
    section.notes.append("Parts in CPU seconds of one trial; the comparison with base and own adapters is in the whole alone.")
    return [section]


def _row(title: str, parts: dict[str, dict[str, float]]) -> Row:
    whole, asked = parts["all"], parts["asked"]
    ratio = whole["cpu"] / asked["cpu"]
    cells = tuple(f"{parts[p]['cpu']:.2f} s" for p in (*PARTS, "all"))
    return Row(title, (*cells, f"{ratio:.3f}×", f"{whole['wall'] / asked['wall']:.3f}×"), f"≤ {MOST:.2f}×", ratio <= MOST)


def main() -> None:
    """Parse arguments, measure, report."""
    options = report.arguments(
        __doc__, "one trial of few questions, no verdicts", cache=False,
        trials=(3, "trials that count, of every search"), examples=(200, "questions per task; a search asks all 200"),
    )  # fmt: skip
    about, raw = report.machine(), dict[str, Any]()
    sections = run(1 if options.quick else options.trials, 4 if options.quick else options.examples, raw)
    report.conclude(RESULTS, about, sections, raw, quick=options.quick, as_markdown=options.markdown)


if __name__ == "__main__":
    main()
