"""The base model in memory with adapters on it, and two questions to ask it: which label, and what would you say?

Needs transformers and PEFT; that the adapters load there is part of what the demo shows.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from scoring import Example, Task
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = "base"  # the name under which the model without any adapter is asked
_BATCH = 32


class Live:
    """SmolLM2 with several adapters, one of them (or none) active at a time."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        quiet()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        if self.tokenizer.pad_token is None:  # transformers 4 does not take it from the GGUF file
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        (first, folder), *others = adapters.items()
        self.model = PeftModel.from_pretrained(model, str(folder), adapter_name=first).eval()
        _check_keys(self.model, first, folder)
        for name, folder in others:
            self.add(name, folder)

    def add(self, name: str, folder: Path) -> None:
        """Load one more adapter."""
        self.model.load_adapter(str(folder), adapter_name=name)
        _check_keys(self.model, name, folder)

    def remove(self, name: str) -> None:
        """Unload an adapter."""
        self.model.set_adapter(next(other for other in self.model.peft_config if other != name))
        self.model.delete_adapter(name)

    @contextmanager
    def active(self, name: str) -> Iterator[Any]:
        """Make one adapter, or the bare base model, the active one; the value is the causal model."""
        with torch.inference_mode():
            if name == BASE:
                with self.model.disable_adapter():
                    yield self.model.get_base_model()
            else:
                self.model.set_adapter(name)
                yield self.model.get_base_model()

    def classify(
        self, name: str, task: Task, examples: Sequence[Example], report: Callable[[int], object] = lambda done: None
    ) -> list[str]:
        """Return the likeliest label of every example.

        The labels of every task begin with different tokens, so that the first token decides, and one look at the last
        position of the prompt is enough. What all prompts begin with is read once (half of the work).

        Args:
            name: the adapter, or `BASE`.
            task: its prompt and labels.
            examples: the texts.
            report: called with the number of examples finished since it was last called.
        """
        starts = self._label_starts(task)
        prompts = self.tokenizer([task.ask(e) for e in examples], add_special_tokens=False)["input_ids"]
        shared = _shared(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding per batch
        chosen = [""] * len(prompts)
        with self.active(name) as causal:
            read = causal.model(torch.tensor([prompts[0][:shared]]), use_cache=True).past_key_values
            for at in range(0, len(order), _BATCH):
                batch = order[at : at + _BATCH]
                last = _last_hidden(causal, read, shared, [prompts[i][shared:] for i in batch])
                scores = last.float() @ causal.lm_head.weight[starts].float().mT  # (batch, labels)
                for i, best in zip(batch, scores.argmax(1).tolist(), strict=True):
                    chosen[i] = task.labels[best]
                report(len(batch))
        return chosen

    def answer(self, name: str, prompts: Sequence[str], length: int = 12) -> list[str]:
        """Return what the model says to every prompt: greedy, at most `length` tokens, on one line."""
        tokens = self.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        with self.active(name) as causal:
            said = causal.generate(**tokens, max_new_tokens=length, do_sample=False)
        new = said[:, tokens["input_ids"].shape[1] :]
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _label_starts(self, task: Task) -> list[int]:
        starts = [self.tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in task.labels]
        if len(set(starts)) < len(starts):
            raise ValueError(f"task {task.name!r}: two labels begin with the same token, which cannot tell them apart.")
        return starts


def _shared(prompts: Sequence[list[int]]) -> int:
    """Return how many first tokens all prompts have in common, leaving every prompt at least one of its own."""
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
    return min(same, min(map(len, prompts)) - 1)


def _last_hidden(causal: Any, read: Any, shared: int, rests: Sequence[list[int]]) -> Tensor:
    """Continue prompts whose first `shared` tokens were read already; return the states at their ends, (n, width)."""
    ends = torch.tensor([len(rest) for rest in rests])
    ids = pad_sequence([torch.tensor(rest) for rest in rests], batch_first=True)
    known = torch.arange(shared + ids.shape[1]) < shared + ends[:, None]  # padding is on the right
    cache = copy.deepcopy(read)
    cache.batch_repeat_interleave(len(rests))
    hidden = causal.model(ids, attention_mask=known.long(), past_key_values=cache).last_hidden_state
    return hidden[torch.arange(len(rests)), ends - 1]


def _check_keys(model: PeftModel, name: str, folder: Path) -> None:
    """Make sure that PEFT found all of its tensors in the file, and that the file holds no others."""
    # save_embedding_layers: its default asks the Hub about the base model
    wanted = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        found = set(file.keys())
    if wanted != found:
        raise ValueError(f"{folder}: PEFT misses {len(wanted - found)} tensors, does not know {len(found - wanted)}.")


def quiet() -> None:
    """Keep transformers' own progress bars and notes out of the demo's output."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
