"""Files of kohya's scripts and of LyCORIS: `lora_unet_down_blocks_0_….lora_down.weight`, with an alpha per module."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path

from plait.adapters.config import alpha_of
from plait.adapters.formats.base import AdapterFormat, Factors, OutgoingAdapter, StoredAdapter
from plait.adapters.formats.flux import fuse, has_diffusers_names
from plait.adapters.formats.limits import of_a_pipeline, only_plain
from plait.adapters.formats.pipelines import dotted, from_sgm, is_sdxl, to_sgm
from plait.adapters.formats.single_file import opened, stored, tensor_file
from plait.adapters.layouts import Convolution, Linear
from plait.deferred import torch
from plait.errors import listed
from plait.tensorfiles.reader import SafetensorsFile
from plait.tensorfiles.writer import TensorEntry, TensorWriter

_NAME = re.compile(r"lora_(?P<tower>unet|transformer|te[123]?)_(?P<module>[^.]+)\.(?P<part>.+)")
_GIVE_BASE = ". Names of other models are resolved by the modules of a local base: give it (--base-id, base_model)"
_PARTS = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "lora_mid.weight": "lora_mid"}
_TOWERS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
_SGM = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_\d")
_WAN = re.compile(r"blocks_\d+_(?:self_attn|cross_attn|ffn_\d)|(?:text|time)_embedding_\d|time_projection_|head_head|img_emb_")
_TRANSFORMER = re.compile(r"(?:single_)?transformer_blocks_\d|blocks_\d+_(?:attn[12]|ffn_net)_")
_DIT = re.compile(
    r"(?:double_blocks|single_blocks|joint_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final_layer|[xty]_embedder|context_embedder)(?:_|$)"
)


class KohyaFile(AdapterFormat):
    """What kohya's sd-scripts and LyCORIS write, and trainers that follow them."""

    name = "kohya"
    program = "kohya's scripts"
    file_name = "lora.safetensors"
    of_one_model = False

    def matches(self, place: Path) -> bool:
        """Return whether a place has one file of tensors, with names of kohya's."""
        path = tensor_file(place)
        return path is not None and any(_NAME.fullmatch(name) for name in SafetensorsFile(path).tensors)

    def read(self, place: Path) -> StoredAdapter:
        """Open an adapter; see `AdapterFormat.read`."""
        return self._read(place, _split)

    def read_for(self, place: Path, modules: Callable[[], Collection[str]]) -> StoredAdapter:
        """Open an adapter; words that no known layout has are resolved by the base's modules."""
        known = cache(lambda: _flattened(modules()))
        return self._read(place, lambda name: _split(name) or _split_by(name, known()))

    def _read(self, place: Path, split: Callable[[str], tuple[str, str] | None]) -> StoredAdapter:
        file, modules, problems = opened(place, split, _GIVE_BASE if split is _split else "")
        return stored(
            file, modules, problems, name=self.name, writer=_writer(file.metadata),
            linear_projections=_has_linear_projections(file.metadata, list(modules)),
        )  # fmt: skip

    def problems(self, outgoing: OutgoingAdapter) -> list[str]:
        """Return what has no place in such a file."""
        if alone := of_a_pipeline(outgoing, self.program):
            return alone
        outgoing = fuse(outgoing, ())[0] if has_diffusers_names(outgoing.targets) else outgoing
        problems = only_plain(outgoing, self.program, Linear, Convolution)
        names = _flat_names(outgoing)
        lost = [path for path, flat in names.items() if flat is None or (_split(f"{flat}.alpha") or ("",))[0] != path]
        if lost:
            problems.append(
                f"kohya's names have underscores in place of dots, and {len(lost)} modules could not be found by theirs: "
                f"{listed(map(repr, lost), 3)}. Write it as 'diffusers'."
            )
        return problems

    def notes(self, outgoing: OutgoingAdapter) -> list[str]:
        """Return how an adapter changes."""
        if not has_diffusers_names(outgoing.targets):
            return []
        return [
            "Flux's layers become the fused modules of its original code, as kohya's scripts have them: the ranks of query, "
            "key and value add up, the delta is the same."
        ]

    def write(self, folder: Path, outgoing: OutgoingAdapter, factors: Factors) -> dict[str, str]:
        """Write an adapter; see `AdapterFormat.write`. Factors stay as they are: scalings become alphas."""
        if has_diffusers_names(outgoing.targets):
            outgoing, factors = fuse(outgoing, factors)
        names = _flat_names(outgoing)
        entries, alphas = [], {}
        for path, t in outgoing.targets.items():
            a, b = t.layout.packed_shapes(t.rank)
            alpha = torch.tensor(alpha_of(t.scaling, t.rank), dtype=torch.float64)
            alphas[path] = alpha.float() if alpha.float().double() == alpha else alpha
            entries += [
                TensorEntry(f"{names[path]}.lora_down.weight", t.dtype, a),
                TensorEntry(f"{names[path]}.lora_up.weight", t.dtype, b),
            ]
            entries.append(TensorEntry(f"{names[path]}.alpha", alphas[path].dtype, ()))
        with TensorWriter(folder / self.file_name, entries, outgoing.metadata) as writer:
            for module in factors:
                name = names[module.target]
                a_, b_ = outgoing.targets[module.target].layout.pack(module.slices)
                writer.write(f"{name}.lora_down.weight", a_)
                writer.write(f"{name}.lora_up.weight", b_)
                writer.write(f"{name}.alpha", alphas[module.target])
        return {self.file_name: writer.sha256}


def _split(name: str) -> tuple[str, str] | None:
    """Return the module and the part of a tensor; None where the name is of another kind, or a word in it is not known."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    flat = found["module"]
    if found["tower"] == "transformer" or _TRANSFORMER.match(flat):
        component, path = "transformer", dotted(flat, "transformer")
    elif found["tower"] != "unet":
        component, path = _TOWERS[found["tower"]], dotted(flat, "text_encoder")
    elif _DIT.match(flat) or _WAN.match(flat):
        component, path = "diffusion_model", dotted(flat, "diffusion_model")
    else:
        component, path = "unet", dotted(flat, "unet")
        if path is not None and _SGM.match(flat):
            path = from_sgm(path)
    return None if path is None else (f"{component}.{path}", _part(found["part"]))


def _flattened(modules: Collection[str]) -> dict[tuple[str, str], str]:
    """Return (tower, path with underscores) → path, where only one module has them."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in modules:
        component, _, inner = path.partition(".")
        found.setdefault((component if component.startswith("text_encoder") else "", inner.replace(".", "_")), []).append(path)
    return {flat: paths[0] for flat, paths in found.items() if len(paths) == 1}


def _split_by(name: str, modules: Mapping[tuple[str, str], str]) -> tuple[str, str] | None:
    """Return the module and the part of a tensor by the base's modules; None where it has none of that name."""
    if (found := _NAME.fullmatch(name)) is None:
        return None
    path = modules.get((_TOWERS.get(found["tower"], ""), found["module"]))
    return None if path is None else (path, _part(found["part"]))


def _part(name: str) -> str:
    return _PARTS.get(name, name.removesuffix(".weight"))


def _flat_names(outgoing: OutgoingAdapter) -> dict[str, str | None]:
    """Return target → the beginning of its tensors' names; None where kohya's scripts have none."""
    paths = list(outgoing.targets)
    several = is_sdxl(paths) or any(
        p.startswith(("text_encoder_2.", "text_encoder_3.", "diffusion_model.", "transformer.")) for p in paths
    )
    unet = [p.removeprefix("unet.") for p in paths if p.startswith("unet.")]
    towers = {"text_encoder": "te1" if several else "te", "text_encoder_2": "te2", "text_encoder_3": "te3"}
    towers |= {"unet": "unet", "diffusion_model": "unet", "transformer": "unet"}
    names: dict[str, str | None] = {}
    for path in paths:
        component, _, inner = path.partition(".")
        original = to_sgm(inner, unet) if component == "unet" and is_sdxl(paths) else inner
        known = original is not None and component in towers
        names[path] = f"lora_{towers[component]}_{original.replace('.', '_')}" if known and original is not None else None
    return names


def _has_linear_projections(metadata: Mapping[str, str], modules: list[str]) -> bool | None:
    version = metadata.get("ss_base_model_version", "")
    if version.startswith("sdxl") or metadata.get("ss_v2") == "True" or is_sdxl(modules):
        return True
    return False if version.startswith("sd_v1") else None


def _writer(metadata: Mapping[str, str]) -> str | None:
    """Return the program that wrote a file, as far as its metadata tells."""
    module = metadata.get("ss_network_module")
    if module is None:
        return metadata.get("modelspec.implementation")
    version = metadata.get("ss_sd_scripts_commit_hash") or metadata.get("ss_training_comment")
    known = {"networks.lora": "kohya's sd-scripts", "lycoris.kohya": "LyCORIS"}
    return known.get(module, module) + (f" ({version[:12]})" if version and re.fullmatch(r"[0-9a-f]{7,40}", version) else "")


KOHYA = KohyaFile()
