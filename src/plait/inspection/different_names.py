"""Whether adapters call the same modules by different names, from their headers alone."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from plait.adapters.adapter import Adapter
from plait.adapters.layouts import Layout
from plait.adapters.names import layer_key

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
        if one.targets.keys() == two.targets.keys():
            continue
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
    within = re.compile(r"(?<=\.)module\.|\.module$")
    bare = {within.sub("", path): path for path in two.targets}
    pairs = ((path, bare.get(within.sub("", path))) for path in one.targets)
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
