"""The results of an evaluation in the model card of what was evaluated."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from plait.errors import OutputError
from plait.evaluation.record import Evaluation, TaskResult
from plait.folders import open_in
from plait.results.digests import sha256
from plait.results.lock import CARD, LOCK, read_lock
from plait.results.quoting import code, prose
from plait.results.writing import write_json_atomic

_SECTION = re.compile(r"^## Results\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_NEXT = re.compile(r"^## ", re.MULTILINE)


def put_results(folder: Path, found: Evaluation) -> None:
    """Write a section of results into the card of a result, in the place of an earlier one.

    Where the card was as `plait.lock` says, the lock gets the hash of the new one, so `plait verify` still finds all equal.

    Args:
        folder: of a merge or a bake.
        found: its evaluation.

    Raises:
        OutputError: there is no card, or it cannot be written.
    """
    file = folder / CARD
    draft = file.with_name(f".{CARD}-{os.getpid()}-{secrets.token_hex(3)}")
    try:
        with open_in(folder, CARD) as card:
            data = card.read()
        text, before = data.decode("utf-8"), hashlib.sha256(data).hexdigest()
        draft.write_text(_with_section(text, results_section(found)), encoding="utf-8")
        draft.replace(file)
    except (OSError, UnicodeDecodeError) as error:
        error = error if isinstance(error, OSError) else OSError("not text in UTF-8")
        raise OutputError(f"{file}: the results cannot be put into the card: {error.strerror or error}.") from None
    finally:
        draft.unlink(missing_ok=True)
    lock = read_lock(folder) if (folder / LOCK).is_file() else None
    if lock is not None and lock.outputs.get(CARD) == before:
        outputs = {**lock.outputs, CARD: sha256(file)}
        write_json_atomic(folder / LOCK, lock.model_copy(update={"outputs": outputs}).model_dump(mode="json"))


def results_section(found: Evaluation) -> str:
    """Return `## Results`: a table, and what is to be known about it."""
    rows = "\n".join(_row(t) for t in found.tasks)
    return f"""## Results

Split {code(found.split)}, base model in {found.dtype}; intervals: 95 %, paired bootstrap over examples, {found.draws} draws.
Recovery is (merged − base) / (own adapter − base): 0 is the base model, 1 the task's own adapter.

| task | metric | examples | base | own adapter | this | recovery |
|---|---|---|---|---|---|---|
{rows}

{"".join(f"- {line}" + chr(10) for line in _facts(found))}
"""


def _row(t: TaskResult) -> str:
    arrow = "" if t.higher_is_better else " (lower is better)"
    single = "–" if t.single is None else f"{t.single:.3f}"
    share = "–" if t.recovery is None else f"{t.recovery:.2f}"
    if t.recovery is not None and t.recovery_interval is not None:
        share += f" ({t.recovery_interval[0]:.2f} – {t.recovery_interval[1]:.2f})"
    sample = f"{t.examples} (`{t.subset}`)" if t.subset else str(t.examples)
    return f"| {prose(t.task)} | {prose(t.metric)}{arrow} | {sample} | {t.base:.3f} | {single} | {t.merged:.3f} | {share} |"


def _facts(found: Evaluation) -> Iterator[str]:
    if found.worst_recovery is not None and found.mean_recovery is not None:
        worst = prose(found.worst_task or "")
        yield f"**Recovery**: mean {found.mean_recovery:.2f}, worst {found.worst_recovery:.2f} ({worst})."
    if found.below_base:
        yield f"**Worse than the base model** on {prose(', '.join(found.below_base))}."
    for t in found.tasks:
        if t.undefined is not None:
            yield f"**{prose(t.task)}** has no recovery: {prose(t.undefined)}."


def _with_section(card: str, section: str) -> str:
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: section, card)
    first = _NEXT.search(card)
    at = first.start() if first else len(card)
    return card[:at] + section + card[at:]
