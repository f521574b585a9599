"""What a model hears of sounds: how many samples, and which sounds are longer than that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from plait.errors import TaskError
from plait.notices import announce
from plait.tasks.examples import Examples
from plait.tasks.sounds import sample_count, sound_rate

_EXACT = ("Wav2Vec2FeatureExtractor", "WhisperFeatureExtractor")  # the first cuts nothing, the other what is known
_SHOWN = 5


def sample_counts(extractor: Any, sounds: Sequence[bytes]) -> list[int]:
    """Return how many samples a model hears of every sound; other rates than its own are announced.

    Raises:
        TaskError: whether the extractor cuts sounds is not known.
    """
    name, rate = type(extractor).__name__, int(getattr(extractor, "sampling_rate", 0))
    if name not in _EXACT:
        raise TaskError(f"{name}: whether it cuts long sounds is not known; covered are {', '.join(_EXACT)}.")
    if others := sorted({sound_rate(data) for data in sounds} - {rate}):
        listed = ", ".join(map(str, others))
        announce(f"sounds of {listed} Hz are resampled to {rate} Hz, which the model hears.", once=f"resampled {rate}")
    return [sample_count(data, rate) for data in sounds]


def window(extractor: Any) -> int | None:
    """Return how many samples a model hears of every sound, filled up with silence; None where of each as many as it has."""
    found: int | None = getattr(extractor, "n_samples", None)
    return found


def check_longest(extractor: Any, examples: Examples, counts: Sequence[int]) -> None:
    """Refuse sounds that a model would cut.

    Args:
        extractor: of the model.
        examples: with sounds.
        counts: samples of each, as `sample_counts` has them; of several the largest.

    Raises:
        TaskError: one is too long.
    """
    most, rate = window(extractor), int(extractor.sampling_rate)
    if most and (long := [i for i, n in enumerate(counts) if n > most]):
        named = rows_named(examples, long, lambda i: f"{counts[i] / rate:.1f} seconds")
        raise TaskError(
            f"{len(long)} of {len(counts)} sounds are longer than the {most / rate:g} seconds that the model hears "
            f"({named}); nothing is cut in silence. Cut them, or leave them out."
        )


def rows_named(examples: Examples, which: Sequence[int], say: Callable[[int], str]) -> str:
    """Return the first of some examples by their rows, and what is to be named of each."""
    rows = range(len(examples.items)) if examples.rows is None else examples.rows
    more = f", and {len(which) - _SHOWN} more" if len(which) > _SHOWN else ""
    return f"split {examples.split!r}: " + ", ".join(f"row {rows[i]} has {say(i)}" for i in which[:_SHOWN]) + more
