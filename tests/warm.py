"""Programs in processes of their own, forked from one interpreter that has imported what takes long (`warm_server.py`).

A new one would spend eight seconds of a core on torch, transformers and TRL before it begins.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from tests import warm_server

ROOT = Path(__file__).parents[1]
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
def _server() -> tuple[Path, socket.socket, subprocess.Popen[bytes] | None]:
    """Find this run's server, or start it; return its address, and what keeps it until this process ends."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    place = Path(gettempdir(), f"plait-warm-{run}")
    place.mkdir(exist_ok=True)
    path, process, keeping = place / "socket", None, socket.socket(socket.AF_UNIX)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        while True:
            with suppress(FileNotFoundError, ConnectionRefusedError):  # it is not there yet, or does not answer yet
                keeping.connect(str(path))
                return path, keeping, process
            if process is None:
                path.unlink(missing_ok=True)  # of a server that was killed
                words = [sys.executable, "-m", "tests.warm_server", str(path)]
                process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            assert process.poll() is None, "the server of warm interpreters has ended"
            time.sleep(0.02)


def in_place_of_python(program: str) -> list[str]:
    """Return the command that runs a program, with the words that follow it as arguments, as `python -c PROGRAM` would."""
    return [sys.executable, "-P", "-S", str(warm_server.__file__), str(_server()[0]), program]


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
    with TemporaryDirectory() as place, socket.socket(socket.AF_UNIX) as connection, connection.makefile() as answers:
        connection.connect(str(_server()[0]))
        order = {
            "program": program, "arguments": arguments, "folder": str(folder or Path.cwd()), "environment": dict(environment),
        }  # fmt: skip
        streams = [Path(place, name) for name in ("stdout", "stderr")]
        with Path(os.devnull).open("rb") as nothing, streams[0].open("wb") as out, streams[1].open("wb") as err:
            warm_server.ask(connection, order, [f.fileno() for f in (nothing, out, err)])
        answer, number = answers.readline().split()
        if answer == "held":
            try:
                when_held(int(number))
            except BaseException:
                _kill(int(number))
                raise
            answer, number = answers.readline().split()
        texts = [stream.read_text(encoding="utf-8", errors="replace") for stream in streams]
        return subprocess.CompletedProcess([program, *arguments], int(number), *texts)


def killed_at_a_checkpoint(words: list[str], where: str) -> None:
    """Run `plait WORDS` until the first checkpoint whose path holds `where` is complete, and kill it there."""
    check_killed(run_forked(_HELD, where, *words))


def check_killed(done: subprocess.CompletedProcess[str]) -> None:
    """Make sure that a program was killed, and did not end by itself."""
    assert done.returncode == -signal.SIGKILL, (done.stdout + done.stderr)[-2000:]
