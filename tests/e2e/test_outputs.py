"""What is written besides the plain adapter: dense deltas, ranks by energy, heads, cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import plait
from plait.notices import PlaitWarning
from tests.small_models import both_active, loaded, net, peft_adapter, save_base

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore::UserWarning:torch")]

IDS = torch.arange(48).reshape(3, 16) % 20
EVERYTHING = {
    "target_modules": ["embed", "q_proj", "v_proj", "conv1", "conv2"],
    "target_parameters": ["experts.gate_up_proj"],
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pair")
    first = peft_adapter(folder / "a", 1, **EVERYTHING)
    return {"a": first, "b": peft_adapter(folder / "b", 2, **EVERYTHING, use_rslora=True)}


def test_dense_delta_added_to_the_base_is_the_merge(pair, tmp_path):
    weights = {"a": 0.7, "b": -0.4}
    result = plait.merge(pair, weights=weights, kind="delta", out=tmp_path / "delta")
    assert result.record.result == "dense"
    deltas = load_file(result.folder / "delta.safetensors")
    model = net()
    parameters = dict(model.named_parameters())
    assert set(deltas) <= set(parameters)
    with torch.no_grad():
        for name, delta in deltas.items():
            parameters[name] += delta
        torch.testing.assert_close(model(IDS), both_active(pair, weights, IDS), rtol=1e-4, atol=1e-5)


def test_dense_delta_of_conv1d_is_in_its_orientation(tmp_path):
    config = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    pair = {n: peft_adapter(tmp_path / n, seed, **config) for seed, n in enumerate("ab")}
    result = plait.merge(pair, kind="delta", out=tmp_path / "delta")
    model = net()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in load_file(result.folder / "delta.safetensors").items():
            parameters[name] += delta
        torch.testing.assert_close(model(IDS), both_active(pair, {"a": 1, "b": 1}, IDS), rtol=1e-4, atol=1e-5)


def test_dense_delta_of_an_elementwise_method_is_not_truncated(pair, tmp_path):
    dense = plait.merge(pair, method="ties", kind="delta", out=tmp_path / "delta")
    adapter = plait.merge(pair, method="ties", rank=64, out=tmp_path / "full")
    deltas = load_file(dense.folder / "delta.safetensors")
    model = net()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            parameters[name] += delta
        torch.testing.assert_close(model(IDS), loaded(adapter.folder, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_rank_by_energy(pair, tmp_path, energy):
    result = plait.merge(pair, rank=f"energy:{energy}", layout="pattern", out=tmp_path / "out")
    assert all(m.kept >= energy - 1e-6 for m in result.record.modules)
    config = json.loads((result.folder / "adapter_config.json").read_text())
    lower = {m.target: m.rank for m in result.record.modules if m.rank > 1}
    for target, rank in lower.items():
        if rank - 1 and energy < 1:
            one_less = plait.merge(pair, rank=rank - 1, out=tmp_path / "less", force=True)
            kept = {m.target: m.kept for m in one_less.record.modules}[target]
            assert kept < energy
            break
    assert config["r"] == result.record.rank
    loaded(result.folder, IDS)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_dtype(pair, tmp_path, dtype, tolerance):
    result = plait.merge(pair, dtype=dtype, out=tmp_path / "out")
    tensors = load_file(result.folder / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    exact = plait.merge(pair, out=tmp_path / "exact")
    torch.testing.assert_close(loaded(result.folder, IDS), loaded(exact.folder, IDS), rtol=tolerance, atol=tolerance)


def test_compress(pair, tmp_path):
    result = plait.compress(pair["a"], rank=2, out=tmp_path / "small")
    assert result.record.rank == 2
    assert 0 < result.record.lowest_kept <= result.record.kept < 1
    with pytest.warns(PlaitWarning, match="not smaller"):  # nothing is lost, and nothing saved
        whole = plait.compress(pair["a"], rank=64, out=tmp_path / "whole")
    assert whole.record.result == "exact"
    torch.testing.assert_close(loaded(whole.folder, IDS), loaded(pair["a"], IDS), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("heads")
    config = {"target_modules": ["q_proj"], "modules_to_save": ["head"], "task_type": None}
    return {n: peft_adapter(folder / n, seed, **config) for seed, n in enumerate("ab")}


def test_heads_are_kept_apart(with_heads, tmp_path):
    result = plait.merge(with_heads, out=tmp_path / "out")
    assert "head" not in " ".join(load_file(result.folder / "adapter_model.safetensors"))
    assert "heads and other full tensors of a, b" in " ".join(result.plan.notes)
    for name, source in with_heads.items():
        kept = load_file(result.folder / "heads" / name / "heads.safetensors")
        original = load_file(source / "adapter_model.safetensors")
        assert set(kept) == {k for k in original if "head" in k}
        assert all(torch.equal(kept[k], original[k]) for k in kept)
        assert json.loads((result.folder / "heads" / name / "heads.json").read_text())["modules_to_save"] == ["head"]
    loaded(result.folder, IDS)


def test_head_of_one(with_heads, tmp_path):
    result = plait.merge(with_heads, heads={"policy": "from", "adapter": "b"}, weights=[0, 1], out=tmp_path / "out")
    file = (result.folder / "adapter_model.safetensors").read_bytes()
    assert result.plan.output_bytes == len(file) - 8 - int.from_bytes(file[:8], "little")
    torch.testing.assert_close(loaded(result.folder, IDS), loaded(with_heads["b"], IDS), rtol=1e-5, atol=1e-5)


def test_averaged_heads(with_heads, tmp_path):
    result = plait.merge(with_heads, heads={"policy": "average"}, out=tmp_path / "out")
    sources = [load_file(f / "adapter_model.safetensors") for f in with_heads.values()]
    merged = load_file(result.folder / "adapter_model.safetensors")
    for name in (k for k in sources[0] if "head" in k):
        torch.testing.assert_close(merged[name], (sources[0][name] + sources[1][name]) / 2)
    loaded(result.folder, IDS)


def test_trained_tokens_are_kept_apart(tmp_path):
    config = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [1, 2]}}
    pair = {n: peft_adapter(tmp_path / n, seed, **config) for seed, n in enumerate("ab")}
    result = plait.merge(pair, out=tmp_path / "out")
    assert not [k for k in load_file(result.folder / "adapter_model.safetensors") if "token" in k]
    (name,) = load_file(result.folder / "heads" / "a" / "heads.safetensors")
    assert name.endswith("trainable_tokens_delta")
    chosen = plait.merge(pair, heads={"policy": "from", "adapter": "a"}, weights=[1, 0], out=tmp_path / "from")
    torch.testing.assert_close(loaded(chosen.folder, IDS), loaded(pair["a"], IDS), rtol=1e-5, atol=1e-5)


def test_card(tmp_path):
    config = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    folders = {}
    for seed, name in enumerate("ab"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        model = get_peft_model(net(), LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config, "base_model_name_or_path": "org/base"}))
        (tmp_path / name / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
        folders[name] = tmp_path / name
    result = plait.merge(folders, method="ties", out=tmp_path / "out")
    text = (result.folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft"
    assert front["base_model"] == "org/base"
    assert front["base_model_relation"] == "adapter"
    assert front["tags"] == ["lora", "peft", "merge", "plait", "base_model:adapter:org/base"]
    assert front["pipeline_tag"] == "text-generation"
    assert front["license"] == "mit"
    assert "--max-lora-rank 8" in text
    assert "truncated" in text
    (tmp_path / "b" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    other = plait.merge(folders, out=tmp_path / "other")
    assert "license" not in yaml.safe_load((other.folder / "README.md").read_text().split("---")[1]), "never guessed"


def test_cards_of_other_outputs(pair, tmp_path):
    dense = plait.merge(pair, kind="delta", out=tmp_path / "dense")
    text = (dense.folder / "README.md").read_text()
    assert "The dense deltas" in text
    assert "PeftModel" not in text
    by_energy = plait.merge(pair, rank="energy:0.5", out=tmp_path / "energy")
    assert "max-lora-rank" not in (by_energy.folder / "README.md").read_text(), "vLLM serves no experts and convolutions"
    assert str(tmp_path) not in (by_energy.folder / "README.md").read_text(), "no folder of this machine in a public page"


def test_selection_of_an_adapter_with_a_head_is_not_copied(tmp_path):
    """`target_modules` may name what `modules_to_save` exempts; copied alone it would wrap the head."""
    config = {"target_modules": ["q_proj", "head"], "modules_to_save": ["head"]}
    pair = {n: peft_adapter(tmp_path / n, seed, **config) for seed, n in enumerate("ab")}
    result = plait.merge(pair, out=tmp_path / "out")
    selected = json.loads((result.folder / "adapter_config.json").read_text())["target_modules"]
    assert selected == ["layers.0.q_proj", "layers.1.q_proj"]
    loaded(result.folder, IDS)


def test_grouped_convolutions_tell_pefts_rank(tmp_path):
    pair = {n: peft_adapter(tmp_path / n, seed, r=6, target_modules=["grouped"]) for seed, n in enumerate("ab")}
    result = plait.merge(pair, rank=2, out=tmp_path / "out")
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert config["r"] == result.record.rank == result.plan.rank == 4
    loaded(result.folder, IDS)


def test_dora_without_a_direction_is_refused(tmp_path):
    base = save_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["layers.0.q_proj.weight"][3] = 0
    save_file(tensors, base / "model.safetensors")
    folder = peft_adapter(tmp_path / "a", 1, target_modules=["q_proj"], use_dora=True)
    factors = load_file(folder / "adapter_model.safetensors")
    factors["base_model.model.layers.0.q_proj.lora_B.weight"][3] = 0
    save_file(factors, folder / "adapter_model.safetensors")
    with pytest.raises(plait.PlanError, match=r"layers.0.q_proj: 1 rows of the base model vanish"):
        plait.merge([folder], base_model=str(base), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_common_mode_is_on_record(tmp_path):
    pair = {
        "a": peft_adapter(tmp_path / "a", 1, target_modules=["q_proj", "v_proj"]),
        "b": peft_adapter(tmp_path / "b", 2, target_modules=["q_proj"]),
    }
    result = plait.merge(pair, merge_mode="common", out=tmp_path / "out")
    assert "leaves 2 modules out" in " ".join(result.record.notes)


def test_runs_of_one_second_do_not_share_a_folder(pair, tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda scale: plait.merge(pair, scale=scale, workers=1), (1.0, 2.0, 3.0, 4.0)))
    assert len({r.folder for r in results}) == 4
    assert {json.loads((r.folder / "merge_metadata.json").read_text())["recipe"]["scale"] for r in results} == {1, 2, 3, 4}


def test_somebody_else_was_faster(pair, tmp_path):
    """Without --force a folder that appears while the merge runs is left alone."""
    from plait.results.staging import staged

    def race() -> None:
        with staged(tmp_path / "out", force=False) as place:
            (place / "mine").write_text("late")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("first")

    with pytest.raises(plait.OutputError, match="written by another process"):
        race()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["theirs"]
