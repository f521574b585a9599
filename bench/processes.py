"""Fresh processes: jobs of `jobs.py` and its like, and bare commands whose start-up time is wanted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
JOB_LIMIT_S = 3600


def run_job(job: str, *, script: str = "jobs.py", **arguments: Any) -> dict[str, Any]:
    """Run a job of a script here in a fresh process; return its result with `wall`, the whole process's seconds."""
    os.sync()  # what earlier jobs wrote must not be waited for by this one
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, str(HERE / script), job, json.dumps(arguments), str(result)]
        start = time.perf_counter()
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=JOB_LIMIT_S)
        wall = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{job} {arguments} failed:\n{done.stderr}")
        return {"wall": wall, **json.loads(result.read_text(encoding="utf-8"))}


def time_command(*arguments: str) -> float:
    """Return the seconds that Python takes from its start to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=_environment(), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def peak_of(module: str, *arguments: str) -> int:
    """Return the largest resident set, in bytes, of a Python process that runs a module as a program; Linux alone."""
    code = (
        "import runpy, sys\nsys.argv[:1] = []\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "except SystemExit as left: assert not left.code\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", code, module, *arguments]
    done = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, text=True, check=True)
    return 1024 * int(done.stdout.split()[-1])


def _environment() -> dict[str, str]:
    """Find plait in this checkout when it is not installed, and keep everything else off the network and quiet.

    Python keeps what it has compiled, as where packages are installed.
    """
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH", ""), str(HERE.parent / "src")) if p)
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
