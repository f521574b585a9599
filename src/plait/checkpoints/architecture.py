"""What only the model's code knows: how parameters are called in a checkpoint, which are tied, which are transposed.

transformers builds the model without weights, and its own conversion mapping says which checkpoint tensors a parameter is made
of: since version 5 experts are fused, and some models are renamed, on loading. Asked only where names alone do not decide.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.adapters.layouts import Convolution, Layout, module_layout
from plait.checkpoints.files import architectures, read_config
from plait.deferred import torch
from plait.extras import missing_packages
from plait.hub.pretrained import load_config
from plait.libraries.transformers.conversion import Conversion, checkpoint_conversion, steps_of, tied_parameters
from plait.libraries.transformers.kinds import writing_part
from plait.libraries.transformers.layers import holds_transposed, is_conv1d


@dataclass(frozen=True)
class Part:
    """Which piece of a model's parameter one checkpoint tensor holds.

    Attributes:
        tensor: name in the checkpoint.
        expert: which matrix of a stack; None for the complete parameter, or for rows of a single matrix.
        start: its first row in the parameter's matrix.
        row: the index of that row in the tensor.
        rows: how many; None for all that the tensor has.
    """

    tensor: str
    expert: int | None = None
    start: int = 0
    row: int = 0
    rows: int | None = None


@dataclass(frozen=True)
class Architecture:
    """A model without weights.

    Attributes:
        parts: parameter → the checkpoint tensors that it is made of.
        unknown: parameter → the conversion that plait has no form for.
        tied: parameter → the parameter that it shares its values with.
        transposed: owners of parameters that are stored as (d_in, d_out).
        layers: modules on which PEFT's LoRA is a delta of the weight → layout of its factors.
        renamed: what loading makes of a name that older versions of the code gave, `language_model.model.layers…` for one.
        parameters: names of all.
    """

    parts: Mapping[str, tuple[Part, ...]] = field(repr=False)
    unknown: Mapping[str, str]
    tied: Mapping[str, str]
    transposed: frozenset[str]
    layers: Mapping[str, Layout] = field(default_factory=dict)
    renamed: Callable[[str], str] = field(default=str, repr=False)
    parameters: frozenset[str] = field(default=frozenset(), repr=False)

    @staticmethod
    def of(folder: Path, shapes: Mapping[str, tuple[int, ...]], class_name: str | None = None) -> Architecture:
        """Build the model of a folder's `config.json`.

        Args:
            folder: of the base model.
            shapes: checkpoint tensor → shape.
            class_name: of transformers' class, in place of those that the configuration gives.

        Raises:
            ArchitectureUnknown: transformers is not installed, or has no class for it.
        """
        model = _empty_model(folder, class_name)
        conversion = checkpoint_conversion(model)
        parts, unknown = _parts(model, conversion, shapes)
        transposed = {name for name, m in model.named_modules() if is_conv1d(m) or holds_transposed(m)}
        tied, layers, renamed = tied_parameters(model), dict(_layers(model)), str if conversion is None else conversion.renamed
        parameters = frozenset(name for name, _ in model.named_parameters())
        return Architecture(parts, unknown, tied, frozenset(transposed), layers, renamed, parameters)


class ArchitectureUnknown(Exception):
    """The model cannot be built; the text says why, as the end of a sentence."""


def _empty_model(folder: Path, class_name: str | None) -> Any:
    try:
        import transformers
    except ImportError:
        raise ArchitectureUnknown(missing_packages("reading the model's code", {"eval": ["transformers"]})) from None
    try:
        names = architectures(read_config(folder)) if class_name is None else [class_name]
        part = writing_part(load_config(folder)) if class_name is None and "thinker_config" in read_config(folder) else None
        names = names if part is None else part.architectures
        model_class = next(getattr(transformers, n) for n in names if hasattr(transformers, n))
        config = part or load_config(folder)
        with torch.device("meta"):
            return model_class(config)
    except StopIteration:
        raise ArchitectureUnknown(f"transformers has no class for its architectures {names}") from None
    except Exception as error:  # whatever a model's code raises
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArchitectureUnknown(f"transformers cannot build it ({text})") from None


def _layers(model: Any) -> Iterator[tuple[str, Layout]]:
    from torch import nn

    for name, module in model.named_modules():
        layout = module_layout(module)
        # attention reads such a weight itself, past any adapter
        if layout is None or isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            continue
        # PEFT's LoRA convolves without dilation, and with zeros around
        if not isinstance(layout, Convolution) or (set(module.dilation) == {1} and module.padding_mode == "zeros"):
            yield name, layout


def _parts(
    model: Any, conversion: Conversion | None, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[Part, ...]], dict[str, str]]:
    """Ask transformers where every checkpoint tensor goes, as its own loading does."""
    parameters = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    if conversion is None:
        return {name: (Part(name),) for name in parameters if name in shapes}, {}
    parts: dict[str, tuple[Part, ...]] = {}
    gathered: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for tensor in sorted(shapes, key=conversion.order):
        name, pattern = conversion.rename(tensor)
        if name not in parameters and tensor in parameters:
            name, pattern = tensor, None
        if pattern is not None and name in parameters:
            gathered[name][pattern].append(tensor)
        elif name in parameters:
            parts[name] = (Part(tensor),)
    unknown = {}
    for name, sources in gathered.items():
        converter = conversion.by_pattern[next(iter(sources))]
        try:
            parts |= _converted(name, converter, sources, shapes)
        except _NoForm:
            unknown[name] = " + ".join(step for step, _ in steps_of(converter))
    return parts, unknown


class _NoForm(Exception):
    pass


def _converted(
    name: str, converter: Any, sources: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Part, ...]]:
    """Return the parts of the parameters behind one converter: a list of experts stacked, matrices put together or apart."""
    steps = steps_of(converter)
    ordered = [sources[p] for p in converter.source_patterns if p in sources]
    if steps == [("MergeModulelist", 0)] and len(ordered) == 1:
        return {name: tuple(Part(t, expert=i) for i, t in enumerate(ordered[0]))}
    if steps == [("MergeModulelist", 0), ("Concatenate", 1)]:
        return {name: tuple(Part(t, expert=i, start=s) for group, s in _stacked(ordered, shapes) for i, t in enumerate(group))}
    if steps == [("Concatenate", 0)] and all(len(group) == 1 for group in ordered):
        return {name: tuple(Part(group[0], start=s) for group, s in _stacked(ordered, shapes))}
    if steps == [("Chunk", 0)] and len(ordered) == 1 and len(ordered[0]) == 1:
        tensor, targets = ordered[0][0], converter.target_patterns
        rows, rest = divmod(shapes[tensor][0], len(targets))
        ends = [t.replace("\\", "") for t in targets]
        if rest or ends[0] not in name:
            raise _NoForm
        return {name.replace(ends[0], e): (Part(tensor, row=k * rows, rows=rows),) for k, e in enumerate(ends)}
    raise _NoForm


def _stacked(groups: Iterable[list[str]], shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[list[str], int]]:
    """Return groups of tensors with the row at which each begins when they are put below each other."""
    found, start = [], 0
    for group in groups:
        found.append((group, start))
        start += shapes[group[0]][0]
    return found
