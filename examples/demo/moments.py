"""Collect what `regmean` and `ssr` ask for: the second moments of every adapted module's inputs, from unlabelled texts.

`python examples/demo/moments.py` writes one file per task, `<task>.safetensors`, from the first 200 training texts, each read
with the task's own adapter active. Then:

    plait merge examples/demo/adapters/* --method regmean --moments out/demo-moments -o out/regmean
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base_model import base_model

import plait
from plait.adapters.adapter import Adapter
from plait.libraries.transformers import quiet_loading
from plait.tasks.examples import read_examples
from plait.tasks.loading import load_tasks

if TYPE_CHECKING:
    from torch import Tensor

    from plait.mixture import Mixture

HERE = Path(__file__).resolve().parent
NAMES = ("sentiment", "supersense", "langid")
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
            if path in self.sums:
                self.sums[path] += self._last[1]
            else:
                self.sums[path] = self._last[1].clone()
            self.tokens[path] = self.tokens.get(path, 0) + x.shape[:-1].numel()

        return take

    def means(self) -> dict[str, Tensor]:
        """Return E[x xᵀ] per module."""
        return {path: total / self.tokens[path] for path, total in self.sums.items()}


@contextmanager
def _watching(model: Any, paths: Iterable[str], sums: _Sums) -> Iterator[None]:
    """Take in the inputs of modules."""
    handles = [model.get_submodule(path).register_forward_pre_hook(sums.hook(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def moments(mixture: Mixture, name: str, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return E[x xᵀ] of every adapted module's inputs, over all tokens of some prompts, (d_in, d_in) float32 each.

    Args:
        mixture: the base with the adapters.
        name: the adapter that is active.
        prompts: whole.
    """
    import torch

    sums = _Sums()
    with torch.inference_mode(), mixture.active({name: 1.0}) as model, _watching(model, mixture.axes.modules, sums):
        for prompt in prompts:  # one at a time: no padding
            ids = mixture.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
            model(ids, logits_to_keep=1)
    return sums.means()


def collect(base: Path, out: Path, texts: int) -> None:
    """Write `<task>.safetensors` for every task.

    Args:
        base: folder of the base model.
        out: folder to make them in.
        texts: per task, the first of the training split in the file's order: it is shuffled, and no label chooses them.
    """
    from plait.mixture import Mixture

    adapters = [Adapter.open(HERE / "adapters" / name, name) for name in NAMES]
    with quiet_loading():
        mixture = Mixture.load(base, adapters)
    for task in load_tasks([HERE / "tasks" / f"{name}.yaml" for name in NAMES]):
        prompts = [str(example.prompt) for example in read_examples(task, "train").items[:texts]]
        plait.save_moments(out / f"{task.name}.safetensors", moments(mixture, task.name, prompts))


def main() -> None:
    """Write the moments of all three tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo-moments"), help="folder to make files in [%(default)s]")
    parser.add_argument("--texts", type=int, default=TEXTS, help="per task [%(default)s]")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch when it is first imported
    collect(base_model(), options.out, options.texts)
    print(f"{options.texts} texts per task: {', '.join(str(options.out / f'{name}.safetensors') for name in NAMES)}")


if __name__ == "__main__":
    main()
