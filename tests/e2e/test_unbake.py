"""`plait un-bake`: an adapter taken out of a baked model again, and what rounding leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.cli.main import main
from tests.adapters_on_disk import layers, write_adapter
from tests.command_line import exit_code

SHAPES = {"q_proj": (12, 8), "v_proj": (8, 8)}
MODULES = layers(2, SHAPES)
NAMES = [f"{module}.weight" for module in MODULES]


def model(folder: Path, dtype: torch.dtype) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(SHAPES[n.split(".")[-2]], generator=generator).to(dtype) for n in NAMES}
    folder.mkdir()
    save_file({**tensors, "model.norm.weight": torch.ones(8, dtype=dtype)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "a", MODULES, seed=1, base=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_remains_is_rounding_and_is_measured(adapter, tmp_path, dtype):
    base = model(tmp_path / "base", dtype)
    baked = plait.bake({"a": adapter.folder}, weights=[0.5], base_model=str(base), out=tmp_path / "baked").folder
    result = plait.unbake(baked, adapter.folder, weight=0.5, original=base, out=tmp_path / "restored")
    before, between, after = (load_file(f / "model.safetensors") for f in (base, baked, result.bake.folder))
    unequal, largest = 0, 0.0
    for name, original in before.items():
        gap = (after[name].double() - original.double()).abs()
        unit = torch.finfo(dtype).eps * torch.maximum(between[name].double().abs(), original.double().abs())
        if dtype == torch.float32:  # the sums themselves are rounded to it, and the delta may be the larger number
            unit = 4 * (unit + torch.finfo(dtype).eps * (between[name].double() - original.double()).abs())
        assert (gap <= unit).all(), "one unit in the last place of the larger number"
        unequal, largest = unequal + int((gap > 0).sum()), max(largest, float(gap.max()))
    found = result.remaining
    assert found is not None
    assert (found.unequal, found.largest) == (unequal, largest)
    assert found.entries == sum(t.numel() for t in before.values())
    assert found.unequal > 0
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    assert plait.verify(result.bake.folder).ok


def test_the_models_lock_knows_the_weight(adapter, tmp_path):
    base = model(tmp_path / "base", torch.float32)
    baked = plait.bake({"a": adapter.folder}, weights=[0.5], base_model=str(base), out=tmp_path / "baked").folder
    with pytest.raises(plait.PlanError, match=r"'a' was baked in with weight 0\.5; give --weight 0\.5"):
        plait.unbake(baked, adapter.folder, out=tmp_path / "out")
    other = write_adapter(tmp_path / "other", MODULES, seed=2, base=None)
    trimmed = plait.bake(
        {"a": adapter.folder, "b": other.folder}, method="ties", base_model=str(base), out=tmp_path / "ties"
    ).folder
    with pytest.raises(plait.PlanError, match="not baked in as a plain weighted delta"):
        plait.unbake(trimmed, adapter.folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_in_the_model(adapter, tmp_path):
    base = model(tmp_path / "base", torch.float32)
    baked = plait.bake({"a": adapter.folder}, base_model=str(base), out=tmp_path / "baked").folder
    other = write_adapter(tmp_path / "other", MODULES, seed=2, base=None).folder
    with pytest.raises(plait.PlanError, match=r"the inputs in its plait.lock are 'a', and .*other is not one of these"):
        plait.unbake(baked, other, out=tmp_path / "out")
    assert plait.unbake(baked, other, weight=1, out=tmp_path / "out").weight == 1
    (baked / "plait.lock").write_text("{}")
    with pytest.raises(plait.AdapterError, match="not a lock that can be read"):
        plait.unbake(baked, adapter.folder, out=tmp_path / "broken")


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_what_an_adapter_holds_whole_is_left_alone(tmp_path, capsys):
    """A head that the bake did not take is not put in; a copy of the embedding, which PEFT saves, does not undo the bake."""
    import transformers as tf

    from tests.baking_models import make_adapter, save_model

    base = save_model("llama", tmp_path / "base")
    targets = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    pair = {n: make_adapter(base, tmp_path / n, s, tf.AutoModelForCausalLM, **targets) for s, n in enumerate("ab")}
    assert any("embed_tokens.base_layer" in name for name in load_file(pair["a"] / "adapter_model.safetensors"))
    between = plait.bake([pair["b"]], base=base, out=tmp_path / "b-alone").folder
    two = plait.bake(pair, base=base, out=tmp_path / "two").folder
    result = plait.unbake(two, pair["a"], out=tmp_path / "restored")
    assert result.left == ("lm_head.weight",)
    one, expected, before = (load_file(f / "model.safetensors") for f in (result.bake.folder, between, base))
    assert torch.equal(one["lm_head.weight"], before["lm_head.weight"]), "two heads: the bake had kept them apart"
    for name in expected.keys() - {"lm_head.weight"}:
        torch.testing.assert_close(one[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert plait.verify(result.bake.folder).ok
    with pytest.raises(SystemExit):
        main(["un-bake", str(two), str(pair["a"]), "-o", str(tmp_path / "again")])
    assert "holds lm_head.weight in full" in " ".join(capsys.readouterr().err.split())


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_dora_cannot_be_subtracted(tmp_path):
    import transformers as tf

    from tests.baking_models import make_adapter, save_model

    base = save_model("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", 0, tf.AutoModelForCausalLM, target_modules=["q_proj"], use_dora=True)
    baked = plait.bake([adapter], base=base, out=tmp_path / "baked").folder
    with pytest.raises(plait.PlanError, match="DoRA scales rows by the norms"):
        plait.unbake(baked, adapter, out=tmp_path / "out")


@pytest.mark.parametrize("weight", [0.0, float("nan")])
def test_a_weight_that_takes_nothing_out(adapter, tmp_path, weight):
    base = model(tmp_path / "base", torch.float32)
    with pytest.raises(plait.RecipeError, match="give the number that the adapter was baked with"):
        plait.unbake(base, adapter.folder, weight=weight, out=tmp_path / "out")


def test_an_original_that_is_none_is_refused_before_any_work(adapter, tmp_path):
    base, other = model(tmp_path / "base", torch.float32), model(tmp_path / "other", torch.bfloat16)
    baked = plait.bake({"a": adapter.folder}, base_model=str(base), out=tmp_path / "baked").folder
    with pytest.raises(plait.PlanError, match=r"is not what .* was before the bake: 5 tensors"):
        plait.unbake(baked, adapter.folder, original=other, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(adapter, tmp_path, capsys):
    base = model(tmp_path / "base", torch.bfloat16)
    baked = plait.bake({"a": adapter.folder}, base_model=str(base), out=tmp_path / "baked").folder

    def run(*arguments: object) -> str:
        assert exit_code(*map(str, ("un-bake", baked, adapter.folder, *arguments))) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "--original measures it" in run("-o", tmp_path / "one")
    assert "rounding remains:" in run("-o", tmp_path / "two", "--original", base)
    assert json.loads(run("-o", tmp_path / "three", "--original", base, "--json"))["remaining"]["unequal"] > 0
