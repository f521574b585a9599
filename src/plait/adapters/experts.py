"""Which tensor of a module with fused experts belongs to which parameter.

PEFT wraps a module once per targeted parameter, in the order of the module's parameters, the first innermost:
`….experts.base_layer.lora_A` is then `gate_up_proj` and `….experts.lora_A` is `down_proj`. The key alone does not say which;
the number of wrappers, the configuration's `target_parameters` and the usual order of an expert's parameters do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from plait.adapters.layouts import Kind

_WRAPPED = ".base_layer"
# The order in which transformers' expert modules declare their parameters.
_ORDER = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")


class ExpertNaming:
    """Names the parameters behind the keys of one adapter.

    Args:
        target_parameters: of the configuration, such as `mlp.experts.gate_up_proj`.
        modules: module paths as the keys spell them, with the parts found there.

    Attributes:
        problems: what cannot be told apart; empty when all is clear.
    """

    def __init__(self, target_parameters: tuple[str, ...], modules: Mapping[str, object]) -> None:
        self.problems: list[str] = []
        self._paths: dict[str, str] = {}
        depths: dict[str, list[str]] = defaultdict(list)
        for module in modules:
            depths[_unwrapped(module)].append(module)
        for bare, wrappers in depths.items():
            names = sorted({t.rpartition(".")[2] for t in target_parameters if _targets(t, bare)}, key=_declared)
            if not names:
                continue
            wrappers.sort(key=len, reverse=True)  # innermost first
            known = all(name in _ORDER for name in names) or len(names) == 1
            if len(wrappers) != len(names) or not known:
                self.problems.append(
                    f"{bare!r}: {len(wrappers)} LoRA layers for parameters {', '.join(names)}; which is which cannot be told"
                )
                continue
            self._paths |= {module: f"{bare}.{name}" for module, name in zip(wrappers, names, strict=True)}

    def path_and_kind(self, module: str, parts: Mapping[str, str]) -> tuple[str, Kind]:
        """Return the target path and the kind of layer behind a key."""
        if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
            return module, "embedding"
        if module in self._paths:
            return self._paths[module], "experts"
        return module, "linear"


def expert_keys(targets: list[str]) -> dict[str, str]:
    """Return the module path under which PEFT stores each parameter path: nested wrappers, the first parameter innermost."""
    modules: dict[str, list[str]] = defaultdict(list)
    for target in targets:
        modules[target.rpartition(".")[0]].append(target)
    keys = {}
    for module, members in modules.items():
        ordered = sorted(members, key=lambda t: _declared(t.rpartition(".")[2]))
        for depth, target in enumerate(reversed(ordered)):
            keys[target] = module + _WRAPPED * depth
    return keys


def _unwrapped(module: str) -> str:
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    return module


def _targets(parameter: str, module: str) -> bool:
    """Say whether a `target_parameters` entry names a parameter of a module: by exact path or by suffix, as PEFT does.

    An entry without an owner (`gate_up_proj`) can only mean a container of experts.
    """
    owner = parameter.rpartition(".")[0] or "experts"
    return module == owner or module.endswith("." + owner)


def _declared(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)
