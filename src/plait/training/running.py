"""The run of a job: its folder, resuming, saving complete folders, the record. The same for every kind of trainer."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from plait.errors import OutputError, PlaitError, PlanError
from plait.extras import optional
from plait.hub.task_adapters import ADAPTER
from plait.libraries.transformers.trainer import CheckpointError, report_steps, take_steps
from plait.results.disk import full_disk
from plait.results.progress import Progress
from plait.results.staging import publish, recover
from plait.results.versions import library_versions
from plait.results.writing import write_json_atomic
from plait.training.encoding import EncodedSplits
from plait.training.folder import (
    TRAINING_RECORD,
    checkpoint_step,
    finished,
    last_checkpoint,
    named_checkpoint,
    open_folder,
    result_problem,
)
from plait.training.job import FINAL_MODEL, ResolvedJob, TrainingJob, TrainingRecord, resolve_job
from plait.training.kinds import KINDS
from plait.training.provenance import write_provenance
from plait.version import __version__

if TYPE_CHECKING:
    from transformers import Trainer

_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
_SAVING = ".saving"


def run_job(job: TrainingJob, out: Path, *, force: bool = False, progress: Progress | None = None) -> TrainingRecord:
    """Train, continue where a killed run of the same job stopped, or return the record of a finished one.

    Args:
        job: what to do.
        out: its folder: checkpoints, `adapter/` (`final_model/` without LoRA), `training.json`.
        force: give up what another job left there.
        progress: receives optimizer steps, in place of the trainer's own bar and lines.

    Raises:
        PlaitError: anything wrong with what the user gave.
    """
    return train_in_folder(resolve_job(job), out, force=force, progress=progress)[0]


def train_in_folder(
    opened: ResolvedJob,
    out: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    encoded: EncodedSplits | None = None,
) -> tuple[TrainingRecord, bool]:
    """Train in a folder, or continue there, or return the record of what is finished there; see `run_job`.

    Args:
        opened: the job.
        out: its folder.
        force: give up what another job left there.
        progress: receives optimizer steps, in place of the trainer's own bar and lines.
        encoded: the data, where it was tokenized before.

    Returns:
        The record, and whether an earlier run had finished it, so that this one trained nothing.
    """
    with open_folder(out, opened, force=force):
        if (record := finished(out, opened)) is not None:
            return record, True
        if problem := result_problem(out):
            raise OutputError(problem)
        kind = KINDS[opened.job.kind]
        config = kind.settings_of(opened.job, out)
        encoded = encoded or kind.encode_data(opened, config)
        return _run(kind.make_trainer(opened, config, encoded), opened, out, encoded, progress), False


def _run(
    trainer: Trainer,
    opened: ResolvedJob,
    out: Path,
    encoded: EncodedSplits,
    progress: Progress | None,
) -> TrainingRecord:
    job, data = opened.job, encoded[0]
    trainer.args.seed = job.seed  # of data order and dropout, whatever A was drawn from
    optional("transformers", "train", "training").set_seed(job.seed)
    if progress is not None:

        def begin(total: int, done: int) -> None:
            progress.start("train", total)
            progress.advance(done)

        report_steps(trainer, begin, progress.advance, progress.finish)
    checkpoint = named_checkpoint(trainer.args.resume_from_checkpoint) or last_checkpoint(out)
    resumed = None if checkpoint is None else checkpoint_step(checkpoint)
    started = time.perf_counter()
    with _error_context(out, checkpoint):
        take_steps(trainer, None if checkpoint is None else str(checkpoint))
    seconds = round(time.perf_counter() - started, 3)
    history = trainer.state.log_history
    record = TrainingRecord(
        plait=__version__,
        digest=opened.digest,
        job=job,
        folder=FINAL_MODEL if job.lora is None else ADAPTER,
        examples=len(data.items),
        left_out=data.left_out,
        truncated=data.truncated,
        trainable=int(trainer.get_num_trainable_parameters()),
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        losses=tuple((int(e["step"]), float(e["loss"])) for e in history if "loss" in e),
        eval_losses=tuple((int(e["step"]), float(e["eval_loss"])) for e in history if "eval_loss" in e),
        seconds=seconds,
        resumed_from=resumed,
        notes=KINDS[job.kind].notes_of(opened, encoded),
        versions=library_versions(*_LIBRARIES),
        finished=datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    with _error_context(out):
        _save(trainer, opened, out, record)
    return record


@contextmanager
def _error_context(out: Path, checkpoint: Path | None = None) -> Iterator[None]:
    """Report what to do when memory or disk did not suffice or a checkpoint is damaged, and what is kept when it is stopped."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PlanError(
            f"training ran out of memory: {str(error).splitlines()[0]} Give a smaller per_device_train_batch_size with more "
            "gradient_accumulation_steps, or a smaller max_length; these are other settings, so that training begins anew."
        ) from error
    except CheckpointError as error:
        cause = error.__cause__
        lines = str(cause).splitlines() or [""]
        raise OutputError(
            f"{checkpoint} cannot be continued from ({type(cause).__name__}: {lines[0][:200]}). Delete it: the same command "
            "continues from the checkpoint before it, or from the beginning."
        ) from error
    except Exception as error:
        if isinstance(error, PlaitError) or not (why := full_disk(error)):
            raise
        raise OutputError(f"{out} cannot be written: {why}. Free some space. {_how_to_continue(out)}") from error
    except BaseException as error:  # stopped by its user
        error.add_note(_how_to_continue(out))
        raise


def _how_to_continue(out: Path) -> str:
    """Return what is kept of a training that ended early, and what the same command does next."""
    found = last_checkpoint(out) if out.is_dir() else None
    if found is None:
        return f"No checkpoint was saved yet in {out}; the same command starts from the beginning."
    return f"{found} is kept; the same command continues from there."


def _save(trainer: Trainer, opened: ResolvedJob, out: Path, record: TrainingRecord) -> None:
    """Write weights, tokenizer, card and lock next to the final name; rename; then write the record."""
    place = out / _SAVING
    first = trainer.is_world_process_zero()
    if first:
        shutil.rmtree(place, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(place))  # all processes: shards may have to be gathered
        if first:
            recover(out / record.folder, force=True)
            (place / "training_args.bin").unlink(missing_ok=True)  # a pickle that names this machine's folders
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(str(place))
            write_provenance(place, opened, record, home=out / record.folder)
            publish(place, out / record.folder, force=True)
            write_json_atomic(out / TRAINING_RECORD, record.model_dump(mode="json"))  # from now on the run is done
    finally:
        if first:
            shutil.rmtree(place, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
