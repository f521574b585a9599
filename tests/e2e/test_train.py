"""`plait train`: phases → adapters → merge, evaluation and report; killed, resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import plait
from plait.notices import PlaitWarning
from plait.training import cohort
from plait.training.phases import phase_seed
from tests.language_models import WORDS, label, tokenizer, write_task
from tests.phase_files import CHECKPOINTS, SPLITS, command, rewrite, states, tensors
from tests.warm import killed_at_a_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_from_data_to_report(phases):
    rewrite(("max_steps: 10", "max_steps: 40"), ("base_model: base", "base_model: base\nbase_name: org/tiny"))
    result = plait.train("phases.yaml", out="out", matrix=True)
    assert result.ok
    config = json.loads(Path("out/phases/sort/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert len(config["target_modules"]) > 2
    assert config["target_modules"] == sorted(config["target_modules"]), "PEFT writes a set"
    assert "org/tiny" in Path("out/phases/sort/adapter/README.md").read_text()
    assert plait.verify("out/phases/sort/adapter", rebuild=False).ok
    assert states(result) == {"sort": "done", "rate": "done"}
    assert [p.steps for p in result.phases] == [40, 40]
    found = result.evaluation
    assert {t.task: t.adapter for t in found.tasks} == {"sort": "sort", "rate": "rate"}
    assert all(t.single > t.base + 0.2 for t in found.tasks)
    assert found.matrix.adapters == ("sort", "rate")
    # the adapter that was judged is the one that PEFT loads
    tokens = tokenizer()
    texts = [tokens(f"sort {word} :", return_tensors="pt") for word in WORDS]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "out/phases/sort/adapter").eval()
    labels = tokens(["red", "blue"], add_special_tokens=False)["input_ids"]
    scores = [adapted(**text).logits[0, -1, [row[0] for row in labels]] for text in texts]
    right = [["red", "blue"][int(s.argmax())] == label("sort", word) for s, word in zip(scores, WORDS, strict=True)]
    assert sum(right) / len(right) == next(t.single for t in found.tasks if t.task == "sort")
    # the merge is that of the recipe beside it
    again = plait.merge("out/recipe.yaml", out="again").folder
    merged = load_file("out/merged/adapter_model.safetensors")
    assert all(torch.equal(merged[key], tensor) for key, tensor in load_file(again / "adapter_model.safetensors").items())
    assert plait.verify("out/merged").ok
    assert "## Results" in Path("out/merged/README.md").read_text()
    page = Path("out/report.html").read_text()
    assert "How the adapters were trained" in page
    assert "<polyline" in page
    assert "Where the adapters collide" in page
    # what only an unfinished run needs is gone
    assert sorted(p.name for p in Path("out/phases/sort").iterdir()) == ["adapter", "job.json", "training.json"]


def test_phases_begin_with_matrices_of_their_own(phases):
    """With a learning rate of 0 what is saved is the beginning: B is 0, and A is the seed's."""
    rewrite(("learning_rate: 1e-2", "learning_rate: 0.0"), ("max_steps: 10", "max_steps: 1"))
    plait.train("phases.yaml", out="own")
    rewrite(
        ("learning_rate: 1e-2", "learning_rate: 0.0"), ("max_steps: 10", "max_steps: 1"), ("{r: 4,", "{r: 4, init_seed: 5,")
    )
    shared = plait.train("phases.yaml", out="shared")
    assert "begin with one A" in shared.notes[0]
    own, one = ([tensors(out, name) for name in ("sort", "rate")] for out in ("own", "shared"))
    for key in own[0]:
        assert torch.equal(one[0][key], one[1][key])
        if "lora_A" in key:
            cosine = torch.nn.functional.cosine_similarity(own[0][key].flatten(), own[1][key].flatten(), dim=0)
            assert abs(cosine) < 0.5, key
    assert phase_seed(0, "sort") != phase_seed(0, "rate")


def test_what_is_done_is_found(phases):
    first = plait.train("phases.yaml", out="out")
    before = {p: p.stat().st_mtime_ns for p in Path("out/phases").rglob("*") if p.is_file()}
    merged = Path("out/merged/adapter_model.safetensors").stat().st_mtime_ns
    Path("out/phases/rate/checkpoint-10").mkdir()  # killed after the last step
    Path("out/phases/rate/checkpoint-10/trainer_state.json").write_text("{}")
    second = plait.train("phases.yaml", out="out")
    assert states(second) == {"sort": "found", "rate": "found"}
    assert {p: p.stat().st_mtime_ns for p in Path("out/phases").rglob("*") if p.is_file()} == before
    assert Path("out/merged/adapter_model.safetensors").stat().st_mtime_ns == merged
    assert second.run == first.run
    assert len(list(Path("out/evaluation/merged").rglob("run_*"))) == 1
    # an adapter that is not what was written any more is trained again, and so is the merge
    Path("out/phases/rate/adapter/adapter_model.safetensors").write_bytes(b"broken")
    with pytest.warns(PlaitWarning, match=r"adapter is not as the training wrote it \(adapter_model\.safetensors changed\)"):
        third = plait.train("phases.yaml", out="out")
    assert states(third) == {"sort": "found", "rate": "done"}
    assert third.evaluation.tasks == first.evaluation.tasks


def test_other_settings_put_an_adapter_aside_and_find_it_again(phases):
    plait.train("phases.yaml", out="out")
    wanted = tensors("out", "sort")
    rewrite(("[sort.yaml,", "[{task: sort.yaml, arguments: {max_steps: 2}},"))
    changed = plait.train("phases.yaml", out="out")
    assert states(changed) == {"sort": "done", "rate": "found"}
    assert "an adapter with other settings was there" in changed.notes[0]
    assert len(list(Path("out/earlier").iterdir())) == 1
    rewrite()
    back = plait.train("phases.yaml", out="out")
    assert states(back) == {"sort": "found", "rate": "found"}
    assert all(torch.equal(tensors("out", "sort")[key], tensor) for key, tensor in wanted.items())


def test_killed_and_run_again(phases):
    """Killed in the first phase, then in the second; the end is that of a run that nobody disturbed."""
    rewrite(CHECKPOINTS, ("max_steps: 10", "max_steps: 20"), ("dropout: 0,", "dropout: 0.1,"))
    for watched in ("sort", "rate"):
        killed_at_a_checkpoint(["train", "phases.yaml", "-o", "out"], f"/phases/{watched}/")
        assert not Path("out/phases", watched, "adapter").exists()
        assert not Path("out/merged").exists()
    ended = plait.train("phases.yaml", out="out")
    assert states(ended) == {"sort": "found", "rate": "done"}
    assert [p.resumed_from is not None for p in ended.phases] == [True, True]
    assert not list(Path("out").rglob("checkpoint-*"))
    calm = plait.train("phases.yaml", out="calm")
    for name in ("sort", "rate"):
        assert all(torch.equal(tensors("out", name)[key], tensor) for key, tensor in tensors("calm", name).items())
    assert ended.evaluation.tasks == calm.evaluation.tasks


def test_a_phase_that_fails_does_not_stop_the_others(phases, capsys):
    rewrite(("[sort.yaml,", "[{task: sort.yaml, arguments: {max_length: 2}},"))
    code, out, message = command(capsys, "phases.yaml", "-o", "out", "--json")
    assert code == 1
    result = json.loads(out)
    assert [(p["name"], p["state"]) for p in result["phases"]] == [("sort", "failed"), ("rate", "done")]
    assert (result["merged"], result["evaluation"]) == (None, None)
    assert not Path("out/merged").exists()
    assert "failed: sort: task 'sort' (train): no example is left" in message
    assert "plait train phases.yaml -o out" in message
    rewrite()
    code, out, message = command(capsys, "phases.yaml", "-o", "out")
    assert code == 0
    assert "rate   found" in out
    assert "worst (" in out


def test_one_phase_only(phases, capsys):
    code, _, message = command(capsys, "phases.yaml", "-o", "out", "--only", "rate", "--set", "seed=0")
    assert code == 0
    assert (
        "Nothing is merged yet (sort to do); this command does the rest: plait train phases.yaml -o out --set seed=0\n"
        in message
    )
    assert not Path("out/merged").exists()
    assert not Path("out/phases/sort").exists()
    result = plait.train("phases.yaml", out="out")
    assert states(result) == {"sort": "done", "rate": "found"}
    assert result.merged == "merged"
    code, _, message = command(capsys, "phases.yaml", "-o", "out", "--only", "rate")
    assert (code, "Nothing is merged yet" in message) == (0, False)
    assert json.loads(Path("out/train.json").read_text())["report"] == "report.html"


def test_stopped_by_hand(phases, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cohort, "run_sequentially", stop)
    code, _, message = command(capsys, "phases.yaml", "-o", "out")
    assert code == 130
    assert "stopped\n0 of 2 phases are finished and kept in" in message
    assert "the same command continues with the others." in " ".join(message.split())


def test_rslora_and_dora(phases):
    rewrite(("{r: 4,", "{r: 4, rslora: true, dora: true,"), ("{name: ties, space: core, density: 0.5}", "linear"))
    result = plait.train("phases.yaml", out="out")
    assert result.ok
    config = json.loads(Path("out/phases/sort/adapter/adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"]) == (True, True)
    assert any("lora_magnitude_vector" in key for key in tensors("out", "sort"))
    assert result.evaluation.mean_recovery is not None or result.evaluation.undefined


@pytest.mark.parametrize("whole", [True, False], ids=["with a pooler", "without one"])
def test_encoders_with_heads(tmp_path, monkeypatch, whole):
    """A head per task, saved with the adapter; what a checkpoint lacks besides is trained and saved too, never left random."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    words = tokenizer()
    config = BertConfig(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=32, pad_token_id=0, initializer_range=0.2)  # fmt: skip
    encoder = BertForMaskedLM(config)
    if whole:
        encoder.bert.pooler = type(BertForMaskedLM(config).bert)(config).pooler
    encoder.save_pretrained("base")
    words.save_pretrained("base")
    for task in ("sort", "rate"):
        write_task(
            tmp_path, task, splits=SPLITS, kind="sequence_classification", delimiter=None, prompt=f"{task} {{{{ word }}}}"
        )
    rewrite(("max_steps: 10", "max_steps: 40"))
    result = plait.train("phases.yaml", out="out")
    assert result.ok, result.failed
    assert all(t.single > t.base for t in result.evaluation.tasks)
    held = {key.removeprefix("base_model.model.") for key in tensors("out", "sort") if "lora_" not in key}
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    lora = {key for key in tensors("out", "sort") if "lora_" in key}
    assert lora
    assert not [key for key in lora if "pooler" in key and not whole]
    assert held == {"classifier.weight", "classifier.bias"} | (set() if whole else pooler)
    # adapter and base give the answers that were judged
    model = AutoPeftModelForSequenceClassification.from_pretrained("out/phases/rate/adapter", num_labels=2).eval()
    right = [
        ["good", "bad"][int(model(**words(f"rate {w}", return_tensors="pt")).logits.argmax())] == label("rate", w)
        for w in WORDS
    ]
    assert sum(right) / len(right) == next(t.single for t in result.evaluation.tasks if t.task == "rate")
    assert plait.train("phases.yaml", out="out").evaluation.tasks == result.evaluation.tasks
