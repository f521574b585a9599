"""One training run as a value: everything that its result depends on, and what came of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from plait.checkpoints.files import check_headers, find_weights
from plait.errors import AdapterError, AddressError, TaskError, take_all
from plait.evaluation.scores import model_digest
from plait.folders import expanded
from plait.hub.download import COMPANION_FILES, Located, resolve_model
from plait.hub.pretrained import damaged_files
from plait.parsing import MAX_TEXT_BYTES
from plait.records import Record
from plait.results.digests import sha256
from plait.tasks.asking import SpeechTask
from plait.training.data import LoadedData, hold_out, load_data
from plait.training.data import TrainingData as TrainingData
from plait.training.encoding import LongExamples
from plait.training.fingerprints import taken_once

TrainingKind = Literal["causal", "sequence_classification", "image_classification", "audio_classification", "speech_to_text"]

#: What training needs, and what comes after it: a template of chats, an evaluation, a report.
PACKAGES = ("trl", "transformers", "peft", "datasets", "accelerate", "jinja2")

FINAL_MODEL = "final_model"

#: Arguments of the trainer that change how a run is logged, kept or spread over processes, not what it learns.
NON_SEMANTIC_ARGUMENTS = frozenset(
    {
        "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
        "dataset_num_proc", "ddp_timeout", "disable_tqdm", "include_num_input_tokens_seen", "log_level", "log_level_replica",
        "log_on_each_node", "logging_dir", "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy",
        "output_dir", "project", "report_to", "resume_from_checkpoint", "run_name", "save_on_each_node", "save_only_model",
        "save_steps", "save_strategy", "save_total_limit", "skip_memory_metrics", "trackio_bucket_id", "trackio_space_id",
        "trackio_static_space_id",
    }
)  # fmt: skip
#: Of those, what decides which checkpoint is the best, where that is what a run ends with.
_CHECKPOINT_KEYS = frozenset({"logging_steps", "logging_strategy", "save_steps", "save_strategy"})
#: Arguments that may name a file, of which the content counts.
FILE_ARGUMENTS = ("accelerator_config", "chat_template_path", "deepspeed", "fsdp_config")


class LoraSettings(Record):
    """A LoRA before training; defaults are TRL's, but for the layers.

    Attributes:
        r: rank.
        alpha: numerator of the scaling.
        dropout: in [0, 1).
        targets: names of layers, or `all-linear`, which is the default unless `target_parameters` are given; PEFT's choice for
            the architecture when None.
        target_parameters: parameters adapted by name (fused experts).
        modules_to_save: layers trained and saved completely.
        rslora: scaling alpha / √r.
        dora: magnitude and direction separately.
        init_seed: of A; the job's seed when None.
    """

    r: int = Field(default=16, gt=0)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: str | tuple[str, ...] | None = "all-linear"
    target_parameters: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    rslora: bool = False
    dora: bool = False
    init_seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _parameters_alone(cls, data: Any) -> Any:
        """Adapt no layer besides parameters that are named."""
        alone = isinstance(data, dict) and data.get("target_parameters") and "targets" not in data
        return {**data, "targets": None} if alone else data


class TrainingJob(Record):
    """Everything that one training run depends on.

    Attributes:
        base: folder or `org/repo[@revision]`.
        base_name: what adapter and card call it, where `base` is a folder of this machine; `base` when None.
        data: what is trained on.
        eval_data: what the loss is also measured on; None for nothing.
        held_out: share of `data` kept for that instead; None for nothing.
        kind: which head the model has.
        labels: of a classifier, in the order of the head's outputs.
        language: of the transcripts that are learned, for a model of many.
        speech_task: whether they are of what is spoken, or in English.
        lora: None trains the complete model.
        arguments: values of TRL's `SFTConfig` (`transformers.TrainingArguments` for classification and speech), without
            `output_dir` and `seed`.
        model: values of TRL's `ModelConfig` about loading: dtype, attn_implementation, load_in_4bit, ….
        long_examples: what becomes of examples of more than `max_length` tokens.
        seed: of data order, dropout and, unless there is a `lora.init_seed`, of A.
    """

    base: str
    base_name: str | None = None
    data: TrainingData
    eval_data: TrainingData | None = None
    held_out: float | None = Field(default=None, gt=0, lt=1)
    kind: TrainingKind = "causal"
    labels: tuple[str, ...] | None = None
    language: str | None = None
    speech_task: SpeechTask | None = None
    lora: LoraSettings | None = LoraSettings()
    arguments: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    long_examples: LongExamples = "drop"
    seed: int = 42

    def digest(self) -> str:
        """Return a hash of the job, of its data's content and of the base's files; neither paths nor names are in it.

        Raises:
            PlaitError: data or base cannot be read.
        """
        return resolve_job(self).digest


@dataclass(frozen=True)
class ResolvedJob:
    """A job with its inputs at hand.

    Attributes:
        job: what is to be done.
        base: where the base model is.
        data: examples trained on.
        eval_data: examples that the loss is also measured on.
        parts: what the digest is made of: what → hash, so that a difference can be named.
    """

    job: TrainingJob
    base: Located
    data: LoadedData
    eval_data: LoadedData | None
    parts: dict[str, str]

    @property
    def digest(self) -> str:
        """Hash of everything that the result depends on."""
        return _hash(self.parts)

    @property
    def base_reference(self) -> str:
        """The base, and on the Hub the very commit that was trained on."""
        return self.job.base if self.base.repo is None else _on_hub(self.base)

    @property
    def model(self) -> tuple[str, str | None]:
        """What transformers loads, and its revision: the repository of a Hub model, otherwise the folder as it was given."""
        if self.base.repo is None:
            return str(expanded(self.job.base)), None
        return (str(self.base.folder), None) if self.base.subfolder else (self.base.repo, self.base.commit)


def resolve_job(job: TrainingJob) -> ResolvedJob:
    """Find the base and read the data.

    Raises:
        PlaitError: either cannot be read; all that is wrong at once.
    """
    watched = (lambda: None) if job.eval_data is None else partial(_watched, job.eval_data)
    base, data, held = take_all(TaskError, (partial(_base, job.base), partial(load_data, job.data), watched), "the job")
    if job.held_out is not None:
        data, held = hold_out(data, job.held_out, job.seed)
    settings = job.model_dump(mode="json", exclude={"base", "base_name", "data", "eval_data", "arguments", "lora"})
    later = ("language", "speech_task")  # a job without them has the digest that it had before there were such
    parts = {name: _hash(value) for name, value in settings.items() if name not in later or value is not None}
    left_out = (
        NON_SEMANTIC_ARGUMENTS - _CHECKPOINT_KEYS if job.arguments.get("load_best_model_at_end") else NON_SEMANTIC_ARGUMENTS
    )
    parts |= {name: _hash(_content(name, value)) for name, value in job.arguments.items() if name not in left_out}
    lora = None if job.lora is None else job.lora.model_dump(mode="json")
    parts |= {"lora": "none"} if lora is None else {f"lora.{name}": _hash(value) for name, value in lora.items()}
    parts["data"] = data.digest()
    parts["eval_data"] = "none" if held is None else held.digest()
    parts["base"] = _on_hub(base) if base.repo else taken_once(model_digest, base.folder)
    return ResolvedJob(job, base, data, held, parts)


class TrainingRecord(Record):
    """What a training run did.

    Attributes:
        plait: version.
        digest: of its job.
        job: as run.
        folder: what was written, next to the record: `adapter` or `final_model`.
        examples: trained on.
        left_out: examples longer than `max_length`.
        truncated: examples that were cut to it.
        trainable: parameters that were trained.
        steps: optimizer steps.
        tokens: seen in training, padding left out; not counted where images or sounds are.
        losses: (step, training loss) as logged.
        eval_losses: (step, loss on held-out data).
        seconds: wall time of training, in the run that ended it.
        resumed_from: step that this run took up; None for a run from the start.
        notes: as reported before training.
        versions: of the libraries that compute.
        finished: local time, ISO 8601.
    """

    plait: str
    digest: str
    job: TrainingJob
    folder: str
    examples: int
    left_out: int
    truncated: int
    trainable: int
    steps: int
    tokens: int
    losses: tuple[tuple[int, float], ...]
    eval_losses: tuple[tuple[int, float], ...]
    seconds: float
    resumed_from: int | None
    notes: tuple[str, ...]
    versions: dict[str, str]
    finished: str


def _base(text: str) -> Located:
    try:
        found = resolve_model(text, files=("*.json", "*.safetensors", *COMPANION_FILES))
    except AddressError as error:
        raise AddressError(f"model_name_or_path: {error}") from error
    weights = find_weights(found.folder)  # transformers follows an index out of its folder
    # of a repository in another format than safetensors, transformers fetches the weights itself
    if weights is not None and (found.repo is None or all((found.folder / name).exists() for name in weights.names)):
        check_headers(found.folder, weights)
    if damaged := damaged_files(found.folder):
        raise AdapterError(f"model_name_or_path: {found.folder}: {'; '.join(damaged)}. Fetch the base model again.")
    return found


def _watched(data: TrainingData) -> LoadedData:
    """Read what the loss is also measured on."""
    try:
        return load_data(data)
    except TaskError as error:
        raise TaskError(
            f"rows to measure the loss on: {error} Name others (eval_dataset_name_or_path), hold some of those trained on out "
            "(test_split_size), or leave eval_strategy out."
        ) from error


def _on_hub(base: Located) -> str:
    return f"{base.repo}@{base.commit}" + (f"/{base.subfolder}" if base.subfolder else "")


def _content(name: str, value: Any) -> Any:
    """Return an argument's value; of one that names a file or a tokenizer's folder, what that holds."""
    if name not in FILE_ARGUMENTS or not isinstance(value, str) or value.lstrip().startswith("{"):  # JSON in its place
        return value
    place = Path(value)
    if place.is_dir():
        return {file.name: sha256(file) for file in sorted(place.glob("*.j*")) if file.is_file()}
    if not place.is_file():
        return value
    if place.stat().st_size > MAX_TEXT_BYTES:
        raise TaskError(f"{name}: {place}: larger than {MAX_TEXT_BYTES >> 20} MB, the limit for such a file.")
    return sha256(place)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
