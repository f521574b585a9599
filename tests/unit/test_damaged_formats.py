"""Adapters of other programs whose files contradict themselves: refused by name, or read as what they say."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import plait
from plait.adapters import Adapter
from plait.errors import AdapterError, PlanError
from plait.tensorfiles.gguf import GgufFile, write_gguf
from plait.tensorfiles.writer import TensorEntry
from tests.adapters_on_disk import Linear, write_adapter
from tests.every import every

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
PATH = "model.layers.0.self_attn.q_proj"
PAIR = {f"{PATH}.lora_a": torch.ones(6, 2), f"{PATH}.lora_b": torch.ones(2, 8)}


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def write_mlx(folder: Path, tensors: dict[str, torch.Tensor] = PAIR, scale: float = 2.0, kind: str = "lora") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    settings = {"fine_tune_type": kind, "lora_parameters": {"rank": 2, "scale": scale}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write_llama(
    folder: Path,
    *more: tuple[str, torch.Tensor],
    heads: int = 4,
    model: str = "mistral",
    fields: dict[str, str | int | float] | None = None,
) -> Path:
    folder.mkdir()
    tensors = [("blk.0.attn_q.weight.lora_a", ones(2, 6)), ("blk.0.attn_q.weight.lora_b", ones(8, 2)), *more]
    plain: dict[str, str | int | float] = {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 2.0
    }  # fmt: skip
    entries = [TensorEntry(name, t.dtype, tuple(t.shape)) for name, t in tensors]
    write_gguf(folder / "adapter.gguf", plain | (fields or {}), entries, iter(tensors))
    (folder / "config.json").write_text(json.dumps({"model_type": model, "num_attention_heads": heads}))
    return folder


LOHA = {"hada_w1_a": ones(8, 2), "hada_w1_b": ones(2, 6), "hada_w2_a": ones(8, 2), "hada_w2_b": ones(2, 6)}
LOKR = {"lokr_w1": ones(2, 2), "lokr_w2_a": ones(4, 2), "lokr_w2_b": ones(2, 3)}
PARTS = {
    "a kernel's factor with one dimension": (CONV, {"lora_down.weight": ones(2), "lora_mid.weight": ones(2, 2, 3, 3),
                                                    "lora_up.weight": ones(6, 2, 1, 1)}, "two dimensions or more"),
    "a kernel of size 0": (CONV, {"lora_down.weight": ones(2, 4, 1, 1), "lora_mid.weight": ones(2, 2, 0, 3),
                                  "lora_up.weight": ones(6, 2, 1, 1)}, "without a value"),
    "LoRA of rank 0": (QUERY, {"lora_down.weight": ones(0, 6), "lora_up.weight": ones(8, 0)}, "without a value"),
    "LoHa of rank 0": (QUERY, LOHA | {"hada_w1_a": ones(8, 0), "hada_w1_b": ones(0, 6), "alpha": ones()}, "without a value"),
    "LoHa without inputs": (QUERY, LOHA | {"hada_w1_b": ones(2, 0), "hada_w2_b": ones(2, 0)}, "without a value"),
    "LoKr of 2^40 columns and no row": (QUERY, {"lokr_w1": ones(0, 1).expand(0, 2**40), "lokr_w2_a": ones(4, 2),
                                                "lokr_w2_b": ones(2, 3)}, "without a value"),
    "LoHa and LoRA": (QUERY, LOHA | {"lora_down.weight": ones(2, 6), "lora_up.weight": ones(8, 2)},
                      r"is LoHa, and '.*lora_down\.weight', '.*lora_up\.weight' besides"),
    "LoKr and LoRA": (QUERY, LOKR | {"lora_down.weight": ones(2, 6), "lora_up.weight": ones(8, 2)}, "is LoKr, and"),
    "LoKr with its first factor twice": (QUERY, LOKR | {"lokr_w1_a": ones(2, 1), "lokr_w1_b": ones(1, 2)}, "is LoKr, and"),
    "LoHa and LoKr": (QUERY, LOHA | LOKR, "is LoHa, and"),
    "LoCon with a bias": ("unet.conv_in", {"lora_down.weight": ones(2, 4, 1, 1), "lora_mid.weight": ones(2, 2, 3, 3),
                                           "lora_up.weight": ones(6, 2, 1, 1), "lora_B.bias": ones(6)}, "is LoCon, and"),
    "an alpha that is true": (QUERY, {"lora_down.weight": ones(2, 6), "lora_up.weight": ones(8, 2),
                                      "alpha": torch.tensor(True)}, "stored as BOOL; an alpha is a number"),
    "an alpha of eight bits": (QUERY, {"lora_down.weight": ones(2, 6), "lora_up.weight": ones(8, 2),
                                       "alpha": ones().to(torch.float8_e4m3fn)}, "stored as F8_E4M3; an alpha is a number"),
}  # fmt: skip


@every(("module", "parts", "message"), PARTS.values())
def test_factors_without_values_or_dimensions_are_refused(module, parts, message, tmp_path):
    save_file({f"{module}.{p}": t.contiguous() for p, t in parts.items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=message):
        Adapter.open(tmp_path / "a.safetensors", "a")


@every("number", ["1" * 5000, "\u0663"])
def test_numbers_in_names_are_short_and_of_ascii(number, tmp_path):
    name = f"lora_unet_input_blocks_{number}_1_proj_in"
    save_file({f"{name}.lora_down.weight": ones(2, 6), f"{name}.lora_up.weight": ones(8, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="not understood"):
        Adapter.open(tmp_path / "a.safetensors", "a")


SETTINGS = {
    "deep": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "many digits": ('{"unet.r": 2, "unet.lora_alpha": ' + "9" * 400 + "}", "too large for a float"),
    "two values": ('{"unet.lora_alpha": 1, "unet.lora_alpha": 2}', "given twice"),
    "no object": ("[1]", "expected a JSON object, found a list"),
    "DoRA without magnitudes": ('{"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": true}', "has no magnitudes"),
}


@every(("text", "message"), SETTINGS.values())
def test_settings_in_the_metadata_are_read_under_limits(text, message, tmp_path):
    factors = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": ones(2, 6)}
    factors["unet.mid_block.attentions.0.proj_in.lora_B.weight"] = ones(8, 2)
    save_file(factors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": text})
    with pytest.raises(AdapterError, match=message):
        Adapter.open(tmp_path / "a.safetensors", "a")


MLX = {
    "no inputs": (PAIR | {f"{PATH}.lora_a": ones(0, 2)}, {}, "has no values"),
    "a prefix of PEFT's": ({f"base_model.model.{n}": t for n, t in PAIR.items()}, {}, "a prefix or a wrapper of PEFT's"),
    "an alpha that no number holds": (PAIR, {"scale": 1e308}, "no number holds their product"),
    "magnitudes of another size": (PAIR | {f"{PATH}.m": ones(5)}, {"kind": "dora"}, "it must have 8 values"),
    "magnitudes beside 'lora'": (PAIR | {f"{PATH}.m": ones(8)}, {}, "says 'lora', so that mlx-lm passes them over"),
}


@every(("tensors", "changes", "message"), MLX.values())
def test_mlx_folders_that_contradict_themselves_are_refused(tensors, changes, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        Adapter.open(write_mlx(tmp_path / "a", tensors, **changes), "a")


def test_the_flag_of_earlier_mlx_is_dora(tmp_path):
    earlier = {"use_dora": True, "lora_parameters": {"rank": 2, "scale": 2.0}}
    place = write_mlx(tmp_path / "a")
    (place / "adapter_config.json").write_text(json.dumps(earlier))
    with pytest.raises(AdapterError, match="use_dora is set, but 1 of 1 modules have no lora_magnitude_vector"):
        Adapter.open(place, "a")
    save_file(PAIR | {f"{PATH}.m": ones(8)}, place / "adapters.safetensors")
    assert Adapter.open(place, "a").targets[PATH].is_dora


@every(("file", "message"), [("adapters.npz", "early mlx"), ("0000100_adapters.safetensors", "The folder holds 0000100_")])
def test_mlx_folders_without_the_file_of_that_name(file, message, tmp_path):
    place = write_mlx(tmp_path / file)
    (place / "adapters.safetensors").rename(place / file)
    with pytest.raises(AdapterError, match=f"there is no adapters.safetensors next to it. .*{message}"):
        Adapter.open(place, "a")


@every(("file", "message"), [
    ("adapters.safetensors", "Give the folder"), ("adapter_config.json", "Give the folder"), ("a.ckpt", "by its name"),
    ("a.GGUF", "by its name"),
])  # fmt: skip
def test_a_file_that_is_no_adapter_by_itself(file, message, tmp_path):
    place = write_mlx(tmp_path / "a")
    (place / "a.ckpt").write_bytes(b"")
    (place / "a.GGUF").write_bytes(b"")
    with pytest.raises(AdapterError, match=message):
        Adapter.open(place / file, "a")


def test_a_module_with_the_factors_of_two_layers_is_refused(tmp_path):
    embedding = {"embed.lora_embedding_A": ones(2, 20), "embed.lora_embedding_B": ones(6, 2)}
    write_adapter(tmp_path / "a", {"embed": Linear(8, 6)}, extra=embedding)
    with pytest.raises(AdapterError, match=r"has factors of two kinds of layer: .*lora_A.*lora_B.* besides lora_embedding_A"):
        Adapter.open(tmp_path / "a", "a")


@every("name", ["model.a\0b", "model.a\x1bb"])
def test_a_module_with_a_control_character_is_refused(name, tmp_path):
    folder = tmp_path / name.encode().hex()
    write_adapter(folder, {name: Linear(8, 6), PATH: Linear(8, 6)}, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="1 names hold a control character"):
        Adapter.open(folder, "a")


def test_the_configuration_of_one_program_does_not_count_for_the_tensors_of_another(tmp_path):
    write_adapter(tmp_path / "a", {PATH: Linear(8, 6)})
    write_mlx(tmp_path / "a")
    with pytest.raises(AdapterError, match="Keep the files of one program"):
        Adapter.open(tmp_path / "a", "a")


def test_a_file_of_another_format_in_the_folder_is_said(tmp_path):
    write_adapter(tmp_path / "a", {PATH: Linear(8, 6)})
    save_file(PAIR, tmp_path / "a" / "adapters.safetensors")
    (note,) = Adapter.open(tmp_path / "a", "a").origin.notes
    assert note == f"{tmp_path / 'a' / 'adapters.safetensors'} is of another format, mlx, and was not read."


def test_of_several_files_one_must_be_named(tmp_path):
    for name in "ab":
        save_file(
            {f"{QUERY}.lora_down.weight": ones(2, 6), f"{QUERY}.lora_up.weight": ones(8, 2)}, tmp_path / f"{name}.safetensors"
        )
    with pytest.raises(AdapterError, match=r"a\.safetensors, b\.safetensors: name one of these files"):
        Adapter.open(tmp_path, "a")


LLAMA = {
    "a part twice": ({"more": ("blk.0.attn_q.lora_a", ones(2, 6))}, "the same part of one module"),
    "a number with zeros": ({"more": ("blk.00.attn_q.weight.lora_a", ones(2, 6))}, "not understood"),
    "heads that do not divide the rows": ({"heads": 3}, "not pairs in each of 3 heads"),
    "the configuration of another model": ({"model": "qwen2"}, "of another base model, whose heads say nothing"),
    "an architecture that is a number": ({"fields": {"general.architecture": 3}}, "of the architecture 3"),
}


@every(("changes", "message"), LLAMA.values())
def test_gguf_files_that_contradict_themselves_are_refused(changes, message, tmp_path):
    more = [changes["more"]] if "more" in changes else []
    place = write_llama(tmp_path / message, *more, **{k: v for k, v in changes.items() if k != "more"})
    with pytest.raises(AdapterError, match=message):
        Adapter.open(place, "a")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


FIELDS = b"".join(text(k) + struct.pack("<I", 8) + text(v) for k, v in (("general.type", "adapter"), ("adapter.type", "lora")))


def test_an_architecture_that_is_a_list_is_refused(tmp_path):
    listed = text("general.architecture") + struct.pack("<IIQI", 9, 4, 1, 1)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 3) + FIELDS + listed)
    with pytest.raises(AdapterError, match=r"of the architecture \[1\]"):
        Adapter.open(tmp_path / "a.gguf", "a")


@every(
    ("version", "message"),
    [(b"\0\0\0\3", "a big-endian GGUF file"), (b"\1\0\0\0", "of version 1"), (b"\4\0\0\0", "of version 4")],
)
def test_a_version_that_is_not_read_is_no_damage(version, message, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + version + bytes(100))
    with pytest.raises(AdapterError, match=message) as caught:
        GgufFile(tmp_path / "a.gguf")
    assert "damaged" not in str(caught.value)


@every(("kind", "value", "found"), [
    (9, struct.pack("<IQII", 4, 2, 5, 6), [5, 6]), (8, text("5"), "must be a list of integers"),
    (9, struct.pack("<IQ", 8, 1) + text("5"), "must be a list of integers"),
])  # fmt: skip
def test_the_tokens_that_an_alora_acts_after_are_read(kind, value, found, tmp_path):
    fields = FIELDS + text("general.architecture") + struct.pack("<I", 8) + text("qwen2")
    fields += text("adapter.alora.invocation_tokens") + struct.pack("<I", kind) + value
    shapes = {"lora_a": (6, 2), "lora_b": (2, 8)}  # the fastest dimension first
    heads = [text(f"blk.0.attn_q.weight.{part}") + struct.pack("<IQQIQ", 2, *shape, 0, 64 * i)
             for i, (part, shape) in enumerate(shapes.items())]  # fmt: skip
    lead = b"GGUF" + struct.pack("<IQQ", 3, 2, 4) + fields + b"".join(heads)
    (tmp_path / "a.gguf").write_bytes(lead + bytes(-len(lead) % 32) + bytes(128))
    if isinstance(found, str):
        with pytest.raises(AdapterError, match=found):
            Adapter.open(tmp_path / "a.gguf", "a")
    else:
        assert Adapter.open(tmp_path / "a.gguf", "a").config.raw["alora_invocation_tokens"] == found


def test_tensors_do_not_share_bytes_nor_fields_names(tmp_path):
    tensors = b"".join(text(n) + struct.pack("<IQIQ", 1, 4, 0, 0) for n in "ab")
    (tmp_path / "a.gguf").write_bytes((b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + tensors).ljust(160, b"\0"))
    with pytest.raises(AdapterError, match="'b' shares bytes with another tensor"):
        GgufFile(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 4) + FIELDS * 2)
    with pytest.raises(AdapterError, match=r"'general\.type' is there twice"):
        GgufFile(tmp_path / "b.gguf")


BLOCKS = [f"model.layers.{i}.self_attn.v_proj" for i in range(3)]
BASE = {"model_type": "llama", "num_attention_heads": 4}


def write_base(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BASE))
    return str(folder)


@every("to", ["mlx", "gguf"])
def test_modules_without_a_scaling_do_not_choose_that_of_all(to, tmp_path):
    written = write_adapter(tmp_path / to, {p: Linear(8, 6, alpha=3 if "0" in p else 0) for p in BLOCKS})
    plait.convert(tmp_path / to, to=to, out=tmp_path / "out", force=True, base_model=write_base(tmp_path / "base"))
    found = Adapter.open(tmp_path / "out", "out")
    for path, target in found.targets.items():
        delta = target.scaling * found.read(path, torch.float64)[0].dense().numpy()
        assert abs(delta - written.deltas[path]).max() <= 1e-5 * abs(written.deltas[path]).max(), path


@every(("to", "alpha", "pattern", "message"), [
    ("mlx", 1.0, 1e300, "out of the range of float32"), ("gguf", 1.0, 1e-60, "out of the range of float32"),
    ("gguf", 1e300, 1e300, "the alpha of most modules is inf"), ("gguf", 1e-60, 1e-60, "the alpha of most modules is 0"),
])  # fmt: skip
def test_a_scaling_that_the_format_does_not_hold_is_refused(to, alpha, pattern, message, tmp_path):
    place = tmp_path / f"{to} {alpha}"
    write_adapter(place, {p: Linear(8, 6, alpha=pattern if "0" in p else alpha) for p in BLOCKS})
    with pytest.raises(PlanError, match=message):
        plait.convert(place, to=to, out=tmp_path / "out", base_model=write_base(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


def test_heads_that_do_not_divide_the_rows_are_refused_before_writing(tmp_path):
    write_adapter(tmp_path / "a", {PATH: Linear(8, 6)})
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(BASE | {"num_attention_heads": 3}))
    with pytest.raises(PlanError, match=r"a.adapter_model\.safetensors: .* not pairs in each of 3 heads"):
        plait.convert(tmp_path / "a", to="gguf", out=tmp_path / "out", base_model=str(tmp_path / "base"))
