"""Adapters that PEFT did not write: read as their programs add them to weights, merged, converted, written back.

What a program computes is written out here from its documentation, or asked of the program itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.adapters import Adapter
from plait.errors import AdapterError, PlaitError, PlanError, RecipeError
from tests.adapters_on_disk import Embedding, Linear, read_deltas, write_adapter
from tests.command_line import exit_code

Arrays = dict[str, np.ndarray]
LINEAR = {f"model.layers.{i}.self_attn.{n}": Linear(8, 6) for i in range(2) for n in ("q_proj", "v_proj")}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def deltas(place: Path) -> Arrays:
    """Return what plait reads, in float64."""
    adapter = Adapter.open(place, "it")
    return {p: t.scaling * adapter.read(p, torch.float64)[0].dense().numpy() for p, t in adapter.targets.items()}


def close(found: Arrays, wanted: Arrays, tolerance: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        assert np.abs(found[path] - value).max() <= tolerance * np.abs(value).max(), path


class TestMlx:
    def write(self, folder: Path, *, scale: float = 20.0, rank: int = 4, seed: int = 0, **config: Any) -> Arrays:
        """Write what mlx_lm.lora saves; return scale · (lora_a lora_b)ᵀ, which mlx_lm.fuse adds to a weight."""
        tensors, wanted = {}, {}
        for i, path in enumerate([*LINEAR, "model.embed_tokens"]):
            rows, columns = (12, 6) if "embed" in path else (6, 8)  # tokens × width; inputs × outputs
            a, b = random(rows, rank, seed=seed + 2 * i), random(rank, columns, seed=seed + 2 * i + 1)
            tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
            wanted[path] = scale * (a.double() @ b.double()).mT.numpy()
        folder.mkdir()
        save_file(tensors, folder / "adapters.safetensors")
        given = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
        said = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": given, "model": "org/base"} | config
        (folder / "adapter_config.json").write_text(json.dumps(said))
        return wanted

    def test_is_read_as_its_fuse_adds_it(self, tmp_path):
        wanted = self.write(tmp_path / "a")
        close(deltas(tmp_path / "a"), wanted, 1e-15)
        opened = Adapter.open(tmp_path / "a", "a")
        assert (opened.origin.format, opened.config.base_model, opened.ranks) == ("mlx", "org/base", (4,))
        assert opened.targets["model.embed_tokens"].layout.kind == "embedding"

    def test_merges_with_an_adapter_of_peft(self, tmp_path):
        wanted = self.write(tmp_path / "a")
        other = write_adapter(tmp_path / "b", LINEAR, base="org/base")
        plait.merge([tmp_path / "a", tmp_path / "b"], weights=[0.5, 2.0], out=tmp_path / "out")
        found = read_deltas(tmp_path / "out", LINEAR)
        for path in LINEAR:
            assert np.abs(found[path] - 0.5 * wanted[path] - 2 * other.deltas[path]).max() < 1e-4
        assert exit_code("verify", tmp_path / "out") == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_peft_to_mlx_and_back_is_the_same_delta(self, tmp_path, dtype):
        modules = {**LINEAR, "model.embed_tokens": Embedding(12, 6)}
        write_adapter(tmp_path / "a", modules, dtype=dtype, r=3, alpha=5.0, seed=1)
        plait.convert(tmp_path / "a", to="mlx", out=tmp_path / "mlx")
        plait.convert(tmp_path / "mlx", to="peft", out=tmp_path / "back")
        first, last = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "back"))
        assert first.keys() == last.keys()
        assert all(torch.equal(first[n], last[n]) and first[n].dtype == last[n].dtype for n in first)
        close(deltas(tmp_path / "back"), deltas(tmp_path / "a"))
        assert exit_code("verify", tmp_path / "mlx") == 0

    def test_ranks_and_scalings_of_modules_become_one(self, tmp_path):
        modules = {p: Linear(8, 6, rank=2 + i, alpha=4.0 * (2 + i) if i else 3.0) for i, p in enumerate(LINEAR)}
        write_adapter(tmp_path / "a", modules)
        result = plait.convert(tmp_path / "a", to="mlx", out=tmp_path / "mlx")
        assert result.plan.notes == ("mlx-lm has one scale for all modules: that of 1 others is multiplied into B.",)
        said = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
        assert (said["lora_parameters"]["rank"], said["lora_parameters"]["scale"], said["num_layers"]) == (5, 4.0, -1)
        close(deltas(tmp_path / "mlx"), deltas(tmp_path / "a"), 1e-6)

    @pytest.mark.parametrize(
        ("config", "why"),
        [
            ({"fine_tune_type": "full"}, "complete weights"),
            ({"lora_parameters": {"rank": 4}}, "scale is None"),
            ({"lora_parameters": {"rank": 4, "scale": 2.0, "alpha": 8}}, "early versions of mlx-lm"),
            ({"lora_parameters": None}, "lora_parameters is None"),
        ],
    )
    def test_what_cannot_be_known_is_refused(self, tmp_path, config, why):
        self.write(tmp_path / "a", **config)
        with pytest.raises(AdapterError, match=why):
            Adapter.open(tmp_path / "a", "a")

    def test_strange_tensors_are_refused_by_name(self, tmp_path):
        self.write(tmp_path / "a")
        held = load_file(tmp_path / "a" / "adapters.safetensors")
        save_file(held | {"model.norm.weight": torch.ones(2)}, tmp_path / "a" / "adapters.safetensors")
        with pytest.raises(AdapterError, match=r"1 tensors are not of mlx-lm's LoRA: 'model\.norm\.weight'"):
            Adapter.open(tmp_path / "a", "a")


class TestConvert:
    def test_formats_have_names(self, tmp_path):
        write_adapter(tmp_path / "a", LINEAR)
        with pytest.raises(RecipeError, match=r"--to mxl: no such format\. Did you mean 'mlx'"):
            plait.convert(tmp_path / "a", to="mxl", out=tmp_path / "out")
        with pytest.raises(PlanError, match="format 'peft' already"):
            plait.convert(tmp_path / "a", to="peft", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_heads_have_no_place_elsewhere(self, tmp_path):
        write_adapter(tmp_path / "a", LINEAR, extra={"score.weight": torch.ones(2, 8)}, modules_to_save=["score"])
        with pytest.raises(PlanError, match=r"also has score\.weight"):
            plait.convert(tmp_path / "a", to="mlx", out=tmp_path / "out")

    def test_a_tower_of_one_model(self, tmp_path):
        write_adapter(tmp_path / "a", LINEAR)
        with pytest.raises(PlaitError, match="It is of one model"):
            plait.convert(tmp_path / "a", to="mlx", out=tmp_path / "out", tower="unet")

    def test_the_command(self, tmp_path, capsys):
        write_adapter(tmp_path / "a", LINEAR)
        assert exit_code("convert", tmp_path / "a", "--to", "mlx", "-o", tmp_path / "out", "--dry-run") == 0
        assert not (tmp_path / "out").exists()
        assert exit_code("convert", tmp_path / "a", "--to", "mlx", "-o", tmp_path / "out") == 0
        assert "peft to mlx, 4 target modules, rank 2" in capsys.readouterr().out
        assert exit_code("convert", tmp_path / "a", "--to", "mlx", "-o", tmp_path / "out") == 2
        assert exit_code("convert", tmp_path / "a", "--to", "mlx", "-o", tmp_path / "out", "--force") == 0
