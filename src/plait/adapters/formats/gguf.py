"""llama.cpp's adapters: `blk.0.attn_q.weight.lora_a` and `.lora_b` in a GGUF file, with one alpha for all.

llama.cpp scales a module by alpha / rank, where the rank is the tensors' own; without an alpha, by 1. Its models of the Llama
family keep the rows of query and key projections in another order (pairs that rotate together are neighbors), and with them the
rows of B; how many heads there are, the file does not say, so that the base model's `config.json` has to be there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.adapters.config import AdapterConfig, is_number
from plait.adapters.formats.base import AdapterFormat, Factors, Origin, OutgoingAdapter, StoredAdapter, only_file
from plait.adapters.formats.limits import of_one_model, only_plain
from plait.adapters.formats.scalings import common_value, rescaled
from plait.adapters.formats.single_file import grouped
from plait.adapters.formats.views import TranslatedFile, View, same
from plait.adapters.layouts import Linear
from plait.deferred import Tensor, torch
from plait.errors import AdapterError, collect, listed
from plait.parsing import read_object, shown
from plait.tensorfiles.gguf import GgufFile, write_gguf
from plait.tensorfiles.reader import FLOATS
from plait.tensorfiles.writer import TensorEntry

_BLOCK = re.compile(r"blk\.(?P<number>0|[1-9][0-9]*)\.(?P<name>\w+)")
_LAYER = re.compile(r"model\.layers\.(?P<number>0|[1-9][0-9]*)\.(?P<name>.+)")
_USUAL = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
#: Architecture in GGUF → name of a block's module there → in transformers.
_MODULES: dict[str, Mapping[str, str]] = {
    **dict.fromkeys(("llama", "granite", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2"), _USUAL),
    "phi3": {
        "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
}  # fmt: skip
_SMALLEST = 2.0**-126  # the smallest normal float32
_INVOKED = "adapter.alora.invocation_tokens"  # after which an aLoRA acts
_HEAD = "output", "lm_head"  # in GGUF, in transformers
#: Those whose rows of queries and keys are in llama.cpp's order.
_REORDERED = ("llama", "granite", "smollm3")
#: `model_type` of transformers → architecture in GGUF.
_ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "granite": "granite", "smollm3": "smollm3", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "olmo2": "olmo2", "phi3": "phi3",
}  # fmt: skip


class GgufAdapter(AdapterFormat):
    """What llama.cpp's `convert_lora_to_gguf.py` writes."""

    name = "gguf"
    program = "llama.cpp"
    file_name = "adapter.gguf"
    reads_base = True

    def matches(self, place: Path) -> bool:
        """Return whether a place is one GGUF file, or a folder with one and no adapter of PEFT's."""
        return _file(place) is not None

    def read(self, place: Path) -> StoredAdapter:
        """Open an adapter; see `AdapterFormat.read`."""
        path = _file(place)
        if path is None:
            raise AdapterError(f"{place}: its GGUF file is gone. Was it changed while it was read?")
        file = GgufFile(path)
        architecture = file.fields.get("general.architecture")
        if file.fields.get("general.type") != "adapter" or file.fields.get("adapter.type") != "lora":
            raise AdapterError(f"{path}: not an adapter, but a model. Give the file that convert_lora_to_gguf.py wrote.")
        if not isinstance(architecture, str) or architecture not in _MODULES:
            raise AdapterError(
                f"{path}: of the architecture {shown(architecture)}, whose modules are not known here; known are "
                f"{', '.join(_MODULES)}. Give the adapter that it was made from."
            )
        alpha = file.fields.get("adapter.lora.alpha", 0.0)
        if not is_number(alpha):
            raise AdapterError(f"{path}: adapter.lora.alpha is {shown(alpha)}; it must be a number.")
        modules, problems = _modules_of(file, architecture)
        tokens = file.fields.get(_INVOKED, [])
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise AdapterError(f"{path}: {_INVOKED} is {shown(tokens)}; it must be a list of integers.")
        config_path = path.parent / "config.json"
        config = read_object(config_path, AdapterError, constants=True) if config_path.is_file() else {}
        kind = config.get("model_type")
        if architecture in _REORDERED and isinstance(kind, str) and _ARCHITECTURES.get(kind, architecture) != architecture:
            problems.append(
                f"it is of the architecture {architecture}, and {config_path} of {shown(kind)}: of another base model, whose "
                "heads say nothing about its rows. Put that of its base model there"
            )
        reordered = [m for m in modules if architecture in _REORDERED and m.endswith(("q_proj", "k_proj"))]
        if reordered and heads_of(config) is None:
            problems.append(
                f"{len(reordered)} modules, such as {reordered[0]!r}, have rows in llama.cpp's order, which depends on the "
                "number of heads. Put the config.json of the base model next to the file"
            )
        problems += _uneven(file, modules, reordered, heads_of(config))
        collect(AdapterError, [f"{path}: {p}" for p in problems], f"{path}: not an adapter that plait can merge")
        views = {n: v for m, parts in modules.items() for n, v in _views(file, m, parts, config, reordered=m in reordered)}
        ranks = {m: file.tensors[parts["lora_b"]].shape[1] for m, parts in modules.items()}
        settings = {
            "r": max(ranks.values(), default=1),
            "lora_alpha": alpha or max(ranks.values(), default=1),
            "base_model_name_or_path": _base(file.fields),
            "task_type": "CAUSAL_LM",
            "alora_invocation_tokens": tokens or None,
        }
        known = (path, config_path) if reordered else (path,)
        scalings = {m: alpha / rank if alpha else 1.0 for m, rank in ranks.items()}
        origin = Origin(format=self.name, writer=self.program, metadata=_texts(file.fields))
        return StoredAdapter(AdapterConfig(settings, path), TranslatedFile(path, views), origin, known, scalings)

    def problems(self, outgoing: OutgoingAdapter) -> list[str]:
        """Return what has no place in llama.cpp's adapters, or needs the base model's configuration."""
        problems = [*of_one_model(outgoing, self.program), *only_plain(outgoing, self.program, Linear)]
        kind = outgoing.base_config.get("model_type")
        if not outgoing.base_config:
            return [
                *problems,
                "GGUF needs the base model's config.json: give the base (--base-id, base_model=), here or on the Hub.",
            ]
        if not isinstance(kind, str) or kind not in _ARCHITECTURES:
            return [
                *problems,
                f"model_type in the base model's config.json is {shown(kind)}, for which no names in GGUF are known; "
                f"known are {', '.join(_ARCHITECTURES)}.",
            ]
        architecture = _ARCHITECTURES[kind]
        unknown = [path for path in outgoing.targets if _gguf_name(path, architecture) is None]
        if unknown:
            problems.append(f"{len(unknown)} modules have no name in GGUF's {architecture!r}: {listed(map(repr, unknown), 3)}.")
        if architecture in _REORDERED and heads_of(outgoing.base_config) is None:
            problems.append("num_attention_heads is missing in the base model's config.json.")
        for path, t in outgoing.targets.items():
            if (heads := _heads(path, architecture, outgoing.base_config)) and t.layout.d_out % (2 * heads):
                problems.append(f"{path!r} has {t.layout.d_out} rows, which are not pairs in each of {shown(heads)} heads.")
        if not _SMALLEST <= abs(alpha := _alpha(outgoing)) < math.inf:
            problems.append(f"the alpha of most modules is {alpha:g} in float32, out of its range.")
        wide = [path for path, t in outgoing.targets.items() if t.dtype == torch.float64]
        if wide:
            problems.append(f"{len(wide)} modules are float64, which llama.cpp does not read. Write them as float32 first.")
        return problems

    def notes(self, outgoing: OutgoingAdapter) -> list[str]:
        """Return how many modules have another alpha than the one that is written."""
        alpha = _alpha(outgoing)
        others = [t for t in outgoing.targets.values() if t.scaling * t.rank != alpha]
        return [f"llama.cpp has one alpha for all modules: that of {len(others)} others is multiplied into B."] * bool(others)

    def write(self, folder: Path, outgoing: OutgoingAdapter, factors: Factors) -> dict[str, str]:
        """Write an adapter; see `AdapterFormat.write`."""
        targets, config = outgoing.targets, outgoing.base_config
        architecture, alpha = _ARCHITECTURES[config["model_type"]], _alpha(outgoing)
        names = {path: f"{_gguf_name(path, architecture)}.weight" for path in targets}
        entries = []
        for path, t in targets.items():
            entries.append(TensorEntry(f"{names[path]}.lora_a", t.dtype, (t.rank, t.layout.d_in)))
            entries.append(TensorEntry(f"{names[path]}.lora_b", t.dtype, (t.layout.d_out, t.rank)))

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for module in factors:
                path = module.target
                part = rescaled(module.slices[0], targets[path].scaling * targets[path].rank / alpha, path)
                heads = _heads(path, architecture, config)
                yield f"{names[path]}.lora_a", part.a
                yield f"{names[path]}.lora_b", part.b if heads is None else reordered_rows(part.b, heads)

        fields: dict[str, str | int | float] = {
            "general.architecture": architecture,
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": alpha,
            "general.name": "adapter",
            **{f"plait.{key}": text for key, text in outgoing.metadata.items()},
        }
        if base := outgoing.settings.get("base_model_name_or_path"):
            fields |= {"general.base_model.count": 1, "general.base_model.0.name": str(base)}
        return {self.file_name: write_gguf(folder / self.file_name, fields, entries, tensors())}


def heads_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the number of heads of queries and of keys in a model's configuration; None where it has none."""
    heads = config.get("num_attention_heads")
    keys = config.get("num_key_value_heads", heads)
    fits = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (heads, keys))
    return (heads, keys) if fits else None  # type: ignore[return-value]  # both were just seen to be integers


def reordered_rows(b: Tensor, heads: int) -> Tensor:
    """Return rows, (d_out, r), in llama.cpp's order: within a head the two halves are interleaved."""
    return b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def ordered_rows(b: Tensor, heads: int) -> Tensor:
    """Return rows that are in llama.cpp's order, (d_out, r), in that of transformers."""
    return b.reshape(heads, -1, 2, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _file(place: Path) -> Path | None:
    if place.is_file():
        return place if place.suffix == GgufFile.suffix else None
    if any((place / name).exists() for name in ("adapter_config.json", "model.safetensors", "model.safetensors.index.json")):
        return None
    return only_file(place, GgufFile.suffix)


def _modules_of(file: GgufFile, architecture: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return module → part → tensor name, and what is wrong."""

    def split(name: str) -> tuple[str, str] | None:
        base, _, part = name.rpartition(".")
        path = _path(base.removesuffix(".weight"), architecture) if part in ("lora_a", "lora_b") else None
        return None if path is None else (path, part)

    modules, problems = grouped(file, split)
    for path, parts in modules.items():
        if lacking := [p for p in ("lora_a", "lora_b") if p not in parts]:
            problems.append(f"{path!r}: {' and '.join(lacking)} missing; found {', '.join(sorted(parts))}")
            continue
        a, b = (file.tensors[parts[p]] for p in ("lora_a", "lora_b"))
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            problems.append(f"{path!r}: lora_a is {list(a.shape)} and lora_b is {list(b.shape)}; they do not fit each other")
        if wrong := {i.dtype for i in (a, b)} - {*FLOATS}:
            problems.append(f"{path!r} is stored as {' and '.join(sorted(wrong))}; factors are read as {', '.join(FLOATS)}")
    return modules, problems


def _uneven(
    file: GgufFile, modules: Mapping[str, Mapping[str, str]], reordered: Sequence[str], heads: tuple[int, int] | None
) -> Iterator[str]:
    """Find modules whose rows are not pairs in every head."""
    for module in reordered if heads is not None else ():
        shape = file.tensors[modules[module]["lora_b"]].shape if "lora_b" in modules[module] else ()
        count = heads[module.endswith("k_proj")] if heads is not None else 1
        if shape and shape[0] % (2 * count):
            yield f"{module!r} has {shape[0]} rows, which are not pairs in each of {shown(count)} heads (config.json)"


def _views(
    file: GgufFile, module: str, parts: Mapping[str, str], config: Mapping[str, Any], *, reordered: bool
) -> Iterator[tuple[str, View]]:
    names = Linear.tensor_names(module)
    yield names.a, same(file, parts["lora_a"])
    view, heads = same(file, parts["lora_b"]), heads_of(config)
    if reordered and heads is not None:
        count = heads[module.endswith("k_proj")]
        view = View(view.shape, view.dtype, lambda: ordered_rows(file.read(parts["lora_b"]), count))
    yield names.b, view


def _path(name: str, architecture: str) -> str | None:
    if name == _HEAD[0]:
        return _HEAD[1]
    found = _BLOCK.fullmatch(name)
    inner = _MODULES[architecture].get(found["name"]) if found else None
    return None if found is None or inner is None else f"model.layers.{found['number']}.{inner}"


def _gguf_name(path: str, architecture: str) -> str | None:
    if path == _HEAD[1]:
        return _HEAD[0]
    found = _LAYER.fullmatch(path)
    names = {inner: name for name, inner in _MODULES[architecture].items()}
    return f"blk.{found['number']}.{names[found['name']]}" if found and found["name"] in names else None


def _heads(path: str, architecture: str, config: Mapping[str, Any]) -> int | None:
    """Return by how many heads the rows of a module are reordered; None where they are not."""
    heads = heads_of(config)
    if architecture not in _REORDERED or heads is None or not path.endswith(("q_proj", "k_proj")):
        return None
    return heads[path.endswith("k_proj")]


def _alpha(outgoing: OutgoingAdapter) -> float:
    """Return the alpha of most modules as float32 holds it; 0 would mean none."""
    return float(torch.tensor(common_value(t.scaling * t.rank for t in outgoing.targets.values()), dtype=torch.float32))


def _base(fields: Mapping[str, Any]) -> str | None:
    url, name = fields.get("general.base_model.0.repo_url"), fields.get("general.base_model.0.name")
    if isinstance(url, str) and (found := re.fullmatch(r"https://huggingface\.co/([^/]+/[^/]+)", url)):
        return found[1]
    return name if isinstance(name, str) and ("/" in name) else None


def _texts(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the license, and what plait has carried into the file."""
    kept = {k.removeprefix("plait."): v for k, v in fields.items() if k.startswith("plait.") and isinstance(v, str)}
    return kept | {k: v for k, v in fields.items() if k.startswith("general.license") and isinstance(v, str)}


GGUF = GgufAdapter()
