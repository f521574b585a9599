"""`plait tune` on a small model whose plain merge is bad: what it learns, from what, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import plait
from plait.adapters import Adapter
from plait.calibration.texts import Texts, read_texts
from plait.errors import OutputError, PlaitError, PlanError, RecipeError, TaskError
from plait.mixture import Mixture
from plait.notices import PlaitWarning
from plait.reports.pipeline import make_report
from plait.results.older_keys import keys_of
from plait.tasks.loading import load_task
from plait.tuning.pipeline import TuneResult
from plait.tuning.seen import seen_in_training
from tests.command_line import exit_code
from tests.language_models import (
    LABELS,
    WORDS,
    label,
    language_model,
    tokenizer,
    train_adapter,
    train_pair,
    tune_pair,
    write_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# a word's label says nothing of another's, so nothing can be chosen on words that are held out
QUICK = {"steps": 24, "prompts": 8, "learning_rate": 1e-2, "look_every": 6, "held_out": 0, "generic_lines": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, two adapters of it, and their tasks, whose texts are the calibration split."""
    folder = train_pair(tmp_path_factory.mktemp("tune"))
    for task in ("sort", "rate"):
        write_task(folder, task, splits={"calibration": "test.jsonl"})
    return folder


@pytest.fixture
def tuned(place: Path, tmp_path: Path) -> TuneResult:
    return tune(place, tmp_path / "tuned")


def tune(place: Path, out: Path, tasks: Any = ("sort", "rate"), **changes: Any) -> TuneResult:
    return tune_pair(place, out, QUICK, [place / f"{t}.yaml" for t in tasks], **changes)


def right(folder: Path | None) -> dict[str, float]:
    """Return the share of words with the right label, per task, as PEFT loads the adapter."""
    model: Any = language_model()
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    tokens = tokenizer()
    found = {}
    for task, labels in LABELS.items():
        ids = torch.tensor([tokens(f"{task} {word} :")["input_ids"] for word in WORDS])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[:, -1, tokens.convert_tokens_to_ids(labels)]
        message = [labels[i] for i in scores.argmax(-1).tolist()]
        found[task] = sum(a == label(task, w) for a, w in zip(message, WORDS, strict=True)) / len(WORDS)
    return found


def test_starts_bad_and_ends_good(place: Path, tmp_path: Path, tuned: TuneResult) -> None:
    plait.merge([place / "sort", place / "rate"], out=tmp_path / "sum")
    assert min(right(tmp_path / "sum").values()) < 0.9  # the plain sum loses something
    assert min(right(tuned.folder).values()) > 0.95
    record = tuned.record
    assert record.kept.share < record.start.share < 1
    assert record.rank == 4  # of the largest source, not of both together
    assert record.losses[-1] < record.losses[0]
    assert 0 < record.distance < 10
    assert 0 < record.outside < 1


def test_the_scale_is_the_one_nearest_to_the_adapters(tuned: TuneResult) -> None:
    record = tuned.record
    assert len(record.scales) >= 4
    assert record.scale == min(record.scales, key=lambda pair: pair[1])[0]
    assert record.start.share == min(share for _, share in record.scales)


def test_no_step_gives_the_closed_form(place: Path, tmp_path: Path) -> None:
    record = tune(place, tmp_path / "closed", tune={"steps": 0}, scale=1.5, rank=8, method="linear").record
    assert (record.scale, record.scales, record.losses, record.kept_step) == (1.5, (), (), 0)
    assert record.distance == pytest.approx(0, abs=1e-6)
    assert record.outside == pytest.approx(0, abs=1e-4)  # a sum recombines what there is


def test_the_divergence_is_that_of_the_written_adapter(place: Path, tuned: TuneResult) -> None:
    """Held-out KL of the record, from what PEFT loads: teacher, positions and texts are the right ones."""
    tokens, lines = tokenizer(), {t.task: t for t in tuned.record.texts}
    merged = PeftModel.from_pretrained(language_model(), tuned.folder)
    for task in ("sort", "rate"):
        own = PeftModel.from_pretrained(language_model(), place / task)
        assert lines[task].adapter == task
        ids = torch.tensor([tokens(f"{task} {word} :")["input_ids"] for word in WORDS])
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[:, -1].double().log_softmax(-1) for m in (own, merged))
        every = (p.exp() * (p - q)).sum(-1)  # held-out words are among these
        assert float(every.min()) <= tuned.record.kept.divergence[task] <= float(every.max())


def test_no_label_is_read(place: Path, tmp_path: Path, tuned: TuneResult) -> None:
    other = tmp_path / "other"
    for task in ("sort", "rate"):
        write_task(other, task, splits={"calibration": "test.jsonl"})
        rows = [{"word": w, "label": LABELS[task][0]} for w in WORDS]  # all the same, so mostly wrong
        (other / task / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    again = plait.tune(
        [place / "sort", place / "rate"],
        tasks=[other / "sort.yaml", other / "rate.yaml"],
        out=tmp_path / "again",
        base_model=str(place / "base"),
        tune=QUICK,
    )
    assert same_tensors(again.folder, tuned.folder)


def same_tensors(one: Path, two: Path) -> bool:
    first, second = (load_file(f / "adapter_model.safetensors") for f in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(place: Path, tmp_path: Path, tuned: TuneResult) -> None:
    assert same_tensors(tune(place, tmp_path / "same").folder, tuned.folder)
    assert not same_tensors(tune(place, tmp_path / "else", tune={"seed": 1}).folder, tuned.folder)


def test_command_line_recipe_and_python_say_the_same(place: Path, tmp_path: Path, tuned: TuneResult) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nbase_model: {place}/base\nadapters: [{place}/sort, {place}/rate]\n"
        f"tasks: [{place}/sort.yaml, {place}/rate.yaml]\ntune: {json.dumps(QUICK)}\n"
    )
    flags = [str(place / "sort"), str(place / "rate"), "--tasks", str(place / "sort.yaml"), str(place / "rate.yaml")]
    flags += ["--base-id", str(place / "base"), "--steps", "24", "--learning-rate", "0.01"]
    flags += ["--set", "tune.prompts=8", "--set", "tune.look_every=6", "--set", "tune.held_out=0", "--generic-lines", "0"]
    for name, arguments in {"file": [str(recipe)], "flags": flags}.items():
        assert exit_code("tune", *arguments, "-o", str(tmp_path / name)) == 0
        assert same_tensors(tmp_path / name, tuned.folder)


def test_says_what_it_did(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(place / "sort"), str(place / "rate"), "--tasks", str(place / "sort.yaml"), str(place / "rate.yaml")]
    arguments += ["--base-id", str(place / "base"), "--steps", "2", "--texts", "template", "--control"]
    assert exit_code("tune", *arguments, "-o", str(tmp_path / "flags")) == 0
    shown = capsys.readouterr()
    for words in ("sort + rate", "1, the bare prompt", "fresh LoRA", "share of the base's"):
        assert words in shown.out
    assert "no texts were held out" in shown.err
    assert exit_code("tune", *arguments, "-o", str(tmp_path / "json"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["control"]["held"]["share"] > 0


def test_texts_that_are_held_out_are_not_learned(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import plait.tuning.learning as learning

    drawn: list[tuple[int, ...]] = []
    monkeypatch.setattr(learning, "draw_texts", lambda items, *rest: drawn.append(tuple(items)) or list(items)[:2])
    record = tune(place, tmp_path / "held", tune={"held_out": 0.2}).record
    sizes = {t.task: (t.count, t.learned) for t in record.texts}
    assert sizes == {"sort": (24, 19), "rate": (24, 19)}
    assert {len(set(items)) for items in drawn} == {19}


def test_a_fresh_lora_is_a_control(place: Path, tmp_path: Path, tuned: TuneResult) -> None:
    found = tune(place, tmp_path / "control", control=True)
    assert same_tensors(found.folder, tuned.folder)  # the control changes nothing
    assert found.record.control is not None
    assert found.record.control.held.share > found.record.kept.share


def test_lines_that_plait_ships_need_no_data(place: Path, tmp_path: Path) -> None:
    record = tune(place, tmp_path / "lines", tune={"texts": "lines", "count": 16}).record
    assert {t.kind for t in record.texts} == {"lines"}
    assert all(len(t.shown) == 3 for t in record.texts)
    assert record.kept.share < record.start.share


def test_another_method_as_the_start(place: Path, tmp_path: Path) -> None:
    record = tune(place, tmp_path / "ties", method="iso_c").record
    assert record.recipe["method"]["name"] == "iso_c"
    assert record.kept.share < record.start.share


def test_the_result_is_one_of_plaits(tuned: TuneResult, tmp_path: Path) -> None:
    own = {"plait.lock", "tuning.json", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {p.name for p in tuned.folder.iterdir()} == {*own, "merge_metadata.json"}
    metadata = json.loads((tuned.folder / "merge_metadata.json").read_text())  # for scripts of the earlier framework
    assert keys_of("merge_metadata.json") - {"num_parameters", "lambda", "lambda_policy"} <= metadata.keys()
    assert metadata["optimizer"]["type"] == "distill"
    assert metadata["params"]["optimizer"]["params"]["steps"] == tuned.record.recipe["tune"]["steps"]
    make_report([tuned.folder], out=tmp_path / "report.html")
    checked = plait.verify(tuned.folder)  # learned again, to the same bytes
    assert checked.ok
    assert {r.name: r.state for r in checked.rebuilt or ()} == {
        "adapter_config.json": "equal",
        "adapter_model.safetensors": "equal",
    }
    assert {f.state for f in checked.files} == {"equal"}
    assert {i.state for i in checked.inputs} == {"equal"}
    card = (tuned.folder / "README.md").read_text()
    assert "learned to answer as each task's own adapter does" in card


def test_a_base_is_written_by_its_name_when_it_is_tuned_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.parent)
    tasks = [place / "sort.yaml", place / "rate.yaml"]
    plait.tune(
        [place / "sort", place / "rate"], tasks=tasks, base_model=f"{place.name}/base", out=tmp_path / "out", tune={"steps": 0}
    )
    verified = plait.verify(tmp_path / "out")
    assert verified.ok, verified.rebuilt
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == f"{place.name}/base"


def test_a_tuned_merge_is_evaluated_beside_its_sources(place: Path, tmp_path: Path, tuned: TuneResult) -> None:
    tasks = [write_task(tmp_path, t) for t in ("sort", "rate")]
    found = plait.evaluate(tuned.folder, tasks=tasks, workspace=tmp_path / "ws")
    assert found.worst_recovery is not None
    assert found.worst_recovery > 0.85
    assert [s.name for s in found.sources] == ["sort", "rate"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ()}, "there are no tasks"),
        ({"tasks": ("sort",)}, "adapter 'rate' has no task"),
        ({"rank": "energy:0.9"}, "is 'energy:0.9': .* must be a number"),
        ({"kind": "delta"}, r"output.kind .* is 'delta'"),
        ({"load_dtype": "int8"}, "dtype 'int8' is not allowed"),
        ({"tune": {"files": {"other": "x.txt"}}}, "'other' is not a task"),
        ({"tune": {"texts": "split", "split": "validation"}}, "has no split 'validation'"),
        ({"tune": {"steps": -1}}, "steps"),
        ({"tune": {"stepz": 3}}, "stepz"),
        ({"method": "no"}, "no"),
    ],
)
def test_bad_requests_are_refused_before_the_base_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("plait.mixture.Mixture.load", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(PlaitError, match=words):
        tune(place, tmp_path / "no", **changes)
    assert not (tmp_path / "no").exists()


def test_texts_beyond_the_context_are_refused_of_all_tasks_before_one_is_read(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {}
    for task in LABELS:
        files[task] = tmp_path / f"{task}.txt"
        files[task].write_text(f"{WORDS[0]}\n{' '.join(WORDS[:8] * 10)}\n")
    monkeypatch.setattr("plait.calibration.inputs.log_likelihoods", lambda *_, **__: pytest.fail("an adapter has read"))
    monkeypatch.setattr("plait.calibration.pipeline.take_moments", lambda *_, **__: pytest.fail("an adapter has read"))
    wrong = r"(?s)'sort', .*sort.txt.*: 1 of 2 texts are longer than the model's context.*'rate', .*rate.txt"
    texts = {"files": {task: str(file) for task, file in files.items()}}
    with pytest.raises(TaskError, match=wrong):
        tune(place, tmp_path / "out", tune={**texts, "generic_lines": 0})
    sources, tasks = [place / t for t in LABELS], [place / f"{t}.yaml" for t in LABELS]
    with pytest.raises(TaskError, match=wrong):
        plait.calibrate(sources, tasks=tasks, base_model=str(place / "base"), out=tmp_path / "out", **texts)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".txt", ".txt"]


def test_everything_wrong_with_the_tasks_is_said_at_once(place: Path, tmp_path: Path) -> None:
    stray = write_task(tmp_path, "sort", name="stray", splits={"calibration": "test.jsonl"})
    with pytest.raises(TaskError) as error:
        plait.tune([place / "sort", place / "rate"], tasks=[stray], out=tmp_path / "no", base_model=str(place / "base"))
    for words in ("'stray' belongs to adapter 'stray'", "adapter 'sort' has no task", "adapter 'rate' has no task"):
        assert words in str(error.value)


def test_a_whole_recipe_takes_no_settings(place: Path, tmp_path: Path) -> None:
    recipe = plait.Recipe.model_validate({"adapters": [str(place / "sort"), str(place / "rate")]})
    with pytest.raises(RecipeError, match="scale"):
        plait.tune(recipe, out=tmp_path / "no", scale=2.0)


def test_an_output_that_stands_is_kept(place: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(PlaitError, match="exists"):
        tune(place, tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "x"


def test_unlike_adapters_and_tasks(place: Path, tmp_path: Path) -> None:
    """Ranks 4, 16 with rsLoRA and 8 on attention alone; labels, free answers with one text, and no data; a task asked twice."""
    train_adapter(tmp_path / "wide", "rate", r=16, lora_alpha=16, use_rslora=True)
    train_adapter(tmp_path / "attention", "sort", r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    free = {"kind": "generation", "labels": None, "max_new_tokens": 2, "splits": {"calibration": "test.jsonl"}}
    tasks = [
        place / "sort.yaml",
        write_task(tmp_path / "one", "rate", name="wide", rows=WORDS[:1], **free),
        write_task(tmp_path / "none", "sort", name="attention", data=None, splits=None, target=None),
        write_task(tmp_path / "more", "rate", name="wider", adapter="wide", splits={"calibration": "test.jsonl"}),
    ]
    sources = {"sort": place / "sort", "wide": tmp_path / "wide", "attention": tmp_path / "attention"}
    with pytest.warns(PlaitWarning, match="task 'attention' has no texts of its own"):
        record = plait.tune(
            sources,
            tasks=tasks,
            base_model=str(place / "base"),
            out=tmp_path / "out",
            tune={"steps": 24, "learning_rate": 2e-3},
        ).record
    assert record.rank == 16
    assert record.kept.share < record.start.share < 1
    assert {t.task: (t.kind, t.count) for t in record.texts} == {
        "sort": ("split", 24 + 64),
        "wide": ("split", 1 + 64),
        "attention": ("lines", 251),
        "wider": ("split", 24 + 64),
    }
    assert {t.task: t.source for t in record.texts}["wide"] == "split 'calibration' (1) and 64 generic lines"


def test_an_adapter_that_does_nothing_and_one_that_is_there_twice(place: Path, tmp_path: Path) -> None:
    train_adapter(tmp_path / "idle", "rate", steps=0)
    sources = {"sort": place / "sort", "twin": place / "sort", "idle": tmp_path / "idle"}
    tasks = [
        place / "sort.yaml",
        write_task(tmp_path / "twin", "sort", name="twin", splits={"calibration": "test.jsonl"}),
        write_task(tmp_path / "idle-task", "rate", name="idle", splits={"calibration": "test.jsonl"}),
    ]
    settings: dict[str, Any] = {"base_model": str(place / "base"), "tune": {"steps": 0}}
    twins = plait.tune({k: sources[k] for k in ("sort", "twin")}, tasks=tasks[:2], out=tmp_path / "twins", **settings).record
    assert twins.scale == pytest.approx(1, abs=0.05)
    assert twins.kept.share < 1e-4
    record = plait.tune(sources, tasks=tasks, out=tmp_path / "out", **settings).record
    assert any(note.startswith("idle: the own adapter answers these texts as the base does") for note in record.notes)


@pytest.mark.parametrize("changes", [{"scale": 0.0}, {"weights": [0, 0], "tune": {"granularity": "module"}}])
def test_nothing_is_learned_from_a_merge_of_zeros(place: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"zero in every module \(method 'regmean'\)"):
        tune(place, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_coefficients_may_start_at_zero(place: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "linear", "weights": [0, 0], "tune": {"steps": 2, "granularity": "module"}}
    tuned = tune(place, tmp_path / "out", **settings)
    assert tuned.record.distance is None
    assert tuned.record.kept.share < 1
    make_report([tuned.folder], out=tmp_path / "report.html")
    assert "the start is zero" in (tuned.folder / "README.md").read_text()


def test_notes_name_heads_and_keys_that_change_nothing(place: Path, tmp_path: Path) -> None:
    train_adapter(tmp_path / "sort", "sort", steps=1, modules_to_save=["lm_head"])
    tasks = [place / "sort.yaml", place / "rate.yaml"]
    settings: dict[str, Any] = {"base_model": str(place / "base"), "tune": {"steps": 0, "tau": 3, "lowest": 0.5}}
    notes = plait.tune([tmp_path / "sort", place / "rate"], tasks=tasks, out=tmp_path / "out", **settings).record.notes
    assert "heads and other full tensors of sort are kept under heads/<name>/, not merged." in notes
    assert "tune.tau changes nothing here: it is of objective regret_smoothmax." in notes
    assert "tune.lowest changes nothing here: it is of link projected." in notes


def test_a_result_that_is_worse_than_the_base_says_so(place: Path, tmp_path: Path) -> None:
    record = tune(place, tmp_path / "out", tune={"steps": 0}, scale=-2.0).record
    (note,) = [note for note in record.notes if "farther" in note]
    assert note.startswith("sort, rate: the result is farther from the task's own adapter than the base model is")


def test_the_record_of_a_training_knows_which_texts_were_seen(place: Path, tmp_path: Path) -> None:
    """Half of the words were in the training of `sort`; nothing is known of that of `rate`."""
    sources = {"sort": tmp_path / "phase" / "adapter", "rate": place / "rate"}
    shutil.copytree(place / "sort", sources["sort"])
    data: dict[str, Any] = {"place": None, "task": None, "split": "train", "limit": None, "text_field": "text"}
    turns = [[{"role": "user", "content": f"sort {w} :"}, {"role": "assistant", "content": "red"}] for w in WORDS[:12]]
    turns.append([{"role": "user", "content": "w"}, {"role": "assistant", "content": "red"}])  # within every prompt by chance
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    trained = write_task(tmp_path, "sort", rows=WORDS[:12], splits={"train": "test.jsonl"})

    def seen(**where: str) -> int | None:
        (tmp_path / "phase" / "training.json").write_text(json.dumps({"job": {"data": {**data, **where}}}))
        return seen_in_training(texts_of_split(place / "sort.yaml"), Adapter.open(sources["sort"], "sort"))

    assert seen(place=str(tmp_path / "rows.jsonl")) == seen(task=str(trained)) == 12
    with pytest.warns(
        UserWarning, match=r"cannot be read \(nowhere\.jsonl: .*whether sort was trained on these texts is not known"
    ):
        assert seen(place="nowhere.jsonl") is None
    (tmp_path / "phase" / "training.json").write_text(json.dumps({"job": {"data": {**data, "task": str(trained)}}}))
    tasks = [place / "sort.yaml", place / "rate.yaml"]
    still = {"steps": 0, "generic_lines": 0}
    record = plait.tune(sources, tasks=tasks, base_model=str(place / "base"), out=tmp_path / "out", tune=still).record
    notes = [note for note in record.notes if "training of adapter" in note]
    assert notes == ["sort: 12 of 24 texts were in the training of adapter sort (its training.json)."]


def texts_of_split(file: Path) -> Texts:
    return read_texts(load_task(file), kind="split", count=99, seed=0)


def test_what_is_learned_on_the_live_base_is_saved_as_an_adapter(place: Path, tmp_path: Path) -> None:
    """Λ, and factors that a user's own loss moves, as PEFT loads them."""
    mixture = Mixture(language_model(), [Adapter.open(str(place / task), task) for task in LABELS], tokenizer())
    ids = torch.tensor([tokenizer()(f"sort {word} :")["input_ids"] for word in WORDS])
    values = torch.tensor([0.7, 0.4])

    def in_peft(folder: Path) -> torch.Tensor:
        model: Any = PeftModel.from_pretrained(language_model(), folder)
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids).logits
        return logits

    with mixture.mixed(values) as model, torch.no_grad():
        wanted = model(input_ids=ids).logits
    deltas = mixture.merged(values)
    torch.testing.assert_close(in_peft(mixture.save(deltas, tmp_path / "sum")), wanted, rtol=1e-4, atol=1e-4)

    factors = mixture.learned(deltas, rank=4)
    optimizer = torch.optim.SGD(factors.parameters(), lr=0.1)
    with mixture.learning(factors) as model:
        model(input_ids=ids).logits.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in factors.parameters())
    optimizer.step()
    factors.refresh()
    with mixture.learning(factors) as model, torch.no_grad():
        moved = model(input_ids=ids).logits
    assert float((moved - wanted).abs().max()) > 1e-2
    torch.testing.assert_close(in_peft(mixture.save(factors.deltas(), tmp_path / "moved")), moved, rtol=1e-4, atol=1e-4)
    with pytest.raises(OutputError, match="exists already"):
        mixture.save(deltas, tmp_path / "sum")
    with pytest.raises(PlanError, match="no such module"):
        mixture.save({"elsewhere": next(iter(deltas.values()))}, tmp_path / "no")


def test_texts_that_the_test_split_asks_are_left_out(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    for task in ("sort", "rate"):
        write_task(folder, task, splits={"calibration": "calibration.jsonl", "test": "test.jsonl"})
        lines = (folder / task / "test.jsonl").read_text().splitlines(keepends=True)
        (folder / task / "calibration.jsonl").write_text("".join(lines))
        (folder / task / "test.jsonl").write_text("".join(lines[:3]))

    def run(out: str) -> TuneResult:
        return plait.tune(
            [place / "sort", place / "rate"], tasks=[folder / "sort.yaml", folder / "rate.yaml"], out=tmp_path / out,
            base_model=str(place / "base"), tune={**QUICK, "steps": 0},
        )  # fmt: skip

    record = run("tuned").record
    assert all(t.count == len(lines) - 3 for t in record.texts)
    assert any("3 of" in note and "'test' contains them too" in note for note in record.notes)

    (folder / "rate" / "test.jsonl").write_text((folder / "rate" / "calibration.jsonl").read_text())
    with pytest.raises(TaskError, match="contains every one of these texts"):
        run("none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("settings", [{}, {"method": "linear"}, {"method": "linear", "tune": {"granularity": "module"}}])
def test_dora_is_refused_before_the_base_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True, init_lora_weights=False)
    get_peft_model(language_model(), config).save_pretrained(tmp_path / "rate")
    monkeypatch.setattr("plait.mixture.Mixture.load", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(PlaitError, match=r"rate: DoRA rescales the rows.* plait extract"):
        plait.tune(
            [place / "sort", tmp_path / "rate"],
            tasks=[place / "sort.yaml", place / "rate.yaml"],
            base_model=str(place / "base"),
            out=tmp_path / "no",
            **settings,
        )


def test_an_adapter_that_cannot_answer_is_refused_with_its_task(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> list[list[float]]:
        raise TaskError("the model's outputs are NaN")

    monkeypatch.setattr("plait.calibration.teachers.likeliest_answers", broken)
    with pytest.raises(TaskError, match="task 'sort', split 'calibration': the model's outputs are NaN"):
        tune(place, tmp_path / "out")
