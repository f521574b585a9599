"""What a reader of a tuning's record should know of it, in sentences."""

from __future__ import annotations

from collections.abc import Mapping

from plait.calibration.search import LEAST_DIVERGENCE
from plait.calibration.texts import Texts
from plait.merging.inventory import Inventory
from plait.tuning.held_out import SplitLessons
from plait.tuning.learning import LearningRun
from plait.tuning.seen import seen_in_training


def notes_on(
    inventory: Inventory,
    texts: Mapping[str, Texts],
    right: Mapping[str, tuple[str, ...]],
    taught: SplitLessons,
    run: LearningRun,
) -> list[str]:
    """Return what is to be known of texts, labels and result."""
    adapters = {a.name: a for a in inventory.adapters}
    known = {x.task: seen_in_training(texts[x.task], adapters[x.adapter]) for x in taught.lessons}
    trained = [name for name, t in texts.items() if t.source == "split 'train'" and known[name] is None]
    tested = [name for name, t in texts.items() if t.source == "split 'test'"]
    notes = [f"tune.{name} changes nothing here: it is of {reader}." for name, reader in inventory.recipe.tune.unread.items()]
    if right:
        notes.append(f"labels were read: {sum(map(len, right.values()))} in all.")
    if tested:
        notes.append(f"{', '.join(tested)}: learned from split 'test', as allow_test allows; do not judge the result on it.")
    if len(run.looks) > 1 and max(run.looks, key=lambda h: h.score).step == 0:
        notes.append("no step was better than the start on the held-out texts.")
    if lost := [x.task for x in taught.lessons if run.kept.divergence[x.task] > max(taught.base[x.task], LEAST_DIVERGENCE)]:
        notes.append(
            f"{', '.join(lost)}: the result is farther from the task's own adapter than the base model is. More texts, steps "
            "or another method may keep it (plait eval shows what is lost); else leave the adapter out."
        )
    if same := [x.task for x in taught.lessons if taught.base[x.task] < LEAST_DIVERGENCE]:
        notes.append(f"{', '.join(same)}: the own adapter answers these texts as the base does; they teach little or nothing.")
    notes += [
        f"{x.task}: {known[x.task]} of {len(texts[x.task].prompts)} texts were in the training of adapter {x.adapter} (its "
        "training.json)."
        for x in taught.lessons
        if known[x.task] is not None
    ]
    if trained:
        notes.append(
            f"{', '.join(trained)}: the texts are of the training split, which the adapters have probably seen: "
            "held-out texts flatter. A split 'calibration' in the task, or --split, names others."
        )
    few = [name for name in texts if set(taught.learn[name]) & set(taught.held[name])]
    if few:
        notes.append(f"{', '.join(few)}: no texts were held out; scale and step were chosen on those learned from.")
    return notes
