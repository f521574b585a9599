"""flags → checks → plan → training → adapter, final model, merged model → upload: what `plait sft` does.

Training is over, and its result complete under its name, before merge and upload begin. Neither can lose it: what fails is
reported with the command that does it again, and nothing but what this run has made or checked is uploaded.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.baking.pipeline import run_bake
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.errors import OutputError, PlaitError, RecipeError, collect
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
from plait.training.encoding import EncodedData
from plait.training.estimate import Estimate, estimate
from plait.training.folder import (
    MERGED_MODEL,
    folder_problem,
    is_main_process,
    result_problem,
)
from plait.training.formats import PlainText
from plait.training.job import ADAPTER, FINAL_MODEL, TrainingJob, TrainingRecord
from plait.training.phases import PlannedPhase
from plait.training.preflight import ResolvedPhase, resolve_phase
from plait.training.running import train_in_folder
from plait.verification.publish import push_result


@dataclass(frozen=True, repr=False)
class SftPlan(ShortRepr):
    """What a run will do; everything that can be checked before it has been.

    Attributes:
        flags: as given.
        phase: the one that is trained, with its inputs; its record when training is done already, and only what follows it
            may be missing.
        encoded: examples and held-out examples as tokens.
        estimate: parameters, steps, bytes.
        example: what the first example gives, and what is learned of it.
        notes: rows and examples left out or cut.
    """

    flags: Flags
    phase: ResolvedPhase
    encoded: tuple[EncodedData, EncodedData | None]
    estimate: Estimate
    example: tuple[str, str]
    notes: tuple[str, ...]

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


@dataclass(frozen=True)
class Failure:
    """A step behind training that did not succeed.

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
    phase = None
    force = bool(flags.get("force"))
    job = _job(flags, problems)
    if job is not None:
        merged = bool(flags.get("merge_adapter_with_base"))
        also = (lambda opened: BaseCheckpoint.open(opened.job.base)) if merged else None
        phase, found = resolve_phase(PlannedPhase(ADAPTER, job, flags.out, None), force=force, also=also)
        problems += [text for _, text in found]
    elif problem := folder_problem(flags.out, None, force=force):
        problems.append(problem)
    if flags.get("push_to_hub") and not any("--hub_repo_id" in p for p in problems) and (problem := hub_push_problem(flags)):
        problems.append(problem)
    plan = None if phase is None else _planned(flags, phase, problems)
    collect(RecipeError, list(dict.fromkeys(problems)), "plait sft cannot begin")
    assert plan is not None
    return plan


def run_sft(plan: SftPlan, *, progress: Progress | None = None) -> SftResult:
    """Train, then merge and upload as the flags ask for. Killed, the same call continues.

    Args:
        plan: from `plan_sft`.
        progress: receives stages and steps, in place of TRL's own bar and lines.

    Raises:
        PlaitError: training is not possible. A failed merge or upload raises nothing; the result names it.
    """
    out = plan.flags.out
    force = bool(plan.flags.get("force"))
    record, found = train_in_folder(plan.phase.opened, out, force=force, progress=progress, encoded=plan.encoded)
    result = SftResult(record, None if record.job.lora is None else out / ADAPTER, out / FINAL_MODEL, found=found)
    if not is_main_process():
        return result
    if result.adapter is not None:
        result = _copied(result, result.adapter)
    if plan.flags.get("merge_adapter_with_base"):
        result = _merged(plan, result, progress)
    return _pushed(plan, result)


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


def _planned(flags: Flags, phase: ResolvedPhase, problems: list[str]) -> SftPlan | None:
    opened, config = phase.opened, phase.settings
    plain = any(isinstance(example, PlainText) for example in opened.data.examples)
    if plain and (config.completion_only_loss or config.assistant_only_loss):
        problems.append("--completion_only_loss, --assistant_only_loss: rows of plain text have no answer. Leave them out.")
    try:
        encoded = causal.encode_data(opened, config)
        merged = bool(flags.get("merge_adapter_with_base"))
        found = estimate(opened, config, flags.out, examples=len(encoded[0].items), merged=merged)
        if phase.record is None:
            problems += filter(None, (found.problem(flags.out), result_problem(flags.out)))
        example = causal.encoder_of(opened, config).text(encoded[0].items[0])
    except PlaitError as error:
        problems.append(str(error))
        return None
    return SftPlan(flags, phase, encoded, found, example, causal.notes_of(opened, encoded, config))


def _copied(result: SftResult, adapter: Path) -> SftResult:
    final = result.final_model

    def copy() -> None:
        if not is_complete(final) or read_lock(final).outputs != read_lock(adapter).outputs:
            with staged(final, force=True) as place:
                shutil.copytree(adapter, place, dirs_exist_ok=True)

    failure, _ = _tried("copy", shlex.join(["cp", "-r", f"{adapter}/.", str(final)]), copy)
    return replace(result, failures=(*result.failures, *failure))


def _merged(plan: SftPlan, result: SftResult, progress: Progress | None) -> SftResult:
    out, base = plan.flags.out / MERGED_MODEL, plan.phase.opened.base_reference
    assert result.adapter is not None
    adapter = result.adapter
    again = _command("bake", str(adapter), "--base-id", base, "-o", str(out), "--force")

    def bake() -> Path:
        if _is_of(out, adapter):
            return out
        if out.exists() and output_problem(out, force=True) is None:
            shutil.rmtree(out)  # of another adapter: it must not be taken for this one's, whatever happens next
        recipe, _ = read_request(None, {ADAPTER: str(adapter.absolute())}, {"base_model": base})
        run_bake(recipe, out=out, progress=progress)
        return out

    failure, merged = _tried("merge", again, bake)
    return replace(result, merged_model=merged, failures=(*result.failures, *failure))


def _pushed(plan: SftPlan, result: SftResult) -> SftResult:
    folder, flags = plan.uploads, plan.flags
    if folder is None:
        return result
    repo, private = str(flags.get("hub_model_id")), bool(flags.get("hub_private_repo"))
    revision = flags.get("hub_revision")
    again = _command("push", str(folder), repo, *["--private"] * private, *(["--revision", revision] if revision else []))

    def push() -> str:
        if folder.name == MERGED_MODEL and result.merged_model is None:
            raise OutputError("there is no merged model of this run, and nothing else is uploaded in its place.")
        with hub_token(flags):
            return push_result(folder, repo, private=private, revision=revision).url

    failure, url = _tried("push", again, push)
    return replace(result, url=url, failures=(*result.failures, *failure))


def _tried(step: str, command: str, action: Callable[[], Any]) -> tuple[tuple[Failure, ...], Any]:
    """Do something that must not take the finished training down with it."""
    try:
        return (), action()
    except Exception as error:  # whatever it is, the adapter is safe, and the reason is reported
        reason = str(error) if isinstance(error, PlaitError) else f"{type(error).__name__}: {error}"
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
        return (Failure(step, reason + notes, command),), None


def _is_of(merged: Path, adapter: Path) -> bool:
    """Return whether a merged model is complete and made of exactly this adapter."""
    if not is_complete(merged):
        return False
    made_of = read_lock(merged).inputs.get(ADAPTER)
    return made_of is not None and all(
        (adapter / name).is_file() and sha256(adapter / name) == digest for name, digest in made_of.files.items()
    )


def _command(*words: str) -> str:
    return shlex.join(["plait", *words])


def describe_plan(plan: SftPlan) -> Iterator[str]:
    """Yield a plan line by line, for people."""
    job, found = plan.phase.opened.job, plan.estimate
    lora = job.lora
    targets = "" if lora is None else lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets or ("PEFT's",))
    variant = "" if lora is None else " rsLoRA" * lora.rslora + " DoRA" * lora.dora
    what = "all parameters" if lora is None else f"LoRA r {lora.r}, alpha {lora.alpha:g}{variant} on {targets} layers"
    yield f"model      {job.base}: {found.parameters:,} parameters; {what}, {found.trainable:,} trained"
    data, held = plan.encoded
    watched = plan.phase.opened.eval_data
    tokens = sum(len(item.ids) for item in data.items)
    learned = sum(int((item.labels >= 0).sum()) for item in data.items)
    yield f"data       {plan.phase.opened.data.summary}"
    yield f"           {len(data.items)} examples, {tokens:,} tokens, {learned:,} learned; the longest has {data.longest}"
    if held is not None and watched is not None:
        yield f"           {len(held.items)} examples to measure the loss on: {watched.summary}"
    most = "at most " * bool(job.arguments.get("packing"))
    step = plan.phase.checkpoint
    state = "; finished already" if plan.phase.record else "" if step is None else f"; continues at step {step}"
    yield f"training   {most}{found.steps} steps, seed {job.seed}{state}"
    yield f"writes     {', '.join(str(path) for path in plan.writes)}; at most {found.bytes / 1e6:,.1f} MB"
    if plan.uploads is not None:
        yield f"uploads    {plan.uploads} to {plan.flags.get('hub_model_id')}"
