"""Signals that end a command: everything is cleared away as for any error, and the exit code names the signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Stopped(BaseException):
    """The command received a signal to stop.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def code(self) -> int:
        """The exit code, as shells count it."""
        return 128 + self.number

    def __str__(self) -> str:
        return "stopped" if self.number == signal.SIGINT else f"stopped by {signal.Signals(self.number).name}"


@contextmanager
def noting_on_stop(state: Callable[[], str] | None = None) -> Iterator[None]:
    """Report what is kept, and how to continue, when the block is stopped, also by a KeyboardInterrupt that a library raises.

    Args:
        state: what is kept, besides the notes that were made where the block was stopped.
    """
    try:
        yield
    except (Stopped, KeyboardInterrupt) as found:
        stop = found if isinstance(found, Stopped) else Stopped(signal.SIGINT)
        notes = [] if stop is found else getattr(found, "__notes__", [])
        for note in (*notes, *([state()] if state is not None else [])):
            stop.add_note(note)
        raise stop from None


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` in the block for the first signal; those that the caller ignores (`nohup`) stay ignored.

    Where a library raises something else in its place, it is raised at the end of the block.

    While things are cleared away, a second Ctrl-C ends the process at once and other signals are ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    numbers = [int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    caught = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        for other in caught:
            signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
        received.append(number)
        raise Stopped(number)

    for number in caught:
        signal.signal(number, stop)
    try:
        yield
    except Exception as error:  # libraries written in Rust make errors of their own of whatever is raised in them
        if received:
            raise Stopped(received[0]) from error
        raise
    finally:
        for number in caught:
            signal.signal(number, before[number])
