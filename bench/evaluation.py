"""Multiple choice, plait's compared with lm-eval's, in one run: `python bench/evaluation.py [--quick] [--markdown]`.

Both ask the same model in memory (SmolLM2-135M-Instruct) the same questions with the same batch size: plait's `multiple_choice`
and lm-eval's `HFLM.loglikelihood`, tokenization included, data and prompts made before. They take turns in one process; the
fastest of their turns counts. Judged is CPU time of all threads, which other work on the machine changes least; wall time
is next to it. In float32 the answers must be the same, one by one. Results go to `bench/results/evaluation.json` too.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import report
from processes import HERE, run_job
from report import Row, Section

sys.path.insert(0, str(HERE.parent / "examples" / "demo"))
from base_model import base_model

RESULTS = HERE / "results" / "evaluation.json"
TASKS = HERE.parent / "examples" / "demo" / "tasks"
SCRIPT = "evaluation_jobs.py"
BATCH_SIZE = 16
EXAMPLES = 16
SHOTS = 4
KINDS = ("animal", "artifact", "body", "food", "person", "place", "plant", "substance")


def run(cache: Path, rounds: int, examples: int, raw: dict[str, Any]) -> list[Section]:
    """Measure everything."""
    sections = []
    for dtype in ("float32", "bfloat16"):
        section = Section(
            f"{examples} questions, batches of {BATCH_SIZE}, {dtype}", ("plait", "lm-eval", "CPU time", "wall time")
        )
        for title, make in WORKLOADS.items():
            file = _write(cache / f"{make.__name__}.json", make(examples))
            found = run_job(
                "sides",
                script=SCRIPT,
                base=str(base_model()),
                file=str(file),
                dtype=dtype,
                batch_size=BATCH_SIZE,
                rounds=rounds,
            )
            raw[f"{title}, {dtype}"] = found
            section.rows += _rows(title, found, dtype)
        sections.append(section)
    sections[0].notes.append("Ratios are lm-eval's time by plait's: throughput.")
    sections[1].notes.append(
        "bfloat16 rounds what other batches sum in another order; answers that are nearly tied may differ."
    )
    return sections


def labels(count: int) -> list[dict[str, Any]]:
    """Return questions after one instruction, with eight labels of one token each."""
    return [_label_row(_INSTRUCTION, row) for row in _texts("supersense", "test")[:count]]


def worked(count: int) -> list[dict[str, Any]]:
    """Return the same questions after a few worked examples."""
    shots = "".join(f"{_question(row)} {row['label']}\n\n" for row in _texts("supersense", "train")[:SHOTS])
    return [_label_row(_INSTRUCTION + shots, row) for row in _texts("supersense", "test")[:count]]


def endings(count: int) -> list[dict[str, Any]]:
    """Return beginnings of texts that share nothing, with four endings of several tokens each, one of them their own."""
    words = [row["text"].split() for row in _texts("supersense", "test") if len(row["text"].split()) >= 8][: count + 3]
    halves = [(" ".join(w[: len(w) // 2]), " " + " ".join(w[len(w) // 2 :])) for w in words]
    rows = []
    for i, (beginning, own) in enumerate(halves[:count]):
        others = [halves[i + k][1] for k in (1, 2, 3)]
        choices = [*others[: i % 4], own, *others[i % 4 :]]
        rows.append({"prompt": beginning, "choices": choices, "gold": i % 4})
    return rows


WORKLOADS = {
    "one instruction, 8 labels": labels,
    f"{SHOTS} worked examples, 8 labels": worked,
    "nothing shared, 4 endings of several tokens": endings,
}
_INSTRUCTION = f"Which kind of thing is defined: {', '.join(KINDS)}?\n\n"


def _question(row: dict[str, Any]) -> str:
    return f"Text: {row['text']}\nKind:"


def _label_row(before: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": before + _question(row), "choices": [f" {k}" for k in KINDS], "gold": KINDS.index(row["label"])}


def _texts(task: str, split: str) -> list[dict[str, Any]]:
    lines = (TASKS / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def _rows(title: str, found: dict[str, Any], dtype: str) -> list[Row]:
    ours, theirs = found["plait"], found["lm-eval"]
    ratio = theirs["cpu"] / ours["cpu"]
    cells = (f"{ours['cpu']:.2f} s", f"{theirs['cpu']:.2f} s", f"{ratio:.2f}×", f"{theirs['wall'] / ours['wall']:.2f}×")
    same = f"{found['same']} of {found['questions']}"
    answers = (same, "", f"≤ {found['largest']:.1e} nats apart", "")
    exact = dtype == "float32"
    return [
        Row(title, cells, "≥ 1.00×", ratio >= 1),
        Row("  same answers", answers, "all" if exact else "", found["same"] == found["questions"] if exact else None),
    ]


def main() -> None:
    """Parse arguments, measure, report."""
    options = report.arguments(__doc__, "one turn of a few questions, no verdicts", rounds=(2, "turns that each side takes"))
    machine, raw = report.machine(), {}
    machine["lm_eval"] = version("lm_eval")
    sections = run(options.cache.resolve(), 1 if options.quick else options.rounds, 8 if options.quick else EXAMPLES, raw)
    report.conclude(RESULTS, machine, sections, raw, quick=options.quick, as_markdown=options.markdown)


if __name__ == "__main__":
    main()
