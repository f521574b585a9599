"""flags → checks → plan → training → adapter, final model, merged model → upload: what `plait sft` does.

Training is over, and its result complete under its name, before merge and upload begin. Neither can lose it: what fails is
reported with the command that does it again, and nothing but what this run has made or checked is uploaded.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from plait.baking.pipeline import run_bake
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.errors import OutputError, PlaitError, RecipeError, collect
from plait.hub.task_adapters import ADAPTER
from plait.recipes.request import read_request
from plait.records import ShortRepr
from plait.results.checks import is_complete
from plait.results.digests import sha256
from plait.results.lock import read_lock
from plait.results.progress import Progress
from plait.results.staging import output_problem, staged
from plait.training import causal
from plait.training.arguments import Flags, job_of
from plait.training.checks import flag_problems, hub_push_problem, hub_token
from plait.training.estimate import Estimate, estimate
from plait.training.folder import MERGED_MODEL, folder_problem, is_main_process, result_problem
from plait.training.formats import PlainText
from plait.training.job import FINAL_MODEL, TrainingJob, TrainingRecord
from plait.training.phases import PlannedPhase
from plait.training.preflight import ResolvedPhase, resolve_phase
from plait.training.running import train_in_folder
from plait.verification.publish import push_result

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class SftPlan(ShortRepr):
    """One phase of training, and what follows it; everything that can be checked before it has been.

    Attributes:
        flags: as given.
        phase: the one that is trained; its record when training is done already, and only what follows it may be missing.
        estimate: parameters, steps, bytes.
    """

    flags: Flags
    phase: ResolvedPhase
    estimate: Estimate

    @property
    def writes(self) -> tuple[Path, ...]:
        """The folders of the result."""
        names = [FINAL_MODEL] if self.phase.opened.job.lora is None else [ADAPTER, FINAL_MODEL]
        return tuple(self.flags.out / n for n in [*names, *[MERGED_MODEL] * bool(self.flags.get("merge_adapter_with_base"))])

    @property
    def uploads(self) -> Path | None:
        """The one folder that is uploaded; None when nothing is."""
        if not self.flags.get("push_to_hub"):
            return None
        merged = self.flags.get("upload_merged_model")
        return self.flags.out / (MERGED_MODEL if merged else FINAL_MODEL if self.phase.opened.job.lora is None else ADAPTER)

    @property
    def example(self) -> tuple[str, str]:
        """What the first example gives, and what is learned of it."""
        return causal.encoder_of(self.phase.opened, self.phase.settings).text(self.phase.encoded[0].items[0])

    @property
    def notes(self) -> tuple[str, ...]:
        """Rows and examples left out or cut."""
        return causal.notes_of(self.phase.opened, self.phase.encoded)


@dataclass(frozen=True)
class Failure:
    """A step after training that did not succeed.

    Attributes:
        step: `copy`, `merge` or `push`.
        reason: why.
        command: does it again.
    """

    step: str
    reason: str
    command: str


@dataclass(frozen=True, repr=False)
class SftResult(ShortRepr):
    """What a run made.

    Attributes:
        record: of training.
        adapter: its folder; None after a full fine-tune.
        final_model: its folder.
        found: whether an earlier run had finished the training, so that this one trained nothing.
        merged_model: its folder; None when none was asked for, or the merge failed.
        url: where the result was uploaded; None when it was not.
        failures: of merge and upload; empty when everything was done.
    """

    record: TrainingRecord
    adapter: Path | None
    final_model: Path
    found: bool = False
    merged_model: Path | None = None
    url: str | None = None
    failures: tuple[Failure, ...] = ()


def plan_sft(flags: Flags) -> SftPlan:
    """Check everything that can be checked before training. Writes nothing.

    Raises:
        RecipeError: flags, data, disk, folder or Hub do not allow it; everything that is wrong at once.
    """
    problems = flag_problems(flags)
    force, merged = bool(flags.get("force")), bool(flags.get("merge_adapter_with_base"))
    phase = found = None
    job = _job(flags, problems)
    if job is not None:
        base = partial(BaseCheckpoint.open, job.base) if merged else None
        phase, wrong = resolve_phase(PlannedPhase(ADAPTER, job, flags.out, None), force=force, also=base)
        problems += [text for _, text in wrong]
    elif problem := folder_problem(flags.out, None, force=force):
        problems.append(problem)
    if flags.get("push_to_hub") and not any("--hub_repo_id" in p for p in problems) and (problem := hub_push_problem(flags)):
        problems.append(problem)
    if phase is not None:
        try:
            found = _estimated(phase, problems, merged=merged)
        except PlaitError as error:
            problems.append(str(error))
    collect(RecipeError, list(dict.fromkeys(problems)), "plait sft cannot begin")
    assert phase is not None
    assert found is not None
    return SftPlan(flags, phase, found)


def run_sft(plan: SftPlan, *, progress: Progress | None = None) -> SftResult:
    """Train, then merge and upload as the flags ask for. Killed, the same call continues.

    Args:
        plan: from `plan_sft`.
        progress: receives stages and steps, in place of TRL's own bar and lines.

    Raises:
        PlaitError: training is not possible. A failed merge or upload raises nothing; the result names it.
    """
    flags, out, phase = plan.flags, plan.flags.out, plan.phase
    record, found = train_in_folder(phase.opened, out, force=bool(flags.get("force")), progress=progress, encoded=phase.encoded)
    final, adapter = out / FINAL_MODEL, None if record.job.lora is None else out / ADAPTER
    failures: list[Failure] = []
    merged = url = None

    def attempt(step: str, command: Sequence[str], action: Callable[[], T]) -> T | None:
        """Do something that must not take the finished training down with it."""
        try:
            return action()
        except Exception as error:  # whatever it is, the adapter is safe, and the reason is reported
            reason = str(error) if isinstance(error, PlaitError) else f"{type(error).__name__}: {error}"
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
            failures.append(Failure(step, reason + notes, shlex.join(command)))
            return None

    def push(folder: Path, repo: str, *, private: bool, revision: str | None) -> str:
        if folder.name == MERGED_MODEL and merged is None:
            raise OutputError("there is no merged model of this run, and nothing else is uploaded in its place.")
        with hub_token(flags):
            return push_result(folder, repo, private=private, revision=revision).url

    if is_main_process():
        if adapter is not None:
            attempt("copy", ["cp", "-r", f"{adapter}/.", str(final)], partial(_copy, adapter, final))
        if adapter is not None and flags.get("merge_adapter_with_base"):
            folder, base = out / MERGED_MODEL, phase.opened.base_reference
            command = ["plait", "bake", str(adapter), "--base-id", base, "-o", str(folder), "--force"]
            merged = attempt("merge", command, partial(_merge, adapter, base, folder, progress))
        if plan.uploads is not None:
            repo, private = str(flags.get("hub_model_id")), bool(flags.get("hub_private_repo"))
            revision = flags.get("hub_revision")
            options = [*["--private"] * private, *(["--revision", revision] if revision else [])]
            command = ["plait", "push", str(plan.uploads), repo, *options]
            url = attempt("push", command, partial(push, plan.uploads, repo, private=private, revision=revision))
    return SftResult(record, adapter, final, found, merged, url, tuple(failures))


def _job(flags: Flags, problems: list[str]) -> TrainingJob | None:
    """Return the job that flags ask for, less what `problems` explains already and transformers would refuse again."""
    if not flags.get("model_name_or_path") or not flags.get("dataset_name"):
        return None
    try:
        job = job_of(flags)
    except PlaitError as error:
        problems.append(str(error))
        return None
    if not any("load_best" in problem for problem in problems):
        return job
    kept = {name: value for name, value in job.arguments.items() if name != "load_best_model_at_end"}
    return job.model_copy(update={"arguments": kept})


def _estimated(phase: ResolvedPhase, problems: list[str], *, merged: bool) -> Estimate:
    config, out = phase.settings, phase.phase.folder
    plain = any(isinstance(example, PlainText) for example in phase.opened.data.examples)
    if plain and (config.completion_only_loss or config.assistant_only_loss):
        problems.append("--completion_only_loss, --assistant_only_loss: rows of plain text have no answer. Leave them out.")
    found = estimate(phase, out, examples=len(phase.encoded[0].items), merged=merged)
    if phase.record is None:
        problems += filter(None, (found.problem(out), result_problem(out)))
    return found


def _copy(adapter: Path, final: Path) -> None:
    if not is_complete(final) or read_lock(final).outputs != read_lock(adapter).outputs:
        with staged(final, force=True) as place:
            shutil.copytree(adapter, place, dirs_exist_ok=True)


def _merge(adapter: Path, base: str, out: Path, progress: Progress | None) -> Path:
    made_of = read_lock(out).inputs.get(ADAPTER) if is_complete(out) else None
    if made_of and all((adapter / n).is_file() and sha256(adapter / n) == digest for n, digest in made_of.files.items()):
        return out
    if out.exists() and output_problem(out, force=True) is None:
        shutil.rmtree(out)  # of another adapter: it must not be taken for this one's, whatever happens next
    recipe, _ = read_request(None, {ADAPTER: str(adapter.absolute())}, {"base_model": base})
    run_bake(recipe, out=out, progress=progress)
    return out


def describe_plan(plan: SftPlan) -> Iterator[str]:
    """Yield a plan line by line, for people."""
    job, found = plan.phase.opened.job, plan.estimate
    lora = job.lora
    targets = "" if lora is None else lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets or ("PEFT's",))
    variant = "" if lora is None else " rsLoRA" * lora.rslora + " DoRA" * lora.dora
    what = "all parameters" if lora is None else f"LoRA r {lora.r}, alpha {lora.alpha:g}{variant} on {targets} layers"
    yield f"model      {job.base}: {found.parameters:,} parameters; {what}, {found.trainable:,} trained"
    data, held = plan.phase.encoded
    watched = plan.phase.opened.eval_data
    learned = sum(int((item.labels >= 0).sum()) for item in data.items)
    yield f"data       {plan.phase.opened.data.summary}"
    read = f"{len(data.items)} examples, {sum(data.lengths):,} tokens"
    yield f"           {read}, {learned:,} learned; the longest has {data.longest}"
    if held is not None and watched is not None:
        yield f"           {len(held.items)} examples to measure the loss on: {watched.summary}"
    most = "at most " * bool(job.arguments.get("packing"))
    step = plan.phase.checkpoint
    state = "; finished already" if plan.phase.record else "" if step is None else f"; continues at step {step}"
    yield f"training   {most}{found.steps} steps, seed {job.seed}{state}"
    yield f"writes     {', '.join(str(path) for path in plan.writes)}; at most {found.bytes / 1e6:,.1f} MB"
    if plan.uploads is not None:
        yield f"uploads    {plan.uploads} to {plan.flags.get('hub_model_id')}"
