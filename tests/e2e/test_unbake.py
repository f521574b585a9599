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
        with pytest.raises(SystemExit) as left:
            main([*map(str, ("un-bake", baked, adapter.folder, *arguments))])
        assert not left.value.code
        return " ".join(capsys.readouterr().out.split())

    assert "--original measures it" in run("-o", tmp_path / "one")
    assert "rounding remains:" in run("-o", tmp_path / "two", "--original", base)
    assert json.loads(run("-o", tmp_path / "three", "--original", base, "--json"))["remaining"]["unequal"] > 0
