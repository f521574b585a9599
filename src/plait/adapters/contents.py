"""What the tensors of an adapter's file are, from their names: parts of a LoRA, full tensors, or something else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from plait.adapters.names import (
    FullName,
    LoraName,
    foreign_tensors,
    is_flat,
    is_training_only,
    kohya_part,
    layer_key,
    parse_full_name,
    parse_lora_name,
    strip_prefix,
)
from plait.errors import listed
from plait.linalg.blocks import block_ranges
from plait.tensorfiles.reader import TensorFile

_OTHER_FILES = (  # what programs other than PEFT call their files, and what to do with them
    ("adapters.npz", "an adapter of early mlx", "Save its arrays as adapters.safetensors (mlx.core.save_safetensors)"),
    (
        "pytorch_lora_weights.safetensors",
        "diffusers' LoRA by its name, but its tensors have other names",
        "Call it adapter_model.safetensors where they are PEFT's",
    ),
    ("adapter_model-*-of-*.bin", "an adapter in several files", "Save it again in one: PEFT's save_pretrained"),
    ("global_step*", "what DeepSpeed saves", "Save the adapter from it (zero_to_fp32.py, then PEFT's save_pretrained)"),
    ("*_fsdp_*", "what FSDP saves", "Join it (accelerate merge-weights), then save the adapter with PEFT's save_pretrained"),
    ("*.distcp", "a part of a distributed checkpoint", "Join its parts, then save the adapter with PEFT's save_pretrained"),
    ("*.gguf", "a GGUF file", "plait reads the adapter that it was made from"),
    ("ggml-adapter-model.bin", "llama.cpp's adapter", "plait reads the adapter that it was made from"),
    ("adapter_*.pt", "torchtune's adapter", "Save it in PEFT's form (save_adapter_weights_only with the Hugging Face format)"),
    ("model*.safetensors", "a full model", "plait extract makes an adapter of it"),
    ("pytorch_model*.bin", "a full model", "plait extract makes an adapter of it"),
)


@dataclass
class SortedTensors:
    """A file's tensors, sorted.

    Attributes:
        modules: module path → part (`lora_A`, …; `alpha` where the file brings its own) → tensor name.
        full: path in the base model → tensor name.
        problems: what is not understood or is there twice.
    """

    modules: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    full: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def sort_tensors(file: TensorFile) -> SortedTensors:
    """Sort a file's tensors by their names.

    Every tensor ends up somewhere: in a module, as a full tensor, or in a problem. Left out are only tensors that steer
    training, and the untrained copies that a live model keeps of what it trains.
    """
    contents = SortedTensors()
    names = sorted(n for n in file.tensors if not is_training_only(n))
    loras = {n: parsed for n in names if (parsed := parse_lora_name(n))}
    rest = [n for n in names if n not in loras]
    owned = {p.module for p in loras.values()}
    loras |= {n: p for n in rest if (p := kohya_part(n)) and p.part == "alpha" and p.module in owned}
    rest = [n for n in rest if n not in loras]
    if not loras:  # a file is of one program; with PEFT's factors in it kohya's have no owner
        loras = _kohya(rest)
        rest = [n for n in rest if n not in loras]
    foreign = foreign_tensors(rest)
    contents.problems += [
        f"{len(found)} tensors are {what}, which plait does not read: {listed(map(repr, found), 3)}. Convert the adapter to "
        "PEFT's LoRA form first (lora_A, lora_B and adapter_config.json)"
        for what, found in foreign.items()
    ]
    others = {n for found in foreign.values() for n in found}
    owners = {p.owner for p in loras.values() if p.owner}
    untrained = {strip_prefix(n) for n in rest if ".original_module." in n}
    full = {n: parse_full_name(n, owners, untrained) for n in rest if n not in others}
    owners |= {p.owner for p in full.values() if p.owner}
    if len(owners) > 1:
        contents.problems.append(
            f"it holds several adapters ({', '.join(sorted(owners))}), as a live model has them. Save each by itself: "
            "save_pretrained(..., selected_adapters=[NAME])"
        )
        return contents
    flat = [n for n, p in loras.items() if is_flat(p.module)]
    if flat:
        contents.problems.append(
            f"{len(flat)} tensors name their module with underscores in place of dots, as kohya's scripts do, so that it is "
            f"not known: {listed(map(repr, flat), 3)}. Convert the adapter to PEFT's form first"
        )
        return contents
    for name, parsed in loras.items():
        _put(contents, contents.modules[parsed.module], parsed.part, name, "part of one module")
    _sort_full(contents, file, full)
    # full tensors that are matrices within numbered layers: what a LoRA adapts, and not a head
    matrices = [
        name
        for path, name in contents.full.items()
        if path.endswith(".weight") and layer_key(path) is not None and len(file.tensors[name].shape) > 1
    ]
    if not contents.modules and matrices:
        contents.problems.append(
            f"it holds no LoRA tensor, but {len(matrices)} weights of layers, such as {matrices[0]!r}: a full model, or an "
            "adapter merged into one. plait extract makes a LoRA of it and its base model"
        )
    return contents


def complete_names(
    full: Mapping[str, str], saved: Iterable[str], *, trained_biases: bool = False
) -> tuple[dict[str, str], list[str]]:
    """Complete names of full tensors that lack a part because the adapter was called like it.

    PEFT takes the adapter's name out of what it saves, wherever that is: an adapter called `weight` has `classifier` for
    `classifier.weight`, one called `dense` has `classifier.weight` for `classifier.dense.weight`.

    Args:
        full: path in the base model → tensor name in the file.
        saved: modules that the configuration names as saved completely.
        trained_biases: the configuration names biases as trained.

    Returns:
        The complete paths, and problems: names that cannot be completed.
    """
    heads = tuple(f".{module}" for module in saved)
    owners = {path[:i] for path in full for i, c in enumerate(path) if c == "."}
    found: dict[str, str] = {}
    broken: list[str] = []
    for path, name in full.items():
        owner, _, leaf = path.rpartition(".")
        is_head = any(f"{head}." in f".{path}." for head in heads)
        if path in owners or (is_head and f".{path}".endswith(heads)):
            lacking = [part for part in ("weight", "bias") if f"{path}.{part}" not in full]
            found[f"{path}.{lacking[0]}" if lacking else path] = name
            broken += [name] * (not lacking)
            continue
        found[path] = name
        parts = [p for p in full if p.startswith(f"{owner}.") and p.endswith(f".{leaf}") and p != path]
        odd = trained_biases and not is_head and leaf not in ("weight", "bias") and "token_adapter" not in path
        if odd or (is_head and leaf == "weight" and parts):
            broken.append(name)
    if not broken:
        return dict(sorted(found.items())), []
    return found, [
        f"{len(broken)} names lack a part: {listed(map(repr, broken), 3)}. PEFT takes the adapter's name out of them, and "
        "loads none of this: an adapter must not be called like a part of the model ('weight', 'bias', 'dense'). Save it again "
        "by another name"
    ]


def other_files(folder: Path) -> str:
    """Return a hint about what a folder holds in place of PEFT's tensor file; empty when nothing is recognized."""
    for pattern, what, advice in _OTHER_FILES:
        found = sorted(folder.glob(pattern))
        if found:
            return f"It holds {found[0].name}: {what}. {advice}."
    return ""


def _kohya(names: Iterable[str]) -> dict[str, LoraName]:
    """Return the factors that have kohya's names, where every module has both factors and its alpha; else nothing."""
    found = {n: parsed for n in names if (parsed := kohya_part(n))}
    modules: dict[str, set[str]] = defaultdict(set)
    for parsed in found.values():
        modules[parsed.module].add(parsed.part)
    complete = {module for module, parts in modules.items() if parts == {"lora_A", "lora_B", "alpha"}}
    return {n: parsed for n, parsed in found.items() if parsed.module in complete}


def _put(contents: SortedTensors, into: dict[str, str], key: str, name: str, what: str) -> None:
    if key in into:
        contents.problems.append(f"{name!r} and {into[key]!r} are the same {what}")
    else:
        into[key] = name


def _sort_full(contents: SortedTensors, file: TensorFile, full: dict[str, FullName]) -> None:
    for name, parsed in full.items():
        if not parsed.is_copy and not parsed.is_untrained:
            _put(contents, contents.full, parsed.path, name, "parameter")
    for name, parsed in full.items():
        if not parsed.is_copy:
            continue
        if (plain := contents.full.get(parsed.path)) is None:
            contents.full[parsed.path] = name
        elif not _equal(file, plain, name):
            contents.problems.append(
                f"{plain!r} and {name!r} are one parameter and have different values; keep the trained one"
            )
    for name, parsed in full.items():
        if parsed.is_untrained and parsed.path not in contents.full:
            contents.problems.append(
                f"{name!r} is the value before training; the trained {parsed.path!r} is not in the file. Save it again"
            )
    contents.full = dict(sorted(contents.full.items()))


def _equal(file: TensorFile, one: str, two: str) -> bool:
    """Return whether two tensors of a file have the same values; both are read, by blocks of rows."""
    shape, dtype = file.tensors[one].shape, file.tensors[one].dtype
    if (shape, dtype) != (file.tensors[two].shape, file.tensors[two].dtype):
        return False
    if not shape:
        return bool(file.read(one) == file.read(two))
    ranges = block_ranges(shape[0], math.prod(shape[1:]))
    return all(bool((file.read_rows(one, i, j) == file.read_rows(two, i, j)).all()) for i, j in ranges)
