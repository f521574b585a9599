"""Whether adapters belong together, from their headers alone, and what a server needs to load them.

The planner and `plait inspect` ask the same questions here. Independent of recipes, methods or tensors.
What only the names of modules show is in `different_names`.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from plait.adapters.adapter import Adapter
from plait.adapters.formats.pipelines import MAIN as MAIN_COMPONENTS
from plait.adapters.layouts import Layout
from plait.adapters.layouts.conv1d import may_be_conv1d
from plait.errors import listed
from plait.inspection.different_names import naming_problems
from plait.libraries.transformers.kinds import task_of
from plait.records import Record

# The values vLLM takes for its setting max_lora_rank. Newer versions also take 1, which older ones refuse.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_WRITES = "CAUSAL_LM"  # PEFT's task type of what vLLM is known to serve
_SEES_OR_HEARS = re.compile(r"(?:^|[._])(?:vision|visual|vit|image|audio|speech|multi_modal_projector|connector)")


class Compatibility(Record):
    """What prevents a merge.

    Attributes:
        can_merge: there are no problems.
        problems: what has to be mended first; complete messages.
        notes: what is worth knowing and stops nothing.
        excluded_spaces: space → why it cannot be used with these adapters.
        common: number of target modules that every adapter has.
        modules: number of target modules that at least one adapter has.
    """

    can_merge: bool
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    excluded_spaces: dict[str, str]
    common: int
    modules: int


class ServedAdapter(Record):
    """What vLLM needs to serve one adapter as it is.

    Attributes:
        name: of the adapter.
        rank: its largest rank.
        max_lora_rank: the smallest setting that holds it; None when vLLM has none that large.
        other_kind: what it is for, where that is known not to be a language model that writes texts, of which alone plait
            knows what vLLM serves; else None.
        refused: what vLLM does not load, or would load wrongly; empty when all is well.
    """

    name: str
    rank: int
    max_lora_rank: int | None
    other_kind: str | None
    refused: tuple[str, ...]


class Serving(Record):
    """What vLLM needs to serve the adapters, and their exact merge.

    Attributes:
        adapters: one entry each.
        merged_rank: the rank at which a sum of all loses nothing: per module the sum of the ranks, at most what the
            module can have; the largest over the modules.
        merged_max_lora_rank: the smallest setting that holds it; None when vLLM has none that large.
    """

    adapters: tuple[ServedAdapter, ...]
    merged_rank: int
    merged_max_lora_rank: int | None


def check_compatibility(adapters: Sequence[Adapter], *, base_model: str | None = None) -> Compatibility:
    """Collect everything that prevents a merge, and what is worth knowing.

    Args:
        adapters: opened; at least one.
        base_model: the base model that the user names, which overrides the adapters' own and serves DoRA.
    """
    problems = (
        *base_model_problems(adapters, base_model),
        *(tower_problems(adapters) or naming_problems(adapters)),
        *shape_problems(adapters),
        *dora_problems(adapters, base_model),
        *form_problems(adapters),
        *([] if any(a.targets for a in adapters) else ["no adapter has a LoRA tensor: there is no delta to merge"]),
    )
    everywhere = set.intersection(*(set(a.targets) for a in adapters))
    excluded = excluded_spaces(adapters)
    notes = (
        *_base_notes(adapters, base_model),
        *_coverage_notes(adapters, everywhere),
        *_part_notes(adapters),
        *(f"Space {space!r} cannot be used: {why}." for space, why in excluded.items()),
    )
    return Compatibility(
        can_merge=not problems,
        problems=problems,
        notes=notes,
        excluded_spaces=excluded,
        common=len(everywhere),
        modules=len({path for a in adapters for path in a.targets}),
    )


def base_model_problems(adapters: Sequence[Adapter], given_base: str | None) -> list[str]:
    """Report which adapters name which base models, when they name several.

    Names are compared without regard to case and to a slash at the end. An adapter that names none agrees with all.

    Args:
        adapters: opened.
        given_base: the base model that the user names; with it the adapters' own words do not count.
    """
    named: dict[str, list[Adapter]] = defaultdict(list)
    for adapter in adapters:
        if adapter.config.base_model:
            named[adapter.config.base_model.rstrip("/").casefold()].append(adapter)
    if given_base is not None or len(named) < 2:
        return []
    text = "; ".join(f"{_names(group)}: {group[0].config.base_model!r}" for group in named.values())
    return [
        f"the adapters name different base models ({text}). Deltas of different models do not add up. If these are the "
        "same weights under several names or paths, give the one to use: --base-id, or base_model in a recipe."
    ]


def tower_problems(adapters: Sequence[Adapter]) -> list[str]:
    """Report adapters of pipelines next to those of one model, and main models under names of different code."""
    of_one = [a for a in adapters if not a.towers]
    if 0 < len(of_one) < len(adapters):
        others = [a for a in adapters if a.towers]
        return [
            f"{_names(others)}: of a pipeline, with paths that begin with its components ({', '.join(others[0].towers)}); "
            f"{_names(of_one)}: of one model. Take one component of the former by itself: plait convert --tower NAME --to peft."
        ]
    main: dict[str, list[Adapter]] = defaultdict(list)
    for adapter in adapters:
        for tower in adapter.towers:
            if tower in MAIN_COMPONENTS:
                main[tower].append(adapter)
    if len(main) < 2:
        return []
    text = "; ".join(f"{_names(group)}: {tower}" for tower, group in main.items())
    return [
        f"the adapters call the main model by different names ({text}): they are of different models, or of one under names "
        "of its original code (diffusion_model) and of diffusers (of Flux these are read as one; of others they are not). Save "
        "one of them again in the form of the other."
    ]


def with_places(problems: Sequence[str], adapters: Sequence[Adapter]) -> list[str]:
    """Return problems, the last of which tells where the adapters are that are called otherwise than their folders or files."""
    called = ((a, a.place.stem if a.is_one_file else a.place.name) for a in adapters)
    places = [f"{a.name!r} is {a.place}" for a, name in called if name != a.name]
    if not (problems and places):
        return [*problems]
    return [*problems[:-1], f"{problems[-1]} ({'; '.join(places)}.)"]


def shape_problems(adapters: Sequence[Adapter]) -> list[str]:
    """Report which target modules have one path, but not one layout (kind, rows, columns, stack) in all adapters."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = defaultdict(list)
    by_path: dict[str, dict[str, Layout]] = defaultdict(dict)
    for adapter in adapters:
        for path, target in adapter.targets.items():
            by_path[path][adapter.name] = target.layout
    for path, layouts in by_path.items():
        if len(set(layouts.values())) > 1:
            text = tuple((name, str(layout)) for name, layout in layouts.items())
            groups[short_name(path), text].append(path)
    problems = []
    for (short, text), paths in groups.items():
        where = repr(paths[0]) if len(paths) == 1 else f"{short} in {len(paths)} places, such as {paths[0]!r}"
        problems.append(
            f"shapes differ for {where}: {'; '.join(f'{name!r} has {shape}' for name, shape in text)}. "
            "The adapters were trained on different models, or on different versions of one."
        )
    return problems


def dora_problems(adapters: Sequence[Adapter], given_base: str | None) -> list[str]:
    """Report which adapters need the base model's weights that are not given."""
    dora = [a for a in adapters if _is_dora(a)]
    if not dora or given_base is not None:
        return []
    named = next((a.config.base_model for a in dora if a.config.base_model), None)
    such = f", such as {named!r}" if named else ""
    return [
        f"DoRA in {_names(dora)}: it rescales the rows of the base model's weights, so its delta needs them. Give the "
        f"base model (--base-id, or base_model in a recipe): a folder or a Hub id{such}."
    ]


def form_problems(adapters: Sequence[Adapter]) -> list[str]:
    """Report what one adapter file cannot hold, because PEFT would not load it or would read it otherwise."""
    targets = [(a, t) for a in adapters for t in a.targets.values()]
    biased = [a for a in adapters if any(t.has_bias for t in a.targets.values())]
    problems = []
    if biased:
        without = sorted({t.path for _, t in targets if not t.layout.takes_bias})
        if without:
            problems.append(
                f"{_names(biased)}: lora_bias applies to all of an adapter, and PEFT has none for embeddings and experts, "
                f"such as {without[0]!r}. Leave one of the adapters out."
            )
        if any(_is_dora(a) for a in adapters):
            problems.append(f"{_names(biased)}: lora_bias and DoRA do not go together in PEFT.")
    modules = {t.path for _, t in targets if not t.layout.names_parameter}
    parameters = sorted({t.path for _, t in targets if t.layout.names_parameter})
    doubled = [path for path in parameters if path.removesuffix(".weight") in modules]
    if doubled:
        problems.append(
            f"{doubled[0]!r} is adapted as a parameter (target_parameters) by one adapter and as a module by another; PEFT "
            "cannot load both. Train them with the same selection."
        )
    transposed = sorted({t.path for a, t in targets if a.config.flag("fan_in_fan_out") and may_be_conv1d(t.path)})
    if transposed and parameters:
        problems.append(
            f"{transposed[0]!r} is stored transposed (fan_in_fan_out), which applies to all of an adapter, and PEFT then takes "
            f"no fused experts, such as {parameters[0]!r}. Leave one of the adapters out."
        )
    for key in ("layer_replication", "alora_invocation_tokens"):
        values = {a.name: a.config.raw.get(key) for a in adapters}
        if len({repr(v) for v in values.values()}) > 1:
            text = ", ".join(f"{name} {value}" for name, value in values.items())
            problems.append(f"{key} differs ({text}); it decides for all of an adapter where or when it acts.")
    return problems


def activation_problems(adapters: Sequence[Adapter]) -> list[str]:
    """Report which adapters cannot be added to weights, since they act after some tokens alone."""
    what = (
        "activated LoRA (aLoRA) acts only after its invocation tokens, and added to the weights it would act on every token. "
        "Merge into an adapter, which keeps them."
    )
    return _key_problems(adapters, "alora_invocation_tokens", what)


def replication_problems(adapters: Sequence[Adapter]) -> list[str]:
    """Report which adapters belong to a model that repeats layers of the base."""
    what = (
        "the layers are those of a model with repeated layers, which PEFT makes of the base when it loads the adapter. "
        "Merge into an adapter, which keeps the key."
    )
    return _key_problems(adapters, "layer_replication", what)


def _key_problems(adapters: Sequence[Adapter], key: str, what: str) -> list[str]:
    having = [a for a in adapters if a.config.raw.get(key)]
    return [f"{key} of {_names(having)}: {what}"] if having else []


def excluded_spaces(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Return the spaces that these adapters rule out, with the reason: `factors` adds factors of equal rank."""
    found = [
        (path, ranks)
        for path in sorted({path for a in adapters for path in a.targets})
        if len(set((ranks := {a.name: a.targets[path].rank for a in adapters if path in a.targets}).values())) > 1
    ]
    if not found:
        return {}
    path, ranks = found[0]
    text = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
    return {
        "factors": f"it adds factors and needs equal ranks, but they differ in {_count(len(found), 'module')}, such as "
        f"{path!r} ({text})"
    }


def serving(adapters: Sequence[Adapter]) -> Serving:
    """Return what vLLM needs to serve the adapters one by one, and their exact merge."""
    ranks: Counter[str] = Counter()
    layouts: dict[str, Layout] = {}
    for adapter in adapters:
        for path, target in adapter.targets.items():
            ranks[path] += target.rank
            layouts[path] = target.layout
    merged = max((min(rank, layouts[path].full_rank) for path, rank in ranks.items()), default=0)
    return Serving(adapters=tuple(_served(a) for a in adapters), merged_rank=merged, merged_max_lora_rank=max_lora_rank(merged))


def max_lora_rank(rank: int) -> int | None:
    """Return the smallest value of vLLM's max_lora_rank that holds a rank; None when it has none that large."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def other_kind(adapter: Adapter) -> str | None:
    """Return what an adapter is for, where that is not a language model that writes texts; else None.

    One that says nothing of it, by PEFT's task type or note of the class, is known by its paths alone.
    """
    task, noted = adapter.config.raw.get("task_type"), adapter.config.noted_class
    if task and task != _WRITES:
        return f"task type {task}"
    if not task and noted is not None and task_of({"architectures": [noted[1]]}) != _WRITES:
        return noted[1]
    if not task and noted is None and any("encoder" in path.split(".") for path in adapter.targets):
        return "layers of an encoder"
    found = sorted({short_name(path) for path in adapter.targets if _SEES_OR_HEARS.search(path)})
    return f"layers that see or hear ({listed(found)})" if found else None


def short_name(path: str) -> str:
    """Return the last component of a module path, with the one before it when the last is a number."""
    return re.sub(r"^.*\.(?=[^.]*[^.\d][^.]*(?:\.\d+)*$)", "", path)


def _served(adapter: Adapter) -> ServedAdapter:
    config = adapter.config
    # vLLM checks the configured r as well as the tensors, and scales every module by lora_alpha and that r alone.
    configured, alpha = int(config.raw.get("r", 8)), float(config.raw.get("lora_alpha", 8))
    rank = max((*adapter.ranks, configured)) if adapter.targets else 0
    scaling = alpha / (math.sqrt(configured) if config.flag("use_rslora") else configured)
    other = [t for t in adapter.targets.values() if not math.isclose(t.scaling, scaling)]
    unserved: dict[str, set[str]] = {}
    for t in adapter.targets.values():
        if not t.layout.served_by_vllm:
            unserved.setdefault(t.layout.kind, set()).add(short_name(t.path))
    refused = []
    if adapter.origin.format != "peft":
        advice = "" if adapter.towers else " (plait convert --to peft)"  # it serves language models
        form = f"the format {adapter.origin.format}{advice}"
        return _needs(adapter, rank, [form])
    if _is_dora(adapter):
        refused.append("DoRA")
    if adapter.full_tensors:
        refused.append(f"full tensors ({listed(_owners(adapter.full_tensors))})")
    if any(t.has_bias for t in adapter.targets.values()):
        refused.append("lora_bias")
    refused += [f"layers of kind {kind} ({listed(sorted(names))})" for kind, names in unserved.items()]
    if other:
        refused.append(f"scalings of {_count(len(other), 'module')} (it reads r and lora_alpha, no patterns)")
    return _needs(adapter, rank, refused)


def _needs(adapter: Adapter, rank: int, refused: Iterable[str]) -> ServedAdapter:
    needed = max_lora_rank(rank)
    kind = None if adapter.towers else other_kind(adapter)  # of a pipeline, which the format says already
    return ServedAdapter(name=adapter.name, rank=rank, max_lora_rank=needed, other_kind=kind, refused=tuple(refused))


def _base_notes(adapters: Sequence[Adapter], given_base: str | None) -> list[str]:
    notes = []
    unnamed = [a for a in adapters if not a.config.base_model]
    if unnamed and given_base is None:
        notes.append(f"{_names(unnamed)} name{'s' * (len(unnamed) == 1)} no base model, so it could not be compared.")
    revisions = {a.name: a.config.revision for a in adapters}
    if len(set(revisions.values())) > 1:
        text = ", ".join(f"{name} {revision or 'none'}" for name, revision in revisions.items())
        notes.append(f"The adapters name different revisions of the base model ({text}).")
    return notes


def _coverage_notes(adapters: Sequence[Adapter], everywhere: set[str]) -> list[str]:
    if len(adapters) < 2 or all(set(a.targets) == everywhere for a in adapters):
        return []
    text = ", ".join(f"{a.name} {len(a.targets)}" for a in adapters)
    union = len({path for a in adapters for path in a.targets})
    return [
        f"{len(everywhere)} of {union} target modules are in every adapter ({text}); a missing module counts as a zero "
        "delta (merge_mode 'union'), or is left out ('common')."
    ]


def _part_notes(adapters: Sequence[Adapter]) -> list[str]:
    notes = []
    heads = [a for a in adapters if a.full_tensors]
    if heads:
        text = "; ".join(f"{a.name}: {listed(_owners(a.full_tensors))}" for a in heads)
        notes.append(f"Heads and other full tensors ({text}) are kept per adapter under heads/<name>/, not merged.")
    biased = [a for a in adapters if any(t.has_bias for t in a.targets.values())]
    if biased:
        notes.append(f"lora_bias in {_names(biased)} is merged as a weighted sum, whatever the method.")
    return notes


def _is_dora(adapter: Adapter) -> bool:
    return any(t.is_dora for t in adapter.targets.values())


def _owners(tensors: Iterable[str]) -> list[str]:
    """Return the modules that full tensors belong to, in order, once each."""
    return list(dict.fromkeys(re.sub(r"\.(?:weight|bias|trainable_tokens_delta)$", "", t) for t in tensors))


def _names(adapters: Iterable[Adapter]) -> str:
    return ", ".join(repr(a.name) for a in adapters)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
