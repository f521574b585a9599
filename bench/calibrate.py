"""Second moments of 200 texts of a task and one forward pass over them: `python bench/calibrate.py [--quick] [--markdown]`.

SmolLM2-135M with the demo's three adapters, one on its own task's training texts, one process per dtype. All read the same
tokens, without padding: the bare base, as transformers runs it, in batches of one length; the same in calibration's batches and
without the output layer but for one position; and the adapter's model with the moments of all 210 modules taken and written.
They take turns; the fastest of their turns counts, in CPU time of all threads.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import report
from processes import HERE, run_job
from report import Row, Section

sys.path.insert(0, str(HERE.parent / "examples" / "demo"))
from base_model import base_model

RESULTS = HERE / "results" / "calibrate.json"
DEMO = HERE.parent / "examples" / "demo"
NAMES = ("sentiment", "supersense", "langid")
MEASURED = NAMES[:1]  # of all three a turn did not end in five minutes on a busy machine
TEXTS = 200
FIRST = 4  # texts of the turn that is not counted
MOST_TIME = 1.5


def moments(base: str, dtype: str, texts: int, rounds: int) -> dict[str, Any]:
    """Time all for every task that is measured (the job that runs in a fresh process).

    Args:
        base: folder of the model.
        dtype: of the model.
        texts: per task.
        rounds: turns of each, after one with a few texts that is not counted.
    """
    import torch

    from plait.adapters.adapter import Adapter
    from plait.calibration.inputs import encode_texts
    from plait.calibration.moments import take_moments, without_padding
    from plait.calibration.passages import Reader
    from plait.calibration.texts import read_texts
    from plait.merging.moments import write_moments
    from plait.mixture import Mixture
    from plait.tasks.loading import load_task

    mixture = Mixture.load(base, [Adapter.open(DEMO / "adapters" / n, n) for n in NAMES], dtype=dtype)
    modules = {target: mixture.module(target) for target in mixture.axes.modules}
    found: dict[str, Any] = {}
    for name in MEASURED:
        task = load_task(DEMO / "tasks" / f"{name}.yaml")
        passages = encode_texts(mixture, read_texts(task, kind="split", split="train", count=texts, seed=0), name)

        def forward(passages: Any) -> None:
            ordered = sorted(passages, key=lambda p: len(p.prompt))
            batches = [list(group) for _, group in groupby(ordered, key=lambda p: len(p.prompt))]
            with torch.inference_mode(), mixture.active(None) as model:
                for batch in batches:
                    model(input_ids=torch.tensor([p.prompt for p in batch]), use_cache=False)

        def without_logits(passages: Any) -> None:
            with torch.inference_mode(), mixture.active(None) as model:
                for batch in without_padding(Reader(model), passages):
                    Reader(model).read(batch)

        def taken(passages: Any, name: str = name) -> None:
            with tempfile.TemporaryDirectory() as folder, mixture.active({name: 1.0}) as model:
                write_moments(Path(folder, "moments.safetensors"), take_moments(model, modules, passages).found())

        works = {"forward": forward, "without logits": without_logits, "moments": taken}
        times: dict[str, list[tuple[float, float]]] = {label: [] for label in works}
        for work in works.values():
            work(passages[:FIRST])
        for _ in range(rounds):
            for label, work in works.items():
                times[label].append(_timed(partial(work, passages)))
        found[name] = {label: min(turns) for label, turns in times.items()}
        found[name]["tokens"] = sum(p.tokens for p in passages)
    return found


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def run(texts: int, rounds: int, raw: dict[str, Any]) -> list[Section]:
    """Measure everything."""
    section = Section(
        f"Second moments of {texts} texts of a task",
        ("plait calibrate", "forward pass", "CPU time", "wall time", "CPU time, without logits"),
    )
    for dtype in ("float32", "bfloat16"):
        raw[dtype] = found = run_job(
            "moments", script="calibrate.py", base=str(base_model()), dtype=dtype, texts=texts, rounds=rounds
        )
        for name in MEASURED:
            (ours, our_wall), (theirs, their_wall) = found[name]["moments"], found[name]["forward"]
            bare = found[name]["without logits"][0]
            cells = (
                f"{ours:.2f} s", f"{theirs:.2f} s", f"{ours / theirs:.2f}×", f"{our_wall / their_wall:.2f}×",
                f"{ours / bare:.2f}×",
            )  # fmt: skip
            title = f"{dtype}, {name}, {found[name]['tokens']} tokens"
            section.rows.append(Row(title, cells, f"≤ {MOST_TIME:.2f}×", ours / theirs <= MOST_TIME))
    return [section]


def main() -> None:
    """Parse arguments, measure, report; or do the job that this script gives to a process of its own."""
    if len(sys.argv) == 4 and sys.argv[1] == "moments":
        Path(sys.argv[3]).write_text(json.dumps(moments(**json.loads(sys.argv[2]))), encoding="utf-8")
        return
    options = report.arguments(__doc__, "one turn, 16 texts, no verdicts", cache=False, rounds=(1, "turns that each takes"))
    machine, raw = report.machine(), {}
    texts, rounds = (16, 1) if options.quick else (TEXTS, options.rounds)
    sections = run(texts, rounds, raw)
    report.conclude(RESULTS, machine, sections, raw, quick=options.quick, as_markdown=options.markdown)


if __name__ == "__main__":
    main()
