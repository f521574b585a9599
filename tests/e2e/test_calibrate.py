"""`plait calibrate` on small models: what it stores, from what, what it takes up again, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

import plait
from plait.calibration.texts import read_texts
from plait.errors import AdapterError, OutputError, PlaitError, TaskError
from plait.linalg.inputs import InputRows
from plait.merging.moments import MomentsFile
from plait.notices import PlaitWarning
from plait.tasks.loading import load_task
from tests.calibrated import SEEN, calibrate, dense, make_place, merge, write_split_task
from tests.command_line import exit_code
from tests.language_models import language_model, tokenizer, train_adapter, write_task
from tests.warm import check_killed, run_forked

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("calibrate"))


def plain(model: Any, texts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return E[x xᵀ] of every LoRA module's input in float64, one text at a time."""
    inputs: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(
            lambda m, x, y, n=name: inputs.setdefault(n, []).append(x[0].reshape(-1, x[0].shape[-1]).double())
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    ]
    with torch.no_grad():
        for text in texts:
            model(**text)
    for hook in hooks:
        hook.remove()
    joined = {name.removeprefix("base_model.model."): torch.cat(rows) for name, rows in inputs.items()}
    return {name: x.mT @ x / len(x) for name, x in joined.items()}


@pytest.mark.parametrize("tokens", [2048, 16])
def test_moments_are_those_of_each_adapter_on_its_own_texts(place: Path, tmp_path: Path, tokens: int) -> None:
    result = calibrate(place, tmp_path / "moments", tokens=tokens, count=4)
    encode = tokenizer()
    for task in ("sort", "rate"):
        file = MomentsFile(tmp_path / "moments" / f"{task}.safetensors")
        (texts,) = (t for t in result.record.texts if t.task == task)
        assert texts.source == "split 'calibration'"
        words = {t.split()[1] for t in texts.shown}
        assert words <= set(SEEN)
        own = PeftModel.from_pretrained(language_model(), place / task)
        chosen = read_texts(  # the same choice
            load_task(place / f"{task}.yaml"), kind=None, count=4, seed=0
        )
        assert texts.digest == chosen.digest
        wanted = plain(own, [{"input_ids": torch.tensor([encode(str(p))["input_ids"]])} for p in chosen.prompts])
        assert len(file.entries) == 6  # q shares with v; up and down each their own; two layers
        for name, gram in wanted.items():
            found = file.read(name, None)
            assert isinstance(found, InputRows)  # 12 tokens, fewer than any width
            torch.testing.assert_close(dense(found), gram, rtol=1e-4, atol=1e-5, msg=name)


def test_more_tokens_than_a_width_are_summed(place: Path, tmp_path: Path) -> None:
    result = calibrate(place, tmp_path / "all", count=16)
    assert [(a.rows, a.stored, a.sampled, a.tokens) for a in result.record.adapters] == [(0, 6, 0, 48)] * 2
    few = calibrate(place, tmp_path / "few", count=16, tokens=40)  # 48 tokens; widths 32 and 48
    assert [(a.rows, a.stored, a.sampled) for a in few.record.adapters] == [(2, 6, 2)] * 2
    assert MomentsFile(tmp_path / "few" / "sort.safetensors").entries["model.layers.0.mlp.down_proj"] == ((40, 48), True)
    assert any("evenly spread ones are used" in note for note in few.record.notes)


def test_a_folder_of_moments_is_one_of_plaits_results(place: Path, tmp_path: Path) -> None:
    folder = calibrate(place, tmp_path / "moments").folder
    assert {p.name for p in folder.iterdir()} == {"sort.safetensors", "rate.safetensors", "calibration.json", "plait.lock"}
    assert not list(tmp_path.glob(".*"))  # nothing of the work is left
    lock = json.loads((folder / "plait.lock").read_text())
    assert lock["kind"] == "calibrate"
    assert set(lock["recipe"]["texts"]) == {"sort", "rate"}
    checked = plait.verify(folder, rebuild=False)
    assert {f.state for f in checked.files} == {i.state for i in checked.inputs} == {"equal"}
    record = json.loads((folder / "calibration.json").read_text())
    assert all(len(t["shown"]) == 3 and t["count"] == 16 for t in record["texts"])
    with pytest.raises(OutputError, match="exists"):
        calibrate(place, tmp_path / "moments")
    assert calibrate(place, tmp_path / "moments", force=True, count=3).record.texts[0].count == 3


def test_a_calibration_is_made_again_from_its_lock(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("base", "sort", "rate"):
        shutil.copytree(place / name, tmp_path / "mine" / name)
    for task in ("sort", "rate"):
        write_split_task(tmp_path / "mine", task)
    (tmp_path / "mine" / "words.txt").write_text("w3\nw4\n")
    monkeypatch.chdir(tmp_path / "mine")
    settings: dict[str, Any] = {"tasks": ["sort.yaml", "rate.yaml"], "files": {"rate": "words.txt"}, "count": 5, "seed": 3}
    plait.calibrate(["sort", "rate"], base_model="base", out="moments", **settings)
    monkeypatch.chdir(tmp_path)
    folder = (tmp_path / "mine").rename(tmp_path / "moved") / "moments"  # all of it, from another working directory
    found = plait.verify(folder)
    assert found.ok
    assert {r.name: r.state for r in found.rebuilt or ()} == {"sort.safetensors": "equal", "rate.safetensors": "equal"}
    assert exit_code("verify", str(folder)) == 0
    with monkeypatch.context() as other:  # on a processor where the dtype of that machine is slow
        other.setattr("plait.evaluation.loaded_base._LARGE", 1)
        other.setattr("plait.evaluation.loaded_base._NARROW", {"F32": torch.float64})
        other.setattr("plait.linalg.speed.slowness", lambda dtype: 9.0)
        assert {r.state for r in plait.verify(folder).rebuilt or ()} == {"equal"}
    lock = json.loads((folder / "plait.lock").read_text())
    assert lock["options"]["request"]["tasks"] == ["./../sort.yaml", "./../rate.yaml"]
    (folder.parent / "words.txt").write_text("w3\nw5\n")
    assert "task 'rate': its texts (words.txt) are not those that were read" in str(plait.verify(folder).not_rebuilt)
    (folder.parent / "words.txt").write_text("w3\nw4\n")
    (folder.parent / "sort.yaml").unlink()
    assert "sort.yaml" in str(plait.verify(folder).not_rebuilt)
    (folder / "plait.lock").write_text(json.dumps({**lock, "options": {}}))
    assert "kept no names of texts" in str(plait.verify(folder).not_rebuilt)
    (folder / "plait.lock").write_text(json.dumps({**lock, "options": {**lock["options"], "texts": 5}}))
    assert "cannot read" in str(plait.verify(folder).not_rebuilt)
    capsys.readouterr()


def test_moments_are_merged_with(place: Path, tmp_path: Path) -> None:
    moments = calibrate(place, tmp_path / "moments").folder
    sources = [place / "sort", place / "rate"]
    merged = plait.merge(sources, method="regmean", moments=moments, out=tmp_path / "merged")
    assert merged.record.method == "regmean"
    assert plait.verify(merged.folder).ok


def test_the_same_request_makes_the_same_bytes(place: Path, tmp_path: Path) -> None:
    one, two = (calibrate(place, tmp_path / name).folder for name in ("one", "two"))
    for name in ("sort.safetensors", "rate.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_lines_where_a_task_has_no_texts(place: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    tasks = [write_split_task(bare, t, splits={"test": "test.jsonl"}) for t in ("sort", "rate")]
    with pytest.warns(PlaitWarning, match="'sort' has no texts of its own"), pytest.warns(PlaitWarning, match="'rate' has no"):
        record = calibrate(place, tmp_path / "moments", tasks=tasks).record
    assert {(t.kind, t.count) for t in record.texts} == {("lines", 32)}
    (tmp_path / "mine.txt").write_text("w3\nw4\n")
    record = calibrate(
        place, tmp_path / "mine", tasks=tasks, files={"sort": str(tmp_path / "mine.txt")}
    ).record  # announced once
    assert {t.task: (t.kind, t.count) for t in record.texts} == {"sort": ("file", 2), "rate": ("lines", 32)}


def bare_tasks(folder: Path) -> list[Path]:
    """Write tasks that are nothing but a name, a prompt and labels."""
    keys = {"kind": None, "data": None, "splits": None, "target": None}
    return [write_task(folder, task, **keys) for task in ("sort", "rate")]


def test_tasks_without_data_are_calibrated_tuned_and_merged_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = bare_tasks(tmp_path / "bare")
    for task in ("sort", "rate"):
        shutil.rmtree(tmp_path / "bare" / task)  # no data anywhere
    record = calibrate(place, tmp_path / "template", tasks=tasks, texts="template").record
    assert {t.task: (t.kind, t.shown) for t in record.texts} == {
        "sort": ("template", ("sort N/A :",)),
        "rate": ("template", ("rate N/A :",)),
    }
    with pytest.warns(PlaitWarning, match="generic lines that plait ships"), pytest.warns(PlaitWarning, match="are kept in"):
        merged = merge(place, tmp_path / "merged", tasks=tasks, scale="auto")
    assert "second moments are of 32 texts of generic lines (sort, rate); no label was read." in merged.record.notes
    assert plait.verify(merged.folder).ok
    sources, base = [place / "sort", place / "rate"], str(place / "base")
    tuned = plait.tune(sources, tasks=tasks, base_model=base, tune={"steps": 1}, out=tmp_path / "tuned")
    assert {(t.kind, t.source, t.count) for t in tuned.record.texts} == {("lines", "generic lines", 251)}
    with pytest.raises(TaskError, match=r"task 'sort' has no data, only a prompt: it can be calibrated.* no split 'test'"):
        plait.evaluate(sources, tasks=tasks, base_model=base)
    with pytest.raises(TaskError, match="task 'sort' has no data"):
        plait.tune(sources, tasks=tasks, base_model=base, tune={"objective": "gradient"}, out="no")


@pytest.mark.parametrize("split", ["test", "validation"])
def test_texts_that_a_task_is_judged_on_are_refused(place: Path, tmp_path: Path, split: str) -> None:
    splits = {"calibration": "calibration.jsonl", split: "judged.jsonl"}
    tasks = [write_split_task(tmp_path, t, splits=splits) for t in ("sort", "rate")]
    for task in ("sort", "rate"):
        rows = [json.dumps({"word": w, "label": "x"}) for w in ("w1", "w20")]
        (tmp_path / task / "judged.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(TaskError) as error:
        calibrate(place, tmp_path / "moments", tasks=tasks, count=16)
    for task in ("sort", "rate"):
        assert f"task '{task}': 1 of 16 texts (split 'calibration') are in split '{split}' too" in str(error.value)
    assert f"{'sort'} w1 :" in str(error.value)
    assert not (tmp_path / "moments").exists()


BAD = [
    ({"tasks": []}, "there are no tasks"),
    ({"split": "train"}, "has no split 'train'"),
    ({"files": {"other": "x.txt"}}, "'other' is not a task"),
    ({"count": 0}, "count"),
    ({"texts": "none"}, "texts"),
    ({"base_model": "nowhere"}, "nowhere"),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_bad_requests_are_refused_before_the_base_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("plait.mixture.Mixture.load", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(PlaitError, match=words):
        calibrate(place, tmp_path / "no", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens: the inputs of an embedding are tokens"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "method 'regmean' in space 'core' on DoRA adapters"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of an embedding that is saved
def test_a_merge_that_no_moments_make_possible_is_refused_before_they_are_taken(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    config = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **changes)
    get_peft_model(language_model(), config).save_pretrained(tmp_path / "rate")
    monkeypatch.setattr("plait.mixture.Mixture.load", lambda *a, **k: pytest.fail("the base was loaded"))
    tasks, base = [place / "sort.yaml", place / "rate.yaml"], str(place / "base")
    with pytest.raises(PlaitError, match=words):
        plait.merge([place / "sort", tmp_path / "rate"], method="regmean", tasks=tasks, base_model=base, out=tmp_path / "no")
    assert [p.name for p in tmp_path.iterdir()] == ["rate"]


def test_moments_of_the_largest_models_are_bounded_and_the_plan_says_their_size(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer of a model of 70B parameters: at most `tokens` inputs per module in place of matrices of d × d."""
    shapes = {"self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (8192, 1024), "self_attn.v_proj": (8192, 1024)}
    shapes |= {"self_attn.o_proj": (8192, 8192), "mlp.gate_proj": (8192, 28672), "mlp.up_proj": (8192, 28672)}
    shapes |= {"mlp.down_proj": (28672, 8192)}
    config = json.loads((place / "sort" / "adapter_config.json").read_text())
    for name in ("sort", "rate"):
        tensors = {}
        for module, (d_in, d_out) in shapes.items():
            key = f"base_model.model.model.layers.0.{module}"
            tensors |= {f"{key}.lora_A.weight": torch.ones(1, d_in), f"{key}.lora_B.weight": torch.ones(d_out, 1)}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        changes = {"r": 1, "target_modules": [path.rpartition(".")[2] for path in shapes]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    flags = [str(tmp_path / "sort"), str(tmp_path / "rate"), "--tasks", str(place / "sort.yaml"), str(place / "rate.yaml")]
    flags += ["--base-id", str(place / "base"), "--dry-run"]
    assert exit_code("calibrate", *flags, "--json") == 0
    planned = json.loads(capsys.readouterr().out)["bytes"]
    assert planned == 2 * 4 * 2048 * sum(d_in for d_in, _ in shapes.values())
    assert planned < 2 * 4 * sum(d_in**2 for d_in, _ in shapes.values()) / 7
    assert exit_code("calibrate", *flags) == 0
    assert "at most 1.3 GB to write" in capsys.readouterr().out
    assert exit_code("calibrate", *flags, "--json", "--set", "calibration.tokens=256") == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == planned / 8


def test_old_moments_are_refused_when_the_adapter_has_changed(place: Path, tmp_path: Path) -> None:
    for name in ("sort", "rate"):
        shutil.copytree(place / name, tmp_path / name)
    sources = [tmp_path / "sort", tmp_path / "rate"]
    tasks = [place / "sort.yaml", place / "rate.yaml"]
    moments = plait.calibrate(sources, out=tmp_path / "moments", tasks=tasks, base_model=place / "base").folder
    train_adapter(tmp_path / "rate", "rate", steps=1)
    with pytest.raises(AdapterError, match=r"moments of 'rate': .* was taken of another adapter.*plait calibrate"):
        plait.merge(sources, method="regmean", moments=moments, out=tmp_path / "merged")


KILLED = """
import os, signal, sys
import plait.calibration.pipeline as pipeline
from plait.cli.main import main
write = pipeline.write_moments
def once(path, *rest):
    write(path, *rest)
    os.kill(os.getpid(), signal.SIGKILL)
pipeline.write_moments = once
main(sys.argv[1:])
"""


def test_a_killed_calibration_is_taken_up_adapter_by_adapter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(place / "sort"), str(place / "rate"), "--tasks", str(place / "sort.yaml"), str(place / "rate.yaml")]
    arguments += ["--base-id", str(place / "base"), "-o", str(tmp_path / "moments")]
    check_killed(run_forked(KILLED, "calibrate", *arguments))
    assert not (tmp_path / "moments").exists()
    done = calibrate(place, tmp_path / "moments")
    assert [(a.name, a.reused) for a in done.record.adapters] == [("sort", True), ("rate", False)]
    undisturbed = calibrate(place, tmp_path / "undisturbed").folder
    for name in ("sort.safetensors", "rate.safetensors"):
        assert (done.folder / name).read_bytes() == (undisturbed / name).read_bytes()


def test_what_another_request_left_is_not_taken_up(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import plait.calibration.pipeline as pipeline

    def stopped(*rest: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "publish", stopped)
        with pytest.raises(KeyboardInterrupt):
            calibrate(place, tmp_path / "moments", count=3)
    again = calibrate(place, tmp_path / "moments", count=4).record
    assert [a.reused for a in again.adapters] == [False, False]


def test_command_line_recipe_and_python_make_the_same(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = calibrate(place, tmp_path / "python", count=5, seed=2).folder
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nbase_model: {place}/base\nadapters: [{place}/sort, {place}/rate]\n"
        f"tasks: [{place}/sort.yaml, {place}/rate.yaml]\ncalibration: {{count: 5, seed: 2}}\n"
    )
    flags = [str(place / "sort"), str(place / "rate"), "--tasks", str(place / "sort.yaml"), str(place / "rate.yaml")]
    flags += ["--base-id", str(place / "base"), "--count", "5", "--seed", "2"]
    for name, arguments in {"file": [str(recipe)], "flags": flags}.items():
        assert exit_code("calibrate", *arguments, "-o", str(tmp_path / name)) == 0
        assert (tmp_path / name / "sort.safetensors").read_bytes() == (wanted / "sort.safetensors").read_bytes()
    shown = capsys.readouterr().out
    for words in ("sort: 5 texts, split 'calibration', read by sort", "sort.safetensors", "as rows"):
        assert words in shown
    assert exit_code("calibrate", *flags, "-o", str(tmp_path / "json"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["tokens"] == 15
    assert exit_code("calibrate", *flags, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes"] >= sum(p.stat().st_size for p in wanted.glob("*.safetensors")) - 8000  # headers
    assert exit_code("calibrate", *flags, "--dry-run") == 0
    assert "at most" in capsys.readouterr().out
    assert exit_code("calibrate", *flags) == 2


def test_an_encoder_with_a_head(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    tokens = tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

    def model() -> Any:
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(vocab_size=len(tokens), num_labels=2, **size)).eval()

    model().save_pretrained(tmp_path / "base")
    tokens.save_pretrained(tmp_path / "base")
    for seed, task in enumerate(("sort", "rate")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["query", "value", "dense"], task_type="SEQ_CLS", init_lora_weights=False)
        config.target_modules = {"query", "value", "intermediate.dense"}
        get_peft_model(model(), config).save_pretrained(tmp_path / task)
        write_split_task(tmp_path, task, kind="sequence_classification", delimiter=None)
    folder = calibrate(tmp_path, tmp_path / "moments", count=4).folder
    for task in ("sort", "rate"):
        own = PeftModel.from_pretrained(model(), tmp_path / task).eval()
        shown = json.loads((folder / "calibration.json").read_text())["texts"]
        (about,) = (t for t in shown if t["task"] == task)
        chosen = read_texts(load_task(tmp_path / f"{task}.yaml"), kind=None, count=4, seed=0)
        assert about["digest"] == chosen.digest
        wanted = plain(own, [dict(tokens(str(p), return_tensors="pt")) for p in chosen.prompts])
        file = MomentsFile(folder / f"{task}.safetensors")
        assert len(wanted) == 6
        for name, gram in wanted.items():
            torch.testing.assert_close(dense(file.read(name, None)), gram, rtol=1e-4, atol=1e-5, msg=name)


def test_an_encoder_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    tokens = tokenizer()

    def model() -> Any:
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=len(tokens),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
        return T5ForConditionalGeneration(config).eval()

    model().save_pretrained(tmp_path / "base")
    tokens.save_pretrained(tmp_path / "base")
    for seed, task in enumerate(("sort", "rate")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
        get_peft_model(model(), config).save_pretrained(tmp_path / task)
        write_split_task(tmp_path, task, delimiter=None)
    folder = calibrate(tmp_path, tmp_path / "moments", count=4).folder
    for task in ("sort", "rate"):
        own = PeftModel.from_pretrained(model(), tmp_path / task).eval()
        chosen = read_texts(load_task(tmp_path / f"{task}.yaml"), kind=None, count=4, seed=0)
        texts = [
            {"input_ids": torch.tensor([tokens(str(p))["input_ids"]]), "decoder_input_ids": torch.tensor([[0]])}
            for p in chosen.prompts
        ]  # labels are one token, so that the decoder reads its start alone
        file = MomentsFile(folder / f"{task}.safetensors")
        wanted = plain(own, texts)
        assert any(name.startswith("decoder") for name in wanted)
        for name, gram in wanted.items():
            torch.testing.assert_close(dense(file.read(name, None)), gram, rtol=1e-4, atol=1e-5, msg=name)
