"""PHASES.yaml: what it means, and everything that can be wrong with it, by line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from plait.errors import OutputError, RecipeError
from plait.reports.losses import LossCurve, loss_chart
from plait.training import checks
from plait.training.causal import model_config
from plait.training.data import TrainingData
from plait.training.job import LoraSettings, TrainingJob
from plait.training.phases import phase_seed
from plait.training.preflight import check_output
from plait.training.reading import read_phases
from plait.training.settings import trainer_settings
from tests.language_models import write_task
from tests.locks import write_lock


@pytest.fixture
def place(tmp_path):
    """A folder with two tasks and something that looks like a base model."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for task in ("sort", "rate"):
        write_task(tmp_path, task, splits={"train": "test.jsonl", "test": "test.jsonl"})
    return tmp_path


def read(place, text: str, **asked):
    (place / "phases.yaml").write_text(text)
    return read_phases(place / "phases.yaml", out=place / "out", **asked)


def refused(place, text: str, **asked) -> str:
    with pytest.raises(RecipeError) as caught:
        read(place, text, **asked)
    return str(caught.value)


SHORT = """\
base_model: ./base
lora: {r: 4, targets: all-linear}
arguments: {learning_rate: 1e-3, max_steps: 5}
phases:
  - sort.yaml
  - {task: rate.yaml, weight: 0.5, arguments: {max_steps: 7}, lora: {dropout: 0.2}, seed: 9}
merge: {method: {name: ties, density: 0.3}, scale: 1.5}
eval: {split: test, subset: {max_samples: 10}}
"""


def test_a_plan(place):
    plan = read(place, SHORT)
    sort, rate = plan.phases
    assert (sort.name, rate.name) == ("sort", "rate")
    assert sort.adapter == place / "out" / "phases" / "sort" / "adapter"
    assert (sort.job.base, sort.job.data.task, sort.job.kind) == (str(place / "base"), str(place / "sort.yaml"), "causal")
    assert (sort.job.arguments["max_steps"], rate.job.arguments["max_steps"]) == (5, 7)
    assert (sort.job.arguments["learning_rate"], rate.job.arguments["learning_rate"]) == (1e-3, 1e-3)
    assert (sort.job.lora.dropout, rate.job.lora.dropout) == (0.05, 0.2)
    assert (sort.job.lora.r, rate.job.lora.r) == (4, 4)
    assert (sort.job.seed, rate.job.seed) == (0, 9)
    recipe = plan.recipe
    assert (recipe.method_name, recipe.scale, recipe.eval.subset.max_samples) == ("ties", 1.5, 10)
    assert [(a.name, a.path, a.weight) for a in recipe.adapters] == [
        ("sort", str(sort.adapter), 1),
        ("rate", str(rate.adapter), 0.5),
    ]
    assert recipe.tasks == (str(place / "sort.yaml"), str(place / "rate.yaml"))
    assert plan.notes == ()


def test_the_same_in_python_and_from_anywhere(place, monkeypatch):
    from_file = read(place, SHORT)
    monkeypatch.chdir(place)
    from_mapping = read_phases(yaml.safe_load(SHORT.replace("1e-3", "1.0e-3")), out=place / "out")
    assert from_mapping.phases == from_file.phases
    assert from_mapping.recipe == from_file.recipe


def test_every_phase_has_an_a_of_its_own(place):
    """By name, so that a phase keeps its seed when others come or go."""
    plan = read(place, SHORT)
    seeds = {p.name: p.job.lora.init_seed for p in plan.phases}
    assert seeds == {"sort": phase_seed(0, "sort"), "rate": phase_seed(0, "rate")}
    assert len(set(seeds.values())) == 2
    alone = read(place, SHORT.replace("  - sort.yaml\n", ""))
    assert alone.phases[0].job.lora.init_seed == seeds["rate"]
    assert len({phase_seed(seed, name) for seed in range(20) for name in ("a", "b", "ab")}) == 60
    assert all(0 <= phase_seed(seed, "a") < 2**31 for seed in range(50))


def test_a_shared_a_is_told(place):
    plan = read(place, SHORT.replace("{r: 4,", "{r: 4, init_seed: 3,"))
    assert {p.job.lora.init_seed for p in plan.phases} == {3}
    (note,) = plan.notes
    assert "sort and rate begin with one A" in note
    assert not read(place, SHORT.replace("{r: 4,", "{r: 4, init_seed: 3,").replace("dropout: 0.2", "init_seed: 4")).notes


def test_a_phase_without_a_task(place):
    (place / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    plan = read(
        place,
        SHORT,
        settings={"phases": ["sort.yaml", {"name": "more", "data": "rows.jsonl"}]},
    )
    more = plan.phases[1]
    assert (more.task, more.job.data.place, more.job.data.task) == (None, str(place / "rows.jsonl"), None)
    assert "phase 'more' has no task" in plan.notes[0]
    assert plan.recipe.tasks == (str(place / "sort.yaml"),)


def test_a_data_set_of_the_hub_may_have_a_dot_in_its_name(place):
    def placed(data: str) -> str | None:
        return read(place, SHORT, settings={"phases": [{"name": "more", "data": data}]}).phases[0].job.data.place

    assert placed("teknium/OpenHermes-2.5") == "teknium/OpenHermes-2.5"
    assert placed("rows/of.mine.jsonl") == str(place / "rows/of.mine.jsonl")


def test_part_of_a_tasks_own_data(place):
    plan = read(place, SHORT.replace("- sort.yaml", "- {task: sort.yaml, data: {split: test, limit: 3}}"))
    data = plan.phases[0].job.data
    assert (data.task, data.split, data.limit, data.place) == (str(place / "sort.yaml"), "test", 3, None)


def test_values_set_on_top(place):
    plan = read(place, SHORT, base="org/other", sets=["arguments.max_steps=2", "phases.1.weight=3", "merge.method=linear"])
    assert plan.base == "org/other"
    assert [p.job.arguments["max_steps"] for p in plan.phases] == [2, 7]
    assert plan.recipe.adapters[1].weight == 3
    assert plan.recipe.method_name == "linear"


def test_everything_wrong_at_once_by_line(place):
    text = """\
base_modle: ./base
lora: {r: 0, alpha: yes please}
phases:
  - sort.yaml
  - task: nowhere.yaml
  - {task: rate.yaml, wieght: 1}
  - {name: "no good"}
merge: {method: {name: ties, density: 3}, adapters: [./a]}
"""
    message = refused(place, text)
    assert "phases.yaml:1: base_modle: 'base_modle' is not known here; allowed: version, base_model" in message
    assert "Did you mean 'base_model'?" in message
    assert "base_model: 'base_model' is missing" in message
    assert "phases.yaml:2: lora.r: r is 0; it must be > 0." in message
    assert "phases.yaml:2: lora.alpha: alpha is 'yes please'; it must be a number." in message
    assert "phases.yaml:5: phases.1.task:" in message
    assert "nowhere.yaml: there is no such file" in message
    assert "phases.yaml:6: phases.2.wieght: 'wieght' is not known here;" in message
    assert "phases.yaml:7: phases.3.name: name is 'no good'; it must start with a letter" in message
    assert "phases.yaml:8: merge.method.density: density is 3; it must be > 0 and <= 1." in message
    assert "phases.yaml:8: merge.adapters: 'adapters' is not a key of 'merge'" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("lora: {dropout: 0.2}", "lora: {r: 8}"), "phases.1.lora.r: r is 8; all phases share one LoRA configuration"),
        (("lora: {dropout: 0.2}", "lora: {dora: true}"), "dora is true; all phases share one LoRA configuration, where it"),
        (("{task: rate.yaml,", "{task: rate.yaml, name: other,"), "name is 'other', but the own adapter of task 'rate' is"),
        (("- sort.yaml", "- rate.yaml"), "phases.0 is called 'rate' too; give names that differ"),
        (("- sort.yaml", "- {task: sort.yaml, data: {split: validation}}"), "no split 'validation' to train on; it has"),
        (("split: test", "split: validation"), "task 'sort' has no split 'validation' to evaluate on"),
        (("./base", "./nothing"), "there is no model (config.json)"),
        (("- sort.yaml", "- {name: a}"), "give 'task' (a task file) or 'data' (rows to train on)"),
        (("{name: ties, density: 0.3}", "regmean"), "method 'regmean' needs second moments of the modules' inputs"),
        (("ties,", "tise,"), "merge.method.name: name is 'tise'"),
        (("learning_rate: 1e-3", "learning_rate: 1e-3, learning_rate: 2"), "'learning_rate' is given twice"),
        (("phases:", "phases: {}\nrest:"), "phases is {}; it must be a list."),
    ],
)  # fmt: skip
def test_one_thing_wrong(place, change, message):
    assert change[0] in SHORT
    assert message in refused(place, SHORT.replace(*change))


def test_a_loss_on_other_rows_needs_rows(place):
    message = refused(place, SHORT.replace("max_steps: 5}", "max_steps: 5, eval_strategy: steps}"))
    assert "2 problems" in message
    assert "eval_strategy is 'steps', and task 'sort' has no split 'validation' to measure the loss on" in message
    assert read(place, SHORT.replace("max_steps: 5}", "max_steps: 5, eval_strategy: no}")).phases[0].job.eval_data is None


TEMPLATE = ("max_steps: 5}", "max_steps: 5, chat_template_path: TEMPLATE}")


@pytest.mark.parametrize("named", ["chat.jinja", "./chat.jinja", "tokenizer"])
def test_files_among_the_arguments_lie_beside_the_file(place, named):
    (place / "chat.jinja").write_text("{{ 1 }}")
    (place / "tokenizer").mkdir()
    plan = read(place, SHORT.replace(*TEMPLATE).replace("TEMPLATE", named))
    assert {p.job.arguments["chat_template_path"] for p in plan.phases} == {str(place / named)}


@pytest.mark.parametrize("named", ["org/model", "{}"])
def test_arguments_that_are_no_files_stay_as_they_are(place, named):
    plan = read(place, SHORT.replace(*TEMPLATE).replace("TEMPLATE", f"{named!r}"))
    assert plan.phases[0].job.arguments["chat_template_path"] == named


def test_files_that_are_not_there(place):
    text = SHORT.replace(*TEMPLATE).replace("TEMPLATE", "chat.jinja").replace("{max_steps: 7}", "{deepspeed: ./zero.json}")
    message = refused(place, text)
    assert f"phases.yaml:3: arguments.chat_template_path: {place / 'chat.jinja'}: there is no such file." in message
    assert f"phases.yaml:6: phases.1.arguments.deepspeed: {place / 'zero.json'}: there is no such file." in message


class TestTheOutputFolder:
    @pytest.fixture
    def out(self, tmp_path):
        (tmp_path / "out").mkdir()
        return tmp_path / "out"

    def test_what_a_run_wrote_is_not_in_its_way(self, out):
        check_output(out)
        check_output(out / "new")
        (out / "merged").mkdir()
        write_lock(out / "merged")
        for name in ("recipe.yaml", "loss_curves.json"):
            (out / name).write_text("")
        (out / "report.html").write_text('<meta name="generator" content="plait">')
        (out / "train.json").write_text('{"phases": []}')
        (out / "evaluation").mkdir()
        check_output(out)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("merged/mine.txt", "merged was not written by plait (it has no plait.lock); --force replaces only what was."),
            ("merged", "merged exists and is not a folder."),
            ("evaluation", "evaluation is a file; a folder of results has that name."),
            ("phases", "phases is a file;"),
            ("report.html/mine.txt", "report.html is a folder; a file of results has that name."),
            ("recipe.yaml", "recipe.yaml was not written by plait train, and would be replaced."),
            ("train.json", "train.json was not written by plait train, and would be replaced."),
        ],
    )
    def test_what_is_in_the_way(self, out, name, message):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("[]")
        with pytest.raises(OutputError) as caught:
            check_output(out)
        assert f"{out}/{message}" in str(caught.value)
        assert "Move it away, or choose another output folder." in str(caught.value)

    def test_a_merge_with_more_in_it_and_a_page_of_somebody_else(self, out):
        (out / "merged").mkdir()
        write_lock(out / "merged")
        (out / "merged" / "notes.txt").write_text("mine")
        (out / "train.json").write_text('{"phases": []}')
        (out / "report.html").write_text("mine")
        with pytest.raises(OutputError, match=r"(?s)2 problems.*'notes\.txt'|2 problems.*report") as caught:
            check_output(out)
        assert f"{out}/report.html was not written by plait report" in str(caught.value)

    def test_all_of_it_at_once(self, out):
        (out / "evaluation").write_text("")
        (out / "report.html").mkdir()
        with pytest.raises(OutputError, match=r"(?s)2 problems.*evaluation is a file.*report\.html is a folder"):
            check_output(out)
        with pytest.raises(OutputError, match="evaluation exists and is not a folder"):
            check_output(out / "evaluation")


def test_messages_of_training_name_no_flags_of_one_command():
    """`plait sft`, `plait train` and Python meet the same errors, and spell settings differently."""
    of_sft = {"arguments.py", "checks.py", "sft.py"}
    for file in Path(checks.__file__).parent.glob("*.py"):
        if file.name not in of_sft:
            assert not re.findall(r"--[a-z]+_[a-z_]+", file.read_text(encoding="utf-8")), file.name


def test_kinds_do_not_mix(place):
    heads = {"kind": "sequence_classification", "delimiter": None, "name": "heads", "prompt": "{{ word }}"}
    (place / "heads").mkdir()
    write_task(place, "sort", splits={"train": "test.jsonl", "test": "test.jsonl"})
    file = write_task(place, "rate", splits={"train": "test.jsonl", "test": "test.jsonl"}, **heads)
    message = refused(place, SHORT)
    assert "'heads' is sequence_classification, 'sort' is classification" in message
    plan = read(place, f"base_model: ./base\nphases: [{file.name}]\n")
    assert (plan.phases[0].job.kind, plan.phases[0].job.labels) == ("sequence_classification", ("good", "bad"))


def test_a_file_that_is_none(place):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: there is no such file\. Did you mean"):
        read_phases(place / "nowhere.yaml", out=place)
    assert "phases are a mapping" in refused(place, "- a\n- b\n")
    assert "phases.yaml:2: this is not YAML" in refused(place, "a: 1\n b: }\n")


def test_only_known_phases(place):
    with pytest.raises(RecipeError, match=r"no phase is called 'srot'; there are sort and rate. Did you mean 'sort'\?"):
        read(place, SHORT).phase("srot")


def test_the_chart_of_the_losses():
    curves = [
        LossCurve(name="a", steps=10, tokens=1, seconds=1, points=((1, 4.0), (10, 1.0)), held_out=((10, 2.0),)),
        LossCurve(name="b", steps=5, tokens=1, seconds=1, points=((5, 2.0),)),
    ]
    chart = loss_chart(curves)
    assert (chart.steps, chart.loss) == (10, 4.0)
    first, dashed, second = chart.lines
    assert first.points == f"{chart.width / 10:.1f},0.0 {chart.width:.1f},{chart.height * 3 / 4:.1f}"
    assert (dashed.dashed, dashed.color) == (True, first.color)
    assert second.points == f"{chart.width / 2:.1f},{chart.height / 2:.1f}"
    assert second.color != first.color
    assert loss_chart([LossCurve(name="a", steps=1, tokens=1, seconds=1, points=())]) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": "ten"}, "arguments: max_steps is 'ten'; it must be an integer."),
        ({"max_steps": 1.5}, "arguments: max_steps is 1.5; it must be an integer."),
        ({"max_steps": True}, "arguments: max_steps is true; it must be an integer."),
        ({"learning_rate": "fast"}, "arguments: learning_rate is 'fast'; it must be a number."),
        ({"packing": "yes"}, "arguments: packing is 'yes'; it must be true or false."),
        ({"packing_strategy": "tight"}, "arguments: packing_strategy is 'tight'; it must be one of bfd, bfd_split, wrapped."),
        ({"max_stps": 1}, "arguments: max_stps: SFTConfig has none of that name. Did you mean 'max_steps'?"),
        ({"truncation_mode": "keep_end"}, "long examples always lose their end"),
    ],
)
def test_values_that_no_trainer_would_refuse(tmp_path, values, message):
    """TRL's classes take anything, and fail in the middle of a training."""
    trl = pytest.importorskip("trl")
    job = TrainingJob(base="x", data=TrainingData(place="x"), arguments=values)
    with pytest.raises(RecipeError, match=re.escape(message)):
        trainer_settings(trl.SFTConfig, job, tmp_path)


def test_values_that_fit(tmp_path):
    trl = pytest.importorskip("trl")
    values = {"learning_rate": 1, "save_steps": 0.1, "bf16": None, "lr_scheduler_type": "constant", "report_to": ["none"]}
    found = trainer_settings(trl.SFTConfig, TrainingJob(base="x", data=TrainingData(place="x"), arguments=values), tmp_path)
    assert (found.learning_rate, found.save_steps, found.lr_scheduler_type) == (1, 0.1, "constant")


def test_how_a_base_is_loaded():
    pytest.importorskip("trl")
    assert model_config({"dtype": "bfloat16"}).dtype == "bfloat16"
    with pytest.raises(
        RecipeError, match=r"(?s)model: 2 problems.*dtype is 'float33'; it must be one of auto.*'attn_implementation'"
    ):
        model_config({"dtype": "float33", "attn_implementatio": "eager"})


def test_a_lora_adapts_all_linear_layers_unless_something_else_is_named():
    assert LoraSettings().targets == "all-linear"
    assert LoraSettings(r=4).model_fields_set == {"r"}
    assert LoraSettings(targets=None).targets is None, "PEFT's choice, where that is asked for"
    assert LoraSettings(target_parameters=("experts.down_proj",)).targets is None
    assert LoraSettings(target_parameters=("experts.down_proj",), targets=("q_proj",)).targets == ("q_proj",)
