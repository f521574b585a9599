"""What `plait sweep` finds of the three adapters: a grid that a person would try, and searches of as many candidates.

`python examples/demo/sweep_table.py` prints a table of them; `--commands` shows the command of each study. Studies and answers
are kept in `--cache`, so that a run that was stopped goes on. A study asks 20 candidates up to 600 questions each;
`--rows ties` runs only the studies whose name begins so.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from base_model import base_model
from tables import Found, Table, folder, plait, two_digits

HERE = Path(__file__).resolve().parent
NAMES = ("langid", "sentiment", "supersense")
#: Of sentiment, whose own adapter gains least over the base, one answer weighs more, and so all are asked.
PART = "--subset 100 --per-task sentiment=200"
TIES = "--method ties --method-space core"


def star() -> list[dict[str, float]]:
    """Return twenty points of weights: equal ones, and one of them doubled or halved."""
    found = [dict.fromkeys(NAMES, level) for level in (0.1, 0.15, 0.2, 0.3, 0.5)]
    for level, factors in ((0.2, (2.0, 0.5)), (0.3, (2.0, 0.5)), (0.15, (2.0,))):
        found += [dict.fromkeys(NAMES, level) | {name: level * factor} for factor in factors for name in NAMES]
    return found


def points() -> str:
    """Return them as `--points` takes them."""
    return json.dumps([{f"adapters.{name}.weight": round(weight, 3) for name, weight in at.items()} for at in star()])


ROWS: Mapping[str, str] = {
    "ties, grid": f"{TIES} --grid scale=0.3,0.5,0.8,1.2,1.8 --grid density=0.1,0.2,0.4,0.8 --race false",
    "ties, bayes": f"{TIES} --space scale=0.2..2:log --space density=0.05..1:log --race false",
    "ties, bayes, racing": f"{TIES} --space scale=0.2..2:log --space density=0.05..1:log",
    "weights, points": f"{PART} --method linear --space 'adapters.*.weight=0.05..1:log' --points '{points()}' --race false",
    "weights, bayes": f"{PART} --method linear --space 'adapters.*.weight=0.05..1:log' --race false",
    "weights, bayes, racing": f"{PART} --method linear --space 'adapters.*.weight=0.05..1:log'",
}


def command(name: str, seed: int, cache: Path) -> list[str]:
    """Return the words of `plait sweep` for a study."""
    adapters = [str(HERE / "adapters" / task) for task in NAMES]
    tasks = ["--tasks", *(str(HERE / "tasks" / f"{task}.yaml") for task in NAMES)]
    place = ["--workspace", str(cache / "answers"), "-o", str(folder(name, seed, cache))]
    chosen = [*shlex.split(ROWS[name]), "--load-dtype", "float32", "--seed", str(seed)]
    return ["sweep", *adapters, *tasks, "--base-id", str(base_model()), *chosen, *place]


def study(name: str, seed: int, cache: Path) -> dict[str, Any]:
    """Run a study, or find it."""
    file = folder(name, seed, cache) / "study.json"
    if not file.is_file():
        plait(command(name, seed, cache))
    return row(json.loads(file.read_text(encoding="utf-8")))


def row(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the table shows of a study."""
    best, tried = record["runs"][record["best_index"]], [r for r in record["runs"] if r["phase"] in ("point", "search")]
    leader = next(i for i, r in enumerate(tried, 1) if r is best) if best in tried else 0
    final = record["post_sweep_eval"]
    return {
        "params": {p: v for p, v in best["params"].items() if p not in record.get("older_params", ())},
        "score": best["score"],
        "mean": best["score_details"]["mean_interference_delta"],
        "after": leader,
        "asked": record["examples_asked"],
        "all": record["examples_of_all"],
        "test": (final["worst_recovery"], final["worst_interval"], final["mean_recovery"]),
    }


def table(found: Found) -> Iterator[str]:
    """Yield the lines of a Markdown table: a row per study and seed."""
    yield "| study | seed | best | worst / mean, validation | found at trial | examples asked | worst (95 %) / mean, test |"
    yield "|---|---|---|---|---|---|---|"
    for name, seeds in found.items():
        for seed, of in seeds.items():
            at = ", ".join(f"{_short(path)} {value:.2g}" for path, value in of["params"].items()) or "as given"
            worst, interval, mean = of["test"]
            between = f"{two_digits(interval[0])} – {two_digits(interval[1])}"
            yield (
                f"| {name} | {seed if is_search(name) else ''} | {at} | {two_digits(of['score'])} / {two_digits(of['mean'])} | "
                f"{of['after']} | {of['asked']} of {of['all']} | {two_digits(worst)} ({between}) / {two_digits(mean)} |"
            )


def _short(path: str) -> str:
    return path.removeprefix("method.").removeprefix("adapters.").removesuffix(".weight")


def is_search(name: str) -> bool:
    """Return whether a study depends on its seed: grids and points do not."""
    return "bayes" in name


if __name__ == "__main__":
    Table(
        __doc__,
        list(ROWS),
        seeds="0,1,2",
        cache="out/sweep-table",
        commands=lambda name, seed, cache: [command(name, seed, cache)],
        run=study,
        lines=table,
        has_seed=is_search,
    ).main()
