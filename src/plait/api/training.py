"""What trains adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.api.files import optional_path
from plait.hub.pretrained import LoadOptions
from plait.results.progress import Progress

if TYPE_CHECKING:
    from plait.training.results import TrainResult
    from plait.training.sft import SftResult


def sft(*, progress: Progress | None = None, **flags: Any) -> SftResult:
    """Train an adapter, or a full model, on data with TRL; then merge it with its base and upload it, where that is asked for.

    >>> plait.sft(model_name_or_path="org/model", dataset_name_or_path="rows.jsonl", use_peft=True, lora_r=16, max_steps=100,
    ...           output_dir="run", merge_adapter_with_base=True).merged_model

    Killed, the same call continues; a finished one trains nothing again.

    Args:
        progress: receives stages and steps, in place of TRL's own bar and lines.
        **flags: of `plait sft`: all of TRL's `SFTConfig`, `ModelConfig` and `ScriptArguments`, and plait's.

    Returns:
        Folders and training record. A merge or upload that failed is in its `failures`, with the command that does it again.

    Raises:
        PlaitError: flags, data, disk, folder or Hub do not allow it; everything that is wrong at once, before training.
    """
    from plait.commands.sft import SftOrder

    return SftOrder(flags).run(progress)


def train(  # noqa: PLR0913 (what a command line takes)
    phases: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    only: Sequence[str] = (),
    workers: int | None = None,
    cluster: str | None = None,
    base: str | Path | None = None,
    matrix: bool = False,
    load_dtype: str = "auto",
    device_map: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> TrainResult:
    """Train one adapter per phase on one base, merge them, and report what the merge kept of each.

    >>> found = plait.train("examples/phases.yaml", out="trained")
    >>> found.evaluation.worst_recovery, found.failed

    Killed at any moment, the same call continues: finished phases are found again, others resume from a checkpoint.

    Args:
        phases: a file, or the same as a mapping (relative paths then start at the working directory).
        out: folder of everything: `phases/NAME/adapter`, `merged`, `recipe.yaml`, `report.html`, `train.json`; of a file,
            `artifacts/trained/<file>` when None.
        only: phases to train, and nothing more; all, and then the rest of the work, when empty.
        workers: phases side by side, each a process of its own; one after another in this one when None.
        cluster: `ray` or `ray://HOST:PORT`: run the phases there.
        base: the base model, in place of the file's.
        matrix: also evaluate every adapter on every task.
        load_dtype: of the base in evaluation, as transformers takes it.
        device_map: in evaluation, as transformers takes it.
        trust_remote_code: in evaluation: let transformers run code that comes with the weights.
        progress: receives stages and steps of merge and evaluation; and those of the phases, several of which may run at a
            time, where it has a method `part(name)` that returns the progress of one.
        **settings: keys of the file that replace its own (`lora`, `arguments`, `merge`, `eval`, `seed`, …).

    Returns:
        What came of every phase, and of merge and evaluation. A phase that failed is in `failed`; the others are trained,
        and nothing is merged then.

    Raises:
        PlaitError: anything wrong with what was given, before the first step; or merge or evaluation cannot be done.
    """
    from plait.commands.train import TrainOrder

    return TrainOrder(
        phases,
        out=optional_path(out),
        only=only,
        workers=workers,
        cluster=cluster,
        base=None if base is None else str(base),
        settings=settings,
        matrix=matrix,
        load=LoadOptions(load_dtype, device_map, trust_remote_code),
    ).run(progress)
