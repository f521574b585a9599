"""`adapter_config.json`: what plait needs of it, and what it must refuse.

The tensors in the file are the truth for modules and ranks; the configuration supplies scaling, orientation and kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import AdapterError
from plait.parsing import read_object

_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_UNSUPPORTED = {
    "use_bdlora": "BD-LoRA's block-diagonal factors",
    "use_qalora": "QA-LoRA's grouped inputs",
    "kasa_config": "KaSA, which also changes the base model",
    "arrow_config": "Arrow routing",
    "megatron_config": "Megatron's parallel layers",
}


@dataclass(frozen=True)
class AdapterConfig:
    """The read configuration of one adapter.

    Attributes:
        raw: the whole JSON object, for keys that are only passed on.
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
        if not path.is_file():
            raise AdapterError(
                f"{path}: no such file. An adapter is a folder with adapter_config.json and adapter_model.safetensors; "
                f"{_what_is_there(path.parent)}"
            )
        raw = read_object(path, AdapterError, constants=True)
        config = AdapterConfig(raw, path)
        problem = config._unsupported()
        if problem:
            raise AdapterError(f"{path}: {problem}")
        return config

    def _unsupported(self) -> str | None:
        kind = str(self.raw.get("peft_type", "LORA")).upper()
        if kind == "ADALORA":
            return "peft_type is ADALORA; its ranks are masked while training. Convert it to LoRA first (peft.convert_to_lora)."
        if kind != "LORA":
            return f"peft_type is {kind!r}; plait merges LoRA. Convert it first, where PEFT can (peft.convert_to_lora)."
        init = self.raw.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(_BASE_CHANGED):
            return (
                f"init_lora_weights is {init!r} and was not converted: the file is relative to a base model that this "
                "initialisation changed, not to the published one. Save it with PEFT's "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...) and merge that."
            )
        for key, what in _UNSUPPORTED.items():
            if self.raw.get(key):
                return f"{key} is set: {what} has no exact form here yet."
        return next(self._wrong_values(), None)

    def _wrong_values(self) -> Iterator[str]:
        """Find values that later reading would stumble over."""
        rank, alpha = self.raw.get("r", 8), self.raw.get("lora_alpha", 8)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            yield f"r is {rank!r}; a whole number from 1 is needed."
        if not _is_number(alpha):
            yield f"lora_alpha is {alpha!r}; a number is needed."
        for key in ("rank_pattern", "alpha_pattern"):
            yield from _wrong_pattern(key, self.raw.get(key) or {})
        name = self.raw.get("base_model_name_or_path")
        if name is not None and not isinstance(name, str):
            yield f"base_model_name_or_path is {name!r}; a text is needed."
        parameters = self.raw.get("target_parameters") or []
        if not isinstance(parameters, list) or not all(isinstance(p, str) for p in parameters):
            yield f"target_parameters is {parameters!r}; a list of names is needed."

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

    def _pattern(self, key: str, target: str, default: Any) -> Any:
        for pattern, value in (self.raw.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", target):
                return value
        return default


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong_pattern(key: str, patterns: object) -> Iterator[str]:
    if not isinstance(patterns, dict):
        yield f"{key} is {patterns!r}; a mapping of module patterns to numbers is needed."
        return
    for pattern, value in patterns.items():
        if not _is_number(value) or (key == "rank_pattern" and value < 1):
            yield f"{key}[{pattern!r}] is {value!r}; a number is needed."
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{key}: {pattern!r} is no regular expression ({error})."


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder."
    below = sorted(p.parent.name for p in folder.glob("*/adapter_config.json"))
    if below:
        return f"{folder} has them in {', '.join(below[:8])}: name one of these subfolders."
    names = sorted(p.name for p in folder.iterdir())[:8]
    return f"{folder} holds {', '.join(names) if names else 'nothing'}."
