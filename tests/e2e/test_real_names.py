"""Adapters as people have them: names of live models, wrappers, older versions and other programs. PEFT is the judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import plait
from plait.adapters.adapter import Adapter
from plait.errors import AdapterError, PlanError
from plait.mixture import Mixture
from tests.adapters_on_disk import Experts, Linear, read_deltas, write_adapter
from tests.baking_models import IDS, run, save_model
from tests.real_files import CONFIG, LM, MODULES, WEIGHTS, Q, Tensors, V, baked, difference, rewrite

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]


class TestNamesOfALiveModel:
    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
            {"target_modules": ["q_proj", "embed_tokens"]},
            {"target_modules": ["q_proj"], "use_dora": True},
            {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
        ],
        ids=["head", "embedding", "dora", "token rows"],
    )
    @pytest.mark.parametrize("name", ["default", "mine"])
    def test_a_whole_state_dict_is_the_adapter(self, tmp_path, config, name):
        base = save_model("llama", tmp_path / "base")
        torch.manual_seed(1)
        peft = get_peft_model(LM.from_pretrained(base), LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **config), name)
        with torch.no_grad():
            for key, parameter in peft.named_parameters():
                if f"modules_to_save.{name}" in key or "trainable_tokens_delta" in key or "magnitude" in key:
                    parameter.mul_(1.3)
        peft.save_pretrained(tmp_path / "saved")
        saved = tmp_path / "saved" if name == "default" else tmp_path / "saved" / name
        parts = ("lora_", "modules_to_save", "original_module", "token_adapter")
        state = {k: v.clone().contiguous() for k, v in peft.state_dict().items() if any(p in k for p in parts)}
        (tmp_path / "live").mkdir()
        save_file(state, tmp_path / "live" / WEIGHTS)
        (tmp_path / "live" / CONFIG).write_text((saved / CONFIG).read_text())
        assert any(f".{name}" in key for key in state)
        expected = run(peft.eval())
        for number, source in enumerate((tmp_path / "live", saved)):
            assert difference(run(baked([source], base, tmp_path / f"out{number}")), expected) < 1e-5

    @pytest.mark.parametrize("name", ["weight", "bias"])
    @pytest.mark.parametrize("live", [False, True])
    def test_an_adapter_called_like_a_part_of_its_head(self, tmp_path, name, live):
        auto = tf.AutoModelForSequenceClassification
        base = save_model("bert", tmp_path / "base")
        config = LoraConfig(
            r=2, target_modules=["query", "word_embeddings"], modules_to_save=["classifier"], init_lora_weights=False
        )
        peft = get_peft_model(auto.from_pretrained(base), config, name)
        with torch.no_grad():
            for key, parameter in peft.named_parameters():
                if f"modules_to_save.{name}" in key:
                    parameter.mul_(1.3)
        peft.save_pretrained(tmp_path / "saved")
        adapter = tmp_path / "saved" / name
        names = set(load_file(adapter / WEIGHTS))
        assert "base_model.model.classifier" in names  # PEFT loads it no more
        if live:
            parts = ("lora_", "modules_to_save", "original_module")
            save_file({k: v.clone() for k, v in peft.state_dict().items() if any(p in k for p in parts)}, adapter / WEIGHTS)
        assert sorted(Adapter.open(adapter, "a").full_tensors) == ["classifier.bias", "classifier.weight"]
        assert difference(run(baked([adapter], base, tmp_path / "out", auto)), run(peft.eval())) < 1e-5

    @pytest.mark.parametrize(
        ("extra", "config"),
        [
            (["score.weight", "score.out_proj.weight"], {"modules_to_save": ["score"]}),  # of an adapter called `dense`
            (["score", "score.weight", "score.bias"], {"modules_to_save": ["score"]}),
            (["model.norm", f"{V}.bias"], {"bias": "all"}),  # `bias`
        ],
    )
    def test_names_that_cannot_be_completed(self, tmp_path, extra, config):
        write_adapter(tmp_path / "a", MODULES, extra={name: torch.ones(2, 2) for name in extra}, **config)
        with pytest.raises(AdapterError, match=f"names lack a part: 'base_model.model.{extra[0]}'"):
            Adapter.open(tmp_path / "a", "a")

    def test_several_adapters_in_one_file(self, tmp_path):
        written = write_adapter(tmp_path / "a", MODULES)
        tensors = load_file(written.folder / WEIGHTS)
        named = {k.replace(".weight", f".{n}.weight"): v.clone() for n in ("one", "two") for k, v in tensors.items()}
        save_file(named, written.folder / WEIGHTS)
        with pytest.raises(AdapterError, match=r"holds several adapters \(one, two\)"):
            plait.inspect([written.folder])

    def test_two_values_of_one_head(self, tmp_path):
        head, other = torch.ones(2, 8), torch.zeros(2, 8)
        write_adapter(tmp_path / "same", MODULES, extra={"score.weight": head, "score.modules_to_save.weight": head.clone()})
        assert [t.path for t in plait.inspect([tmp_path / "same"]).adapters[0].full_tensors] == ["score.weight"]
        write_adapter(tmp_path / "two", MODULES, extra={"score.weight": head, "score.modules_to_save.weight": other})
        with pytest.raises(AdapterError, match="different values"):
            plait.inspect([tmp_path / "two"])

    def test_the_untrained_head_alone(self, tmp_path):
        write_adapter(tmp_path / "a", MODULES, extra={"score.original_module.weight": torch.ones(2, 8)})
        with pytest.raises(AdapterError, match="is the value before training"):
            plait.inspect([tmp_path / "a"])


class TestWrappers:
    @pytest.mark.parametrize(
        "wrapper", ["_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module.module", "_forward_module"]
    )
    def test_a_merge_with_wrapped_names_is_that_of_the_bare_ones(self, tmp_path, wrapper):
        one = write_adapter(tmp_path / "one", MODULES, seed=1)
        two = write_adapter(tmp_path / "two", {Q: Linear(8, 8, alpha=6.0), V: MODULES[V]}, seed=2)
        config = json.loads((two.folder / CONFIG).read_text())
        wrapped = rewrite(
            two.folder,
            tmp_path / "wrapped",
            lambda key: key.replace(".self_attn", f".{wrapper}.self_attn"),
            alpha_pattern={k.replace(".self_attn", f".{wrapper}.self_attn"): v for k, v in config["alpha_pattern"].items()},
        )
        if wrapper.rpartition(".")[2] == "module":  # in patterns `module` may be anybody's
            wrapped.joinpath(CONFIG).write_text(json.dumps(config))
        plait.merge([one.folder, wrapped], out=tmp_path / "out")
        found = read_deltas(tmp_path / "out", MODULES)
        for path in MODULES:
            assert abs(found[path] - one.deltas[path] - two.deltas[path]).max() < 1e-5

    def test_one_module_twice(self, tmp_path):
        write_adapter(tmp_path / "a", {Q: Linear(8, 8), Q.replace(".self", "._orig_mod.self"): Linear(8, 8)})
        with pytest.raises(AdapterError, match="are the same part of one module"):
            plait.inspect([tmp_path / "a"])

    @pytest.mark.parametrize("named", ["{layer}.module.self{rest}", "{layer}.self{rest}.module"])
    def test_a_name_that_only_perhaps_is_a_wrappers(self, tmp_path, named):
        one = write_adapter(tmp_path / "one", MODULES)
        parts = {p: dict(zip(("layer", "rest"), p.split(".self"), strict=True)) for p in MODULES if ".self" in p}
        two = write_adapter(tmp_path / "two", {named.format(**parts[p]): MODULES[p] for p in parts})
        with pytest.raises(PlanError, match="differ by the word 'module' alone"):
            plait.plan([one.folder, two.folder])

    @pytest.mark.parametrize("word", ["inner_module", "wrapped"])
    def test_one_word_more_in_every_layer(self, tmp_path, word):
        one = write_adapter(tmp_path / "one", MODULES)
        longer = {p.replace(".self", f".{word}.self"): m for p, m in MODULES.items()}
        two = write_adapter(tmp_path / "two", longer)
        for pair in ([one.folder, two.folder], [two.folder, one.folder]):
            with pytest.raises(PlanError, match=f"differ by the word '{word}' alone"):
                plait.plan(pair)
        both = write_adapter(tmp_path / "both", {**MODULES, **longer})  # a model that has both
        assert len(plait.plan([one.folder, both.folder]).modules) == 4

    @pytest.mark.parametrize("tail", ["mlp.experts", "mlp.experts.base_layer", "self_attn.q_proj.base_layer"])
    def test_a_parameter_that_the_configuration_does_not_name(self, tmp_path, tail):
        write_adapter(tmp_path / "a", {f"model.layers.0.{tail}": Linear(8, 8)})
        with pytest.raises(AdapterError, match="the configuration does not name"):
            plait.plan([tmp_path / "a"])


class TestOtherPrograms:
    def kohya(self, folder: Path, rename: Callable[[str], str] = str, *, alpha: bool = True) -> dict[str, Any]:
        written = write_adapter(folder, MODULES)
        tensors: Tensors = {}
        for key, value in load_file(folder / WEIGHTS).items():
            tensors[rename(key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"))] = value.clone()
        for path in MODULES if alpha else ():
            tensors[rename(f"{path}.alpha")] = torch.tensor(3.0)
        save_file(tensors, folder / WEIGHTS)
        return {path: delta / written.scalings[path] * 3 / 2 for path, delta in written.deltas.items()}

    def test_kohyas_factors_are_read_with_their_own_alpha(self, tmp_path):
        wanted = self.kohya(tmp_path / "a")
        plait.merge([tmp_path / "a"], out=tmp_path / "out")
        found = read_deltas(tmp_path / "out", MODULES)
        assert all(abs(found[path] - wanted[path]).max() < 1e-6 for path in MODULES)

    @pytest.mark.parametrize(("alpha", "fits"), [(4.0, True), (3.0, False)])
    def test_an_alpha_beside_pefts_factors_agrees_with_the_configuration(self, tmp_path, alpha, fits):
        written = write_adapter(
            tmp_path / "a", MODULES, alpha=4.0, extra={f"{path}.alpha": torch.tensor(alpha) for path in MODULES}
        )
        if not fits:
            with pytest.raises(AdapterError, match=r"gives 1\.5 as scaling, the configuration 2"):
                plait.plan([tmp_path / "a"])
            return
        plait.merge([tmp_path / "a"], out=tmp_path / "out")
        found = read_deltas(tmp_path / "out", MODULES)
        assert all(abs(found[path] - written.deltas[path]).max() < 1e-6 for path in MODULES)
        assert not (tmp_path / "out" / "heads").exists()

    @pytest.mark.parametrize("alpha", [True, False])
    def test_kohyas_names_that_do_not_tell_the_module_are_refused(self, tmp_path, alpha):
        flat = (lambda key: "lora_te_" + key.removeprefix("base_model.model.").replace(".", "_", 4)) if alpha else str
        self.kohya(tmp_path / "a", flat, alpha=alpha)
        with pytest.raises(AdapterError, match="kohya"):
            plait.plan([tmp_path / "a"])

    @pytest.mark.parametrize(
        ("name", "what"),
        [
            ("lora_a", "mlx"),
            ("hada_w1_a", "LyCORIS"),
            ("lora_E", "AdaLoRA"),
            ("ia3_l", "IA3"),
            ("to_k_lora.up.weight", "diffusers"),
        ],
    )
    def test_anothers_tensor_beside_peft_factors_is_refused_by_name(self, tmp_path, name, what):
        write_adapter(tmp_path / "strange", MODULES, extra={f"{Q}.{name}": torch.ones(2, 8)})
        with pytest.raises(AdapterError, match=what) as found:
            plait.plan([tmp_path / "strange"])
        assert "strange" in str(found.value)
        assert f"{Q}.{name}" in str(found.value)

    @pytest.mark.parametrize(
        ("file", "what"),
        [
            ("adapters.safetensors", "mlx"),
            ("pytorch_lora_weights.safetensors", "diffusers"),
            ("adapter_model-00001-of-00002.safetensors", "several files"),
            ("lora.gguf", "GGUF"),
            ("model.safetensors", "a full model"),
        ],
    )
    def test_files_of_other_programs_are_known_by_name(self, tmp_path, file, what):
        write_adapter(tmp_path / "a", MODULES)
        (tmp_path / "a" / WEIGHTS).rename(tmp_path / "a" / file)
        with pytest.raises(AdapterError, match=what):
            plait.plan([tmp_path / "a"])

    def test_a_whole_model_under_an_adapters_name(self, tmp_path):
        write_adapter(tmp_path / "a", {}, extra={f"{path}.weight": torch.ones(4, 8) for path in MODULES})
        with pytest.raises(AdapterError, match="2 weights of layers"):
            plait.plan([tmp_path / "a"])


class TestOlderVisionLanguageNames:
    """Names from before transformers 4.52, which it renames on loading; the settings of an adapter it does not."""

    @pytest.fixture(scope="class", params=["gemma3", "llava"])
    @staticmethod
    def model(request, tmp_path_factory):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = sizes | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64}
        vision = sizes | {"image_size": 28, "patch_size": 14}
        torch.manual_seed(0)
        if request.param == "gemma3":
            kind: Any = tf.Gemma3ForConditionalGeneration
            config: Any = tf.Gemma3Config(
                text_config=text | {"sliding_window": 8}, vision_config=vision, mm_tokens_per_image=4, image_token_index=60
            )
        else:
            kind = tf.LlavaForConditionalGeneration
            config = tf.LlavaConfig(
                vision_config=tf.CLIPVisionConfig(**vision), text_config=tf.LlamaConfig(**text), image_token_index=60
            )
        base = tmp_path_factory.mktemp("base")
        kind(config).save_pretrained(base)
        return kind, base

    @staticmethod
    def older(key: str) -> str:
        names = {
            "model.language_model.": "language_model.model.",
            "model.vision_tower.encoder": "vision_tower.vision_model.encoder",
            "model.vision_tower.": "vision_tower.",
            "model.multi_modal_projector": "multi_modal_projector",
            "lm_head": "language_model.lm_head",
        }
        path = key.removeprefix("base_model.model.")
        found = next((old + path[len(new) :] for new, old in names.items() if path.startswith(new)), path)
        return f"base_model.model.{found}"

    def make(self, model, folder, **config):
        kind, base = model
        torch.manual_seed(1)
        peft = get_peft_model(kind.from_pretrained(base), LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **config))
        peft.save_pretrained(folder)
        with torch.no_grad():
            return peft.eval()(input_ids=IDS).logits

    def logits(self, model):
        with torch.no_grad():
            return model.eval()(input_ids=IDS).logits

    @pytest.mark.parametrize("layout", ["uniform", "pattern"])
    def test_a_merge_of_two_loads_in_todays_peft(self, model, tmp_path, layout):
        pattern = r"^(?!.*vision).*{}$".format
        ranks = {"down_proj": 3}
        expected = self.make(model, tmp_path / "new", target_modules=pattern("(q_proj|down_proj)"), rank_pattern=ranks)
        one = rewrite(tmp_path / "new", tmp_path / "1", self.older, lambda k: "q_proj" in k, target_modules=pattern("q_proj"))
        two = rewrite(tmp_path / "new", tmp_path / "2", self.older, lambda k: "down" in k, target_modules=pattern("down_proj"))
        plait.merge([one, two], out=tmp_path / "merged", layout=layout)
        kind, base = model
        found = PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / "merged")
        assert difference(self.logits(found), expected) < 1e-5
        assert difference(self.logits(baked([one, two], base, tmp_path / "baked", kind)), expected) < 1e-5

    def test_full_paths_are_written_for_both_versions(self, model, tmp_path):
        """Each adapter is narrowed down to a layer of its own, so that no selection means both: the paths have to say it."""
        expected = self.make(model, tmp_path / "new", target_modules=r".*language_model.*q_proj")
        halves = [
            rewrite(
                tmp_path / "new",
                tmp_path / str(i),
                self.older,
                lambda k, i=i: f"layers.{i}." in k,
                target_modules=["q_proj"],
                layers_to_transform=[i],
            )
            for i in range(2)
        ]
        plait.merge(halves, out=tmp_path / "merged")
        assert isinstance(json.loads((tmp_path / "merged" / CONFIG).read_text())["target_modules"], str)
        kind, base = model
        found = PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / "merged")
        assert difference(self.logits(found), expected) < 1e-5

    def test_every_part_is_baked_and_mixed(self, model, tmp_path):
        names = ["q_proj", "fc1", "linear_1", "lm_head"]
        expected = self.make(model, tmp_path / "new", target_modules=names)
        old = rewrite(tmp_path / "new", tmp_path / "old", self.older)
        kind, base = model
        assert difference(self.logits(baked([old], base, tmp_path / "out", kind)), expected) < 1e-5
        plait.bake([tmp_path / "new"], base=base, out=tmp_path / "other")
        same = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "other")]
        assert same[0].keys() == same[1].keys()
        assert all(torch.equal(same[0][k], same[1][k]) for k in same[0])
        live = kind.from_pretrained(base)
        with Mixture(live, [Adapter.open(old, "a")]).active({"a": 1.0}):
            assert difference(self.logits(live), expected) < 1e-5


class TestFusedAndSeparate:
    PAIRS = (
        ("self_attn.qkv_proj", "self_attn.k_proj"),
        ("mlp.gate_up_proj", "mlp.up_proj"),
        ("attn.Wqkv", "attn.v_proj"),
        ("attention.query_key_value", "attention.query"),
        ("attn.qkv", "attn.wq"),
        ("attn.to_kv", "attn.to_k"),
        ("attn.qk_proj", "attn.q_proj"),
        ("self_attn.linear_qkv", "self_attn.v_proj"),
        ("self_attention.fused_qkv", "self_attn.q_proj"),
        ("mlp.gate_and_up_proj", "mlp.gate_proj"),
        ("mlp.dense_h_to_4h", "mlp.up_proj"),
        ("mlp.wi", "mlp.wi_1"),
    )

    @pytest.mark.parametrize(("fused", "part"), PAIRS)
    @pytest.mark.parametrize("order", [1, -1])
    def test_no_model_has_both(self, tmp_path, fused, part, order):
        write_adapter(tmp_path / "fused", {f"model.layers.0.{fused}": Linear(12, 8)})
        write_adapter(tmp_path / "apart", {f"model.layers.0.{part}": Linear(4, 8)})
        folders = [tmp_path / "fused", tmp_path / "apart"][::order]
        with pytest.raises(PlanError, match="No model has both") as found:
            plait.plan(folders)
        assert fused in str(found.value)
        assert part in str(found.value)
        assert any("No model has both" in problem for problem in plait.inspect(folders).compatibility.problems)

    def test_a_model_that_has_both_is_believed(self, tmp_path):
        both = {"blocks.0.attn.qkv": Linear(12, 8), "blocks.0.attn.query": Linear(4, 8)}
        write_adapter(tmp_path / "both", both)
        write_adapter(tmp_path / "one", {"blocks.0.attn.query": Linear(4, 8)})
        assert len(plait.plan([tmp_path / "both", tmp_path / "one"]).modules) == 2

    def test_other_layers_may_differ(self, tmp_path):
        write_adapter(tmp_path / "one", {"blocks.0.attn.qkv": Linear(12, 8)})
        write_adapter(tmp_path / "two", {"blocks.0.cross_attn.query": Linear(4, 8)})
        assert len(plait.plan([tmp_path / "one", tmp_path / "two"]).modules) == 2

    def test_the_layers_of_one_tower_are_alike(self, tmp_path):
        write_adapter(tmp_path / "one", {"model.layers.0.self_attn.qkv_proj": Linear(12, 8)})
        write_adapter(tmp_path / "two", {"model.layers.1.self_attn.q_proj": Linear(4, 8)})
        with pytest.raises(PlanError, match="No model has both"):
            plait.plan([tmp_path / "one", tmp_path / "two"])

    def test_experts_of_another_version(self, tmp_path):
        """Mixtral's experts were in `block_sparse_moe` one by one; since transformers 5 they are in `mlp`, fused."""
        fused = {"model.layers.0.mlp.experts.gate_up_proj": Experts(2, 12, 8)}
        write_adapter(tmp_path / "new", fused, target_parameters=["mlp.experts.gate_up_proj"])
        write_adapter(tmp_path / "old", {f"model.layers.0.block_sparse_moe.experts.{i}.w1": Linear(6, 8) for i in range(2)})
        with pytest.raises(PlanError, match="the same experts one by one"):
            plait.plan([tmp_path / "new", tmp_path / "old"])
