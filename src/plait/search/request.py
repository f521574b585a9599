"""A search that is asked for: everything that it needs, found and checked before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from plait.cluster.connection import Cluster
from plait.errors import OutputError, PlaitError, PlanError, RecipeError
from plait.evaluation.candidates import base_candidate, merge_key
from plait.evaluation.pipeline import EvalSubject, EvaluateOptions, Evaluator, recipe_evaluator
from plait.evaluation.scores import digest
from plait.evaluation.workspace import check_index
from plait.folders import absolute, expanded
from plait.hub.pretrained import LoadOptions
from plait.hub.references import parse_reference
from plait.merging.inventory import Inventory
from plait.merging.kept import KeptResults
from plait.merging.pipeline import input_folders
from plait.notices import announce
from plait.recipes.candidates import Point
from plait.recipes.evaluation import EvalSpec
from plait.recipes.loading import build_recipe
from plait.recipes.schema import Recipe
from plait.recipes.search import SearchSpec
from plait.results.disk import check_not_an_input
from plait.results.lock import LOCK
from plait.results.progress import Progress
from plait.results.staging import output_problem, place_problem
from plait.search.judging import Judge, check_owners
from plait.search.progress import TrialProgress
from plait.search.record import STUDY, Run, StudyRecord, read_study
from plait.search.space import SearchSpace
from plait.search.study import STORAGE
from plait.tasks.loading import absolute_reference, recipe_tasks

RECIPE, MERGED = "recipe.yaml", "merged"
OWN_FILES = (STUDY, RECIPE, STORAGE, f"{STORAGE}-journal", f"{STORAGE}-wal", f"{STORAGE}-shm")
#: Keys of `search` that change no trial, and the one that a study keeps by itself.
_NOT_OF_TRIALS = ("budget", "early_stop", "points", "allow_test", "parallel", "save_merged")


@dataclass(frozen=True)
class SweepOptions:
    """How to search, besides what a recipe says.

    Attributes:
        workspace: where results and finished answers are kept.
        load: how the base is loaded.
        workers: modules merged at a time.
        storage: Optuna's address of a storage that several machines share; None for a file in the study's folder.
        warm_start: folders of earlier studies, whose candidates are not evaluated again.
        cluster: address of the cluster on which candidates are asked; None is this process.
    """

    workspace: Path = Path("artifacts")
    load: LoadOptions = field(default_factory=LoadOptions)
    workers: int | None = None
    storage: str | None = None
    warm_start: Sequence[Path] = ()
    cluster: str | None = None


class Sweep:
    """A search that is asked for.

    Args:
        recipe: to start from; its `search` says what changes.
        folder: where its relative paths start; the working directory when None.
        out: folder of the study.
        options: of this machine.
        progress: receives stages and steps.
        cluster: that of the options, connected; None is this process.

    Attributes:
        space: the candidates.
        evaluator: of the split on which they are compared.
        final: of the split on which the best is judged; None where candidates are compared on `test`.
        judge: asks candidates.
        start: the recipe itself.
        setting: hash of what scores depend on besides the merge: base, examples, and how they are asked.
        earlier: candidates of earlier studies that are candidates of this one, merged alike and asked the same; each with its
            point here.

    Raises:
        PlaitError: anything wrong with what was given.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path | None,
        out: Path,
        options: SweepOptions,
        progress: Progress,
        cluster: Cluster | None = None,
    ) -> None:
        self.recipe, self.spec, self.out, self.options = recipe, recipe.search, out, options
        self.progress, self._folder = TrialProgress(progress), folder
        self.space = SearchSpace(recipe)
        check_place(out)
        for candidate in (recipe, *self.space.of_every_method()):
            check_complete(candidate)
        check_owners(recipe_tasks(recipe, folder), [entry.name for entry in recipe.adapters])
        check_index(options.workspace, recipe.method_name, [entry.name for entry in recipe.adapters])
        asked = EvalSpec(
            split=self.spec.split,
            subset=self.spec.subset,
            batch_size=recipe.eval.batch_size,
            draws=recipe.eval.draws,
            seed=recipe.eval.seed,
        )
        evaluating = EvaluateOptions(options.workspace, options.load, workers=options.workers, cluster=cluster)
        with recipe.origins.named():
            self.evaluator, inventory = recipe_evaluator(recipe.changed(eval=asked), folder, evaluating, self.progress)
        self._inventory = replace(inventory, kept=KeptResults())  # a candidate repeats most of what others have computed
        if self.saves:
            self._check_merged()
        self.final = None if self.spec.split == "test" else self._other_split()
        self.judge = Judge(self.evaluator, self.spec)
        self.start = self.evaluator.merge(self._inventory, "start")
        self.setting = self.evaluator.session.digest(base_candidate(self.evaluator.singles))
        self.earlier = [known for place in options.warm_start for known in self._known_of(place, read_study(place))]

    @property
    def merged(self) -> Path:
        """Where the merge of the best is written."""
        return self.out / MERGED

    @property
    def saves(self) -> bool:
        """Whether it is written: where that is asked for, and anew where an earlier run has written that of its best."""
        return self.spec.save_merged or os.path.lexists(self.merged / LOCK)

    def _check_merged(self) -> None:
        """Refuse to write the merge of the best where that cannot be, before the first candidate.

        Raises:
            OutputError: something else is there, or an adapter that is merged.
        """
        if problem := output_problem(self.merged, force=True):
            raise OutputError(f"search.save_merged: {problem}")
        check_not_an_input(self.merged, input_folders(self._inventory), command="search")

    @property
    def name(self) -> str:
        """Name of the search in the storage: a hash of what its scores and suggestions depend on."""
        spec = {key: value for key, value in self.spec.model_dump(mode="json").items() if key not in _NOT_OF_TRIALS}
        return f"plait-{digest(self.setting, self.start.candidate.key, spec)[:16]}"

    def subject(self, point: Point, name: str) -> EvalSubject:
        """Return the merge of a point.

        Raises:
            RecipeError: its values do not go together.
            PlanError: it cannot be done.
        """
        return self.evaluator.merge(self._inventory_of(self.space.recipe(point)), name)

    def final_subject(self, evaluator: Evaluator, run: Run, name: str) -> EvalSubject:
        """Return the merge of a candidate, for another evaluator."""
        return evaluator.merge(self._inventory_of(self.recipe_of(run)), name)

    def recipe_of(self, run: Run) -> Recipe:
        """Return a candidate's recipe; the start is the recipe as it was given."""
        return self.recipe.changed(search=SearchSpec()) if run.phase == "start" else self.space.recipe(run.params)

    def _known_of(self, place: Path, record: StudyRecord) -> Iterator[tuple[Run, Point]]:
        """Yield the candidates of an earlier study that are candidates of this one."""
        if record.setting != self.setting:
            announce(
                f"--warm-start {place}: its candidates answered other examples, or were asked in another way (base model, "
                "tasks, split, subset, dtype, batch size, versions); none of them counts here."
            )
            return
        space = SearchSpace(build_recipe({**record.recipe, "search": record.search}, source=str(place / STUDY)))
        for i, run in ((i, run) for i, run in enumerate(record.runs) if run.complete and run.phase != "zero"):
            try:
                point = self.space.start if run.phase == "start" else self.space.of_recipe(space.recipe(run.params))
            except RecipeError as error:
                raise RecipeError(f"{place / STUDY}: runs.{i}.params: {error}") from error
            if point is not None and self.key_of(point) == run.key:
                yield run, point

    def key_of(self, point: Point) -> str | None:
        """Return the hash of a point's merge; None where it is none."""
        try:
            return merge_key(self._inventory_of(self.space.recipe(point)))
        except PlaitError:
            return None

    def placed(self, recipe: Recipe) -> Recipe:
        """Return a recipe that means the same in any folder."""
        start = self._folder or Path()
        entries = tuple(
            entry.model_copy(
                update={
                    "path": entry.path
                    if parse_reference(entry.path, base=start).path is None
                    else str(absolute(expanded(entry.path), start)),
                    "moments": None if entry.moments is None else str(absolute(expanded(entry.moments), start)),
                }
            )
            for entry in recipe.adapters
        )
        base = recipe.base_model
        if base is not None and (start / expanded(base)).is_dir():
            base = str(absolute(expanded(base), start))
        tasks = tuple(absolute_reference(task, start) for task in recipe.tasks)
        return recipe.model_copy(update={"adapters": entries, "base_model": base, "tasks": tasks, "search": SearchSpec()})

    def _inventory_of(self, recipe: Recipe) -> Inventory:
        """Return what there is to merge for a candidate: adapters, base and moments of the start, which were opened once."""
        return replace(self._inventory, recipe=recipe)

    def _other_split(self) -> Evaluator:
        """Return the evaluator of the split that nothing is chosen on.

        Raises:
            RecipeError: candidates are compared on it.
        """
        spec = self.recipe.eval
        if spec.split == self.spec.split:
            raise RecipeError(
                f"search.split and eval.split are both {spec.split!r}: the best of many is not judged on the examples that "
                "it was chosen on. Give another --split (search.split), such as validation, or another eval.split."
            )
        other = self.evaluator.on(spec)
        if self.spec.subset is not None and spec.subset is None:
            count = sum(len(entry.examples.items) for entry in other.tasks)
            announce(
                "the subset is of the examples on which candidates are compared. In the end the best, the start and the second "
                f"best are asked all {count} examples of {spec.split}; --eval-subset-max-samples (eval.subset) takes fewer."
            )
        return other


def check_complete(recipe: Recipe, *, moments: bool = False) -> None:
    """Refuse what would read texts for every candidate.

    Args:
        recipe: of a candidate.
        moments: whether those that it lacks will be taken, once for all candidates.

    Raises:
        PlanError: moments or values are still to be found.
    """
    if found := [*recipe.values_to_find]:
        raise PlanError(f"{', '.join(found)}: 'auto' is found on texts, once per merge; a search tries numbers of it instead.")
    if recipe.lacks_moments and recipe.is_sequential:
        raise PlanError(
            f"method {recipe.method_name!r} takes second moments with the layers below already merged, which are others for "
            "every candidate; search another method, such as 'regmean'."
        )
    if recipe.lacks_moments and not moments:
        raise PlanError(
            f"method {recipe.method_name!r} needs second moments, which a sweep takes once for all candidates when it runs; or "
            "plait calibrate … -o moments, then --moments moments."
        )


def check_place(out: Path) -> None:
    """Refuse an output that is neither a study nor empty, or cannot be written.

    Raises:
        OutputError: something else is there, or it is not a place for a study.
    """
    if problem := place_problem(out):
        raise OutputError(problem)
    is_study = any(os.path.lexists(out / name) for name in (STORAGE, STUDY))
    if out.exists() and not is_study and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir())):
        raise OutputError(f"{out} holds something that is not a study of plait sweep; give another -o.")
