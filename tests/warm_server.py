"""Forks programs from one interpreter that has imported what takes long: one for all processes of a test run.

`python -m tests.warm_server SOCKET` answers there, and leaves when the last of those that have come is gone. A connection that
asks for nothing keeps it; every other asks for one program, which is killed where the connection ends first.
`python -P tests/warm_server.py SOCKET PROGRAM [ARGUMENT …]` asks for one, and ends as it does: in place of a new interpreter.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module, reload
from pathlib import Path
from threading import Event, Thread
from typing import Any

_MODULES = ("torch", "plait.api", "plait.cli.main", "plait.hub", "plait.tuning.pipeline", "plait.verification.publish")
# Not every environment has what training needs.
_TRAINING = ("accelerate", "datasets", "peft", "plait.commands.train", "plait.training.sft", "plait.training.worker")
_LOOK = 0.5  # seconds from one look to the next whether a process is still there


def ask(connection: socket.socket, order: Mapping[str, Any], files: Sequence[int]) -> None:
    """Ask for a program.

    Args:
        connection: to the server; what comes back are lines, `held PID` and `ended CODE`.
        order: `program`, as after `python -c`; `arguments`; `folder`, to work in; `environment`.
        files: descriptors of its standard input, output and error.
    """
    line = f"{json.dumps(order)}\n".encode()
    connection.sendall(line[socket.send_fds(connection, [line], files) :])


def serve(path: Path) -> None:
    """Listen at a path in a folder of its own, which goes with this process."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(64)  # whoever comes while this imports waits
    gc.disable()
    _import_all()
    gc.freeze()  # programs share it, and trainers look for no garbage there
    gc.enable()
    server.settimeout(_LOOK)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # what has ended is no child any more
    begun = False
    while not begun or _has_children():
        with suppress(TimeoutError):
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                try:
                    _attend(connection)
                finally:
                    os._exit(1)  # never back into this loop
            connection.close()
            begun = True
    shutil.rmtree(path.parent)


def _import_all() -> None:
    for name in _MODULES:
        import_module(name)
    with suppress(ImportError):
        for name in _TRAINING:
            import_module(name)
        from trl import SFTConfig, SFTTrainer  # noqa: F401


def _has_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _attend(connection: socket.socket) -> None:
    """Run what a connection asks for, in a process that leaves with either."""
    line, files = b"", []
    while not line.endswith(b"\n"):
        piece, found, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        if not piece:
            os._exit(0)
        line += piece
        files += found
    if (pid := os.fork()) == 0:
        _run(json.loads(line), connection, files)
    for file in files:
        os.close(file)
    ended = Event()
    waiting = Thread(target=_report, args=(connection, pid, ended))
    waiting.start()
    with suppress(ConnectionResetError):
        connection.recv(1)  # nothing comes but the end
    if not ended.is_set():
        os.kill(pid, signal.SIGKILL)
    waiting.join()


def _report(connection: socket.socket, pid: int, ended: Event) -> None:
    """Wait for a program's end, and report it when its number is free: what it left is seen to be no process's."""
    end = os.waitid(os.P_PID, pid, os.WEXITED)
    if end is None:
        raise AssertionError("waitid was not asked to return at once")
    ended.set()
    code = -end.si_status if end.si_code in (os.CLD_KILLED, os.CLD_DUMPED) else end.si_status
    with suppress(OSError):  # whoever asked is gone
        connection.sendall(f"ended {code}\n".encode())
    os._exit(0)


def _run(order: Mapping[str, Any], connection: socket.socket, files: Sequence[int]) -> None:
    """Be a new interpreter, as far as one can: what was read of the environment on importing is set again."""
    import torch
    from huggingface_hub import constants, hf_api

    def hold() -> None:
        connection.sendall(f"held {os.getpid()}\n".encode())
        connection.recv(1)
        os._exit(1)  # the tests are gone

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
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
    code: Any = 1
    try:
        exec(compile(order["program"], "<program>", "exec"), {"__name__": "__main__", "hold": hold})
        code = 0
    except SystemExit as left:
        code = left.code or 0
        if not isinstance(code, int):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def be_forked(path: str, program: str, *arguments: str) -> None:
    """Have a program run with this process's streams, folder and environment, and end as it ends."""
    order = {"program": program, "arguments": arguments, "folder": str(Path.cwd()), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        ask(connection, order, (0, 1, 2))
        word, _, code = connection.makefile().readline().strip().partition(" ")
    if word != "ended":
        sys.exit("the server of warm interpreters has ended")
    if int(code) < 0:
        os.kill(os.getpid(), -int(code))
    sys.exit(int(code))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(Path(sys.argv[1]))
    else:
        be_forked(*sys.argv[1:])
