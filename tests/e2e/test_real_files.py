"""Adapters as people have them: shapes, vocabularies and settings that contradict the base or each other. PEFT is the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import plait
from plait.adapters.adapter import Adapter
from plait.errors import AdapterError, PlanError
from plait.mixture import Mixture
from tests.adapters_on_disk import Linear, write_adapter
from tests.baking_models import adapter_output, literal_output, make_adapter, run, save_model
from tests.command_line import exit_code
from tests.real_files import CONFIG, LM, MODULES, WEIGHTS, Q, baked, difference, rewrite

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]


class TestConv1D:
    """`fan_in_fan_out` is that of the layer that PEFT wrapped last; c_proj's weight is square."""

    TARGETS = ("c_attn", "c_proj", "lm_head")

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("flag", [False, True])
    def test_baked_mixed_and_merged_as_peft_has_it(self, tmp_path, dora, flag):
        base = save_model("gpt2", tmp_path / "base")
        made = make_adapter(base, tmp_path / "made", 1, LM, target_modules=list(self.TARGETS), use_dora=dora)
        assert not json.loads((made / CONFIG).read_text())["fan_in_fan_out"]
        adapter = rewrite(made, tmp_path / "a", fan_in_fan_out=flag)
        expected = adapter_output(base, {"a": adapter}, {"a": 1.0}, LM)
        assert difference(run(baked([adapter], base, tmp_path / "out")), expected) < 1e-5
        model = LM.from_pretrained(base)
        with Mixture(model, [Adapter.open(adapter, "a")]).active({"a": 1.0}):
            assert difference(run(model), expected) < 1e-5
        plait.merge([adapter], base_model=str(base), out=tmp_path / "merged")
        assert difference(adapter_output(base, {"a": tmp_path / "merged"}, {"a": 1.0}, LM), expected) < 1e-5

    def test_without_a_configuration_the_biases_of_the_checkpoint_tell(self, tmp_path):
        base = save_model("gpt2", tmp_path / "base")
        adapter = make_adapter(base, tmp_path / "a", 1, LM, target_modules=["c_proj"])
        bare = save_model("gpt2", tmp_path / "bare")
        (bare / "config.json").write_text(json.dumps({"model_type": "mine"}))
        plait.bake([adapter], base=base, out=tmp_path / "one")
        plait.bake([adapter], base=bare, out=tmp_path / "two")
        one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
        key = "transformer.h.0.attn.c_proj.weight"
        assert torch.equal(one[key], two[key])
        assert not torch.equal(one[key], load_file(base / "model.safetensors")[key])

    def test_a_dense_delta_lies_as_the_weights_do(self, tmp_path):
        base = save_model("gpt2", tmp_path / "base")
        adapter = make_adapter(base, tmp_path / "a", 1, LM, target_modules=list(self.TARGETS))
        plait.merge([adapter], base_model=str(base), out=tmp_path / "delta", kind="delta")
        plait.bake([adapter], base=base, out=tmp_path / "out")
        delta = load_file(tmp_path / "delta" / "delta.safetensors")
        before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
        for name in (n for n in delta if "lm_head" not in n):
            assert torch.allclose(before[name] + delta[name], after[name], atol=1e-5), name


class TestVocabularies:
    @pytest.mark.parametrize("kind", ["llama", "llama tied"])
    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            {"target_modules": ["q_proj"]},
            {"target_modules": ["q_proj"], "trainable_token_indices": [1, 33]},
        ],
        ids=["saved", "resized", "token rows"],
    )
    def test_a_resized_one_leaves_parameters_of_the_model_alone(self, tmp_path, kind, config):
        base = save_model(kind, tmp_path / "base")
        model = LM.from_pretrained(base)
        model.resize_token_embeddings(model.config.vocab_size + 6)
        peft = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "modules_to_save.default" in name or "trainable_tokens" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
        peft.save_pretrained(tmp_path / "a")
        assert difference(run(baked([tmp_path / "a"], base, tmp_path / "out")), run(peft.eval())) < 1e-5

    def test_a_head_that_no_longer_shares_the_embeddings_brings_its_bias(self, tmp_path):
        """`tie_word_embeddings: false` also unties `lm_head.decoder.bias` from the `lm_head.bias` that is stored."""
        small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        model = tf.RobertaForMaskedLM(tf.RobertaConfig(**small, vocab_size=32, max_position_embeddings=40, type_vocab_size=1))
        torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(tmp_path / "base")
        auto = tf.AutoModelForMaskedLM
        adapter = make_adapter(
            tmp_path / "base", tmp_path / "a", 1, auto, target_modules=["query"], modules_to_save=["lm_head"]
        )
        expected = adapter_output(tmp_path / "base", {"a": adapter}, {"a": 1.0}, auto)
        assert difference(run(baked([adapter], tmp_path / "base", tmp_path / "out", auto)), expected) < 1e-5

    def test_a_parameter_that_the_model_has_not_is_kept_beside_it(self, tmp_path):
        base = save_model("llama", tmp_path / "base")
        made = make_adapter(base, tmp_path / "made", 1, LM, target_modules=["q_proj"], task_type="CAUSAL_LM")
        tensors = load_file(made / WEIGHTS) | {"base_model.model.v_head.summary.weight": torch.ones(1, 4)}
        save_file(tensors, made / WEIGHTS)
        result = plait.bake([made], base=base, out=tmp_path / "out")
        assert any("v_head.summary.weight of made is not a parameter" in note for note in result.plan.notes)
        assert "v_head.summary.weight" not in load_file(tmp_path / "out" / "model.safetensors")
        assert list(load_file(tmp_path / "out/heads/made/heads.safetensors")) == ["base_model.model.v_head.summary.weight"]


class TestDoubts:
    def notes(self, folder: Path, **config: Any) -> str:
        good = write_adapter(folder / "good", MODULES, seed=2)
        odd = write_adapter(folder / "odd", MODULES, seed=1)
        (odd.folder / CONFIG).write_text(json.dumps(odd.config | config))
        return " ".join(n for n in plait.plan([odd.folder, good.folder]).notes if n.startswith("'odd'"))

    def test_a_rank_that_the_tensors_do_not_have(self, tmp_path):
        found = self.notes(tmp_path, r=64, lora_alpha=128)
        assert "another rank" in found
        assert "64, in the file 2" in found
        assert "128 as alpha gives 64 there" in found

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"rank_pattern": {"q_proj": 5}}, "5, in the file 2"),
            ({"alpha_pattern": {"k_proj": 5}}, "alpha_pattern has 'k_proj', which no module"),
            ({"lora_alpha": 0}, "alpha is 0 for 2 of 2 modules"),
            ({"alpha_pattern": {"v_proj": -2}}, "alpha is negative for 1 of 2 modules"),
            ({}, ""),
        ],
    )
    def test_settings_that_the_tensors_do_not_bear_out(self, tmp_path, config, message):
        found = self.notes(tmp_path, **config)
        assert message in found if message else not found

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_a_head_that_diverged(self, tmp_path, value):
        base = save_model("llama", tmp_path / "base")
        adapter = make_adapter(base, tmp_path / "bad", 1, LM, target_modules=["q_proj"], modules_to_save=["lm_head"])
        tensors = load_file(adapter / WEIGHTS)
        tensors["base_model.model.lm_head.weight"][3, 2] = value
        save_file(tensors, adapter / WEIGHTS)
        with pytest.raises(AdapterError, match=r"'bad': tensor 'base_model\.model\.lm_head\.weight'.*1 NaN or infinite"):
            plait.bake([adapter], base=base, out=tmp_path / "model")
        with pytest.raises(AdapterError, match="1 NaN or infinite"):
            plait.merge([adapter], out=tmp_path / "merged")
        assert not (tmp_path / "model").exists()
        assert not (tmp_path / "merged").exists()

    @pytest.mark.parametrize("part", ["lora_B", "lora_A"])
    @pytest.mark.parametrize("where", ["", "layers.1"])
    def test_an_adapter_that_was_not_trained(self, tmp_path, part, where):
        written = write_adapter(tmp_path / "dead", MODULES, seed=1)
        tensors = {
            k: torch.zeros_like(v) if part in k and where in k else v for k, v in load_file(written.folder / WEIGHTS).items()
        }
        save_file(tensors, written.folder / WEIGHTS)
        good = write_adapter(tmp_path / "good", MODULES, seed=2)
        result = plait.merge([written.folder, good.folder], out=tmp_path / "out")
        found = [note for note in result.record.notes if "zero delta" in note]
        assert [note.startswith("'dead': 2 of 2 modules") for note in found] == ([] if where else [True])

    @pytest.mark.parametrize("words", [("compress", "--rank", "1"), ("convert", "--to", "mlx")], ids=" ".join)
    def test_of_one_adapter_too(self, tmp_path, capsys, words):
        written = write_adapter(tmp_path / "dead", MODULES, seed=1)
        save_file({k: torch.zeros_like(v) for k, v in load_file(written.folder / WEIGHTS).items()}, written.folder / WEIGHTS)
        (written.folder / CONFIG).write_text(json.dumps(json.loads((written.folder / CONFIG).read_text()) | {"r": 64}))
        assert exit_code(words[0], written.folder, *words[1:], "-o", tmp_path / "out") == 0
        notes = capsys.readouterr().err
        assert "'dead': 2 of 2 modules have a zero delta" in notes
        assert "'dead': the configuration gives 2 of 2 modules another rank than their tensors have" in notes

    def test_one_tower_that_was_not_trained(self, tmp_path):
        modules = {"model.visual.blocks.0.q": Linear(8, 8), Q: Linear(8, 8)}
        written = write_adapter(tmp_path / "half", modules)
        tensors = {
            k: torch.zeros_like(v) if "visual" in k and "lora_B" in k else v
            for k, v in load_file(written.folder / WEIGHTS).items()
        }
        save_file(tensors, written.folder / WEIGHTS)
        assert any(
            "'half': 1 of 2 modules have a zero delta (such as 'model.visual" in n for n in plait.plan([written.folder]).notes
        )


class TestTiedWeights:
    """The input embedding and the head share a tensor; an adapter may change one use, or both, each in its own way."""

    MODULES = (("llama tied", "embed_tokens", "q_proj"), ("gpt2", "wte", "c_attn"), ("t5", "shared", "q"))

    def live(self, base: Path, folders: dict[str, Path], weights: dict[str, float], auto: Any) -> torch.Tensor:
        model = auto.from_pretrained(base)
        mixture = Mixture(model, [Adapter.open(folder, name) for name, folder in folders.items()])
        with mixture.active(weights):  # of two, the heads are copies of the base's
            return run(model)

    @pytest.mark.parametrize("kinds", [("both", "both"), ("both", "head"), ("embedding", "both"), ("dora", "both")])
    def test_adapters_whose_uses_are_tied_too(self, tmp_path, kinds):
        """`ensure_weight_tying`: PEFT trains one pair of factors for both uses and saves it twice."""
        base = save_model("llama tied", tmp_path / "base")
        modules = {"both": ["embed_tokens", "lm_head", "q_proj"], "head": ["lm_head"], "embedding": ["embed_tokens", "v_proj"]}
        folders = {}
        for number, kind in enumerate(kinds):
            settings = {"target_modules": modules.get(kind, modules["both"]), "use_dora": kind == "dora", "r": number + 2}
            folder = tmp_path / f"a{number}"
            folders[folder.name] = make_adapter(base, folder, number + 1, LM, **settings, ensure_weight_tying=True)
        weights = {"a0": 0.7, "a1": -0.4}
        expected = literal_output(base, folders, weights, LM)
        merged = plait.merge([*folders.values()], weights=[0.7, -0.4], base_model=str(base), out=tmp_path / "m")
        assert not any("does not select" in note for note in merged.record.notes)
        assert difference(adapter_output(base, {"m": tmp_path / "m"}, {"m": 1.0}, LM), expected) < 1e-5
        result = plait.bake([*folders.values()], weights=[0.7, -0.4], base=base, out=tmp_path / "b")
        noted = [note for note in result.plan.notes if "are the base's own: no change" in note]
        assert len(noted) == any("base_layer" in n for f in folders.values() for n in load_file(f / WEIGHTS))
        assert difference(run(LM.from_pretrained(tmp_path / "b").eval()), expected) < 1e-5
        assert difference(self.live(base, folders, weights, LM), expected) < 1e-5

    @pytest.mark.parametrize(("kind", "embedding", "inner"), MODULES)
    @pytest.mark.parametrize(
        ("rows", "adapted"),  # PEFT does not train both on one module
        [("embedding", "inner"), ("embedding", "head"), ("head", "inner"), ("head", "embedding"), ("both", "inner")],
    )
    def test_trained_rows_of_one_use_below_a_lora(self, tmp_path, kind, embedding, inner, rows, adapted):
        """Rows of the embedding are the head's too; those of the head are its own; with both, each has its own."""
        auto = tf.AutoModelForSeq2SeqLM if kind == "t5" else LM
        base = save_model(kind, tmp_path / "base")
        trained = {embedding: [3, 5]} if rows != "head" else {}
        trained |= {"lm_head": [3, 7]} if rows != "embedding" else {}
        targets = [inner] + {"inner": [], "head": ["lm_head"], "embedding": [embedding]}[adapted]
        made = make_adapter(base, tmp_path / "a", 1, auto, target_modules=targets, trainable_token_indices=trained)
        expected = adapter_output(base, {"a": made}, {"a": 1.0}, auto)
        assert difference(self.live(base, {"a": made}, {"a": 1.0}, auto), expected) < 1e-5
        if kind == "t5" and rows == "both":
            with pytest.raises(PlanError, match="have trained token rows of 2 of them"):
                plait.bake([made], base=base, out=tmp_path / "b")
            return
        assert difference(run(baked([made], base, tmp_path / "b", auto)), expected) < 1e-5


class TestAdaptersOfAnotherModelThanTheBase:
    @pytest.mark.parametrize("layers", [(None, None), ([0, 1], [2, 3])])
    def test_repeated_layers_merge_as_each_layers_own_sum(self, tmp_path, layers):
        base = save_model("llama", tmp_path / "base")
        folders = {}
        for number, chosen in enumerate(layers):
            settings = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": chosen, "r": number + 2}
            folder = tmp_path / f"a{number}"
            folders[folder.name] = make_adapter(
                base, folder, number + 1, LM, **settings, layer_replication=[[0, 2], [0, 2]], task_type="CAUSAL_LM"
            )
        plait.merge([*folders.values()], weights=[0.7, -0.4], out=tmp_path / "m")
        expected = literal_output(base, folders, {"a0": 0.7, "a1": -0.4}, LM)
        assert difference(adapter_output(base, {"m": tmp_path / "m"}, {"m": 1.0}, LM), expected) < 1e-5

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"alora_invocation_tokens": [3, 4]}, "aLoRA"),
            ({"layer_replication": [[0, 2], [0, 2]], "layers_to_transform": [0, 1]}, "repeated layers"),
        ],
    )
    def test_they_merge_into_an_adapter_alone(self, tmp_path, config, message):
        base = save_model("llama", tmp_path / "base")
        made = make_adapter(base, tmp_path / "made", 1, LM, target_modules=["q_proj"], **config)
        merged = plait.merge([made], out=tmp_path / "merged").folder
        key = next(iter(config))
        assert json.loads((merged / CONFIG).read_text())[key] == config[key]
        for again in (made, merged):
            with pytest.raises(PlanError, match=message):
                plait.bake([again], base=base, out=tmp_path / "out")
            with pytest.raises(PlanError, match=message):
                Mixture.load(base, [Adapter.open(again, "a")])
        with pytest.raises(PlanError, match=message):
            plait.merge([made], out=tmp_path / "delta", kind="delta")
