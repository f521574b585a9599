"""`plait sft --push_to_hub` against a local Hub: which files arrive, and that nothing stale or partial ever does."""

from __future__ import annotations

import json

import pytest

from tests.chat_models import questions, save_chat_model, write_rows
from tests.hub_server import Account, HubServer
from tests.warm import PLAIT, run_forked

TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "plait.lock", *TOKENIZER}
MODEL = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "plait.lock", "merge_metadata.json",
    "summary.json", *TOKENIZER,
}  # fmt: skip
HEAD = """
import json, warnings
warnings.simplefilter("ignore")
import plait
from plait.training import sft
found = {}
def train(key, out, **flags):
    quick = dict(max_steps=1, save_strategy="no", logging_steps=1, disable_tqdm=True, use_peft=True, lora_r=2)
    try:
        done = plait.sft(dataset_name_or_path="rows.jsonl", output_dir=out, **{"model_name_or_path": "base", **quick, **flags})
        found[key] = [done.url, [[f.step, f.reason, f.command] for f in done.failures]]
    except plait.PlaitError as error:
        found[key] = str(error)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    save_chat_model(folder / "base")
    write_rows(folder / "rows.jsonl", questions(4))
    return folder


def run(hub, place, code, *, token="hf_test"):
    program = f"{HEAD}{code}\nprint('FOUND' + json.dumps(found))"
    done = run_forked(program, folder=place, environment=hub.env(place / "home", token=token))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("FOUND")[2])


def names(hub, repo):
    return set(hub.files(repo)) - {".gitattributes"}


def test_what_arrives(place):
    with HubServer() as hub:
        commit = hub.add("org/base", {file.name: file.read_bytes() for file in (place / "base").iterdir()})
        found = run(
            hub,
            place,
            """
train("adapter", "a", push_to_hub=True, hub_repo_id="org/adapter", merge_adapter_with_base=True, hub_private_repo=True)
train("merged", "a", push_to_hub=True, hub_repo_id="org/merged", merge_adapter_with_base=True, upload_merged_model=True)
full = dict.fromkeys(("use_peft", "lora_r"))
train("full", "full", push_to_hub=True, hub_repo_id="full", **full)
train("hub", "hub", model_name_or_path="org/base", merge_adapter_with_base=True, push_to_hub=True, hub_repo_id="org/from-hub")
""",
        )
        assert found["adapter"] == [f"{hub.url}/org/adapter", []]
        assert names(hub, "org/adapter") == ADAPTER
        assert hub.repos["org/adapter"].private
        assert (
            hub.files("org/adapter")["adapter_model.safetensors"]
            == (place / "a/adapter/adapter_model.safetensors").read_bytes()
        )
        assert found["merged"] == [f"{hub.url}/org/merged", []]
        assert names(hub, "org/merged") == MODEL
        assert hub.files("org/merged")["model.safetensors"] == (place / "a/merged_model/model.safetensors").read_bytes()
        assert found["full"] == [f"{hub.url}/tester/full", []]
        assert names(hub, "tester/full") == MODEL - {"merge_metadata.json", "summary.json"}
        assert found["hub"] == [f"{hub.url}/org/from-hub", []]
        assert json.loads(hub.files("org/from-hub")["adapter_config.json"])["base_model_name_or_path"] == "org/base"
        assert b"base_model: org/base" in hub.files("org/from-hub")["README.md"]
        assert json.loads((place / "hub" / "merged_model" / "plait.lock").read_text())["base"]["commit"] == commit
        for repo in hub.repos:
            for file, data in hub.files(repo).items():
                assert str(place).encode() not in data, f"{repo}/{file} names a folder of this machine"


def test_a_stale_or_partial_model_is_never_uploaded(place):
    """A merge fails: neither the merged model of an earlier run nor the adapter goes up in its place."""
    with HubServer() as hub:
        found = run(
            hub,
            place,
            """
push = dict(merge_adapter_with_base=True, push_to_hub=True, upload_merged_model=True, hub_repo_id="org/model")
train("first", "b", merge_adapter_with_base=True)
bake = sft.run_bake
def broken(*args, **kwargs):
    raise MemoryError("no memory")
sft.run_bake = broken
train("changed", "b", seed=7, force=True, **push)
import pathlib
stale = pathlib.Path("b/merged_model")
found["left"] = stale.exists()
sft.run_bake = bake
train("made", "c", merge_adapter_with_base=True)
import shutil
shutil.rmtree("b/merged_model", ignore_errors=True)
shutil.copytree("c/merged_model", "b/merged_model")  # of another run
sft.run_bake = broken
train("other", "b", seed=7, **push)
""",
        )
        assert found["first"] == [None, []]
        assert not found["left"]
        for key in ("changed", "other"):
            url, failures = found[key]
            assert url is None
            assert [step for step, _, _ in failures] == ["merge", "push"]
            assert failures[0][1] == "MemoryError: no memory"
            assert "no merged model of this run, and nothing else is uploaded" in failures[1][1]
            assert failures[1][2] == "plait push b/merged_model org/model"
        assert "org/model" not in hub.repos
        assert not (place / "b" / "merged_model").exists(), "what `plait push` would take for this run's"


def test_a_token_that_will_not_do_is_refused_before_training(place):
    with HubServer({"hf_test": Account("tester", ("org",)), "hf_read": Account("reader", (), "read")}) as hub:
        code = 'train("push", "d", push_to_hub=True, hub_repo_id="org/x")'
        found = run(
            hub,
            place,
            code
            + '\ntrain("read", "d", push_to_hub=True, hub_repo_id="reader/x", hub_token="hf_read")'
            + '\ntrain("theirs", "d", push_to_hub=True, hub_repo_id="other/x", hub_token="hf_test")'
            + '\nimport os; found["token"] = os.environ.pop("HF_TOKEN")'
            + code.replace("push", "none", 1).join(["\n", ""]),
            token="hf_wrong",
        )
        assert "--push_to_hub: cannot push to 'org/x'. " in found["none"]
        assert "the Hub does not accept HF_TOKEN" in found["push"]
        assert "the token of 'reader' may only read" in found["read"]
        assert "'tester' can create repositories only under: tester, org" in found["theirs"]
        assert found["token"] == "hf_wrong"
        assert not (place / "d").exists()
        assert not hub.asked("POST|PUT")


def test_a_push_that_fails_leaves_everything_and_says_what_to_do(place):
    with HubServer() as hub:
        hub.watch = lambda request: setattr(hub, "status", 503 if "POST" in request else None)
        message = 'push_to_hub=True, hub_repo_id="org/late", hub_private_repo=True'
        url, failures = run(hub, place, f'train("push", "e", {message})')["push"]
        assert url is None
        ((step, reason, command),) = failures
        assert (step, command) == ("push", "plait push e/adapter org/late --private")
        assert "pushing" in reason
        assert (place / "e" / "adapter" / "plait.lock").is_file()
        hub.watch, hub.status = lambda request: None, None
        environment = hub.env(place / "home", token="hf_test")
        again = run_forked(PLAIT, *command.split()[1:], folder=place, environment=environment)
        assert again.returncode == 0, again.stderr
        assert names(hub, "org/late") == ADAPTER
