"""Whether adapters belong together, from their headers alone, and what a server needs to load them.

The planner and `plait inspect` ask the same questions here. Independent of recipes, methods or tensors.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

from plait.adapters.adapter import Adapter
from plait.adapters.layouts import Layout
from plait.adapters.layouts.conv1d import may_be_conv1d
from plait.adapters.names import layer_key
from plait.errors import listed
from plait.records import Record

# The values vLLM takes for its setting max_lora_rank. Newer versions also take 1, which older ones refuse.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Projections that models have either as one matrix or as several: patterns of the one's names, and of the several's.
_FUSED = tuple(
    (re.compile(one), re.compile(several))
    for one, several in (
        (
            r"(?i:\w*qkv\w*)|W_pack|query_key_value|c_attn|in_proj",
            r"(?i:(?:to_|add_|linear_|fc_|w_?)?(?:[qkv]|query|key|value|queries|keys|values)(?:_(?:proj|lin|linear|layer|a_proj))?)"
            r"|kv_a_proj_with_mqa",
        ),
        (
            r"(?i:(?:to_|linear_|w)?kv(?:_proj)?)|key_value",
            r"(?i:(?:to_|linear_|w_?)?(?:[kv]|key|value|keys|values)(?:_(?:proj|lin|linear|layer))?)",
        ),
        (
            r"(?i:(?:to_|linear_|w)?qk(?:_proj)?)|query_key",
            r"(?i:(?:to_|linear_|w_?)?(?:[qk]|query|key|queries|keys)(?:_(?:proj|lin|linear|layer))?)",
        ),
        (r"(?:fused_)?(?:gate_(?:and_)?up|up_gate)(?:_proj)?|w1_?w?3|linear_fc1|dense_h_to_4h", r"gate_proj|up_proj|w[13]"),
        (
            r"(?:fused_)?(?P<before>(?:\w+_)?)(?:gate_(?:and_)?up|up_(?:and_)?gate)(?P<behind>(?:_\w+)?)",
            r"(?P<before>(?:\w+_)?)(?:gate|up)(?P<behind>(?:_\w+)?)",
        ),
        (r"w1_?w?2", r"w[12]"),
        (r"(?P<name>fc1|wi|Wi|c_fc|fc_in|linear_fc1|dense_h_to_4h)", r"(?P<name>\w+?)_(?:[01gxh]|gate|up)"),
        (r"fc1", r"fc1[12]"),
        (r"in_proj_qkvz", r"in_proj_(?:qkv|z)"),
        (r"in_proj_ba", r"in_proj_[ab]"),
    )
)
# Containers of numbered layers, attention and MLPs, which versions of one model's code call by different names.
_CONTAINERS = frozenset({"layers", "layer", "h", "blocks", "block", "blk", "decoder_layers", "encoder_layers"})
# Parts of words that distinguish the towers of a model from each other; some mean the same.
_TOWER_WORDS = (
    "language vision audio encoder decoder left right query question context passage document user item student teacher "
    "talker thinker generator discriminator prior spatial temporal local global intra inter forward backward draft mtp "
    "actor critic policy value reward source target depth high low fast slow semantic coarse fine acoustic code predictor "
    "qformer perceiver resampler connector projector action expert cross self single double main aux refiner up down mid "
    "middle in out input output pre post a b c x y"
)
_MEANINGS = {
    "language": "text llm lm",
    "vision": "visual image vit video",
    "audio": "speech sound",
}
_TOWERS = {w: w for w in _TOWER_WORDS.split()} | {w: what for what, words in _MEANINGS.items() for w in words.split()}
_OF_LANGUAGE = frozenset({"language", "encoder", "decoder"})
_ATTENTION = re.compile(r"(?<=\.)(?:self_attn|self_attention|attn|attention)(?=\.)")
_MLP = re.compile(r"(?<=\.)(?:mlp|feed_forward|ffn|ff)(?=\.)")


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
        refused: what vLLM does not load, or would load wrongly; empty when all is well.
    """

    name: str
    rank: int
    max_lora_rank: int | None
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
        *naming_problems(adapters),
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


def naming_problems(adapters: Sequence[Adapter]) -> list[str]:
    """Report which adapters call the same modules by different names.

    Two adapters that share no target in a layer are suspected when most modules of the smaller have a partner of the same
    layout in the other whose path differs only in what precedes the numbered layer, and when these two beginnings name no
    two towers of a model: one holds all words of the other (`model` and `model.language_model`), or the words that differ
    mean the same (`model` and `transformer`). An encoder and a decoder therefore are not.

    Fused experts in one adapter and separate ones in the other are the other case: the same weights, cut differently.
    """
    problems = []
    for one, two in combinations(adapters, 2):
        begun = _different_beginnings(one, two)
        if begun is not None:
            problems.append(
                f"{one.name!r} and {two.name!r} share no target module in layers, yet only the beginnings of the paths differ: "
                f"{begun[0]!r} and {begun[1]!r}. They were saved by different versions or classes of one model. Save one of "
                "them again with the version and class of the other, or rename its tensors."
            )
        for first, second in ((one, two), (two, one)):
            fused = _fused_and_separate(first, second)
            if fused is not None:
                problems.append(
                    f"{first.name!r} adapts the fused experts {fused!r}, {second.name!r} the same experts one by one. "
                    "Save one of them again in the form of the other (transformers 5 fuses experts on loading)."
                )
            if (more := _one_word_more(first, second)) is not None:
                problems.append(
                    f"{more[0]!r} of {first.name!r} and {more[1]!r} of {second.name!r} differ by the word {more[2]!r} alone, "
                    "as do all targets in layers of one of them: one was saved from under a wrapper, or by another version of "
                    "the model's code. Rename the tensors of one adapter."
                )
            cut = _fused_projections(first, second)
            if cut:
                problems.append(
                    f"{first.name!r} adapts {cut[0][0]!r}, one matrix for what {second.name!r} has as several ({cut[0][1]!r}). "
                    "No model has both, so nothing could load their union. Train both on one form of the model."
                )
        wrapped = _under_a_wrapper(one, two)
        if wrapped is not None:
            problems.append(
                f"{wrapped[0]!r} of {one.name!r} and {wrapped[1]!r} of {two.name!r} differ by the word 'module' alone, which "
                "DDP and DeepSpeed put into names. If they are the same module, rename the tensors of one adapter."
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
    convolutions = [t.path for t in adapter.targets.values() if not t.layout.served_by_vllm]
    refused = []
    if _is_dora(adapter):
        refused.append("DoRA")
    if adapter.full_tensors:
        refused.append(f"full tensors ({listed(_owners(adapter.full_tensors))})")
    if any(t.has_bias for t in adapter.targets.values()):
        refused.append("lora_bias")
    if convolutions:
        refused.append(f"convolutions ({listed(sorted({short_name(p) for p in convolutions}))})")
    if other:
        refused.append(f"scalings of {_count(len(other), 'module')} (it reads r and lora_alpha, no patterns)")
    return ServedAdapter(name=adapter.name, rank=rank, max_lora_rank=max_lora_rank(rank), refused=tuple(refused))


def _different_beginnings(one: Adapter, two: Adapter) -> tuple[str, str] | None:
    """Return the two beginnings under which most modules of the smaller adapter are also the other's, or None.

    A target outside layers that both have (`lm_head`) shows nothing of the layers; one within a layer does.
    """
    shared = one.targets.keys() & two.targets.keys()
    if any(layer_key(path) is not None for path in shared):
        return None
    first, second = ({p: t.layout for p, t in a.targets.items() if not shared or layer_key(p)} for a in (one, two))
    partners: dict[tuple[str, str], list[tuple[_SplitPath, Layout]]] = defaultdict(list)
    for path, layout in second.items():
        place = _SplitPath.of(path)
        partners[place.tail].append((place, layout))
    found: Counter[tuple[str, str]] = Counter()
    for path, layout in first.items():
        place = _SplitPath.of(path)
        found.update(place.and_other(p) for p, other in partners[place.tail] if layout == other and place.may_be(p))
    if not found:
        return None
    pair, count = found.most_common(1)[0]
    return pair if 2 * count >= min(len(first), len(second)) else None


class _SplitPath(NamedTuple):
    """A path, taken apart.

    Attributes:
        begun: what precedes the container of the numbered layer, or the last component where there is no such layer.
        container: of the layers; empty where there are none.
        inside: what follows the container.
    """

    begun: str
    container: str
    inside: str

    @classmethod
    def of(cls, path: str) -> _SplitPath:
        """Take a path apart."""
        key = layer_key(path)
        if key is None:
            begun, _, inside = path.rpartition(".")
            return cls(begun, "", inside)
        begun, _, container = key.tower.rpartition(".")
        return cls(begun, container, path[len(key.tower) + 1 :])

    @property
    def tail(self) -> tuple[str, str]:
        """What is the same in all versions of a model's code."""
        return "layers" if self.container in _CONTAINERS else self.container, self.inside

    def and_other(self, other: _SplitPath) -> tuple[str, str]:
        """Return what precedes the layers here and there, without the container where it has one name."""
        if self.container == other.container:
            return self.begun, other.begun
        return f"{self.begun}.{self.container}".strip("."), f"{other.begun}.{other.container}".strip(".")

    def may_be(self, other: _SplitPath) -> bool:
        """Return whether both beginnings can mean one tower of a model."""
        one, two = (set(place.begun.split(".")) - {""} for place in (self, other))
        if one <= two or two <= one:
            return True
        first, second = one - two, two - one
        if not self.container or {re.sub(r"_?\d+$", "", w) for w in first} == {re.sub(r"_?\d+$", "", w) for w in second}:
            return False  # modules by themselves, or numbered towers
        towers = [{_TOWERS[p] for word in words for p in word.lower().split("_") if p in _TOWERS} for words in (first, second)]
        return towers[0] == towers[1] or (not all(towers) and towers[0] | towers[1] <= _OF_LANGUAGE)


def _fused_and_separate(fused: Adapter, separate: Adapter) -> str | None:
    """Return fused experts that the other adapter has one by one in the same layer, by whatever name of their container."""
    layers = {layer_key(path) for path in separate.targets if re.search(r"\.experts\.\d+\.", path)}
    stacks = (p for p, t in fused.targets.items() if t.layout.names_parameter and t.layout.stack > 1)
    return next((p for p in stacks if layer_key(p) in layers), None)


def _fused_projections(fused: Adapter, separate: Adapter) -> list[tuple[str, str]]:
    """Return the pairs of a fused projection and one of its parts, where no adapter shows that a model has both.

    What layers of one tower have is alike, so that the number of the layer does not count.
    """
    apart, own = (_by_owner(a) for a in (separate, fused))
    found: dict[str, str] = {}
    both: set[str] = set()
    for owner, names in own.items():
        there = apart.get(owner, {})
        for name, path in names.items():
            for one, several in ((match, several) for one, several in _FUSED if (match := one.fullmatch(name))):
                parts = [[n for n in sorted(side) if n != name and _is_part(n, several, one)] for side in (there, names)]
                if parts[0]:
                    found.setdefault(path, there[parts[0][0]])
                if name in there or parts[1]:
                    both.add(name)
    return [(path, part) for path, part in found.items() if path.rpartition(".")[2] not in both]


def _is_part(name: str, several: re.Pattern[str], fused: re.Match[str]) -> bool:
    part = several.fullmatch(name)
    return part is not None and part.groupdict() == fused.groupdict()


def _by_owner(adapter: Adapter) -> dict[str, dict[str, str]]:
    """Return owner (as `_alike` has it) → name in it → path in the first layer that has it."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in adapter.targets:
        owner, _, name = _alike(path).rpartition(".")
        found[owner].setdefault(name, path)
    return found


def _alike(path: str) -> str:
    """Return what a path has in common with those of the same module in other layers, and in other versions of the code."""
    return _MLP.sub("mlp", _ATTENTION.sub("attention", re.sub(r"(?<=\.)\d+(?=\.)", "*", path)))


def _under_a_wrapper(one: Adapter, two: Adapter) -> tuple[str, str] | None:
    """Return two paths that differ by components called `module` alone, within a layer (see `names`)."""
    bare = {re.sub(r"(?<=\.)module\.", "", path): path for path in two.targets}
    pairs = ((path, bare.get(re.sub(r"(?<=\.)module\.", "", path))) for path in one.targets)
    return next(((path, other) for path, other in pairs if other is not None and other != path), None)


def _one_word_more(longer: Adapter, shorter: Adapter) -> tuple[str, str, str] | None:
    """Return two paths within a layer and the word that the first has more, where it sets all targets of one adapter apart.

    No target within a layer may be in both, and the layouts must be equal. `module` is left to `_under_a_wrapper`.
    """
    inside = [{p: key for p in a.targets if (key := layer_key(p)) is not None} for a in (longer, shorter)]
    if not inside[0].keys().isdisjoint(inside[1]):
        return None
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, key in inside[0].items():
        words = path.split(".")
        for i in range(len(str(key).split(".")), len(words)):
            other = ".".join(words[:i] + words[i + 1 :])
            if other in inside[1] and shorter.targets[other].layout == longer.targets[path].layout:
                found[words[i]].append((path, other))
    smaller = min(map(len, inside))
    return next(((*pairs[0], word) for word, pairs in found.items() if len(pairs) >= smaller and word != "module"), None)


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
