"""Wall time and peak memory of a piece of work, measured inside the process that does it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
INTERVAL = 0.005


@dataclass
class Usage:
    """What a piece of work took; memory in bytes above what the process had before.

    Attributes:
        seconds: wall time.
        cpu_seconds: of all threads.
        peak_rss: resident memory, mapped file pages included.
        peak_anonymous: resident memory without file pages (0 where the system does not report it).
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss: int = 0
    peak_anonymous: int = 0


@contextmanager
def measured() -> Iterator[Usage]:
    """Measure the block; the result is complete when the block has ended."""
    usage = Usage()
    rss, anonymous = _resident()
    exact = _reset_high_water()
    stop = threading.Event()
    peaks = [rss, anonymous]
    sampler = threading.Thread(target=_sample, args=(stop, peaks), daemon=True)
    sampler.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield usage
    finally:
        usage.seconds, usage.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        stop.set()
        sampler.join()
        usage.peak_rss = max(peaks[0], _status("VmHWM") if exact else 0) - rss
        usage.peak_anonymous = peaks[1] - anonymous


def _sample(stop: threading.Event, peaks: list[int]) -> None:
    while not stop.wait(INTERVAL):
        peaks[:] = [max(peak, now) for peak, now in zip(peaks, _resident(), strict=True)]


def _resident() -> tuple[int, int]:
    """Return resident and resident anonymous memory."""
    if STATUS.exists():
        return _status("VmRSS"), _status("RssAnon")
    import psutil

    return psutil.Process(os.getpid()).memory_info().rss, 0


def _status(field: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _reset_high_water() -> bool:
    """Make Linux count VmHWM from now on; False where that cannot be done, and samples must do."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
