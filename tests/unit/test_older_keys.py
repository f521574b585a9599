"""Scripts of the earlier framework find their keys in what plait writes, and plait reads its files as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import plait
from plait.evaluation.record import Evaluation, SingleAdapter, TaskResult
from plait.evaluation.workspace import write_evaluation
from plait.merging.record import RunRecord
from plait.recipes.loading import build_recipe
from plait.recipes.writing import recipe_json
from plait.results.lock import RUN_RECORD, SUMMARY
from plait.results.older_keys import (
    FILES,
    INDEX,
    METRICS,
    RESULTS,
    SWEEP,
    keys_of,
    page,
    study_with_older_keys,
    with_older_keys,
)
from plait.search.record import Final, Run, StudyRecord, TaskOutcome
from tests.adapters_on_disk import layers, write_adapter
from tests.every import every

NAMES = ("asr", "kws")
POLICY: dict[str, Any] = {"policy": "per_layer", "default": {"asr": 0.3, "kws": 0.7}, "layers": {"3": {"asr": 0.1, "kws": 0.9}}}


def recipe(**changes: Any) -> dict[str, Any]:
    return recipe_json(build_recipe({"adapters": ["asr=./a", "kws=./k"], "method": "linear", **changes}))


def task(name: str, **changes: Any) -> TaskResult:
    given: dict[str, Any] = {
        "task": name, "kind": "classification", "metric": "accuracy", "higher_is_better": True, "adapter": name, "examples": 40,
        "subset": None, "base": 0.2, "single": 0.8, "merged": 0.65, "base_interval": None, "single_interval": None,
        "merged_interval": None, "recovery": 0.75, "recovery_interval": None, "undefined": None, "below_base": False,
        "samples": (),
    }  # fmt: skip
    return TaskResult.model_validate({**given, **changes})


def source(name: str) -> SingleAdapter:
    return SingleAdapter(name=name, path=f"./{name}", repo=None, commit=None, sha256="0")


def evaluation(**changes: Any) -> Evaluation:
    undefined = {"recovery": None, "undefined": "its own adapter is worse than the base", "single": 0.1}
    worse = {"metric": "wer", "higher_is_better": False, "base": 0.5, "single": 0.1, "merged": 0.3, "recovery": 0.5}
    given: dict[str, Any] = {
        "plait": plait.__version__, "name": "merge", "kind": "merge", "tag": "weighted_1a2b", "method": "weighted",
        "space": "delta", "recipe": recipe(method={"name": "weighted", "lambda": 0.3}, transforms=["identity"]),
        "base_model": "base", "sources": [source(name) for name in NAMES],
        "split": "test", "dtype": "float32", "batch_size": 8, "draws": 100, "seed": 0,
        "tasks": [task("asr", **worse), task("kws"), task("st", **undefined)], "mean_recovery": 0.6, "mean_interval": None,
        "worst_recovery": 0.5, "worst_interval": None, "worst_task": "asr", "below_base": (), "undefined": ("st",),
        "matrix": None, "notes": (), "finished": "2026-01-02T03:04:05+00:00", "seconds": 1.0,
    }  # fmt: skip
    return Evaluation.model_validate({**given, **changes})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the run folder of an evaluation, in the workspace `work`."""
    return write_evaluation(tmp_path / "work", evaluation())


def read(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def results_of(run: Path) -> Path:
    return run.parents[1] / "eval" / "test" / "eval_results_weighted_1a2b_test.json"


def test_the_metadata_of_a_written_merge(tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES):
        write_adapter(tmp_path / name, layers(2, {"q_proj": (6, 5)}), seed=seed)
    made = plait.merge(
        {name: tmp_path / name for name in NAMES}, method="ties", density=0.3, scale=0.9, out=tmp_path / "out",
        transforms=[{"name": "layer_l2_normalize", "target_norm": 2.0}],
    )  # fmt: skip
    found = read(made.folder / RUN_RECORD)
    assert keys_of(RUN_RECORD) - {"optimizer"} <= found.keys()
    assert (found["merge_method"], found["merge_mode"], found["num_adapters"]) == ("ties", "union", 2)
    assert found["source_adapters"] == [{"task": n, "path": str(tmp_path / n), "weight": 1.0} for n in NAMES]
    assert (found["num_parameters"], found["timestamp"], found["lambda"]) == (2, found["finished"], 0.9)
    assert found["method_params"] | {"k": 30, "lambda": 0.9, "density": 0.3} == found["method_params"]
    transforms = [{"name": "layer_l2_normalize", "params": {"target_norm": 2.0, "eps": 1e-12, "include_non_layer_keys": True}}]
    assert found["transforms"] == transforms
    assert found["lambda_policy"] == {"type": "scalar", "value": 0.9}
    assert found["params"] == {
        **found["method_params"], "transforms": transforms, "lambda_policy": found["lambda_policy"],
    }  # fmt: skip
    assert RunRecord.model_validate(found) == made.record
    old = {key: value for key, value in found.items() if key not in keys_of(RUN_RECORD)}
    assert RunRecord.model_validate(old) == made.record, "of a merge that an earlier version wrote"
    assert plait.verify(made.folder).ok
    assert read(made.folder / SUMMARY).items() >= {"merge_method": "ties", "source_tasks": list(NAMES)}.items()


def test_the_metadata_of_an_evaluation(run: Path) -> None:
    found = read(run / RUN_RECORD)
    assert keys_of(RUN_RECORD) - {"optimizer", "num_parameters"} <= found.keys()
    assert found["method_params"] == {"lambda": 0.3}
    assert found["params"] == {
        "lambda": 0.3, "transforms": [{"name": "identity", "params": {}}],
        "lambda_policy": {"type": "scalar", "value": 0.3},
    }  # fmt: skip
    assert [(s["task"], s["path"]) for s in found["source_adapters"]] == [("asr", "./asr"), ("kws", "./kws")]


def test_results(run: Path) -> None:
    for file in (run / "eval_results_test.json", results_of(run)):
        found = read(file)
        assert keys_of(RESULTS) - {"eval_subset", "eval_tag"} <= found.keys()
        assert found["adapter_path"] is None, "in memory"
        assert found["task_status"]["st"] == {"retry_attempted": False, "retry_succeeded": False}
        assert f"eval_results_{found['merge_tag']}_{found['split']}.json" == results_of(run).name
        assert (found["timestamp"], found["requested_split"]) == (found["finished"], "test")
        assert (found["merge_method"], found["lambda"]) == ("weighted", 0.3)
        assert (found["source_tasks"], found["evaluated_tasks"]) == (["asr", "kws"], ["asr", "kws", "st"])
        assert found["results"] == {
            "asr": {
                "wer": 0.3, "num_samples": 40, "interference_delta": 0.5,
                "interference_delta_meta": {"metric": "wer", "base": 0.5, "task_adapter": 0.1, "merged": 0.3, "split": "test"},
            },
            "kws": {
                "accuracy": 0.65, "num_samples": 40, "interference_delta": 0.75,
                "interference_delta_meta": {
                    "metric": "accuracy", "base": 0.2, "task_adapter": 0.8, "merged": 0.65, "split": "test",
                },
            },
            "st": {"accuracy": 0.65, "num_samples": 40},
        }  # fmt: skip
        assert Evaluation.model_validate_json(file.read_text()) == evaluation()
    old = evaluation().model_dump(mode="json")
    assert not keys_of(RESULTS) & old.keys()
    assert Evaluation.model_validate(old) == evaluation()


def test_a_tasks_own_file(tmp_path: Path, run: Path) -> None:
    def metrics(name: str) -> dict[str, Any]:
        others = "multi_asr_kws" if name == "st" else "kws" if name == "asr" else "asr"
        return read(tmp_path / "work" / name / "metrics/eval/test/merged" / others / "weighted_1a2b" / "metrics.json")

    found = metrics("asr")
    assert keys_of(METRICS) - {"_eval_subset"} <= found.keys()
    assert (found["wer"], found["interference_delta"], found["num_samples"]) == (0.3, 0.5, 40)
    meta = {"metric": "wer", "base": 0.5, "task_adapter": 0.1, "merged": 0.3, "split": "test"}
    assert found["interference_delta_meta"] == meta
    assert (found["metric"], found["merged"], found["recovery"]) == ("wer", 0.3, 0.5), "plait's own stay"
    assert metrics("st")["accuracy"] == 0.65
    assert not {"interference_delta", "interference_delta_meta"} & metrics("st").keys(), "undefined, and left out as there"


def test_a_sample_and_an_adapters_own_folder(tmp_path: Path) -> None:
    asked = [task("asr", subset="subset_1"), task("kws", examples=9, subset="subset_2"), task("st")]
    made = evaluation(tasks=asked, subset={"max_samples": 9, "per_task": {"st": None}}, kind="adapter", path="/merges/one")
    run = write_evaluation(tmp_path, made)
    found, summary = read(run / "eval_results_test.json"), read(run / SUMMARY)
    assert keys_of(RESULTS) <= found.keys()
    assert found["adapter_path"] == "/merges/one"
    assert found["eval_subset"] == {
        "enabled": True, "shuffle": True, "max_samples": 9, "stratified": True, "seed": 0, "per_task": {"st": None}
    }  # fmt: skip
    assert found["eval_tag"] == summary["eval_tag"] != read(write_evaluation(tmp_path, evaluation()) / SUMMARY)["eval_tag"]
    assert found["results"]["kws"]["_eval_subset"] == {"tag": "subset_2", "used_size": 9}
    assert "_eval_subset" not in found["results"]["st"]
    (own,) = tmp_path.glob("kws/metrics/eval/test/merged/asr/weighted_1a2b/metrics.json")
    assert read(own)["_eval_subset"] == {"tag": "subset_2", "used_size": 9}
    assert Evaluation.model_validate(found) == made
    bare = {key: value for key, value in made.model_dump(mode="json").items() if key not in ("path", "subset")}
    assert Evaluation.model_validate(bare).subset is None, "of an earlier version"


def test_a_metric_that_is_called_like_a_key_of_plaits_own_replaces_nothing(tmp_path: Path) -> None:
    write_evaluation(tmp_path, evaluation(tasks=[task("kws", metric="kind")]))
    (file,) = tmp_path.glob("kws/metrics/eval/test/merged/asr/*/metrics.json")
    assert read(file)["kind"] == "classification"


def test_the_summary(run: Path) -> None:
    found = read(run / SUMMARY)
    assert keys_of(SUMMARY) <= found.keys()
    assert Path(found["results_path"]) == run.absolute() / "eval_results_test.json"
    assert (found["merge_tag"], found["merge_method"], found["split"]) == ("weighted_1a2b", "weighted", "test")
    assert found["params"]["lambda"] == 0.3
    assert found["evaluated_tasks"] == ["asr", "kws", "st"]
    assert found["tasks"]["asr"]["recovery"] == 0.5, "plait's own stay"


def test_the_index(run: Path) -> None:
    index = run.parents[1] / "eval" / "index.json"
    (found,) = read(index)["entries"]
    assert keys_of(INDEX) <= found.keys()
    assert (Path(found["results_path"]), Path(found["run_path"])) == (results_of(run).absolute(), run.absolute())
    assert (found["timestamp"], found["merge_tag"], found["split"]) == (evaluation().finished, "weighted_1a2b", "test")
    assert (found["method"], found["lambda"], found["params"]["lambda"]) == ("weighted", 0.3, 0.3)
    assert (found["source_tasks"], found["evaluated_tasks"]) == (["asr", "kws"], ["asr", "kws", "st"])
    old = {key: value for key, value in found.items() if key not in keys_of(INDEX)}
    index.write_text(json.dumps({"entries": [old]}))
    write_evaluation(run.parents[4], evaluation())
    assert read(index)["entries"][0] == old, "what an earlier version has written is not changed"


def test_an_adapter_without_a_recipe(tmp_path: Path) -> None:
    run = write_evaluation(tmp_path, evaluation(kind="adapter", method=None, space=None, recipe=None, sources=()))
    found = read(run / RUN_RECORD)
    assert (found["method_params"], found["source_adapters"], found["transforms"]) == ({}, [], [])
    assert not {"lambda", "lambda_policy", "optimizer"} & found.keys()
    (entry,) = read(run.parents[1] / "eval" / "index.json")["entries"]
    assert entry["lambda"] is None


@every(
    ("changes", "expected"),
    [
        ({}, None),
        ({"method": {"name": "dare", "lambda": 2.0}}, {"type": "scalar", "value": 2.0}),
        ({"weights": POLICY}, {"type": "per_layer", "default": 0.3, "overrides": {"3": 0.1}}),
        ({"weights": {"policy": "per_layer", "default": 0.5, "layers": {"3": 1.0}}}, None),
        ({"weights": {**POLICY, "layers": {"3": {"asr": 0.5, "kws": 0.9}}}}, None),
        ({"weights": POLICY, "method": {"name": "weighted", "lambda": 0.4}}, None),
        ({"weights": {"policy": "scalar", "value": 0.5}}, None),
    ],
)
def test_policies(changes: dict[str, Any], expected: dict[str, Any] | None) -> None:
    found = with_older_keys(RUN_RECORD, {"recipe": recipe(**changes), "sources": []})
    assert found.get("lambda_policy") == expected
    assert ("lambda_policy" in found["params"]) == ("lambda_policy" in found) == (expected is not None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_policy_of_that_framework_comes_back_as_it_was() -> None:
    old = "lambda_policy: {type: per_layer, default: 0.3, overrides: {3: 0.1}}"
    migrated = plait.load_recipe(f"adapters: [./asr, ./kws]\nmethod: weighted\n{old}\n")
    found = with_older_keys(RUN_RECORD, {"recipe": recipe_json(migrated), "sources": []})
    assert found["lambda_policy"] == {"type": "per_layer", "default": 0.3, "overrides": {"3": 0.1}}


@every(
    "broken",
    [
        {"method": "ties"}, {"method": {"name": "ties", "density": "x"}}, {"weights": [1]}, {"adapters": 3, "transforms": "x"},
        {"weights": {"policy": "per_layer", "default": {"asr": "x", "kws": 1}, "layers": [1]}},
        {"adapters": [1, {"name": [], "weight": 1}], "weights": POLICY},
    ],
)  # fmt: skip
def test_a_recipe_from_elsewhere_may_have_any_shape(broken: dict[str, Any]) -> None:
    record = {"recipe": {**recipe(), **broken}, "sources": [{"name": "asr", "path": "./asr"}]}
    assert with_older_keys(RUN_RECORD, record)["num_adapters"] == 1


def study(method: str, *points: dict[str, Any], best: int = 0) -> StudyRecord:
    details: dict[str, float | str | None] = {"min_interference_delta": 0.5, "mean_interference_delta": 0.6}
    outcome = {
        "asr": TaskOutcome(metric=0.4, recovery=0.5, interval=None),
        "st": TaskOutcome(metric=0.4, recovery=0.7, interval=None),
    }
    runs = [
        Run(number=i, phase="search", params=point, score=0.5, score_details=details, results=outcome, key="", examples=1,
            stopped=False, nonnegative=True, seconds=0.0)
        for i, point in enumerate(points)
    ]  # fmt: skip
    final = Final(
        split="test", worst_recovery=0.4, worst_interval=None, worst_task="asr", mean_recovery=0.45, mean_interval=None,
        recovery={"asr": 0.4, "st": None}, differences=(), run="runs/run_1",
    )  # fmt: skip
    return StudyRecord(
        plait="1", study="s", setting="", storage=None, adapters=NAMES, base_model="base", method=method, merge_mode="common",
        recipe=recipe(method={"name": method}) if method == "ties" else recipe(), eval_tasks=("asr", "st"), split="validation",
        eval_subset=None, selected_on_test=False, search={}, grid={}, maximize=("worst_recovery",), constraint_nonnegative=True,
        early_stopped=False, early_stop_reason=None, candidates=1, failed=0, repeated=0, examples_asked=1, examples_of_all=1,
        runs=tuple(runs), best_index=best, best_score=0.5, second_index=None, front=(0,), importance={}, post_sweep_eval=final,
        notes=(), timestamp="2026-01-02", seconds=0.0,
    )  # fmt: skip


def test_the_summary_of_a_sweep() -> None:
    made = study("ties", {"scale": 0.5, "method.density": 0.3}, {"scale": 1.5, "method.density": 0.07}, best=1)
    found = study_with_older_keys(made.model_dump(mode="json"))
    named = {
        "timestamp", "method", "adapters", "merge_mode", "lambda_policy", "optimizer", "eval_tasks", "split", "eval_subset",
        "grid", "search", "constraint_nonnegative", "post_sweep_eval", "best_index", "best_score", "runs",
        "early_stopped", "early_stop_reason",
    }  # fmt: skip
    assert named <= found.keys()
    first, second = found["runs"]
    assert first["params"] == {"scale": 0.5, "method.density": 0.3, "density": 0.3, "k": 30, "lambda": 0.5}
    assert first["results"]["asr"]["interference_delta"] == 0.5
    assert first["results"]["st"]["interference_delta"] == 0.7
    assert first["score_details"] == {"min_interference_delta": 0.5, "mean_interference_delta": 0.6}
    final = found["post_sweep_eval"]
    assert (final["enabled"], final["split"], final["score"]) == (True, "test", 0.4)
    assert (final["params"], second["params"]["k"]) == (second["params"], 7)
    assert final["score_details"] == {"min_interference_delta": 0.4, "mean_interference_delta": 0.45}
    assert final["results"] == {"asr": {"interference_delta": 0.4}, "st": {}}
    assert StudyRecord.model_validate(found) == made
    assert StudyRecord.model_validate(made.model_dump(mode="json")) == made, "of an earlier version"
    before = made.model_dump(mode="json")
    before["runs"][0]["results"]["asr"]["interference_delta"] = 0.5
    assert StudyRecord.model_validate(before) == made, "of a version that had one of these keys"


def test_a_parameter_that_is_searched_keeps_its_name() -> None:
    """`scale` of a recipe and `scale` of a method are two numbers; no run's value is taken for the other's."""
    both = study("uniform_scalar_delta", {"scale": 0.5, "method.scale": 2.0}, {"method.scale": 3.0})
    found = study_with_older_keys(both.model_dump(mode="json"))
    assert [r["params"] for r in found["runs"]] == [{"scale": 0.5, "method.scale": 2.0}, {"method.scale": 3.0}]
    assert StudyRecord.model_validate(found) == both
    one = study("uniform_scalar_delta", {"method.scale": 2.0})
    found = study_with_older_keys(one.model_dump(mode="json"))
    assert found["runs"][0]["params"] == {"method.scale": 2.0, "scale": 2.0}
    assert StudyRecord.model_validate(found) == one


def test_the_page_has_every_key() -> None:
    assert all(f"| `{file}` | `{key.name}` | {key.here} |" in page() for file, keys in FILES.items() for key in keys)
    assert SWEEP in page()
