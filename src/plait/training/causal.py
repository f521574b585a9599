"""A job on a causal language model → TRL's `SFTTrainer`, with data that is tokenized and labeled already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.errors import PlanError, TaskError
from plait.extras import optional
from plait.hub.pretrained import load_tokenizer, refuse_failures
from plait.libraries.trl import trusts_code
from plait.training.data import LoadedData
from plait.training.encoding import EncodedData, ExampleEncoder, encode_all
from plait.training.job import LoraSettings, PreparedTrainer, ResolvedJob
from plait.training.settings import check_values, construct, trainer_settings

#: What TRL does itself before training, and is done by the time it gets the data.
_DONE = ("max_length", "completion_only_loss", "assistant_only_loss")
_SPLITTING = ("bfd_split", "wrapped")


def make_trainer(
    opened: ResolvedJob, out: Path, *, encoded: tuple[EncodedData, EncodedData | None] | None = None
) -> PreparedTrainer:
    """Load the model and tokenize the data.

    Args:
        opened: the job.
        out: folder of the checkpoints.
        encoded: the data, where it was tokenized before.

    Raises:
        PlaitError: arguments that contradict each other, examples that cannot be encoded, layers that are not there.
    """
    trl = optional("trl", "train", "training")
    job = opened.job
    config = trainer_settings(trl.SFTConfig, job, out)
    train, held = encoded = encoded or encode_data(opened, config)
    notes = notes_of(opened, encoded, config)
    if not config.packing:
        config.max_length = None  # kept to already
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
    config.model_init_kwargs = {**{k: v for k, v in init.items() if v is not None}, **_mapping(config.model_init_kwargs)}
    with refuse_failures(job.base, "it cannot be trained so", PlanError, folder=opened.base.folder):
        trainer = trl.SFTTrainer(
            model=name,
            args=config,
            train_dataset=_dataset(train),
            eval_dataset=None if held is None else _dataset(held),
            processing_class=_tokenizer(opened, config),
            peft_config=None if job.lora is None else lora_config(job.lora, "CAUSAL_LM"),
        )
    return PreparedTrainer(trainer, len(train.items), train.left_out, train.truncated, notes)


def encode_data(opened: ResolvedJob, config: Any) -> tuple[EncodedData, EncodedData | None]:
    """Tokenize and label what is trained on, and what the loss is also measured on.

    Args:
        opened: the job.
        config: its `SFTConfig`.
    """
    encoder = encoder_of(opened, config)
    splits = config.packing and config.packing_strategy in _SPLITTING
    limit = None if splits else config.max_length

    def encoded(data: LoadedData) -> EncodedData:
        return encode_all(encoder, data.examples, limit=limit, long=opened.job.long_examples, where=data.summary)

    return encoded(opened.data), None if opened.eval_data is None else encoded(opened.eval_data)


def notes_of(opened: ResolvedJob, encoded: tuple[EncodedData, EncodedData | None], config: Any) -> tuple[str, ...]:
    """Say which rows and examples were left out or cut, of those trained on and of those that the loss is also measured on.

    Args:
        opened: the job.
        encoded: from `encode_data`.
        config: its `SFTConfig`.
    """
    train, held = encoded
    notes = (*opened.data.notes, *train.notes(config.max_length))
    if opened.eval_data is None or held is None:
        return notes
    return (*notes, *(f"held out: {note}" for note in (*opened.eval_data.notes, *held.notes(config.max_length))))


def encoder_of(opened: ResolvedJob, config: Any) -> ExampleEncoder:
    """Return what tokenizes for a job, with the chat template and the end that the trainer will set."""
    tokenizer = _tokenizer(opened, config)
    if config.chat_template_path is not None:
        _take_template(tokenizer, config.chat_template_path)
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise TaskError(f"eos_token {config.eos_token!r} is not in the tokenizer's vocabulary.")
        tokenizer.eos_token = config.eos_token
    whole = config.completion_only_loss is False and not config.assistant_only_loss
    return ExampleEncoder(tokenizer, whole=whole, template=config.chat_template_path)


def lora_config(lora: LoraSettings, task_type: str) -> Any:
    """Return PEFT's configuration of an adapter.

    Args:
        lora: as asked for.
        task_type: `CAUSAL_LM` or `SEQ_CLS`.
    """
    given = {"target_parameters": lora.target_parameters, "modules_to_save": lora.modules_to_save}
    return optional("peft", "train", "LoRA").LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str | None) else list(lora.targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        **{name: list(value) for name, value in given.items() if value is not None},
    )


def _tokenizer(opened: ResolvedJob, config: Any) -> Any:
    name, revision = opened.model
    optional("transformers", "train", "training")
    trust = trusts_code(config, opened.job.model)
    return load_tokenizer(name, revision=revision, trust_remote_code=trust, folder=opened.base.folder)


def _take_template(tokenizer: Any, path: str) -> None:
    """Do to a tokenizer what TRL does to its own while it makes the trainer."""
    try:
        if Path(path).is_file():
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
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


def _mapping(value: Any) -> dict[str, Any]:
    return json.loads(value) if isinstance(value, str) else dict(value or {})


def _dataset(data: EncodedData) -> Any:
    datasets = optional("datasets", "train", "training")
    columns = {"input_ids": [item.ids for item in data.items], "labels": [item.labels for item in data.items]}
    return datasets.Dataset.from_dict(columns)
