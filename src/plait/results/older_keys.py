"""What scripts of the earlier merging framework look up in result files, next to plait's own keys: the only place that knows.

Every such key is a function of what plait's records hold in their own words. A file has it besides them, and the records do
not: reading one drops the key again (`OlderKeysDropped`), so nothing here reads what it has written. `page` is the table in
docs/coming-from.md.

Independent of what the records are: all of them come as plain JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar

from pydantic import model_validator

from plait.records import Record
from plait.results.lock import RUN_RECORD, SUMMARY

Data = Mapping[str, Any]
RESULTS, METRICS, INDEX, SWEEP = "eval_results_*.json", "metrics.json", "eval/index.json", "study.json"
_ABSENT = object()
_ROUNDING = 1e-9  # of λ and 1 − λ, as they are written
_ALIASES = "older_params"
_SUBSET = "_eval_subset"


@dataclass(frozen=True)
class OlderKey:
    """One key of that framework's files.

    Attributes:
        name: there.
        here: what of plait's it is, as Markdown.
        value: plait's record → its value; `_ABSENT` where the file has no such key, as there.
    """

    name: str
    here: str
    value: Callable[[Data], Any]


def with_older_keys(file: str, record: Data, written: Data | None = None) -> dict[str, Any]:
    """Return what is written in a file: plait's own keys, then the older ones that are not among them.

    Args:
        file: a key of `FILES`.
        record: plait's record, as JSON.
        written: the part of it that the file holds; all of it when None.
    """
    own = record if written is None else written
    found = {key.name: key.value(record) for key in FILES[file] if key.name not in own}
    return {**own, **{name: value for name, value in found.items() if value is not _ABSENT}}


def task_with_older_keys(task: Data) -> dict[str, Any]:
    """Return what is written of one task: also its metric under its own name."""
    found = with_older_keys(METRICS, task)
    return found if task["metric"] in found else {**found, task["metric"]: task["merged"]}


def study_with_older_keys(study: Data) -> dict[str, Any]:
    """Return what is written of a search: keys and values of the earlier framework's sweep summary next to plait's own."""
    aliases = [_alias_params(run["params"], run["params"].get("method", study["method"])) for run in study["runs"]]
    own = {path for run in study["runs"] for path in run["params"]}
    names = sorted({name for found in aliases for name in found} - own)
    runs = [
        {
            **run,
            "params": {**run["params"], **{name: value for name, value in found.items() if name in names}},
            "results": {task: {**outcome, **_delta(outcome["recovery"])} for task, outcome in run["results"].items()},
        }
        for run, found in zip(study["runs"], aliases, strict=True)
    ]
    final = study["post_sweep_eval"]
    if final is not None:
        final = {**final, **{name: value(final, runs[study["best_index"]]) for name, value in _FINAL.items()}}
        final["save_merged"] = study["search"].get("save_merged", False)
    return with_older_keys(SWEEP, study, {**study, "runs": runs, "post_sweep_eval": final, _ALIASES: names})


class OlderKeysDropped(Record):
    """A record whose file has older keys besides its own, which are not part of it."""

    OLDER_KEYS: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_older_keys(cls, data: Any) -> Any:
        dropped = cls.OLDER_KEYS.difference(cls.model_fields)
        return {key: value for key, value in data.items() if key not in dropped} if isinstance(data, Mapping) else data


def drop_older_params(study: Any) -> Any:
    """Return a study as it was before its runs got parameters under older names; anything else as it is."""
    if not isinstance(study, Mapping) or _ALIASES not in study:
        return study
    names, runs = study[_ALIASES], study.get("runs")
    kept = {key: value for key, value in study.items() if key != _ALIASES}
    if not isinstance(names, list) or not isinstance(runs, list):
        return kept
    return {**kept, "runs": [_without(run, names) for run in runs]}


def _without(run: Any, names: list[Any]) -> Any:
    if not isinstance(run, Mapping) or not isinstance(run.get("params"), Mapping):
        return run
    return {**run, "params": {path: value for path, value in run["params"].items() if path not in names}}


def keys_of(file: str) -> frozenset[str]:
    """Return the older keys of a file."""
    return frozenset(key.name for key in FILES[file])


def page() -> str:
    """Return the table of all files as Markdown."""
    rows = [f"| `{file}` | `{key.name}` | {key.here} |" for file, keys in FILES.items() for key in keys]
    rows += [f"| `{SWEEP}` | `{key}` | {here} |" for key, here in _WITHIN_SWEEP.items()]
    rows += [f"| `{file}` | `{key}` | left out: {why} |" for file, found in _LEFT_OUT.items() for key, why in found.items()]
    return "\n".join(["| file | key there | what it is here |", "|---|---|---|", *rows, ""])


# --- what a recipe says; that of a lock may come from elsewhere, and be of any shape --------------------------------------


def _mapping(value: Any) -> Data:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Data]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def _recipe(record: Data) -> Data:
    return _mapping(record.get("recipe"))


def _adapters(recipe: Data) -> dict[str, Data]:
    """Return name → entry."""
    return {entry["name"]: entry for entry in _mappings(recipe.get("adapters")) if isinstance(entry.get("name"), str)}


def _method_params(record: Data) -> dict[str, Any]:
    """Return the method's parameters: under plait's names, and those of that framework's `ties` and `dare` under its own."""
    recipe = _recipe(record)
    method = _mapping(recipe.get("method"))
    found = {name: value for name, value in method.items() if name not in ("name", "space")}
    if method.get("name") == "ties":
        found |= {"k": _percent(method.get("density")), "lambda": recipe.get("scale")}
    elif method.get("name") == "dare":
        found["seed"] = recipe.get("seed")
    return found


def _percent(density: Any) -> Any:
    return round(density * 100, 10) if isinstance(density, int | float) else density


def _lambda(record: Data) -> Any:
    return _method_params(record).get("lambda")


def _lambda_policy(record: Data) -> Any:
    """Return λ as that framework's policy; None for weights other than λ and 1 − λ, which it had no policy for."""
    recipe, value = _recipe(record), _lambda(record)
    weights, names = _mapping(recipe.get("weights")), list(_adapters(recipe))
    if not weights:
        return None if value is None else {"type": "scalar", "value": value}
    default = _share(weights.get("default"), names)
    layers = {layer: _share(pair, names) for layer, pair in _mapping(weights.get("layers")).items()}
    if weights.get("policy") != "per_layer" or value is not None or None in (default, *layers.values()):
        return None
    return {"type": "per_layer", "default": default, "overrides": layers}


def _share(weights: Any, names: list[str]) -> float | None:
    """Return λ of two adapters that have λ and 1 − λ; None for other weights."""
    pair = [weight for name in names if isinstance(weight := _mapping(weights).get(name), int | float)]
    if len(names) != 2 or len(pair) != 2:
        return None
    return float(pair[0]) if abs(pair[0] + pair[1] - 1) < _ROUNDING else None


def _transforms(record: Data) -> list[dict[str, Any]]:
    return [
        {"name": t.get("name"), "params": {key: value for key, value in t.items() if key != "name"}}
        for t in _mappings(_recipe(record).get("transforms"))
    ]


def _optimizer(record: Data) -> Any:
    """Return what was learned, where the record is that of a tuning."""
    if "objective" not in record:
        return None
    return {"type": record["objective"], "params": dict(_mapping(_recipe(record).get("tune")))}


def _params(record: Data) -> dict[str, Any]:
    policy, optimizer = _lambda_policy(record), _optimizer(record)
    more = {} if policy is None else {"lambda_policy": policy}
    more |= {} if optimizer is None else {"optimizer": optimizer}
    return {**_method_params(record), "transforms": _transforms(record), **more}


def _source_adapters(record: Data) -> list[dict[str, Any]]:
    entries, found = _adapters(_recipe(record)), []
    for source in record["sources"]:
        name, path = source["name"], PurePath(source["path"])
        run = {"run_id": path.name} if path.parent.name == "runs" else {}
        weight = {"weight": entries[name]["weight"]} if "weight" in entries.get(name, {}) else {}
        found.append({"task": name, "path": source["path"], **run, **weight})
    return found


def _alias_params(params: Data, method: Any) -> dict[str, Any]:
    """Return a run's parameters of the method under the names that they had there."""
    found = {path.removeprefix("method."): value for path, value in params.items() if path.startswith("method.")}
    if method == "ties":
        found |= {"k": _percent(params["method.density"])} if "method.density" in params else {}
        found |= {"lambda": params["scale"]} if "scale" in params else {}
    return found


# --- what was found ---------------------------------------------------------------------------------------------------


def _delta(recovery: float | None) -> dict[str, float]:
    return {} if recovery is None else {"interference_delta": recovery}


def _delta_meta(task: Data) -> dict[str, Any]:
    named = {"metric": "metric", "base": "base", "task_adapter": "single", "merged": "merged", "split": "split"}
    return {older: task[own] for older, own in named.items()}


def _task_metrics(task: Data) -> dict[str, Any]:
    """Return one task's numbers under older keys; those of `interference_delta` only where it is defined."""
    found = {task["metric"]: task["merged"], "num_samples": task["examples"]}
    if task["subset"] is not None:
        found[_SUBSET] = {"tag": task["subset"], "used_size": task["examples"]}
    if task["recovery"] is not None:
        found |= {**_delta(task["recovery"]), "interference_delta_meta": _delta_meta(task)}
    return found


def _eval_subset(record: Data) -> Any:
    """Return the sample as it was asked for, in the earlier words."""
    subset = record.get("subset")
    return _ABSENT if subset is None else {"enabled": True, "shuffle": True, **subset}


def _eval_tag(record: Data) -> str | None:
    """Return what tells samples apart: a hash of all tasks' own tags; None where every task is asked everything."""
    tags = [[task["task"], task["subset"]] for task in record.get("tasks", ()) if task["subset"] is not None]
    return f"subset_{hashlib.sha256(json.dumps(sorted(tags)).encode()).hexdigest()[:10]}" if tags else None


def _task_status(record: Data) -> dict[str, Any]:
    return {task["task"]: {"retry_attempted": False, "retry_succeeded": False} for task in record["tasks"]}


def _metric(key: str) -> Callable[[Data], Any]:
    return lambda task: _task_metrics(task).get(key, _ABSENT)


def _same(key: str) -> Callable[[Data], Any]:
    return lambda record: record.get(key, _ABSENT)


def _unless_none(value: Callable[[Data], Any]) -> Callable[[Data], Any]:
    return lambda record: _ABSENT if (found := value(record)) is None else found


def _names(key: str, of: str) -> Callable[[Data], Any]:
    return lambda record: [entry[of] for entry in record[key]] if key in record else _ABSENT


def _of_evaluation(value: Callable[[Data], Any]) -> Callable[[Data], Any]:
    return lambda record: value(record) if "tasks" in record else _ABSENT


def _results(record: Data) -> dict[str, Any]:
    return {task["task"]: _task_metrics({**task, "split": record["split"]}) for task in record["tasks"]}


#: Keys of the judgement of a search's best: (it, the best run) → value.
_FINAL: Mapping[str, Callable[[Data, Data], Any]] = {
    "enabled": lambda final, best: True,
    "params": lambda final, best: best["params"],
    "score": lambda final, best: final["worst_recovery"],
    "score_details": lambda final, best: {
        "min_interference_delta": final["worst_recovery"],
        "mean_interference_delta": final["mean_recovery"],
    },
    "results": lambda final, best: {task: _delta(value) for task, value in final["recovery"].items()},
}
FINAL_KEYS = frozenset(_FINAL) | {"save_merged"}
OUTCOME_KEYS = frozenset({"interference_delta"})

_POLICY = (
    "`lambda` of the method as `{type: scalar, value}`; weights per layer of λ and 1 − λ as `{type: per_layer, …}`; "
    "left out for others"
)
_METHOD = "parameters of `recipe.method`; of `ties` also `k` (100 · density) and `lambda` (`recipe.scale`), of `dare` `seed`"
_TAG = "`tag`: the name of the results' file; a hash of all that they depend on, so that no two share it"
_EVAL_TAG = "a hash of the tasks' own `subset`; names of files have `merge_tag`, which tells samples apart too"
_DELTA = "`recovery`; left out where that is undefined"
FILES: Mapping[str, tuple[OlderKey, ...]] = {
    RUN_RECORD: (
        OlderKey("merge_method", "`recipe.method.name`", lambda record: _mapping(_recipe(record).get("method")).get("name")),
        OlderKey("merge_mode", "`recipe.merge_mode`", lambda record: _recipe(record).get("merge_mode")),
        OlderKey("num_adapters", "number of `sources`", lambda record: len(record["sources"])),
        OlderKey("timestamp", "`finished`", _same("finished")),
        OlderKey(
            "source_adapters",
            "`sources`: `task` (the name), `path`, `run_id` (of a path `…/runs/RUN`), `weight`",
            _source_adapters,
        ),
        OlderKey(
            "num_parameters",
            "number of `modules`, of a merge that is written",
            lambda record: len(record["modules"]) if "modules" in record else _ABSENT,
        ),
        OlderKey("params", "all of the next four", _params),
        OlderKey("method_params", _METHOD, _method_params),
        OlderKey("lambda_policy", _POLICY, _unless_none(_lambda_policy)),
        OlderKey("transforms", "`recipe.transforms` as `{name, params}`", _transforms),
        OlderKey("optimizer", "`{type: objective, params: tune}` of a tuning", _unless_none(_optimizer)),
        OlderKey("lambda", "`lambda` of the method; `recipe.scale` of `ties`", _unless_none(_lambda)),
    ),
    RESULTS: (
        OlderKey("requested_split", "`split`", _same("split")),
        OlderKey("timestamp", "`finished`", _same("finished")),
        OlderKey("merge_tag", _TAG, _same("tag")),
        OlderKey("merge_method", "`method`", _same("method")),
        OlderKey("lambda", "as in merge_metadata.json", _unless_none(_lambda)),
        OlderKey("source_tasks", "names of `sources`", _names("sources", "name")),
        OlderKey("evaluated_tasks", "names of `tasks`", _names("tasks", "task")),
        OlderKey("results", "task → the older keys of its metrics, as in its own file", _results),
        OlderKey("adapter_path", "`path`: null for a merge in memory", _same("path")),
        OlderKey("task_status", "task → `retry_attempted`, `retry_succeeded`: false, as no task is begun twice", _task_status),
        OlderKey("eval_subset", "`subset`, with `enabled` and `shuffle`; left out where there is none", _eval_subset),
        OlderKey("eval_tag", f"{_EVAL_TAG}; left out where there is none", _unless_none(_eval_tag)),
    ),
    METRICS: (
        OlderKey("interference_delta", _DELTA, _metric("interference_delta")),
        OlderKey(
            "interference_delta_meta",
            "`metric`, `base`, `task_adapter` (`single`), `merged`, `split`; left out with it",
            _metric("interference_delta_meta"),
        ),
        OlderKey("num_samples", "`examples`", _metric("num_samples")),
        OlderKey(_SUBSET, "`tag` (`subset`), `used_size` (`examples`); left out where there is none", _metric(_SUBSET)),
    ),
    SUMMARY: (
        OlderKey("timestamp", "`finished`", _same("finished")),
        OlderKey("merge_tag", "`tag`, of an evaluation; so are the tasks, the splits and the path", _same("tag")),
        OlderKey("merge_method", "`method`", _same("method")),
        OlderKey("params", "as in merge_metadata.json", _params),
        OlderKey("source_tasks", "`adapters`", _names("sources", "name")),
        OlderKey("evaluated_tasks", "names of `tasks`", _names("tasks", "task")),
        OlderKey("requested_split", "`split`", _same("split")),
        OlderKey("results_path", "the results in the same folder, as an absolute path", _same("results_path")),
        OlderKey("eval_tag", f"{_EVAL_TAG}; null where there is none", _of_evaluation(_eval_tag)),
    ),
    INDEX: (
        OlderKey("timestamp", "`finished`", _same("finished")),
        OlderKey("merge_tag", "`tag`", _same("tag")),
        OlderKey("results_path", "`results`, as an absolute path", _same("results_path")),
        OlderKey("run_path", "`run`, as an absolute path", _same("run_path")),
        OlderKey("params", "as in merge_metadata.json", _params),
        OlderKey("lambda", "as in merge_metadata.json; null where there is none", _lambda),
        OlderKey("source_tasks", "`adapters`", _names("sources", "name")),
        OlderKey("evaluated_tasks", "`tasks`", _names("tasks", "task")),
    ),
    SWEEP: (
        OlderKey("lambda_policy", "as in merge_metadata.json; null in place of left out", _lambda_policy),
        OlderKey("optimizer", "null: a search learns nothing", lambda record: None),
    ),
}
_WITHIN_SWEEP = {
    "runs[].params": "paths; also what parameters are called there: `lambda` for `method.lambda`, `k` of `ties`",
    "runs[].results.TASK.interference_delta": _DELTA,
    "post_sweep_eval.enabled": "true",
    "post_sweep_eval.save_merged": "`search.save_merged`",
    "post_sweep_eval.params": "`params` of the best run",
    "post_sweep_eval.score, .score_details": "`worst_recovery`; it and `mean_recovery`",
    "post_sweep_eval.results.TASK.interference_delta": "`recovery.TASK`",
}
#: Keys that no file has, and why.
_LEFT_OUT: Mapping[str, Mapping[str, str]] = {
    RUN_RECORD: {
        "source_adapters[].metrics, .config_hash, .timestamp": "`sources[].sha256` tells adapters apart; what their trainer "
        "noted is in their folders",
        "ties_stats": "counts of entries of complete tensors, which a merge in blocks or in `core` never has; `k` is in "
        "`method_params`, and `kept` of every module is the share of the energy",
        "dare_stats": "see `ties_stats`; `drop_rate` is in `method_params`, or `density`",
        "coefficient_policy": "coefficients that were learned are a plain recipe's `weights`",
        "optimizer.provenance": "`tuning.json` has the steps of a tuning",
    },
    RESULTS: {"results.TASK.error": "an evaluation in which a task fails ends with its error; finished answers are kept"},
    SWEEP: {
        "early_stop_state": "`runs` and `search.early_stop` are all that the rule looks at; `early_stop_reason` is what held",
        "runs[].continual": "there are no sweeps of sequences",
        "post_sweep_eval.error": "a search whose best cannot be asked ends with the error; the same command asks it again",
    },
}
