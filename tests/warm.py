"""Programs in processes of their own, forked from one interpreter that has imported what takes long.

A new one would spend eight seconds of a core on torch, transformers and TRL before it begins.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

# Forks one program per line of its input. `hold()` in a program says so and waits: a signal finds it there on any machine.
_NURSERY = """
import json, os, sys, traceback
import accelerate, datasets, peft, trl
from transformers import TrainerState
from trl import SFTConfig, SFTTrainer
import plait.api, plait.commands.train, plait.training.sft, plait.tuning.pipeline
for line in sys.stdin:
    order = json.loads(line)
    if (pid := os.fork()) == 0:
        answers = os.dup(1)
        def hold():
            os.write(answers, f"held {os.getpid()}\\n".encode())
            os.read(0, 1)  # the end of the input: the tests are gone
            os._exit(1)
        os.dup2(os.open(order["output"], os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        os.environ.update(order["environment"])
        os.chdir(order["folder"])
        sys.argv = ["-c", *order["arguments"]]
        code = 1
        try:
            exec(compile(order["program"], "<program>", "exec"), {"__name__": "__main__", "hold": hold})
            code = 0
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    end = os.waitid(os.P_PID, pid, os.WEXITED)
    print("ended", -end.si_status if end.si_code == os.CLD_KILLED else end.si_status, flush=True)
"""
# Waits behind the first checkpoint whose path holds a given word: `trainer_state.json` is what makes a checkpoint complete.
_HELD = """
import sys
from transformers import TrainerState
from plait.cli.main import main
where, *words = sys.argv[1:]
save = TrainerState.save_to_json
def save_and_wait(self, path):
    save(self, path)
    if where in path:
        hold()
TrainerState.save_to_json = save_and_wait
main(words)
"""


@cache
def _nursery() -> subprocess.Popen[str]:
    """Start it; it leaves with this process, whose end closes its input."""
    return subprocess.Popen([sys.executable, "-c", _NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def run_forked(
    program: str, *arguments: str, folder: Path | None = None, when_held: Callable[[int], object] = _kill
) -> tuple[int, str]:
    """Run a program to its end; where it calls `hold()` it is killed.

    Args:
        program: as after `python -c`.
        arguments: `sys.argv[1:]`.
        folder: its working directory; this process's when None.
        when_held: what happens to its process there, in place of that.

    Returns:
        Its exit code, negative for a signal, and what it printed.
    """
    run = _nursery()
    assert run.stdin is not None
    assert run.stdout is not None
    with TemporaryDirectory() as place:
        output = Path(place, "output.txt")
        order = {
            "program": program, "arguments": arguments, "folder": str(folder or Path.cwd()), "environment": dict(os.environ),
            "output": str(output),
        }  # fmt: skip
        run.stdin.write(json.dumps(order) + "\n")
        run.stdin.flush()
        answer, number = run.stdout.readline().split()
        if answer == "held":
            when_held(int(number))
            answer, number = run.stdout.readline().split()
        return int(number), output.read_text(encoding="utf-8", errors="replace")


def killed_at_a_checkpoint(words: list[str], where: str) -> None:
    """Run `plait WORDS` until the first checkpoint whose path holds `where` is complete, and kill it there."""
    code, said = run_forked(_HELD, where, *words)
    assert code == -signal.SIGKILL, said[-2000:]
