"""Bakes into pipelines of diffusers and into single files under the names of the original code; diffusers is the judge."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import plait
from plait.adapters import Adapter
from plait.adapters.formats.pipelines import to_sgm
from plait.baking.journal import open_journal
from plait.errors import AdapterError, PlaitError, PlanError, RecipeError
from tests.command_line import exit_code
from tests.hub_server import HubServer
from tests.warm import PLAIT, check_killed, run_forked

Tensors = dict[str, torch.Tensor]
WEIGHTS = (0.7, -0.4)
LORA = "pytorch_lora_weights.safetensors"
OF_UNET = ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj"]
OF_TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]

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


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_unet(*, cross: int = 8, layers: int | tuple[int, ...] = 1, **more: Any) -> Any:
    import diffusers

    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=2, sample_size=8, norm_num_groups=2, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross, attention_head_dim=2, transformer_layers_per_block=layers, **more,
    ).eval()  # fmt: skip


def tiny_text(kind: str = "CLIPTextModel", width: int = 8) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=width, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=width, eos_token_id=39, bos_token_id=38, pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def tiny_pipeline() -> Any:
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), latent_channels=4,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        unet=tiny_unet(), text_encoder=tiny_text(), vae=vae, tokenizer=None, safety_checker=None, feature_extractor=None,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), requires_safety_checker=False,
    )  # fmt: skip


def loaded(folder: Path) -> Any:
    """Return the pipeline of a folder, without the components that it was saved without."""
    import diffusers

    none = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, **none)


def random_adapter(model: Any, modules: list[str], seed: int) -> Tensors:
    """Return the factors of an adapter that PEFT puts on a model, with random values; the model stays as it was."""
    with_lora = adapted(model, {"it": seed}, modules)
    held = {n: p for n, p in with_lora.named_parameters() if ".it." in n}
    return {n.replace(".it.", "."): p.detach().clone() for n, p in held.items()}


def adapted(model: Any, adapters: dict[str, int], modules: list[str], weights: tuple[float, ...] = (1.0,)) -> Any:
    """Return a copy of a model with some adapters of random values active: name → seed."""
    from peft import LoraConfig, inject_adapter_in_model

    model = deepcopy(model)
    for name, seed in adapters.items():
        inject_adapter_in_model(LoraConfig(r=2 + seed, lora_alpha=2 + seed, target_modules=modules), model, adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.set_adapter(list(adapters))
            for name, weight in zip(adapters, weights, strict=True):
                layer.scaling[name] *= weight
    return model


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny pipeline of SD 1 on disk, its UNet in numbered files, and two adapters as diffusers saves them."""
    folder = tmp_path_factory.mktemp("sd")
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(folder / "base")
    shutil.rmtree(folder / "base" / "unet")
    pipeline.unet.save_pretrained(folder / "base" / "unet", max_shard_size="20KB")
    adapters = [folder / f"lora{i}" for i in (0, 1)]
    for i, place in enumerate(adapters):
        unet, text = random_adapter(pipeline.unet, OF_UNET, i), random_adapter(pipeline.text_encoder, OF_TEXT, i)
        pipeline.save_lora_weights(place, unet_lora_layers=unet, text_encoder_lora_layers=text)
    return SimpleNamespace(base=folder / "base", adapters=adapters, pipeline=pipeline)


def outputs(unet: Any, text: Any) -> list[torch.Tensor]:
    """Return what a UNet and a text encoder compute, in float64."""
    unet, text = unet.double(), text.double()
    with torch.no_grad():
        noise = unet(random(1, 4, 8, 8).double(), 7, random(1, 5, 8).double()).sample
        return [noise, text(torch.arange(8)[None] + 3).last_hidden_state]


def assert_near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


def merged_deltas(places: list[Path], weights: Sequence[float]) -> Tensors:
    total: Tensors = {}
    for place, weight in zip(places, weights, strict=True):
        adapter = Adapter.open(place, "it")
        for path, target in adapter.targets.items():
            delta = weight * target.scaling * adapter.read(path, torch.float64)[0].dense()
            total[path] = total.get(path, 0) + delta
    return total


def tensors_of(folder: Path) -> Tensors:
    return {f"{p.relative_to(folder)}:{n}": t for p in folder.rglob("*.safetensors") for n, t in load_file(p).items()}


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


def in_original_names(unet: Any) -> Tensors:
    """Return a UNet's tensors under the names of the original code of SD and SDXL."""
    state = unet.state_dict()
    norms = {".norm1": ".in_layers.0", ".norm2": ".out_layers.0"}
    found = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        path = "out.0" if module == "conv_norm_out" else to_sgm(module, state)
        assert path is not None, name
        for new, old in norms.items():
            path = path.removesuffix(new) + old if ".resnets." in module and path.endswith(new) else path
        found[f"model.diffusion_model.{path}.{leaf}"] = tensor.clone()
    return found


def in_openclip_names(text: Any) -> Tensors:
    """Return a text encoder's tensors under the names of OpenCLIP, whose query, key and value are one matrix."""
    state = {n.removeprefix("text_model."): t for n, t in text.state_dict().items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"], "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
    }  # fmt: skip
    for i in range(text.config.num_hidden_layers):
        old, new = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for leaf in ("weight", "bias"):
            fused = [state[f"{old}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            found[f"{new}.attn.in_proj_{leaf}"] = torch.cat(fused)
            for a, b in {
                "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                "layer_norm1": "ln_1", "layer_norm2": "ln_2",
            }.items():  # fmt: skip
                found[f"{new}.{b}.{leaf}"] = state[f"{old}.{a}.{leaf}"]
    return {f"conditioner.embedders.1.model.{n}": t.clone() for n, t in found.items()}


def with_prefix(prefix: str, model: Any) -> Tensors:
    text = {n if n.startswith("text_model.") else f"text_model.{n}": t for n, t in model.state_dict().items()}
    return {prefix + n: t.clone() for n, t in text.items()}


def vae_and_more() -> Tensors:
    return {"first_stage_model.decoder.conv_in.weight": random(4, 4, 3, 3), "alphas_cumprod": random(10).double()}


def header(path: Path) -> tuple[dict[str, str] | None, list[str]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), list(file.keys())


def check_single(base: Path, found: Path, result: Any) -> None:
    """See that one file was written with the base's header, and that only what the plan names has changed."""
    assert [p.name for p in found.parent.glob("*.safetensors")] == [base.name]
    assert header(found) == header(base)
    changed = {t.name for s in result.plan.shards for t in s.tensors}
    before, after = load_file(base), load_file(found)
    assert changed == {n for n in before if not torch.equal(before[n], after[n])}


def close_to_sum(model: Any, before: Tensors, after: Tensors, prefix: str, deltas: Tensors) -> None:
    """Compare a model's converted tensors after a bake with those before and the deltas."""
    deltas = {p.removeprefix(prefix): d for p, d in deltas.items() if p.startswith(prefix)}
    assert deltas
    model.load_state_dict({n.removeprefix("text_model.") if n not in model.state_dict() else n: t for n, t in after.items()})
    for name, tensor in before.items():
        path = name.removesuffix(".weight")
        delta = deltas.get(path, deltas.get(f"text_model.{path}"))
        wanted = tensor.double() + (0 if delta is None else delta.reshape(tensor.shape))
        assert float((after[name].double() - wanted).abs().max()) < 1e-6, name
        assert (delta is None) == torch.equal(after[name], tensor), name


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny checkpoint of SDXL under the names of its original code, and two adapters in kohya's form."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("sdxl")
    more = {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = tiny_unet(cross=16, layers=2, projection_class_embeddings_input_dim=32, **more)
    one, two = tiny_text(), tiny_text("CLIPTextModelWithProjection")
    base, places = folder / "sd_xl_base_1.0.safetensors", []
    held = in_original_names(unet) | in_openclip_names(two) | vae_and_more()
    save_file(held | with_prefix("conditioner.embedders.0.transformer.", one), base)
    for i in (0, 1):
        factors = {"unet": random_adapter(unet, OF_UNET, i), "text_encoder": random_adapter(one, OF_TEXT, i)}
        factors["text_encoder_2"] = random_adapter(two, OF_TEXT, i)
        held = {f"{c}.{n}": t.contiguous() for c, tensors in factors.items() for n, t in tensors.items()}
        save_file(held, folder / f"{i}.safetensors")
        places.append(folder / f"kohya{i}")
        plait.convert(folder / f"{i}.safetensors", to="kohya", out=places[-1])
    return SimpleNamespace(base=base, adapters=places, unet=unet, second=two)


class TestSingleFiles:
    def test_sd1(self, sd, tmp_path):
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        pipeline, base = sd.pipeline, tmp_path / "sd15.safetensors"
        text = with_prefix("cond_stage_model.transformer.", pipeline.text_encoder)
        held = in_original_names(pipeline.unet) | text | vae_and_more()
        save_file(held, base, {"modelspec.title": "tiny", "modelspec.license": "its own"})
        result = plait.bake(sd.adapters, weights=list(WEIGHTS), base=base, out=tmp_path / "out")
        assert result.plan.form == "single file"
        check_single(base, tmp_path / "out" / base.name, result)
        deltas = merged_deltas(sd.adapters, WEIGHTS)
        before, after = load_file(base), load_file(tmp_path / "out" / base.name)
        converted = [convert_ldm_unet_checkpoint(dict(t), dict(pipeline.unet.config)) for t in (before, after)]
        close_to_sum(tiny_unet(), *converted, "unet.", deltas)
        of_text = [
            {n.removeprefix("cond_stage_model.transformer."): v for n, v in t.items() if n.startswith("cond_")}
            for t in (before, after)
        ]
        close_to_sum(tiny_text(), *of_text, "text_encoder.", deltas)
        assert exit_code("verify", tmp_path / "out") == 0
        unbaked = plait.unbake(tmp_path / "out", sd.adapters[0], weight=WEIGHTS[0], out=tmp_path / "second")
        plait.bake([sd.adapters[1]], weights=list(WEIGHTS[1:]), base=base, out=tmp_path / "alone")
        one, two = (load_file(tmp_path / n / base.name) for n in ("second", "alone"))
        assert unbaked.bake.plan.form == "single file"
        assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-6

    def test_sdxl_with_kohyas_adapters(self, sdxl, tmp_path):
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint

        result = plait.bake(sdxl.adapters, weights=list(WEIGHTS), base=sdxl.base, out=tmp_path / "out", workers=2)
        found = tmp_path / "out" / sdxl.base.name
        check_single(sdxl.base, found, result)
        deltas = merged_deltas(sdxl.adapters, WEIGHTS)
        before, after = load_file(sdxl.base), load_file(found)
        converted = [convert_ldm_unet_checkpoint(dict(t), dict(sdxl.unet.config)) for t in (before, after)]
        close_to_sum(deepcopy(sdxl.unet), *converted, "unet.", deltas)
        prefix = "conditioner.embedders.1.model."
        texts = [convert_open_clip_checkpoint(sdxl.second, dict(t), prefix=prefix) for t in (before, after)]
        texts = [{n: t for n, t in text.items() if "position_ids" not in n} for text in texts]
        close_to_sum(deepcopy(sdxl.second), *texts, "text_encoder_2.", deltas)

    def test_the_commands_of_the_tutorial(self, sdxl, tmp_path, monkeypatch, capsys):
        text = (Path(__file__).parents[2] / "docs" / "sdxl.md").read_text(encoding="utf-8")
        shutil.copy(sdxl.base, tmp_path)
        for name, place in zip(("watercolor", "pixelart"), sdxl.adapters, strict=True):
            shutil.copy(place / "lora.safetensors", tmp_path / f"{name}.safetensors")
        (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
        (tmp_path / "styles.yaml").write_text(recipe)
        monkeypatch.chdir(tmp_path)
        lines = [line for body in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in body.splitlines()]
        assert len(lines) == 10
        for line in lines:
            assert exit_code(*shlex.split(line)[1:]) == 0, line + capsys.readouterr().err
        one, two = load_file("both/lora.safetensors"), load_file("both-again/lora.safetensors")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[n], two[n]) for n in one)
        whole, unet = merged_deltas([Path("both")], [1.0]), merged_deltas([Path("both-unet")], [1.0])
        watercolor = merged_deltas([Path("watercolor.safetensors")], [0.7])
        for path, delta in unet.items():
            assert_near(delta, (watercolor if path.startswith("text_encoder") else whole)[path])

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    def test_flux(self, tmp_path, prefix):
        import diffusers

        torch.manual_seed(2)
        model = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=4, num_attention_heads=2,
            joint_attention_dim=6, pooled_projection_dim=6, axes_dims_rope=(2, 2, 0), guidance_embeds=True,
        )  # fmt: skip
        base = tmp_path / "flux.safetensors"
        save_file({prefix + n: t for n, t in original_flux(model.state_dict()).items()}, base)
        modules = [
            "attn.to_q", "attn.to_k", "attn.add_v_proj", "attn.to_out.0", "ff.net.2", "norm1.linear", "proj_mlp", "proj_out",
            "x_embedder", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1",
        ]  # fmt: skip
        factors = random_adapter(model, modules, 0)
        save_file({f"transformer.{n}": t.contiguous() for n, t in factors.items()}, tmp_path / "lora.safetensors")
        result = plait.bake([tmp_path / "lora.safetensors"], base=base, out=tmp_path / "out")
        check_single(base, tmp_path / "out" / base.name, result)
        deltas = merged_deltas([tmp_path / "lora.safetensors"], [1.0])
        state = model.state_dict()
        for path, delta in deltas.items():
            name = f"{path.removeprefix('transformer.')}.weight"
            state[name] = (state[name].double() + delta).float()
        wanted = {prefix + n: t for n, t in original_flux(state).items()}
        after = load_file(tmp_path / "out" / base.name)
        assert max(float((after[n] - wanted[n]).abs().max()) for n in wanted) < 1e-6

    def test_flux_under_the_names_of_the_original_code_in_a_pipeline(self, tmp_path):
        import diffusers

        torch.manual_seed(2)
        model = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=4, num_attention_heads=2,
            joint_attention_dim=6, pooled_projection_dim=6, axes_dims_rope=(2, 2, 0),
        )  # fmt: skip
        model.save_pretrained(tmp_path / "base/transformer")
        index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": [None, None]}
        (tmp_path / "base/model_index.json").write_text(json.dumps(index))
        originals = original_flux(model.state_dict())
        held: Tensors = {}
        for module in ("double_blocks.0.txt_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1"):
            rows, columns = originals[f"{module}.weight"].shape
            flat = f"lora_unet_{module.replace('.', '_')}"
            held |= {f"{flat}.lora_down.weight": random(2, columns), f"{flat}.lora_up.weight": random(rows, 2, seed=1)}
            held[f"{flat}.alpha"] = torch.tensor(1.0)
        save_file(held, tmp_path / "lora.safetensors")
        plait.bake([tmp_path / "lora.safetensors"], base=tmp_path / "base", out=tmp_path / "out")
        after = original_flux(diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out/transformer").state_dict())
        deltas = merged_deltas([tmp_path / "lora.safetensors"], [1.0])
        for name, tensor in originals.items():
            delta = deltas.get(f"diffusion_model.{name.removesuffix('.weight')}", torch.zeros(()))
            assert float((after[name].double() - tensor.double() - delta).abs().max()) < 1e-6, name

    def test_fluxs_names_are_converted_both_ways(self, tmp_path):
        """Kohya's fused modules act in diffusers once they are cut, and are the same deltas once they are fused again."""
        import diffusers

        torch.manual_seed(2)
        model = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=4, num_attention_heads=2,
            joint_attention_dim=6, pooled_projection_dim=6, axes_dims_rope=(2, 2, 0),
        ).eval()  # fmt: skip
        originals, held = original_flux(model.state_dict()), {}
        for seed, module in enumerate(("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.2", "single_blocks.0.linear1")):
            rows, columns = originals[f"{module}.weight"].shape
            flat = f"lora_unet_{module.replace('.', '_')}"
            held |= {f"{flat}.lora_down.weight": random(2, columns, seed=seed), f"{flat}.lora_up.weight": random(rows, 2)}
            held[f"{flat}.alpha"] = torch.tensor(1.0)
        save_file(held, tmp_path / "kohya.safetensors")
        plait.convert(tmp_path / "kohya.safetensors", to="diffusers", out=tmp_path / "cut")
        plait.convert(tmp_path / "cut", to="kohya", out=tmp_path / "fused")
        merged = {}
        for one, other in (("cut", "cut"), ("kohya.safetensors", "cut"), ("cut", "fused")):  # names of both kinds mix
            plait.merge({"a": tmp_path / one, "b": tmp_path / other}, out=tmp_path / "merged", weights=[0.5, 2.0], force=True)
            merged[one, other] = merged_deltas([tmp_path / "merged"], [1.0])
        wanted = merged.pop(("cut", "cut"))
        for found in merged.values():
            assert found.keys() == wanted.keys()
            assert max(float((found[n] - wanted[n]).abs().max()) for n in wanted) < 1e-5
        assert exit_code("verify", tmp_path / "merged") == 0
        notes = plait.plan({"a": tmp_path / "kohya.safetensors", "b": tmp_path / "cut"}).notes
        assert sum("read as diffusers' layers" in note for note in notes) == 1
        before, after = (merged_deltas([tmp_path / n], [1.0]) for n in ("kohya.safetensors", "fused"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert exit_code("verify", tmp_path / "fused") == 0
        state, _, metadata = diffusers.FluxPipeline.lora_state_dict(
            str(tmp_path / "cut"), return_alphas=True, return_lora_metadata=True
        )
        live = deepcopy(model)
        diffusers.FluxPipeline.load_lora_into_transformer(state, None, live, adapter_name="it", metadata=metadata)
        for name, delta in before.items():
            originals[f"{name.removeprefix('diffusion_model.')}.weight"] += delta.float()
        live.fuse_lora()
        live.unload_lora()
        wanted, found = originals, original_flux(live.state_dict())
        assert max(float((found[n] - wanted[n]).abs().max()) for n in wanted) < 1e-5

    def test_what_is_not_known_is_refused(self, sd, tmp_path):
        file = tmp_path / "other.safetensors"
        save_file({"layers.0.weight": torch.ones(2, 2)}, file)
        with pytest.raises(AdapterError, match=r"its tensors are called 'layers\.0\.weight'"):
            plait.bake(sd.adapters, base=file, out=tmp_path / "out")
        save_file({"model.diffusion_model.out.2.weight": torch.ones(2, 2)}, file)
        with pytest.raises(PlanError, match="under the names of SD 1, SD 2, SDXL or Flux"):
            plait.bake(sd.adapters, base=file, out=tmp_path / "out")
        save_file(
            in_original_names(sd.pipeline.unet) | {"model.diffusion_model.x": torch.ones(2).to(torch.float8_e4m3fn)}, file
        )
        with pytest.raises(PlanError, match=r"the base model is quantized \("):
            plait.bake(sd.adapters, base=file, out=tmp_path / "out")
        with pytest.raises(PlanError, match="exists and is not a folder"):
            plait.bake(sd.adapters, base=file, out=file)
        assert [p.name for p in tmp_path.iterdir()] == ["other.safetensors"]


def original_flux(state: Tensors) -> Tensors:
    """Return Flux's tensors under the names of its original code, read from its source."""
    made: Tensors = {}
    top = {
        "img_in": "x_embedder", "txt_in": "context_embedder", "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2", "final_layer.linear": "proj_out",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    }  # fmt: skip
    for leaf in ("weight", "bias"):
        made |= {f"{old}.{leaf}": state[f"{new}.{leaf}"] for old, new in top.items() if f"{new}.{leaf}" in state}
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        made[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
        for i in range(10):
            new, old = f"transformer_blocks.{i}", f"double_blocks.{i}"
            if f"{new}.attn.to_q.{leaf}" in state:
                for side, qkv in {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}.items():
                    made[f"{old}.{side}_attn.qkv.{leaf}"] = torch.cat([state[f"{new}.attn.{x}.{leaf}"] for x in qkv])
                for a, b in {
                    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj",
                    "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
                    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
                }.items():  # fmt: skip
                    made[f"{old}.{a}.{leaf}"] = state[f"{new}.{b}.{leaf}"]
            new, old = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            if f"{new}.attn.to_q.{leaf}" in state:
                pieces = [state[f"{new}.{x}.{leaf}"] for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
                made[f"{old}.linear1.{leaf}"] = torch.cat(pieces)
                made[f"{old}.linear2.{leaf}"] = state[f"{new}.proj_out.{leaf}"]
                made[f"{old}.modulation.lin.{leaf}"] = state[f"{new}.norm.linear.{leaf}"]
    return {n: t.clone() for n, t in made.items()}
