"""Try many corruptions: `python -m tests.fuzz 3000 [first seed]`; exit code 1 when there is a finding.

Each worker is a process that does its seeds one by one. One that is silent for too long, or dies, is a finding, and another one
goes on behind it. `python -m tests.fuzz --seed 17` does one again and shows all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SILENCE = 180  # seconds after which a worker is given up
ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("count", nargs="?", type=int, default=1000)
    parser.add_argument("first", nargs="?", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--work", nargs=3, type=int, metavar=("FIRST", "STEP", "END"))
    parser.add_argument("--world", type=Path)
    asked = parser.parse_args()
    if asked.work:
        return work(*asked.work, asked.world)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        world = Path(place) / "world"
        make(world)
        if asked.seed is not None:
            return show(asked.seed, world, Path(place) / "scratch")
        return supervise(asked.first, asked.count, asked.jobs, world)


def make(world: Path) -> None:
    """Build the world in a process of its own, and in the world: what is built names relative paths."""
    world.mkdir()
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        "from pathlib import Path; from tests.fuzz.world import build; build(Path())",
    ]
    subprocess.run(words, check=True, cwd=world, capture_output=True, env=environment())


def environment() -> dict[str, str]:
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))), "COLUMNS": "200"}


def check_source() -> None:
    """Make sure that the plait of this tree is tried, and none that is installed.

    Raises:
        SystemExit: it is another one.
    """
    sys.path[:0] = [str(ROOT / "src")]
    import plait

    if not Path(plait.__file__).resolve().is_relative_to(ROOT.resolve()):
        raise SystemExit(f"{plait.__file__} would be tried, which is not in {ROOT}")


def show(seed: int, world: Path, scratch: Path) -> int:
    os.environ.update(environment())
    check_source()
    from tests.fuzz.running import attempt

    outcome = attempt(seed, world, scratch)
    print(outcome.what, outcome.shown, f"exit {outcome.code}", outcome.finding or "as it should be", sep="\n")
    return int(outcome.finding is not None)


def work(first: int, step: int, end: int, world: Path) -> int:
    """Do every `step`-th seed and print one line of JSON each."""
    check_source()
    from tests.fuzz.running import attempt

    lines = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print past Python is no line of ours
    with tempfile.TemporaryDirectory(prefix="fuzz-work-") as place:
        for seed in range(first, end, step):
            found = attempt(seed, world, Path(place) / "scratch")
            line = [seed, found.code, found.what, found.finding, found.shown if found.finding else ""]
            print(json.dumps(line), file=lines, flush=True)
    return 0


class Worker:
    """A process, what it is at, and when it was last heard of."""

    def __init__(self, first: int, step: int, end: int, world: Path, lines: queue.Queue[tuple[Worker, str | None]]) -> None:
        self.next, self.step, self.end, self.heard = first, step, end, time.monotonic()
        words = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--world", str(world), "--work"]
        words += map(str, (first, step, end))
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(words, text=True, env=environment(), **quiet)
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: queue.Queue[tuple[Worker, str | None]]) -> None:
        for line in self.process.stdout or ():
            lines.put((self, line))
        lines.put((self, None))


def supervise(first: int, count: int, jobs: int, world: Path) -> int:
    lines: queue.Queue[tuple[Worker, str | None]] = queue.Queue()
    end, started, findings, done = first + count, time.monotonic(), 0, 0
    codes: dict[str, int] = {}
    at_work = {Worker(first + i, jobs, end, world, lines) for i in range(min(jobs, count))}
    while at_work:
        try:
            worker, line = lines.get(timeout=1)
        except queue.Empty:
            for worker in [w for w in at_work if time.monotonic() - w.heard > SILENCE]:
                worker.process.kill()  # its end is read, and taken for a death
            continue
        if line is not None:
            seed, code, what, finding, shown = json.loads(line)
            worker.next, worker.heard, done = seed + worker.step, time.monotonic(), done + 1
            codes[str(code)] = codes.get(str(code), 0) + 1
            if finding:
                findings += 1
                print(f"\nseed {seed}: {finding}\n  {what}\n  {shown}", flush=True)
            continue
        at_work.discard(worker)
        if worker.process.wait() != 0 and worker.next < end:
            findings += 1
            print(f"\nseed {worker.next}: the process died or was silent for {SILENCE} s", flush=True)
            if worker.next + worker.step < end:
                at_work.add(Worker(worker.next + worker.step, worker.step, end, world, lines))
    spent = time.monotonic() - started
    print(f"{done} corruptions in {spent:.0f} s, exit codes {codes}: {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
