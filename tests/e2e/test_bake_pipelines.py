"""Bakes into pipelines of diffusers and into single files under the names of the original code; diffusers is the judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.adapters import Adapter
from plait.baking.journal import open_journal
from plait.errors import AdapterError, PlaitError, PlanError, RecipeError
from tests.command_line import exit_code
from tests.diffusion_models import (
    OF_TEXT,
    WEIGHTS,
    adapted,
    assert_near,
    loaded,
    outputs,
    random,
    save_sd,
    tensors_of,
)
from tests.hub_server import HubServer
from tests.warm import PLAIT, check_killed, run_forked


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return save_sd(tmp_path_factory.mktemp("sd"))


# Waits, to be killed, before it notes the file after some finished ones.
HELD = """
import sys
import plait
from plait.baking import journal
finished, base, out, *adapters = sys.argv[1:]
done, finish = [], journal.BakeJournal.finish
def finish_or_wait(*rest):
    if len(done) == int(finished):
        hold()
    finish(*rest)
    done.append(rest)
journal.BakeJournal.finish = finish_or_wait
plait.bake(adapters, base=base, out=out, workers=1)
"""


class TestPipelines:
    @pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
    def test_is_what_diffusers_computes_with_both_adapters(self, sd, tmp_path):
        result = plait.bake(sd.adapters, weights=list(WEIGHTS), base=sd.base, out=tmp_path / "out")
        live = loaded(sd.base)
        before = outputs(live.unet, live.text_encoder)
        for i, place in enumerate(sd.adapters):
            state, alphas = live.lora_state_dict(place)
            live.load_lora_into_unet(state, alphas, live.unet, adapter_name=f"it{i}")
        live.unet.set_adapters(["it0", "it1"], list(WEIGHTS))
        text = adapted(sd.pipeline.text_encoder, {"it0": 0, "it1": 1}, OF_TEXT, WEIGHTS)
        baked = loaded(tmp_path / "out")
        sides = outputs(baked.unet, baked.text_encoder), outputs(live.unet, text), before
        for found, wanted, without in zip(*sides, strict=True):
            assert_near(found, wanted)
            assert float((wanted - without).norm() / wanted.norm()) > 0.01
        self.check_files(sd, tmp_path / "out", result)
        assert exit_code("verify", tmp_path / "out") == 0

    def check_files(self, sd: SimpleNamespace, out: Path, result: Any) -> None:
        changed = {t.name for s in result.plan.shards for t in s.tensors}
        assert {name.split(".")[0] for name in changed} == {"unet", "text_encoder"}
        before, after = tensors_of(sd.base), tensors_of(out)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            component = name.partition("/")[0]
            same = torch.equal(tensor, after[name])
            assert same != (f"{component}.{name.partition(':')[2]}" in changed), name
        carried = {p.relative_to(sd.base) for p in sd.base.rglob("*") if p.is_file()}
        assert carried <= {p.relative_to(out) for p in out.rglob("*") if p.is_file()}
        for name in carried:
            if name.suffix == ".json" or name.parts[0] == "vae":
                assert (out / name).read_bytes() == (sd.base / name).read_bytes()
        card = (out / "README.md").read_text()
        assert "library_name: diffusers" in card
        assert "DiffusionPipeline.from_pretrained(" in card

    def test_a_plan_names_every_file_and_writes_nothing(self, sd, tmp_path, capsys):
        adapters = [f"{n}={p}" for n, p in zip("ab", sd.adapters, strict=True)]
        assert exit_code("bake", *adapters, "--base-id", sd.base, "-o", tmp_path / "out", "--dry-run", "--json") == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["form"] == "pipeline"
        files = {s["name"] for s in plan["shards"]}
        assert {"vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"} < files
        assert "scheduler/scheduler_config.json" in plan["carried"]
        assert "model_index.json" in plan["carried"]
        assert not list(tmp_path.iterdir())

    def test_a_dtype_is_of_all_components(self, sd, tmp_path):
        plait.bake(sd.adapters, base=sd.base, out=tmp_path / "out", dtype="bfloat16")
        assert {t.dtype for t in tensors_of(tmp_path / "out").values() if t.is_floating_point()} == {torch.bfloat16}
        assert json.loads((tmp_path / "out/text_encoder/config.json").read_text())["dtype"] == "bfloat16"
        assert next(loaded(tmp_path / "out").unet.parameters()).dtype == torch.float32  # as it is loaded without torch_dtype

    def test_copies_without_the_merge_are_left_out_and_told(self, sd, tmp_path):
        base = shutil.copytree(sd.base, tmp_path / "base")
        sd.pipeline.text_encoder.save_pretrained(base / "text_encoder", variant="fp16")
        (base / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"other")
        (base / "sd.safetensors").write_bytes(b"other")
        result = plait.bake(sd.adapters, base=base, out=tmp_path / "out")
        assert any("text_encoder/model.fp16.safetensors" in n and "sd.safetensors" in n for n in result.plan.notes)
        assert not (tmp_path / "out/text_encoder/model.fp16.safetensors").exists()
        assert (tmp_path / "out/vae/diffusion_pytorch_model.bin").read_bytes() == b"other"

    def test_a_variant_alone_is_read_and_keeps_its_name(self, sd, tmp_path):
        sd.pipeline.save_pretrained(tmp_path / "base", variant="fp16")
        plait.bake(sd.adapters, base=tmp_path / "base", out=tmp_path / "out")
        assert (tmp_path / "out/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
        assert "variant='fp16'" in (tmp_path / "out/README.md").read_text()

    def test_what_does_not_fit_is_refused_before_anything_is_written(self, sd, tmp_path):
        def refused(
            match: str, kind: type[PlaitError] = PlanError, base: Path = sd.base, adapters: Any = sd.adapters, **more: Any
        ) -> None:
            with pytest.raises(kind, match=match):
                plait.bake(adapters, base=base, out=tmp_path / "out", **more)
            assert not list(tmp_path.glob("*out*"))

        a, b = random(2, 8), random(8, 2)
        held = {f"unet.mid_block.strange.lora_{x}.weight": t for x, t in {"A": a, "B": b}.items()}
        save_file(held, tmp_path / "lora.safetensors")
        refused(r"unet\.mid_block\.strange \(no tensor of unet/ has its name\)", adapters=[tmp_path / "lora.safetensors"])
        wrong = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        save_file({f"{wrong}.lora_A.weight": random(2, 6), f"{wrong}.lora_B.weight": b}, tmp_path / "lora.safetensors")
        refused("Is this the base model that they were trained on", adapters=[tmp_path / "lora.safetensors"])
        refused("this base is a pipeline", RecipeError, shard_size="1GB")
        base = shutil.copytree(sd.base, tmp_path / "base")
        config = json.loads((base / "unet/config.json").read_text())
        (base / "unet/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
        refused(r"base/unet: the base model is quantized \(gptq", base=base)
        (base / "unet/config.json").write_text(json.dumps(config))
        (base / "scheduler/secret.json").symlink_to("/etc/hostname")
        refused("which is outside the folder", AdapterError, base=base)
        (base / "scheduler/secret.json").unlink()
        part = next((base / "unet").glob("*00002*"))
        part.unlink()
        refused("No such file or directory", AdapterError, base=base)
        shutil.rmtree(base / "unet")
        refused("unet: named by model_index.json, and not there", AdapterError, base=base)

    def test_a_quantized_component_that_is_not_touched_is_carried(self, sd, tmp_path):
        base = shutil.copytree(sd.base, tmp_path / "base")
        config = json.loads((base / "vae/config.json").read_text())
        (base / "vae/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
        plait.bake(sd.adapters, base=base, out=tmp_path / "out")
        assert (tmp_path / "out/vae/config.json").read_bytes() == (base / "vae/config.json").read_bytes()

    def test_an_adapter_is_taken_out_again(self, sd, tmp_path):
        plait.bake([sd.adapters[0]], base=sd.base, out=tmp_path / "out")
        result = plait.unbake(tmp_path / "out", sd.adapters[0], out=tmp_path / "before", original=sd.base)
        assert result.remaining is not None
        assert result.remaining.largest < 1e-6

    @pytest.mark.parametrize("finished", [1, 3])
    def test_killed_it_continues(self, sd, tmp_path, finished):
        check_killed(run_forked(HELD, str(finished), str(sd.base), str(tmp_path / "out"), *map(str, sd.adapters)))
        assert not (tmp_path / "out").exists()
        result = plait.bake(sd.adapters, base=sd.base, out=tmp_path / "out")
        assert len(result.record.resumed) == finished
        assert all("/" in name for name in result.record.resumed)
        plait.bake(sd.adapters, base=sd.base, out=tmp_path / "again")
        one, two = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[n], two[n]) for n in one)
        assert not (tmp_path / ".out.baking").exists()

    def test_a_node_of_a_cluster_makes_a_components_file(self, sd, tmp_path):
        """What a worker does, without a cluster: the file keeps its folder on the way to the driver's."""
        from plait.baking.identity import bake_digest
        from plait.baking.on_cluster import NodeBaker, _take
        from plait.baking.plan import BakeOptions, prepare_bake
        from plait.recipes.loading import build_recipe
        from plait.results.digests import sha256

        settings = {"adapters": [{"path": str(p)} for p in sd.adapters], "base_model": str(sd.base)}
        bake = prepare_bake(build_recipe(settings), BakeOptions(), workers=1)
        digest = bake_digest(bake, [sha256(a.file.path) for a in bake.inventory.adapters], settings)
        node = NodeBaker({"recipe": settings, "asked": settings, "options": {}, "digest": digest, "threads": 1})
        plait.bake(sd.adapters, base=sd.base, out=tmp_path / "here")
        with open_journal(tmp_path / "there", force=False) as journal:
            journal.begin(digest)
            for name in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
                size, sum_of = node.write(lambda _: None, name, str(journal.folder / "parts"))
                _take(journal, journal.folder / "parts" / name, name, size, sum_of)
                assert (journal.model / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
            assert journal.holds("text_encoder/model.safetensors")

    def test_from_the_hub_come_one_copy_of_the_weights_and_what_is_small(self, sd, tmp_path):
        files = {str(p.relative_to(sd.base)): p.read_bytes() for p in sd.base.rglob("*") if p.is_file()}
        needless = ["sd.safetensors", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"]
        with HubServer() as hub:
            hub.add("org/sd", files | dict.fromkeys(needless, b"needless") | {"README.md": b"---\nlicense: mit\n---\n"})
            words = ["bake", str(sd.adapters[0]), "--base-id", "org/sd", "-o", str(tmp_path / "out")]
            done = run_forked(PLAIT, *words, environment=hub.env(tmp_path / "home"))
            assert done.returncode == 0, done.stderr
            assert not [r for name in needless for r in hub.asked(rf"/{name}")]
            verified = run_forked(PLAIT, "verify", str(tmp_path / "out"), environment=hub.env(tmp_path / "home", offline=True))
        assert verified.returncode == 0, verified.stdout + verified.stderr
        plait.bake([sd.adapters[0]], base=sd.base, out=tmp_path / "here")
        one, two = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "here")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[n], two[n]) for n in one)
        assert "license: mit" in (tmp_path / "out/README.md").read_text()

    def test_kohyas_names_are_resolved_by_the_bases_modules(self, tmp_path):
        """A name of a model whose words are not known; where two modules have it, or none, it stays unknown."""
        index = {"_class_name": "SomePipeline", "transformer": ["diffusers", "SomeModel"]}
        (tmp_path / "base/transformer").mkdir(parents=True)
        (tmp_path / "base/model_index.json").write_text(json.dumps(index))
        weights = {"odd_blocks.0.some_part": random(6, 4), "a.b_c": random(6, 4), "a.b.c": random(6, 4)}
        file = tmp_path / "base/transformer/diffusion_pytorch_model.safetensors"
        save_file({f"{n}.weight": t for n, t in weights.items()}, file)

        def adapter(flat: str) -> Path:
            held = {f"lora_unet_{flat}.lora_{x}.weight": t for x, t in {"down": random(2, 4), "up": random(6, 2)}.items()}
            save_file(held | {f"lora_unet_{flat}.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors")
            return tmp_path / "lora.safetensors"

        place = adapter("odd_blocks_0_some_part")
        with pytest.raises(AdapterError, match=r"are not understood.*--base-id"):
            plait.merge([place], out=tmp_path / "out")
        plait.bake([place], base=tmp_path / "base", out=tmp_path / "out")
        found = load_file(tmp_path / "out/transformer" / file.name)["odd_blocks.0.some_part.weight"]
        assert_near(found, weights["odd_blocks.0.some_part"] + random(6, 2) @ random(2, 4) / 2)
        assert exit_code("verify", tmp_path / "out") == 0
        plait.convert(place, to="diffusers", base_model=str(tmp_path / "base"), out=tmp_path / "converted")
        assert list(Adapter.open(tmp_path / "converted", "it").targets) == ["transformer.odd_blocks.0.some_part"]
        for flat in ("a_b_c", "a_b_d"):
            with pytest.raises(AdapterError, match="are not understood"):
                plait.bake([adapter(flat)], base=tmp_path / "base", out=tmp_path / "no")

    def test_a_parity_check_is_refused_with_the_reason(self, sd, tmp_path):
        (tmp_path / "prompts").write_text("a\n")
        with pytest.raises(RecipeError, match="this base is a pipeline"):
            plait.bake(sd.adapters, base=sd.base, out=tmp_path / "out", check=tmp_path / "prompts")
        assert not (tmp_path / "out").exists()
