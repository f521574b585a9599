"""PEFT's folder: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from plait.adapters.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig, subfolders_with
from plait.adapters.contents import other_files
from plait.adapters.formats.base import AdapterFormat, Factors, Origin, OutgoingAdapter, StoredAdapter
from plait.adapters.formats.limits import of_one_model
from plait.adapters.formats.views import TranslatedFile, View, same
from plait.adapters.names import clean_settings, foreign_tensors, parse_lora_name
from plait.adapters.writing import AdapterWriter
from plait.errors import AdapterError, join_words, listed
from plait.parsing import is_there, read_object, shown
from plait.tensorfiles.formats import TENSOR_FORMATS
from plait.tensorfiles.gguf import GgufFile
from plait.tensorfiles.reader import SafetensorsFile, TensorFile

_MLX_FILE = "adapters.safetensors"
_SUFFIXES = (SafetensorsFile.suffix, GgufFile.suffix)
_INDEX = f"{ADAPTER_WEIGHTS}.index.json"
_SHARD = re.compile(r"adapter_model-(\d{1,6})-of-(\d{1,6})\.safetensors")


class PeftFolder(AdapterFormat):
    """What `save_pretrained` of PEFT writes."""

    name = "peft"
    program = "PEFT"
    file_name = ADAPTER_WEIGHTS

    def matches(self, place: Path) -> bool:
        """Return whether a folder has a tensor file of PEFT's name."""
        return place.is_dir() and (_has_one_file(place) or bool(_shards(place)))

    def read(self, place: Path) -> StoredAdapter:
        """Open an adapter; see `AdapterFormat.read`."""
        if place.is_file():
            place = _folder_of(place)
        config = AdapterConfig.read(place / ADAPTER_CONFIG)
        if "lora_parameters" in config.raw and "peft_type" not in config.raw:
            if not _has_one_file(place) and not _shards(place):
                there = listed(sorted(p.name for p in place.iterdir()))
                instead = other_files(place) or f"The folder holds {there}: call the file that counts adapters.safetensors."
                raise AdapterError(f"{config.path}: of mlx-lm, and there is no adapters.safetensors next to it. {instead}")
            raise AdapterError(
                f"{config.path}: of mlx-lm, and the tensors next to it are PEFT's, whose scaling it does not hold. Keep the "
                "files of one program in a folder."
            )
        config = replace(config, raw=clean_settings(config.raw))
        shards = [] if _has_one_file(place) else _shards(place)
        file = _joined(shards) if shards else _open_file(place)
        version = config.raw.get("peft_version")
        writer = f"PEFT {version}" if version else None
        others = () if shards else _shards(place)
        notes = [f"{file.path} is read, and not {listed(p.name for p in others)} next to it."] * bool(others)
        origin = Origin(format=self.name, writer=writer, notes=tuple(notes))
        return StoredAdapter(config, file, origin, (*(shards or [file.path]), config.path))

    def problems(self, outgoing: OutgoingAdapter) -> list[str]:
        """Return what has no place in a folder of PEFT's."""
        return of_one_model(outgoing, self.program)

    def write(self, folder: Path, outgoing: OutgoingAdapter, factors: Factors) -> dict[str, str]:
        """Write an adapter; see `AdapterFormat.write`. Factors stay as they are: scalings become alphas."""
        targets = outgoing.targets
        writer = AdapterWriter(
            {path: t.layout for path, t in targets.items()},
            {path: t.rank for path, t in targets.items()},
            dtype={path: t.dtype for path, t in targets.items()},
            uniform=False,
            scalings={path: t.scaling for path, t in targets.items()},
            has_bias=any(t.has_bias for t in targets.values()),
            is_dora=any(t.is_dora for t in targets.values()),
        )
        tensors = (writer.tensors(m.target, m.slices, bias=m.bias, magnitude=m.magnitude) for m in factors)
        return writer.write(folder, tensors, writer.config(outgoing.settings))


def _has_one_file(folder: Path) -> bool:
    return any((folder / kind.adapter_name).is_file() for kind in TENSOR_FORMATS)


def _shards(folder: Path) -> list[Path]:
    """Return the numbered files of an adapter that was saved in several, in order."""
    return sorted(p for p in folder.glob("adapter_model-*-of-*.safetensors") if _SHARD.fullmatch(p.name))


def _joined(shards: list[Path]) -> TensorFile:
    """Return several files as one.

    Raises:
        AdapterError: some of them are missing, or have a tensor in common.
    """
    counts = {name[2] for p in shards if (name := _SHARD.fullmatch(p.name))}
    there = {int(name[1]) for p in shards if (name := _SHARD.fullmatch(p.name))}
    wanted = int(max(counts))
    folder = shards[0].parent
    if len(counts) > 1:
        raise AdapterError(
            f"{folder}: numbered files of several adapters ({', '.join(p.name for p in shards)}). Keep those of one."
        )
    if more := sorted(there - {*range(1, wanted + 1)}):
        raise AdapterError(
            f"{folder}: a numbered file {listed(map(str, more))} of {wanted}: they are not of one adapter. Keep "
            "the files of one."
        )
    if missing := sorted({*range(1, wanted + 1)} - there):
        names = listed(f"adapter_model-{number:0{len(max(counts))}}-of-{max(counts)}.safetensors" for number in missing)
        verb, what = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise AdapterError(f"{folder}: an adapter in several files, of which {names} {verb} missing. Fetch {what} too.")
    views: dict[str, View] = {}
    for file in map(SafetensorsFile, shards):
        if twice := views.keys() & file.tensors.keys():
            raise AdapterError(f"{file.path}: {min(twice)!r} is in another of the numbered files too. Fetch the files again.")
        views |= {name: same(file, name) for name in file.tensors}
    _check_index(folder / _INDEX, views)
    return TranslatedFile(shards[0], views)


def _check_index(path: Path, tensors: Collection[str]) -> None:
    """Make sure that numbered files hold all that their index names, where there is one; in which of them counts for nothing.

    Raises:
        AdapterError: some are missing, or the index cannot be read.
    """
    if not is_there(path, AdapterError):
        return
    named = read_object(path, AdapterError).get("weight_map")
    if not isinstance(named, dict):
        raise AdapterError(f"{path}: weight_map is {shown(named)}; it must map names of tensors to files. Fetch it again.")
    if lost := sorted(named.keys() - {*tensors}):
        raise AdapterError(
            f"{path}: it names {len(lost)} tensors that no numbered file holds: {listed(map(repr, lost), 3)}. Fetch the files "
            "again, or delete the index where it is another adapter's."
        )


def _folder_of(file: Path) -> Path:
    """Return the folder that a file of PEFT's belongs to.

    Raises:
        AdapterError: it belongs to none, or is of no known format.
    """
    if any(file.name == kind.adapter_name for kind in TENSOR_FORMATS) and (file.parent / ADAPTER_CONFIG).is_file():
        return file.parent
    if file.name == ADAPTER_CONFIG or (file.name == _MLX_FILE and (file.parent / ADAPTER_CONFIG).is_file()):
        raise AdapterError(f"{file}: one file of an adapter that is a folder. Give the folder, {file.parent}.")
    if file.suffix not in _SUFFIXES:
        raise AdapterError(
            f"{file}: not a file that plait reads adapters from, by its name: those end in {join_words(_SUFFIXES, 'or')}, and "
            f"others are in a folder with {ADAPTER_CONFIG}."
        )
    names = list(SafetensorsFile(file).tensors) if file.suffix == SafetensorsFile.suffix else []
    if any(parse_lora_name(name) for name in names):
        raise AdapterError(
            f"{file}: factors under PEFT's names, whose scaling is in {ADAPTER_CONFIG}. Put that next to them, call the file "
            f"{ADAPTER_WEIGHTS}, and give the folder."
        )
    what = "; ".join(foreign_tensors(names)) or f"tensors such as {listed(map(repr, names), 3) or 'none'}"
    raise AdapterError(f"{file}: of no format of adapters that is known; it holds {what}. docs/formats.md lists them.")


def _open_file(folder: Path) -> TensorFile:
    for kind in TENSOR_FORMATS:
        if is_there(folder / kind.adapter_name, AdapterError):
            return kind(folder / kind.adapter_name)
    below = dict.fromkeys(place for kind in TENSOR_FORMATS for place in subfolders_with(folder, kind.adapter_name))
    elsewhere = f"It has them in {listed(below, 8)}: name one of these subfolders." if below else ""
    instead = other_files(folder) or elsewhere or "Was the download cut short?"
    others = " or ".join(kind.adapter_name for kind in TENSOR_FORMATS[1:])
    raise AdapterError(f"{folder / ADAPTER_WEIGHTS}: no such file, and no {others} either. {instead}")


PEFT = PeftFolder()
