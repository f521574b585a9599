"""What a calibration did, as it is kept next to its moments in `calibration.json`."""

from __future__ import annotations

from plait.calibration.texts import TextKind
from plait.recipes.calibration import CalibrationSpec
from plait.records import Record

CALIBRATION = "calibration.json"


class TextsOrigin(Record):
    """Where the texts of one task are from.

    Attributes:
        task: its name.
        adapter: that read them.
        kind: a split, a file, generic lines or the bare prompt.
        source: the same in words.
        count: how many.
    """

    task: str
    adapter: str
    kind: TextKind
    source: str
    count: int


class CalibratedTexts(TextsOrigin):
    """The texts of one task.

    Attributes:
        digest: hash of what was read.
        shown: the first three, as the model read them.
    """

    digest: str
    shown: tuple[str, ...]


class CalibratedAdapter(Record):
    """The moments of one adapter.

    Attributes:
        name: of the adapter.
        file: of its moments.
        sha256: of that file.
        bytes: of that file.
        modules: whose inputs were taken.
        stored: entries of the file; modules that read one tensor share one.
        rows: how many of these are inputs rather than their (d, d) matrix.
        sampled: modules that keep some of their inputs only.
        tokens: that were read.
        reused: whether an earlier run had taken them.
    """

    name: str
    file: str
    sha256: str
    bytes: int
    modules: int
    stored: int
    rows: int
    sampled: int
    tokens: int
    reused: bool


class CalibrationRecord(Record):
    """What was done.

    Attributes:
        plait: version.
        libraries: versions of what computes.
        base: the base model, as it was named.
        base_digest: of its files.
        dtype: of the base in memory.
        settings: as run.
        texts: what was seen, per task.
        adapters: the moments.
        notes: what else is to be known.
        seconds: wall time.
        finished: local time, ISO 8601.
    """

    plait: str
    libraries: dict[str, str]
    base: str
    base_digest: str
    dtype: str
    settings: CalibrationSpec
    texts: tuple[CalibratedTexts, ...]
    adapters: tuple[CalibratedAdapter, ...]
    notes: tuple[str, ...]
    seconds: float
    finished: str

    @property
    def bytes(self) -> int:
        """Of all files of moments."""
        return sum(a.bytes for a in self.adapters)


class CalibrationPlan(Record):
    """What a calibration would do; no model was loaded.

    Attributes:
        base: the base model.
        texts: per task.
        adapters: name → target modules whose inputs it takes.
        left_out: target modules whose inputs are not vectors, or are not offered one by one.
        bytes: of all files of moments, at most: modules that read one tensor will share it.
    """

    base: str
    texts: tuple[CalibratedTexts, ...]
    adapters: dict[str, int]
    left_out: tuple[str, ...]
    bytes: int
