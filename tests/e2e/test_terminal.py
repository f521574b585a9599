"""What a user's terminal shows of commands that load libraries: plait's own lines, and no warning of any library."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from tests.language_models import WORDS, label, save_model, train_adapter, write_task

_WARNS = re.compile(r"warn|deprecat|will be removed|\[transformers|Traceback", re.IGNORECASE)
COMMANDS = """\
merge a b -o merged
eval a b --tasks tasks/sort.yaml tasks/rate.yaml --base-id base
verify merged --parity prompts.txt --base-id base
bake a b --base-id base -o baked
report merged -o page.html --figures figures
sft --model_name_or_path base --dataset_name_or_path rows.jsonl --use_peft --max_steps 1 --output_dir run
train phases.yaml -o trained
""".splitlines()
# In one process, whose libraries are imported as the commands need them: what one of them warns of once, it warns of here.
EACH = """
import sys
from plait.cli.main import main
for line in sys.argv[1:]:
    print(f"$ plait {line}", flush=True)
    try:
        main(line.split())
    except SystemExit as left:
        if left.code:
            raise
"""


def test_no_library_warns(tmp_path):
    save_model(tmp_path / "base")
    for name, task in {"a": "sort", "b": "rate"}.items():
        train_adapter(tmp_path / name, task, steps=1)
        write_task(tmp_path / "tasks", task, splits={"train": "test.jsonl", "test": "test.jsonl"})
    rows = [{"prompt": f"sort {word} :", "completion": f" {label('sort', word)}"} for word in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "phases.yaml").write_text(
        "base_model: ./base\nlora: {r: 2, targets: all-linear}\narguments: {max_steps: 1}\n"
        "phases: [tasks/sort.yaml, tasks/rate.yaml]\n"
    )
    (tmp_path / "prompts.txt").write_text("sort w1 :\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", EACH, *COMMANDS], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert [line for line in COMMANDS if f"$ plait {line}\n" in done.stdout] == COMMANDS
    assert not [line for line in re.split(r"[\r\n]+", done.stdout) if _WARNS.search(line)], done.stdout
