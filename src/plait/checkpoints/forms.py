"""In which form a base model lies on disk: a folder of transformers, a pipeline of diffusers, or one file of the original code.

A form knows which files hold tensors, and where the parameters are that adapters name. Reading, planning and writing know
tensors alone, under names that are one each: those of a pipeline begin with their component.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from plait.adapters.formats.flux import SWAPPED, diffusers_paths, original_place, piece_rows
from plait.adapters.formats.pipelines import to_sgm
from plait.checkpoints.architecture import Part
from plait.checkpoints.files import INDEX, SINGLE, WeightFiles, find_weights, index_name, read_index
from plait.errors import AdapterError, collect, listed
from plait.hub.download import Located
from plait.hub.pipelines import PIPELINE_INDEX, WeightName, chosen_weights
from plait.parsing import is_there, read_object
from plait.tensorfiles.formats import TENSOR_FORMATS
from plait.tensorfiles.header import TensorInfo
from plait.tensorfiles.reader import SafetensorsFile

_MAIN = "model.diffusion_model."
_CLIP = "text_model.encoder.layers."
_RESBLOCK = re.compile(r"text_model\.encoder\.layers\.(?P<number>[0-9]{1,4})\.(?P<rest>.+)")
# text encoders of original checkpoints → where their tensors begin; those of OpenCLIP's code have names of its own
_TEXT = {
    "text_encoder": (
        "cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": (
        "conditioner.embedders.1.model.", "conditioner.embedders.0.model.", "text_encoders.clip_g.transformer.",
        "text_encoders.t5xxl.transformer.",
    ),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.",),
}  # fmt: skip
_OPENCLIP = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_FUSED = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
_KNOWN = (_MAIN, "double_blocks.", "single_blocks.", *(prefix for prefixes in _TEXT.values() for prefix in prefixes))

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class WeightSet:
    """Files of tensors that belong to one model.

    Attributes:
        folder: that they are in.
        files: their names.
        component: of a pipeline; empty for a model by itself.
    """

    folder: Path
    files: WeightFiles
    component: str = ""

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with in the checkpoint, and not in their files."""
        return f"{self.component}." if self.component else ""

    @property
    def place(self) -> str:
        """Its folder in the base's, as the beginning of a file's name."""
        return f"{self.component}/" if self.component else ""


@dataclass(frozen=True)
class BaseForm(ABC):
    """How a base model lies on disk.

    Attributes:
        folder: of the base model.
        sets: its files of tensors.
    """

    folder: Path
    sets: tuple[WeightSet, ...]

    kind: ClassVar[str]  #: in plans
    library: ClassVar[str]  #: that loads it, as the Hub calls it
    has_code: ClassVar[bool] = False  #: one class of transformers is its code, which can be asked for names, ties and labels

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the whole; empty where it has none."""
        return {}

    @abstractmethod
    def parts(self, parameter: str, tensors: Infos) -> tuple[Part, ...]:
        """Return the tensors that a parameter is made of, by their names alone; none where it is not there.

        Args:
            parameter: as an adapter names it.
            tensors: of the checkpoint.
        """

    def why_not(self, parameter: str) -> str:
        """Report why a parameter has no tensor."""
        return "no tensor has its name"

    def module_of(self, tensor: str) -> str | None:
        """Return the module that a weight belongs to, as adapters of pipelines name it; None for what they do not name."""
        return None

    @property
    def loading(self) -> str | None:
        """Code that loads it, for a card; None where that depends on more than the form."""
        return None


@dataclass(frozen=True)
class ModelFolder(BaseForm):
    """A folder of transformers: `config.json` and one model's tensors."""

    kind = "model"
    library = "transformers"
    has_code = True

    def parts(self, parameter: str, tensors: Infos) -> tuple[Part, ...]:
        """Return the tensor of the same name."""
        return (Part(parameter),) if parameter in tensors else ()


@dataclass(frozen=True)
class PipelineFolder(BaseForm):
    """A pipeline of diffusers: `model_index.json`, and a folder per component.

    Attributes:
        index: `model_index.json`.
        others: component → its files of tensors that are not read: second copies, and other formats.
    """

    index: Mapping[str, Any] = field(repr=False)
    others: Mapping[str, tuple[str, ...]] = field(repr=False)

    kind = "pipeline"
    library = "diffusers"

    @property
    def config(self) -> Mapping[str, Any]:
        """`model_index.json`."""
        return self.index

    def parts(self, parameter: str, tensors: Infos) -> tuple[Part, ...]:
        """Return the tensor of that name in its component, or those that a module of Flux's original code is cut into."""
        named = (
            parameter,
            parameter.replace(".text_model.", ".", 1),
            re.sub(r"^(text_encoder\w*)\.", r"\1.text_model.", parameter),
        )
        found = next((name for name in named if name in tensors), None)
        if found is not None:
            return (Part(found),)
        component, _, path = parameter.partition(".")
        if component != "diffusion_model":
            return ()
        module, _, leaf = path.rpartition(".")
        if module == SWAPPED[0]:
            return _halves(f"transformer.{SWAPPED[1]}.{leaf}", tensors)
        names = [f"transformer.{p}.{leaf}" for p in diffusers_paths(module)]
        if not names or any(name not in tensors for name in names):
            return ()
        starts = [sum(tensors[n].shape[0] for n in names[:i]) for i in range(len(names))]
        return tuple(Part(name, start=start) for name, start in zip(names, starts, strict=True))

    def module_of(self, tensor: str) -> str | None:
        """Return component and module."""
        return tensor.removesuffix(".weight") if tensor.endswith(".weight") else None

    def why_not(self, parameter: str) -> str:
        """Report why a parameter has no tensor."""
        component = parameter.partition(".")[0]
        component = "transformer" if component == "diffusion_model" else component
        if component in {s.component for s in self.sets}:
            return f"no tensor of {component}/ has its name"
        if component in self.others:
            return (
                f"{component}/ holds {listed(self.others[component], 3)}, and no safetensors. Convert it first: "
                "DiffusionPipeline.from_pretrained(…).save_pretrained(…)"
            )
        return f"the pipeline has no {component}/ with weights"

    @property
    def loading(self) -> str | None:
        """Code for diffusers."""
        variant = next((v for s in self.sets if (v := WeightName.of(s.files.names[0]).variant)), None)
        more = "" if variant is None else f", variant={variant!r}"
        return f'from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained("PATH_OR_REPO"{more})'


@dataclass(frozen=True)
class SingleFile(BaseForm):
    """One `.safetensors` of SD 1, SD 2, SDXL or Flux under the names of their original code."""

    kind = "single file"
    library = "diffusers"

    def parts(self, parameter: str, tensors: Infos) -> tuple[Part, ...]:
        """Return the tensor, or the rows of a fused one, that hold a parameter that diffusers' code has."""
        component, _, path = parameter.partition(".")
        module, _, leaf = path.rpartition(".")
        if component in _TEXT:
            found = (_text_parts(prefix, module, leaf, tensors) for prefix in _TEXT[component])
            return next(filter(None, found), ())
        main = _MAIN if any(name.startswith(_MAIN) for name in tensors) else ""
        if component == "diffusion_model":
            return (Part(name),) if (name := f"{main}{path}") in tensors else ()
        if component == "transformer":
            return _flux_parts(main, module, leaf, tensors)
        names = (f"{main}{path}.{leaf}" for path in _sgm_paths(module)) if component == "unet" else iter(())
        return next(((Part(name),) for name in names if name in tensors), ())

    def module_of(self, tensor: str) -> str | None:
        """Return the module of the main model, under the names of its original code."""
        own = tensor.endswith(".weight") and not tensor.startswith(tuple(p for ps in _TEXT.values() for p in ps))
        return f"diffusion_model.{tensor.removeprefix(_MAIN).removesuffix('.weight')}" if own else None

    def why_not(self, parameter: str) -> str:
        """Report why a parameter has no tensor."""
        return "the file has no tensor for it under the names of SD 1, SD 2, SDXL or Flux"


def base_form(located: Located) -> BaseForm:
    """Return the form of a base model.

    Raises:
        AdapterError: it is of none that is known, or files that it names are not there.
    """
    folder = located.folder
    if located.file is not None:
        return _single_file(folder, located.file)
    if is_there(folder / PIPELINE_INDEX, AdapterError):
        return _pipeline(folder)
    weights = find_weights(folder)
    if weights is not None:
        return ModelFolder(folder, (WeightSet(folder, weights),))
    found = sorted(p.name for p in folder.iterdir())
    files = [name for name in found if name.endswith(SafetensorsFile.suffix)]
    if len(files) == 1 and not {"config.json", "adapter_config.json"} & set(found) and is_original(folder / files[0]):
        return _single_file(folder, files[0])
    raise AdapterError(_no_weights(folder, found))


def is_original(path: Path) -> bool:
    """Return whether a file is a checkpoint of an original code that is known."""
    return any(name.startswith(_KNOWN) for name in SafetensorsFile(path).tensors)


def _single_file(folder: Path, name: str) -> SingleFile:
    if not is_original(folder / name):
        first = next(iter(SafetensorsFile(folder / name).tensors), None)
        raise AdapterError(
            f"{folder / name}: its tensors are called {first!r}, …; a base model of one file is SD 1, SD 2, SDXL or Flux under "
            "the names of their original code (model.diffusion_model.…, double_blocks.…). Give the folder of its pipeline, "
            "or of its model."
        )
    return SingleFile(folder, (WeightSet(folder, WeightFiles((name,), None, None, {})),))


def _pipeline(folder: Path) -> PipelineFolder:
    """Find the files of every component.

    Raises:
        AdapterError: `model_index.json` cannot be read; a component is not there; no component has tensors.
    """
    index = read_object(folder / PIPELINE_INDEX, AdapterError, advice="Fetch the base model again.")
    components = [
        n for n, what in index.items() if isinstance(what, list) and any(what) and "/" not in n and n not in ("", "..")
    ]
    missing = [n for n in components if not (folder / n).is_dir()]
    collect(
        AdapterError, [f"{folder / n}: named by {PIPELINE_INDEX}, and not there." for n in missing], f"{folder}: not complete"
    )
    sets, others = [], {}
    for name in components:
        held = sorted(p.name for p in (folder / name).iterdir() if not p.is_dir())
        chosen = chosen_weights(held)
        files = _component_files(folder / name, held, chosen) if chosen else WeightFiles((), None, None, {})
        others[name] = tuple(n for n in held if is_weight_file(n) and n not in (*chosen, files.index_name))
        if chosen:
            sets.append(WeightSet(folder / name, files, name))
    if not sets:
        raise AdapterError(
            f"{folder}: no component of this pipeline has its weights as safetensors. Save it so: "
            "DiffusionPipeline.from_pretrained(…).save_pretrained(…)."
        )
    return PipelineFolder(folder, tuple(sets), index, {n: files for n, files in others.items() if files})


def is_weight_file(name: str) -> bool:
    """Return whether a file of a component holds its weights, in whichever format, or lists such files."""
    return name.endswith(
        (".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".pt", ".ckpt", ".gguf")
    ) or bool(re.search(r"\.index(\.\w+)?\.json$", name))


def _component_files(folder: Path, held: Sequence[str], chosen: Sequence[str]) -> WeightFiles:
    index = WeightName.of(chosen[0]).index_name
    if index not in held:
        return WeightFiles(tuple(chosen), None, None, {})
    listing, home = read_index(folder / index)
    return WeightFiles(tuple(sorted(set(home.values()))), index, listing, home)


def _no_weights(folder: Path, found: Sequence[str]) -> str:
    hint = " It holds an adapter; give the base model." if "adapter_config.json" in found else ""
    other = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
    if other:
        # transformers dequantizes GGUF on loading, but saves what it made of it only on request
        gguf = f", gguf_file={other[0]!r}, quantization_config=GgufConfig(dequantize=True)" * other[0].endswith(".gguf")
        hint = f" It holds {other[0]}; convert it first: transformers' from_pretrained(…{gguf}), then save_pretrained."
    others = [name for kind in TENSOR_FORMATS[1:] for name in (kind.model_name, index_name(kind.model_name))]
    return f"{folder}: neither {SINGLE} nor {INDEX} is here, nor {' or '.join([*others, PIPELINE_INDEX])}.{hint}"


def _sgm_paths(module: str) -> Iterator[str]:
    """Yield the names that the original code may have for a module of a UNet: an upsampler follows an attention or does not."""
    block = module.partition(".attentions.")[0].partition(".upsamplers.")[0]
    for others in ((), (f"{block}.attentions.0",)):
        if (path := to_sgm(module, others)) is not None:
            yield path


def _text_parts(prefix: str, module: str, leaf: str, tensors: Infos) -> tuple[Part, ...]:
    for path in (module, module.removeprefix("text_model.")):
        if (name := f"{prefix}{path}.{leaf}") in tensors:
            return (Part(name),)
    found = _RESBLOCK.fullmatch(module)
    if found is None:
        return ()
    block = f"{prefix}transformer.resblocks.{found['number']}."
    if found["rest"] in _FUSED:
        return _piece(f"{block}attn.in_proj_{leaf}", _FUSED[found["rest"]], 3, tensors)
    name = f"{block}{_OPENCLIP.get(found['rest'], found['rest'])}.{leaf}"
    return (Part(name),) if name in tensors else ()


def _flux_parts(main: str, module: str, leaf: str, tensors: Infos) -> tuple[Part, ...]:
    if module == SWAPPED[1]:
        return _halves(f"{main}{SWAPPED[0]}.{leaf}", tensors)
    place = original_place(module)
    return () if place is None else _piece(f"{main}{place.module}.{leaf}", place.piece, place.pieces, tensors)


def _piece(name: str, piece: int, pieces: int, tensors: Infos) -> tuple[Part, ...]:
    """Return the rows of one of several matrices that are stored below each other."""
    if name not in tensors:
        return ()
    if pieces == 1:
        return (Part(name),)
    rows = piece_rows(pieces, tensors[name].shape[0], tensors[name].shape[-1])
    if sum(rows) != tensors[name].shape[0]:
        return ()
    return (Part(name, row=sum(rows[:piece]), rows=rows[piece]),)


def _halves(name: str, tensors: Infos) -> tuple[Part, ...]:
    """Return the halves of a tensor whose order is the other one in the adapter's module."""
    if name not in tensors:
        return ()
    half = tensors[name].shape[0] // 2
    return Part(name, row=half, rows=half), Part(name, start=half, rows=half)
