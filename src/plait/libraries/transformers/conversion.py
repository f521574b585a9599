"""How transformers makes a model's parameters of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from plait.notices import announce

_CONVERTS_FROM = 5  # the version since which parameters are not called as in a checkpoint


class Conversion(NamedTuple):
    """How transformers itself makes a model's parameters of a checkpoint's tensors, since version 5.

    Attributes:
        order: sorts tensors as loading does.
        rename: tensor → the parameter that it goes to, and the pattern of the converter that takes it (None: as it is).
        by_pattern: pattern → the converter, with `source_patterns`, `target_patterns` and `operations`.
    """

    order: Any
    rename: Any
    by_pattern: Mapping[str, Any]

    def renamed(self, name: str) -> str:
        """Return the name that a parameter of an older version of the model's code has now.

        It is the same where nothing was renamed, and where the parameter has become a part of another one.
        """
        found, pattern = self.rename(name)
        return str(found) if pattern is None else name


def checkpoint_conversion(model: Any) -> Conversion | None:
    """Return how a model is loaded; None before version 5, when a checkpoint had the parameters' own names."""
    try:
        mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
        loading = import_module("transformers.core_model_loading")
    except ImportError as error:
        if int(import_module("transformers").__version__.split(".")[0]) >= _CONVERTS_FROM:
            announce(
                f"this transformers does not say how it renames and fuses the tensors of a checkpoint ({error}): they are "
                "taken to have the names of the model's parameters."
            )
        return None
    renamings = [m for m in mapping if isinstance(m, loading.WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, loading.WeightConverter)]
    prefix, meta = model.base_model_prefix, model.state_dict()
    return Conversion(
        loading.dot_natural_key,
        lambda tensor: loading.rename_source_key(tensor, renamings, converters, prefix, meta),
        {pattern: c for c in converters for pattern in c.source_patterns},
    )


def steps_of(converter: Any) -> list[tuple[str, int | None]]:
    """Return the operations of a converter: the name of each, and the dimension that it works along."""
    return [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]


def tied_parameters(model: Any) -> dict[str, str]:
    """Return parameter → the parameter that it shares its values with."""
    named = getattr(model, "all_tied_weights_keys", None)
    if named is not None:
        return dict(named)
    model.tie_weights()  # before version 5 only the objects know it
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: owner for name, owner in owners.items() if name != owner}


def newly_made(report: Mapping[str, Any]) -> list[str]:
    """Return the parameters that were not loaded, by what `from_pretrained` reports: missing, or of another shape."""
    others = (key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])  # 5.x has the shapes with them
    return list(dict.fromkeys([*report["missing_keys"], *others]))
