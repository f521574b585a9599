"""What formats have no place for, as complete sentences."""

from __future__ import annotations

from plait.adapters.formats.base import OutgoingAdapter
from plait.adapters.layouts import Layout
from plait.errors import join_words, listed


def only_plain(outgoing: OutgoingAdapter, program: str, *kinds: type[Layout], dora: bool = False) -> list[str]:
    """Return why an adapter has no place in a format of factors on some kinds of layer, with or without DoRA's magnitudes."""
    problems = []
    targets = outgoing.targets.values()
    more = {"lora_bias": any(t.has_bias for t in targets), "DoRA's magnitudes": not dora and any(t.is_dora for t in targets)}
    others = [*(what for what, has in more.items() if has), *outgoing.others]
    wrong = [path for path, t in outgoing.targets.items() if not isinstance(t.layout, kinds) or t.layout.stack > 1]
    if wrong:
        allowed = join_words([kind.kind for kind in kinds])
        problems.append(
            f"adapters of {program} hold factors on layers of kind {allowed}; {len(wrong)} targets are of another, such as "
            f"{wrong[0]!r} ({outgoing.targets[wrong[0]].layout.kind})."
        )
    if others:
        problems.append(
            f"adapters of {program} hold nothing but factors; this one also has {listed(others)}. Write it as "
            "'peft', or take them out."
        )
    return problems


def of_one_model(outgoing: OutgoingAdapter, program: str) -> list[str]:
    """Return why an adapter of a pipeline has no place in a format for one model."""
    if len(outgoing.towers) < 2:
        return []
    return [
        f"adapters of {program} are of one model; this one is of {join_words(outgoing.towers)} of a pipeline. Choose one "
        "of them (--tower, tower=)."
    ]


def of_a_pipeline(outgoing: OutgoingAdapter, program: str) -> list[str]:
    """Return why an adapter of one model has no place in a format for pipelines."""
    if outgoing.towers:
        return []
    return [f"files of {program} are of a pipeline; this adapter is of one model, and its paths do not begin with a component."]
