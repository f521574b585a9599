"""`adapter_config.json`: what plait needs of it, and what it must refuse.

The tensors in the file are the truth for modules and ranks; the configuration supplies scaling, orientation and kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from plait.adapters.patterns import PatternError, PatternTable, module_pattern
from plait.errors import AdapterError, collect, listed
from plait.parsing import is_there, read_object, shown
from plait.tensorfiles.reader import SafetensorsFile

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = SafetensorsFile.adapter_name
_LARGEST_RANK = 2**31 - 1
_LONGEST_TEXT = 10_000  # letters of a name; paths of files have no more than 4096
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")
#: Initializations after which the delta is relative to the published base model.
PLAIN_INITIALIZATIONS = ("gaussian", "eva", "orthogonal", "mica")
_UNSUPPORTED = {
    "use_bdlora": "BD-LoRA's block-diagonal factors",
    "use_qalora": "QA-LoRA's grouped inputs",
    "kasa_config": "KaSA, which also changes the base model",
    "arrow_config": "Arrow routing",
    "megatron_config": "Megatron's parallel layers",
}
#: Keys of LoRA's configuration in PEFT, from the first release to 0.21, and in ms-swift. Any other may change what factors do.
KNOWN_KEYS = frozenset({
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias",
    "corda_config", "enable_lora", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_dtype", "lora_ga_config",
    "lorap_emb_lr", "lorap_lr_ratio", "megatron_config", "megatron_core", "merge_weights", "model_id_or_path",
    "model_revision", "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config",
})  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """The read configuration of one adapter.

    Attributes:
        raw: the complete JSON object, for keys that are only passed on.
        path: of the file, for messages.
    """

    raw: Mapping[str, Any]
    path: Path

    @staticmethod
    def read(path: Path) -> AdapterConfig:
        """Read and check a configuration file.

        Raises:
            AdapterError: no such file, not JSON, or a kind of adapter without a delta that plait can take over.
        """
        if not is_there(path, AdapterError):
            raise AdapterError(
                f"{path}: no such file. An adapter is a folder with adapter_config.json and adapter_model.safetensors; "
                f"{_what_is_there(path.parent)}"
            )
        return AdapterConfig.of(read_object(path, AdapterError, constants=True), path)

    @staticmethod
    def of(raw: Mapping[str, Any], path: Path) -> AdapterConfig:
        """Check a configuration that was read from a file; errors as `read`."""
        config = AdapterConfig(raw, path)
        wrong = config._unsupported()
        problems = [wrong] if wrong else list(config._wrong_values())
        collect(AdapterError, [f"{path}: {problem}" for problem in problems], f"{path}: values that cannot be read")
        return config

    @property
    def unknown_keys(self) -> list[str]:
        """Keys that are set and not known here."""
        return sorted(key for key, value in self.raw.items() if value and key not in KNOWN_KEYS)

    @property
    def noted_class(self) -> tuple[str, str] | None:
        """The module of transformers, and its class of models, that PEFT notes where an adapter has no task type; else None."""
        noted = self.raw.get("auto_mapping")
        if not isinstance(noted, dict) or self.raw.get("task_type"):
            return None
        module, name = noted.get("parent_library"), noted.get("base_model_class")
        if not isinstance(module, str) or not isinstance(name, str) or not module.startswith("transformers."):
            return None
        return (module, name) if all(part.isidentifier() for part in (*module.split("."), name)) else None

    def _unsupported(self) -> str | None:
        kind = str(self.raw.get("peft_type", "LORA")).upper()
        if kind == "ADALORA":
            return "peft_type is ADALORA; its ranks are masked while training. Convert it to LoRA first (peft.convert_to_lora)."
        if kind != "LORA":
            return f"peft_type is {shown(kind)}; plait merges LoRA. Convert it first, where PEFT can (peft.convert_to_lora)."
        init = self.raw.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower().replace("-", "_").startswith(_BASE_CHANGED):
            return (
                f"init_lora_weights is {shown(init)} and was not converted: the file is relative to a base model that this "
                "initialization changed, not to the published one. Save it with PEFT's "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...) and merge that."
            )
        for key, what in _UNSUPPORTED.items():
            if self.raw.get(key):
                return f"{key} is set: {what} has no exact form here yet."
        return None

    def _wrong_values(self) -> Iterator[str]:
        """Find values that later reading would stumble over."""
        rank, alpha = self.raw.get("r", 8), self.raw.get("lora_alpha", 8)
        if not _is_rank(rank):
            yield f"r is {shown(rank)}; it must be an integer from 1 to {_LARGEST_RANK}."
        if not is_number(alpha):
            yield f"lora_alpha is {shown(alpha)}; it must be a number."
        for key in ("rank_pattern", "alpha_pattern"):
            yield from _wrong_pattern(key, self.raw.get(key) or {})
        for keys, fits, needed in _KINDS:
            for key in keys:
                value = self.raw.get(key)
                if value is not None and not fits(value):
                    yield f"{key} is {shown(value)}; it must be {needed}."

    def flag(self, key: str) -> bool:
        """Return a boolean key; absent means false."""
        return bool(self.raw.get(key, False))

    @property
    def base_model(self) -> str | None:
        """The base model's name, as the adapter was trained."""
        return self.raw.get("base_model_name_or_path") or None

    @property
    def revision(self) -> str | None:
        """The base model's revision."""
        return self.raw.get("revision") or None

    @property
    def scaling_rule(self) -> str:
        """`alpha/r`, or `alpha/sqrt(r)` for rsLoRA."""
        return "alpha/sqrt(r)" if self.flag("use_rslora") else "alpha/r"

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """Names of parameters (not modules) that carry LoRA: fused experts."""
        return tuple(self.raw.get("target_parameters") or ())

    def alpha(self, target: str) -> float:
        """Return lora_alpha of a target: the first key of `alpha_pattern` that matches, as PEFT reads it."""
        return float(self._pattern("alpha_pattern", target, self.raw.get("lora_alpha", 8)))

    def rank(self, target: str) -> int:
        """Return the rank the configuration gives a target; only fused experts need it."""
        return int(self._pattern("rank_pattern", target, self.raw.get("r", 8)))

    def scaling(self, target: str, rank: int) -> float:
        """Return s in ΔW = s · B A.

        Args:
            target: module path (or parameter path).
            rank: the rank of the tensors in the file.
        """
        alpha = self.alpha(target)
        return alpha / math.sqrt(rank) if self.flag("use_rslora") else alpha / rank

    def idle_patterns(self, key: str, targets: Iterable[str]) -> list[str]:
        """Return the patterns of `rank_pattern` or `alpha_pattern` that name no target.

        Raises:
            AdapterError: a pattern cannot be matched in bounded time.
        """
        used = {number for target in targets for number in self._matching(key, target)}
        return [pattern for number, pattern in enumerate(self.raw.get(key) or {}) if number not in used]

    def _pattern(self, key: str, target: str, default: Any) -> Any:
        number = next(self._matching(key, target), None)
        return default if number is None else self._tables[key][1][number]

    def _matching(self, key: str, target: str) -> Iterator[int]:
        if not self.raw.get(key):  # the tables of patterns need not be asked, module by module
            return
        try:
            yield from self._tables[key][0].matching(target)
        except PatternError as error:
            raise AdapterError(f"{self.path}: {key}: {error}.") from None

    @cached_property
    def _tables(self) -> Mapping[str, tuple[PatternTable, list[Any]]]:
        patterns = {key: self.raw.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
        return {key: (PatternTable(values), list(values.values())) for key, values in patterns.items()}


def is_number(value: object) -> bool:
    """Return whether a value of JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_RANK


def _is_flag(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_names(value: object) -> bool:
    return isinstance(value, str) or _are_texts(value)


def _are_indices(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _are_pairs(value: object) -> bool:
    return isinstance(value, list) and all(_are_indices(pair) and len(pair) == 2 for pair in value)


def _are_token_rows(value: object) -> bool:
    lists = [*value.values()] if isinstance(value, dict) else [value]
    return all(isinstance(r, list) and _are_indices(r) and len({*r}) == len(r) and min(r, default=0) >= 0 for r in lists)


#: What the values of keys must be, where they are not null, with the words for it.
_KINDS: tuple[tuple[tuple[str, ...], Callable[[object], bool], str], ...] = (
    (("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), _is_flag, "true or false"),
    (
        ("base_model_name_or_path", "revision", "task_type", "peft_version"),
        _is_text,
        f"a text of up to {_LONGEST_TEXT} letters",
    ),
    (("target_parameters",), _are_texts, "a list of names"),
    (("modules_to_save",), _are_texts, "a list of names"),
    (("target_modules", "exclude_modules", "layers_pattern"), _are_names, "a text or a list of names"),
    (("layers_to_transform",), lambda v: _are_indices([v]) or _are_indices(v), "an integer, or a list of them"),
    (("bias",), lambda v: v in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    (("layer_replication",), _are_pairs, "a list of pairs of integers"),
    (("alora_invocation_tokens",), _are_indices, "a list of integers"),
    (("trainable_token_indices",), _are_token_rows, "a list of different integers from 0 up, or names with such lists"),
    (("init_lora_weights",), lambda v: _is_flag(v) or _is_text(v), "true, false or a text"),
)


def _wrong_pattern(key: str, patterns: object) -> Iterator[str]:
    if not isinstance(patterns, dict):
        yield f"{key} is {shown(patterns)}; it must map module patterns to numbers."
        return
    for pattern, value in patterns.items():
        if key == "rank_pattern" and not _is_rank(value):
            yield f"{key}[{shown(pattern)}] is {shown(value)}; it must be an integer from 1 to {_LARGEST_RANK}."
        elif not is_number(value):
            yield f"{key}[{shown(pattern)}] is {shown(value)}; it must be a number."
        try:
            module_pattern(pattern)
        except PatternError as error:
            yield f"{key}: {shown(pattern)}: {error}."


def alpha_of(scaling: float, rank: int) -> float:
    """Return the alpha for which alpha / rank is a scaling, to the last bit where there is one."""
    alpha = scaling * rank
    near = (float(f"{alpha:.12g}"), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in near if a / rank == scaling), alpha)


def subfolders_with(folder: Path, name: str) -> list[str]:
    """Return the folders up to three levels below a folder that hold a file, checkpoints in the order of their steps."""
    found = {p.parent.relative_to(folder).as_posix() for level in ("*", "*/*", "*/*/*") for p in folder.glob(f"{level}/{name}")}
    return sorted(found, key=lambda path: [(int(d or 0), text) for text, d in re.findall(r"(\D*)(\d*)", path)])


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder."
    if below := subfolders_with(folder, "adapter_config.json"):
        return f"{folder} has them in {listed(below, 8)}: name one of these subfolders."
    names = sorted(p.name for p in folder.iterdir())
    if len(files := [n for n in names if n.endswith((".safetensors", ".gguf"))]) > 1:
        return f"{folder} holds {listed(files, 8)}: name one of these files."
    return f"{folder} holds {listed(names, 8) if names else 'nothing'}."
