"""What the base model says, and what it says with adapters on it: loaded by PEFT, as most people would.

That PEFT loads what plait writes, no tensor missing and none left over, is part of what the demo shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


class Speaker:
    """SmolLM2 with several adapters, one of them (or none) active at a time.

    Args:
        base: folder of the model.
        adapters: name → folder.
        dtype: to compute in.
    """

    def __init__(self, base: Path, adapters: Mapping[str, Path], dtype: str) -> None:
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        if self._tokenizer.pad_token is None:  # transformers 4 does not take it from the GGUF file
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        (first, folder), *others = adapters.items()
        self._model = PeftModel.from_pretrained(model, str(folder), adapter_name=first).eval()
        for name, other in others:
            self._model.load_adapter(str(other), adapter_name=name)
        for name, place in adapters.items():
            self._check(name, place)

    def say(self, adapter: str | None, prompts: Sequence[str], length: int = 8) -> list[str]:
        """Answer prompts greedily, on one line each.

        Args:
            adapter: that is active; None for the bare base model.
            prompts: whole, with the model's own marks.
            length: of an answer, in tokens, at most.
        """
        if adapter is not None:
            self._model.set_adapter(adapter)
        tokens = self._tokenizer(
            list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        with torch.inference_mode(), self._model.disable_adapter() if adapter is None else nullcontext():
            message = self._model.generate(**tokens, max_new_tokens=length, do_sample=False)
        new = message[:, tokens["input_ids"].shape[1] :]
        return [" ".join(text.split()) for text in self._tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _check(self, name: str, folder: Path) -> None:
        """Make sure that PEFT found all of its tensors in the file, and that the file holds no others."""
        # save_embedding_layers: its default asks the Hub about the base model
        wanted = set(get_peft_model_state_dict(self._model, adapter_name=name, save_embedding_layers=False))
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            found = set(file.keys())
        if wanted != found:
            raise ValueError(f"{folder}: PEFT misses {len(wanted - found)} tensors, does not know {len(found - wanted)}.")
