"""A job on an encoder (or decoder) with a classification head → transformers' `Trainer`.

What the checkpoint lacks, the head above all, is drawn at random and then trained and saved completely with the LoRA
(`modules_to_save`): nothing random is left in a model that is put together again from base and adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.errors import PlanError, TaskError
from plait.extras import optional
from plait.hub.pretrained import load_config, load_model, load_tokenizer, with_padding_token
from plait.tasks.examples import Examples
from plait.training.data import LoadedData
from plait.training.encoding import EncodedData, EncodedSplits
from plait.training.formats import Completion
from plait.training.job import LoraSettings, ResolvedJob, TrainingJob
from plait.training.settings import get_adapted, loading, lora_config, trainer_settings

LOADER, TASK_TYPE, PIPELINE = "AutoModelForSequenceClassification", "SEQ_CLS", None
#: Heads that PEFT itself trains and saves completely.
_HEADS = ("classifier", "score")
#: Argument of a classifier: the longest text in tokens.
MAX_LENGTH = "max_length"
_UNBOUNDED = 1_000_000  # tokenizers without a limit give 1e30


def make_trainer(opened: ResolvedJob, config: Any, encoded: EncodedSplits) -> Any:
    """Load the model, with a new head of the job's labels; see `TrainerKind`."""
    transformers = optional("transformers", "train", "training")
    (tokenizer, _), (train, held) = tokenizer_of(opened), encoded
    transformers.set_seed(config.seed)  # head and A are drawn below
    model, report = load_with_labels(getattr(transformers, LOADER), opened)
    if model.config.pad_token_id is None:  # a decoder with a head looks for the last token that is not padding
        model.config.pad_token_id = tokenizer.pad_token_id
    lora, fresh = opened.job.lora, sorted({key.rpartition(".")[0] for key in report["missing_keys"]})
    if lora is None:
        raise AssertionError("checked before")
    return transformers.Trainer(
        model=get_adapted(model, lora_of(lora, model, fresh), opened.job.base),
        args=config,
        train_dataset=list(train.items),
        eval_dataset=list(held.items) if held else None,
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )


def settings_of(job: TrainingJob, out: Path) -> Any:
    """Return the job's `TrainingArguments`; see `TrainerKind`. Its `max_length` is the classifier's own."""
    arguments = {name: value for name, value in job.arguments.items() if name != MAX_LENGTH}
    kind = optional("transformers", "train", "training").TrainingArguments
    return trainer_settings(kind, job.model_copy(update={"arguments": arguments}), out)


def check_first(opened: ResolvedJob, config: Any, evaluated: Examples | None) -> None:
    """Load the tokenizer; see `TrainerKind`."""
    tokenizer_of(opened)


def tokenizer_of(opened: ResolvedJob) -> tuple[Any, int | None]:
    """Return what tokenizes, and how many tokens a text may have: never more than the model can read."""
    optional("transformers", "train", "training")
    name, revision = opened.model
    trust, folder = bool(loading(opened.job.model).get("trust_remote_code", False)), opened.base.folder
    tokenizer = with_padding_token(load_tokenizer(name, revision=revision, trust_remote_code=trust, folder=folder))
    tokenizer.padding_side = "right"  # as evaluation reads texts
    config = load_config(name, revision=revision, trust_remote_code=trust, folder=folder)
    bounds = opened.job.arguments.get(MAX_LENGTH), getattr(config, "max_position_embeddings", None), tokenizer.model_max_length
    return tokenizer, min((n for n in bounds if n is not None and 0 < n < _UNBOUNDED), default=None)


def load_with_labels(loader: Any, opened: ResolvedJob) -> tuple[Any, Mapping[str, Any]]:
    """Return a model with a head of the job's labels, and what transformers reports of its loading.

    Args:
        loader: the Auto class.
        opened: the job.

    Raises:
        PlanError: it cannot be loaded.
    """
    labels = opened.job.labels or ()
    name, revision = opened.model
    names: dict[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    keywords: dict[str, Any] = {"dtype": "float32", **loading(opened.job.model)}
    keywords["trust_remote_code"] = bool(keywords.get("trust_remote_code", False))
    model, report = load_model(
        loader,
        name,
        folder=opened.base.folder,
        revision=revision,
        num_labels=len(labels),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **names,
        **keywords,
    )
    return model, report


def lora_of(lora: LoraSettings, model: Any, fresh: Sequence[str] = ()) -> Any:
    """Return PEFT's configuration, with what the checkpoint lacks saved; see `TrainerKind`."""
    own = (*(lora.modules_to_save or ()), *_HEADS)
    more = [path for path in fresh if not any(part in own for part in path.split("."))]
    saved = (*(lora.modules_to_save or ()), *more)
    config = lora_config(lora.model_copy(update={"modules_to_save": saved or None}), TASK_TYPE)
    config.exclude_modules = more or None  # what is trained completely needs no LoRA too
    return config


def encode_data(opened: ResolvedJob, config: Any) -> EncodedSplits:
    """Tokenize texts and number their labels; see `TrainerKind`."""
    if not opened.job.labels or opened.job.lora is None:
        raise PlanError("a classifier is trained as a LoRA on a task of kind sequence_classification, whose labels it has.")
    tokenizer, limit = tokenizer_of(opened)
    held = None if opened.eval_data is None else _encoded(opened, opened.eval_data, tokenizer, limit)
    return _encoded(opened, opened.data, tokenizer, limit), held


def _encoded(opened: ResolvedJob, data: LoadedData, tokenizer: Any, limit: int | None) -> EncodedData:
    labels, cut = opened.job.labels or (), opened.job.long_examples == "truncate"
    items: list[dict[str, Any]] = []
    left_out = truncated = 0
    for number, example in enumerate(data.examples):
        if not isinstance(example, Completion):
            raise TaskError(f"{data.summary}: example {number} is not a text with a label.")
        row = dict(tokenizer(example.prompt))
        if limit is not None and len(row["input_ids"]) > limit:
            if not cut:
                left_out += 1
                continue
            truncated += 1
            row = dict(tokenizer(example.prompt, truncation=True, max_length=limit))
        items.append({**row, "labels": labels.index(example.completion)})
    if not items:
        raise TaskError(f"{data.summary}: no text is left: all {left_out} have more than {limit} tokens ({MAX_LENGTH}).")
    return EncodedData(tuple(items), tuple(len(item["input_ids"]) for item in items), limit, left_out, truncated)


def notes_of(opened: ResolvedJob, encoded: EncodedSplits) -> tuple[str, ...]:
    """Return which rows and texts were left out or cut; see `TrainerKind`."""
    train, _ = encoded
    counts = [(train.left_out, "are left out"), (train.truncated, "are cut: their end is not learned")]
    found = (f"{count} texts have more than {train.limit} tokens and {what}." for count, what in counts if count)
    return (*opened.data.notes, *found)
