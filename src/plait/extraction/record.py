"""What an extraction did."""

from __future__ import annotations

from typing import Any

from plait.adapters.layouts import LAYOUTS, Embedding
from plait.records import Record
from plait.results.records import ModuleRecord


class Leftover(Record):
    """A changed tensor that the factors do not hold.

    Attributes:
        tensor: its name.
        kind: what it belongs to: `linear`, `conv1d`, `conv`, `experts` and `parameter` were not asked for, a `head` is
            kept in full, the rest cannot be a LoRA.
        energy: ‖Δ‖²_F of it.
        kept: whether the adapter holds it in full.
    """

    tensor: str
    kind: str
    energy: float
    kept: bool

    @property
    def option(self) -> str | None:
        """The option of an extraction that would have the adapter hold it; None where there is none."""
        if self.kind in ("bias", "other"):
            return "--modules-to-save"
        if self.kind == Embedding.kind:
            return "--embeddings"
        return "--targets" if self.kind in ("parameter", *(layout.kind for layout in LAYOUTS)) else None


class ExtractRecord(Record):
    """What an extraction did. A function of the request and the models, but for `seconds` and `finished`.

    Attributes:
        plait: version.
        request: as run.
        base_model: the base model's name, as written into the adapter.
        task_type: PEFT's, as the base model's architecture says; None where it does not decide.
        rank: of the adapter (PEFT's r).
        max_lora_rank: smallest value of vLLM's setting that serves it; None when none is known to.
        kept: share of ‖ΔW‖²_F kept over the target modules.
        lowest_kept: the smallest share of a module.
        lost: share of ‖Δ‖²_F over all tensors that the adapter does not hold: truncated, or left over.
        modules: one record each.
        unchanged: layers asked for that are equal in both models, and have no factors.
        saved: modules that the adapter holds in full, changed or not.
        leftovers: changed tensors without factors.
        notes: what else is worth knowing.
        finished: local time, ISO 8601.
        seconds: wall time.
    """

    plait: str
    request: dict[str, Any]
    base_model: str
    task_type: str | None
    rank: int
    max_lora_rank: int | None
    kept: float
    lowest_kept: float
    lost: float
    modules: tuple[ModuleRecord, ...]
    unchanged: tuple[str, ...]
    saved: tuple[str, ...]
    leftovers: tuple[Leftover, ...]
    notes: tuple[str, ...]
    finished: str
    seconds: float

    @property
    def would_keep_more(self) -> tuple[str, ...]:
        """The options that would have the adapter hold more of what is left out, sorted."""
        options = {x.option for x in self.leftovers if not x.kept} - {None}
        return tuple(sorted(str(o) for o in options if o != "--modules-to-save" or not self.request["modules_to_save"]))
