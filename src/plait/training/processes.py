"""Phases side by side on this machine, each in a process of its own, with its share of cores or a GPU to itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from plait.results.progress import Progress
from plait.training.phases import PlannedPhase
from plait.training.runners import PhaseStatus, receive

_TAIL = 3
_WORKER = (sys.executable, "-m", "plait.training.worker")


@dataclass
class _Child:
    """A phase at work.

    Attributes:
        phase: which.
        process: its own.
        slot: the place of `workers` that it takes.
        status: how it ended, as it reported itself.
        reader: reads what it writes, and waits for its end.
    """

    phase: PlannedPhase
    process: subprocess.Popen[str]
    slot: int
    status: PhaseStatus | None = None
    reader: threading.Thread | None = None

    def stop(self) -> None:
        """End it, where it has not ended by itself."""
        self.process.kill()
        if self.reader is not None:
            self.reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # it died before it read its request
                    pipe.close()


def run_in_processes(
    phases: Sequence[PlannedPhase], parts: Mapping[str, Progress], *, workers: int, lock: int | None, devices: Sequence[str]
) -> Iterator[PhaseStatus]:
    """Train phases in processes, so many at a time; yield them as they end. Leaving the iterator ends them all.

    Args:
        phases: what is trained.
        parts: name of a phase → what receives its progress.
        workers: processes at a time.
        lock: file descriptor of the lock on the output, free when this process and all of these are gone; None for no lock.
        devices: GPUs, as CUDA_VISIBLE_DEVICES names them; empty where there is none.
    """
    waiting, free = list(phases), list(range(workers))
    events: SimpleQueue[tuple[_Child, Any]] = SimpleQueue()
    running: list[_Child] = []
    try:
        while waiting or running:
            while waiting and free:
                running.append(_start(waiting.pop(0), free.pop(0), workers, lock, devices, events))
            child, event = events.get()
            if isinstance(event, list):
                receive(parts[child.phase.name], event)
                continue
            if event is not None:
                child.status = PhaseStatus.from_json(child.phase.name, event)
                continue
            running.remove(child)
            child.stop()
            free.insert(0, child.slot)
            yield child.status or _died(child)
    finally:
        for child in running:
            child.stop()


def _start(
    phase: PlannedPhase, slot: int, workers: int, lock: int | None, devices: Sequence[str], events: SimpleQueue[Any]
) -> _Child:
    phase.log.parent.mkdir(parents=True, exist_ok=True)
    places = {"folder": str(phase.folder), "log": str(phase.log)}
    request = {"name": phase.name, "job": phase.job.model_dump(mode="json"), **places}
    with phase.log.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            _WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            pass_fds=() if lock is None else (lock,),
            env=_environment(slot, workers, devices),
        )
    child = _Child(phase, process, slot)
    child.reader = threading.Thread(target=_read, args=(child, events), daemon=True)
    child.reader.start()
    if process.stdin is None:
        raise AssertionError("Popen was given no pipe")
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()  # and stays open: its end shows the child that this process is gone
    except BrokenPipeError:
        pass  # it died at once; its log has the reason
    return child


def _environment(slot: int, workers: int, devices: Sequence[str]) -> dict[str, str]:
    """Return the environment of a worker: its share of the cores, one GPU, and this very plait."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    found = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
    found["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    if devices:
        found["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return found


def _read(child: _Child, events: SimpleQueue[Any]) -> None:
    if child.process.stdout is None:
        raise AssertionError("Popen was given no pipe")
    for line in child.process.stdout:
        if line.endswith("\n"):  # a kill may cut the last one off
            events.put((child, json.loads(line)))
    child.process.wait()
    events.put((child, None))


def _died(child: _Child) -> PhaseStatus:
    """Return what is known of a process that ended without a word."""
    log, code = child.phase.log, child.process.returncode
    how = f"was killed by signal {-code} (9 is often a lack of memory)" if code < 0 else f"ended with code {code}"
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    words = f": {' / '.join(last)}" if last else ""
    return PhaseStatus(child.phase.name, error=f"its process {how}{words} (all of it is in {log})")
