"""Collect what `regmean` and `ssr` ask for: the second moments of every adapted module's inputs, from unlabelled texts.

`python examples/demo/moments.py` writes one file per task, `<task>.safetensors`, from the first 200 training texts, each read
with the task's own adapter active. Then:

    plait merge examples/demo/adapters/* --method regmean --moments out/demo-moments -o out/regmean
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base_model import base_model
from scoring import Example, Task, load_tasks

import plait

if TYPE_CHECKING:
    from live import Live
    from torch import Tensor

TEXTS = 200


class _Sums:
    """Σ x xᵀ over the tokens that enter some modules, float32, and how many tokens that were."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._last: tuple[Any, Any] = (None, None)

    def hook(self, path: str) -> Any:
        """Return a forward hook that takes a module's inputs in."""

        def take(module: Any, inputs: tuple[Any, ...]) -> None:
            (x,) = inputs
            if self._last[0] is not x:  # q, k and v read the same tensor, gate and up too
                rows = x.reshape(-1, x.shape[-1]).float()
                self._last = (x, rows.mT @ rows)
            self.sums[path] = self.sums[path] + self._last[1] if path in self.sums else self._last[1].clone()
            self.tokens[path] = self.tokens.get(path, 0) + x.shape[:-1].numel()

        return take

    def means(self) -> dict[str, Tensor]:
        """Return E[x xᵀ] per module."""
        return {path: total / self.tokens[path] for path, total in self.sums.items()}


@contextmanager
def _watching(model: Any, sums: _Sums) -> Iterator[None]:
    """Take in the inputs of every module that carries adapters."""
    handles = [
        module.register_forward_pre_hook(sums.hook(path))
        for path, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def collect(live: Live, name: str, task: Task, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return E[x xᵀ] of every adapted module's inputs, over all tokens of a task's prompts, (d_in, d_in) float32.

    Args:
        live: the model.
        name: the adapter that is active.
        task: whose prompt.
        examples: the texts; their labels are not looked at.
    """
    import torch

    sums = _Sums()
    with _watching(live.model, sums), live.active(name) as causal:
        for example in examples:  # one at a time: no padding
            ids = live.tokenizer(task.ask(example), add_special_tokens=False)["input_ids"]
            causal.model(torch.tensor([ids]))
    return sums.means()


def unlabelled(task: Task, count: int = TEXTS) -> list[Example]:
    """Return the first training texts, in the file's order: it is shuffled, and no label decides which they are."""
    return task.examples("train")[:count]


def main() -> None:
    """Write the moments of all three tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo-moments"), help="folder to make files in [%(default)s]")
    parser.add_argument("--texts", type=int, default=TEXTS, help="per task [%(default)s]")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch when it is first imported
    from live import Live

    tasks = load_tasks()
    live = Live(base_model(), {task.name: task.adapter for task in tasks})
    live.model.bfloat16()  # the adapters too, as they are stored; PEFT would compute them in float32
    for task in tasks:
        target = options.out / f"{task.name}.safetensors"
        plait.save_moments(target, collect(live, task.name, task, unlabelled(task, options.texts)))
        print(f"{target}: {options.texts} texts")


if __name__ == "__main__":
    main()
