"""A fixed sample of a split: a function of the examples and the seed, on every machine and in any order of rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from plait.errors import TaskError, did_you_mean
from plait.recipes.evaluation import Subset
from plait.records import Record
from plait.results.writing import write_json_atomic
from plait.tasks.examples import Examples
from plait.tasks.inputs import Example


class ChosenSubset(Record):
    """Which examples of a split were taken.

    Attributes:
        tag: distinguishes results; a hash of the examples that were taken.
        examples: how many.
        of: how many the split has.
        indices: of the rows, ascending.
        ids: of the examples.
    """

    tag: str
    examples: int
    of: int
    indices: tuple[int, ...]
    ids: tuple[str, ...]


def choose_subset(examples: Examples, subset: Subset) -> ChosenSubset | None:
    """Choose a sample; None when the complete split is wanted.

    Every example has a rank, the hash of the seed and its content; the lowest are taken, per label in proportion to the
    split (largest remainders, at least one of each as far as possible). Without `stratified`, or where answers are free,
    over all examples.
    """
    wanted = subset.per_task.get(examples.task.name, subset.max_samples)
    items = examples.items
    if wanted is None or wanted >= len(items):
        return None
    closed = examples.task.closed_labels is not None
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(items):
        groups.setdefault(example.target if subset.stratified and closed else "", []).append(i)
    ranks = _ranks(items, subset.seed)
    shares = _shares({name: len(members) for name, members in groups.items()}, wanted)
    chosen = sorted(i for name, members in groups.items() for i in sorted(members, key=ranks.__getitem__)[: shares[name]])
    ids = tuple(items[i].id for i in chosen)
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:10]
    return ChosenSubset(tag=f"subset_{digest}", examples=len(chosen), of=len(items), indices=tuple(chosen), ids=ids)


def check_names(subset: Subset | None, tasks: Sequence[str]) -> None:
    """Make sure that `per_task` names tasks.

    Raises:
        TaskError: it names others.
    """
    unknown = [name for name in (subset.per_task if subset else {}) if name not in tasks]
    if unknown:
        near = did_you_mean(unknown[0], tasks)
        raise TaskError(f"eval.subset.per_task: {unknown[0]!r} is not one of the tasks {', '.join(tasks)}.{near}")


def write_subset(workspace: Path, examples: Examples, chosen: ChosenSubset) -> Path:
    """Write which examples were taken to `<workspace>/<task>/subsets/<split>_<tag>.json`; return that file."""
    file = workspace / examples.task.name / "subsets" / f"{examples.split}_{chosen.tag}.json"
    if not file.is_file():  # the tag is a hash of its content
        write_json_atomic(file, chosen.model_dump(mode="json"))
    return file


def _ranks(items: Sequence[Example], seed: int) -> list[str]:
    seen: Counter[str] = Counter()
    ranks = []
    for example in items:
        seen[example.id] += 1
        ranks.append(hashlib.sha256(f"{seed} {example.id} {seen[example.id]}".encode()).hexdigest())
    return ranks


def _shares(sizes: Mapping[str, int], wanted: int) -> dict[str, int]:
    """Divide a number of examples over groups."""
    total = sum(sizes.values())
    exact = {name: wanted * n / total for name, n in sizes.items()}
    least = 1 if wanted >= len(sizes) else 0
    shares = {name: max(least, int(x)) for name, x in exact.items()}
    by_need = sorted(sizes, key=lambda name: (shares[name] - exact[name], name))
    while sum(shares.values()) < wanted:
        name = next(n for n in by_need if shares[n] < sizes[n])
        shares[name] += 1
        by_need.append(by_need.pop(by_need.index(name)))
    while sum(shares.values()) > wanted:
        shares[max((n for n in shares if shares[n] > least), key=lambda name: (shares[name] - exact[name], name))] -= 1
    return shares
