"""The flags of `plait sft`: TRL's own, read by TRL's parser, and a few of plait's → a job and what becomes of its result.

Flags, a YAML file (`--config`) and Python keywords take the same way, through the parser, so that they mean the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from plait.errors import RecipeError, collect, did_you_mean
from plait.extras import optional, require
from plait.folders import expanded
from plait.libraries.trl import FlagError, FlagParser
from plait.parsing import read_text
from plait.recipes.documents import read_document
from plait.training.data import EVAL_SPLITS
from plait.training.encoding import LongExamples
from plait.training.formats import FormatName
from plait.training.job import PACKAGES, TrainingJob

#: Other names of TRL's flags.
ALIASES = {"dataset_name_or_path": "dataset_name", "hub_repo_id": "hub_model_id"}
_FLAGS = ("merge_adapter_with_base", "upload_merged_model", "force", "dry_run", "json")
_OWN: Mapping[str, Mapping[str, Any]] = {
    "dataset_format": {"choices": get_args(FormatName), "help": "How rows are read; found by their columns when auto."},
    "dataset_limit": {"type": int, "help": "Take the first so many rows."},
    "eval_dataset_name_or_path": {
        "help": "Rows that the loss is also measured on: --dataset_test_split of them, or test, validation, …, or all."
    },
    "test_split_size": {"type": float, "help": "Share of the rows to hold out for that instead."},
    "system_prompt": {"help": "Put before every conversation that has none."},
    "long_examples": {"choices": get_args(LongExamples), "help": "What becomes of examples longer than --max_length."},
    "merge_adapter_with_base": {"help": "Then write base + adapter as a full model, merged_model/."},
    "upload_merged_model": {"help": "Upload merged_model/ instead of the adapter."},
    "force": {"help": "Give up a run with other settings in --output_dir."},
    "dry_run": {"help": "Show plan and example, and train nothing."},
    "json": {"help": "Print one JSON object on stdout."},
}
_LORA = {
    "r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "lora_target_modules",
    "target_parameters": "lora_target_parameters", "modules_to_save": "lora_modules_to_save",
    "rslora": "use_rslora", "dora": "use_dora",
}  # fmt: skip
_LOADING = (
    "dtype", "attn_implementation", "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant",
    "bnb_4bit_quant_storage", "trust_remote_code",
)  # fmt: skip
_UPLOADING = ("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision", "hub_strategy", "hub_always_push")


@dataclass(frozen=True)
class Flags:
    """What was given, and nothing that was not.

    Attributes:
        given: name (TRL's, or plait's own) → value.
        trainer: names that belong to `SFTConfig`.
        loading: names that belong to `ModelConfig`.
        config: the `--config` file that some were read from; None where there is none.
    """

    given: Mapping[str, Any]
    trainer: frozenset[str]
    loading: frozenset[str]
    config: str | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, or the default where nothing was given."""
        return self.given.get(name, default)

    @property
    def out(self) -> Path:
        """Where everything is written; TRL's own default."""
        return expanded(self.get("output_dir", "trainer_output"))

    @property
    def evaluates(self) -> bool:
        """Whether the loss is measured on other rows as well."""
        return str(self.get("eval_strategy", "no")) != "no"


def read_flags(argv: Sequence[str]) -> Flags:
    """Read a command line.

    Raises:
        RecipeError: a flag is not known or its value is of the wrong kind; the `--config` file cannot be read.
    """
    words = list(argv)
    config: list[str] = []
    path = None
    for i, word in enumerate(words):
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or "".join(words[i + 1 : i + 2])
            config = list(_from_file(Path(path)))
            del words[i : i + (1 if "=" in word else 2)]
            break
    return _parsed([*config, *words], path)


def read_keywords(values: Mapping[str, Any]) -> Flags:
    """Read Python keywords: the flags' names and values.

    Raises:
        RecipeError: as `read_flags`.
    """
    return _parsed(list(_words(values)))


def all_flags() -> str:
    """Return the help of every flag."""
    return _parser().help()


def job_of(flags: Flags) -> TrainingJob:
    """Make the job that flags ask for; base and data must have been given.

    Raises:
        RecipeError: a value is out of range.
    """
    revision = flags.get("model_revision", "main")
    base = flags.get("model_name_or_path") + ("" if revision == "main" else f"@{revision}")
    trainer = {k: v for k, v in flags.given.items() if k in flags.trainer and k not in ("output_dir", "seed", *_UPLOADING)}
    values: dict[str, Any] = {
        "base": base,
        "data": _data(flags, "dataset_name", flags.get("dataset_train_split", "train")),
        "lora": None,
        "arguments": trainer,
        "model": {name: flags.get(name) for name in _LOADING if name in flags.given and name in flags.loading},
        "long_examples": flags.get("long_examples", "drop"),
        "seed": flags.get("seed", 42),
    }
    if flags.get("use_peft"):
        lora = {name: flags.get(flag) for name, flag in _LORA.items() if flag in flags.given}
        for name, value in lora.items():  # a single word that is not a plain name: `all-linear`, or a pattern for PEFT
            if isinstance(value, list) and len(value) == 1 and not re.fullmatch(r"[\w.]+", value[0]):
                lora[name] = value[0]
        values["lora"] = lora
    if flags.evaluates and "test_split_size" in flags.given:
        values["held_out"] = flags.get("test_split_size")
    elif flags.evaluates:
        other = "eval_dataset_name_or_path" in flags.given
        place, split = ("eval_dataset_name_or_path", EVAL_SPLITS) if other else ("dataset_name", "test")
        values["eval_data"] = _data(flags, place, flags.get("dataset_test_split", split), limit=False)
    try:
        return TrainingJob.model_validate(values)
    except ValidationError as error:
        collect(RecipeError, [_error_text(e) for e in error.errors()], "plait sft")
        raise


def lora_flags(flags: Flags) -> list[str]:
    """Return the flags given that only an adapter has."""
    return [f"--{flag}" for flag in _LORA.values() if flag in flags.given]


def _data(flags: Flags, place: str, split: str | tuple[str, ...], *, limit: bool = True) -> dict[str, Any]:
    return {
        "place": flags.get(place),
        "config": flags.get("dataset_config") if place == "dataset_name" else None,
        "split": split,
        "limit": flags.get("dataset_limit") if limit else None,
        "format": flags.get("dataset_format", "auto"),
        "text_field": flags.get("dataset_text_field", "text"),
        "system_prompt": flags.get("system_prompt"),
    }


def _error_text(error: Any) -> str:
    where = [str(part) for part in error["loc"]]
    names = _LORA if where[0] == "lora" else {"held_out": "test_split_size", "limit": "dataset_limit"}
    flag = names.get(where[-1], where[-1])
    return f"--{flag} {error['input']!r}: {error['msg']}"


def _parser() -> FlagParser:
    """Make TRL's parser with plait's flags added."""
    require("plait sft", {"train": PACKAGES})
    trl = optional("trl", "train", "plait sft")
    parser = FlagParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig), "plait sft")
    for alias, name in ALIASES.items():
        parser.add(alias, dest=name, help=f"The same as --{name}.")
    if "--warmup_ratio" not in parser.flags:
        parser.add("warmup_ratio", type=float, help="Share of the steps to warm up in.")
    for name, options in _OWN.items():
        parser.add(name, switch=name in _FLAGS, **options)
    return parser


def _parsed(words: Sequence[str], config: str | None = None) -> Flags:
    parser = _parser()
    place = "plait sft" if config is None else f"plait sft, with {config}"
    trl = optional("trl", "train", "plait sft")
    try:
        given, rest = parser.parse(words)
    except FlagError as error:
        raise RecipeError(f"{place}: {error}. `plait sft --help_all` lists every flag.") from None
    unknown = [word.partition("=")[0] for word in rest if word.startswith("-")] or list(rest)
    collect(
        RecipeError,
        [
            f"{place}: {word}: there is no such flag.{did_you_mean(word, parser.flags)} `plait sft --help_all` lists every one."
            for word in unknown
        ],
        place,
    )
    trainer = frozenset(f.name for f in fields(trl.SFTConfig)) | {"warmup_ratio"}
    return Flags(given, trainer, frozenset(f.name for f in fields(trl.ModelConfig)), config)


def _from_file(path: Path) -> Iterator[str]:
    """Yield the flags that a YAML file holds; its `env` sets environment variables, as with TRL."""
    values = read_document(
        read_text(path, RecipeError, advice="Give --config a YAML file."), f"--config {path}", loader=yaml.SafeLoader
    ).data
    if not isinstance(values, dict) or not isinstance(values.get("env", {}), dict):
        raise RecipeError(f"--config {path}: it must be a mapping: flag: value (and env: a mapping of variables).")
    os.environ.update({str(name): str(value) for name, value in values.pop("env", {}).items()})
    yield from _words({str(name): value for name, value in values.items()})


def _words(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of the equivalent command line; a value of None gives none."""
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            yield from (f"--{name}", *map(str, value))
        elif isinstance(value, Mapping):
            yield f"--{name}={json.dumps(value)}"
        elif value is not None:
            yield f"--{name}={value}"
