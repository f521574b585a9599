"""diffusers' `pytorch_lora_weights.safetensors`: factors under the paths of a pipeline's components.

Without metadata and alphas the scaling of every module is 1; the metadata of newer files has PEFT's settings per component.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.adapters.config import AdapterConfig, alpha_of
from plait.adapters.formats.base import AdapterFormat, Factors, OutgoingAdapter, OutgoingTarget, StoredAdapter
from plait.adapters.formats.flux import cut, has_original_names
from plait.adapters.formats.limits import of_a_pipeline, only_plain
from plait.adapters.formats.pipelines import COMPONENTS, with_text_model
from plait.adapters.formats.scalings import most_common
from plait.adapters.formats.single_file import DIFFUSERS_METADATA, DIFFUSERS_NAME, opened, stored, tensor_file
from plait.adapters.layouts import Convolution, Linear
from plait.errors import AdapterError
from plait.parsing import kind_of, parse_json
from plait.tensorfiles.reader import SafetensorsFile
from plait.tensorfiles.writer import TensorEntry, TensorWriter

_PARTS = {
    r"lora_A(?:\.default(?:_\d+)?)?\.weight": "lora_A",
    r"lora_B(?:\.default(?:_\d+)?)?\.weight": "lora_B",
    r"lora_B(?:\.default(?:_\d+)?)?\.bias": "bias",
    r"lora_magnitude_vector(?:\.default(?:_\d+)?)?(?:\.weight)?": "magnitude",
    r"(?:lora|lora_linear_layer|lora_conv2d_layer)\.down\.weight": "lora_A",
    r"(?:lora|lora_linear_layer|lora_conv2d_layer)\.up\.weight": "lora_B",
    r"lora_down\.weight": "lora_A",
    r"lora_up\.weight": "lora_B",
    r"lora_mid\.weight": "lora_mid",
    r"alpha": "alpha",
    r"(?P<other>dora_scale|diff|diff_b|(?:hada|lokr)_\w+)(?:\.default(?:_\d+)?)?(?:\.weight)?": "",
}
_NAME = re.compile(rf"(?P<module>.+?)\.(?:{'|'.join(f'(?P<p{i}>{p})' for i, p in enumerate(_PARTS))})")
# Files from before diffusers used PEFT: an attention's processor held its factors.
_OLD = re.compile(r"(?P<module>.+)\.to_(?P<which>q|k|v|out)_lora\.(?P<part>down|up)\.weight")
_UNPREFIXED = re.compile(r"(?:down_blocks|up_blocks|mid_block)\.")


class DiffusersFile(AdapterFormat):
    """What `save_lora_weights` of diffusers' pipelines writes, and trainers that follow it."""

    name = "diffusers"
    program = "diffusers"
    file_name = DIFFUSERS_NAME
    of_one_model = False

    def matches(self, place: Path) -> bool:
        """Return whether a place has one file of tensors, with names that begin with a pipeline's components."""
        path = tensor_file(place)
        return path is not None and any(_split(name) is not None for name in SafetensorsFile(path).tensors)

    def read(self, place: Path) -> StoredAdapter:
        """Open an adapter; see `AdapterFormat.read`."""
        file, modules, problems = opened(place, _split)
        configs = _configs(file)
        without = [c for c in configs if configs[c].flag("use_dora") and not any("magnitude" in p for p in modules.values())]
        problems += [f"use_dora is set for {c!r} in its metadata, and the file has no magnitudes" for c in without]

        def scaling(module: str, rank: int) -> float | None:
            component, _, inner = module.partition(".")
            return configs[component].scaling(inner, rank) if component in configs else None

        return stored(
            file, modules, problems, name=self.name, writer=_writer(file), linear_projections=None, scaling=scaling,
            base_model=next((c.base_model for c in configs.values() if c.base_model), None),
        )  # fmt: skip

    def problems(self, outgoing: OutgoingAdapter) -> list[str]:
        """Return what has no place in diffusers' file."""
        return [*of_a_pipeline(outgoing, self.program), *only_plain(outgoing, self.program, Linear, Convolution)]

    def notes(self, outgoing: OutgoingAdapter) -> list[str]:
        """Return what other programs may not read."""
        if "diffusion_model" not in outgoing.towers:
            return []
        if has_original_names(outgoing.targets):
            return [
                "Flux's fused modules are cut into diffusers' layers, each with the whole A: the same delta, a larger file."
            ]
        return [
            "the main model's modules keep the names of its original code (diffusion_model.…), as ComfyUI reads them; "
            "diffusers has names of its own for them."
        ]

    def write(self, folder: Path, outgoing: OutgoingAdapter, factors: Factors) -> dict[str, str]:
        """Write an adapter; see `AdapterFormat.write`. Factors stay as they are: scalings become alphas of the metadata."""
        if has_original_names(outgoing.targets):
            outgoing, factors = cut(outgoing, factors)
        entries = []
        for path, t in outgoing.targets.items():
            names, (a, b) = t.layout.tensor_names(path), t.layout.packed_shapes(t.rank)
            entries += [TensorEntry(names.a, t.dtype, a), TensorEntry(names.b, t.dtype, b)]
        settings = {k: v for c in outgoing.towers for k, v in _settings(outgoing.targets, c).items()}
        metadata = {**outgoing.metadata, DIFFUSERS_METADATA: json.dumps(settings, indent=2, sort_keys=True)}
        with TensorWriter(folder / self.file_name, entries, metadata) as writer:
            for module in factors:
                layout = outgoing.targets[module.target].layout
                names = layout.tensor_names(module.target)
                for name, tensor in zip((names.a, names.b), layout.pack(module.slices), strict=True):
                    writer.write(name, tensor)
        return {self.file_name: writer.sha256}


def _split(name: str) -> tuple[str, str] | None:
    """Return the module and the part of a tensor; None where the name is of another kind."""
    if _UNPREFIXED.match(name):
        name = f"unet.{name}"
    name = name.replace(".processor.", ".")
    if name.partition(".")[0] not in COMPONENTS:
        return None
    if (old := _OLD.fullmatch(name)) is not None:
        text = name.startswith("text_encoder")
        which = f"{old['which']}_proj" if text else {"out": "to_out.0"}.get(old["which"], f"to_{old['which']}")
        return with_text_model(f"{old['module']}.{which}"), {"down": "lora_A", "up": "lora_B"}[old["part"]]
    if (found := _NAME.fullmatch(name)) is None:
        return None
    part = next(part for i, part in enumerate(_PARTS.values()) if found[f"p{i}"] is not None) or found["other"]
    return with_text_model(found["module"]), part


def _configs(file: SafetensorsFile) -> dict[str, AdapterConfig]:
    """Return component → settings of PEFT, as far as the file's metadata has them.

    Raises:
        AdapterError: they cannot be read.
    """
    text = file.metadata.get(DIFFUSERS_METADATA)
    if text is None:
        return {}
    source = f"{file.path}: {DIFFUSERS_METADATA} in its metadata"
    raw = parse_json(text, source, AdapterError, constants=True)
    if not isinstance(raw, dict):
        raise AdapterError(f"{source}: expected a JSON object, found {kind_of(raw)}.")
    settings: dict[str, dict[str, Any]] = {}
    for key, value in raw.items():
        component, _, setting = key.partition(".")
        settings.setdefault(component, {})[setting] = value
    return {c: AdapterConfig.of(given, file.path) for c, given in settings.items() if c in COMPONENTS}


def _writer(file: SafetensorsFile) -> str | None:
    named = file.metadata.get("software")
    return named if named and len(named) < 100 else "diffusers" if DIFFUSERS_METADATA in file.metadata else None


def _settings(targets: Mapping[str, OutgoingTarget], component: str) -> dict[str, Any]:
    """Return the settings of PEFT for one component, under its name."""
    own = {
        p.removeprefix(f"{component}.").removeprefix("text_model."): t
        for p, t in targets.items()
        if p.startswith(f"{component}.")
    }
    if not own:
        return {}
    ranks = {path: t.rank * t.layout.rank_unit for path, t in own.items()}
    alphas = {path: alpha_of(t.scaling, ranks[path]) for path, t in own.items()}
    rank, alpha = int(most_common(ranks.values())), most_common(alphas.values())
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "target_modules": sorted(own),
    }
    return {f"{component}.{key}": value for key, value in settings.items()}


DIFFUSERS = DiffusersFile()
