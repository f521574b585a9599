"""One piece of work of `scale.py` in a fresh process: `python bench/scale_jobs.py JOB ARGUMENTS RESULT`, as `jobs.py`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import measured


def work(command: str, adapters: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Merge, inspect or bake adapters with one thread; CPU time and memory above Python with torch and plait."""
    import torch

    import plait
    import plait.api.files
    import plait.baking.pipeline
    import plait.inspection.report
    import plait.merging.pipeline

    torch.set_num_threads(1)
    torch.linalg.svdvals(torch.randn(9, 9) @ torch.randn(9, 9))
    with measured() as usage:
        getattr(plait, command)(adapters, workers=1, **settings)
    return asdict(usage)


JOBS = {"work": work}

if __name__ == "__main__":
    job, arguments, result = sys.argv[1:]
    Path(result).write_text(json.dumps(JOBS[job](**json.loads(arguments))), encoding="utf-8")
