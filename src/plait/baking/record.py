"""What a bake did, in the form of a merge's run record."""

from __future__ import annotations

from plait.merging.record import RunRecord


class BakeRecord(RunRecord):
    """What happened.

    Attributes:
        base_model: the base model's reference.
        base_commit: on the Hub; None for a folder.
        dtype: asked for; None when every tensor kept its own.
        shards: file → sha256.
        resumed: files that an earlier run had finished.
        bytes_copied: of tensors that the kernel copied.
        bytes_changed: of tensors that were computed.
    """

    base_model: str
    base_commit: str | None
    dtype: str | None
    shards: dict[str, str]
    resumed: tuple[str, ...]
    bytes_copied: int
    bytes_changed: int
