"""What `plait sweep` finds of the three adapters: a grid that a person would try, and searches of as many candidates.

`python examples/demo/sweep_table.py` prints a table of them; `--commands` shows the command of each study. Studies and answers
are kept in `--cache`, so that a run that was stopped goes on. A study asks 20 candidates up to 400 questions each;
`--rows ties` runs only the studies whose name begins so.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from base_model import base_model

HERE = Path(__file__).resolve().parent
NAMES = ("langid", "sentiment", "supersense")
#: Of sentiment, whose own adapter gains least over the base, one answer weighs more, and so all are asked.
ASKED = "--subset 100 --per-task sentiment=200 --load-dtype float32"
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
    "weights, points": f"--method linear --space 'adapters.*.weight=0.05..1:log' --points '{points()}' --race false",
    "weights, bayes": "--method linear --space 'adapters.*.weight=0.05..1:log' --race false",
    "weights, bayes, racing": "--method linear --space 'adapters.*.weight=0.05..1:log'",
}


def command(name: str, seed: int, cache: Path) -> list[str]:
    """Return the words of `plait sweep` for a study."""
    adapters = [str(HERE / "adapters" / task) for task in NAMES]
    tasks = ["--tasks", *(str(HERE / "tasks" / f"{task}.yaml") for task in NAMES)]
    place = ["--workspace", str(cache / "answers"), "-o", str(folder(name, seed, cache))]
    chosen = [*shlex.split(ROWS[name]), *shlex.split(ASKED), "--seed", str(seed)]
    return ["sweep", *adapters, *tasks, "--base-id", str(base_model()), *chosen, *place]


def folder(name: str, seed: int, cache: Path) -> Path:
    """Return where a study is kept."""
    return cache / f"{name.replace(', ', '-')}-{seed}"


def study(name: str, seed: int, cache: Path) -> dict[str, Any]:
    """Run a study, or find it."""
    file = folder(name, seed, cache) / "study.json"
    if not file.is_file():
        subprocess.run([sys.executable, "-m", "plait", *command(name, seed, cache)], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def row(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table says of a study."""
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


def table(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Iterator[str]:
    """Yield the lines of a Markdown table: a row per study and seed."""
    yield "| study | seed | best | worst / mean, validation | found at trial | examples asked | worst (95 %) / mean, test |"
    yield "|---|---|---|---|---|---|---|"
    for name, seeds in found.items():
        for seed, of in seeds.items():
            at = ", ".join(f"{_short(path)} {value:.2g}" for path, value in of["params"].items()) or "as given"
            worst, interval, mean = of["test"]
            between = f"{_two(interval[0])} – {_two(interval[1])}"
            yield (
                f"| {name} | {'' if 'bayes' not in name else seed} | {at} | {_two(of['score'])} / {_two(of['mean'])} | "
                f"{of['after']} | {of['asked']} of {of['all']} | {_two(worst)} ({between}) / {_two(mean)} |"
            )


def _short(path: str) -> str:
    return path.removeprefix("method.").removeprefix("adapters.").removesuffix(".weight")


def _two(share: float) -> str:
    return f"{share:.2f}".replace("0.", ".", 1)


def main() -> None:
    """Run studies, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="names, or how they begin, separated by semicolons; all without")
    parser.add_argument("--seeds", default="0,1,2", help="of the searches, with commas between [%(default)s]")
    parser.add_argument("--cache", type=Path, default=Path("out/sweep-table"), help="where all is kept [%(default)s]")
    parser.add_argument("--commands", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args()
    wanted = tuple(options.rows.split(";"))
    seeds = [int(s) for s in options.seeds.split(",")]
    chosen = {n: seeds if "bayes" in n else [0] for n in ROWS if n.startswith(wanted)}
    if options.commands:
        for words in chain.from_iterable((command(n, s, options.cache) for s in some) for n, some in chosen.items()):
            print("plait", shlex.join(words))
        return
    os.environ.setdefault("TQDM_DISABLE", "1")
    print(*table({n: {s: row(study(n, s, options.cache)) for s in some} for n, some in chosen.items()}), sep="\n")


if __name__ == "__main__":
    main()
