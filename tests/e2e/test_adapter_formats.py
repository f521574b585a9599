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
from tests.read_adapters import Arrays, close, deltas, random

LINEAR = {f"model.layers.{i}.self_attn.{n}": Linear(8, 6) for i in range(2) for n in ("q_proj", "v_proj")}


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
        settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": given, "model": "org/base"} | config
        (folder / "adapter_config.json").write_text(json.dumps(settings))
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
        settings = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
        assert (settings["lora_parameters"]["rank"], settings["lora_parameters"]["scale"], settings["num_layers"]) == (
            5,
            4.0,
            -1,
        )
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


BLOCKS = {
    f"model.layers.{i}.{n}": Linear(16, 6) for i in range(2) for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
}


class TestGguf:
    @pytest.fixture
    def base(self, tmp_path) -> Path:
        """A base model's folder, of which its configuration is read."""
        (tmp_path / "base").mkdir()
        settings = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
        (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
        return tmp_path / "base"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_ggufs_own_reader_finds_what_was_written(self, base, tmp_path, dtype):
        import gguf

        write_adapter(tmp_path / "a", BLOCKS, r=3, alpha=5.0, base=str(base), dtype=dtype)
        plait.convert(tmp_path / "a", to="gguf", out=tmp_path / "g")
        reader = gguf.GGUFReader(tmp_path / "g" / "adapter.gguf")
        fields = {name: reader.fields[name].contents() for name in ("general.type", "adapter.type", "adapter.lora.alpha")}
        assert fields == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 5.0}
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        held = {t.name: t for t in reader.tensors}
        before = load_file(tmp_path / "a" / "adapter_model.safetensors")
        for path in BLOCKS:
            name = names.get_name(path)
            a, b = (before[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
            if "_proj" in path and "self_attn" in path:  # llama.cpp's conversion puts the halves of a head next to each other
                heads = 4 if "q_proj" in path else 2
                b = torch.stack([head.reshape(2, -1, 3).transpose(0, 1).reshape(-1, 3) for head in b.chunk(heads)]).reshape(
                    b.shape
                )
            for x, wanted in (("a", a), ("b", b)):
                tensor = held[f"{name}.weight.lora_{x}"]
                assert tensor.tensor_type.name == {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
                assert tensor.shape.tolist() == list(wanted.shape[::-1])
                assert tensor.data.tobytes() == wanted.contiguous().view(torch.uint8).numpy().tobytes()

    def test_back_again_is_the_same_delta(self, base, tmp_path):
        write_adapter(tmp_path / "a", BLOCKS, r=3, alpha=5.0, base="org/base")
        plait.convert(tmp_path / "a", to="gguf", base_model=str(base), out=tmp_path / "g")
        with pytest.raises(AdapterError, match=r"rows in llama\.cpp's order.*Put the config\.json of the base model next to"):
            Adapter.open(tmp_path / "g" / "adapter.gguf", "g")
        (tmp_path / "with").mkdir()
        (tmp_path / "g" / "adapter.gguf").rename(tmp_path / "with" / "adapter.gguf")
        (base / "config.json").rename(tmp_path / "with" / "config.json")
        close(deltas(tmp_path / "with" / "adapter.gguf"), deltas(tmp_path / "a"))

    def test_llama_cpps_scaling_is_alpha_by_the_tensors_own_rank(self, tmp_path):
        import gguf

        for alpha, scale in ((6.0, 2.0), (0.0, 1.0)):
            writer = gguf.GGUFWriter(str(tmp_path / f"{alpha}.gguf"), "qwen2")
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", alpha)
            a, b = random(3, 6), random(8, 3, seed=1)
            writer.add_tensor("blk.1.attn_q.weight.lora_a", a.numpy())
            writer.add_tensor("blk.1.attn_q.weight.lora_b", b.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            product = (b.double() @ a.double()).numpy()
            close(deltas(tmp_path / f"{alpha}.gguf"), {"model.layers.1.self_attn.q_proj": scale * product}, 1e-15)
        plait.merge([tmp_path / "6.0.gguf", tmp_path / "0.0.gguf"], out=tmp_path / "out", format="peft")
        found = deltas(tmp_path / "out")
        close(found, {"model.layers.1.self_attn.q_proj": (2.0 + 1.0) * product}, 1e-6)

    def test_what_has_no_name_there_is_refused(self, base, tmp_path):
        write_adapter(tmp_path / "a", {"model.layers.0.mlp.strange": Linear(8, 6)}, base=str(base))
        with pytest.raises(PlanError, match=r"1 modules have no name in GGUF's 'llama'"):
            plait.convert(tmp_path / "a", to="gguf", out=tmp_path / "g")
        write_adapter(tmp_path / "b", BLOCKS, base=None)
        with pytest.raises(PlanError, match=r"needs the base model's config\.json"):
            plait.convert(tmp_path / "b", to="gguf", out=tmp_path / "g")

    @pytest.mark.parametrize("cut", [0, 3, 10, 60, 200, -1])
    def test_damaged_files_are_refused(self, base, tmp_path, cut):
        write_adapter(tmp_path / "a", BLOCKS, base=str(base))
        plait.convert(tmp_path / "a", to="gguf", out=tmp_path / "g")
        data = (tmp_path / "g" / "adapter.gguf").read_bytes()
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(AdapterError, match=r"cut\.gguf"):
            Adapter.open(tmp_path / "cut.gguf", "cut")


class TestNumberedFiles:
    def split(self, folder: Path) -> None:
        """Put an adapter's tensors into two files, as accelerate numbers them."""
        held = load_file(folder / "adapter_model.safetensors")
        for i in (0, 1):
            part = {n: t for j, (n, t) in enumerate(sorted(held.items())) if j % 2 == i}
            save_file(part, folder / f"adapter_model-{i + 1:05}-of-00002.safetensors")
        (folder / "adapter_model.safetensors").unlink()

    def test_are_one_adapter(self, tmp_path):
        written = write_adapter(tmp_path / "a", LINEAR)
        self.split(tmp_path / "a")
        close(deltas(tmp_path / "a"), written.deltas, 1e-15)
        plait.merge([tmp_path / "a"], out=tmp_path / "out")
        assert exit_code("verify", tmp_path / "out") == 0
        (tmp_path / "a" / "adapter_model-00002-of-00002.safetensors").unlink()
        missing = "an adapter in several files, of which adapter_model-00002-of-00002.safetensors is missing. Fetch it too."
        with pytest.raises(AdapterError, match=missing):
            Adapter.open(tmp_path / "a", "a")
        first = tmp_path / "a" / "adapter_model-00001-of-00002.safetensors"
        first.rename(tmp_path / "a" / "adapter_model-00002-of-00004.safetensors")
        missing = (
            r"adapter_model-00001-of-00004.safetensors, .*-00003-.*, .*-00004-of-00004.safetensors are missing. Fetch them"
        )
        with pytest.raises(AdapterError, match=missing):
            Adapter.open(tmp_path / "a", "a")

    def test_one_too_many_is_refused(self, tmp_path):
        write_adapter(tmp_path / "a", LINEAR)
        self.split(tmp_path / "a")
        save_file({"x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "a" / "adapter_model-00003-of-00002.safetensors")
        with pytest.raises(AdapterError, match="a numbered file 3 of 2: they are not of one adapter"):
            Adapter.open(tmp_path / "a", "a")

    def test_hold_all_that_their_index_names(self, tmp_path):
        written = write_adapter(tmp_path / "a", LINEAR)
        self.split(tmp_path / "a")
        held = [n for p in (tmp_path / "a").glob("*.safetensors") for n in load_file(p)]
        index = tmp_path / "a" / "adapter_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(held, "../elsewhere.safetensors")}))
        close(deltas(tmp_path / "a"), written.deltas, 1e-15)
        for text, message in (
            (
                json.dumps({"weight_map": dict.fromkeys([*held, "lost"], "x")}),
                "names 1 tensors that no numbered file holds: 'lost'",
            ),
            ('{"weight_map": []}', r"weight_map is \[\]"),
            ("{", "not JSON"),
        ):
            index.write_text(text)
            with pytest.raises(AdapterError, match=message):
                Adapter.open(tmp_path / "a", "a")

    def test_beside_one_file_are_said(self, tmp_path):
        write_adapter(tmp_path / "a", LINEAR)
        held = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
        self.split(tmp_path / "a")
        (tmp_path / "a" / "adapter_model.safetensors").write_bytes(held)
        (note,) = plait.plan([tmp_path / "a"]).notes
        assert "is read, and not adapter_model-00001-of-00002.safetensors, adapter_model-00002-of-00002" in note

    def test_a_change_in_the_second_is_seen(self, tmp_path):
        write_adapter(tmp_path / "a", LINEAR)
        self.split(tmp_path / "a")
        plait.merge([tmp_path / "a"], out=tmp_path / "out")
        second = tmp_path / "a" / "adapter_model-00002-of-00002.safetensors"
        save_file({n: t + 1 for n, t in load_file(second).items()}, second)
        assert exit_code("verify", tmp_path / "out") != 0

    def test_a_change_in_the_second_is_another_adapter_to_an_evaluation(self, tmp_path):
        write_adapter(tmp_path / "a", LINEAR)
        self.split(tmp_path / "a")
        before = Adapter.open(tmp_path / "a", "a").sha256()
        second = tmp_path / "a" / "adapter_model-00002-of-00002.safetensors"
        save_file({n: t + 1 for n, t in load_file(second).items()}, second)
        assert Adapter.open(tmp_path / "a", "a").sha256() != before


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
        assert exit_code("merge", tmp_path / "a", "--to", "mlx", "-o", tmp_path / "merged") == 0
        close(deltas(tmp_path / "merged"), deltas(tmp_path / "a"), 1e-6)
        assert exit_code("merge", tmp_path / "a", "--to", "mxl", "-o", tmp_path / "other") == 2
        assert "'mxl' is not a format of adapters. Did you mean 'mlx'?" in capsys.readouterr().err
        assert exit_code("convert", tmp_path / "a", "--to", "mlx", "-o", tmp_path / "out") == 2
        assert exit_code("convert", tmp_path / "a", "--to", "mlx", "-o", tmp_path / "out", "--force") == 0
