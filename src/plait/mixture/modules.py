"""Where a target's delta acts in a live model: the module or parameter of a path, and what its weight looks like."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from plait.adapters.layouts import Conv1D, Layout, Linear, Parameter, module_layout
from plait.errors import did_you_mean
from plait.libraries.transformers.conversion import Conversion, checkpoint_conversion
from plait.libraries.transformers.layers import holds_transposed

_COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes that layers compute in


@dataclass(frozen=True, eq=False)
class TargetModule:
    """One adapted weight of a model.

    Attributes:
        path: in the model, of the module, or of a parameter that is targeted by its own name.
        module: that owns the weight.
        parameter: its name there.
        layout: of factors that fit.
        transposed: whether the weight is stored as (…, d_in, d_out).
    """

    path: str
    module: nn.Module
    parameter: str
    layout: Layout
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """The weight, as the module holds it now; `home` and `dense_problem` show whether it is an ordinary tensor."""
        weight = self.module._parameters[self.parameter]
        if weight is None:
            raise AssertionError(f"{self.path}: has no {self.parameter}")
        return weight

    @property
    def home(self) -> tuple[torch.device, torch.dtype] | None:
        """Device and dtype of the weight; None where it is offloaded or quantized."""
        weight = self.module._parameters.get(self.parameter)
        return None if weight is None or weight.is_meta or weight.dtype not in _COMPUTED else (weight.device, weight.dtype)

    def dense_problem(self) -> str | None:
        """Report why the weight cannot be read and replaced; None when it can."""
        if not self.layout.fits_weight:
            return f"{self.path!r}: the delta of a grouped convolution reads all channels and does not fit into its weight."
        weight = self.module._parameters.get(self.parameter)
        if weight is not None and weight.is_meta:
            return f"{self.path!r}: its weight is offloaded; keep the module on a device (device_map)."
        if weight is None or weight.dtype not in _COMPUTED or weight.numel() != self.layout.entries:
            return f"{self.path!r}: its weight is quantized; load the base unquantized."
        return None

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """Return a tensor of the weight's shape as matrices (d_out, d_in), one per slice; views wherever it is contiguous."""
        return self.layout.matrices(weight, transposed=self.transposed)


class ModuleIndex:
    """Finds the target modules of a model by the paths that adapters use.

    A path that the model does not know exactly is taken for the one whose tail it is, or that is its tail: checkpoints are
    saved with and without the prefix of the task's model (`model.`, `transformer.`).

    Args:
        model: the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._model = model

    def find(self, path: str) -> TargetModule:
        """Return the target module that a path names.

        Raises:
            ValueError: there is none, or a kind of layer that is not covered; the text says what to do.
        """
        name = self._unique(path, self._modules) or self._unique(
            self._renamed(f"{path}.weight").removesuffix(".weight"), self._modules
        )
        if name is not None:
            return self._module(name)
        owner, _, parameter = path.rpartition(".")
        name = self._unique(owner, self._modules)
        if name is not None and parameter in self._modules[name]._parameters:
            return self._parameter(name, parameter)
        raise ValueError(f"{path!r}: the model has no such module.{did_you_mean(path, self._modules)} Is it the right base?")

    def tensor(self, path: str) -> tuple[nn.Module, str]:
        """Return the owner and the name of a parameter or buffer.

        Raises:
            ValueError: there is none.
        """
        owner, _, leaf = path.rpartition(".")
        name = self._unique(owner, self._modules) or self._unique(self._renamed(path).rpartition(".")[0], self._modules)
        module = self._modules[name] if name is not None else None
        if module is None or (leaf not in module._parameters and leaf not in module._buffers):
            raise ValueError(f"{path!r}: the model has no such tensor; load it with the class that the adapter was trained on.")
        return module, leaf

    @cached_property
    def _conversion(self) -> Conversion | None:
        return checkpoint_conversion(self._model) if hasattr(self._model, "base_model_prefix") else None

    def _renamed(self, parameter: str) -> str:
        """Return a parameter's name as loading changes one of an older version of the model's code."""
        return parameter if self._conversion is None else self._conversion.renamed(parameter)

    @staticmethod
    def _unique(path: str, known: dict[str, nn.Module]) -> str | None:
        if path in known:
            return path
        near = [n for n in known if n and (n.endswith("." + path) or path.endswith("." + n))]
        longest = max((len(n) for n in near if path.endswith("." + n)), default=0)
        # of names that are tails of the path only the longest can be meant: `layers.0.q` has the tails `q` and `0.q`
        found = [n for n in near if n.endswith("." + path) or len(n) == longest]
        return found[0] if path and len(found) == 1 else None

    def _module(self, name: str) -> TargetModule:
        module = self._modules[name]
        if isinstance(module, nn.MultiheadAttention) or isinstance(
            self._modules[name.rpartition(".")[0]], nn.MultiheadAttention
        ):
            raise ValueError(
                f"{name!r}: nn.MultiheadAttention reads its weights without calling a layer, which is not covered; "
                "bake the merge and evaluate the baked model."
            )
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(f"{name!r}: an embedding with max_norm has no linear delta.")
        layout = module_layout(module) or _of_sizes(module)
        if layout is None:
            raise ValueError(
                f"{name!r}: {type(module).__name__} is not covered; linear layers, Conv1D, embeddings, convolutions and "
                "fused experts are. Bake the merge and evaluate the baked model."
            )
        transposed = bool(layout.is_stored_transposed)
        own = Linear(layout.d_out, layout.d_in) if isinstance(layout, Conv1D) else layout  # as adapters have it
        return TargetModule(name, module, "weight", own, transposed)

    def _parameter(self, owner: str, name: str) -> TargetModule:
        module = self._modules[owner]
        parameter = module._parameters[name]
        path = f"{owner}.{name}"
        if parameter is None or parameter.ndim not in (2, 3):
            raise ValueError(f"{path!r}: only parameters of 2 or 3 dimensions are covered.")
        transposed = parameter.ndim == 3 and holds_transposed(module)
        d_out, d_in = parameter.shape[-2:] if not transposed else reversed(parameter.shape[-2:])
        layout = Parameter(d_out, d_in, parameter.shape[0] if parameter.ndim == 3 else 1)
        return TargetModule(path, module, name, layout, transposed)


def _of_sizes(module: nn.Module) -> Layout | None:
    """Return the layout of a module that says what it maps: quantized layers are not nn.Linear."""
    d_out, d_in = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return Linear(d_out, d_in) if isinstance(d_out, int) and isinstance(d_in, int) else None
