"""One job in a fresh process, like `jobs.py`: a model asked the same questions by plait and by lm-eval."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Scores = list[list[float]]  # per question, the log-likelihood of every choice


def sides(base: str, file: str, dtype: str, batch_size: int, rounds: int) -> dict[str, Any]:
    """Time both sides in turn, so that a busy moment hits them alike, and compare what they find.

    Args:
        base: folder of the model.
        file: JSON rows of `prompt`, `choices` (with their blank) and `gold`.
        dtype: of the model.
        batch_size: of both: prompts at a time here, pairs of prompt and choice at a time there.
        rounds: turns of each, after one that is not counted.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = json.loads(Path(file).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    runs = {"plait": _plait(model, tokenizer, file, batch_size), "lm-eval": _lm_eval(model, tokenizer, rows, batch_size)}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    found: dict[str, Scores] = {}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            found[name] = run()
            took[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    pairs = list(zip(found["plait"], found["lm-eval"], strict=True))
    return {
        **{name: _fastest(times[1:] or times) for name, times in took.items()},
        "questions": len(rows),
        "same": sum(a.index(max(a)) == b.index(max(b)) for a, b in pairs),
        "largest": max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)),
        "right": sum(a.index(max(a)) == row["gold"] for (a, _), row in zip(pairs, rows, strict=True)),
    }


def _plait(model: Any, tokenizer: Any, file: str, batch_size: int) -> Callable[[], Scores]:
    from plait.evaluation.scoring import answer_examples
    from plait.tasks.examples import read_examples
    from plait.tasks.kinds.multiple_choice import MultipleChoice
    from plait.tasks.schema import Data, Split

    task = MultipleChoice(
        name="choices",
        kind="multiple_choice",
        data=Data(path=file),
        splits={"test": Split()},
        prompt="{{ prompt }}",
        choices="choices",
        target="{{ choices[gold] }}",
    )
    examples = read_examples(task, "test")
    return lambda: [list(a.scores) for a in answer_examples(model, tokenizer, examples, batch_size=batch_size)]


def _lm_eval(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], batch_size: int) -> Callable[[], Scores]:
    logging.disable(logging.WARNING)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    requests = [
        Instance("loglikelihood", row, (row["prompt"], choice), i, ("choices", n, 1))
        for n, row in enumerate(rows)
        for i, choice in enumerate(row["choices"])
    ]

    def run() -> Scores:
        found = iter(lm.loglikelihood(requests, disable_tqdm=True))
        return [[float(next(found)[0]) for _ in row["choices"]] for row in rows]

    return run


def _fastest(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    return {"wall": min(wall for wall, _ in pairs), "cpu": min(cpu for _, cpu in pairs)}


JOBS = {job.__name__: job for job in (sides,)}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    job, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(JOBS[job](**json.loads(arguments))), encoding="utf-8")
