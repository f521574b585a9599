"""mergekit's YAML, in plait's form where it has one.

Everything that maps is carried over exactly; where the same words give other numbers a note says so; what has no
counterpart is a problem. Written from what mergekit 0.1 does (its documents and its behaviour). Knows nothing of files, and does not
check what it passes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from plait.errors import AddressError
from plait.hub.references import parse_reference
from plait.recipes.paths import KeyPath, Plain
from plait.recipes.problems import Converted, Problem, listed, show
from plait.recipes.validation import unknown_key

_TOP = (
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
_TOKENIZER = ("tokenizer_source", "tokenizer", "chat_template")
_DTYPES = ("float32", "bfloat16", "float16")
_SUFFIX = ".weight"  # mergekit's filters see tensor names, plait's patterns see modules
_NEAREST = {
    "slices": "a merge of whole adapters: list them under 'models'",
    "modules": "a merge of whole adapters: list them under 'models'",
}


@dataclass(frozen=True)
class _Method:
    """A mergekit method that plait has.

    Attributes:
        normalize: mergekit's default for dividing by the sum of the weights.
        rescale: mergekit's default for rescaling what survives a mask; None where there is no mask.
        params: the parameters besides `weight`, with mergekit's defaults.
        fixed: what plait's method is told in any case.
        elects: whether signs are elected.
        notes: where numbers differ.
    """

    normalize: bool
    rescale: bool | None = None
    params: Mapping[str, float] = field(default_factory=dict)
    fixed: Mapping[str, Plain] = field(default_factory=dict)
    elects: bool = False
    notes: tuple[str, ...] = ()


_VOTE = {"weighted_vote": True, "zero_sign": "plus"}
_KEYED = "each adapter's mask comes from (seed, adapter, module); mergekit draws all masks from one generator"
METHODS = {
    "linear": _Method(normalize=True),
    "task_arithmetic": _Method(normalize=False),
    "ties": _Method(
        normalize=True,
        rescale=False,
        params={"density": 1.0},
        fixed={"flavor": "mergekit", "space": "delta"},
        elects=True,
    ),
    "dare_linear": _Method(
        normalize=False,
        rescale=True,
        params={"density": 1.0},
        fixed={"space": "delta"},
        notes=(f"{_KEYED}, and rescales survivors to the tensor's L1 norm, where plait divides them by density.",),
    ),
    "dare_ties": _Method(
        normalize=False,
        rescale=True,
        params={"density": 1.0},
        fixed={**_VOTE, "space": "delta"},
        elects=True,
        notes=(f"{_KEYED}, and rescales survivors to the tensor's L1 norm, where plait divides them by density.",),
    ),
    "della": _Method(
        normalize=True,
        rescale=True,
        params={"density": 1.0, "epsilon": 0.15},
        fixed={**_VOTE, "space": "delta"},
        elects=True,
        notes=(
            f"{_KEYED}, and rescales survivors to the tensor's L1 norm, where plait divides each by its probability.",
        ),
    ),
    "breadcrumbs": _Method(
        normalize=False,
        rescale=False,
        params={"density": 1.0, "gamma": 0.01},
        fixed={"space": "delta"},
        notes=(
            "where gamma times a matrix's entries is below 1, mergekit drops all of them and plait none of the top.",
        ),
    ),
}
_ABSENT = ("della_linear", "breadcrumbs_ties")
_ALL_PARAMS = ("weight", "density", "epsilon", "gamma", "lambda", "normalize", "rescale", "int8_mask")


@dataclass(frozen=True)
class _Model:
    """An entry of `models`: an adapter, or the base model itself when `adapter` is None."""

    index: int
    base: str | None
    adapter: str | None
    parameters: Mapping[str, Plain]

    @property
    def path(self) -> KeyPath:
        return ("models", self.index)


@dataclass(frozen=True)
class _Setting:
    """A parameter of one model: values by filter, the first that matches counts; the filter None matches everything."""

    values: tuple[tuple[str | None, Plain], ...]
    path: KeyPath

    @property
    def filters(self) -> tuple[str | None, ...]:
        return tuple(f for f, _ in self.values)


class _GiveUpError(Exception):
    """Nothing more can be said about a recipe."""


def is_mergekit(data: Mapping[str, Plain]) -> bool:
    """Say whether this is a recipe of mergekit's."""
    return "merge_method" in data and any(key in data for key in ("models", "slices", "modules"))


def convert_mergekit(data: Mapping[str, Plain]) -> Converted:
    """Rewrite a mergekit recipe as plait's."""
    conversion = _Conversion(data)
    try:
        result = conversion.run()
    except _GiveUpError:
        result = {}
    return Converted(result, tuple(conversion.notes), conversion.moved, tuple(conversion.problems))


class _Conversion:
    """One mergekit recipe on its way to plait's form."""

    def __init__(self, data: Mapping[str, Plain]) -> None:
        self._data = data
        self.notes: list[str] = []
        self.problems: list[Problem] = []
        self.moved: dict[KeyPath, KeyPath] = {}

    def run(self) -> dict[str, Plain]:
        self._check_keys()
        method = self._method()
        models = list(self._models())
        base = self._base(models)
        adapters = [m for m in models if m.adapter is not None]
        if self.problems:
            raise _GiveUpError
        result: dict[str, Plain] = {"version": 1} | ({"base_model": base} if base else {})
        result["adapters"] = self._entries(adapters)
        result["method"] = self._params(method, adapters)
        result |= self._weights(method, models, result)
        result["scale"] = self._scale(method, adapters, result)
        if dtype := self._dtype():
            result["output"] = {"dtype": dtype}
        self._say_what_is_left_out(method)
        return result

    def _problem(self, path: KeyPath, text: str) -> None:
        self.problems.append(Problem(path, text))

    @property
    def _name(self) -> str:
        return str(self._data["merge_method"])

    def _check_keys(self) -> None:
        for key in self._data:
            if key in _NEAREST:
                self._problem((key,), f"plait does not cut models into {key}. It makes {_NEAREST[key]}.")
            elif key not in _TOP:
                self._problem((key,), unknown_key(key, _TOP))

    def _method(self) -> _Method:
        if self._name in METHODS:
            return METHODS[self._name]
        text = f"mergekit's {self._name!r} has no counterpart here; these have one: {', '.join(METHODS)}."
        if self._name in _ABSENT:
            text += f" The nearest is {self._name.partition('_')[0]!r}."
        self._problem(("merge_method",), text)
        raise _GiveUpError

    def _models(self) -> Iterator[_Model]:
        models = self._data.get("models")
        if not isinstance(models, list) or not models:
            if "models" in self._data:
                self._problem(("models",), f"models is {show(models)}; it must be a list of models.")
            raise _GiveUpError
        bases = {_base_of(m.get("model")) for m in models if isinstance(m, Mapping)} | {self._data.get("base_model")}
        for i, model in enumerate(models):
            if isinstance(model, Mapping) and isinstance(model.get("model"), str):
                yield self._model(i, model, bases)
            else:
                self._problem(("models", i), "it must be a mapping with the text 'model', such as {model: BASE+LORA}.")

    def _model(self, index: int, model: Mapping[str, Plain], bases: set[Plain]) -> _Model:
        path = ("models", index)
        for key in model.keys() - {"model", "parameters"}:
            self._problem((*path, key), unknown_key(key, ["model", "parameters"]))
        parameters = model.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            self._problem((*path, "parameters"), f"parameters is {show(parameters)}; it must be a mapping.")
            parameters = {}
        base, plus, adapter = model["model"].partition("+")
        if "+" in adapter:
            self._problem((*path, "model"), f"{model['model']!r} holds '+' twice; write BASE+LORA.")
        if plus:
            return _Model(index, base or None, adapter, parameters)
        if base in bases:
            return _Model(index, base, None, parameters)
        return _Model(index, None, base, parameters)

    def _base(self, models: Sequence[_Model]) -> str | None:
        given = self._data.get("base_model")
        if given is not None and (not isinstance(given, str) or "+" in given):
            self._problem(("base_model",), f"base_model is {show(given)}; it must be one model, without an adapter.")
            return None
        bases = list(dict.fromkeys([*([given] if given else []), *(m.base for m in models if m.base)]))
        if len(bases) > 1:
            shown = listed([repr(b) for b in bases])
            self._problem(("models",), f"the adapters stand on {len(bases)} base models, {shown}; plait needs one.")
        if not any(m.adapter for m in models):
            self._problem(("models",), "there is no adapter among them; write BASE+LORA, or the adapter alone.")
        return bases[0] if bases else None

    def _entries(self, adapters: Sequence[_Model]) -> list[dict[str, Plain]]:
        entries: list[dict[str, Plain]] = []
        names: list[str] = []
        for i, model in enumerate(adapters):
            try:
                name = parse_reference(str(model.adapter)).default_name()
            except AddressError as error:
                self._problem((*model.path, "model"), str(error))
                continue
            names.append(name)
            unique = name if names.count(name) == 1 else f"{name}-{names.count(name)}"
            entries.append({"name": unique, "path": model.adapter})
            self.moved["adapters", i] = model.path
            self.moved["adapters", i, "path"] = (*model.path, "model")
        if self.problems:
            raise _GiveUpError
        if any(not str(m.adapter).startswith(("/", "~")) for m in adapters):
            self.notes.append("relative paths start at the recipe's folder; mergekit starts at the working directory.")
        return entries

    def _params(self, method: _Method, adapters: Sequence[_Model]) -> dict[str, Plain]:
        self._check_params(adapters)
        params: dict[str, Plain] = {"name": self._name, **method.fixed}
        for key, default in method.params.items():
            params[key], self.moved["method", key] = self._equal(key, default, adapters)
        density = params.get("density")
        if density == 1 and "epsilon" in params:  # mergekit leaves a delta of density 1 alone
            params["epsilon"] = 0.0
        if "gamma" in params and _is_number(density) and _is_number(params["gamma"]):
            params["gamma"] = max(0.0, min(params["gamma"], 1 - density))  # it fills up to density before it drops
        if method.elects:
            divides = self._flag("normalize", method.normalize)
            params["divisor"] = "weight" if divides else "none"
            if params.get("flavor") and divides:
                del params["divisor"]
        return params

    def _check_params(self, adapters: Sequence[_Model]) -> None:
        everywhere = [(("parameters",), self._global()), *((((*m.path, "parameters")), m.parameters) for m in adapters)]
        for path, parameters in everywhere:
            for key in parameters:
                if key not in _ALL_PARAMS:
                    self._problem((*path, key), unknown_key(key, _ALL_PARAMS))

    def _global(self) -> Mapping[str, Plain]:
        parameters = self._data.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            self._problem(("parameters",), f"parameters is {show(parameters)}; it must be a mapping.")
            raise _GiveUpError
        return parameters

    def _equal(self, key: str, default: float, adapters: Sequence[_Model]) -> tuple[Plain, KeyPath]:
        """Return a parameter that plait has once, from where mergekit may give one per model."""
        settings = [self._setting(key, m) for m in adapters]
        values: dict[str, Plain] = {}
        for setting in settings:
            if setting is not None and setting.filters != (None,):
                self._problem(setting.path, f"{key} must be one number: plait has no {key} by filter.")
                return default, setting.path
            value = default if setting is None else setting.values[0][1]
            values[show(value)] = value
        if len(values) > 1:
            found = listed(list(values))
            self._problem(
                ("models",),
                f"{key} differs between the models ({found}); plait has one {key} for all: make them equal.",
            )
        paths = [s.path for s in settings if s is not None]
        return next(iter(values.values())), paths[0] if paths else ("merge_method",)

    def _flag(self, key: str, default: bool | None) -> bool:  # noqa: FBT001  (a value of the recipe)
        value = self._global().get(key, default)
        if not isinstance(value, bool):
            self._problem(("parameters", key), f"{key} is {show(value)}; it must be true or false.")
        return bool(value)

    def _setting(self, key: str, model: _Model) -> _Setting | None:
        """Return what holds for one model: its own values, then the recipe's."""
        found: list[tuple[str | None, Plain]] = []
        where: KeyPath | None = None
        sources = (((*model.path, "parameters", key), model.parameters), (("parameters", key), self._global()))
        for path, parameters in sources:
            if key not in parameters or None in (f for f, _ in found):
                continue
            found += self._cases(parameters[key], path)
            where = where or path
        if where is None:
            return None
        end = next((i for i, (f, _) in enumerate(found) if f is None), len(found))
        return _Setting(tuple(found[: end + 1]), where)

    def _cases(self, value: Plain, path: KeyPath) -> list[tuple[str | None, Plain]]:
        """Read a number, or a list of {filter, value}."""
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list):
            return [(None, value)]
        cases: list[tuple[str | None, Plain]] = []
        for case in value:
            if not isinstance(case, Mapping) or isinstance(case.get("value"), list):
                self._problem(
                    path,
                    f"{path[-1]} is a gradient over the layers, {show(value)}, which plait does not read: write a plait recipe "
                    "with weights: {policy: per_layer, layers: {0: …, 1: …}}.",
                )
                raise _GiveUpError
            name = case.get("filter")
            cases.append((None if name in (None, "*") else str(name), case.get("value")))
        return cases

    def _weights(self, method: _Method, models: Sequence[_Model], result: dict[str, Plain]) -> dict[str, Plain]:
        """Write the weights into the entries, or return them as `weights` when they depend on modules."""
        merged = [m for m in models if m.adapter is not None or self._name == "linear"]
        settings = [self._setting("weight", m) for m in merged]
        known = [s for s in settings if s is not None]
        for model, setting in zip(merged, settings, strict=True):
            if setting is None:
                self._problem(model.path, "it has no weight; mergekit needs one: parameters: {weight: 1.0}.")
            elif not all(_is_number(v) for _, v in setting.values):
                self._problem(setting.path, f"weight is {show([v for _, v in setting.values])}; it must be a number.")
            elif None not in setting.filters:
                self._problem(
                    setting.path,
                    "no weight holds where no filter matches; add a last entry without a filter, {value: …}.",
                )
        lists = list(dict.fromkeys(s.filters for s in known if s.filters != (None,)))
        if len(lists) > 1:
            self._problem(
                ("models",),
                "their weights have different filters; give every model the same filters in the same order.",
            )
        if self.problems:
            raise _GiveUpError
        filters = lists[0] if lists else (None,)
        rows = {f: self._row(method, merged, [_value(s, f) for s in known]) for f in filters}
        return _placed(rows, result, [m.path for m in merged if m.adapter is not None])

    def _row(self, method: _Method, models: Sequence[_Model], weights: list[float]) -> list[float]:
        """Return the adapters' weights where one filter holds, divided by their sum where mergekit divides."""
        total = sum(weights)
        if not method.elects and self._flag("normalize", method.normalize):
            if abs(total) < 1e-8 and self._name == "linear":
                self._problem(("models",), f"the weights sum to {total:g} and cannot be normalised.")
                raise _GiveUpError
            weights = [w / total for w in weights] if abs(total) >= 1e-8 else weights
        elif self._name == "linear" and abs(total - 1) > 1e-9:
            self.notes.append(
                f"with normalize: false and weights that sum to {total:g}, mergekit multiplies the base model by {total:g} too; "
                "plait leaves the base as it is."
            )
        if method.elects and min(weights) < 0:
            self.notes.append(
                "a negative weight turns its adapter's sign before mergekit compares signs, not in plait."
            )
        return [w for w, m in zip(weights, models, strict=True) if m.adapter is not None]

    def _scale(self, method: _Method, adapters: Sequence[_Model], result: dict[str, Plain]) -> Plain:
        scale, self.moved["scale",] = self._equal("lambda", 1.0, adapters)
        if method.rescale is None:
            return scale
        rescale = self._flag("rescale", method.rescale)
        density = result["method"]["density"]
        if rescale and not method.rescale:
            self._problem(
                ("parameters", "rescale"), f"plait's {self._name!r} does not rescale what it keeps; leave it out."
            )
        elif method.rescale and not rescale:
            if self._name == "della":
                self._problem(("parameters", "rescale"), "plait's 'della' always rescales what it keeps; leave it out.")
            elif _is_number(density) and _is_number(scale):
                self.notes.append("rescale: false is written as a scale that is multiplied by density.")
                return scale * density
        return scale

    def _dtype(self) -> str | None:
        key = "out_dtype" if self._data.get("out_dtype") else "dtype"
        value = self._data.get(key)
        if value is None:
            return None
        name = str(value).removeprefix("torch.")
        if name not in _DTYPES:
            self._problem((key,), f"{key} is {show(value)}; it must be {listed(_DTYPES, 'or')}.")
        return name

    def _say_what_is_left_out(self, method: _Method) -> None:
        self.notes += method.notes
        given = {k for m in [self._data, *self._data["models"]] for k in (m.get("parameters") or {})}
        if "int8_mask" in given:
            self.notes.append("int8_mask only saves memory in mergekit and is left out.")
        used = {"weight", "lambda", "normalize", "int8_mask", *method.params}
        used |= {"rescale"} if method.rescale is not None else set()
        self.notes += [
            f"{key} does nothing in mergekit's {self._name!r} and is left out." for key in sorted(given - used)
        ]
        left_out = [key for key in _TOKENIZER if key in self._data]
        if left_out:
            self.notes.append(
                f"{listed(left_out)}: left out, for a merge of adapters keeps the base model's tokenizer."
            )


def _base_of(model: Plain) -> str | None:
    return model.partition("+")[0] if isinstance(model, str) and "+" in model else None


def _is_number(value: Plain) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _value(setting: _Setting, name: str | None) -> float:
    return float(next(v for f, v in setting.values if f in (name, None)))


def _placed(
    rows: Mapping[str | None, list[float]], result: dict[str, Plain], paths: Sequence[KeyPath]
) -> dict[str, Plain]:
    entries = result["adapters"]
    if list(rows) == [None]:
        for entry, weight in zip(entries, rows[None], strict=True):
            entry["weight"] = weight
        return {}
    named = {f: dict(zip([e["name"] for e in entries], row, strict=True)) for f, row in rows.items()}
    modules: dict[str, Plain] = {}
    for name, row in named.items():
        for pattern in _patterns(name) if name is not None else ():
            modules.setdefault(pattern, row)
    return {"weights": {"policy": "per_module", "default": named[None], "modules": modules}}


def _patterns(part: str) -> list[str]:
    """Return the patterns over modules that match where `part` is in the name of the module's tensor."""
    if part in _SUFFIX:
        return ["*"]
    ends = [part.removesuffix(_SUFFIX[:n]) for n in range(len(_SUFFIX), 0, -1) if part.endswith(_SUFFIX[:n])]
    return [f"*{_literal(part)}*", *(f"*{_literal(end)}" for end in ends)]


def _literal(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
