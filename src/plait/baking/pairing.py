"""A base model and its full fine-tune, aligned tensor by tensor from their headers. No tensor is read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from plait.adapters.tensorfile import SafetensorsFile, TensorInfo
from plait.baking.architecture import Architecture, ArchitectureUnknown, Part
from plait.baking.checkpoint import FLOATS, BaseCheckpoint
from plait.errors import PlaitError, PlanError, collect
from plait.linalg.blocks import RowBlocks

Kind = Literal["linear", "conv1d", "embedding", "expert", "bias", "other"]

_EMBEDDING = re.compile(r"(embed(_tokens|_positions|_in)?|.*_?embeddings?|wte|wpe|shared|relative_attention_bias)")
_INPUT_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|shared|embed_in|word_embeddings)\.weight")
_HEAD = re.compile(r"(.*\.)?(lm_head|embed_out)\.weight")
_EXPERT = re.compile(r"\.experts\.(\d+\.|[^.]+$)")
# Constants that some versions of transformers store and others compute.
_CONSTANT = re.compile(r"(\.|^)(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids|token_type_ids)$")
# Models whose layers named c_attn, c_proj, c_fc are transformers' Conv1D; elsewhere (GPT-BigCode) they are Linear.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
_SHOWN = 4


@dataclass(frozen=True)
class Pair:
    """One tensor in both checkpoints.

    Attributes:
        name: of the parameter in the model that the adapter is for.
        kind: what it can become: `linear` and `conv1d` a LoRA, `embedding` one where asked for; the rest cannot.
        shape: as stored, the same in both.
        base: file and name in the base model.
        tuned: file and name in the fine-tune.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    base: tuple[SafetensorsFile, str]
    tuned: tuple[SafetensorsFile, str]

    @property
    def module(self) -> str:
        """Path of the layer that it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def info(self) -> TensorInfo:
        """What the fine-tune's header says of it."""
        file, name = self.tuned
        return file.tensors[name]

    def delta(self) -> RowBlocks:
        """Return fine-tune − base as stored, (rows, everything else), read by blocks of rows.

        The difference is taken in float32, or in float64 where a checkpoint is, and is float32.
        """
        rows, columns = (self.shape or (1,))[0], math.prod(self.shape[1:])
        is_double = "F64" in {file.tensors[name].dtype for file, name in (self.base, self.tuned)}
        wide = torch.float64 if is_double else torch.float32

        def read(side: tuple[SafetensorsFile, str], start: int, stop: int) -> torch.Tensor:
            file, name = side
            found = file.read_rows(name, start, stop) if self.shape else file.read(name)
            return found.to(wide).reshape(stop - start, columns)

        def block(start: int, stop: int) -> torch.Tensor:
            return (read(self.tuned, start, stop) - read(self.base, start, stop)).to(torch.float32)

        return RowBlocks((rows, columns), block, torch.float32)


@dataclass(frozen=True)
class Pairing:
    """Two checkpoints, aligned.

    Attributes:
        base: the base model.
        tuned: the fine-tune.
        pairs: every tensor that both have, sorted by name; constants and integers are left out.
        ties_head: whether the head is the input embedding, and not stored.
        notes: what could not be known of the names.
    """

    base: BaseCheckpoint
    tuned: BaseCheckpoint
    pairs: tuple[Pair, ...]
    ties_head: bool
    notes: tuple[str, ...]


def pair_checkpoints(base: str, tuned: str, folder: Path | None = None) -> Pairing:
    """Open both models and align them.

    Args:
        base: reference of the base model.
        tuned: reference of the fine-tune.
        folder: what relative paths are relative to; the current folder when None.

    Raises:
        AddressError: a reference leads nowhere.
        AdapterError: files that are no checkpoint.
        PlanError: a quantised model, or two models that are no base and fine-tune of it, with everything that does not fit.
    """
    one, two = _open_both((base, tuned), folder)
    names = _align(set(one.home), set(two.home))
    _tie(names, one, two)
    both = {name: (b, t) for name, (b, t) in names.items() if b is not None and t is not None}
    problems = [
        *_missing(base, tuned, names),
        *_shapes(base, tuned, {n: (one.info(b).shape, two.info(t).shape) for n, (b, t) in both.items()}),
    ]
    collect(PlanError, problems, f"{tuned} is no full fine-tune of {base} that a LoRA can be taken from")
    called, notes = _parameters(one, [b for b, _ in both.values()])
    conv1d = str(one.config.get("model_type")) in _CONV1D_MODELS
    pairs = []
    for name, (b, t) in both.items():
        info = one.info(b)
        if not _CONSTANT.search(name) and info.dtype in FLOATS:
            parameter = called.get(b, name)
            kind = _kind(parameter, info, conv1d=conv1d)
            if called and b not in called and kind != "expert":
                kind = "other"  # the model has no such parameter, or makes several of it
            pairs.append(Pair(parameter, kind, info.shape, (one.home[b].file, b), (two.home[t].file, t)))
    ties = not any(_HEAD.fullmatch(p.name) for p in pairs) and bool(one.config.get("tie_word_embeddings", True))
    return Pairing(one, two, tuple(sorted(pairs, key=lambda p: p.name)), ties, notes)


def _open_both(texts: tuple[str, str], folder: Path | None) -> tuple[BaseCheckpoint, BaseCheckpoint]:
    opened: list[BaseCheckpoint] = []
    errors: list[PlaitError] = []
    for text in texts:
        try:
            opened.append(BaseCheckpoint.open(text, base=folder))
        except PlaitError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    collect(PlanError, [str(e) for e in errors], "neither model can be used")
    return opened[0], opened[1]


def _align(base: set[str], tuned: set[str]) -> dict[str, tuple[str | None, str | None]]:
    """Match names; checkpoints are saved with or without the task head's prefix (`model.`, `transformer.`).

    Returns:
        the longer name → (name in the base, name in the fine-tune); None where it is missing.
    """
    named: dict[str, list[str | None]] = {}
    for side, (own, other) in enumerate(((base, tuned), (tuned, base))):
        prefix = _prefix(own, other)
        for name in sorted(own):
            longer = prefix + name
            named.setdefault(longer if prefix and longer in other else name, [None, None])[side] = name
    return {name: (sides[0], sides[1]) for name, sides in named.items()}


def _prefix(without: set[str], with_: set[str]) -> str:
    """Return what most names of `without` lack in front to be names of `with_`; empty when some are names already."""
    if without & with_:
        return ""
    found: Counter[str] = Counter()
    for name in sorted(with_):
        for dot in re.finditer(r"\.", name):
            if name[dot.end() :] in without:
                found[name[: dot.end()]] += 1
    return found.most_common(1)[0][0] if found else ""


def _tie(names: dict[str, tuple[str | None, str | None]], one: BaseCheckpoint, two: BaseCheckpoint) -> None:
    """Let a head that one side does not store, being tied to the embedding, be read from there."""
    for head in [n for n in names if _HEAD.fullmatch(n) and None in names[n]]:
        sides = list(names[head])
        for i, checkpoint in enumerate((one, two)):
            if sides[i] is None and checkpoint.config.get("tie_word_embeddings", True):
                sides[i] = next((n for n in sorted(checkpoint.home) if _INPUT_EMBEDDING.fullmatch(n)), None)
        names[head] = (sides[0], sides[1])


def _parameters(base: BaseCheckpoint, names: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return checkpoint tensor → parameter of the model, for tensors that are one parameter as it is; empty when unknown."""
    try:
        found = Architecture.of(base.folder, {n: base.info(n).shape for n in names})
    except ArchitectureUnknown as error:
        return {}, (f"{error}: modules are named as in the checkpoint, which PEFT may not find.",)
    whole = {parts[0].tensor: name for name, parts in found.parts.items() if parts == (Part(parts[0].tensor),)}
    return whole, ()


def _missing(base: str, tuned: str, names: Mapping[str, tuple[str | None, str | None]]) -> list[str]:
    wanted = {n: sides for n, sides in names.items() if not _CONSTANT.search(n)}
    problems = []
    for text, other, side in ((tuned, base, 1), (base, tuned, 0)):
        lacking = [n for n, sides in wanted.items() if sides[side] is None]
        if lacking:
            problems.append(
                f"{text} lacks {len(lacking)} of {other}'s tensors: {_listed(lacking)}. Is it a fine-tune of the same "
                "architecture, saved whole by the same version of transformers?"
            )
    return problems


def _shapes(base: str, tuned: str, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> list[str]:
    problems, other = [], []
    for name, (one, two) in shapes.items():
        if one == two:
            continue
        said = f"{name!r} is {list(one)} in {base} and {list(two)} in {tuned}"
        if one[1:] == two[1:] and (_INPUT_EMBEDDING.fullmatch(name) or _HEAD.fullmatch(name)):
            problems.append(
                f"{said}: the vocabulary was resized. A LoRA cannot add tokens; resize the base model first "
                f"(model.resize_token_embeddings({two[0]})), save it, and extract against that."
            )
        else:
            other.append(said)
    if other:
        problems.append(f"{len(other)} tensors have other shapes: {'; '.join(other[:_SHOWN])}{_more(other)}.")
    return problems


def _kind(name: str, info: TensorInfo, *, conv1d: bool) -> Kind:
    module, _, parameter = name.rpartition(".")
    last = module.rpartition(".")[2]
    if _EXPERT.search(name):
        return "expert"
    if parameter == "bias":
        return "bias"
    if parameter != "weight" or len(info.shape) != 2:
        return "other"
    if _EMBEDDING.fullmatch(last):
        return "embedding"
    return "conv1d" if conv1d and last in _CONV1D else "linear"


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:_SHOWN]) + _more(words)


def _more(words: Sequence[str]) -> str:
    return f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
