"""What a bake says before it does anything: where everything goes, what goes along, and what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.baking.pipeline import plan_bake
from plait.baking.plan import BakePlan, bake_options
from plait.baking.shards import parse_size
from plait.errors import AdapterError, AddressError, PlanError, RecipeError
from plait.recipes.request import read_request
from tests.adapters_on_disk import Embedding, Linear, layers, write_adapter

SHAPES = {"q_proj": (6, 8), "k_proj": (4, 8)}
MODULES = layers(2, SHAPES)


def write_base(folder: Path, *, prefix: str = "model.", tied: bool = False, **more: torch.Tensor) -> Path:
    """Write a base model in two shards."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"{prefix}layers.{i}.{name}.weight": torch.randn(shape, generator=generator)
        for i in range(2)
        for name, shape in SHAPES.items()
    } | {f"{prefix}norm.weight": torch.ones(8)}
    halves = [dict(list(tensors.items())[:3]), dict(list(tensors.items())[3:]) | more]
    folder.mkdir()
    weight_map = {}
    for number, half in enumerate(halves, 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file(half, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "float32", "tie_word_embeddings": tied}))
    return folder


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter", MODULES, base=None).folder


def plan(
    base: Path | None, *adapters: Path, dtype: str | None = None, shard_size: str | None = None, **more: object
) -> BakePlan:
    settings = {**more, **({} if base is None else {"base_model": str(base)})}
    recipe, folder = read_request(None, list(adapters), settings)
    return plan_bake(recipe, bake_options(dtype=dtype, shard_size=shard_size), folder=folder)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "there is no config.json"),
        ("{}", "config.json names no model_type"),
        ('{"torch_dtype": "float32"}', "names no model_type"),
    ],
)
def test_a_base_that_transformers_cannot_load_is_noted_first(base, adapter, text, what):
    (base / "config.json").unlink()
    if text is not None:
        (base / "config.json").write_text(text)
    (note,) = [n for n in plan(base, adapter).notes if "transformers cannot load the result" in n]
    assert what in note
    (base / "config.json").write_text('{"model_type": "llama"}')
    assert not any("transformers cannot" in n for n in plan(base, adapter).notes)


def test_every_module_finds_its_tensor_and_the_rest_is_copied(base, adapter):
    found = plan(base, adapter)
    assert found.target_modules == 4
    assert {t.name: t.targets for s in found.shards for t in s.tensors} == {f"{m}.weight": (m,) for m in MODULES}
    assert [s.copied for s in found.shards] == [0, 8 * 4]
    assert [s.size for s in found.shards] == [(base / s.name).stat().st_size for s in found.shards]
    assert found.output_bytes == sum(s.size for s in found.shards)
    assert found.carried == {"config.json": "base", "model.safetensors.index.json": "new"}


@pytest.mark.parametrize("prefix", ["", "model.language_model."])
def test_a_prefix_here_and_not_there(prefix, tmp_path, adapter):
    base = write_base(tmp_path / "other", prefix=prefix)
    if prefix:
        adapter = write_adapter(tmp_path / "bare", layers(2, SHAPES) and {
            m.removeprefix("model."): x for m, x in MODULES.items()
        }).folder  # fmt: skip
    found = plan(base, adapter)
    assert sum(len(s.tensors) for s in found.shards) == 4


def test_what_has_no_place_is_listed_whole(base, tmp_path):
    modules = {**MODULES, "model.layers.7.q_proj": Linear(6, 8), "model.vision.up": Linear(3, 3)}
    adapter = write_adapter(tmp_path / "more", modules).folder
    with pytest.raises(PlanError) as caught:
        plan(base, adapter)
    text = str(caught.value)
    assert "2 of 6 target modules have no tensor in" in text
    assert "model.layers.7.q_proj (" in text
    assert "model.vision.up (" in text
    assert "Is this the base model that they were trained on?" in text


def test_all_shapes_that_differ_are_told_at_once(base, tmp_path):
    modules = {**MODULES, "model.layers.0.q_proj": Linear(9, 8), "model.layers.1.k_proj": Linear(4, 7)}
    with pytest.raises(PlanError, match="2 problems") as caught:
        plan(base, write_adapter(tmp_path / "other", modules).folder)
    assert re.search(r"'model.layers.0.q_proj.weight' in \S+ is \[6, 8\], the adapters need \[9, 8\]", str(caught.value))


def test_integers_take_no_delta_and_their_file_is_named(base, adapter):
    file = next(p for p in base.glob("*.safetensors") if "model.layers.0.q_proj.weight" in load_file(p))
    save_file({n: t.int() if n.endswith("0.q_proj.weight") else t for n, t in load_file(file).items()}, file)
    wanted = f"'model.layers.0.q_proj.weight' in {file} is stored as I32; deltas are added to F64, F32, F16, BF16"
    with pytest.raises(PlanError, match=re.escape(wanted)):
        plan(base, adapter)


def test_no_base_model_anywhere(adapter):
    with pytest.raises(RecipeError, match=r"a bake needs the base model.*--base-id"):
        plan(None, adapter)


def test_the_adapters_name_the_base(base, tmp_path):
    adapter = write_adapter(tmp_path / "naming", MODULES, base=str(base)).folder
    assert plan(None, adapter).base == str(base)


def test_a_base_that_is_not_there(tmp_path, adapter):
    with pytest.raises(AddressError, match="there is no folder") as caught:
        plan(tmp_path / "nowhere", adapter)
    assert "--base-id" in "".join(caught.value.__notes__)


def test_a_missing_and_a_truncated_shard_are_told_together(base, adapter):
    first, second = sorted(base.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="the base model is not complete: 2 problems") as caught:
        plan(base, adapter)
    assert "No such file" in str(caught.value)
    assert "truncated" in str(caught.value)


def test_an_index_that_is_wrong(base, adapter):
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra.weight"] = "model-00001-of-00002.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterError, match=r"'extra\.weight' should be in model-00001-of-00002\.safetensors, but is not"):
        plan(base, adapter)


def test_an_index_of_nothing(base, adapter):
    (base / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    with pytest.raises(AdapterError, match=r"index\.json: names no tensor"):
        plan(base, adapter)


def test_a_link_that_leads_nowhere(base, adapter):
    """Such as a tokenizer whose file is gone from the Hub's cache: the bake would be without."""
    (base / "tokenizer.json").symlink_to("../../blobs/gone")
    with pytest.raises(AdapterError, match=r"tokenizer\.json: a link that leads nowhere"):
        plan(base, adapter)


@pytest.mark.parametrize(
    "settings",
    [{"quantization_config": {"quant_method": "gptq"}}, {"text_config": {"quantization_config": {"quant_method": "awq"}}}],
)
def test_a_quantized_base_by_its_configuration(settings, base, adapter):
    (base / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        PlanError, match=r"the base model is quantized \((gptq|awq), in config\.json\).*Give the 16- or 32-bit model"
    ):
        plan(base, adapter)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("x.qweight", torch.int32),
        ("x.weight.absmax", torch.float32),
        ("x.weight", torch.float8_e4m3fn),
        ("x.SCB", torch.float32),
    ],
)
def test_a_quantized_base_by_its_tensors(name, dtype, tmp_path, adapter):
    base = write_base(tmp_path / "quantized", **{name: torch.zeros(4, 4).to(dtype)})
    with pytest.raises(PlanError, match="the base model is quantized"):
        plan(base, adapter)


def test_integers_that_are_no_weights_are_copied(tmp_path, adapter):
    base = write_base(tmp_path / "ids", position_ids=torch.arange(5))
    assert plan(base, adapter).shards[1].copied == 8 * 4 + 5 * 8


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"shard_size": "200B"}], ids=str)
def test_dtypes_that_are_only_copied(settings, tmp_path, adapter):
    odd = {"freqs": torch.randn(3, 2, dtype=torch.complex64), "table": torch.arange(5).to(torch.uint16)}
    base = write_base(tmp_path / "odd", **odd, nothing=torch.zeros(0, 3), scale=torch.tensor(2.0))
    found = tensors(plait.bake([adapter], base=base, out=tmp_path / "out", **settings).folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in odd.items())
    assert (found["nothing"].shape, float(found["scale"])) == ((0, 3), 2.0)


def test_a_folder_without_safetensors(tmp_path, adapter):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "consolidated.pth").write_bytes(b"x")
    with pytest.raises(AdapterError, match=r"It holds consolidated\.pth; convert it first"):
        plan(tmp_path / "old", adapter)
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterError, match=r"pytorch_model\.bin: not a file of tensors that plait can read"):
        plan(tmp_path / "old", adapter)
    with pytest.raises(AdapterError, match="It holds an adapter; give the base model"):
        plan(
            adapter.parent / shutil.copytree(adapter, tmp_path / "copy", ignore=lambda *_: ["adapter_model.safetensors"]),
            adapter,
        )


def test_an_embedding_whose_use_is_not_known(tmp_path):
    """Without transformers' class and without a word in the configuration, a guess could change the output head."""
    base = write_base(tmp_path / "base", **{"model.embed_tokens.weight": torch.randn(10, 8)})
    (base / "config.json").write_text("{}")
    adapter = write_adapter(tmp_path / "a", {"model.embed_tokens": Embedding(10, 8)}).folder
    with pytest.raises(PlanError, match="whether the model uses it as its output head too is not known"):
        plan(base, adapter)


def test_options():
    assert bake_options(dtype="bfloat16", shard_size="5GB").shard_size == "5GB"
    with pytest.raises(RecipeError, match="dtype 'int8' is not allowed; there are float64, float32, float16, bfloat16"):
        bake_options(dtype="int8")
    with pytest.raises(RecipeError, match="'5 apples' is not a size of a shard"):
        bake_options(shard_size="5 apples")
    assert [parse_size(t) for t in ("900", "5GB", "1.5 mb", "2KiB")] == [900, 5 * 10**9, 1_500_000, 2048]


def test_a_rank_is_no_word_for_a_bake(base, adapter):
    assert any("is for adapters" in note for note in plan(base, adapter, rank=1).notes)


def test_everything_goes_along_but_weights_and_cards(base, adapter, tmp_path):
    for name in ("tokenizer.json", "generation_config.json", "modeling_x.py", "LICENSE", "chat_template.jinja"):
        (base / name).write_text(f'{{"{name}": "of the base"}}')
    for name in ("README.md", "pytorch_model.bin", "plait.lock", "training_args.bin", ".gitattributes"):
        (base / name).write_text("not wanted")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (adapter / "tokenizer.json").write_text('{"of": "the adapter"}')
    result = plait.bake([adapter], base=base, out=tmp_path / "out")
    texts = {p.name: p.read_text() for p in result.folder.iterdir() if p.is_file() and p.suffix != ".safetensors"}
    for name in ("generation_config.json", "modeling_x.py", "LICENSE", "chat_template.jinja"):
        assert texts[name] == f'{{"{name}": "of the base"}}'
    assert texts["tokenizer.json"] == '{"of": "the adapter"}'
    assert "not wanted" not in texts.values()
    assert any("the tokenizer is that of " in note for note in result.plan.notes)


@pytest.mark.parametrize("replaced", [False, True])
def test_further_chat_templates_go_with_the_tokenizer(base, adapter, tmp_path, replaced):
    for folder, word in ((base, "base"), (adapter, "adapter")) if replaced else ((base, "base"),):
        (folder / "additional_chat_templates").mkdir()
        (folder / "tokenizer.json").write_text(f'{{"of": "{word}"}}')
        for name in ("common", word):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(word)
    result = plait.bake([adapter], base=base, out=tmp_path / "out")
    found = {p.name: p.read_text() for p in (result.folder / "additional_chat_templates").iterdir()}
    owner = "adapter" if replaced else "base"
    assert found == dict.fromkeys(("common.jinja", f"{owner}.jinja"), owner)
    lost = "does not have are not carried: additional_chat_templates/base.jinja"
    assert any(lost in note for note in result.plan.notes) == replaced


def test_tokenizers_that_differ_leave_the_bases(base, tmp_path):
    pair = [write_adapter(tmp_path / n, MODULES, seed=i).folder for i, n in enumerate("ab")]
    (base / "tokenizer.json").write_text("{}")
    for folder in pair:
        (folder / "tokenizer.json").write_text('{"the": "same"}')
    assert plan(base, *pair).carried["tokenizer.json"] == "adapter a"
    (pair[1] / "tokenizer.json").write_text('{"another": 1}')
    found = plan(base, *pair)
    assert found.carried["tokenizer.json"] == "base"
    assert any("bring different tokenizers (tokenizer.json of a, b): the base's is kept" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": ', "this is not JSON"),
        (b"", "this is not JSON"),
        (b"[1]", "expected a JSON object, found a list"),
        (b"\xff\xfe{}", "this is not text in UTF-8"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        (b'{"a": 1, "a": 2}', "given twice"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "thousands of digits"),
    ],
)
def test_json_that_cannot_be_read_is_not_copied(base, adapter, tmp_path, text, message):
    for folder, name in ((base, "tokenizer_config.json"), (adapter, "special_tokens_map.json")):
        (folder / name).write_bytes(text)
    with pytest.raises(AdapterError) as caught:
        plait.bake([adapter], base=base, out=tmp_path / "out")
    for file in (base / "tokenizer_config.json", adapter / "special_tokens_map.json"):
        assert re.search(f"{re.escape(str(file))}.*{message}.*Fetch it again, or delete it", str(caught.value))
    assert not (tmp_path / "out").exists()


def test_a_token_may_be_any_character(base, adapter, tmp_path):
    text = json.dumps({"vocab": {"\0": 0, "NaN": 1, "1e999": 2}, "model_max_length": 10**30})
    (base / "tokenizer.json").write_text(text)
    plait.bake([adapter], base=base, out=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == text


def test_the_license_is_the_bases_word(base, adapter, tmp_path):
    out = tmp_path / "out"
    plait.bake([adapter], base=base, out=out)
    assert "license" not in (out / "README.md").read_text().split("---")[1]
    (base / "README.md").write_text("---\nlicense: llama3.2\n---\n# Base\n")
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n# Adapter\n")
    plait.bake([adapter], base=base, out=out, force=True)
    assert "license: llama3.2" in (out / "README.md").read_text().split("---")[1]


def test_a_device_that_is_not_here_is_refused_before_anything_else(base, adapter, tmp_path):
    message = r"device 'cuda:99' cannot be used: .*Use 'cpu', or an accelerator that torch sees here"
    with pytest.raises(RecipeError, match=message):
        plait.bake([adapter], base=base, out=tmp_path / "out", device="cuda:99")
    with pytest.raises(RecipeError, match="device 'meta' cannot be used: it holds no values"):
        plait.bake([adapter], base=base, out=tmp_path / "out", device="meta")
    assert not list(tmp_path.glob("*out*"))


def test_the_kind_of_device_is_part_of_what_the_bytes_depend_on(base, adapter, tmp_path, monkeypatch):
    """In the lock, so that a rebuild computes there; in the journal, so that a bake goes on only where it was begun."""
    from plait.baking import pipeline
    from plait.baking.identity import bake_digest
    from plait.baking.plan import BakeOptions, prepare_bake

    assert BakeOptions(device="cuda:1").kept["device"] == "cuda"
    recipe, folder = read_request(None, [adapter], {"base_model": str(base)})
    bake = prepare_bake(recipe, BakeOptions(), folder=folder, workers=1)
    here = bake_digest(bake, ["x"], {})
    monkeypatch.setattr("plait.baking.plan.usable_device", torch.device)  # a device is taken for one that is there
    elsewhere = prepare_bake(recipe, BakeOptions(device="cuda:0"), folder=folder, workers=1)
    other = prepare_bake(recipe, BakeOptions(device="cuda:1"), folder=folder, workers=1)
    monkeypatch.undo()
    assert bake_digest(elsewhere, ["x"], {}) == bake_digest(other, ["x"], {}) != here
    assert pipeline._lock(elsewhere, ["x"], {}, {}, tmp_path, tmp_path).options["device"] == "cuda"
