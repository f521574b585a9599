"""mlx-lm's folder: `adapters.safetensors` and an `adapter_config.json` of its own.

A linear layer computes y = x Wᵀ + scale · (x lora_a) lora_b with lora_a (d_in, r) and lora_b (r, d_out), the transposes of
PEFT's; an embedding's lora_a is (tokens, r), so that the same holds. `scale` multiplies the product, whatever the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plait.adapters.config import ADAPTER_CONFIG, AdapterConfig, is_number
from plait.adapters.formats.base import AdapterFormat, Factors, Origin, OutgoingAdapter, StoredAdapter, carried
from plait.adapters.formats.limits import of_one_model, only_plain
from plait.adapters.formats.scalings import common_value, rescaled
from plait.adapters.formats.views import TranslatedFile, View, same, transposed
from plait.adapters.layouts import Embedding, Linear
from plait.adapters.names import layer_key
from plait.errors import AdapterError, collect, listed
from plait.parsing import is_there, read_object, shown
from plait.tensorfiles.reader import SafetensorsFile
from plait.tensorfiles.writer import TensorEntry, TensorWriter

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|tok_embeddings|word_embeddings|wte|embeddings?)$")


class MlxFolder(AdapterFormat):
    """What `mlx_lm.lora` writes."""

    name = "mlx"
    program = "mlx-lm"
    file_name = "adapters.safetensors"

    def matches(self, place: Path) -> bool:
        """Return whether a folder has a tensor file of mlx-lm's name."""
        return place.is_dir() and (place / self.file_name).is_file()

    def read(self, place: Path) -> StoredAdapter:
        """Open an adapter; see `AdapterFormat.read`."""
        path = place / ADAPTER_CONFIG
        if not is_there(path, AdapterError):
            raise AdapterError(f"{path}: no such file. mlx-lm writes it next to {self.file_name}, and it holds the scale.")
        raw = read_object(path, AdapterError, constants=True)
        collect(AdapterError, [f"{path}: {p}" for p in _wrong(raw)], f"{path}: values that cannot be read")
        file = SafetensorsFile(place / self.file_name)
        modules, problems = _sorted(file)
        if not _is_dora(raw) and "fine_tune_type" in raw and (dora := [m for m, parts in modules.items() if "m" in parts]):
            problems.append(
                f"{len(dora)} modules have DoRA's magnitudes ({listed(map(repr, dora), 3)}), and {path.name} says 'lora', so "
                "that mlx-lm passes them over. Correct fine_tune_type, or take them out"
            )
        collect(AdapterError, [f"{file.path}: {p}" for p in problems], f"{place}: not an adapter that plait can merge")
        scale = float(raw["lora_parameters"]["scale"])
        ranks = {module: file.tensors[parts["lora_b"]].shape[0] for module, parts in modules.items()}
        rank = max(ranks.values(), default=1)
        settings = {
            "r": max(1, rank),
            "lora_alpha": scale * rank,
            "use_dora": _is_dora(raw),
            "base_model_name_or_path": raw.get("model"),
            "task_type": "CAUSAL_LM",
        }
        views = {name: view for module, parts in modules.items() for name, view in _views(file, module, parts)}
        origin = Origin(format=self.name, writer=self.program, metadata=carried(file.metadata))
        config = AdapterConfig(settings, path)
        return StoredAdapter(config, TranslatedFile(file.path, views), origin, (file.path, path), dict.fromkeys(modules, scale))

    def problems(self, outgoing: OutgoingAdapter) -> list[str]:
        """Return what has no place in mlx-lm's adapters."""
        return [*of_one_model(outgoing, self.program), *only_plain(outgoing, self.program, Linear, Embedding, dora=True)]

    def notes(self, outgoing: OutgoingAdapter) -> list[str]:
        """Return how many modules have another scaling than the one that is written."""
        scale = common_value(t.scaling for t in outgoing.targets.values())
        others = [t for t in outgoing.targets.values() if t.scaling != scale and not _is_power_of_two(t.scaling / scale)]
        return [f"mlx-lm has one scale for all modules: that of {len(others)} others is multiplied into B."] * bool(others)

    def write(self, folder: Path, outgoing: OutgoingAdapter, factors: Factors) -> dict[str, str]:
        """Write an adapter; see `AdapterFormat.write`. All modules get the largest rank, with zeros."""
        targets = outgoing.targets
        scale, rank = common_value(t.scaling for t in targets.values()), max(t.rank for t in targets.values())
        entries = []
        for path, t in targets.items():
            a, b = (t.layout.d_in, rank), (rank, t.layout.d_out)
            entries += [TensorEntry(f"{path}.lora_a", t.dtype, a), TensorEntry(f"{path}.lora_b", t.dtype, b)]
            entries += [TensorEntry(f"{path}.m", t.dtype, (t.layout.d_out,))] * t.is_dora
        with TensorWriter(folder / self.file_name, entries, outgoing.metadata) as writer:
            for module in factors:
                path = module.target
                part = rescaled(module.slices[0], targets[path].scaling / scale, path).padded(rank)
                writer.write(f"{path}.lora_a", part.a.mT)
                writer.write(f"{path}.lora_b", part.b.mT)
                if module.magnitude is not None:
                    writer.write(f"{path}.m", module.magnitude)
        keys = {path if (key := layer_key(path)) is None else path[len(str(key)) + 1 :] for path in targets}
        config = {
            "fine_tune_type": "dora" if any(t.is_dora for t in targets.values()) else "lora",
            "lora_parameters": {"dropout": 0.0, "keys": sorted(keys), "rank": rank, "scale": scale},
            "model": outgoing.settings.get("base_model_name_or_path"),
            "num_layers": -1,  # all: a layer that has no tensors gets a zero delta
        }
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
        return {self.file_name: writer.sha256}


def _is_dora(raw: Mapping[str, Any]) -> bool:
    """Return whether a configuration is of DoRA, which releases before `fine_tune_type` have as a flag."""
    return raw.get("fine_tune_type") == "dora" or raw.get("use_dora") is True


def _wrong(raw: Mapping[str, Any]) -> Iterator[str]:
    kind, given = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters")
    if kind == "full":
        yield "fine_tune_type is 'full': the file holds complete weights, no LoRA. plait extract makes one of two models."
    elif kind not in ("lora", "dora"):
        yield f"fine_tune_type is {shown(kind)}; plait reads 'lora' and 'dora'."
    if not isinstance(raw.get("model") or "", str):
        yield f"model is {shown(raw['model'])}; it must be a text."
    if not isinstance(given, dict):
        yield f"lora_parameters is {shown(given)}; mlx-lm writes the rank and the scale there."
        return
    if not is_number(given.get("scale")):
        yield f"lora_parameters.scale is {shown(given.get('scale'))}; it must be a number."
    alpha, rank = given.get("alpha"), given.get("rank")
    if alpha is not None and alpha != rank:
        yield (
            f"lora_parameters has alpha {shown(alpha)} and rank {shown(rank)}: early versions of mlx-lm scale by scale · "
            "alpha / rank, later ones by scale, and the file does not say which wrote it. Take alpha out, and correct scale."
        )


def _sorted(file: SafetensorsFile) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return module → part → tensor name, and what is wrong."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for name in sorted(file.tensors):
        if found := _PART.fullmatch(name):
            modules[found["module"]][found["part"]] = name
    others = [n for n in file.tensors if not _PART.fullmatch(n)]
    problems = []
    if others:
        problems.append(f"{len(others)} tensors are not of mlx-lm's LoRA: {listed(map(repr, sorted(others)), 3)}")
    for module, parts in modules.items():
        lacking = [p for p in ("lora_a", "lora_b") if p not in parts]
        if lacking:
            problems.append(f"{module!r}: {' and '.join(lacking)} missing; found {', '.join(sorted(parts))}")
            continue
        a, b = (file.tensors[parts[p]].shape for p in ("lora_a", "lora_b"))
        if len(a) == 3:
            problems.append(
                f"{module!r} is a stack of experts as mlx-lm has it, whose names and layout transformers does not have"
            )
        elif len(a) != 2 or len(b) != 2 or a[1] != b[0]:
            problems.append(f"{module!r}: lora_a is {list(a)} and lora_b is {list(b)}; they must be (d_in, r) and (r, d_out)")
    return modules, problems


def _views(file: SafetensorsFile, module: str, parts: Mapping[str, str]) -> Iterator[tuple[str, View]]:
    layout = Embedding if _EMBEDDING.search(module) else Linear
    names = layout.tensor_names(module)
    yield names.a, transposed(file, parts["lora_a"])
    yield names.b, transposed(file, parts["lora_b"])
    if "m" in parts:
        yield names.magnitude, same(file, parts["m"])


def _is_power_of_two(x: float) -> bool:
    return math.frexp(x)[0] in (0.5, -0.5)


MLX = MlxFolder()
