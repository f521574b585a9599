"""mergekit's YAML, in plait's form where it has one.

Everything that maps is carried over exactly; where the same words give other numbers a note says so; what has no
counterpart is a problem. Independent of files, and does not check what it passes on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from plait.errors import AddressError, did_you_mean, join_words
from plait.recipes.importers.base import RecipeForm
from plait.recipes.importers.entries import named_entry
from plait.recipes.importers.mergekit_terms import (
    MERGEKIT_METHODS,
    WHOLE_MODELS,
    FilteredParameter,
    MergekitMethod,
    ModelEntry,
    is_loose,
    pattern,
)
from plait.recipes.paths import KeyPath, Plain, is_number
from plait.recipes.problems import ConvertedRecipe, Problem, show_value
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
_PARTS = ("slices", "modules")
_ARITHMETIC = ("weight", "density", "epsilon", "gamma", "lambda", "normalize", "rescale", "int8_mask")


class _GiveUpError(Exception):
    """No further problem of a recipe can be found."""


def is_mergekit(data: Mapping[str, Plain]) -> bool:
    """Return whether this is a recipe of mergekit's."""
    return "merge_method" in data and any(key in data for key in ("models", "slices", "modules"))


def convert_mergekit(data: Mapping[str, Plain], folder: Path | None = None) -> ConvertedRecipe:
    """Rewrite a mergekit recipe as plait's; with problems the data is empty.

    Args:
        data: a recipe for which `is_mergekit` holds.
        folder: where relative paths start; the working directory when None.
    """
    conversion = _MergekitRecipe(data, folder)
    try:
        result = conversion.run()
    except _GiveUpError:
        return ConvertedRecipe({}, (), conversion.moved, tuple(conversion.problems))
    return ConvertedRecipe(result, tuple(dict.fromkeys(conversion.notes)), conversion.moved)


class _MergekitRecipe:
    """One mergekit recipe on its way to plait's form."""

    def __init__(self, data: Mapping[str, Plain], folder: Path | None) -> None:
        self._data = data
        self._folder = folder
        self.notes: list[str] = []
        self.problems: list[Problem] = []
        self.moved: dict[KeyPath, KeyPath] = {}

    def run(self) -> dict[str, Plain]:
        self._check_keys()
        models = list(self._models())
        base = self._base(models)
        method = MERGEKIT_METHODS.get(self._name)
        if method is None:
            text = f"mergekit's {self._name!r} has no counterpart here; these have one: {', '.join(MERGEKIT_METHODS)}."
            why = f" mergekit's {self._name!r}: {WHOLE_MODELS[self._name]}." if self._name in WHOLE_MODELS else ""
            self._problem(("merge_method",), text + (why or did_you_mean(self._name, MERGEKIT_METHODS)))
            raise _GiveUpError
        adapters = [m for m in models if m.adapter is not None]
        entries = self._entries(adapters)
        if method.base and self._data.get("base_model") is None:
            self._problem(("merge_method",), f"{self._name!r} needs a base_model: {method.base}.")
        params, values = self._params(method, adapters)
        result: dict[str, Plain] = {"version": 1, "base_model": base, "adapters": entries, "method": params}
        result |= self._weights(method, models, entries)
        result["scale"] = self._scale(method, adapters, values.get("density"))
        if self._name == "nuslerp":
            self._turn(params, entries)
        dtype = "out_dtype" if self._data.get("out_dtype") else "dtype"
        self.moved["output", "dtype"] = (dtype,)
        if (value := self._data.get(dtype)) is not None:
            result["output"] = {"dtype": str(value).removeprefix("torch.")}
        self._note_left_out(method)
        if self.problems:
            raise _GiveUpError
        return {key: value for key, value in result.items() if value is not None}

    def _problem(self, path: KeyPath, text: str) -> None:
        self.problems.append(Problem(path, text))

    @property
    def _name(self) -> str:
        return str(self._data["merge_method"])

    def _check_keys(self) -> None:
        for key in self._data:
            if key in _PARTS:
                text = f"plait does not cut models into {key}; it merges complete adapters: list them under 'models'."
                self._problem((key,), text)
            elif key not in _TOP:
                self._problem((key,), unknown_key(key, _TOP))

    def _models(self) -> Iterator[ModelEntry]:
        models = self._data.get("models")
        if not isinstance(models, list) or not models:
            if "models" in self._data:
                self._problem(("models",), f"models is {show_value(models)}; it must be a list of models.")
            raise _GiveUpError
        texts = [m["model"] for m in models if isinstance(m, Mapping) and isinstance(m.get("model"), str)]
        bases = {text.partition("+")[0] for text in texts if "+" in text}
        if isinstance(given := self._data.get("base_model"), str):
            bases.add(given)
        for i, model in enumerate(models):
            if isinstance(model, Mapping) and isinstance(model.get("model"), str):
                yield self._model(i, model, bases)
            else:
                self._problem(("models", i), "it must be a mapping with the text 'model', such as {model: BASE+LORA}.")

    def _model(self, index: int, model: Mapping[str, Plain], bases: set[str]) -> ModelEntry:
        path = ("models", index)
        for key in model.keys() - {"model", "parameters"}:
            self._problem((*path, key), unknown_key(key, ["model", "parameters"]))
        parameters = model.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            self._problem((*path, "parameters"), f"parameters is {show_value(parameters)}; it must be a mapping.")
            parameters = {}
        base, plus, adapter = model["model"].partition("+")
        if "+" in adapter:
            self._problem((*path, "model"), f"{model['model']!r} holds '+' twice; write BASE+LORA.")
        if plus:
            return ModelEntry(index, base or None, adapter, parameters)
        if base in bases:
            return ModelEntry(index, base, None, parameters)
        return ModelEntry(index, None, base, parameters)

    def _base(self, models: Sequence[ModelEntry]) -> str | None:
        given = self._data.get("base_model")
        if given is not None and (not isinstance(given, str) or "+" in given):
            self._problem(("base_model",), f"base_model is {show_value(given)}; it must be one model, without an adapter.")
            return None
        bases = list(dict.fromkeys([*([given] if given else []), *(m.base for m in models if m.base)]))
        if len(bases) > 1:
            shown = join_words([repr(b) for b in bases])
            self._problem(("models",), f"the adapters are of {len(bases)} base models, {shown}; plait needs one.")
        if not any(m.adapter for m in models):
            self._problem(("models",), "there is no adapter among them; write BASE+LORA, or the adapter alone.")
        return bases[0] if bases else None

    def _entries(self, adapters: Sequence[ModelEntry]) -> list[dict[str, Plain]]:
        entries: list[dict[str, Plain]] = []
        names: list[str] = []
        for model in adapters:
            try:
                entry = named_entry(str(model.adapter), self._folder)
            except AddressError as error:
                self._problem((*model.path, "model"), str(error))
                continue
            self.moved["adapters", len(entries)] = (*model.path, "model")
            self.moved["adapters", len(entries), "weight"] = (*model.path, "parameters", "weight")
            names.append(entry["name"])
            if names.count(entry["name"]) > 1:
                entry["name"] += f"-{names.count(entry['name'])}"
            entries.append(entry)
        if any(entry["path"].startswith(".") for entry in entries):
            self.notes.append("relative paths start at the recipe's folder; mergekit starts at the working directory.")
        return entries

    def _params(self, method: MergekitMethod, adapters: Sequence[ModelEntry]) -> tuple[dict[str, Plain], dict[str, Plain]]:
        """Return plait's method, and mergekit's parameters by their own names."""
        self._check_params(method, adapters)
        values: dict[str, Plain] = {}
        for key, default in method.params.items():
            values[key], self.moved["method", *method.places.get(key, (key,))] = self._equal(key, default, adapters)
        density = values.get("density")
        if density == 1 and "epsilon" in values:  # mergekit leaves a delta of density 1 alone
            values["epsilon"] = 0.0
        gamma = values.get("gamma")
        if is_number(density) and is_number(gamma) and density + gamma > 1:
            values["gamma"] = max(0.0, 1 - density)  # mergekit keeps as many as density says before it drops any
        if method.elects:
            values["divisor"] = "weight" if self._flag("normalize", default=method.normalize) else "none"
        params: dict[str, Plain] = {"name": method.name or self._name, **copy.deepcopy(dict(method.fixed))}
        for key, value in values.items():
            _put(params, method.places.get(key, (key,)), value)
        return params, values

    def _turn(self, params: dict[str, Plain], entries: Sequence[dict[str, Plain]]) -> None:
        """Express two weights as the position between the first adapter and the second."""
        weights = [entry.pop("weight", None) for entry in entries]
        if len(weights) != 2 or None in weights:
            text = "it goes from one adapter to another: give two, each with one weight."
            self._problem(("models",), text)
            return
        total = sum(weights)
        params["t"] = weights[1] / total if abs(total) >= 1e-6 else 0.5
        self.moved["method", "t"] = ("models",)

    def _check_params(self, method: MergekitMethod, adapters: Sequence[ModelEntry]) -> None:
        allowed = list(
            dict.fromkeys([*_ARITHMETIC, *method.params, *method.only, "eps"] if not method.arithmetic else _ARITHMETIC)
        )
        for key, (value, why) in method.only.items():
            if self._global().get(key, value) != value:
                self._problem(("parameters", key), f"{key} is {show_value(self._global()[key])}: {why}.")
        places: list[tuple[KeyPath, Mapping[str, Plain]]] = [(("parameters",), self._global())]
        for path, parameters in [*places, *(((*m.path, "parameters"), m.parameters) for m in adapters)]:
            for key in parameters.keys() - set(allowed):
                self._problem((*path, key), unknown_key(key, allowed))

    def _global(self) -> Mapping[str, Plain]:
        parameters = self._data.get("parameters") or {}
        if isinstance(parameters, Mapping):
            return parameters
        self._problem(("parameters",), f"parameters is {show_value(parameters)}; it must be a mapping.")
        return {}

    def _equal(self, key: str, default: float, adapters: Sequence[ModelEntry]) -> tuple[Plain, KeyPath]:
        """Return a parameter that plait has once, and where mergekit may have one per model."""
        values: list[Plain] = []
        paths: list[KeyPath] = []
        for setting in (self._setting(key, m) for m in adapters):
            if setting is not None and setting.filters != (None,):
                self._problem(setting.path, f"{key} must be one number: plait has no {key} by filter.")
                return default, setting.path
            value = default if setting is None else setting.values[0][1]
            values += [] if value in values else [value]
            paths += [] if setting is None else [setting.path]
        if len(values) > 1:
            found = join_words([show_value(v) for v in values])
            text = f"{key} differs between the models ({found}), and plait has one {key} for all: make them equal."
            self._problem(paths[-1], text)
        return (values or [default])[0], (paths or [("merge_method",)])[0]

    def _flag(self, key: str, *, default: bool) -> bool:
        value = self._global().get(key, default)
        if not isinstance(value, bool):
            self._problem(("parameters", key), f"{key} is {show_value(value)}; it must be true or false.")
        return bool(value)

    def _setting(self, key: str, model: ModelEntry) -> FilteredParameter | None:
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
        return FilteredParameter(tuple(found[: end + 1]), where)

    def _cases(self, value: Plain, path: KeyPath) -> list[tuple[str | None, Plain]]:
        """Read a number, or a list of {filter, value}."""
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list):
            return [(None, value)]
        cases: list[tuple[str | None, Plain]] = []
        for case in value:
            if not isinstance(case, Mapping) or isinstance(case.get("value"), list):
                text = f"{path[-1]} is a gradient over the layers, {show_value(value)}, which plait does not read"
                self._problem(path, f"{text}: write a plait recipe with weights: {{policy: per_layer, layers: {{…}}}}.")
                return [(None, 1.0)]
            name = case.get("filter")
            cases.append((None if name in (None, "*") else str(name), case.get("value")))
        return cases

    def _weights(
        self, method: MergekitMethod, models: Sequence[ModelEntry], entries: Sequence[dict[str, Plain]]
    ) -> dict[str, Plain]:
        """Write the weights into the entries, or return them as `weights` when they depend on modules."""
        if not method.weighted:
            return {}
        # the base model's own weight counts only where mergekit averages full models
        merged = [m for m in models if m.adapter is not None or self._name == "linear"]
        settings = [s for s in map(self._weight, merged) if s is not None]
        lists = list(dict.fromkeys(s.filters for s in settings if s.filters != (None,)))
        if len(lists) > 1:
            text = "the weights have different filters; give every model the same filters in the same order."
            self._problem(("models",), text)
        if self.problems:
            raise _GiveUpError
        rows: dict[str | None, dict[str, float]] = {}
        for name in lists[0] if lists else (None,):
            found = [next(float(value) for part, value in s.values if part in (name, None)) for s in settings]
            row = self._row(method, merged, found)
            rows.setdefault(name, dict(zip((e["name"] for e in entries), row, strict=True)))
        for name in (n for n in rows if n is not None and is_loose(n)):
            self.notes.append(f"the filter {name!r} is read as the pattern {pattern(name)!r} over module paths.")
        if list(rows) != [None]:
            return {"weights": _by_module(rows)}
        for entry in entries:
            entry["weight"] = rows[None][entry["name"]]
        return {}

    def _weight(self, model: ModelEntry) -> FilteredParameter | None:
        setting = self._setting("weight", model)
        if setting is None:
            self._problem(model.path, "it has no weight, and mergekit needs one: parameters: {weight: 1.0}.")
            return None
        for _, value in setting.values:
            if not is_number(value):
                self._problem(setting.path, f"weight is {show_value(value)}; it must be a number.")
        if None not in setting.filters:
            text = "no weight holds where no filter matches; add a last entry without a filter, {value: …}."
            self._problem(setting.path, text)
        return setting

    def _row(self, method: MergekitMethod, models: Sequence[ModelEntry], weights: list[float]) -> list[float]:
        """Return the adapters' weights where one filter holds, divided by their sum where mergekit divides."""
        total = sum(weights)
        averages = self._name == "linear"
        if not method.elects and (method.arithmetic or averages) and self._flag("normalize", default=method.normalize):
            if abs(total) >= 1e-8:
                weights = [w / total for w in weights]
            elif averages:
                self._problem(("models",), f"the weights sum to {total:g} and cannot be normalized.")
        elif averages and abs(total - 1) > 1e-9:
            text = f"normalize is false and the weights sum to {total:g}: mergekit multiplies the base model by that too"
            self.notes.append(f"{text}, plait leaves it as it is.")
        return [w for w, m in zip(weights, models, strict=True) if m.adapter is not None]

    def _scale(self, method: MergekitMethod, adapters: Sequence[ModelEntry], density: Plain) -> Plain:
        if self._name == "linear" or not method.arithmetic:
            return None
        scale, self.moved["scale",] = self._equal("lambda", 1.0, adapters)
        rescales = self._flag("rescale", default=method.rescale)
        path: KeyPath = ("parameters", "rescale")
        if rescales and not method.rescale and method.params:
            self._problem(path, f"plait's {self._name!r} does not rescale what it keeps; leave it out.")
        if rescales or not method.rescale:
            return scale
        if self._name == "della":
            self._problem(path, "plait's 'della' always rescales what it keeps; leave it out.")
        if is_number(density) and is_number(scale):
            self.notes.append("rescale: false is expressed by a scale that is multiplied by density.")
            return scale * density
        return scale

    def _note_left_out(self, method: MergekitMethod) -> None:
        self.notes += method.notes
        given = {k for m in [self._data, *self._data["models"]] for k in (m.get("parameters") or {})}
        if "int8_mask" in given:
            self.notes.append("int8_mask only saves memory in mergekit and is left out.")
        used = {"int8_mask", *method.params, *method.only, *(["weight"] if method.weighted else [])}
        used |= {"normalize"} if method.arithmetic else set()
        used |= set() if self._name == "linear" or not method.arithmetic else {"lambda", "rescale"}
        idle = sorted(given - used)
        self.notes += [f"{key} does nothing in mergekit's {self._name!r} and is left out." for key in idle]
        left_out = [key for key in _TOKENIZER if key in self._data]
        if left_out:
            self.notes.append(f"{join_words(left_out)}: left out, for a merge of adapters keeps the base model's tokenizer.")


def _put(target: Plain, path: KeyPath, value: Plain) -> None:
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value


def _by_module(rows: Mapping[str | None, dict[str, float]]) -> dict[str, Plain]:
    modules: dict[str, Plain] = {}
    for name, row in rows.items():
        if name is not None:
            modules.setdefault(pattern(name), row)
    return {"policy": "per_module", "default": rows[None], "modules": modules}


MERGEKIT = RecipeForm(is_mergekit, convert_mergekit)
