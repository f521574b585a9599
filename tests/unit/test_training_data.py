"""Scheduling of training data, what is held out, and what a job's digest depends on."""

from __future__ import annotations

import json

import pytest

from plait.errors import AdapterError, PlaitError, TaskError
from plait.evaluation.scores import model_digest
from plait.hub.download import Located
from plait.training import job as jobs
from plait.training.data import EVAL_SPLITS, TrainingData, hold_out, load_data
from plait.training.formats import Completion
from plait.training.job import LoraSettings, TrainingJob, resolve_job
from tests.chat_models import questions, save_chat_model, write_rows
from tests.every import every
from tests.language_models import WORDS, write_task

ROWS = questions(10)


def load(place, **data):
    return load_data(TrainingData(place=str(place), **data))


def test_every_kind_of_file_gives_the_same_examples(tmp_path):
    datasets = pytest.importorskip("datasets")
    jsonl = write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in ROWS))
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    digests = {load(tmp_path / f"a.{ending}").digest() for ending in ("jsonl", "json", "csv", "parquet")}
    assert digests == {load(jsonl).digest()}


def test_a_folder_has_a_file_per_split(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS)
    assert len(load(tmp_path).examples) == 10
    write_rows(tmp_path / "test.jsonl", ROWS[:3])
    assert len(load(tmp_path, split="test").examples) == 3
    assert len(load(tmp_path, limit=4).examples) == 4
    with pytest.raises(TaskError, match=r"no single file is the split 'validation'; there is test.jsonl, train.jsonl"):
        load(tmp_path, split="validation")


class TestRowsToMeasureTheLossOn:
    """Nobody says where they are: TRL's own choice of a split first, rows to train on last."""

    @pytest.fixture(autouse=True)
    def rows(self, tmp_path):
        write_rows(tmp_path / "train.jsonl", ROWS)

    def found(self, place) -> int:
        return len(load(place, split=EVAL_SPLITS).examples)

    def test_a_folder(self, tmp_path):
        assert self.found(tmp_path) == 10
        write_rows(tmp_path / "validation.jsonl", ROWS[:2])
        assert self.found(tmp_path) == 2
        write_rows(tmp_path / "test.jsonl", ROWS[:3])
        assert self.found(tmp_path) == 3
        assert load(tmp_path, split=EVAL_SPLITS).summary.startswith(str(tmp_path / "test.jsonl"))

    def test_a_file(self, tmp_path):
        assert self.found(tmp_path / "train.jsonl") == 10

    @pytest.mark.parametrize(
        ("there", "taken"),
        [
            (["train", "validation"], "validation"),
            (["validation", "test"], "test"),
            (["train"], "train"),
            (["train_sft"], "train"),
        ],
    )
    def test_the_hub(self, monkeypatch, there, taken):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: there)
        monkeypatch.setattr("plait.training.data.read_hub", lambda place, split, **_: ROWS)
        found = load_data(TrainingData(place="org/rows", split=EVAL_SPLITS))
        assert found.summary.startswith(f"org/rows ({taken}), question_answer")

    def test_a_task(self, tmp_path):
        file = write_task(tmp_path, "sort", splits={"train": "test.jsonl", "validation": "test.jsonl"})
        assert load_data(TrainingData(task=str(file), split=EVAL_SPLITS)).summary == "task 'sort' (validation)"


def test_places_that_are_not_there(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(TaskError, match=r"there is no such file or folder. Did you mean 'rows.jsonl'\?"):
        load(tmp_path / "row.jsonl")
    with pytest.raises(TaskError, match="is one file and has no split 'test'"):
        load(tmp_path / "rows.jsonl", split="test")
    with pytest.raises(TaskError, match="give one of them"):
        load_data(TrainingData())


def test_a_task_is_trained_on_as_it_is_asked(tmp_path):
    file = write_task(tmp_path, "sort", splits={"train": "test.jsonl"})
    found = load_data(TrainingData(task=str(file), limit=2))
    assert found.examples == (Completion("sort w0 :", " red"), Completion("sort w1 :", " red"))
    assert len(load_data(TrainingData(task=str(file))).examples) == len(WORDS)


def test_what_is_held_out_is_a_function_of_seed_and_content(tmp_path):
    data = load(write_rows(tmp_path / "a.jsonl", ROWS))
    shuffled = load(write_rows(tmp_path / "b.jsonl", ROWS[::-1]))
    kept, held = hold_out(data, 0.3, seed=1)
    assert (len(kept.examples), len(held.examples)) == (7, 3)
    assert not {str(e) for e in kept.examples} & {str(e) for e in held.examples}
    assert {str(e) for e in hold_out(shuffled, 0.3, seed=1)[1].examples} == {str(e) for e in held.examples}
    assert {str(e) for e in hold_out(data, 0.3, seed=2)[1].examples} != {str(e) for e in held.examples}


def test_equal_examples_fall_on_the_same_side(tmp_path):
    data = load(write_rows(tmp_path / "a.jsonl", [*ROWS[:3]] * 4))
    kept, held = hold_out(data, 0.5, seed=0)
    assert not {str(e) for e in kept.examples} & {str(e) for e in held.examples}
    with pytest.raises(TaskError, match="leaves none to train on"):
        hold_out(load(write_rows(tmp_path / "b.jsonl", ROWS[:1])), 0.5, seed=0)


class TestDigest:
    @pytest.fixture
    def job(self, tmp_path):
        save_chat_model(tmp_path / "base")
        write_rows(tmp_path / "a.jsonl", ROWS)
        return TrainingJob(base=str(tmp_path / "base"), data=TrainingData(place=str(tmp_path / "a.jsonl")))

    def test_it_is_of_contents_not_of_paths(self, job, tmp_path):
        import shutil

        shutil.copytree(tmp_path / "base", tmp_path / "elsewhere")
        write_rows(tmp_path / "b.jsonl", ROWS)
        moved = job.model_copy(
            update={"base": str(tmp_path / "elsewhere"), "data": TrainingData(place=str(tmp_path / "b.jsonl"))}
        )
        assert moved.digest() == job.digest()

    def test_it_is_not_of_how_the_run_is_told_or_kept(self, job):
        printed = {"report_to": "none", "logging_steps": 3, "save_steps": 7, "dataloader_num_workers": 1, "run_name": "x"}
        assert job.model_copy(update={"arguments": printed}).digest() == job.digest()

    def test_it_is_of_how_checkpoints_are_made_where_the_best_is_kept(self, job):
        best = {"load_best_model_at_end": True, "eval_strategy": "steps"}
        digests = {job.model_copy(update={"arguments": {**best, "save_steps": n}}).digest() for n in (10, 20)}
        assert len(digests) == 2

    def test_it_is_of_what_a_named_file_holds(self, job, tmp_path):
        template = tmp_path / "template.jinja"
        named = job.model_copy(update={"arguments": {"chat_template_path": str(template)}})
        template.write_text("{{ 1 }}")
        before = named.digest()
        template.write_text("{{ 2 }}")
        assert named.digest() != before
        moved = template.rename(tmp_path / "moved.jinja")
        moved.write_text("{{ 1 }}")
        assert job.model_copy(update={"arguments": {"chat_template_path": str(moved)}}).digest() == before

    def test_a_file_larger_than_any_template_is_refused(self, job, tmp_path):
        with (tmp_path / "template.jinja").open("wb") as file:
            file.truncate(1 << 40)
        named = job.model_copy(update={"arguments": {"chat_template_path": str(tmp_path / "template.jinja")}})
        with pytest.raises(TaskError, match=r"chat_template_path: .*template\.jinja: larger than 64 MB"):
            named.digest()

    def test_it_is_of_what_a_tokenizers_folder_holds(self, job, tmp_path):
        import shutil

        def digest(place) -> str:
            return job.model_copy(update={"arguments": {"chat_template_path": str(place)}}).digest()

        elsewhere = shutil.copytree(tmp_path / "base", tmp_path / "tokenizer")
        before = digest(tmp_path / "base")
        assert digest(elsewhere) == before
        (elsewhere / "chat_template.jinja").write_text("{{ 1 }}")
        assert digest(elsewhere) != before

    def test_the_base_is_hashed_once_while_it_stays_as_it_is(self, job, tmp_path, monkeypatch):
        hashed = []
        monkeypatch.setattr(jobs, "model_digest", lambda folder: hashed.append(folder) or model_digest(folder))
        first, second = job.digest(), job.model_copy(update={"seed": 7}).digest()
        assert first != second
        assert len(hashed) == 1
        save_chat_model(tmp_path / "base", seed=1)
        assert job.digest() != first
        assert len(hashed) == 2

    def test_it_is_of_the_folder_in_a_repository(self, job, tmp_path, monkeypatch):
        def digest(subfolder: str) -> str:
            found = Located(folder=tmp_path, repo="org/name", commit="0" * 40, subfolder=subfolder)
            monkeypatch.setattr("plait.training.job.resolve_model", lambda *_, **__: found)
            return job.digest()

        assert digest("small") != digest("large")

    @pytest.mark.parametrize(
        "change",
        [
            {"seed": 7},
            {"lora": LoraSettings(r=8)},
            {"lora": None},
            {"held_out": 0.5},
            {"long_examples": "truncate"},
            {"arguments": {"learning_rate": 1e-3}},
            {"model": {"dtype": "bfloat16"}},
        ],
        ids=str,
    )
    def test_it_is_of_everything_that_is_learned_from(self, job, change):
        assert job.model_copy(update=change).digest() != job.digest()

    def test_it_is_of_the_data_and_the_weights(self, job, tmp_path):
        before = resolve_job(job).parts
        write_rows(tmp_path / "a.jsonl", ROWS[:-1])
        save_chat_model(tmp_path / "base", seed=1)
        after = resolve_job(job).parts
        assert {name for name in before if before[name] != after[name]} == {"data", "base"}

    def test_base_and_data_that_are_not_there_are_said_at_once(self, job, tmp_path):
        lost = job.model_copy(update={"base": str(tmp_path / "no"), "data": TrainingData(place=str(tmp_path / "no.jsonl"))})
        with pytest.raises(PlaitError, match=r"(?s)2 problems.*no folder.*no\.jsonl: there is no such file"):
            lost.digest()


@every("text", ["[" * 100_000, "[" + "9" * 5000 + "]", '[{"role": "user", "content": "\\ud800"}]', '[{"role": 1e999}]'])
def test_a_text_that_is_no_list_of_turns_is_refused_by_row_and_column(tmp_path, text):
    with pytest.raises(TaskError, match=r"row 0: column 'messages'( is not a list of turns|, turn 0: the role inf)"):
        load(write_rows(tmp_path / "a.jsonl", [{"messages": text}] * 2))


def test_an_index_that_names_files_elsewhere_is_not_followed(tmp_path):
    save_chat_model(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    job = TrainingJob(base=str(tmp_path / "base"), data=TrainingData(place=str(write_rows(tmp_path / "a.jsonl", ROWS))))
    with pytest.raises(
        AdapterError, match=r"index\.json: names '../model\.safetensors', which is not a file in the same folder"
    ):
        resolve_job(job)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{", "cut off|truncated"),
        ("model.safetensors", b"", "cut off|truncated"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
        ("config.json", b"{", "this is not JSON"),
        ("generation_config.json", b"[]", "expected a JSON object"),
        ("tokenizer_config.json", b"\xef\xbb\xbf{}", "byte order mark"),
    ],
)
def test_a_base_that_is_damaged_is_refused_before_it_is_loaded(tmp_path, name, content, message):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / name).write_bytes(content)
    rows = TrainingData(place=str(write_rows(tmp_path / "a.jsonl", ROWS)))
    with pytest.raises(PlaitError, match=message) as caught:
        resolve_job(TrainingJob(base=str(base), data=rows))
    assert str(base) in str(caught.value)
