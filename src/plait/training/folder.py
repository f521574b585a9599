"""The folder of a run: whose it is, what is finished in it, and where a killed run continues."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from plait.errors import OutputError, RecipeError, listed
from plait.extras import optional
from plait.folders import entries, file_in
from plait.hub.task_adapters import ADAPTER
from plait.notices import announce
from plait.parsing import read_object, shown
from plait.results.checks import check_files
from plait.results.disk import writing_problem
from plait.results.lock import read_lock
from plait.results.locking import lock_holder, locked
from plait.results.records import read_earlier
from plait.results.staging import kind_problem, output_problem, place_problem
from plait.results.writing import write_json_atomic
from plait.training.job import FINAL_MODEL, ResolvedJob, TrainingRecord

TRAINING_RECORD = "training.json"
MERGED_MODEL = "merged_model"
STATE = "trainer_state.json"  # of a checkpoint, written last
_JOB, _IN_USE = "job.json", ".in-use"
_WORK = "a model is trained there"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
#: What trainers write into a checkpoint; anything else there is its user's.
_CHECKPOINT_FILES = (
    STATE, "adapter_*", "model*.safetensors*", "pytorch_model*", "optimizer*", "scheduler*", "scaler*", "rng_state*",
    "README.md", "training_args.bin", "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*", "merges.txt", "spiece.model", "chat_template*", "*processor_config.json", "global_step*", "latest",
    "zero_to_fp32.py", "fsdp_*", "distributed_checkpoint/*", "*.py",
)  # fmt: skip
_SHOWN = 6


def finished(out: Path, opened: ResolvedJob) -> TrainingRecord | None:
    """Return the record of this very job in a folder, where its result is there as it was written."""
    record = read_earlier(TrainingRecord, out / TRAINING_RECORD)
    if record is None or record.digest != opened.digest:
        return None
    result = out / record.folder
    try:
        files = check_files(result, read_lock(result))
        others = [f"{file.name} {file.state}" for file in files if file.state not in ("equal", "extra")]
    except (OSError, ValueError) as error:  # which PlaitErrors of a file are too
        others = [str(error).splitlines()[0].rstrip(".")]
    if not others:
        return record
    announce(f"{result} is not as the training wrote it ({listed(others)}), and is made again.")
    return None


@contextmanager
def open_folder(out: Path, opened: ResolvedJob, *, force: bool) -> Iterator[None]:
    """Hold a folder for a job; the processes of one distributed run count as one.

    Args:
        out: made when missing.
        opened: the job.
        force: give up what another job left there: checkpoints, results and record.

    Raises:
        OutputError: another process trains there, another job's results are there, or it cannot be written.
    """
    if not is_main_process():
        _wait_for_all()
        yield
        return
    problem = folder_problem(out, opened, force=force)
    if problem:
        raise OutputError(problem)
    with locked(out / _IN_USE, _WORK):
        try:
            if _differences(out, opened):
                for path in (*_checkpoints(out), *(out / name for name in (ADAPTER, FINAL_MODEL, MERGED_MODEL))):
                    if path.is_dir():
                        shutil.rmtree(path)
                (out / TRAINING_RECORD).unlink(missing_ok=True)
            write_json_atomic(out / _JOB, {"parts": opened.parts, "job": opened.job.model_dump(mode="json")})
            _wait_for_all()
            yield
        finally:
            (out / _IN_USE).unlink(missing_ok=True)


def folder_problem(out: Path, opened: ResolvedJob | None, *, force: bool) -> str | None:
    """Return why a run cannot be in a folder, without touching it; `opened` is None while the job is not known."""
    if not is_main_process():
        return None
    try:
        if problem := _place_problem(out):
            return problem
        if not out.exists() or not any(p.name != _IN_USE for p in out.iterdir()):
            return None
        if used := lock_holder(out / _IN_USE, _WORK):
            return used
        if not _is_run(out):
            held = ", ".join(sorted(p.name for p in out.iterdir())[:_SHOWN])
            return f"{out} holds {held}, which no run of plait wrote. Choose another output folder."
        if opened is None:
            return None
        different = _differences(out, opened)
        if different and force:
            return _not_to_be_cleared(out)
    except OSError as error:
        return f"{out} cannot be read: {error.strerror or error}."
    if not different:
        return None
    return (
        f"{out} holds a run with other settings ({listed(different, _SHOWN)}). Choose another output folder, or give that "
        "run up with --force (force=True); the same settings would continue it."
    )


def _place_problem(out: Path) -> str | None:
    if problem := place_problem(out) or kind_problem(out, "output folder"):
        return problem
    problem = writing_problem(out)
    return f"{out} cannot be written: {problem}. Choose another output folder." if problem else None


def is_main_process() -> bool:
    """Return whether this is the first of the processes of a run; the others leave folders to it."""
    return os.environ.get("RANK", "0") == "0"


def _wait_for_all() -> None:
    """Wait until all processes of a run have arrived."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        optional("accelerate", "train", "training").PartialState().wait_for_everyone()


def named_checkpoint(reference: str | None) -> Path | None:
    """Return the checkpoint that `resume_from_checkpoint` names; None where it names none.

    Raises:
        RecipeError: there is no complete checkpoint.
    """
    if reference is None or str(reference).lower() in ("true", "false"):
        return None
    if not (Path(reference) / STATE).is_file():
        raise RecipeError(
            f"resume_from_checkpoint: {reference} is not a complete checkpoint (it has no {STATE}). Leave it out: a run that "
            "was killed continues by itself."
        )
    return Path(reference)


def last_checkpoint(out: Path) -> Path | None:
    """Return the newest checkpoint that is complete; one that is not is announced."""
    found = {int(p.name.rpartition("-")[2]): p for p in _checkpoints(out)}
    for step in sorted(found, reverse=True):
        if (why := _incomplete(found[step])) is None:
            return found[step]
        announce(f"{found[step]} is left aside: {why.removeprefix(f'{found[step]}/')}", once=f"{found[step]} is left aside")
    return None


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of steps after a checkpoint.

    Raises:
        RecipeError: its state cannot be read, or holds what no trainer wrote.
    """
    state = read_object(checkpoint / STATE, RecipeError, constants=True)
    state = {"num_input_tokens_seen": 0, "log_history": [], **state}
    for name, kind in (("global_step", int), ("num_input_tokens_seen", int), ("log_history", list)):
        if not isinstance(state.get(name), kind) or isinstance(state[name], bool):
            raise RecipeError(f"{checkpoint / STATE}: {name!r} must be of type {kind.__name__}, got {shown(state.get(name))}.")
    for entry in state["log_history"]:
        numbers = [entry.get(key, 0) for key in ("step", "loss", "eval_loss")] if isinstance(entry, dict) else [None]
        if not all(isinstance(number, (int, float)) for number in numbers) or "step" not in entry:
            raise RecipeError(f"{checkpoint / STATE}: 'log_history' must hold steps and losses, got {shown(entry)}.")
    return int(state["global_step"])


def _incomplete(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be continued from; None where it can."""
    try:
        checkpoint_step(checkpoint)
    except RecipeError as error:
        return str(error)
    states = ("optimizer*", "global_step*", "pytorch_model_fsdp*")
    return None if any(any(checkpoint.glob(form)) for form in states) else "it holds no state of the optimizer."


def _differences(out: Path, opened: ResolvedJob) -> list[str]:
    """Return what differs between the job of a folder and this one."""
    try:
        there = read_object(out / _JOB, OutputError).get("parts")
    except OutputError:
        there = None
    if not isinstance(there, dict):
        return [f"{_JOB} cannot be read"] if (out / _JOB).exists() else []
    return sorted(name for name in {*there, *opened.parts} if there.get(name) != opened.parts.get(name))


def _is_run(out: Path) -> bool:
    """Return whether a run has begun in a folder: it has left a job there that can be read."""
    try:
        job = read_object(file_in(out, _JOB), OutputError)
    except OSError:  # an OutputError is one too
        return False
    return isinstance(job.get("parts"), dict) and isinstance(job.get("job"), dict)


def result_problem(out: Path) -> str | None:
    """Return why a new result must not take the place of an earlier one in a folder: something else would be lost."""
    return next(filter(None, (output_problem(out / name, force=True) for name in (ADAPTER, FINAL_MODEL, MERGED_MODEL))), None)


def _not_to_be_cleared(out: Path) -> str | None:
    """Return why what another run left in a folder must not be removed."""
    for checkpoint in _checkpoints(out):
        others = [name for name in entries(checkpoint) if not any(fnmatch(name, form) for form in _CHECKPOINT_FILES)]
        if checkpoint.is_symlink() or others:
            shown = ", ".join(sorted(others)[:_SHOWN]) or "is a link"
            return f"{checkpoint} is not what a trainer wrote alone ({shown}); --force would delete it. Move it away."
    return result_problem(out)


def _checkpoints(out: Path) -> list[Path]:
    return [path for path in sorted(out.iterdir()) if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
