"""`plait eval`, `plait.evaluate`: one adapter or model as its files are, a merge in memory, or a leaderboard of merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.commands.request import Request, complete_from_texts
from plait.errors import RecipeError
from plait.evaluation.card import put_results
from plait.evaluation.comparison import Leaderboard, compare_merges
from plait.evaluation.pipeline import EvaluateOptions, evaluate_saved
from plait.evaluation.record import Evaluation
from plait.evaluation.request import eval_spec, evaluated_recipe, recipe_name, variants
from plait.evaluation.requirement import Requirement
from plait.evaluation.workspace import write_comparison, write_evaluation
from plait.folders import expanded
from plait.merging.inventory import open_entries
from plait.merging.pipeline import run_recipe
from plait.mixture.loading import check_loading
from plait.notices import announce
from plait.recipes.evaluation import EvalSpec
from plait.recipes.request import check_one_base
from plait.recipes.schema import Recipe
from plait.results.disk import check_not_an_input
from plait.results.progress import Progress
from plait.results.staging import checking_output
from plait.results.threads import worker_count


@dataclass(frozen=True)
class Evaluated:
    """What was evaluated.

    Attributes:
        best: the evaluation; of a leaderboard, the best merge's.
        board: the leaderboard; None where one thing was evaluated.
        run: where the results are; None without a workspace.
        required: every requirement, whether it is met or not.
        saved: where the best merge was written; None where it was not.
    """

    best: Evaluation
    board: Leaderboard | None
    run: Path | None
    required: tuple[Requirement, ...]
    saved: Path | None

    @property
    def ok(self) -> bool:
        """Whether every requirement is met."""
        return all(bound.met(self.best) for bound in self.required)


@dataclass(frozen=True)
class EvaluateOrder:
    """An evaluation that is asked for; see `plait.evaluate`.

    Attributes:
        request: its source is one adapter or model when it is one reference that is not a recipe's file.
        tasks: task files; the recipe's when empty.
        eval: keys of the recipe's `eval`, in their place; `subset` may be a number of examples per task.
        methods: several: one leaderboard.
        spaces: several: one leaderboard.
        require: bounds such as `worst_recovery>=0.8`.
        out: where to write the (best) merge, if it meets what is required.
        force: replace an adapter at `out`.
        sources: the tasks' own adapters, for one adapter or model.
        card: put the results into the card of one adapter or model.
        options: of this machine.
    """

    request: Request
    tasks: Sequence[str | Path] = ()
    eval: Mapping[str, Any] = field(default_factory=dict)
    methods: Sequence[str] = ()
    spaces: Sequence[str] = ()
    require: Sequence[str] = ()
    out: Path | None = None
    force: bool = False
    sources: Mapping[str, str | Path] = field(default_factory=dict)
    card: bool = False
    options: EvaluateOptions = field(default_factory=EvaluateOptions)

    @property
    def saved(self) -> str | None:
        """The reference of the one adapter or model that is evaluated as it is; None for a merge."""
        return self.request.saved

    @cached_property
    def merge_request(self) -> Request:
        """The request of a merge in memory."""
        return self.request.on(self.options.load.base)

    @cached_property
    def bounds(self) -> tuple[Requirement, ...]:
        """The requirements, read.

        Raises:
            RecipeError: one is not of that form.
        """
        return tuple(Requirement.read(text) for text in self.require)

    def check(self) -> None:
        """Refuse what does not go together, and recipes that are not valid.

        Raises:
            PlaitError: with what is wrong.
        """
        with checking_output(self.out, force=self.force):
            self._check_options()

    def _check_options(self) -> None:
        _ = self.bounds, worker_count(self.options.workers)
        check_loading(self.options.load.dtype, self.options.load.device_map)
        check_one_base(self.options.load.base, self.request.settings)
        if self.saved is None:
            own = ["--source (sources=)"] * bool(self.sources) + ["--card (card=)"] * (self.card and self.out is None)
            if own:
                raise RecipeError(
                    f"{', '.join(own)}: belongs to one adapter or model, as its files are; these are merged in memory."
                )
            _ = self._merges
            return
        keys = [*self.request.given, *(text.partition("=")[0] for text in self.request.sets)]
        if given := ", ".join([*keys, *(name for name in ("methods", "spaces", "out") if getattr(self, name))]):
            advice = "Give a recipe or several adapters." + (
                "" if self.out is None else " --workspace (workspace=) has the results."
            )
            raise RecipeError(f"{self.saved} is evaluated as it is; these belong to a merge: {given}. {advice}")

    @cached_property
    def _merges(self) -> tuple[dict[str, Recipe], Path | None, dict[str, str]]:
        """Name → recipe, with tasks and `eval` as asked for; the folder that their paths start from; name → why left out."""
        if isinstance(self.request.source, Recipe):
            recipe, folder = self.merge_request.resolved
            recipes, skipped = {recipe_name(recipe): recipe}, dict[str, str]()
            if self.methods or self.spaces:
                raise RecipeError("a Recipe has one method and space; give adapters or a recipe file for a leaderboard.")
        else:
            file, adapters = self.request.parts
            given = self.merge_request.given
            recipes, folder, skipped = variants(file, adapters, given, self.request.sets, self.methods, self.spaces)
        asked = {name: evaluated_recipe(recipe, self.tasks, self.eval) for name, recipe in recipes.items()}
        return asked, folder, skipped

    def run(self, progress: Progress | None = None) -> Evaluated:
        """Evaluate; write results, card and merge.

        Raises:
            PlaitError: as `plait.evaluate`.
        """
        self.check()
        compared = None
        if self.saved is None:
            recipes, folder, skipped = self._merges
            first = next(iter(recipes.values()))
            with first.origins.named():
                if self.out is not None:  # what the merge refuses in the end
                    read = {f"adapter {a.name!r}": a.folder for a in open_entries(first, folder)[1]}
                    check_not_an_input(self.out, read, command="merge")
                compared = compare_merges(
                    recipes,
                    folder,
                    self.options,
                    progress,
                    skipped=skipped,
                    check=self._check_tasks,
                    complete=lambda recipe: self._completed(recipe, folder, progress),
                )
            evaluations = compared.evaluations
        else:
            evaluations = (self._as_saved(self.saved, progress),)
            if self.card:
                put_results(expanded(self.saved), evaluations[0])
        board = compared.board if compared is not None and (self.methods or self.spaces) else None
        run, workspace = None, self.options.workspace
        if workspace is not None:
            run, *_ = [write_evaluation(workspace, found) for found in evaluations]
            if board is not None:
                run = write_comparison(workspace, board.adapters, board.model_dump(mode="json"))
        evaluated = Evaluated(evaluations[0], board, run, self.bounds, None)
        if compared is None or self.out is None or not evaluated.ok:
            return evaluated
        saved = run_recipe(
            compared.recipes[0],
            folder=compared.folder,
            out=self.out,
            force=self.force,
            workers=self.options.workers,
            progress=progress,
        ).folder
        put_results(saved, evaluated.best)
        return replace(evaluated, saved=saved)

    def _completed(self, recipe: Recipe, folder: Path | None, progress: Progress | None) -> Recipe:
        """Take what a recipe leaves to its tasks' texts, which must not be those that are evaluated on."""
        load = self.options.load if recipe.values_to_find or recipe.lacks_moments else None
        completed, notes = complete_from_texts(recipe, load, folder=folder, workers=self.options.workers, progress=progress)
        if notes:
            announce(f"{recipe_name(recipe)}: {' '.join(notes)}")
        return completed

    def _check_tasks(self, tasks: list[str]) -> None:
        for bound in self.bounds:
            bound.check_tasks(tasks)

    def _as_saved(self, reference: str, progress: Progress | None) -> Evaluation:
        return evaluate_saved(
            reference,
            [Path(t) for t in self.tasks],
            eval_spec(EvalSpec(), self.eval),
            self.options,
            sources={name: str(path) for name, path in self.sources.items()},
            progress=progress,
            check=self._check_tasks,
        )
