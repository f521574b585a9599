"""`plait train` with phases side by side, in processes of their own: one that is killed costs no other, none stays.

Where it does not matter how a worker is started, it is forked (`tests/warm.py`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import psutil
import pytest
import torch

import plait
from plait.errors import OutputError
from plait.results.progress import SilentProgress
from plait.training import processes
from tests.phase_files import CHECKPOINTS, command, rewrite, states, tensors
from tests.warm import PLAIT, check_killed, in_place_of_python, run_forked

pytestmark = pytest.mark.usefixtures("one_thread")
WORKER = "from plait.training.worker import main; main()"


class Killer(SilentProgress):
    """Kills the worker of a phase when it begins to train."""

    def __init__(self, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.message: dict[str, str] = {}
        self._phase = phase
        self._children = {}
        start = processes._start

        def noted(phase, *rest):
            return self._children.setdefault(phase.name, start(phase, *rest))

        monkeypatch.setattr(processes, "_start", noted)

    def part(self, name: str) -> Part:
        return Part(self, name)

    def began(self, phase: str) -> None:
        if phase == self._phase:
            self._children[phase].process.kill()


class Part(SilentProgress):
    """Tells the killer what a phase does."""

    def __init__(self, killer: Killer, name: str) -> None:
        self._killer, self._name = killer, name

    def start(self, stage: str, total: int, unit: str = "steps") -> None:
        if total:
            self._killer.began(self._name)
        else:
            self._killer.message[self._name] = stage


def test_side_by_side_is_as_in_turn(phases, monkeypatch):
    monkeypatch.setattr(processes, "_WORKER", in_place_of_python(WORKER))
    rewrite(("[sort.yaml,", "[{task: sort.yaml, arguments: {max_steps: 100000}},"))  # it does not end before it is killed
    with monkeypatch.context() as patch:
        result = plait.train("phases.yaml", out="killed", workers=2, progress=(killer := Killer("sort", patch)))
    assert states(result) == {"sort": "failed", "rate": "done"}
    assert killer.message == {"sort": "failed", "rate": "done"}
    assert "was killed by signal 9" in result.failed[0].error
    assert "logs/sort.txt" in result.failed[0].error
    rewrite()
    together = plait.train("phases.yaml", out="killed", workers=2)
    in_turn = plait.train("phases.yaml", out="calm")
    assert states(together) == {"sort": "done", "rate": "found"}
    assert [p.digest for p in together.phases] == [p.digest for p in in_turn.phases]
    for name in ("sort", "rate"):  # each on its share of the cores: sums in another order
        for key, tensor in tensors("calm", name).items():
            torch.testing.assert_close(tensors("killed", name)[key], tensor, rtol=1e-3, atol=1e-4)


def test_a_worker_killed_in_the_middle_of_a_line():
    events: SimpleQueue = SimpleQueue()
    message = '["advance", 1]\n["adv'
    with subprocess.Popen([sys.executable, "-c", f"print({message!r}, end='')"], stdout=subprocess.PIPE, text=True) as process:
        processes._read(processes._Child(None, process, slot=0), events)
    assert [events.get_nowait()[1] for _ in range(2)] == [["advance", 1], None]


def test_a_worker_that_never_read_its_request():
    process = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    process.wait()
    process.stdin.write(b"{}\n")
    with pytest.raises(BrokenPipeError):
        process.stdin.flush()
    processes._Child(None, process, slot=0).stop()
    assert process.stdin.closed


# Waits when the first phase begins to train, and does so in the middle of its loop: signals find it there.
HELD_PARENT = """
from plait.cli.main import main
from plait.training import processes
receive = processes.receive
def receive_and_wait(part, event):
    receive(part, event)
    if event[:2] == ["start", "train"]:
        hold()
processes.receive = receive_and_wait
processes._WORKER = {worker!r}
main()
"""


def test_workers_leave_with_their_parent(phases):
    rewrite(("max_steps: 10", "max_steps: 100000"))
    workers = []

    def kill(parent: int) -> None:
        workers.extend(psutil.Process(parent).children())
        with pytest.raises(OutputError, match=rf"out is in use by process {parent} on"), ShortPatience():
            plait.train("phases.yaml", out="out")
        os.kill(parent, signal.SIGKILL)

    program = HELD_PARENT.format(worker=in_place_of_python(WORKER))
    check_killed(run_forked(program, "train", "phases.yaml", "-o", "out", "--workers", "2", when_held=kill))
    assert len(workers) == 3, "two phases, and the process that renders templates"
    wait_for_the_end(workers)


# Imported by every Python; workers wait behind their first checkpoint, so that a signal finds them there on any machine.
HELD_WORKERS = """
import sys, time
if "plait.training.worker" in sys.orig_argv:
    from transformers import TrainerState
    save = TrainerState.save_to_json
    def save_and_wait(self, path):
        save(self, path)
        time.sleep(600)
    TrainerState.save_to_json = save_and_wait
"""


def test_sigterm_ends_the_worker_too_and_the_same_command_continues(phases, capsys):
    rewrite(CHECKPOINTS)
    (phases / "held").mkdir()
    (phases / "held" / "sitecustomize.py").write_text(HELD_WORKERS)
    words = ["phases.yaml", "-o", "out", "--only", "sort"]
    program = f"import os, pathlib; pathlib.Path('pid').write_text(str(os.getpid()))\n{PLAIT}"
    environment = {**os.environ, "PYTHONPATH": str(phases / "held")}
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(run_forked, program, "train", *words, "--workers", "2", environment=environment)
        while not Path("out/phases/sort/checkpoint-1/trainer_state.json").exists():
            assert not run.done(), run.result().stderr
            time.sleep(0.1)
        parent = psutil.Process(int(Path("pid").read_text()))
        workers = parent.children()
        parent.terminate()
    done = run.result()
    assert done.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM\n0 of 2 phases are finished and kept in" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(workers) == 2, "a phase, and the process that renders templates"
    wait_for_the_end(workers)
    code, _, _ = command(capsys, *words)
    assert code == 0
    phase = json.loads(Path("out/train.json").read_text())["phases"][0]
    assert (phase["state"], phase["resumed_from"], phase["steps"]) == ("done", 1, 10)


def wait_for_the_end(workers: list[psutil.Process]) -> None:
    end = time.monotonic() + 240
    while any(map(alive, workers)):
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(process: psutil.Process) -> bool:
    """A process that has ended stays as a zombie where nobody waits for orphans, as in a container without an init."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class ShortPatience:
    """Do not wait for another run."""

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr("plait.training.cohort._PATIENCE", 0.2)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
