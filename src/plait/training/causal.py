"""A job on a causal language model → TRL's `SFTTrainer`, with data that is tokenized and labeled already."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.errors import PlanError, TaskError
from plait.extras import optional
from plait.hub.pretrained import load_tokenizer, refuse_failures
from plait.libraries.trl import trusts_code
from plait.parsing import read_text
from plait.tasks.examples import Examples
from plait.training.data import LoadedData
from plait.training.encoding import EncodedData, EncodedSplits, ExampleEncoder, encode_all
from plait.training.job import LoraSettings, ResolvedJob, TrainingJob
from plait.training.settings import check_values, construct, lora_config, trainer_settings

LOADER, TASK_TYPE, PIPELINE = "AutoModelForCausalLM", "CAUSAL_LM", "text-generation"
_SPLITTING = ("bfd_split", "wrapped")


def settings_of(job: TrainingJob, out: Path) -> Any:
    """Return the job's `SFTConfig`; see `TrainerKind`."""
    return trainer_settings(optional("trl", "train", "training").SFTConfig, job, out)


def check_first(opened: ResolvedJob, config: Any, evaluated: Examples | None) -> None:
    """Encode the first example; see `TrainerKind`."""
    model_config(opened.job.model)
    encoder_of(opened, config).encode(opened.data.examples[0])


def make_trainer(opened: ResolvedJob, config: Any, encoded: EncodedSplits) -> Any:
    """Load the model; see `TrainerKind`."""
    trl = optional("trl", "train", "training")
    job, (train, held) = opened.job, encoded
    if not config.packing:
        config.max_length = None  # as all that TRL does before training, it is done by the time it gets the data
    config.completion_only_loss, config.assistant_only_loss = None, False
    name, revision = opened.model
    model = model_config(job.model)
    init = {
        "revision": revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": trusts_code(config, job.model),  # where it is left out, transformers asks on the terminal
        "quantization_config": trl.get_quantization_config(model),
    }
    own = config.model_init_kwargs or {}
    own = json.loads(own) if isinstance(own, str) else own
    config.model_init_kwargs = {**{k: v for k, v in init.items() if v is not None}, **own}
    with refuse_failures(job.base, "it cannot be trained so", PlanError, folder=opened.base.folder):
        return trl.SFTTrainer(
            model=name,
            args=config,
            train_dataset=_dataset(train),
            eval_dataset=None if held is None else _dataset(held),
            processing_class=_tokenizer(opened, config),
            peft_config=None if job.lora is None else lora_of(job.lora, None),
        )


def lora_of(lora: LoraSettings, model: Any, fresh: Sequence[str] = ()) -> Any:
    """Return PEFT's configuration; see `TrainerKind`."""
    return lora_config(lora, TASK_TYPE)


def encode_data(opened: ResolvedJob, config: Any) -> EncodedSplits:
    """Tokenize and label; see `TrainerKind`."""
    encoder = encoder_of(opened, config)
    splits = config.packing and config.packing_strategy in _SPLITTING
    limit = None if splits else config.max_length

    def encoded(data: LoadedData) -> EncodedData:
        return encode_all(encoder, data.examples, limit=limit, long=opened.job.long_examples, where=data.summary)

    return encoded(opened.data), None if opened.eval_data is None else encoded(opened.eval_data)


def notes_of(opened: ResolvedJob, encoded: EncodedSplits) -> tuple[str, ...]:
    """Return which rows and examples were left out or cut; see `TrainerKind`."""
    train, held = encoded
    notes = (*opened.data.notes, *train.notes)
    if opened.eval_data is None or held is None:
        return notes
    return (*notes, *(f"held out: {note}" for note in (*opened.eval_data.notes, *held.notes)))


def encoder_of(opened: ResolvedJob, config: Any) -> ExampleEncoder:
    """Return what tokenizes for a job, with the chat template and the end that the trainer will set."""
    tokenizer = _tokenizer(opened, config)
    if config.chat_template_path is not None:
        _take_template(tokenizer, config.chat_template_path)
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise TaskError(f"eos_token {config.eos_token!r} is not in the tokenizer's vocabulary.")
        tokenizer.eos_token = config.eos_token
    all_tokens = config.completion_only_loss is False and not config.assistant_only_loss
    return ExampleEncoder(tokenizer, all_tokens=all_tokens, template=config.chat_template_path)


def _tokenizer(opened: ResolvedJob, config: Any) -> Any:
    name, revision = opened.model
    optional("transformers", "train", "training")
    trust = trusts_code(config, opened.job.model)
    return load_tokenizer(name, revision=revision, trust_remote_code=trust, folder=opened.base.folder)


def _take_template(tokenizer: Any, path: str) -> None:
    """Do to a tokenizer what TRL does to its own while it makes the trainer."""
    try:
        if Path(path).is_file():
            tokenizer.chat_template = read_text(Path(path), TaskError)
            return
        source = load_tokenizer(path)
        tokenizer.chat_template = source.get_chat_template()
    except (OSError, ValueError) as error:
        raise TaskError(
            f"chat_template_path: {path} is not a file with a template, and no tokenizer with one can be loaded from there: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    tokenizer.add_tokens([t for t in source.added_tokens_decoder.values() if t.content not in tokenizer.get_vocab()])
    tokenizer.eos_token = source.eos_token


def model_config(values: Mapping[str, Any]) -> Any:
    """Return TRL's `ModelConfig`.

    Args:
        values: of a job.

    Raises:
        RecipeError: a name is not known, or a value does not fit.
    """
    kind = optional("trl", "train", "training").ModelConfig
    check_values(kind, values, "model")
    return construct(kind, values)


def _dataset(data: EncodedData) -> Any:
    datasets = optional("datasets", "train", "training")
    columns = {"input_ids": [item.ids for item in data.items], "labels": [item.labels for item in data.items]}
    return datasets.Dataset.from_dict(columns)
