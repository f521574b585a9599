"""What is made from files of weights alone: merges, bakes, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from plait.api.settings import BakeSettings, CompressSettings, MergeSettings
from plait.commands.compress import CompressOrder
from plait.commands.convert import ConvertOrder
from plait.commands.merge import Merged, MergeOrder
from plait.commands.request import RecipeSource, Request
from plait.hub.pretrained import LoadOptions
from plait.merging.conversion import ConvertResult
from plait.merging.moments import MomentsOf
from plait.merging.pipeline import MergeResult
from plait.merging.plan import MergePlan
from plait.notices import announce
from plait.recipes.request import Adapters
from plait.results.progress import Progress

if TYPE_CHECKING:
    from plait.baking.plan import BakePlan
    from plait.baking.unbake import UnbakeResult
    from plait.commands.bake import Baked
    from plait.extraction.pipeline import ExtractResult
    from plait.inspection.report import Inspection
    from plait.verification.publish import PushResult
    from plait.verification.verify import Verification


class ExtractSettings(TypedDict, total=False):
    """Keywords of `plait.extract` that few calls need."""

    targets: Sequence[str] | None
    """Names of layers or shell patterns; all Linear layers, convolutions and fused experts when None."""
    embeddings: bool
    """Take embeddings too."""
    modules_to_save: bool
    """Keep norms and biases as full tensors."""
    dtype: str
    """Of the written tensors: float32, bfloat16 or float16."""
    layout: str
    """One rank for all modules (`uniform`), or each its own (`pattern`)."""
    base_id: str
    """The base model's name to write."""


def merge(  # noqa: PLR0913 (what a command line takes)
    source: RecipeSource,
    *,
    out: str | Path | None = None,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    push_to: str | None = None,
    private: bool = False,
    moments: str | Path | Mapping[str, str | Path] | MomentsOf | None = None,
    tasks: Sequence[str | Path] | None = None,
    add: Adapters | None = None,
    inputs: Mapping[str, str | Path] | None = None,
    from_merged: bool = False,
    bake_dir: str | Path | None = None,
    push_baked_to: str | None = None,
    load_dtype: str = "auto",
    device_map: str = "auto",
    trust_remote_code: bool = False,
    **settings: Unpack[MergeSettings],
) -> Merged:
    """Merge adapters into one.

    >>> merged = plait.merge({"maths": "./a", "code": "./b"}, method="ties", space="core", density=0.3, out="merged")
    >>> merged.record.rank, merged.record.kept

    Merged are the deltas ΔW = s · B A, (d_out, d_in) per module, in float32. `plait methods` and docs/methods have each
    method's equation and source.

    Args:
        source: adapters (references, or name → reference), the path of a recipe, or a `Recipe`, whose relative paths start at
            the folder of the file that it was loaded from.
        out: where to write; a new run folder in the workspace (`artifacts/`) when None.
        force: replace an adapter at `out`.
        workers: modules worked on at a time; never changes a byte.
        progress: receives stages and steps.
        push_to: Hub repository to upload the result to.
        private: create that repository as private.
        moments: second moments of the modules' inputs, for methods that solve (`regmean`, `ssr`): a folder of
            `<adapter>.safetensors` or name → file, as `save_moments` writes them, or a function (adapter, target module) →
            E[x xᵀ]. A function is in no recipe: what it makes cannot be rebuilt from its lock.
        tasks: files of the adapters' tasks, the recipe's when None. On their unlabeled texts (`calibration`) a merge takes the
            second moments that its method lacks, and the scale of `scale="auto"`; both need the base model.
        add: adapters that an earlier merge gets besides its own; `source` is that merge's folder, with its `plait.lock`, and
            `weights` are theirs. The result is that of merging all at once.
        inputs: with `add`: name → reference, for sources in other places than in the lock.
        from_merged: with `add`: take the merged adapter in place of its sources: the same for linear methods, and another
            merge for all others, as a note says.
        bake_dir: also write base + merge as a full model there, as `bake` does; it is the result's `baked`.
        push_baked_to: Hub repository to upload that model to.
        load_dtype: of the base that reads texts, as transformers takes it; `stored` is the checkpoint's; `auto` too, or
            float32 where that is slow here.
        device_map: of that base, as transformers takes it.
        trust_remote_code: let transformers run code that comes with its weights.
        **settings: keys of a recipe (`method`, `scale`, `seed`, `merge_mode`, `transforms`, `heads`, `base_model`), of its
            output (`kind`, `rank`, `dtype`, `layout`, `format`), `weights` (numbers in order, name → number, or a policy), and
            the method's own parameters (`space`, `density`, …).

    Returns:
        Folder, plan and run record.

    Raises:
        PlaitError: anything wrong with what was given, all of it at once; nothing is left at `out` then.
    """
    return MergeOrder(
        request=Request(source, settings, moments=moments, tasks=tasks),
        out=optional_path(out),
        force=force,
        workers=workers,
        push_to=push_to,
        private=private,
        add=add,
        inputs=inputs or {},
        from_merged=from_merged,
        bake_dir=optional_path(bake_dir),
        push_baked_to=push_baked_to,
        load=LoadOptions(load_dtype, device_map, trust_remote_code),
    ).run(progress)


def plan(
    source: RecipeSource,
    *,
    workers: int | None = None,
    moments: str | Path | Mapping[str, str | Path] | MomentsOf | None = None,
    tasks: Sequence[str | Path] | None = None,
    add: Adapters | None = None,
    inputs: Mapping[str, str | Path] | None = None,
    from_merged: bool = False,
    **settings: Unpack[MergeSettings],
) -> MergePlan:
    """Return what `merge` would do with the same arguments; reads headers, no tensor. Of a bake, see `plan_bake`.

    >>> plan = plait.plan(["./a", "./b"], method="svd")
    >>> plan.rank, plan.result, plan.output_bytes

    Args:
        source: as `merge` takes it, and so are all others.
        workers: for the estimate of memory.
        moments: second moments of the modules' inputs.
        tasks: files of the adapters' tasks.
        add: adapters that an earlier merge gets besides its own.
        inputs: with `add`: name → reference.
        from_merged: with `add`: take the merged adapter in place of its sources.
        **settings: as `merge`.

    Returns:
        Ranks, weights and exactness per module, what is promised, bytes to write and estimated memory in bytes.

    Raises:
        PlaitError: as `merge`.
    """
    request = Request(source, settings, moments=moments, tasks=tasks)
    return MergeOrder(request=request, workers=workers, add=add, inputs=inputs or {}, from_merged=from_merged).plan()


def bake(  # noqa: PLR0913 (what a command line takes)
    source: RecipeSource,
    *,
    out: str | Path,
    base: str | Path | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    force: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    dequantize: bool = False,
    hash_base: bool = True,
    progress: Progress | None = None,
    check: str | Path | None = None,
    push_to: str | None = None,
    private: bool = False,
    moments: str | Path | Mapping[str, str | Path] | MomentsOf | None = None,
    tasks: Sequence[str | Path] | None = None,
    load_dtype: str = "auto",
    device_map: str = "auto",
    trust_remote_code: bool = False,
    cluster: str | None = None,
    **settings: Unpack[BakeSettings],
) -> Baked:
    """Write base model + merge as a full model, shard by shard.

    >>> plait.bake({"maths": "./a", "code": "org/repo"}, base="org/model", weights=[0.7, 0.3], out="model")

    Killed at any moment, the same call continues with what it had finished; `out` appears when it is complete.

    Args:
        source: adapters (references, or name → reference), the path of a recipe, or a `Recipe`.
        out: where to write.
        base: the base model, a folder or `org/repo[@revision]`, of a pipeline of diffusers too, or a `.safetensors` file of
            SD, SDXL or Flux; the recipe's or the adapters' own when None.
        dtype: of all float tensors (`bfloat16`, …); every tensor keeps its own when None.
        shard_size: largest file, such as `5GB`; the base's files when None.
        force: replace a model at `out`.
        workers: threads; never change a byte.
        device: where blocks are added up, as torch names it; the lock names it, since other devices round otherwise.
        dequantize: read a quantized base (fp8, mxfp4) as the plain model that it encodes; refused without.
        hash_base: hash the base's files where their sha256 is not known; without, the lock names them, and `verify` cannot
            tell whether they have changed.
        progress: receives the bytes done.
        check: a file of prompts: then compare the model's logits with those of the live merge; the result's `parity`.
        push_to: Hub repository to upload the model to.
        private: create that repository as private.
        moments: second moments of the modules' inputs, as `merge` takes them.
        tasks: files of the adapters' tasks, as `merge` takes them.
        load_dtype: of the base that reads their texts, as transformers takes it; `stored` is the checkpoint's; `auto` too, or
            float32 where that is slow here.
        device_map: of that base, as transformers takes it.
        trust_remote_code: let transformers run code that comes with its weights.
        cluster: `ray` or `ray://HOST:PORT`: make the files on the nodes of an existing Ray cluster, to the same bytes.
        **settings: as `merge`, but for what shapes an adapter (`rank`, `kind`, `layout`).

    Returns:
        Folder, plan and record; `parity` where `check` was given.

    Raises:
        PlaitError: anything wrong with what was given, all of it at once; nothing is left at `out` then.
    """
    from plait.commands.bake import BakeOrder

    return BakeOrder(
        request=Request(source, settings, moments=moments, base=base, tasks=tasks),
        out=Path(out),
        dtype=dtype,
        shard_size=shard_size,
        device=device,
        dequantize=dequantize,
        hash_base=hash_base,
        cluster=cluster,
        force=force,
        workers=workers,
        prompts=optional_path(check),
        push_to=push_to,
        private=private,
        load=LoadOptions(load_dtype, device_map, trust_remote_code),
    ).run(progress)


def plan_bake(
    source: RecipeSource,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    dequantize: bool = False,
    moments: str | Path | Mapping[str, str | Path] | MomentsOf | None = None,
    tasks: Sequence[str | Path] | None = None,
    **settings: Unpack[BakeSettings],
) -> BakePlan:
    """Return what `bake` would write with the same arguments; reads headers, no tensor.

    >>> plait.plan_bake(["./a", "./b"], base="org/model").notes

    Args:
        source: as `bake` takes it, and so are all others.
        base: the base model.
        dtype: of all float tensors.
        shard_size: largest file.
        workers: threads.
        device: where blocks are added up.
        dequantize: read a quantized base as the plain model that it encodes.
        moments: second moments of the modules' inputs.
        tasks: files of the adapters' tasks.
        **settings: as `bake`.

    Returns:
        The files, where every delta lands in them, sizes in bytes, and notes.

    Raises:
        PlaitError: as `bake`.
    """
    from plait.commands.bake import BakeOrder

    request = Request(source, settings, moments=moments, base=base, tasks=tasks)
    return BakeOrder(
        request=request, dtype=dtype, shard_size=shard_size, device=device, dequantize=dequantize, workers=workers
    ).plan()


def compress(
    adapter: str | Path,
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    out: str | Path,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    **settings: Unpack[CompressSettings],
) -> MergeResult:
    """Write one adapter at a lower rank: the best approximation of its deltas (Eckart & Young 1936), heads kept in place.

    >>> plait.compress("./a", rank=4, out="small").record.lowest_kept

    Args:
        adapter: a reference.
        rank: a number, or `energy:0.99` for the lowest rank that keeps that share of ‖ΔW‖² in every module.
        energy: that share, in place of a rank.
        out: where to write.
        force: replace an adapter at `out`.
        workers: modules worked on at a time.
        progress: receives stages and steps.
        **settings: as `merge` (`dtype`, `layout`, `base_model`).

    Returns:
        Folder, plan and run record, with the share of ‖ΔW‖² that every module keeps.

    Raises:
        PlaitError: as `merge`.
    """
    return CompressOrder(Path(out), rank, energy, settings, force, workers, adapter=str(adapter)).run(progress)


def convert(
    adapter: str | Path,
    *,
    to: str,
    out: str | Path,
    tower: str | None = None,
    base_model: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Write an adapter in the format of another program, with the same factors.

    >>> plait.convert("./a", to="mlx", out="a-mlx").folder

    Args:
        adapter: a reference.
        to: name of the format, as in docs/formats.md.
        out: where to write.
        tower: component of a pipeline that alone is written (`unet`, `text_encoder`, …); all when None.
        base_model: the base model, where the adapter names none, or another; GGUF needs its `config.json`.
        force: replace a result of plait's at `out`.
        progress: receives stages and steps.

    Returns:
        Folder and plan: what was written where, and notes on values that were rounded.

    Raises:
        PlaitError: it cannot be read, or the format has no place for something of it; nothing is left at `out` then.
    """
    order = ConvertOrder(adapter=str(adapter), to=to, out=Path(out), tower=tower, base_model=base_model, force=force)
    return order.run(progress)


def extract(
    base: str | Path,
    finetuned: str | Path,
    *,
    out: str | Path,
    rank: int | str | None = None,
    energy: float | None = None,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    **settings: Unpack[ExtractSettings],
) -> ExtractResult:
    """Write a LoRA adapter from a full fine-tune: the best approximation of what it changed, layer by layer.

    >>> plait.extract("org/base", "org/finetuned", rank=32, out="adapter")

    Args:
        base: reference of the base model.
        finetuned: reference of the fine-tune, a full model of the same architecture.
        out: where to write.
        rank: a number, or `energy:0.99` for the lowest rank that keeps that share of ‖ΔW‖² in every module.
        energy: that share, in place of a rank.
        force: replace an adapter at `out`.
        workers: tensors worked on at a time; never changes a byte.
        progress: receives stages and steps.
        **settings: `targets` (names of layers or shell patterns; all Linear layers, convolutions and fused experts when None),
            `embeddings` (take them too), `modules_to_save` (keep norms and biases as full tensors), `dtype`, `layout`,
            `base_id` (the base model's name to write).

    Returns:
        Folder and record: energy per module, what was left out, and how much of the difference that is.

    Raises:
        PlaitError: anything wrong with what was given; nothing is left at `out` then.
    """
    from plait.commands.extract import ExtractOrder

    models = {"base": str(base), "finetuned": str(finetuned)}
    return ExtractOrder(Path(out), rank, energy, settings, force, workers, **models).run(progress)


def inspect(
    source: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    base_model: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Describe adapters and how they relate: exact, from their factors only.

    >>> found = plait.inspect({"maths": "./a", "code": "./b"})
    >>> found.comparison.cosine[0][1], found.compatibility.problems

    Args:
        source: references, or name → reference.
        base_model: the base model, when the adapters name it differently.
        workers: target modules looked at at the same time.
        progress: receives stages and steps.

    Returns:
        One report per adapter; the measures of every pair, (T, T), over all modules and per layer; whether they can be
        merged; and what vLLM needs.

    Raises:
        PlaitError: adapters cannot be found or opened; all of them at once.
    """
    from plait.commands.inspect import InspectOrder

    return InspectOrder(source, base_model, workers).run(progress)


def unbake(
    model: str | Path,
    adapter: str | Path,
    *,
    out: str | Path,
    weight: float | None = None,
    original: str | Path | None = None,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> UnbakeResult:
    """Take an adapter out of a baked model again, to within rounding; its full tensors (heads) are left as in the model.

    >>> plait.unbake("baked", "./adapter", out="restored", original="org/base").remaining

    Args:
        model: reference of the model.
        adapter: reference of the adapter that was baked into it.
        out: where to write.
        weight: that it was baked with; 1 when None, unless the model's lock says another.
        original: reference of the model before the bake, to compare with.
        force: replace a model at `out`.
        workers: threads; never change a byte.
        progress: receives stages and steps.

    Returns:
        The bake, and what remains between its result and the original, where that was given.

    Raises:
        PlaitError: as `bake`; or the adapter is DoRA, or the model's lock says that it was baked in otherwise or not at all.
    """
    from plait.commands.unbake import UnbakeOrder

    before = None if original is None else str(original)
    return UnbakeOrder(str(model), str(adapter), Path(out), weight, before, force, workers).run(progress)


def verify(
    folder: str | Path,
    *,
    rebuild: bool = True,
    inputs: Mapping[str, str | Path] | None = None,
    parity: str | Path | None = None,
    base_model: str | None = None,
    device: str = "cpu",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a result against its `plait.lock`: its files, its inputs, and the complete result made again.

    >>> plait.verify("merged").ok

    Args:
        folder: of a merge, a bake, a compression or an extraction.
        rebuild: make it again in a temporary folder (TMPDIR) and compare; otherwise hashes only.
        inputs: name → reference, for inputs in other places than in the lock.
        parity: a file of prompts, one a line or .jsonl with "prompt": compare the logits of the result with those of the live
            merge. Needs transformers and PEFT.
        base_model: reference of the base model for that; else the lock's, else the one that the adapter names.
        device: where to compute the logits, as torch names it.
        workers: modules worked on at a time.
        progress: receives stages and steps.

    Returns:
        What was found; its `ok` says whether everything is equal. Parity is reported, and does not count.

    Raises:
        PlaitError: there is no lock that can be read, or parity cannot be measured.
    """
    from plait.commands.verify import VerifyOrder

    return VerifyOrder(Path(folder), rebuild, inputs or {}, optional_path(parity), base_model, device, workers).run(progress)


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
) -> PushResult:
    """Upload a finished result to the Hub; one that differs from its `plait.lock` is refused.

    >>> plait.push("merged", "me/merged", private=True).url

    Args:
        folder: of a merge, a bake, a compression or an extraction.
        repo: `org/name`, or `name` for the user's own; created when it does not exist.
        private: make the repository private.
        revision: the branch to write to, created when missing.
        create_pr: open a pull request instead.
        message: title of the commit or pull request.

    Returns:
        Where it is, which files stayed here, and what the card lacks.

    Raises:
        PlaitError: the folder is not a complete result, or the Hub refuses.
    """
    from plait.commands.push import PushOrder

    return PushOrder(Path(folder), repo, private, revision, create_pr, message).run()


def migrate_recipe(file: str | Path, *, out: str | Path | None = None, force: bool = False) -> str:
    """Return the text of a recipe in today's form: an older form, or mergekit's YAML, is rewritten.

    >>> print(plait.migrate_recipe("recipe.yaml"))

    Args:
        file: the recipe.
        out: also write it there.
        force: replace the file at `out`.

    Returns:
        YAML; it ends with a line break.

    Raises:
        PlaitError: it cannot be read, a part of it has no counterpart, or it is not valid; or `out` may not be written.
    """
    from plait.commands.recipe import MigrateOrder

    text, notes = MigrateOrder(Path(file), optional_path(out), force).run()
    for note in notes:
        announce(note)
    return text


def optional_path(path: str | Path | None) -> Path | None:
    """Return a path of text as a path."""
    return None if path is None else Path(path)
