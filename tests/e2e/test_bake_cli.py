"""`plait bake`, and `plait merge --bake-dir`, as one types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers as tf
from safetensors.torch import load_file

from plait.cli.main import main
from tests.adapters_on_disk import write_adapter
from tests.baking_models import make_adapter, save_model
from tests.hub_server import HubServer
from tests.unit.test_bake_plan import MODULES, write_base
from tests.warm import PLAIT, run_forked


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, MODULES, seed=seed, base=None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def plait(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process; return exit code, stdout, stderr."""
    try:
        main(list(arguments))
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    message = capsys.readouterr()
    return code, message.out, message.err


PAIR = ("a=./a", "b=./b", "--weights", "0.7", "0.3", "--base-id", "./base")


def test_bake(place, capsys):
    code, out, err = plait(capsys, "bake", *PAIR, "-o", "model")
    assert code == 0, err
    assert "./base with a + b → model" in out
    assert "4 target modules" in out
    assert "bake: " in err
    assert json.loads((place / "model" / "plait.lock").read_text())["kind"] == "bake"


def test_json_is_one_object(place, capsys):
    code, out, _ = plait(capsys, "bake", *PAIR, "-o", "model", "--json", "--dtype", "bfloat16", "--shard-size", "1GB")
    message = json.loads(out)
    assert code == 0
    assert message["folder"] == "model"
    assert list(message["shards"]) == ["model.safetensors"]
    assert message["dtype"] == "bfloat16"


def test_dry_run_writes_nothing(place, capsys):
    before = sorted(place.iterdir())
    code, out, _ = plait(capsys, "bake", *PAIR, "-o", "model", "--dry-run")
    assert code == 0
    assert "model-00001-of-00002.safetensors" in out
    assert "model.layers.*.q_proj.weight (2): added to" in out or "model.layers.*.q_proj.weight (1): added to" in out
    assert "to write" in out
    assert "of memory" in out
    code, out, _ = plait(capsys, "bake", *PAIR, "-o", "model", "--dry-run", "--json")
    assert json.loads(out)["target_modules"] == 4
    assert sorted(place.iterdir()) == before


def test_a_recipe(place, capsys):
    (place / "recipe.yaml").write_text(
        "base_model: ./base\nadapters: [{name: a, path: ./a}, {name: b, path: ./b}]\nmethod: ties\n"
    )
    code, _, err = plait(capsys, "bake", "recipe.yaml", "--set", "method.density=0.5", "-o", "model")
    assert code == 0, err
    recipe = json.loads((place / "model" / "plait.lock").read_text())["recipe"]
    assert (recipe["method"]["name"], recipe["method"]["density"]) == ("ties", 0.5)


def test_merge_bakes_too(place, capsys):
    code, out, err = plait(capsys, "merge", *PAIR, "-o", "merged", "--bake-dir", "model", "--json")
    assert code == 0, err
    message = json.loads(out)
    assert (message["folder"], message["bake"]["folder"]) == ("merged", "model")
    assert (place / "merged" / "adapter_model.safetensors").is_file()
    code, _, err = plait(capsys, "bake", *PAIR, "-o", "alone")
    assert code == 0, err
    for path in (place / "alone").glob("*.safetensors"):
        assert path.read_bytes() == (place / "model" / path.name).read_bytes()


def test_what_is_wrong_with_the_bake_is_said_before_the_merge(place, capsys):
    (place / "model").mkdir()
    (place / "model" / "mine.txt").write_text("x")
    code, _, err = plait(capsys, "merge", *PAIR, "-o", "merged", "--bake-dir", "model")
    assert code == 2
    assert "model exists already" in err
    assert not (place / "merged").exists()
    code, _, err = plait(capsys, "merge", "./a", "-o", "merged", "--bake-dir", "elsewhere")
    assert code == 2
    assert "a bake needs the base model" in err
    assert not (place / "merged").exists()


def test_flags_that_need_each_other(place, capsys):
    code, _, err = plait(capsys, "bake", *PAIR, "-o", "model", "--private")
    assert (code, "--push-baked-repo" in err) == (2, True)
    code, _, err = plait(capsys, "merge", *PAIR, "--push-baked-repo", "org/x")
    assert (code, "--bake-dir" in err) == (2, True)
    code, _, err = plait(capsys, "bake", *PAIR, "-o", "model", "--device", "nonsense")
    assert (code, "device 'nonsense' cannot be used" in err) == (2, True)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
def test_check_compares_with_the_live_merge(tmp_path, capsys, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    base = save_model("llama tied", tmp_path / "base")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(30)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(base)
    make_adapter(base, tmp_path / "a", 1, tf.AutoModelForCausalLM, target_modules=["q_proj"], task_type="CAUSAL_LM")
    arguments = ("bake", "./a", "--base-id", "./base", "-o", "model", "--json", "--check", "prompts.txt")
    code, _, err = plait(capsys, *arguments)
    assert (code, "prompts.txt: No such file or directory. Give a file of prompts" in err) == (2, True)
    assert not (tmp_path / "model").exists()
    (tmp_path / "prompts.txt").write_text("w1 w2 w3\n")
    tokenizers = {p: p.read_bytes() for p in base.glob("tokenizer*")}
    for path in tokenizers:
        path.unlink()
    code, _, err = plait(capsys, *arguments)
    assert (code, "the tokenizer cannot be loaded" in err) == (2, True)
    assert "The model is complete in model" in err
    for path, content in tokenizers.items():
        path.write_bytes(content)
    code, out, err = plait(capsys, *arguments, "--force")
    assert code == 0, err
    (row,) = json.loads(out)["parity"]["comparisons"]
    assert row["dtype"] == "float32"
    assert row["overall"]["max_difference"] < 1e-5


def test_from_the_hub_and_to_the_hub(place):
    """The base comes from the Hub without its other weight files, and its hashes from the cache; the model goes there."""
    with HubServer() as hub:
        files = {p.name: p.read_bytes() for p in (place / "base").iterdir()}
        extra = {
            "README.md": b"---\nlicense: apache-2.0\n---\n",
            "modeling_x.py": b"# code",
            "pytorch_model.bin": b"not needed",
        }
        hub.add("org/base", {**files, **extra})
        hub.add("tester/model", {"adapter_config.json": b"{}", "pytorch_model.bin": b"older"}, private=True)
        words = ["bake", "./a", "--base-id", "org/base", "-o", "model", "--push-baked-repo", "tester/model", "--private"]
        done = run_forked(PLAIT, *words, folder=place, environment=hub.env(place / "home", token="hf_test"))
        assert done.returncode == 0, done.stderr
        assert "pushed to" in done.stdout
        assert not [path for path in hub.asked(r"^GET") if "pytorch_model.bin" in path]
        pushed = hub.files("tester/model", "main")
        assert hub.repos["tester/model"].private
    made = {p.name: p for p in (place / "model").iterdir()}
    assert set(pushed) - {".gitattributes"} == set(made)
    assert "modeling_x.py" in made
    card = made["README.md"].read_text()
    assert "base_model: org/base\nbase_model_relation: merge\n" in card
    assert "license: apache-2.0" in card
    lock = json.loads(made["plait.lock"].read_text())
    assert len(lock["base"]["commit"]) == 40
    assert set(lock["base"]["files"]) == {p for p in files if p.endswith(".safetensors")}
    assert (
        load_file(made["model-00001-of-00002.safetensors"]).keys()
        == load_file(Path("base", "model-00001-of-00002.safetensors")).keys()
    )
