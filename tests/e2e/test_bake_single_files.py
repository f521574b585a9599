"""A base that is one file of an original code, and its names: what is baked is that file with the adapters in it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import plait
from plait.adapters.formats.pipelines import to_sgm
from plait.errors import AdapterError, PlanError
from tests.command_line import exit_code
from tests.diffusion_models import (
    OF_TEXT,
    OF_UNET,
    WEIGHTS,
    Tensors,
    assert_near,
    merged_deltas,
    random,
    random_adapter,
    save_sd,
    tiny_text,
    tiny_unet,
)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return save_sd(tmp_path_factory.mktemp("sd"))


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
