"""Programs in processes of their own, forked from one interpreter that has imported what takes long.

A new one would spend eight seconds of a core on torch, transformers and TRL before it begins.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

# Forks one program per line of its input. `hold()` in a program says so and waits: a signal finds it there on any machine.
# What libraries have read of the environment when they were imported is set again: a program has its own.
_NURSERY = """
import gc, json, os, sys, traceback
from contextlib import suppress
from importlib import reload
import torch
from huggingface_hub import constants, hf_api
import plait.api, plait.cli.main, plait.hub, plait.tuning.pipeline, plait.verification.publish
with suppress(ImportError):  # not every environment has what training needs
    import accelerate, datasets, peft
    from trl import SFTConfig, SFTTrainer
    import plait.commands.train, plait.training.sft
gc.freeze()  # programs share it, and trainers look for no garbage there
for line in sys.stdin:
    order = json.loads(line)
    if (pid := os.fork()) == 0:
        answers = os.dup(1)
        def hold():
            os.write(answers, f"held {os.getpid()}\\n".encode())
            os.read(0, 1)  # the end of the input: the tests are gone
            os._exit(1)
        for stream in (1, 2):
            os.dup2(os.open(order["streams"][stream - 1], os.O_WRONLY | os.O_CREAT), stream)
        os.environ.clear()
        os.environ.update(order["environment"])
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))
        reload(constants)
        for module in [m for name, m in sys.modules.items() if name.startswith("huggingface_hub.")]:
            vars(module).update({k: v for k, v in vars(constants).items() if k.isupper() and k in vars(module)})
        hf_api.api.endpoint = constants.ENDPOINT
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
#: `plait` with the arguments that follow.
PLAIT = "from plait.cli.main import main; main()"
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
    program: str,
    *arguments: str,
    folder: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    when_held: Callable[[int], object] = _kill,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as `subprocess.run` does; where it calls `hold()` it is killed.

    Args:
        program: as after `python -c`.
        arguments: `sys.argv[1:]`.
        folder: its working directory; this process's when None.
        environment: all of its variables.
        when_held: what happens to its process there, in place of that.
    """
    run = _nursery()
    assert run.stdin is not None
    assert run.stdout is not None
    with TemporaryDirectory() as place:
        streams = [Path(place, name) for name in ("stdout", "stderr")]
        order = {
            "program": program, "arguments": arguments, "folder": str(folder or Path.cwd()), "environment": dict(environment),
            "streams": list(map(str, streams)),
        }  # fmt: skip
        run.stdin.write(json.dumps(order) + "\n")
        run.stdin.flush()
        answer, number = run.stdout.readline().split()
        if answer == "held":
            try:
                when_held(int(number))
            except BaseException:
                _kill(int(number))
                run.stdout.readline()
                raise
            answer, number = run.stdout.readline().split()
        texts = [stream.read_text(encoding="utf-8", errors="replace") for stream in streams]
        return subprocess.CompletedProcess([program, *arguments], int(number), *texts)


def killed_at_a_checkpoint(words: list[str], where: str) -> None:
    """Run `plait WORDS` until the first checkpoint whose path holds `where` is complete, and kill it there."""
    check_killed(run_forked(_HELD, where, *words))


def check_killed(done: subprocess.CompletedProcess[str]) -> None:
    """Make sure that a program was killed, and did not end by itself."""
    assert done.returncode == -signal.SIGKILL, (done.stdout + done.stderr)[-2000:]
