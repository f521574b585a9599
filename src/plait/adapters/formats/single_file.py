"""Adapters that are one file of tensors, alone or in a folder, and what its two formats have in common."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from plait.adapters.config import ADAPTER_CONFIG, AdapterConfig, alpha_of
from plait.adapters.formats.base import Origin, StoredAdapter, carried, only_file
from plait.adapters.formats.pipelines import COMPONENTS, kernel_of
from plait.adapters.formats.products import Factored, factored
from plait.adapters.formats.views import TranslatedFile, View
from plait.errors import AdapterError, collect, listed
from plait.tensorfiles.reader import SafetensorsFile, TensorFile

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"
Parts = dict[str, dict[str, str]]  # module → part → tensor name
Scaling = Callable[[str, int], float | None]  # module, rank → s, where something else than the module's own alpha gives it


def tensor_file(place: Path) -> Path | None:
    """Return the file of tensors of a place: itself, diffusers' by name, or the only one of a folder without a model."""
    if place.is_file():
        return place if place.suffix == SafetensorsFile.suffix else None
    if (place / DIFFUSERS_NAME).is_file():
        return place / DIFFUSERS_NAME
    if (place / ADAPTER_CONFIG).exists() or (place / "config.json").exists():
        return None
    return only_file(place, SafetensorsFile.suffix)


def opened(
    place: Path, split: Callable[[str], tuple[str, str] | None], advice: str = ""
) -> tuple[SafetensorsFile, Parts, list[str]]:
    """Return the file of a place that its format has matched, and what `grouped` returns of it.

    Args:
        place: a folder, or the file.
        split: name → module and part; None where it is not understood.
        advice: what to do about names that are not.

    Raises:
        AdapterError: it is damaged, or gone.
    """
    path = tensor_file(place)
    if path is None:
        raise AdapterError(f"{place}: its file of tensors is gone. Was it changed while it was read?")
    file = SafetensorsFile(path)
    return file, *grouped(file, split, advice)


def grouped(file: TensorFile, split: Callable[[str], tuple[str, str] | None], advice: str = "") -> tuple[Parts, list[str]]:
    """Return module → part → tensor name, and what is wrong: names that cannot be taken apart, or are there twice."""
    modules: Parts = defaultdict(dict)
    unknown, problems = [], []
    for name in sorted(file.tensors):
        if (found := split(name)) is None:
            unknown.append(name)
        elif found[1] in modules[found[0]]:
            problems.append(f"{name!r} and {modules[found[0]][found[1]]!r} are the same part of one module")
        else:
            modules[found[0]][found[1]] = name
    if unknown:
        problems.append(f"{len(unknown)} tensors are not understood: {listed(map(repr, unknown), 5)}{advice}")
    return modules, problems


def stored(
    file: SafetensorsFile,
    modules: Parts,
    problems: list[str],
    *,
    name: str,
    writer: str | None,
    linear_projections: bool | None,
    base_model: str | None = None,
    scaling: Scaling = lambda module, rank: None,
) -> StoredAdapter:
    """Return an adapter of some modules in PEFT's terms.

    Raises:
        AdapterError: there are problems, or factors have no form in PEFT.
    """
    views: dict[str, View] = {}
    scalings, ranks, methods = {}, {}, Counter[str]()
    for module, parts in modules.items():
        try:
            found = factored(file, module, parts, kernel_of(module, linear_projections=linear_projections))
            rank = next(v for n, v in found.views.items() if n.endswith(".lora_B.weight")).shape[1]
            scalings[module] = _scaling(found, parts, scaling(module, rank))
        except ValueError as error:
            problems.append(f"{module!r}: {error}")
            continue
        ranks[module] = rank
        methods[found.method] += 1
        views |= found.views
    collect(AdapterError, [f"{file.path}: {p}" for p in problems], f"{file.path.name}: not an adapter that plait can merge")
    rank = max(ranks.values(), default=1)
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": Counter(alpha_of(s, ranks[m]) for m, s in scalings.items()).most_common(1)[0][0] if scalings else rank,
        "base_model_name_or_path": base_model,
        "use_dora": any("magnitude" in parts for parts in modules.values()),
        "lora_bias": any("bias" in parts for parts in modules.values()),
    }
    towers = tuple(c for c in COMPONENTS if any(m.startswith(f"{c}.") for m in modules))
    computed = {m: n for m, n in methods.items() if m in ("LoHa", "LoKr")}
    notes = tuple(
        f"{count} modules are {method}: written as factors of their exact rank, in float32."
        for method, count in computed.items()
    )
    metadata = {k: v for k, v in carried(file.metadata).items() if k != DIFFUSERS_METADATA and not k.startswith("sshs_")}
    origin = Origin(format=name, writer=writer, metadata=metadata, notes=notes)
    config = AdapterConfig(settings, file.path)
    return StoredAdapter(config, TranslatedFile(file.path, views), origin, (file.path,), scalings, towers)


def _scaling(found: Factored, parts: Mapping[str, str], given: float | None) -> float:
    if given is None:
        return found.scaling
    if "alpha" in parts and abs(found.scaling - given) > 1e-6 * abs(given):
        raise ValueError(f"{parts['alpha']!r} gives {found.scaling:g} as scaling, the metadata of the file {given:g}")
    return given
