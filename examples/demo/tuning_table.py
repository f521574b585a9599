"""What `plait tune` keeps of the three adapters: texts, objectives and granularities, each on the complete test split.

`python examples/demo/tuning_table.py` prints the table of docs/tuning.md; `--commands` shows the command of each row. Rows are
kept in `--cache` as they finish, so that a run that was stopped goes on. One row takes 2 to 8 minutes on two cores;
`--rows 'lines;8'` runs only those whose name begins so, `--seeds 0,1,2` each of them three times.
"""

from __future__ import annotations

import json
import resource
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from base_model import base_model
from tables import Found, Table, folder, plait, two_digits

from plait.tuning.teaching import evenly_spread

HERE = Path(__file__).resolve().parent
UNSEEN = "--split validation"  # texts that no adapter was trained on
ROWS: Mapping[str, str] = {
    "template, closed form": "--texts template --steps 0 --rank 24",
    "template": "--texts template",
    "lines, closed form": "--texts lines --steps 0",
    "lines": "--texts lines",
    "lines, rank 24": "--texts lines --rank 24",
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
        f"{UNSEEN} --count 200 --objective supermerge --granularity layer --method linear --set tune.group_size=2"
    ),
    "200 labels, regret": f"{UNSEEN} --count 200 --objective regret_smoothmax",
    "200, controls": f"{UNSEEN} --count 200 --controls",
}


def commands(name: str, seed: int, cache: Path) -> tuple[list[str], list[str]]:
    """Return the words of `plait tune` and of `plait eval` for a row."""
    out = folder(name, seed, cache)
    adapters = [str(p) for p in sorted((HERE / "adapters").iterdir())]
    tasks = ["--tasks", *(str(p) for p in sorted((HERE / "tasks").glob("*.yaml")))]
    base = ["--base-id", str(base_model())]
    tune = ["tune", *adapters, *tasks, *base, *shlex.split(ROWS[name]), "--seed", str(seed), "-o", str(out), "--force"]
    return tune, ["eval", str(out), *tasks, *base, "--batch-size", "32", "--workspace", str(cache / "answers"), "--json"]


def row(name: str, seed: int, cache: Path) -> dict[str, Any]:
    """Run a row, or find it."""
    out = folder(name, seed, cache)
    tune, judge = commands(name, seed, cache)
    kept = out.with_suffix(".json")
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if found["command"] == tune:
            return found
    before = _processor_time()
    plait(tune)
    seconds = _processor_time() - before
    judged = json.loads(plait(judge))
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


def _processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(found: Found) -> Iterator[str]:
    """Yield the lines of a Markdown table: a row per name, a pair per seed."""
    yield "| seen and learned | options of `plait tune` | rank | mean / worst | texts read / learned from | processor time |"
    yield "|---|---|---|---|---|---|"
    for name, seeds in found.items():
        runs = list(seeds.values())
        pairs = " · ".join(f"{two_digits(r['mean'])} / {two_digits(r['worst'])}" for r in runs)
        first = runs[0]
        read = f"{first['passes']['read']} / {first['passes']['learned']}"
        yield f"| {name} | `{ROWS[name]}` | {first['rank']} | {pairs} | {read} | {max(r['seconds'] for r in runs):.0f} s |"


if __name__ == "__main__":
    Table(__doc__, list(ROWS), seeds="0", cache="out/tuning-table", commands=commands, run=row, lines=table).main()
