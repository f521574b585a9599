"""`plait` in a process of its own that waits at a known point, so that a signal finds it there on any machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

# Imports once what training needs, and forks a run per line of its input. A run waits behind the first checkpoint whose path
# holds a given word: `trainer_state.json` is what a checkpoint is complete with.
_NURSERY = """
import json, os, sys
import accelerate, datasets, peft, trl
from transformers import TrainerState
from trl import SFTConfig, SFTTrainer
import plait.commands.train, plait.training.sft
from plait.cli.main import main
for line in sys.stdin:
    order = json.loads(line)
    if (pid := os.fork()) == 0:
        os.environ.update(order["environment"])
        os.chdir(order["folder"])
        save = TrainerState.save_to_json
        def save_and_wait(self, path):
            save(self, path)
            if order["where"] in path:
                os.write(order_out, f"held {os.getpid()}\\n".encode())
                os.read(0, 1)  # the end of the input: the tests are gone
                os._exit(1)
        TrainerState.save_to_json = save_and_wait
        order_out = os.dup(1)
        os.dup2(2, 1)  # what is printed is not an answer
        try:
            main(order["words"])
        finally:
            os._exit(1)
    end = os.waitid(os.P_PID, pid, os.WEXITED)
    print("ended", -end.si_status if end.si_code == os.CLD_KILLED else end.si_status, flush=True)
"""


@cache
def _nursery() -> subprocess.Popen[str]:
    """Start it; it leaves with this process, whose end closes its input."""
    return subprocess.Popen([sys.executable, "-c", _NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def killed_at_a_checkpoint(words: list[str], where: str) -> None:
    """Run `plait WORDS` until the first checkpoint whose path holds `where` is complete, and kill it there."""
    run = _nursery()
    assert run.stdin is not None
    assert run.stdout is not None
    order = {"words": words, "where": where, "folder": str(Path.cwd()), "environment": dict(os.environ)}
    run.stdin.write(json.dumps(order) + "\n")
    run.stdin.flush()
    answer, number = run.stdout.readline().split()
    assert answer == "held", f"it ended ({number}) before it was there"
    os.kill(int(number), signal.SIGKILL)
    assert run.stdout.readline().split() == ["ended", str(-signal.SIGKILL)]
