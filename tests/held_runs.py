"""`plait` in a process of its own that waits at a known point, so that a signal finds it there on any machine."""

from __future__ import annotations

import subprocess
import sys

# Waits behind the first checkpoint whose path holds a given word: `trainer_state.json` is what a checkpoint is whole with.
_HELD = """
import sys
from transformers import TrainerState
from plait.cli.main import main
where, *words = sys.argv[1:]
save = TrainerState.save_to_json
def save_and_wait(self, path):
    save(self, path)
    if where in path:
        print("held", file=sys.__stdout__, flush=True)  # plait sends what others print to stderr
        sys.stdin.read()
TrainerState.save_to_json = save_and_wait
main(words)
"""


def killed_at_a_checkpoint(words: list[str], where: str) -> None:
    """Run `plait WORDS` until the first checkpoint whose path holds `where` is whole, and kill it there."""
    command = [sys.executable, "-c", _HELD, where, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert any(line.endswith("held\n") for line in run.stdout), "it ended before it was there"
        run.kill()
