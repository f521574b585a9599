"""What belongs to a model besides its weights: configuration, tokenizer, templates, code, license."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from plait.baking.changes import Placement
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.checkpoints.files import INDEX, MODEL_CONFIG, architectures, read_config
from plait.checkpoints.forms import PipelineFolder, is_weight_file
from plait.errors import AdapterError, collect, listed
from plait.folders import OutsideError, entries, file_in, file_name_problem, open_in
from plait.hub.pretrained import json_problem
from plait.libraries.peft import LABELED_TASKS, TASK_HEADS
from plait.libraries.transformers.layers import LABEL_LAYERS
from plait.merging.inventory import Inventory
from plait.tensorfiles.formats import TENSOR_FORMATS

_TOKENIZER = (
    "added_tokens.json",
    "chat_template.*",
    "merges.txt",
    "*.tiktoken",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "vocab.*",
)
_WEIGHTS = (
    *(f"*{kind.suffix}" for kind in TENSOR_FORMATS),
    "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.npz",
    "*.index.json",
)  # fmt: skip
# the card, and what plait itself, an adapter or a training left there
_OWN = (
    "README.md", ".*", "plait.lock", "merge_metadata.json", "summary.json", "adapter_config.json", "trainer_state.json",
    "training_args.*", "training.json", "*_results.json", "*.log", "events.out.tfevents.*",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"  # a folder next to the tokenizer
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class AuxiliaryFiles:
    """Files that are copied with the weights.

    Attributes:
        files: name → the file that is copied.
        texts: name → what is written.
        origins: name → where it comes from, in words.
        notes: what is worth knowing.
    """

    files: Mapping[str, Path] = field(repr=False)
    texts: Mapping[str, str] = field(repr=False)
    origins: dict[str, str]
    notes: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Put everything into a folder."""
        for name, path in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open_in(path.parent, path.name) as source, (folder / name).open("xb") as target:
                shutil.copyfileobj(source, target)
        for name, text in self.texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")

    def digests(self) -> dict[str, str]:
        """Return name → sha256 of what is written."""
        files = {name: _digest(path) for name, path in self.files.items()}
        return files | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts.items()}


def gather_auxiliary_files(
    checkpoint: BaseCheckpoint,
    inventory: Inventory,
    placement: Placement,
    dtype: str | None,
    index: Mapping[str, Any] | None,
) -> AuxiliaryFiles:
    """Decide which files are copied with the weights.

    The base's files do, but for weights and its card; an adapter's tokenizer takes the place of the base's where it differs.

    Raises:
        AdapterError: one is not a file of its folder, or is called JSON and cannot be read.
    """
    if isinstance(checkpoint.form, PipelineFolder):
        return _of_pipeline(checkpoint, checkpoint.form, placement, dtype)
    if not checkpoint.form.has_code:  # one file, whose neighbors are not its own
        return AuxiliaryFiles({}, {}, {}, ())
    files = {p.name: p for p in _copied(checkpoint.folder) if not _matches(p.name, (*_WEIGHTS, *_OWN))}
    files |= _further_templates(checkpoint.folder)
    own = [a for a in inventory.adapters if not a.is_one_file]
    brought = {
        a.name: {p.name: p for p in _copied(a.folder) if _matches(p.name, _TOKENIZER)} | _further_templates(a.folder)
        for a in own
    }
    _check_contained([(checkpoint.folder, files), *((a.folder, brought[a.name]) for a in own)])
    tokenizer, left, notes = _tokenizer(brought, files)
    files = {name: path for name, path in files.items() if name not in left}
    described = dict.fromkeys(files, "base")
    files |= {name: path for name, (_, path) in tokenizer.items()}
    described |= {name: f"adapter {owner}" for name, (owner, _) in tokenizer.items()}
    _check_json(files.values())
    texts = {}
    config = _config(checkpoint, inventory, placement, dtype)
    if config != checkpoint.config:
        files.pop(MODEL_CONFIG, None)
        texts[MODEL_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        described[MODEL_CONFIG] = "base, changed"
    if index is not None:
        texts[INDEX] = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        described[INDEX] = "new"
    return AuxiliaryFiles(files, texts, dict(sorted(described.items())), tuple(notes))


def _of_pipeline(checkpoint: BaseCheckpoint, form: PipelineFolder, placement: Placement, dtype: str | None) -> AuxiliaryFiles:
    """Carry everything of a pipeline but what is read as weights, and further copies of what is changed."""
    read = {shard.source for shard in checkpoint.shards}
    changed = set(checkpoint.home) if dtype is not None else set(placement.changes)
    touched = {s.component for s in form.sets if any(name.startswith(s.prefix) for name in changed)}
    left = {f"{c}/{n}" for c in touched for n in form.others.get(c, ())}
    files, top = {}, []
    for name in sorted(entries(form.folder)):
        if name in read or name in left or any(part.startswith(".") for part in name.split("/")) or file_name_problem(name):
            continue
        if "/" not in name and _matches(name, (*_WEIGHTS, *_OWN)):
            top += [name] if is_weight_file(name) else []
            continue
        files[name] = form.folder / name
    _check_contained([(form.folder, files)])
    _check_json(files.values())
    texts = {}
    for part in form.sets if dtype is not None else ():
        config = dict(read_config(part.folder))
        if stated := [key for key in _DTYPE_KEYS if key in config]:
            texts[f"{part.place}{MODEL_CONFIG}"] = config | dict.fromkeys(stated, dtype)
        if part.files.index_name is not None and part.files.listing is not None:
            size = sum(checkpoint.info(n).nbytes for n in checkpoint.home if n.startswith(part.prefix))
            texts[f"{part.place}{part.files.index_name}"] = dict(part.files.listing) | {"metadata": {"total_size": size}}
    written = {name: json.dumps(text, indent=2, ensure_ascii=False) + "\n" for name, text in texts.items()}
    origins = dict.fromkeys(files, "base") | dict.fromkeys(written, "base, changed")
    files = {name: path for name, path in files.items() if name not in written}
    notes = []
    if lost := sorted(left | set(top)):
        notes.append(f"further copies of the weights are not carried, since they would be without the merge: {listed(lost)}.")
    return AuxiliaryFiles(files, written, dict(sorted(origins.items())), tuple(notes))


def _copied(folder: Path) -> list[Path]:
    """Return what a folder holds at its top but for folders, by names that a result can have.

    A folder called as a file is (`tokenizer.json`) is among it, to be refused.
    """
    found = (p for p in sorted(folder.iterdir()) if p.suffix == ".json" or not p.is_dir())
    return [p for p in found if not file_name_problem(p.name)]


def _further_templates(folder: Path) -> dict[str, Path]:
    """Return the chat templates that transformers reads besides the first, by their names in its folder."""
    found = sorted((folder / _TEMPLATES).glob("*.jinja"))
    return {f"{_TEMPLATES}/{p.name}": p for p in found if not file_name_problem(p.name)}


def _check_contained(found: Iterable[tuple[Path, Mapping[str, Path]]]) -> None:
    """Refuse what is not a file of its folder: a result holds copies, and may be published.

    Args:
        found: folders, and name there → file.

    Raises:
        AdapterError: with all of them.
    """
    problems = []
    for folder, name, path in ((folder, name, path) for folder, files in found for name, path in files.items()):
        try:
            file_in(folder, name)
            file_in(path.parent, path.name)  # as it is opened
        except FileNotFoundError:
            problems.append(f"{path}: a link that leads nowhere. Delete it, or put the file itself there.")
        except OutsideError as error:
            problems.append(
                f"{path}: {error}. A baked model holds a copy of this file: put the file itself there, or delete it."
            )
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror or error}).")
    collect(AdapterError, problems, "files that must be copied cannot be read")


def _check_json(paths: Iterable[Path]) -> None:
    """Refuse JSON that cannot be read: a model with a copy of it could not be loaded, or would be without what it says.

    Raises:
        AdapterError: with all of them.
    """
    found = ((path, json_problem(path)) for path in paths if path.suffix == ".json")
    problems = [f"{path.parent / problem}. Fetch it again, or delete it." for path, problem in found if problem]
    collect(AdapterError, problems, "files that must be copied are damaged")


def _tokenizer(
    brought: Mapping[str, Mapping[str, Path]], base: Mapping[str, Path]
) -> tuple[dict[str, tuple[str, Path]], list[str], list[str]]:
    """Return name → (adapter, file) of tokenizer files that are not the base's; those of the base that go; and notes.

    The base's further templates go with its tokenizer.
    When adapters bring tokenizers that differ from each other, none of them is the merged model's: the base's stays.
    """
    carriers = {name: files for name, files in brought.items() if files}
    different: dict[str, tuple[str, Path]] = {}
    for file in sorted({f for files in carriers.values() for f in files}):
        owners = {name: files[file] for name, files in carriers.items() if file in files}
        digests = {_digest(path) for path in owners.values()}
        if len(digests) > 1:
            note = (
                f"the adapters bring different tokenizers ({file} of {', '.join(owners)}): the base's is kept. To have one of "
                "theirs, copy its tokenizer files into the result."
            )
            return {}, [], [note]
        name, path = next(iter(owners.items()))
        if file not in base or _digest(base[file]) not in digests:
            different[file] = (name, path)
    if not different:
        return {}, [], []
    owner = next(iter(different.values()))[0]
    notes = [f"the tokenizer is that of {owner}; it differs from the base's in {', '.join(different)}."]
    kept = set().union(*carriers.values())
    left = [name for name in base if name.startswith(f"{_TEMPLATES}/") and name not in kept]
    if left:
        notes.append(f"chat templates of the base that {owner} does not have are not carried: {', '.join(left)}.")
    return different, left, notes


def _config(checkpoint: BaseCheckpoint, inventory: Inventory, placement: Placement, dtype: str | None) -> Mapping[str, Any]:
    """Return the model's configuration: the base's, with what the bake makes untrue changed."""
    config: dict[str, Any] = json.loads(json.dumps(checkpoint.config))
    parts = [config] + [v for v in config.values() if isinstance(v, dict)]
    if dtype is not None:
        for part in parts:
            part.update({key: dtype for key in _DTYPE_KEYS if key in part})
        if config and not any(key in config for key in _DTYPE_KEYS):
            config["torch_dtype"] = dtype
    if any(not shard.is_plain for shard in checkpoint.shards):
        for part in parts:
            part.pop("quantization_config", None)
    if placement.untied:
        config["tie_word_embeddings"] = False
        for part in parts:
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    _resize(config, checkpoint, placement)
    _set_head(config, inventory, placement)
    return config


def _resize(config: dict[str, Any], checkpoint: BaseCheckpoint, placement: Placement) -> None:
    for name, change in placement.changes.items():
        rows = checkpoint.info(name).shape[:1]
        for part in (config, config.get("text_config")):
            if change.replaced is not None and isinstance(part, dict) and rows == (part.get("vocab_size"),):
                part["vocab_size"] = change.replaced.shape[0]


def _set_head(config: dict[str, Any], inventory: Inventory, placement: Placement) -> None:
    """See to the number of labels, and to a class that has the head when the base's has none."""
    tasks = {a.config.raw.get("task_type") for a in inventory.adapters} - {None}
    task = tasks.pop() if len(tasks) == 1 else None
    named = next(iter([placement.head_class] if placement.head_class else architectures(config)), "")
    # PEFT has no task type for those of images and sounds
    is_labeled = task in LABELED_TASKS if task else named.endswith("Classification")
    if task not in TASK_HEADS and not is_labeled:
        return
    shapes = {n: c.replaced.shape for n, c in placement.changes.items() if c.replaced is not None}
    shapes |= {n: a.shape for n, a in placement.added.items()}
    for name, shape in shapes.items():
        owner, _, kind = name.rpartition(".")
        if kind == "weight" and owner.rpartition(".")[2] in LABEL_LAYERS and is_labeled:
            labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
            if shape[0] != labels:
                config["id2label"] = {str(i): f"LABEL_{i}" for i in range(shape[0])}
                config["label2id"] = {f"LABEL_{i}": i for i in range(shape[0])}
    if placement.head_class is not None:
        config["architectures"] = [placement.head_class]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _digest(path: Path) -> str:
    with open_in(path.parent, path.name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
