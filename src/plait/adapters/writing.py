"""The one writer of adapters: scaling baked in, alpha = rank, plain names; what PEFT, vLLM and Unsloth load.

Merges, tuned merges, compressed adapters and extractions are written here: each gives its target modules with their layouts and
ranks, factors, full tensors, and the settings of `adapter_config.json` that are its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.adapters.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, alpha_of
from plait.adapters.layouts import Layout, module_keys, uniform_rank
from plait.adapters.lowrank import LowRank
from plait.adapters.names import PREFIX, pattern_of
from plait.deferred import Tensor, np, torch
from plait.tensorfiles.writer import TensorEntry, TensorWriter

if TYPE_CHECKING:
    from numpy.typing import NDArray

StreamedTensors = Sequence[
    tuple[TensorEntry, Iterable[tuple[int, Tensor]]]
]  # by path in the base model; (first row, rows) as they come


def output_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of that name."""
    found: torch.dtype = getattr(torch, name)
    return found


def tensors_in_memory(tensors: Mapping[str, Tensor]) -> StreamedTensors:
    """Return tensors in memory, path → tensor, as `AdapterWriter.write` takes full ones."""
    return [(TensorEntry(path, tensor.dtype, tuple(tensor.shape)), [(0, tensor)]) for path, tensor in tensors.items()]


class AdapterWriter:
    """Names, shapes, configuration and files of one adapter.

    Args:
        layouts: target → layout.
        ranks: target → rank of one of its matrices.
        dtype: of the tensors that belong to targets, one of torch's or its name, or of each target's.
        uniform: one rank for all targets, zero-padded; else every target has its own (`rank_pattern`, `alpha_pattern`).
        scalings: target → s in ΔW = s · B A, for factors that have not got it; all 1 when None.
        has_bias: every target has a `lora_bias`.
        is_dora: every target has DoRA's magnitudes.

    Attributes:
        rank: PEFT's r.
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        ranks: Mapping[str, int],
        *,
        dtype: str | torch.dtype | Mapping[str, torch.dtype],
        uniform: bool,
        scalings: Mapping[str, float] | None = None,
        has_bias: bool = False,
        is_dora: bool = False,
    ) -> None:
        self._layouts = layouts
        own = {t: rank * layouts[t].rank_unit for t, rank in ranks.items()}  # PEFT's r of every target
        self.rank = uniform_rank(ranks, layouts)
        self._ranks = dict.fromkeys(own, self.rank) if uniform else own
        self._names = {t: layouts[t].tensor_names(PREFIX + key) for t, key in module_keys(layouts).items()}
        self._alphas: dict[str, float] = {**self._ranks}
        if scalings is not None:
            self._alphas = {t: alpha_of(scalings[t], rank) for t, rank in self._ranks.items()}
        self._alpha = self.rank if scalings is None else Counter(self._alphas.values()).most_common(1)[0][0]
        self._dtypes: Mapping[str, str | torch.dtype] = dtype if isinstance(dtype, Mapping) else dict.fromkeys(layouts, dtype)
        self._has_bias, self._is_dora = has_bias, is_dora

    def entries(self) -> list[TensorEntry]:
        """Return every tensor that belongs to a target."""
        entries = []
        for target, layout in self._layouts.items():
            names, dtype = self._names[target], self._dtypes[target]
            shape_a, shape_b = layout.packed_shapes(self._slice_rank(target))
            entries += [TensorEntry(names.a, dtype, shape_a), TensorEntry(names.b, dtype, shape_b)]
            entries += [TensorEntry(names.bias, dtype, (layout.outputs,))] * self._has_bias
            entries += [TensorEntry(names.magnitude, dtype, layout.magnitude_shape)] * self._is_dora
        return entries

    def tensors(
        self, target: str, slices: Sequence[LowRank], *, bias: Tensor | None = None, magnitude: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return one target's tensors by their names in the file, in the dtype that they come in; `normal_in` the file's.

        Args:
            target: its path.
            slices: one delta per matrix, at most of the target's rank.
            bias: (d_out,), for an adapter that has them.
            magnitude: (d_out,), for DoRA.
        """
        layout, names, dtype = self._layouts[target], self._names[target], self._dtypes[target]
        dtype = output_dtype(dtype) if isinstance(dtype, str) else dtype
        a, b = layout.pack([s.normal_in(dtype).padded(self._slice_rank(target)) for s in slices])
        found = {names.a: a, names.b: b}
        if bias is not None:
            found[names.bias] = bias
        if magnitude is not None:
            found[names.magnitude] = magnitude.reshape(layout.magnitude_shape)
        return found

    def arrays(self, target: str, a: NDArray[Any], b: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return one linear target's factors a (r, d_in), b (d_out, r) by their names, with zeros up to its rank."""
        names, more = self._names[target], self._slice_rank(target) - len(a)
        if more:
            a, b = np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))
        return {names.a: a, names.b: b}

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return `adapter_config.json`.

        Args:
            settings: what does not follow from layouts and ranks: base model, task, which modules (`selection`).
        """
        ranks = {pattern_of(t): rank for t, rank in self._ranks.items() if rank != self.rank}
        alphas = {pattern_of(t): a for t, a in self._alphas.items() if a != self._alpha}
        config = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self._alpha,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": self._is_dora,
            "lora_bias": self._has_bias,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "bias": "none",
            "init_lora_weights": True,
            "inference_mode": True,
            "modules_to_save": None,
            **settings,
        }
        return dict(sorted(config.items()))

    def write(
        self,
        folder: Path,
        targets: Iterable[dict[str, Tensor] | dict[str, NDArray[Any]]],
        config: Mapping[str, Any],
        full: StreamedTensors = (),
    ) -> dict[str, str]:
        """Write the tensor file and `adapter_config.json`.

        Args:
            folder: an existing one.
            targets: every target's tensors (`tensors`, `arrays`), in any order; emptied as they are written.
            config: as `config` makes it.
            full: full tensors that the adapter holds.

        Returns:
            The sha256 of the tensor file by its name.
        """
        others = [entry._replace(name=PREFIX + entry.name) for entry, _ in full]
        with TensorWriter(folder / ADAPTER_WEIGHTS, [*self.entries(), *others]) as writer:
            for entry, blocks in full:
                for row, block in blocks:
                    writer.write(PREFIX + entry.name, block, row=row)
            for tensors in targets:
                for name in list(tensors):
                    writer.write(name, tensors.pop(name))  # let go of at once
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return {ADAPTER_WEIGHTS: writer.sha256}

    def _slice_rank(self, target: str) -> int:
        return self._ranks[target] // self._layouts[target].rank_unit
