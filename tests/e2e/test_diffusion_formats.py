"""Formats of adapters of image models, against what diffusers computes with the same files."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.adapters import Adapter
from plait.errors import AdapterError, PlanError
from tests.command_line import exit_code
from tests.read_adapters import Arrays, close, deltas, random


@pytest.fixture(scope="module")
def unet() -> Any:
    """A tiny UNet of diffusers with SD's names, and inputs."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=2, sample_size=8, norm_num_groups=2, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2,
    ).eval()  # fmt: skip


ADAPTED = ["to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj"]
TEXT = {f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj": (6, 6) for i in range(2)}


def saved_by_diffusers(unet: Any, folder: Path, *, seed: int = 0, metadata: bool = True, **config: Any) -> None:
    """Train nothing, and save what a trainer of diffusers saves: a UNet's factors, and those of a text encoder."""
    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet, name = deepcopy(unet), "default"
    given = {"r": 2, "lora_alpha": 3, "target_modules": ADAPTED} | config
    unet.add_adapter(LoraConfig(**given), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, value in unet.named_parameters():
        if f".{name}." in key:
            value.data = torch.randn(value.shape, generator=generator) / 4
    text = {f"{p.removeprefix('text_encoder.')}.lora_{x}.weight": random(*((3, 6) if x == "A" else (6, 3)), seed=seed + i)
            for i, p in enumerate(TEXT) for x in "AB"}  # fmt: skip
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=name),
        text_encoder_lora_layers=text,
        unet_lora_adapter_metadata=unet.peft_config[name].to_dict() if metadata else None,
    )


def run_by_diffusers(unet: Any, *places: Path, weights: tuple[float, ...] = (1.0,)) -> torch.Tensor:
    """Return what diffusers computes with some files loaded."""
    import diffusers

    unet, names = deepcopy(unet), [f"it{i}" for i in range(len(places))]
    for name, place in zip(names, places, strict=True):
        state, alphas, metadata = diffusers.StableDiffusionPipeline.lora_state_dict(
            str(place.parent), weight_name=place.name, unet_config=unet.config, return_lora_metadata=True
        )
        diffusers.StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, adapter_name=name, metadata=metadata)
    unet.set_adapters(names, list(weights))
    return run(unet)


def run(unet: Any, added: Arrays | None = None) -> torch.Tensor:
    """Return the UNet's output, with deltas added to its weights."""
    weights = {p: unet.get_submodule(p.removeprefix("unet.")).weight for p in added or {}}
    before = {p: w.data.clone() for p, w in weights.items()}
    for path, weight in weights.items():
        weight.data += torch.tensor((added or {})[path]).reshape(weight.shape).float()
    with torch.no_grad():
        found = unet(random(1, 4, 8, 8), 7, random(1, 5, 8)).sample.double()
    for path, weight in weights.items():
        weight.data = before[path]
    return found


def of_unet(found: Arrays) -> Arrays:
    return {path: value for path, value in found.items() if path.startswith("unet.")}


def assert_equal(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


class TestDiffusers:
    @pytest.mark.parametrize("metadata", [True, False])
    def test_is_read_as_diffusers_runs_it(self, unet, tmp_path, metadata):
        saved_by_diffusers(unet, tmp_path / "a", metadata=metadata, rank_pattern={"to_q": 3}, alpha_pattern={"conv1": 5})
        found = deltas(tmp_path / "a")
        adapter = Adapter.open(tmp_path / "a", "a")
        assert adapter.towers == ("unet", "text_encoder")
        assert adapter.ranks == (2, 3)
        assert set(TEXT) == {p for p in found if p.startswith("text_encoder.")}
        wanted = run_by_diffusers(unet, tmp_path / "a" / "pytorch_lora_weights.safetensors")
        assert_equal(run(unet, of_unet(found)), wanted)
        assert float((wanted - run(unet)).norm() / wanted.norm()) > 0.01

    @pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
    def test_a_merge_is_what_diffusers_computes_with_both(self, unet, tmp_path):
        for i in (0, 1):
            saved_by_diffusers(unet, tmp_path / str(i), seed=i, r=2 + i)
        file = "pytorch_lora_weights.safetensors"
        result = plait.merge([tmp_path / "0", tmp_path / "1" / file], weights=[0.5, 0.8], out=tmp_path / "out")
        assert any("diffusers; docs/formats.md" in note for note in result.plan.notes)
        found = run_by_diffusers(unet, tmp_path / "out" / file)
        assert_equal(found, run_by_diffusers(unet, *(tmp_path / str(i) / file for i in (0, 1)), weights=(0.5, 0.8)))
        one, two, both = (deltas(tmp_path / n) for n in ("0", "1", "out"))
        close(both, {p: 0.5 * one[p] + 0.8 * two[p] for p in one}, 1e-6)
        assert exit_code("verify", tmp_path / "out") == 0

    def test_towers_have_weights_of_their_own(self, unet, tmp_path):
        saved_by_diffusers(unet, tmp_path / "a")
        weights = {"policy": "per_module", "modules": {"text_encoder.*": 0.25}}
        plait.merge([tmp_path / "a"], weights=weights, out=tmp_path / "out")
        before, after = deltas(tmp_path / "a"), deltas(tmp_path / "out")
        close(after, {p: v * (0.25 if p.startswith("text") else 1) for p, v in before.items()}, 1e-6)

    def test_older_names_are_the_same_modules(self, tmp_path):
        (q, up), a, b = ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1", "unet.up_blocks.1.resnets.0.conv1"), \
            random(2, 4), random(4, 2, seed=1)  # fmt: skip
        text = "text_encoder.text_model.encoder.layers.0"
        older = {
            f"{q}.processor.to_q_lora.down.weight": a, f"{q}.processor.to_q_lora.up.weight": b,
            f"{q}.processor.to_out_lora.down.weight": a, f"{q}.processor.to_out_lora.up.weight": b,
            f"{up}.lora.down.weight": a[..., None, None], f"{up}.lora.up.weight": b[..., None, None],
            f"{text}.self_attn.to_v_lora.down.weight": a, f"{text}.self_attn.to_v_lora.up.weight": b,
            "text_encoder.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": a,
            "text_encoder.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": b,
        }  # fmt: skip
        save_file({k: v.clone() for k, v in older.items()}, tmp_path / "old.safetensors")
        found = deltas(tmp_path / "old.safetensors")
        assert sorted(found) == sorted([f"{q}.to_q", f"{q}.to_out.0", up, f"{text}.self_attn.v_proj", f"{text}.mlp.fc1"])

    def test_what_is_not_understood_is_refused_by_name(self, tmp_path):
        held = {"unet.conv_in.lora_A.weight": random(2, 4, 3, 3), "unet.conv_in.lora_B.weight": random(4, 2, 1, 1)}
        for name, why in {
            "unet.strange": "not understood: 'unet.strange'",
            "unet.conv_in.dora_scale": "LyCORIS has them",
        }.items():
            save_file(held | {name: torch.ones(4)}, tmp_path / "a.safetensors")
            with pytest.raises(AdapterError, match=why):
                Adapter.open(tmp_path / "a.safetensors", "a")

    def test_one_component_for_peft(self, unet, tmp_path):
        saved_by_diffusers(unet, tmp_path / "a")
        with pytest.raises(PlanError, match=r"unet and text_encoder of a pipeline\. Choose one of them \(--tower"):
            plait.convert(tmp_path / "a", to="peft", out=tmp_path / "out")
        plait.convert(tmp_path / "a", to="peft", tower="unet", out=tmp_path / "out")
        close(deltas(tmp_path / "out"), {p.removeprefix("unet."): v for p, v in of_unet(deltas(tmp_path / "a")).items()})
        with pytest.raises(PlanError, match="of a pipeline, with paths that begin with its components"):
            plait.plan([tmp_path / "a", tmp_path / "out"])


SDXL = [
    "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", "unet.up_blocks.0.attentions.2.proj_in",
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "unet.down_blocks.0.downsamplers.0.conv",
    "unet.up_blocks.0.upsamplers.0.conv", "unet.up_blocks.2.resnets.1.conv2", "unet.down_blocks.1.resnets.0.time_emb_proj",
    "unet.mid_block.resnets.1.conv1", "unet.time_embedding.linear_1", "unet.add_embedding.linear_2", "unet.conv_out",
    "unet.down_blocks.1.resnets.0.conv_shortcut", "text_encoder_2.text_model.encoder.layers.3.mlp.fc1",
]  # fmt: skip


class TestKohya:
    def test_is_read_as_diffusers_runs_it_and_written_back(self, unet, tmp_path):
        saved_by_diffusers(unet, tmp_path / "a", alpha_pattern={"conv1": 5})
        plait.convert(tmp_path / "a", to="kohya", out=tmp_path / "kohya")
        file = tmp_path / "kohya" / "lora.safetensors"
        names = load_file(file)
        assert names["lora_unet_down_blocks_0_resnets_0_conv1.alpha"] == 5
        assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in names
        close(deltas(file), deltas(tmp_path / "a"))
        opened = Adapter.open(file, "a")
        assert (opened.origin.format, opened.is_one_file) == ("kohya", True)
        assert_equal(run_by_diffusers(unet, file), run(unet, of_unet(deltas(file))))
        plait.convert(file, to="diffusers", out=tmp_path / "back")
        close(deltas(tmp_path / "back"), deltas(tmp_path / "a"))

    def test_a_merge_of_two_is_kohyas_too(self, unet, tmp_path):
        for i in (0, 1):
            saved_by_diffusers(unet, tmp_path / f"d{i}", seed=i)
            plait.convert(tmp_path / f"d{i}", to="kohya", out=tmp_path / str(i))
        plait.merge([tmp_path / "0", tmp_path / "1"], out=tmp_path / "out", dtype="float16")
        assert {t.dtype for n, t in load_file(tmp_path / "out" / "lora.safetensors").items() if "alpha" not in n} == {
            torch.float16
        }
        one, two, both = (deltas(tmp_path / n) for n in ("0", "1", "out"))
        close(both, {p: one[p] + two[p] for p in one}, 2e-3)
        plait.merge([tmp_path / "0", tmp_path / "d1"], out=tmp_path / "mixed")
        assert Adapter.open(tmp_path / "mixed", "mixed").origin.format == "diffusers"
        plait.merge([tmp_path / "0", tmp_path / "d1"], out=tmp_path / "chosen", format="kohya")
        close(deltas(tmp_path / "mixed"), deltas(tmp_path / "chosen"))
        assert exit_code("verify", tmp_path / "chosen") == 0

    def test_names_of_the_original_code_are_diffusers_own(self, tmp_path):
        """Kohya's scripts train SDXL on its original code; the oracle is diffusers' own renaming."""
        import diffusers

        held = {
            f"{p}.lora_{x}.weight": random(*s, *([1, 1] * ("conv" in p)))
            for p in SDXL
            for x, s in (("A", (2, 4)), ("B", (4, 2)))
        }
        save_file(held, tmp_path / "a.safetensors")
        plait.convert(tmp_path / "a.safetensors", to="kohya", out=tmp_path / "kohya")
        names = {n.partition(".")[0] for n in load_file(tmp_path / "kohya" / "lora.safetensors")}
        assert "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q" in names
        assert "lora_unet_output_blocks_2_2_conv" in names
        close(deltas(tmp_path / "kohya"), deltas(tmp_path / "a.safetensors"))
        sizes = type("Sizes", (), {"layers_per_block": 2})
        state, _ = diffusers.StableDiffusionXLPipeline.lora_state_dict(str(tmp_path / "kohya"), weight_name="lora.safetensors",
                                                                       unet_config=sizes)  # fmt: skip
        theirs = {
            name.partition(".lora")[0].replace(".processor", "").replace("_lora.down", "").replace("_lora.up", "")
            for name in state
        }
        assert {p for p in SDXL if p.startswith("unet.")} <= {t.replace(".weight", "") for t in theirs}

    def test_metadata_is_shown_and_carried(self, unet, tmp_path, capsys):
        saved_by_diffusers(unet, tmp_path / "d")
        plait.convert(tmp_path / "d", to="kohya", out=tmp_path / "k")
        held = load_file(tmp_path / "k" / "lora.safetensors")
        texts = {
            "ss_network_module": "networks.lora",
            "ss_tag_frequency": '{"x": 1}',
            "modelspec.license": "MIT",
            "sshs_model_hash": "ab",
        }
        for i in (0, 1):
            save_file(held, tmp_path / f"{i}.safetensors", metadata=texts | {"ss_output_name": f"of{i}"})
        assert Adapter.open(tmp_path / "0.safetensors", "a").origin.writer == "kohya's sd-scripts"
        (report,) = plait.inspect([tmp_path / "0.safetensors"]).adapters
        assert (report.format, report.components, report.alphas) == ("kohya", ("unet", "text_encoder"), (3.0,))
        assert exit_code("inspect", tmp_path / "0.safetensors") == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "kohya, written by kohya's sd-scripts, of unet and text_encoder; modelspec.license 'MIT'" in shown
        result = plait.convert(tmp_path / "0.safetensors", to="diffusers", out=tmp_path / "back")
        assert set(result.plan.metadata) == {"ss_network_module", "ss_tag_frequency", "modelspec.license", "ss_output_name"}
        plait.merge({"one": tmp_path / "0.safetensors", "two": tmp_path / "1.safetensors"}, out=tmp_path / "out")
        carried = Adapter.open(tmp_path / "out", "out").origin.metadata
        assert carried["ss_tag_frequency"] == '{"x": 1}'
        assert (carried["one.ss_output_name"], carried["two.ss_output_name"]) == ("of0", "of1")

    def test_words_that_are_not_known_are_refused(self, tmp_path):
        name = "lora_unet_down_blocks_0_strange_thing_proj"
        save_file(
            {f"{name}.lora_down.weight": random(2, 4), f"{name}.lora_up.weight": random(4, 2)}, tmp_path / "a.safetensors"
        )
        with pytest.raises(AdapterError, match=f"not understood: '{name}"):
            Adapter.open(tmp_path / "a.safetensors", "a")

    def test_main_models_under_different_names_do_not_mix(self, tmp_path):
        for file, name in (("a", "lora_unet_double_blocks_0_img_attn_qkv"), ("b", "lora_unet_mid_block_attentions_0_proj_in")):
            save_file(
                {f"{name}.lora_down.weight": random(2, 4), f"{name}.lora_up.weight": random(4, 2)},
                tmp_path / f"{file}.safetensors",
            )
        files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        with pytest.raises(PlanError, match="call the main model by different names") as refused:
            plait.plan(files)
        assert str(tmp_path) not in str(refused.value), "they are called as their files"
        with pytest.raises(PlanError, match="call the main model by different names") as refused:
            plait.plan(dict(zip(("one", "two"), files, strict=True)))
        assert f"('one' is {files[0]}; 'two' is {files[1]}.)" in str(refused.value)

    @pytest.mark.parametrize(
        ("flat", "path"),
        [
            (
                "lora_unet_transformer_blocks_3_attn_add_q_proj",
                "transformer.transformer_blocks.3.attn.add_q_proj",
            ),  # Qwen-Image
            ("lora_unet_transformer_blocks_3_img_mlp_net_0_proj", "transformer.transformer_blocks.3.img_mlp.net.0.proj"),
            ("lora_unet_transformer_blocks_3_txt_mod_1", "transformer.transformer_blocks.3.txt_mod.1"),
            ("lora_unet_blocks_12_self_attn_q", "diffusion_model.blocks.12.self_attn.q"),  # Wan
            ("lora_unet_blocks_12_cross_attn_k_img", "diffusion_model.blocks.12.cross_attn.k_img"),
            ("lora_unet_blocks_12_ffn_2", "diffusion_model.blocks.12.ffn.2"),
            ("lora_unet_blocks_12_attn1_to_out_0", "transformer.blocks.12.attn1.to_out.0"),  # Wan in diffusers
            ("lora_transformer_single_transformer_blocks_7_proj_mlp", "transformer.single_transformer_blocks.7.proj_mlp"),
        ],
    )
    def test_names_of_transformers(self, tmp_path, flat, path):
        parts = {"lora_down.weight": random(2, 4), "lora_up.weight": random(16, 2, seed=1), "alpha": torch.tensor(2.0)}
        save_file({f"{flat}.{n}": t for n, t in parts.items()}, tmp_path / "it.safetensors")
        found = deltas(tmp_path / "it.safetensors")
        assert list(found) == [path]
        if "single" not in path:
            plait.merge([tmp_path / "it.safetensors"], out=tmp_path / "out")
            assert f"{flat}.alpha" in load_file(tmp_path / "out" / "lora.safetensors")


class TestProducts:
    """LoCon, LoHa and LoKr: the delta as their papers and LyCORIS' documentation have it, written out densely."""

    NAME = "lora_unet_mid_block_resnets_0_conv1"
    PATH = "unet.mid_block.resnets.0.conv1"

    def delta(self, folder: Path, tensors: dict[str, torch.Tensor], name: str | None = None) -> np.ndarray:
        name = name or self.NAME
        save_file({f"{name}.{k}": v.contiguous() for k, v in tensors.items()}, folder / "a.safetensors")
        (found,) = deltas(folder / "a.safetensors").values()
        return found

    def matrix(self, *sizes: int) -> list[torch.Tensor]:
        return [random(*pair, seed=i) for i, pair in enumerate(zip(sizes[::2], sizes[1::2], strict=True))]

    def test_locon_with_a_kernel(self, tmp_path):
        down, mid, up = random(3, 4, 1, 1), random(2, 3, 3, 3, seed=1), random(6, 2, 1, 1, seed=2)
        given = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
        wanted = 0.5 * torch.einsum("op,pqkl,qi->oikl", up[..., 0, 0].double(), mid.double(), down[..., 0, 0].double())
        assert np.abs(self.delta(tmp_path, given) - wanted.reshape(6, -1).numpy()).max() < 1e-5

    @pytest.mark.parametrize("convolution", [True, False])
    def test_loha(self, tmp_path, convolution):
        w1a, w1b, w2a, w2b = self.matrix(6, 2, 2, 36, 6, 2, 2, 36)
        given = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b, "alpha": torch.tensor(1.0)}
        wanted = 0.5 * ((w1a.double() @ w1b.double()) * (w2a.double() @ w2b.double())).numpy()
        name = self.NAME if convolution else "lora_te_text_model_encoder_layers_0_mlp_fc1"
        assert np.abs(self.delta(tmp_path, given, name) - wanted).max() < 1e-5
        (target,) = Adapter.open(tmp_path / "a.safetensors", "a").targets.values()
        assert (target.rank, target.layout.kind) == (4, "conv" if convolution else "linear")

    def test_loha_with_kernels(self, tmp_path):
        w1a, w1b, w2a, w2b = self.matrix(2, 6, 2, 4, 2, 6, 2, 4)
        t1, t2 = random(2, 2, 3, 3, seed=8), random(2, 2, 3, 3, seed=9)
        given = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b, "hada_t1": t1, "hada_t2": t2}
        one, two = (
            torch.einsum("mp,mnkl,nq->pqkl", a.double(), t.double(), b.double()) for a, t, b in ((w1a, t1, w1b), (w2a, t2, w2b))
        )
        assert np.abs(self.delta(tmp_path, given) - (one * two).reshape(6, -1).numpy()).max() < 1e-4

    @pytest.mark.parametrize("whole", [True, False])
    @pytest.mark.parametrize("convolution", [True, False])
    def test_lokr(self, tmp_path, whole, convolution):
        w1a, w1b, w2a, w2b = self.matrix(2, 1, 1, 3, 4, 2, 2, 5 * 9 if convolution else 5)
        w1 = w1a.double() @ w1b.double()
        first = {"lokr_w1": w1.float()} if whole else {"lokr_w1_a": w1a, "lokr_w1_b": w1b}
        given = first | {"lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": torch.tensor(4.0)}
        second = (w2a.double() @ w2b.double()).reshape(4, 5, *((3, 3) if convolution else (1, 1)))
        wanted = 2 * torch.kron(w1[..., None, None], second).reshape(8, -1).numpy()
        name = self.NAME if convolution else "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        assert np.abs(self.delta(tmp_path, given, name) - wanted).max() < 1e-5
        assert Adapter.open(tmp_path / "a.safetensors", "a").ranks == ((6,) if whole else (2,))

    def test_lokr_with_a_kernel(self, tmp_path):
        w1, w2a, w2b = self.matrix(2, 3, 2, 4, 2, 5)
        t2 = random(2, 2, 3, 3, seed=9)
        second = torch.einsum("mp,mnkl,nq->pqkl", w2a.double(), t2.double(), w2b.double()).contiguous()
        wanted = torch.kron(w1.double()[..., None, None], second).reshape(8, -1).numpy()
        given = {"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "lokr_t2": t2}
        assert np.abs(self.delta(tmp_path, given) - wanted).max() < 1e-4

    def test_a_merge_of_a_product_and_a_lora(self, tmp_path):
        w1a, w1b, w2a, w2b = self.matrix(6, 2, 2, 36, 6, 2, 2, 36)
        loha = self.delta(tmp_path, {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b})
        plain = {
            f"{self.PATH}.lora_A.weight": random(2, 4, 3, 3, seed=7),
            f"{self.PATH}.lora_B.weight": random(6, 2, 1, 1, seed=8),
        }
        save_file(plain, tmp_path / "b.safetensors")
        result = plait.merge([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], out=tmp_path / "out")
        assert any("1 modules are LoHa" in note for note in result.plan.notes)
        close(deltas(tmp_path / "out"), {self.PATH: loha + deltas(tmp_path / "b.safetensors")[self.PATH]}, 1e-5)

    def test_a_full_second_factor_is_refused(self, tmp_path):
        with pytest.raises(AdapterError, match="full rank"):
            self.delta(tmp_path, {"lokr_w1": random(2, 3), "lokr_w2": random(4, 5)})
