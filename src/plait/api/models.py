"""What runs models: on texts and on tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from plait.api.files import optional_path
from plait.api.settings import CalibrationSettings, MergeSettings
from plait.commands.request import RecipeSource, Request
from plait.hub.pretrained import LoadOptions
from plait.results.progress import Progress

if TYPE_CHECKING:
    from plait.calibration.pipeline import CalibrateResult
    from plait.evaluation.pipeline import Evaluator
    from plait.evaluation.record import Evaluation
    from plait.evaluation.replies import AskResult
    from plait.mixer.server import Server
    from plait.reports.pipeline import ReportResult
    from plait.search.conclusion import SweepResult
    from plait.search.status import StudyStatus
    from plait.tasks.checking import TaskCheck
    from plait.tuning.pipeline import TuneResult


def calibrate(  # noqa: PLR0913 (what a command line takes)
    source: RecipeSource,
    *,
    tasks: Sequence[str | Path] | None = None,
    out: str | Path,
    base_model: str | Path | None = None,
    load_dtype: str = "auto",
    device_map: str = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    sets: Sequence[str] = (),
    **settings: Unpack[CalibrationSettings],
) -> CalibrateResult:
    """Take the second moments of every adapted module's inputs, each adapter on its own tasks' texts; no label is read.

    >>> plait.calibrate({"intent": "./intent", "langid": "./langid"}, tasks=["intent.yaml", "langid.yaml"], out="moments")
    >>> plait.merge({"intent": "./intent", "langid": "./langid"}, method="regmean", moments="moments", out="merged")

    A run that was killed is taken up by the next one with the same output, adapter by adapter.

    Args:
        source: adapters, the path of a recipe, or a `Recipe`, as for `merge`.
        tasks: files of the tasks, every adapter's own among them; the recipe's when None.
        out: where to write `<adapter>.safetensors`, `calibration.json` and the lock.
        base_model: its name or folder; the recipe's, or the adapters', when None.
        load_dtype: of the base in memory, as transformers takes it; `stored` is the checkpoint's; `auto` too, or
            float32 where that is slow here.
        device_map: as transformers takes it; `auto` is the first accelerator, or the processor.
        trust_remote_code: let transformers run code that comes with the weights.
        force: replace a result at `out`.
        progress: receives stages and steps.
        sets: `PATH=VALUE` for keys of the recipe, as on the command line.
        **settings: keys of the recipe's `calibration`: `texts` (`split`, `lines`, `template`), `files` (task → file), `count`
            (texts per task, 32), `split`, `tokens` (inputs kept per module, 2048), `seed`.

    Returns:
        Folder and record: what was seen, and what is stored of every adapter.

    Raises:
        PlaitError: anything wrong with what was given; nothing is left at `out` then.
    """
    from plait.commands.calibrate import CalibrateOrder

    given: dict[str, Any] = {f"calibration.{key}": value for key, value in settings.items()}
    given["base_model"] = None if base_model is None else str(base_model)
    return CalibrateOrder(
        request=Request(source, given, sets, tasks=tasks, mixed=False),
        out=Path(out),
        options=LoadOptions(load_dtype, device_map, trust_remote_code),
        force=force,
    ).run(progress)


def tune(  # noqa: PLR0913 (what a command line takes)
    source: RecipeSource,
    *,
    tasks: Sequence[str | Path] | None = None,
    out: str | Path,
    control: bool = False,
    controls: bool = False,
    load_dtype: str = "auto",
    device_map: str = "auto",
    trust_remote_code: bool = False,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    sets: Sequence[str] = (),
    **settings: Unpack[MergeSettings],
) -> TuneResult:
    """Merge adapters, and let the merge learn from unlabeled texts what it lost; no label is read.

    >>> plait.tune({"intent": "./intent", "langid": "./langid"}, tasks=["intent.yaml", "langid.yaml"], out="tuned")

    The merge starts at `regmean`, its second moments taken on the texts, at the scale that brings it nearest to the adapters;
    then its factors learn to answer as each task's own adapter does.

    Args:
        source: adapters, the path of a recipe, or a `Recipe`, as for `merge`.
        tasks: files of the tasks, every adapter's own among them; the recipe's when None.
        out: where to write the adapter.
        control: also let a fresh LoRA of the same rank learn the same, and record how far it comes.
        controls: the same, and random adapters of equal norms.
        load_dtype: of the base in memory, as transformers takes it; `stored` is the checkpoint's; `auto` too, or
            float32 where that is slow here.
        device_map: as transformers takes it; `auto` is the first accelerator, or the processor.
        trust_remote_code: let transformers run code that comes with the weights.
        workers: modules merged at a time; never changes a bit.
        force: replace a result at `out`.
        progress: receives stages and steps.
        sets: `PATH=VALUE` for keys of the recipe, as on the command line.
        **settings: as `merge` (`method` of the start, `scale`, `rank`, `base_model`, …), and `tune`: a mapping as in a recipe
            (`texts`, `files`, `count`, `split`, `steps`, `prompts`, `learning_rate`, `seed`, …).

    Returns:
        Folder and record: what was seen, the divergences from the adapters before and after, and how far the result has moved.

    Raises:
        PlaitError: anything wrong with what was given; nothing is left at `out` then.
    """
    from plait.commands.tune import START, TuneOrder
    from plait.tuning.pipeline import TuneOptions

    return TuneOrder(
        request=Request(source, settings, sets, tasks=tasks, method=START, mixed=False),
        out=Path(out),
        options=TuneOptions(LoadOptions(load_dtype, device_map, trust_remote_code), control, controls, workers),
        force=force,
    ).run(progress)


def sweep(  # noqa: PLR0913 (what a command line takes)
    source: RecipeSource,
    *,
    tasks: Sequence[str | Path] | None = None,
    out: str | Path,
    storage: str | None = None,
    warm_start: Sequence[str | Path] = (),
    cluster: str | None = None,
    moments: str | Path | Mapping[str, str | Path] | None = None,
    load_dtype: str = "auto",
    device_map: str = "auto",
    trust_remote_code: bool = False,
    workspace: str | Path = "artifacts",
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    sets: Sequence[str] = (),
    **settings: Unpack[MergeSettings],
) -> SweepResult:
    """Search for the merge that loses least: candidates are compared on one split, the best is asked once on another.

    >>> found = plait.sweep({"intent": "./intent", "langid": "./langid"}, tasks=["intent.yaml", "langid.yaml"], out="study",
    ...                     method="ties", search={"space": {"scale": "0.2..2", "density": "0.05..1"}, "budget": 20})
    >>> plait.merge(found.recipe, out="merged")

    Candidates act on the live base, which is loaded once; nothing of an adapter is written. Killed, the same call continues.

    Args:
        source: adapters, the path of a recipe, or a `Recipe`, as for `merge`.
        tasks: files of the tasks, every adapter's own among them; the recipe's when None.
        out: folder of the study: `study.json`, `recipe.yaml` (the best) and, without `storage`, `study.db`.
        storage: Optuna's address of a storage that several machines share.
        warm_start: folders of earlier studies; their candidates that are merged alike and were asked the same count here.
        cluster: `ray` or `ray://HOST:PORT`: ask candidates on an existing Ray cluster, `search["parallel"]` at a time.
        moments: second moments of inputs, as `merge` takes them from files.
        load_dtype: of the base in memory, as transformers takes it; `stored` is the checkpoint's; `auto` too, or
            float32 where that is slow here.
        device_map: as transformers takes it; `auto` is the first accelerator, or the processor.
        trust_remote_code: let transformers run code that comes with the weights.
        workspace: where results and finished answers are kept; answers of base and single adapters are asked once for all.
        workers: modules merged at a time; never changes a number.
        force: begin anew where another study is at `out`.
        progress: receives stages and steps.
        sets: `PATH=VALUE` for keys of the recipe, as on the command line.
        **settings: as `merge` (`method`, `scale`, …: where the search starts), `search`: a mapping as in a recipe (`space`,
            `grid`, `type`, `budget`, `split`, `subset`, `maximize`, …), and `eval`: how the best is judged in the end.

    Returns:
        Folder, the best recipe, the record of all candidates, and the best's evaluation on the split of `eval`.

    Raises:
        PlaitError: anything wrong with what was given. Candidates that were evaluated are kept, and not evaluated again.
    """
    from plait.commands.sweep import SweepOrder

    judged = settings.pop("eval", {})
    return SweepOrder(
        request=Request(source, settings, sets, moments, tasks=tasks, mixed=False),
        out=Path(out),
        eval=judged,
        storage=storage,
        warm_start=warm_start,
        cluster=cluster,
        workspace=Path(workspace),
        load=LoadOptions(load_dtype, device_map, trust_remote_code),
        workers=workers,
        force=force,
    ).run(progress)


def sweep_status(folder: str | Path, *, storage: str | None = None) -> StudyStatus:
    """Return how far a search is, while it runs or after it.

    >>> plait.sweep_status("study").best_score

    Args:
        folder: of the study.
        storage: Optuna's address of a shared storage, as the search had it.

    Returns:
        Counts of candidates by state, and the best so far.

    Raises:
        PlaitError: there is no study.
    """
    from plait.commands.sweep import SweepStatusOrder

    return SweepStatusOrder(Path(folder), storage).run()


def evaluate(  # noqa: PLR0913 (what a command line takes)
    source: RecipeSource,
    *,
    tasks: Sequence[str | Path] = (),
    split: str | None = None,
    subset: int | Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    matrix: bool = False,
    sources: Mapping[str, str | Path] | None = None,
    base: str | Path | None = None,
    load_dtype: str = "auto",
    device_map: str = "auto",
    trust_remote_code: bool = False,
    workspace: str | Path | None = "artifacts",
    workers: int | None = None,
    progress: Progress | None = None,
    **settings: Unpack[MergeSettings],
) -> Evaluation:
    """Evaluate what a merge kept of every adapter: base, each task's own adapter and the merge on the same examples.

    >>> found = plait.evaluate({"intent": "./intent", "langid": "./langid"}, method="ties",
    ...                        tasks=["tasks/intent.yaml", "tasks/langid.yaml"])
    >>> found.worst_recovery, found.worst_task

    Args:
        source: adapters (references, or name → reference), the path of a recipe, or a `Recipe`: merged in memory, nothing of
            it is written. Or one reference as text, of an adapter or a full model: read from its files.
        tasks: task files; the recipe's when empty.
        split: `test`, `validation`, `calibration` or `train`; the recipe's, else `test`, when None.
        subset: examples per task, or a mapping as a recipe's `eval.subset`; the recipe's, else all, when None.
        batch_size: prompts at a time; the recipe's, else 16, when None.
        matrix: also every single adapter on every task.
        sources: for an adapter or model: the tasks' own adapters, name → reference; those of its `plait.lock` when None.
        base: the base model; the recipe's or the adapters' own when None.
        load_dtype: of the base model, as transformers takes it; `stored` is the checkpoint's; `auto` too, or
            float32 where that is slow here.
        device_map: as transformers takes it; `auto` is the first accelerator, or the processor where there is none.
        trust_remote_code: let transformers run code that comes with the weights.
        workspace: where results and finished answers are kept; None keeps nothing.
        workers: modules merged at a time; never changes a number.
        progress: receives stages and steps.
        **settings: as `merge`.

    Returns:
        Per task the metric of base, own adapter and merge, and recovery = (merged − base) / (own − base), oriented; the
        mean and the worst recovery; 95 % intervals of all (paired, Bayesian bootstrap over examples).

    Raises:
        PlaitError: anything wrong with what was given. Answers that were finished are kept, and not asked for again.
    """
    from plait.commands.evaluate import EvaluateOrder
    from plait.evaluation.pipeline import EvaluateOptions

    load = LoadOptions(load_dtype, device_map, trust_remote_code, None if base is None else str(base))
    own = settings.pop("eval", {})
    return (
        EvaluateOrder(
            Request(source, settings),
            tasks=tasks,
            eval={**own, "split": split, "subset": subset, "batch_size": batch_size},
            sources=sources or {},
            options=EvaluateOptions(optional_path(workspace), load, matrix, workers),
        )
        .run(progress)
        .best
    )


def evaluator(  # noqa: PLR0913 (what a command line takes)
    source: RecipeSource,
    *,
    tasks: Sequence[str | Path] = (),
    split: str | None = None,
    subset: int | Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    base: str | Path | None = None,
    load_dtype: str = "auto",
    device_map: str = "auto",
    trust_remote_code: bool = False,
    workspace: str | Path | None = "artifacts",
    progress: Progress | None = None,
) -> Evaluator:
    """Return what scores live states on tasks: the base with the adapters once in memory, and their own answers kept.

    >>> live = plait.evaluator({"intent": "./intent", "langid": "./langid"}, tasks=["tasks/intent.yaml", "tasks/langid.yaml"])
    >>> weights = torch.tensor([0.7, 0.5])
    >>> live.score(lambda heads: live.mixture.mixed(weights, heads=heads)).worst_recovery

    Args:
        source: the single adapters: references, name → reference, or a recipe that names them.
        tasks: task files; the recipe's when empty.
        split: as `evaluate` takes it, and so are all others.
        subset: examples per task.
        batch_size: prompts at a time.
        base: the base model.
        load_dtype: of the base model.
        device_map: where it is.
        trust_remote_code: let transformers run code that comes with the weights.
        workspace: where answers of base and single adapters are kept; those of a live state never are.
        progress: receives stages and steps.

    Returns:
        The live mixture, and `score`, which takes a context in which a state is active.

    Raises:
        PlaitError: anything wrong with what was given.
    """
    from plait.evaluation.pipeline import EvaluateOptions, recipe_evaluator
    from plait.evaluation.request import evaluated_recipe

    load = LoadOptions(load_dtype, device_map, trust_remote_code, None if base is None else str(base))
    recipe, folder = Request(source, base=base).resolved
    asked = evaluated_recipe(recipe, tasks, {"split": split, "subset": subset, "batch_size": batch_size})
    with asked.origins.named():
        return recipe_evaluator(asked, folder, EvaluateOptions(optional_path(workspace), load), progress)[0]


def ask(  # noqa: PLR0913 (what a command line takes)
    prompts: str | Path | Sequence[str | Sequence[Mapping[str, str]]],
    source: RecipeSource,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    sampling_seed: int = 0,
    system: str | None = None,
    plain: bool = False,
    sources: Mapping[str, str | Path] | None = None,
    base: str | Path | None = None,
    load_dtype: str = "auto",
    device_map: str = "auto",
    trust_remote_code: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    **settings: Unpack[MergeSettings],
) -> AskResult:
    """Ask base, single adapters and a merge the same prompts; nothing is written.

    >>> asked = plait.ask("Which language is this? Guten Tag", {"intent": "./intent", "langid": "./langid"}, method="ties")
    >>> asked.prompts[0].replies["merged"].text

    Args:
        prompts: text; a file, with one prompt per line (`.txt`) or rows with `prompt` or `messages` (`.jsonl`, `.json`, `.csv`,
            `.parquet`); or a list of texts and chats (lists of `{"role": …, "content": …}`).
        source: as `evaluate` takes it: adapters, a recipe (merged in memory), or one adapter or full model as text.
        max_new_tokens: longest reply.
        temperature: of the draws; 0 takes the likeliest token.
        top_p: tokens are drawn among the likeliest that have this probability together.
        sampling_seed: of the draws.
        system: the first message of every chat.
        plain: read prompts as they are, also where the tokenizer has a chat template.
        sources: for an adapter or model: the single adapters, name → reference; those of its `plait.lock` when None.
        base: the base model; the recipe's or the adapters' own when None.
        load_dtype: of the base model, as transformers takes it; `stored` is the checkpoint's; `auto` too, or
            float32 where that is slow here.
        device_map: as transformers takes it; `auto` is the first accelerator, or the processor where there is none.
        trust_remote_code: let transformers run code that comes with the weights.
        workers: modules merged at a time; never changes a number.
        progress: receives stages and steps.
        **settings: as `merge`.

    Returns:
        Per prompt the text that models read, and who wrote what: `base`, each adapter, `merged`.

    Raises:
        PlaitError: anything wrong with what was given.
    """
    from plait.commands.ask import AskOrder
    from plait.evaluation.generation import Sampling

    return AskOrder(
        prompts,
        Request(source, settings),
        Sampling(max_new_tokens, temperature, top_p, sampling_seed),
        system=system,
        plain=plain,
        sources=sources or {},
        load=LoadOptions(load_dtype, device_map, trust_remote_code, None if base is None else str(base)),
        workers=workers,
    ).run(progress)


def mix(  # noqa: PLR0913 (what a command line takes)
    source: RecipeSource,
    *,
    tasks: Sequence[str | Path] | None = None,
    out: str | Path = "mixes",
    split: str | None = None,
    subset: int | Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    port: int | None = None,
    share: bool = False,
    base: str | Path | None = None,
    load_dtype: str = "auto",
    device_map: str = "auto",
    trust_remote_code: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Server:
    """Serve the live mixer: a page on which weights, method and scale are moved, and everyone answers; nothing is written.

    >>> with plait.mix({"intent": "./intent", "langid": "./langid"}, tasks=["intent.yaml", "langid.yaml"]) as server:
    ...     print(server.url)
    ...     server.wait()

    Args:
        source: adapters, a recipe, or the folder of a merge, a search or an evaluation.
        tasks: files of the tasks that are scored in the background; the recipe's when None.
        out: folder that the page's Keep writes into; nothing else writes.
        split: whose examples are scored; the recipe's (`test`) when None.
        subset: examples per task, or keys of a recipe's `eval.subset`; the recipe's, or 24, when None.
        batch_size: prompts at a time.
        port: where the page is served, on this machine alone; the first free one from 7860 when None.
        share: serve it at a public address of gradio's too.
        base: the base model; the recipe's or the adapters' own when None.
        load_dtype: of the base model, as transformers takes it; `stored` is the checkpoint's; `auto` too, or
            float32 where that is slow here.
        device_map: as transformers takes it; `auto` is the first accelerator, or the processor where there is none.
        trust_remote_code: let transformers run code that comes with the weights.
        workers: modules merged at a time; never changes a number.
        progress: receives the stages of loading.
        **settings: as `merge`: where the controls begin.

    Returns:
        The server: its `url` opens the page; `wait` serves on, `close` ends it.

    Raises:
        PlaitError: anything wrong with what was given, a missing package, or a port that is taken.
    """
    from plait.commands.mix import MixOrder

    return MixOrder(
        request=Request(source, settings, base=base, tasks=tasks),
        eval={"split": split, "subset": subset, "batch_size": batch_size},
        out=Path(out),
        port=port,
        share=share,
        load=LoadOptions(load_dtype, device_map, trust_remote_code),
        workers=workers,
    ).run(progress)


def check_tasks(
    tasks: Sequence[str | Path], *, model: str | Path | None = None, trust_remote_code: bool = False
) -> list[TaskCheck]:
    """Describe tasks: rendered examples, token counts, label balance, overlap between splits.

    >>> plait.check_tasks(["tasks/intent.yaml"], model="./base")[0].splits

    Args:
        tasks: their files.
        model: reference of the model whose tokenizer and chat template are used; tokens are not counted without one.
        trust_remote_code: run code that comes with that tokenizer.

    Returns:
        One description per task, in order.

    Raises:
        PlaitError: files or data that cannot be read, rows that do not fit.
    """
    from plait.commands.tasks import CheckTasksOrder

    return CheckTasksOrder(tasks, None if model is None else str(model), trust_remote_code).run()


def report(
    runs: str | Path | Sequence[str | Path],
    *,
    out: str | Path = "report.html",
    title: str | None = None,
    figures: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ReportResult:
    """Write one page that shows what a merge kept: readable offline, in one file.

    >>> plait.report("merged", out="report.html").page

    Args:
        runs: run folders or result files of evaluations and leaderboards, and folders of written merges, for the energy they
            kept. The page is about the first.
        out: the page.
        title: of the page; the first evaluation's name when None.
        figures: folder for the same figures as SVG and PNG; none are drawn when None.
        force: replace a file at `out`.
        progress: receives stages and steps.

    Returns:
        The page, the figures, and what is in them.

    Raises:
        ReportError: a path holds no run, or a library is missing; all paths at once.
        OutputError: the page cannot be written, or exists already.
    """
    from plait.commands.report import ReportOrder

    paths = [runs] if isinstance(runs, (str, Path)) else runs
    return ReportOrder([Path(p) for p in paths], Path(out), title, optional_path(figures), force).run(progress)
