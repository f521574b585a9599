"""The run of a job: its folder, resuming, saving complete folders, the record. The same for every kind of trainer."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from plait.errors import OutputError, PlanError
from plait.extras import optional
from plait.libraries.transformers import report_steps, take_steps
from plait.results.disk import DISK_FULL
from plait.results.progress import Progress
from plait.results.staging import publish
from plait.results.versions import library_versions
from plait.training import causal, classification
from plait.training.encoding import EncodedData
from plait.training.folder import (
    JobFolder,
    checkpoint_step,
    last_checkpoint,
    named_checkpoint,
    open_folder,
    result_problem,
)
from plait.training.job import ADAPTER, FINAL_MODEL, PreparedTrainer, ResolvedJob, TrainingJob, TrainingRecord, resolve_job
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
    encoded: tuple[EncodedData, EncodedData | None] | None = None,
) -> tuple[TrainingRecord, bool]:
    """Train in a folder, or continue there, or return the record of what is finished there; see `run_job`.

    Args:
        opened: the job.
        out: its folder.
        force: give up what another job left there.
        progress: receives optimizer steps, in place of the trainer's own bar and lines.
        encoded: the data of a causal language model, where it was tokenized before.

    Returns:
        The record, and whether an earlier run had finished it, so that this one trained nothing.
    """
    with open_folder(out, opened, force=force) as folder:
        finished = folder.finished()
        if finished is not None:
            return finished, True
        if problem := result_problem(out):
            raise OutputError(problem)
        if opened.job.kind == "sequence_classification":
            prepared = classification.make_trainer(opened, out)
        else:
            prepared = causal.make_trainer(opened, out, encoded=encoded)
        return _run(opened, folder, prepared, progress), False


def _run(opened: ResolvedJob, folder: JobFolder, prepared: PreparedTrainer, progress: Progress | None) -> TrainingRecord:
    trainer, job = prepared.trainer, opened.job
    _set_seed(trainer, job.seed)
    if progress is not None:
        report_steps(trainer, partial(_begin, progress), progress.advance, progress.finish)
    checkpoint = named_checkpoint(trainer.args.resume_from_checkpoint) or last_checkpoint(folder.path)
    resumed = None if checkpoint is None else checkpoint_step(checkpoint)
    started = time.perf_counter()
    with _error_context(folder.path):
        take_steps(trainer, None if checkpoint is None else str(checkpoint))
    seconds = round(time.perf_counter() - started, 3)
    name = FINAL_MODEL if job.lora is None else ADAPTER
    history = trainer.state.log_history
    record = TrainingRecord(
        plait=__version__,
        digest=opened.digest,
        job=job,
        folder=name,
        examples=prepared.examples,
        left_out=prepared.left_out,
        truncated=prepared.truncated,
        trainable=int(trainer.get_num_trainable_parameters()),
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        losses=tuple((int(e["step"]), float(e["loss"])) for e in history if "loss" in e),
        eval_losses=tuple((int(e["step"]), float(e["eval_loss"])) for e in history if "eval_loss" in e),
        seconds=seconds,
        resumed_from=resumed,
        notes=prepared.notes,
        versions=library_versions(*_LIBRARIES),
        finished=datetime.now().astimezone().isoformat(timespec="seconds"),
    )
    _save(trainer, opened, folder, record)
    return record


@contextmanager
def _error_context(out: Path) -> Iterator[None]:
    """Say what to do when memory or disk did not suffice, and what is kept when the user stops it."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PlanError(
            f"training ran out of memory: {str(error).splitlines()[0]} Give a smaller per_device_train_batch_size with more "
            "gradient_accumulation_steps, or a smaller max_length; these are other settings, so that training begins anew."
        ) from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise OutputError(f"{out} cannot be written: {error.strerror}. Free some space. {_what_goes_on(out)}") from error
    except Exception:
        raise
    except BaseException as error:  # stopped by its user
        error.add_note(_what_goes_on(out))
        raise


def _what_goes_on(out: Path) -> str:
    """Return what is kept of a training that ended early, and what the same command does next."""
    found = last_checkpoint(out) if out.is_dir() else None
    if found is None:
        return f"No checkpoint was saved yet in {out}; the same command starts from the beginning."
    return f"{found} is kept; the same command continues from there."


def _save(trainer: Trainer, opened: ResolvedJob, folder: JobFolder, record: TrainingRecord) -> None:
    """Write weights, tokenizer, card and lock next to the final name; rename; then write the record."""
    place = folder.path / _SAVING
    if trainer.is_world_process_zero():
        shutil.rmtree(place, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(place))  # all processes: shards may have to be gathered
    if trainer.is_world_process_zero():
        (place / "training_args.bin").unlink(missing_ok=True)  # a pickle that names this machine's folders
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(str(place))
        write_provenance(place, opened, record, home=folder.path / record.folder)
        publish(place, folder.path / record.folder, force=True)
        folder.finish(record)
    trainer.accelerator.wait_for_everyone()


def _set_seed(trainer: Trainer, seed: int) -> None:
    """Let data order and dropout follow the job's seed, whatever A was drawn from."""
    trainer.args.seed = seed
    optional("transformers", "train", "training").set_seed(seed)


def _begin(progress: Progress, total: int, done: int) -> None:
    progress.start("train", total)
    progress.advance(done)
