"""Files of kohya's scripts and of LyCORIS: `lora_unet_down_blocks_0_….lora_down.weight`, with an alpha per module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from plait.adapters.config import alpha_of
from plait.adapters.formats.base import AdapterFormat, Factors, OutgoingAdapter, StoredAdapter, of_a_pipeline, only_plain
from plait.adapters.formats.pipelines import dotted, from_sgm, is_sdxl, to_sgm
from plait.adapters.formats.single_file import opened, stored, tensor_file
from plait.adapters.layouts import Convolution, Linear
from plait.errors import listed
from plait.tensorfiles.reader import SafetensorsFile
from plait.tensorfiles.writer import TensorEntry, TensorWriter

_NAME = re.compile(r"lora_(?P<tower>unet|te[123]?)_(?P<module>[^.]+)\.(?P<part>.+)")
_PARTS = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "lora_mid.weight": "lora_mid"}
_TOWERS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
_SGM = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_\d")
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
        file, modules, problems = opened(place, _split)
        return stored(
            file, modules, problems, name=self.name, writer=_writer(file.metadata),
            linear_projections=_has_linear_projections(file.metadata, list(modules)),
        )  # fmt: skip

    def problems(self, outgoing: OutgoingAdapter) -> list[str]:
        """Return what has no place in such a file."""
        if alone := of_a_pipeline(outgoing, self.program):
            return alone
        problems = only_plain(outgoing, self.program, Linear, Convolution)
        names = _flat_names(outgoing)
        lost = [path for path, flat in names.items() if flat is None or (_split(f"{flat}.alpha") or ("",))[0] != path]
        if lost:
            problems.append(
                f"kohya's names have underscores in place of dots, and {len(lost)} modules could not be found by theirs: "
                f"{listed(map(repr, lost), 3)}. Write it as 'diffusers'."
            )
        return problems

    def write(self, folder: Path, outgoing: OutgoingAdapter, factors: Factors) -> dict[str, str]:
        """Write an adapter; see `AdapterFormat.write`. Factors stay as they are: scalings become alphas."""
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
    part = _PARTS.get(found["part"], found["part"].removesuffix(".weight"))
    flat = found["module"]
    if found["tower"] != "unet":
        component, path = _TOWERS[found["tower"]], dotted(flat, "text_encoder")
    elif _DIT.match(flat):
        component, path = "diffusion_model", dotted(flat, "diffusion_model")
    else:
        component, path = "unet", dotted(flat, "unet")
        if path is not None and _SGM.match(flat):
            path = from_sgm(path)
    return None if path is None else (f"{component}.{path}", part)


def _flat_names(outgoing: OutgoingAdapter) -> dict[str, str | None]:
    """Return target → the beginning of its tensors' names; None where kohya's scripts have none."""
    paths = list(outgoing.targets)
    several = is_sdxl(paths) or any(p.startswith(("text_encoder_2.", "text_encoder_3.", "diffusion_model.")) for p in paths)
    unet = [p.removeprefix("unet.") for p in paths if p.startswith("unet.")]
    towers = {"text_encoder": "te1" if several else "te", "text_encoder_2": "te2", "text_encoder_3": "te3"}
    towers |= {"unet": "unet", "diffusion_model": "unet"}
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
