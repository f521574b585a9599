"""Sounds of rows: decoded by soundfile, resampled by scipy, and refused with the reason where they are broken."""

from __future__ import annotations

import hashlib
import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.errors import TaskError
from plait.extras import optional
from plait.records import Record
from plait.tasks.inputs import Example, FileColumn, Row
from plait.tasks.row_files import encoded_file

ENDINGS = (".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")
_MOST_SECONDS = 600
_PARTS = 10  # of a histogram
_DRAWN = 96  # parts of a sound, for a page


class SoundLengths(Record):
    """The sounds of a split.

    Attributes:
        formats: how many there are of each.
        rates: how many there are of each, samples per second.
        shortest: in seconds.
        median: in seconds.
        longest: in seconds.
        counts: how many there are in each of ten equal parts of the time from the shortest to the longest.
    """

    formats: dict[str, int]
    rates: dict[str, int]
    shortest: float
    median: float
    longest: float
    counts: tuple[int, ...] = ()


def sound_bytes(row: Row, column: FileColumn, where: str) -> bytes | TaskError:
    """Return the encoded sound of a row, which can be decoded; or why there is none.

    Raises:
        MissingPackageError: soundfile is not installed.
    """
    optional("soundfile", "audio", f"{where}: decoding sounds")
    return encoded_file(row, column, where, _problem)


def samples(data: bytes, rate: int) -> NDArray[np.float32]:
    """Return a sound at a rate, (samples,) float32: the mean of its channels; another rate is resampled by scipy's filter."""
    found, own = _soundfile().read(io.BytesIO(data), dtype="float64", always_2d=True)
    mono = found.mean(axis=1)
    if own != rate:
        common = math.gcd(own, rate)
        mono = optional("scipy.signal", "audio", "resampling").resample_poly(mono, rate // common, own // common)
    return np.asarray(mono, dtype=np.float32)


def sample_count(data: bytes, rate: int) -> int:
    """Return how many samples `samples` gives."""
    info = _soundfile().info(io.BytesIO(data))
    return int(-(-info.frames * rate // info.samplerate))


def sound_rate(data: bytes) -> int:
    """Return the samples per second of a sound as it is stored."""
    return int(_soundfile().info(io.BytesIO(data)).samplerate)


def sound_lengths(sounds: Sequence[bytes]) -> SoundLengths:
    """Describe sounds by their headers."""
    found = [_soundfile().info(io.BytesIO(data)) for data in sounds]
    seconds = sorted(info.frames / info.samplerate for info in found)
    return SoundLengths(
        formats=dict(sorted(Counter(str(info.format) for info in found).items())),
        rates={str(rate): n for rate, n in sorted(Counter(info.samplerate for info in found).items())},
        shortest=seconds[0],
        median=seconds[len(seconds) // 2],
        longest=seconds[-1],
        counts=tuple(np.histogram(seconds, bins=_PARTS)[0].tolist()),
    )


def sound_words(data: bytes) -> str:
    """Return a sound in words: its length, rate and format, and its hash."""
    info = _soundfile().info(io.BytesIO(data))
    digest = hashlib.sha256(data).hexdigest()[:16]
    return f"⟨audio of {info.frames / info.samplerate:.1f} seconds, {info.samplerate} Hz {info.format}, sha256 {digest}⟩"


def waveform(data: bytes) -> tuple[float, ...]:
    """Return how loud a sound is in each of 96 equal parts: the largest amplitude, 0 to 1; fewer parts of fewer samples."""
    found, _ = _soundfile().read(io.BytesIO(data), dtype="float32", always_2d=True)
    parts = np.array_split(np.abs(found).max(1), min(_DRAWN, len(found)))
    return tuple(round(min(float(part.max()), 1.0), 3) for part in parts)


def shown_prompt(example: Example) -> str:
    """Return an example's prompt for people, with its sounds in words."""
    return example.text_with([sound_words(sound) for sound in example.sounds]) if example.sounds else example.prompt_text


def _problem(data: bytes) -> str:
    """Return in words why a sound cannot be decoded; empty where it can."""
    library = _soundfile()
    try:
        info = library.info(io.BytesIO(data))
        if info.frames > _MOST_SECONDS * info.samplerate:
            return f"it has {info.frames / info.samplerate:.0f} seconds; at most {_MOST_SECONDS} are decoded."
        found, _ = library.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except Exception as error:  # soundfile's own class, and those of numpy for what a header promises
        return f"it cannot be decoded: {' '.join(str(error).split()).rstrip('.') or type(error).__name__}."
    if not len(found):
        return "it holds no sample."
    if len(found) != info.frames:
        return f"it ends after {len(found)} of {info.frames} samples."
    return "" if np.isfinite(found).all() else "it holds samples that are not finite."


def _soundfile() -> Any:
    return optional("soundfile", "audio", "a sound")
