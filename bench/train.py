"""`plait sft` compared with TRL's own script, in one run: `python bench/train.py [--quick] [--markdown]`.

Both are whole processes with the same flags: a LoRA of all linear layers of SmolLM2-135M-Instruct on rows of the demo's
supersense task, on the processor, in float32. They take turns; the fastest of their turns counts. Judged is CPU time of all
threads, which other work on the machine changes least; wall time is next to it. The adapters must be equal, bit for bit.
Results go to `bench/results/train.json` too.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

import report
from processes import HERE, _environment
from report import Row, Section

sys.path.insert(0, str(HERE.parent / "examples" / "demo"))
from base_model import base_model

RESULTS = HERE / "results" / "train.json"
TASK = HERE.parent / "examples" / "demo" / "tasks" / "supersense.yaml"
TARGET = 1.05
BATCH_SIZE = 4
COMMANDS = {"plait sft": ["-m", "plait", "sft"], "TRL's script": ["-m", "trl.scripts.sft"]}


def run(cache: Path, steps: int, rounds: int, raw: dict[str, Any]) -> list[Section]:
    """Measure both sides."""
    rows = _rows(cache, steps * BATCH_SIZE)
    raw |= {name: [] for name in COMMANDS}
    for turn in range(rounds):
        for name, command in COMMANDS.items():
            raw[name].append(_measured(command, rows, cache / f"{name.split()[0]}-{turn}", steps))
    ours, theirs = (cache / f"{name.split()[0]}-0" for name in COMMANDS)
    equal = _equal(ours / "adapter" / "adapter_model.safetensors", theirs / "adapter_model.safetensors")
    section = Section(f"{steps} steps of {BATCH_SIZE} examples, LoRA r 16, float32", (*COMMANDS, "ratio"))
    for key, title in (("cpu", "CPU time"), ("wall", "wall time")):
        a, b = (min(run[key] for run in raw[name]) for name in COMMANDS)
        judged = {"target": f"≤ {TARGET}", "reached": a <= TARGET * b} if key == "cpu" else {}
        section.rows.append(Row(title, (f"{a:.1f} s", f"{b:.1f} s", f"{a / b:.3f}"), **judged))
    section.rows.append(Row("adapters", ("equal" if equal else "different", "", ""), "equal", equal))
    return [section]


def _rows(cache: Path, count: int) -> Path:
    """Write prompts and completions into a folder that both sides read."""
    from plait.tasks.examples import read_examples
    from plait.tasks.loading import load_tasks

    (task,) = load_tasks([TASK])
    items = read_examples(task, "train").items[:count]
    folder = cache / "rows"
    folder.mkdir()
    lines = [json.dumps({"prompt": item.prompt, "completion": item.target}) for item in items]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _measured(command: list[str], rows: Path, out: Path, steps: int) -> dict[str, float]:
    """Run one side as a process of its own; return its seconds."""
    flags = {
        "model_name_or_path": base_model(), "dataset_name": rows, "output_dir": out, "max_steps": steps, "lora_r": 16,
        "lora_target_modules": "all-linear", "per_device_train_batch_size": BATCH_SIZE, "learning_rate": 1e-4,
        "save_strategy": "no", "bf16": False, "report_to": "none", "eos_token": "<|im_end|>",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command, *words, "--use_peft", "--use_cpu"], env=_environment(), capture_output=True, text=True
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr}")
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def _equal(a: Path, b: Path) -> bool:
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def main() -> None:
    """Parse arguments, measure, report."""
    options = report.arguments(
        __doc__,
        "one turn of one step, no verdicts",
        cache=False,
        steps=(60, "of the optimizer"),
        rounds=(3, "turns that each side takes"),
    )
    machine, raw = report.machine(), {}
    machine["trl"] = version("trl")
    with tempfile.TemporaryDirectory(prefix="plait-bench-") as cache:
        sections = run(Path(cache), 1 if options.quick else options.steps, 1 if options.quick else options.rounds, raw)
    report.conclude(RESULTS, machine, sections, raw, quick=options.quick, as_markdown=options.markdown)


if __name__ == "__main__":
    main()
