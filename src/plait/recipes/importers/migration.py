"""The forms of an older merging framework's recipes, in the present form.

What is written here is what that framework did, in plait's words; where plait cannot do it yet, it says so. Knows
nothing of files, and does not check what it passes on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

from plait.errors import AddressError
from plait.folders import working_folder
from plait.hub.task_adapters import task_adapter
from plait.recipes.importers.base import RecipeForm
from plait.recipes.importers.entries import named_entry
from plait.recipes.importers.older_evaluation import KEYS as EVALUATION
from plait.recipes.importers.older_evaluation import take_evaluation
from plait.recipes.importers.older_policy import PAIRS, WITHOUT_LAMBDA, take_policy
from plait.recipes.importers.older_search import KEYS as SEARCH
from plait.recipes.importers.older_search import OlderSearch, is_older, is_present, searched_split, take_search
from plait.recipes.importers.older_transforms import is_old_transform, name_of, take_transforms
from plait.recipes.importers.older_tuning import take_tuning
from plait.recipes.paths import KeyPath, Plain, is_number
from plait.recipes.problems import ConvertedRecipe, Origins, Problem, show_value, spell_value

#: Keys that a recipe does not have any more, and what does the same now.
_ELSEWHERE = {
    "save_merged": "plait merge always writes the merge, plait eval where it is given -o, plait sweep with search.save_merged",
    "output_dir": "the command line says where to write: -o {value} (out= in Python)",
    "constraint_nonnegative": "it bounded what a search tried; weights that are given are taken as they are",
    "compute_missing_interference_baselines": "an evaluation always scores the base model and every single adapter too",
}
_PARAMS = ("method_params", "params")
_OLD_KEYS = frozenset(
    (*EVALUATION, *_ELSEWHERE, *(key for key in SEARCH if key != "search"), *_PARAMS, "optimizer", "lambda", "lambda_policy")
)
_ALL_KEYS = _OLD_KEYS | {"adapters", "method", "merge_mode", "transforms", "search"}
_METHODS = frozenset((*PAIRS, *WITHOUT_LAMBDA, "dare", "ties"))
_ON_FACTORS = ("uniform", "weighted", "uniform_delta", "uniform_scalar_delta")  # there, transforms acted on A and B
#: Methods whose results are others than before, and why.
_OTHER_NUMBERS = {
    "uniform": "It averaged A and B separately and took the first adapter's scaling; now the deltas are averaged",
    "weighted": "It interpolated A and B separately and took the first adapter's scaling; now the deltas are interpolated",
    "dare": "Its random masks are drawn in another way, so they are those of another seed",
}


def is_old(data: Mapping[str, Plain]) -> bool:
    """Return whether a recipe uses a form that only the older framework knew."""
    transforms = data.get("transforms")
    return (
        not _OLD_KEYS.isdisjoint(data)
        or (isinstance(transforms, list) and any(map(is_old_transform, transforms)))
        or _is_old_by_its_adapters(data)
        or is_older(data.get("search"))
    )


def _is_old_by_its_adapters(data: Mapping[str, Plain]) -> bool:
    """Return whether a recipe without a version holds nothing that was not known then, and adapters as bare words."""
    adapters, method = data.get("adapters"), data.get("method")
    return (
        _ALL_KEYS.issuperset(data)
        and isinstance(method, str)
        and method in _METHODS
        and isinstance(adapters, list)
        and all(isinstance(a, str) for a in adapters)
        and any(_is_word(a) for a in adapters)
    )


def number_note(data: Mapping[str, Plain]) -> str | None:
    """Report that a recipe's numbers differ from those of the older framework, when its method is one whose do."""
    method = data.get("method")
    name = method.get("name") if isinstance(method, Mapping) else method
    why = _OTHER_NUMBERS.get(name) if isinstance(name, str) else None
    return None if why is None else f"the numbers of `method: {name}` differ from before. {why}."


def migrate(data: Mapping[str, Plain]) -> tuple[dict[str, Plain], list[str]]:
    """Rewrite a recipe in the present form.

    Returns:
        The new data, and one note per old form: what was found, and what means the same now. A recipe without old forms
        comes back as it is, without notes.

    Raises:
        RecipeError: a part of the recipe has no counterpart; all such parts are listed.
    """
    converted = convert_old(data)
    Origins("recipe").refuse([*converted.problems, *converted.missing])
    return converted.data, list(converted.notes)


def convert_old(data: Mapping[str, Plain], folder: Path | None = None) -> ConvertedRecipe:
    """Do what `migrate` does, and report what moved where and what could not be carried over instead of raising.

    Args:
        data: a recipe as plain data.
        folder: where relative paths start; the working directory when None.
    """
    return _Migration(data, folder).run() if is_old(data) else ConvertedRecipe(dict(data))


class _Migration:
    """One recipe on its way from the old form to the new one; each step takes one old form out of it."""

    def __init__(self, data: Mapping[str, Plain], folder: Path | None) -> None:
        self._folder = folder
        self._data: dict[str, Plain] = copy.deepcopy(dict(data))
        self._params: dict[str, Plain] = {}
        self._notes: list[str] = []
        self._method_forms: list[tuple[str, str]] = []  # what the new `method` expresses, and what to add to that
        self._moved: dict[KeyPath, KeyPath] = {}
        self._problems: list[Problem] = []
        self._missing: list[Problem] = []
        self._remarks: list[str] = []  # where numbers differ
        self._search = OlderSearch()

    def run(self) -> ConvertedRecipe:
        self._take_params()
        self._take_lambda()
        self._name_adapters()
        self._apply_method()
        self._take_transforms()
        self._take_search()
        self._take_optimizer()
        self._take_evaluation()
        self._point_elsewhere()
        self._put_method()
        self._keep_merge_mode()
        notes = (*self._notes, *self._remarks)
        problems, missing = tuple(self._problems), tuple(self._missing)
        return ConvertedRecipe({"version": 1, **self._data}, notes, self._moved, problems, missing)

    @property
    def _method(self) -> str | None:
        method = self._data.get("method")
        name = method.get("name") if isinstance(method, Mapping) else method
        return name if isinstance(name, str) else None

    def _problem(self, path: KeyPath, text: str) -> None:
        self._problems.append(Problem(path, text))

    def _take_params(self) -> None:
        """Collect the method's parameters from wherever they are."""
        method = self._data.get("method")
        if isinstance(method, Mapping):
            self._params = {k: v for k, v in method.items() if k != "name"}
        holder = "method" if self._params else None
        for key in (k for k in _PARAMS if k in self._data):
            params = self._data.pop(key)
            if params is None:
                continue
            if not isinstance(params, Mapping):
                self._problem((key,), f"{key} is {show_value(params)}; it must be a mapping.")
            elif holder:
                self._problem((key,), f"the method's parameters are given in {holder} and in {key}; keep those in method.")
            else:
                self._take_mapping(key, params)
                holder = key

    def _take_mapping(self, key: str, params: Mapping[str, Plain]) -> None:
        self._params = dict(params)
        self._moved |= {("method", name): (key, name) for name in params}
        self._method_forms.append((f"{key}: {spell_value(dict(params))}", ""))
        if "transforms" not in self._params:
            return
        hidden = self._params.pop("transforms")
        if "transforms" in self._data:
            self._problem((key, "transforms"), "transforms are given here and at the top; keep those at the top.")
        else:
            self._data["transforms"] = hidden
            self._moved["transforms",] = (key, "transforms")

    def _take_lambda(self) -> None:
        if "lambda" not in self._data:
            return
        value = self._data.pop("lambda")
        if "lambda" in self._params:
            self._problem(("lambda",), "lambda is given at the top and among the method's parameters; keep the latter.")
            return
        self._params["lambda"] = value
        self._moved["method", "lambda"] = ("lambda",)
        self._method_forms.append((f"lambda: {spell_value(value)}", ""))

    def _name_adapters(self) -> None:
        adapters = self._data.get("adapters")
        if not isinstance(adapters, list) or not any(isinstance(a, str) for a in adapters):
            return
        entries = [_entry(a, self._folder) if isinstance(a, str) else a for a in adapters]
        self._data["adapters"] = entries
        self._moved |= {
            ("adapters", i, key): ("adapters", i) for i, a in enumerate(adapters) if isinstance(a, str) for key in entries[i]
        }
        if words := [a for a in adapters if isinstance(a, str) and _is_word(a)]:
            new = f"adapters: {spell_value([e for e, a in zip(entries, adapters, strict=True) if a in words])}"
            more = " They were folders or tasks: the folder of that name is taken, else the task's best adapter in artifacts/."
            self._note(f"adapters: {spell_value(words)}", new, more)

    def _apply_method(self) -> None:
        """Carry over what the method did with its parameters and with `lambda_policy`."""
        self._note_changed_numbers()
        policy = self._data.pop("lambda_policy", None)
        if policy is not None:
            self._take_policy(policy)
        match self._method:
            case "ties":
                self._take_ties()
            case "dare":
                self._take_seed()
            case None if "method" not in self._data:
                self._problem((), "'method' is missing.")
        if self._method in WITHOUT_LAMBDA and "lambda" in self._params:
            value = self._params.pop("lambda")
            self._note(f"lambda: {spell_value(value)}", "", f" It never had an effect on {self._method!r}.")

    def _note_changed_numbers(self) -> None:
        if (note := number_note({"method": self._method})) is not None:
            self._remarks.append(note)
        names = [name_of(t) for t in self._data.get("transforms") or [] if isinstance(self._data.get("transforms"), list)]
        if self._method in _ON_FACTORS and not {"identity", "ties_scaffold"}.issuperset(map(str, names)):
            self._remarks.append(
                f"the numbers of `transforms` differ from before. With {self._method!r} they acted on A and B; they act on the "
                "deltas now."
            )

    def _take_ties(self) -> None:
        if "k" in self._params and "density" in self._params:
            self._problem(self._old("k"), "k (percent) and density mean the same; keep density.")
            del self._params["k"]
        elif "density" not in self._params:
            path = self._old("k")
            k = self._params.pop("k", 20)
            self._moved["method", "density"] = path
            if (problem := _percent_problem(k)) is not None:
                self._problem(path, problem)
            else:
                self._params["density"] = k / 100
        exact = {"kept": "ceil", "zero_sign": "drop", "scope": "model"}
        self._params = {**exact, **self._params}
        if "lambda" in self._params:
            self._take_scale(self._params.pop("lambda"))
        more = " k was the percentage kept, 20 when not given, and lambda is scale now."
        self._method_forms.append(("method: ties", more))

    def _take_scale(self, value: Plain) -> None:
        old = self._moved.get(("method", "lambda"), ("method", "lambda"))
        if "scale" in self._data:
            self._problem(old, "lambda of 'ties' is scale now, and scale is given too; keep scale.")
            return
        self._data["scale"] = value
        self._moved["scale",] = old

    def _take_seed(self) -> None:
        if "seed" not in self._params:
            return
        seed, old = self._params.pop("seed"), self._old("seed")
        if "seed" in self._data and self._data["seed"] != seed:
            self._problem(old, "seed of 'dare' is the recipe's seed now, which is given too; keep the latter.")
            return
        self._data["seed"] = seed
        self._moved["seed",] = old
        self._note(
            f"seed: {spell_value(seed)} of method 'dare'",
            f"seed: {spell_value(seed)}",
            " It belongs to the recipe as a whole now.",
        )

    def _take_policy(self, policy: Plain) -> None:
        found = take_policy(policy, self._method, self._data, self._params)
        self._moved |= found.moved
        self._problems += found.problems
        self._method_forms += found.method_forms
        for note in found.notes:
            self._note(*note)

    def _take_transforms(self) -> None:
        found = take_transforms(self._data, self._moved.get(("transforms",), ("transforms",)))
        self._moved |= found.moved
        self._problems += found.problems
        for note in found.notes:
            self._note(*note)

    def _take_search(self) -> None:
        if is_present(self._data.get("search")):
            return
        found = self._search = take_search(self._data, self._params, self._method)
        self._params = {**self._params, **found.first}
        self._problems += found.problems
        self._remarks += found.remarks
        for note in found.notes:
            self._note(*note)

    def _take_optimizer(self) -> None:
        if "optimizer" not in self._data:
            return
        value = self._data.pop("optimizer")
        kind = value.get("type", "none") if isinstance(value, Mapping) else value
        if kind is None or str(kind).lower() == "none":
            if value is not None:
                self._note(f"optimizer: {spell_value(value)}", "")
            return
        found = take_tuning(value, self._method)
        self._problems += found.problems
        if "tune" in self._data:
            self._problem(("optimizer",), "optimizer and tune mean the same; keep tune.")
            return
        if found.tune:
            self._data["tune"] = found.tune
            self._data.setdefault("scale", 1.0)  # the first coefficients were taken as they are
            if self._search.search:
                self._remarks.append(
                    "the scores of this search differ from before: its optimizer learned anew for every candidate. "
                    "`plait sweep` compares merges as they are, and `plait tune STUDY/recipe.yaml` learns from the best."
                )
        if found.tasks is not None:
            if self._data.get("eval_tasks", found.tasks) != found.tasks:
                text = "other tasks than eval_tasks; every adapter learns from and is evaluated on the same, so give them once."
                self._problem(("optimizer", "params", "tasks"), text)
            elif "tasks" not in self._data:
                self._data["eval_tasks"] = found.tasks
        self._moved |= found.moved
        for note in found.notes:
            self._note(*note)

    def _take_evaluation(self) -> None:
        found = take_evaluation(self._data, self._folder or working_folder())
        given = self._data.get("eval")
        if "eval" in found.data and (given is None or isinstance(given, Mapping)):
            self._data["eval"] = {**(given or {}), **found.data.pop("eval")}
        self._data |= {key: value for key, value in found.data.items() if key not in self._data}
        self._moved |= found.moved
        self._problems += found.problems
        self._missing += found.missing
        self._divide_evaluation()
        divided = bool(self._search.search)
        for old, new, more in found.notes:
            to_search = divided and not old.startswith("eval_tasks") and "split: test" not in new
            self._note(old, new.replace("eval:", "search:", 1) if to_search else new, more)

    def _divide_evaluation(self) -> None:
        """Give the search what its candidates are compared on."""
        asked = self._data.get("eval")
        if self._search.search and (asked is None or isinstance(asked, Mapping)):
            left, remarks = searched_split(self._search, asked or {})
            self._data["eval"], self._data["search"] = left, self._search.search
            self._remarks += remarks
        elif self._search.judged is not None:
            self._data["eval"] = {**(asked or {}), "split": self._search.judged}
        if self._data.get("eval") == {}:
            del self._data["eval"]
        self._moved |= self._search.moved

    def _point_elsewhere(self) -> None:
        for key, why in _ELSEWHERE.items():
            if (value := self._data.pop(key, None)) is not None:
                shown = spell_value(value)
                why = why.format(value=shown)
                self._notes.append(f"`{key}: {shown}` is an old form: a recipe does not have this now; {why}.")

    def _put_method(self) -> None:
        if self._method is None:
            return
        self._data["method"] = {"name": self._method, **self._params} if self._params else self._method
        new = f"method: {spell_value(self._data['method'])}"
        if ("scale",) in self._moved:
            new += f"` and `scale: {spell_value(self._data['scale'])}"
        for found, more in self._method_forms:
            self._note(found, new, more)

    def _keep_merge_mode(self) -> None:
        if "merge_mode" not in self._data:
            self._data["merge_mode"] = "common"
            more = " It was the default, and plait's own is union."
            self._note("no merge_mode", "merge_mode: common", more)

    def _old(self, param: str) -> KeyPath:
        return self._moved.get(("method", param), ("method", param))

    def _note(self, found: str, new: str, more: str = "") -> None:
        advice = f"write `{new}`" if new else "leave it out"
        self._notes.append(f"`{found}` is an old form: {advice}.{more}")


def _is_word(text: str) -> bool:
    return not any(c in "/=@" for c in text) and not text.startswith((".", "~"))


def _entry(text: str, folder: Path | None) -> dict[str, Plain]:
    """Return a listed adapter with its name; what is not a reference keeps its text, for the check to refuse."""
    try:
        is_folder = _is_word(text) and task_adapter(text, folder) is None
        return named_entry(f"./{text}" if is_folder else text, folder)
    except AddressError:
        return {"path": text}


def _percent_problem(k: Plain) -> str | None:
    if is_number(k) and 0 < k <= 100:
        return None
    if is_number(k) and k == 0:
        return "k is 0, which keeps no entry: the merge would be zero. It must be > 0 and <= 100."
    return f"k is {show_value(k)}; it must be a percentage, > 0 and <= 100."


OLDER = RecipeForm(is_old, convert_old, DeprecationWarning, number_note)
