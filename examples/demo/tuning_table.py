"""What `plait tune` keeps of the three adapters: texts, objectives and granularities, each on the complete test split.

`python examples/demo/tuning_table.py` prints the table of docs/tuning.md; `--commands` shows the command of each row. Rows are
kept in `--cache` as they finish, so that a run that was stopped goes on. One row takes 2 to 8 minutes on two cores;
`--rows lines,8` runs only those whose name begins so, `--seeds 0,1,2` each of them three times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from base_model import base_model

from plait.tuning.teaching import evenly_spread

HERE = Path(__file__).resolve().parent
UNSEEN = "--split validation"  # texts that no adapter was trained on
ROWS: Mapping[str, str] = {
    "template, closed form": "--texts template --steps 0 --rank 24",
    "template": "--texts template",
    "lines, closed form": "--texts lines --steps 0",
    "lines": "--texts lines",
    "8": f"{UNSEEN} --count 8",
    "128": UNSEEN,
    "200": f"{UNSEEN} --count 200",
    "200, rank 24": f"{UNSEEN} --count 200 --rank 24",
    "200, task": f"{UNSEEN} --count 200 --granularity task",
    "200, layer": f"{UNSEEN} --count 200 --granularity layer",
    "200, module": f"{UNSEEN} --count 200 --granularity module",
    "200, direction": f"{UNSEEN} --count 200 --granularity direction",
    "200, hidden": f"{UNSEEN} --count 200 --objective hidden",
    "200, adamerging, module": f"{UNSEEN} --count 200 --objective adamerging --granularity module --method linear",
    "200 labels, gradient": f"{UNSEEN} --count 200 --objective gradient",
    "200 labels, gradient, module": f"{UNSEEN} --count 200 --objective gradient --granularity module",
    "200 labels, supermerge, layer": f"{UNSEEN} --count 200 --objective supermerge --granularity layer",
    "200 labels, supermerge, tree": (
        f"{UNSEEN} --count 200 --objective supermerge --granularity layer --set tune.group_size=2"
    ),
    "200 labels, regret": f"{UNSEEN} --count 200 --objective regret_smoothmax",
    "200, controls": f"{UNSEEN} --count 200 --controls",
}


def commands(name: str, seed: int, out: Path, workspace: Path) -> tuple[list[str], list[str]]:
    """Return the words of `plait tune` and of `plait eval` for a row."""
    adapters = [str(p) for p in sorted((HERE / "adapters").iterdir())]
    tasks = ["--tasks", *(str(p) for p in sorted((HERE / "tasks").glob("*.yaml")))]
    base = ["--base-id", str(base_model())]
    tune = ["tune", *adapters, *tasks, *base, *shlex.split(ROWS[name]), "--seed", str(seed), "-o", str(out), "--force"]
    return tune, ["eval", str(out), *tasks, *base, "--batch-size", "32", "--workspace", str(workspace), "--json"]


def row(name: str, seed: int, cache: Path) -> dict[str, Any]:
    """Run a row, or find it."""
    out = cache / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    tune, judge = commands(name, seed, out, cache / "answers")
    kept = out.with_suffix(".json")
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if found["command"] == tune:
            return found
    before = _processor_time()
    _plait(tune)
    seconds = _processor_time() - before
    judged = json.loads(_plait(judge))
    record = json.loads((out / "tuning.json").read_text(encoding="utf-8"))
    found = {
        "command": tune,
        "rank": record["rank"],
        "seconds": seconds,
        "tasks": {t["task"]: t["recovery"] for t in judged["tasks"]},
        "mean": judged["mean_recovery"],
        "worst": judged["worst_recovery"],
        "share": {"start": record["looks"][0]["share"], "kept": _share(record, record["kept_step"])}
        | {key: record[key]["held"]["share"] for key in ("control", "random") if record[key]},
        "passes": passes(record),
    }
    kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def _share(record: Mapping[str, Any], step: int) -> float:
    return next(float(look["share"]) for look in record["looks"] if look["step"] == step)


def passes(record: Mapping[str, Any]) -> dict[str, int]:
    """Return how many texts were read without gradients, and how many were learned from."""
    spec, texts = record["recipe"]["tune"], record["texts"]
    held = [min(24, round(spec["held_out"] * t["count"])) for t in texts]
    held = [h if h >= 4 else t["count"] for h, t in zip(held, texts, strict=True)]
    answers = sum(t["count"] + len(evenly_spread(t["count"])) for t in texts)
    steps = len(record["losses"])
    return {
        "read": answers + sum(held) * (1 + len(record["scales"]) + len(record["looks"])),
        "learned": steps * spec["prompts"] * spec["accumulate"] * len(texts),
    }


def _plait(words: Sequence[str]) -> str:
    return subprocess.run([sys.executable, "-m", "plait", *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def _processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Yield the lines of a Markdown table: a row per name, a pair per seed."""
    yield "| seen and learned | options of `plait tune` | rank | mean / worst | texts read / learned from | processor time |"
    yield "|---|---|---|---|---|---|"
    for name, runs in found.items():
        pairs = " · ".join(f"{_two(r['mean'])} / {_two(r['worst'])}" for r in runs)
        first = runs[0]
        read = f"{first['passes']['read']} / {first['passes']['learned']}"
        yield f"| {name} | `{ROWS[name]}` | {first['rank']} | {pairs} | {read} | {max(r['seconds'] for r in runs):.0f} s |"


def _two(share: float) -> str:
    return f"{share:.2f}".replace("0.", ".", 1)


def main() -> None:
    """Run rows, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="names, or how they begin, with commas between; all without")
    parser.add_argument("--seeds", default="0", help="with commas between [%(default)s]")
    parser.add_argument("--cache", type=Path, default=Path("out/tuning-table"), help="where rows are kept [%(default)s]")
    parser.add_argument("--commands", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args()
    wanted = tuple(options.rows.split(","))
    names = [name for name in ROWS if name.startswith(wanted)]
    seeds = [int(s) for s in options.seeds.split(",")]
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.commands:
        for name in names:
            for words in commands(name, seeds[0], options.cache / "tuned", options.cache / "answers"):
                print("plait", shlex.join(words))
        return
    os.environ.setdefault("TQDM_DISABLE", "1")
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        found[name] = [row(name, seed, options.cache) for seed in seeds]
        print(f"{name}: {found[name]}", file=sys.stderr)
    print(*table(found), sep="\n")


if __name__ == "__main__":
    main()
