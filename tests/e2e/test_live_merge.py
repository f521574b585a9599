"""`plait.mixture.load`: adapters or a recipe → a live merged model, without a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import plait
from plait import mixture
from plait.adapters import Adapter
from plait.errors import AddressError, RecipeError
from tests.language_models import language_model, save_model
from tests.mixtures import fingerprint

# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
IDS = torch.arange(24).reshape(3, 8) + 4
MERGES = {
    "linear": {"weights": [0.7, -0.4]},
    "ties": {"method": "ties", "density": 0.5, "rank": 3},
    "dare in core, bfloat16": {"method": "dare_ties", "density": 0.6, "space": "core", "seed": 3, "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    save_model(folder / "base")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + seed, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(language_model(), config)
        model.save_pretrained(folder / name)
    return folder


def pair(place: Path) -> dict[str, Path]:
    return {name: place / name for name in "ab"}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@torch.no_grad()
@pytest.mark.parametrize("name", MERGES)
def test_it_is_what_merge_writes_and_peft_loads(place, tmp_path, monkeypatch, name):
    """Bit for bit the saved adapter in a mixture of its own, to rounding PEFT's, and no file anywhere."""
    saved = plait.merge(pair(place), out=tmp_path / "out", **MERGES[name]).folder
    with mixture.Mixture.load(place / "base", [Adapter.open(saved, "saved")]).active({"saved": 1.0}) as model:
        exact = model(IDS).logits
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), str(saved))
    monkeypatch.chdir(tmp_path)
    before = files(place), files(tmp_path)
    with mixture.load(pair(place), base=place / "base", **MERGES[name]) as live:
        assert torch.equal(live.model(IDS).logits, exact)
    torch.testing.assert_close(exact, peft.eval()(IDS).logits, atol=1e-4, rtol=1e-4)
    assert (files(place), files(tmp_path)) == before


@torch.no_grad()
def test_single_adapters_stand_in_and_the_merge_comes_back(place):
    live = mixture.load(pair(place), base=place / "base", weights=[0.5, 0.5])
    merged = live.model(IDS).logits
    with live.mixture.active({"a": 1.0}) as model:
        alone = model(IDS).logits
    peft = PeftModel.from_pretrained(language_model(), str(place / "a")).eval()
    torch.testing.assert_close(alone, peft(IDS).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(live.model(IDS).logits, merged)
    assert not torch.equal(alone, merged)
    live.close()
    base = mixture.Mixture.load(place / "base", [])
    assert torch.equal(live.model(IDS).logits, base.model(IDS).logits)
    assert [part[0] for part in fingerprint(live.model)] == [part[0] for part in fingerprint(base.model)]
    assert all(part[5:9] == (0, 0, 0, 0) for part in fingerprint(live.model)), "no hook is left"
    live.close()  # a second time does nothing


def test_it_generates_with_its_own_tokenizer(place):
    with mixture.load(pair(place), base=place / "base") as live:
        ids = live.tokenizer("sort w3 :", return_tensors="pt").input_ids
        out = live.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 5)


@torch.no_grad()
def test_a_recipes_paths_start_at_its_folder(place, monkeypatch, tmp_path):
    recipe = {"base_model": "base", "adapters": [{"name": n, "path": n, "weight": 0.3} for n in "ab"]}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    with mixture.load(place / "recipe.yaml") as one, mixture.load(pair(place), base=place / "base", weights=[0.3, 0.3]) as two:
        assert torch.equal(one.model(IDS).logits, two.model(IDS).logits)
        assert [a.weight for a in one.recipe.adapters] == [0.3, 0.3]
    complete = plait.load_recipe(place / "recipe.yaml")
    with pytest.raises(RecipeError, match="a Recipe is complete; put scale into it"):
        mixture.load(complete, scale=2.0)


def test_an_unknown_base_is_said(place, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for file in (place / name).iterdir():
            text = file.read_bytes()
            (tmp_path / name / file.name).write_bytes(text)
        config = tmp_path / name / "adapter_config.json"
        data = yaml.safe_load(config.read_text()) | {"base_model_name_or_path": None}
        config.write_text(json.dumps(data))
    with pytest.raises(AddressError, match="no adapter names it"):
        mixture.load(pair(tmp_path))
