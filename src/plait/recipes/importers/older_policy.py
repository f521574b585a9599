"""What a recipe of the older framework says of λ by its `lambda_policy`, in the present form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from plait.recipes.paths import KeyPath, Plain, is_number
from plait.recipes.problems import Problem, show_value, spell_value
from plait.recipes.validation import unknown_key

#: Methods that interpolate two adapters: λ of the first, 1 − λ of the second.
PAIRS = ("weighted", "weighted_delta")
WITHOUT_LAMBDA = ("uniform", "uniform_delta", "uniform_scalar_delta", "task_vector", "weighted_delta_n")
_PATH: KeyPath = ("lambda_policy",)


@dataclass
class OlderPolicy:
    """What became of an older recipe's policy.

    Attributes:
        notes: what was found, what means the same now, and what to know of it.
        method_forms: what the new `method` expresses, and what to know of it.
        moved: path in the recipe → the path where its user wrote it.
        problems: what cannot be carried over.
    """

    notes: list[tuple[str, str, str]] = field(default_factory=list)
    method_forms: list[tuple[str, str]] = field(default_factory=list)
    moved: dict[KeyPath, KeyPath] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, path: KeyPath, text: str) -> None:
        """Note what cannot be carried over."""
        self.problems.append(Problem(path, text))


def take_policy(policy: Plain, method: str | None, data: dict[str, Plain], params: dict[str, Plain]) -> OlderPolicy:
    """Return what a policy means for a method.

    Args:
        policy: the value of `lambda_policy`.
        method: name of the recipe's.
        data: the recipe without the key; gets `method` and `weights` of a policy per layer.
        params: the method's parameters; get or lose `lambda`.
    """
    found = OlderPolicy()
    if not isinstance(policy, Mapping):
        found.refuse(_PATH, f"lambda_policy is {show_value(policy)}; it must be a mapping.")
        return found
    allowed = {"scalar": ["type", "value"], "per_layer": ["type", "default", "overrides"]}.get(str(policy.get("type")))
    if allowed is None:
        found.refuse((*_PATH, "type"), f"type is {show_value(policy.get('type'))}; it must be 'scalar' or 'per_layer'.")
        return found
    for key in policy.keys() - set(allowed):
        found.refuse((*_PATH, key), unknown_key(str(key), allowed))
    if method in (*WITHOUT_LAMBDA, "ties", "dare"):
        found.notes.append((f"lambda_policy: {spell_value(dict(policy))}", "", f" It never had an effect on {method!r}."))
    elif method not in PAIRS:
        found.refuse(_PATH, f"method {method!r} never had a lambda_policy; write weights: {{policy: …}}.")
    elif "weights" in data:
        found.refuse(_PATH, "lambda_policy and weights mean the same; keep weights.")
    elif policy["type"] == "scalar":
        if "value" in policy:
            params["lambda"] = policy["value"]
            found.moved["method", "lambda"] = (*_PATH, "value")
        found.method_forms.append((f"lambda_policy: {spell_value(dict(policy))}", _note(method)))
    else:
        _take_layers(policy, method, data, params, found)
    return found


def _take_layers(
    policy: Mapping[str, Plain], method: str | None, data: dict[str, Plain], params: dict[str, Plain], found: OlderPolicy
) -> None:
    """Express λ of the first and 1 − λ of the second adapter, layer by layer."""
    given = params.pop("lambda", None)
    data["method"] = "linear"
    names = [a.get("name") for a in data.get("adapters") or [] if isinstance(a, Mapping)]
    if len(names) != 2 or None in names:
        found.refuse(("adapters",), f"a lambda_policy of {method!r} needs 2 adapters that have names.")
        return
    layers = policy.get("overrides") or {}
    if not isinstance(layers, Mapping):
        found.refuse((*_PATH, "overrides"), f"overrides is {show_value(layers)}; it must map layers to numbers.")
        return
    default = policy.get("default", given)
    lambdas = {(*_PATH, "default"): default, **{(*_PATH, "overrides", key): value for key, value in layers.items()}}
    wrong = {p: v for p, v in lambdas.items() if not (is_number(v) and 0 <= v <= 1)}
    for place, value in wrong.items():
        found.refuse(place, f"lambda of {place[-1]} is {show_value(value)}; it must be a number, >= 0 and <= 1.")
    if wrong:
        return
    data["weights"] = {
        "policy": "per_layer",
        "default": _shares(names, default),
        "layers": {str(key): _shares(names, value) for key, value in layers.items()},
    }
    new = f"method: linear` and `weights: {spell_value(data['weights'])}"
    found.notes.append((f"lambda_policy: {spell_value(dict(policy))}", new, _note(method)))


def _note(method: str | None) -> str:
    return f" It had no effect on {method!r} before; it has one now." if method == "weighted_delta" else ""


def _shares(names: list[Plain], value: float) -> dict[str, float]:
    """Return λ for the first adapter and 1 − λ, taken in decimals as λ is written, for the second."""
    return {names[0]: float(value), names[1]: float(1 - Decimal(repr(value)))}
