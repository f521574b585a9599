"""The mixer without its page: one live base for everyone, and what it answers, scores and keeps at a setting."""

from __future__ import annotations

import shlex
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

import torch

from plait.calibration.completion import read_for_completion
from plait.calibration.search import find_values
from plait.errors import OutputError, PlaitError, PlanError, TaskError
from plait.evaluation.candidates import Candidate, merge_candidate
from plait.evaluation.generation import Sampling
from plait.evaluation.pipeline import EvaluateOptions, recipe_evaluator
from plait.evaluation.record import TaskResult
from plait.evaluation.replies import AskedPrompt, Asking, Reply, Respondent, base_and_singles, heads_apart
from plait.evaluation.scores import digest
from plait.evaluation.session import TaskExamples
from plait.folders import expanded, file_name_problem
from plait.hub.pretrained import LoadOptions
from plait.hub.references import parse_reference
from plait.inspection.doubts import adapter_doubts
from plait.merging.combine import pipeline_of
from plait.merging.inventory import Inventory
from plait.merging.kept import UNWEIGHTED_BYTES, KeptResults
from plait.merging.pipeline import run_recipe
from plait.merging.plan import make_plan
from plait.merging.weighting import module_weights, towers_of
from plait.methods import METHODS
from plait.methods.base import Method
from plait.mixer.disagreement import TokenView, compare, log_probabilities
from plait.mixer.setting import Controls, Setting
from plait.mixer.turns import GiveWay, Turns
from plait.recipes.evaluation import Subset
from plait.recipes.schema import Recipe
from plait.recipes.writing import to_yaml
from plait.records import Record
from plait.results.lock import relative_path
from plait.results.progress import Progress
from plait.results.threads import worker_count
from plait.results.writing import write_text_atomic
from plait.stages.base import LinearCombine
from plait.tasks.answers import Answer
from plait.tasks.metrics import metric_of

EXAMPLES = 24  # per task, where nothing says how many
SUGGESTED = ("linear", "ties", "dc_merge", "tsv", "iso_cts")  # that need no data but texts for the scale
_CANDIDATES, _REPLIES = 6, 512  # that are kept in memory; a candidate may hold factors of all modules

Stop = Callable[[], bool]
T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """One prompt, and how it is answered.

    Attributes:
        prompt: text.
        system: the chat's first message; none where it is empty.
        plain: read the prompt without the chat template.
        sampling: how replies are written.
    """

    prompt: str
    system: str = ""
    plain: bool = False
    sampling: Sampling = field(default_factory=Sampling)


class Flip(Record):
    """An example that one setting answers otherwise than the one before it.

    Attributes:
        task: name.
        prompt: as the model read it, without a template.
        target: the right answer.
        before: the answer at the setting before.
        now: the answer at this one.
        better: whether it became right (True) or wrong (False); None where answers are not right or wrong.
    """

    task: str
    prompt: str
    target: str
    before: str | None
    now: str | None
    better: bool | None


class Suggestion(Record):
    """A setting that was tried.

    Attributes:
        setting: what was tried.
        share: mean of KL(own adapter ‖ merge) / KL(own adapter ‖ base) at its scale, on the tasks' texts.
        worst: lowest recovery on the subset; None where none is defined.
        mean: mean recovery.
    """

    setting: Setting
    share: float
    worst: float | None
    mean: float | None


class Kept(Record):
    """What was written of a setting.

    Attributes:
        adapter: folder with the merged adapter, its lock and its card.
        recipe: file next to it.
        bake: the command that makes a full model of it.
    """

    adapter: str
    recipe: str
    bake: str


class Mixer:
    """A base model and adapters, loaded once, at any setting; for several people, one at a time.

    Nothing is written but by `keep`.

    Args:
        recipe: where the controls begin.
        folder: where its relative paths start; the working directory when None.
        load: how the base is loaded.
        out: folder that `keep` writes into.
        workers: modules merged at a time; never changes a number.
        progress: receives the stages of loading.

    Attributes:
        controls: what can be set.
        turns: who has the model.
        base: as it was written.
        out: folder that `keep` writes into.
        notes: for people.

    Raises:
        PlaitError: anything wrong with adapters, base or tasks, before the base is loaded; or the base cannot be loaded.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path | None,
        load: LoadOptions,
        *,
        out: Path,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        scored = recipe  # the subset is the mixer's own: no setting, and so nothing that is kept, holds it
        if recipe.eval.subset is None:
            scored = recipe.changed(eval=recipe.eval.model_copy(update={"subset": Subset(max_samples=EXAMPLES)}))
        self.turns = Turns(progress)
        self._folder, self._load, self._workers = folder, load, worker_count(workers)
        self.out = out
        options = EvaluateOptions(None, load, workers=workers)
        with recipe.origins.named():
            self._evaluator, inventory = recipe_evaluator(scored, folder, options, self.turns, without_tasks=True)
            make_plan(inventory, workers=self._workers)
            self.controls = Controls(recipe, inventory.layouts)
        self._inventory = replace(inventory, kept=KeptResults(unweighted=UNWEIGHTED_BYTES))
        self.base = self._evaluator.base
        singles = self._evaluator.singles
        self.notes = tuple(
            dict.fromkeys([*self._evaluator.notes, *heads_apart(recipe, singles), *adapter_doubts(inventory.adapters)])
        )
        self._respondents = base_and_singles(singles)
        self._candidates = _Recent[Candidate](_CANDIDATES)
        self._replies = _Recent[tuple[Reply, tuple[int, ...]]](_REPLIES)

    def open(self) -> None:
        """Load the base, and make sure that it writes text; later failures would meet whoever asks first.

        Raises:
            TaskError: the model writes no text.
        """
        with self.turns.turn(lambda: False):
            model = self._evaluator.mixture.model
            if not getattr(model, "can_generate", lambda: False)():
                raise TaskError(f"{self.base}: {type(model).__name__} writes no text; only language models reply.")
            _ = self._evaluator.session.live.tokenizer
        self.turns.shown = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that are scored."""
        return tuple(entry.task.name for entry in self._evaluator.tasks)

    @property
    def has_chat(self) -> bool:
        """Whether the base's tokenizer has a chat template."""
        return bool(getattr(self._evaluator.session.live.tokenizer, "chat_template", None))

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """The methods that these adapters can be merged with here: without second moments, where the recipe names none."""
        METHODS.load_plugins()
        count, has_moments = len(self.controls.names), self._inventory.moments is not None
        own = self.controls.start.method
        return tuple(m for m in METHODS.values() if m.name == own or _fits(m, count, has_moments=has_moments))

    def columns(self) -> tuple[str, ...]:
        """Return who answers: the base, every adapter, the merge."""
        return (*(r.name for r in self._respondents), "merge")

    def check(self, setting: Setting) -> None:
        """Refuse a setting that cannot be merged.

        Raises:
            PlaitError: with the reason.
        """
        self._candidate(setting)

    def replies(self, setting: Setting, asked: Asked, stop: Stop, report: Callable[[int, str, Reply | None], object]) -> None:
        """Have the merge, the base and every adapter answer a prompt; what has been answered before is not asked again.

        Args:
            setting: of the merge.
            asked: the prompt.
            stop: whether the answers are not wanted any more.
            report: called with a place in `columns`, the text so far, and the reply where it is complete.

        Raises:
            PlaitError: the setting cannot be merged, or the prompt not be read.
            Superseded: `stop` reports it.
        """
        asked.sampling.check()
        merge = len(self._respondents)
        for place in (merge, *range(merge)):  # the merge is what has changed
            reply, _ = self._reply(self._respondent(setting, place), asked, stop, partial(_texts, report, place))
            report(place, reply.text, reply)

    def disagreement(self, setting: Setting, asked: Asked, adapter: str, stop: Stop) -> tuple[TokenView, ...]:
        """Compare an adapter and the merge at every token of the merge's reply, whose text is tokenized again.

        Args:
            setting: of the merge.
            asked: the prompt.
            adapter: name.
            stop: whether it is not wanted any more.

        Raises:
            PlaitError: as `replies`.
            Superseded: `stop` reports it.
        """
        merge = self._respondent(setting, len(self._respondents))
        single = self._respondent(setting, 1 + self.controls.names.index(adapter))
        found, prompt = self._reply(merge, asked, stop, lambda text: None)
        reply = self._tokens(found.text)
        if not reply:
            return ()
        live = self._evaluator.session.live
        both = []
        with self.turns.turn(stop):
            for respondent in (single, merge):
                with respondent.on(live, {}) as model:
                    both.append(log_probabilities(model, prompt, reply))
        return compare(live.tokenizer, reply, *both)

    def scores(self, setting: Setting, stop: Stop) -> Iterator[TaskResult]:
        """Score a setting task by task, behind everyone who waits for an answer.

        Args:
            setting: of the merge.
            stop: whether it is not wanted any more.

        Raises:
            PlaitError: the setting cannot be merged, or a model's outputs are NaN.
            Superseded: `stop` reports it.
        """
        candidate = self._candidate(setting)
        for entry in self._evaluator.tasks:
            yield self._scored(candidate, entry, stop)

    def flips(self, before: Setting, now: Setting) -> tuple[Flip, ...]:
        """Return the examples that two settings, both scored, answer differently; those that became wrong first."""
        session, found = self._evaluator.session, list[Flip]()
        first, second = self._candidate(before), self._candidate(now)
        for entry in self._evaluator.tasks:
            old, new = (session.answers(candidate, entry) for candidate in (first, second))
            for example, a, b in zip(entry.examples.items, old, new, strict=True):
                better = _became_right(entry, a, b)
                if a.given == b.given and better is None:
                    continue
                texts = {"task": entry.task.name, "prompt": example.prompt_text, "target": example.target}
                found.append(Flip(**texts, before=a.given, now=b.given, better=better))
        return tuple(sorted(found, key=lambda flip: {False: 0, True: 1, None: 2}[flip.better]))

    def suggest(self, setting: Setting, methods: Sequence[str], stop: Stop) -> Iterator[Suggestion]:
        """Find, for the setting's method and some others, the scale nearest to the adapters on the tasks' texts, and score it.

        No label is read for the scale. A method that does not fit is left out.

        Args:
            setting: whose weights are kept.
            methods: others that are tried with their defaults; `SUGGESTED` are those that need no data.
            stop: whether it is not wanted any more.

        Raises:
            PlaitError: there are no tasks, no texts, or no scale is nearest.
            Superseded: `stop` reports it.
        """
        if not self._evaluator.tasks:
            raise PlanError("a suggestion is found on tasks, and there are none: plait mix … --tasks FILE.yaml.")
        known = {method.name for method in self.methods}
        others = [setting.model_copy(update={"method": m, "params": {}, "space": None}) for m in methods if m in known]
        for tried in [setting, *(other for other in others if other.method != setting.method)]:
            recipe = self.controls.recipe_of(tried.model_copy(update={"scale": 1.0}))
            asked = recipe.changed(scale="auto")
            request = read_for_completion(asked, self._folder, self._load)
            at = replace(self._inventory, recipe=recipe)
            search = partial(find_values, request, self._evaluator.mixture, at, {"scale": 1.0}, self._workers, self.turns)
            found = self._behind(search, stop)
            best = tried.model_copy(update={"scale": round(float(found.values["scale"]), 3)})
            results = [*self.scores(best, stop)]
            values = [r.recovery for r in results if r.recovery is not None]
            mean = sum(values) / len(values) if values else None
            yield Suggestion(setting=best, share=found.share, worst=min(values, default=None), mean=mean)

    def recipe_text(self, setting: Setting, home: Path | None = None) -> str:
        """Return a setting as a recipe's text.

        Args:
            setting: of the merge.
            home: folder of the file that the text is for; local paths are as they were given when None.

        Raises:
            RecipeError: the setting is not valid.
        """
        recipe = self.controls.recipe_of(setting)
        return to_yaml(recipe if home is None else _placed(recipe, self._folder, home))

    def keep(self, setting: Setting, name: str) -> Kept:
        """Write a setting's adapter, with its lock and card, and its recipe next to it.

        Args:
            setting: of the merge.
            name: of the adapter's folder in that of the mixer.

        Raises:
            OutputError: the name is none, or taken; nothing is written then.
            PlaitError: it cannot be merged.
        """
        if (problem := file_name_problem(name)) or "/" in name:
            raise OutputError(f"{name!r} cannot be a folder's name: it {problem or 'holds a slash'}.")
        adapter, recipe = self.out / name, self.out / f"{name}.yaml"
        if taken := [str(place) for place in (adapter, recipe) if place.exists()]:
            raise OutputError(f"{' and '.join(taken)}: there is something already; choose another name.")
        run_recipe(self.controls.recipe_of(setting), folder=self._folder, out=adapter, workers=self._workers)
        write_text_atomic(recipe, self.recipe_text(setting, self.out), replace=False)
        bake = ["plait", "bake", str(recipe), "-o", str(self.out / f"{name}-model")]
        return Kept(adapter=str(adapter), recipe=str(recipe), bake=shlex.join(bake))

    def _of(self, setting: Setting) -> Inventory:
        return replace(self._inventory, recipe=self.controls.recipe_of(setting))

    def _candidate(self, setting: Setting) -> Candidate:
        """Return a setting's merge: adapters with coefficients where it is their weighted sum, else merged in memory.

        Raises:
            PlaitError: it cannot be merged.
        """
        inventory = self._of(setting)
        key = inventory.recipe.model_dump_json()
        if (known := self._candidates.get(key)) is not None:
            return known
        made = merge_candidate(inventory, self._evaluator.singles, workers=self._workers, progress=self.turns)
        if (coefficients := self._coefficients(inventory)) is not None:
            made = replace(
                made,
                key=digest("live sum", made.key),
                act=lambda live, owner: live.mixture.mixed(coefficients, "module", heads=owner),
                kept=False,
                described=None,
            )
        self._candidates.put(key, made)
        return made

    def _coefficients(self, inventory: Inventory) -> torch.Tensor | None:
        """Return Λ, (K, T) float32, where a merge is the adapters themselves with coefficients; None where it is more."""
        recipe = inventory.recipe
        pipeline = pipeline_of(recipe)
        plain = recipe.merge_mode == "union" and not recipe.transforms and recipe.space_name != "factors"
        written = recipe.output.kind == "adapter" and recipe.output.dtype == "float32" and recipe.heads.policy != "average"
        combine = pipeline.combine
        if not (plain and written and pipeline.is_linear and isinstance(combine, LinearCombine)):
            return None
        if any(m.rank is None or m.rank < m.exact_rank for m in make_plan(inventory, workers=self._workers).modules):
            return None
        targets = self._evaluator.mixture.targets
        towers = towers_of(inventory.layouts)
        weights = {path: torch.tensor(module_weights(recipe, path, towers), dtype=torch.float64) for path in targets}
        return torch.stack([combine.coefficients(own, path) * recipe.factor for path, own in weights.items()]).float()

    def _respondent(self, setting: Setting, place: int) -> Respondent:
        if place < len(self._respondents):
            return self._respondents[place]
        return Respondent("merge", self._candidate(setting), self.controls.recipe.heads.adapter)

    def _reply(
        self, respondent: Respondent, asked: Asked, stop: Stop, report: Callable[[str], object]
    ) -> tuple[Reply, tuple[int, ...]]:
        """Return what someone answers, and the prompt's tokens."""
        assert respondent.candidate is not None, "only candidates are asked here"
        key = digest(respondent.name, respondent.candidate.key, respondent.heads, repr(asked))
        if (known := self._replies.get(key)) is not None:
            return known
        asking = Asking(
            self._evaluator.session.live,
            [respondent],
            [asked.prompt],
            asked.sampling,
            asked.system or None,
            asked.plain or not self.has_chat,
        )
        with self.turns.turn(stop):
            (answered,) = asking.run(_Followed(self.turns, report))
            tokens = tuple(asking.tokens(self._evaluator.mixture.model, asking.read[0]))
        found = answered.replies[respondent.name], tokens
        self._replies.put(key, found)
        return found

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self._evaluator.session.live.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def _scored(self, candidate: Candidate, entry: TaskExamples, stop: Stop) -> TaskResult:
        alone = self._evaluator.session.on([entry], self._evaluator.spec)
        (result,), _ = self._behind(partial(alone.results, candidate), stop)
        return result

    def _behind(self, work: Callable[[], T], stop: Stop) -> T:
        """Return what work in the background returns; it begins again where an answer was waited for."""
        while True:
            try:
                with self.turns.turn(stop, behind=True):
                    return work()
            except GiveWay:
                continue


class _Recent(Generic[T]):
    """The values that were used last, by key; for several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, Lock()
        self._values: OrderedDict[str, T] = OrderedDict()

    def get(self, key: str) -> T | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: str, value: T) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._limit:
                self._values.popitem(last=False)


class _Followed:
    """Follows one reply, and leaves it where it is not wanted any more."""

    def __init__(self, turns: Turns, report: Callable[[str], object]) -> None:
        self._turns, self._report = turns, report

    def writing(self, name: str, text: str) -> None:
        self._turns.check()
        self._report(text)

    def replied(self, asked: AskedPrompt) -> None:
        """Do nothing: the complete reply is what the call returns."""


def _became_right(entry: TaskExamples, before: Answer, now: Answer) -> bool | None:
    """Return whether an answer became right or wrong; None where it did neither."""
    metric = metric_of(entry.task)
    sums = metric.statistics([before, now])
    if metric.outcomes(sums) is None:
        return None
    first, second = (float(row[0] / row[1]) if row[1] else 0.0 for row in sums)
    return None if first == second else (second > first) == metric.higher_is_better


def _texts(report: Callable[[int, str, Reply | None], object], place: int, text: str) -> None:
    report(place, text, None)


def _fits(method: Method, count: int, *, has_moments: bool) -> bool:
    """Return whether a method takes so many adapters, and needs nothing that is not there."""
    if count < method.min_adapters or (method.max_adapters is not None and count > method.max_adapters):
        return False
    try:
        spec = method.spec.model_validate({"name": method.name})
        method.check(spec, count)
    except ValueError:  # it has parameters without defaults
        return False
    return has_moments or not method.pipeline(spec).needs_moments


def _placed(recipe: Recipe, folder: Path | None, home: Path) -> Recipe:
    """Return a recipe whose local paths start at `home`."""

    def placed(text: str, *, bare: bool = False) -> str:
        try:
            reference = parse_reference(text, allow_bare=bare)
        except PlaitError:
            return text
        return text if reference.path is None else relative_path((folder or Path()) / expanded(reference.path), home)

    entries = tuple(
        entry.model_copy(
            update={
                "path": placed(entry.path),
                "moments": None if entry.moments is None else relative_path((folder or Path()) / expanded(entry.moments), home),
            }
        )
        for entry in recipe.adapters
    )
    base = None if recipe.base_model is None else placed(recipe.base_model, bare=True)
    tasks = tuple(t if ":" in t else relative_path((folder or Path()) / expanded(t), home) for t in recipe.tasks)
    return recipe.model_copy(update={"adapters": entries, "base_model": base, "tasks": tasks})
