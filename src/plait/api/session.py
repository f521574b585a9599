"""Load once, then merge, score, ask and save in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from plait.api.files import optional_path
from plait.api.settings import MergeSettings
from plait.commands.request import RecipeSource, Request, complete_from_texts
from plait.errors import RecipeError
from plait.hub.pretrained import LoadOptions
from plait.merging.pipeline import MergeResult, run_recipe
from plait.recipes.schema import Recipe
from plait.results.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from plait.evaluation.pipeline import EvalSubject, Evaluator
    from plait.evaluation.record import Evaluation
    from plait.evaluation.replies import AskResult
    from plait.mixture import Mixture


@dataclass(frozen=True, eq=False)
class SessionMerge:
    """A merge in a session's memory; see `Session.merge`.

    Attributes:
        name: for people.
        recipe: all of it, values and moments that texts gave included.
        folder: where the recipe's relative paths start; the working directory when None.
        notes: on what was taken from texts.
    """

    name: str
    recipe: Recipe
    folder: Path | None
    notes: tuple[str, ...]
    _subject: EvalSubject

    def __repr__(self) -> str:
        """Return name, method and scale."""
        return f"SessionMerge({self.name!r}, {self.recipe.method_name}, scale={self.recipe.scale})"


class Session:
    """A base model and adapters, loaded once: merge them, score and ask merges, adjust, save the one that is wanted.

    >>> session = plait.Session({"intent": "./intent", "langid": "./langid"}, tasks=["intent.yaml", "langid.yaml"])
    >>> merged = session.merge(method="ties", density=0.3)
    >>> session.score(merged).worst_recovery
    >>> session.ask("Guten Tag", merged).prompts[0].replies["merged"].text
    >>> session.save(merged, "merged")

    Nothing is loaded before it is needed, and nothing is written before `save`, but answers of base and single adapters, which
    the workspace keeps. Merges act on the live base in turn, with the factors that are saved.

    Args:
        source: adapters (references, or name → reference), or the path of a recipe that names them.
        tasks: task files on which merges are scored; the recipe's when empty, and needed for nothing else.
        base: the base model; the recipe's or the adapters' own when None.
        split: as `plait.evaluate` takes it, and so are all others.
        subset: examples per task.
        batch_size: prompts at a time.
        workspace: where answers are kept.
        workers: modules merged at a time; never changes a number.
        load_dtype: of the base model.
        device_map: where it is.
        trust_remote_code: let transformers run code that comes with the weights.
        progress: receives stages and steps.

    Raises:
        PlaitError: anything wrong with what was given.
    """

    def __init__(  # noqa: PLR0913 (what a command line takes)
        self,
        source: RecipeSource,
        *,
        tasks: Sequence[str | Path] = (),
        base: str | Path | None = None,
        split: str | None = None,
        subset: int | Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        workspace: str | Path | None = "artifacts",
        workers: int | None = None,
        load_dtype: str = "auto",
        device_map: str = "auto",
        trust_remote_code: bool = False,
        progress: Progress | None = None,
    ) -> None:
        from plait.evaluation.pipeline import EvaluateOptions, recipe_evaluator
        from plait.evaluation.request import evaluated_recipe

        self._source, self._workers, self._progress = source, workers, progress or SilentProgress()
        self._load = LoadOptions(load_dtype, device_map, trust_remote_code, None if base is None else str(base))
        recipe, folder = Request(source, base=base).resolved
        self._asked = evaluated_recipe(recipe, tasks, {"split": split, "subset": subset, "batch_size": batch_size})
        options = EvaluateOptions(optional_path(workspace), self._load, workers=workers)
        with self._asked.origins.named():
            self._evaluator, _ = recipe_evaluator(self._asked, folder, options, self._progress, without_tasks=True)

    def __repr__(self) -> str:
        """Return base, adapters and tasks."""
        tasks = [entry.task.name for entry in self._evaluator.tasks]
        return f"Session({self._evaluator.base}, adapters={[*self._evaluator.singles]}, tasks={tasks})"

    @property
    def evaluator(self) -> Evaluator:
        """What scores live states of your own; see `plait.evaluator`."""
        return self._evaluator

    @cached_property
    def mixture(self) -> Mixture:
        """The live base with the adapters, whose coefficients are data."""
        return self._evaluator.mixture

    def merge(self, name: str = "merged", **settings: Unpack[MergeSettings]) -> SessionMerge:
        """Return a merge of the session's adapters; nothing is computed before it is scored or asked.

        A method that needs second moments, and `scale="auto"`, read the tasks' texts now, with the base loaded for that.

        Args:
            name: for people; two merges that are asked together need two.
            **settings: as `plait.merge` takes them: `method`, `scale`, `weights`, …

        Returns:
            What `score`, `ask` and `save` take; its `recipe` is complete.

        Raises:
            PlaitError: the recipe is not valid, or the merge cannot be done.
        """
        from plait.merging.inventory import take_inventory

        recipe, folder = Request(self._source, settings, base=self._load.base).resolved
        if self._asked.tasks:
            recipe = recipe.changed(tasks=self._asked.tasks)
        recipe = recipe.changed(eval=self._asked.eval)
        load = self._load if recipe.values_to_find or recipe.lacks_moments else None
        recipe, notes = complete_from_texts(recipe, load, folder=folder, workers=self._workers, progress=self._progress)
        subject = self._evaluator.merge(take_inventory(recipe, folder), name)
        return SessionMerge(name, recipe, folder, notes, subject)

    def score(self, merged: SessionMerge) -> Evaluation:
        """Evaluate a merge next to base and single adapters, whose answers are asked once.

        Args:
            merged: a merge of this session.

        Returns:
            As `plait.evaluate`.

        Raises:
            RecipeError: the session has no tasks.
            PlaitError: anything wrong while the model is asked.
        """
        if not self._evaluator.tasks:
            raise RecipeError("this session has no tasks to score on; give Session(…, tasks=[…]).")
        return self._evaluator.evaluate(merged._subject)

    def ask(
        self,
        prompts: str | Path | Sequence[str | Sequence[Mapping[str, str]]],
        *merges: SessionMerge,
        system: str | None = None,
        plain: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        sampling_seed: int = 0,
    ) -> AskResult:
        """Ask base, single adapters and merges the same prompts; the arguments are those of `plait.ask`.

        Args:
            prompts: text, a file, or a list of texts and chats.
            *merges: of this session, each with a name of its own; none asks base and single adapters alone.
            system: the first message of every chat.
            plain: read prompts as they are.
            max_new_tokens: longest reply.
            temperature: of the draws; 0 takes the likeliest token.
            top_p: of the draws.
            sampling_seed: of the draws.

        Returns:
            As `plait.ask`, every merge under its name.

        Raises:
            RecipeError: two of those asked have one name.
            TaskError: a prompt cannot be read, or the model writes no text.
        """
        from plait.evaluation.generation import Sampling
        from plait.evaluation.replies import Asking, NoListener, Respondent, base_and_singles, heads_apart, read_prompts

        sampling = Sampling(max_new_tokens, temperature, top_p, sampling_seed)
        sampling.check()
        adapters, live = self._evaluator.singles, self._evaluator.session.live
        asked = [Respondent(m.name, m._subject.candidate, m.recipe.heads.adapter) for m in merges]
        everyone = [*base_and_singles(adapters), *asked]
        names = [respondent.name for respondent in everyone]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(f"{', '.join(twice)}: two of those that are asked have this name; give merge(name=…).")
        notes = [note for m in merges for note in (*m.notes, *heads_apart(m.recipe, adapters))]
        asking = Asking(live, everyone, read_prompts(prompts), sampling, system, plain)
        return asking.result(self._evaluator.base, [*dict.fromkeys(notes)], NoListener())

    def save(self, merged: SessionMerge, out: str | Path, *, force: bool = False) -> MergeResult:
        """Write a merge as `plait.merge` does, to the same bytes.

        Args:
            merged: a merge of this session.
            out: where to write.
            force: replace an adapter that is there.

        Returns:
            As `plait.merge`.

        Raises:
            PlaitError: it cannot be written; nothing is left at `out` then.
        """
        return run_recipe(
            merged.recipe,
            folder=merged.folder,
            out=Path(out),
            force=force,
            workers=self._workers,
            progress=self._progress,
        )
