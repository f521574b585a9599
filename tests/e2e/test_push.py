"""`plait push`: finished results to a local server that the real `huggingface_hub` talks to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import plait
from tests.adapters_on_disk import layers, write_adapter
from tests.hub_server import TOKEN, HubServer
from tests.warm import PLAIT, run_forked

MODULES = layers(2, {"q_proj": (12, 8), "v_proj": (8, 8)})
RESULT = {"README.md", "adapter_config.json", "adapter_model.safetensors", "merge_metadata.json", "plait.lock", "summary.json"}


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def merged(tmp_path):
    pair = {name: write_adapter(tmp_path / name, MODULES, seed=i).folder for i, name in enumerate(("a", "b"))}
    return plait.merge(pair, out=tmp_path / "merged").folder


def run(hub: HubServer, home: Path, code: str) -> dict[str, object]:
    """Run `code` in a process that knows only this Hub; return what it put into `found`."""
    script = (
        "import json, plait\nfound = {}\n"
        "def push(key, *args, **kwargs):\n"
        "    try:\n        done = plait.push(*args, **kwargs)\n"
        "        found[key] = [done.url, list(done.left_out), list(done.notes)]\n"
        "    except plait.PlaitError as error:\n        found[key] = f'{type(error).__name__}: {error}'\n"
        f"{code}\nprint(json.dumps(found))"
    )
    done = run_forked(script, environment=hub.env(home, token=TOKEN))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def names(hub: HubServer, repo: str, revision: str = "main") -> set[str]:
    return set(hub.files(repo, revision)) - {".gitattributes"}


def test_branches_pull_requests_and_privacy(hub, merged, tmp_path):
    hub.add("org/open", {"README.md": b"# public"})
    found = run(
        hub,
        tmp_path / "home",
        f"""
push("new", {str(merged)!r}, "org/new", private=True)
push("own", {str(merged)!r}, "mine", message="by hand")
push("branch", {str(merged)!r}, "org/new", revision="v2")
push("pr", {str(merged)!r}, "org/open", create_pr=True)
push("both", {str(merged)!r}, "org/open", create_pr=True, revision="v2")
push("public", {str(merged)!r}, "org/open", private=True)
push("theirs", {str(merged)!r}, "other/repo")
""",
    )
    assert found["new"][0] == f"{hub.url}/org/new"
    assert hub.repos["org/new"].private
    assert names(hub, "org/new") == RESULT
    assert hub.files("org/new")["adapter_model.safetensors"] == (merged / "adapter_model.safetensors").read_bytes()
    assert hub.repos["org/new"].messages[hub.repos["org/new"].sha("main")] == "Merge a, b with linear"
    assert found["own"][0] == f"{hub.url}/tester/mine"
    assert hub.repos["tester/mine"].messages[hub.repos["tester/mine"].sha("main")] == "by hand"
    assert found["branch"][0] == f"{hub.url}/org/new/tree/v2"
    assert names(hub, "org/new", "v2") == RESULT
    assert found["pr"][0] == f"{hub.url}/org/open/discussions/1"
    assert names(hub, "org/open") == {"README.md"}, "the default branch is left alone"
    assert names(hub, "org/open", "refs/pr/1") == RESULT
    assert "a pull request goes to the default branch" in found["both"]
    assert "it exists and is public" in found["public"]
    assert "can create repositories only under: tester, org" in found["theirs"]


def test_what_is_no_whole_result_is_refused_before_the_hub_is_asked(hub, merged, tmp_path):
    adapter = tmp_path / "a"
    stale, gone = tmp_path / "stale", tmp_path / "gone"
    for copy in (stale, gone):
        copy.mkdir()
        for file in merged.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    (stale / "adapter_config.json").write_text("{}")
    (gone / "adapter_model.safetensors").unlink()
    found = run(
        hub,
        tmp_path / "home",
        f"""
push("no lock", {str(adapter)!r}, "org/new")
push("stale", {str(stale)!r}, "org/new")
push("gone", {str(gone)!r}, "org/new")
""",
    )
    assert "there is no plait.lock" in found["no lock"]
    assert "adapter_config.json (changed): not what plait.lock says" in found["stale"]
    assert "adapter_model.safetensors (missing)" in found["gone"]
    assert hub.requests == []


def test_an_edited_card_goes_along_and_other_files_stay(hub, merged, tmp_path):
    card = (merged / "README.md").read_text() + "\nMore about it.\n"
    (merged / "README.md").write_text(card)
    (merged / "[draft] notes.txt").write_text("mine")
    (merged / "logs").mkdir()
    (merged / "logs" / "adapter_model.bin").write_text("mine too")
    found = run(hub, tmp_path / "home", f'push("new", {str(merged)!r}, "org/new")')
    assert found["new"][1] == ["[draft] notes.txt", "logs/adapter_model.bin"]
    assert names(hub, "org/new") == RESULT
    assert hub.files("org/new")["README.md"].decode() == card


def test_weights_of_an_older_result_do_not_stay_beside_the_new(hub, merged, tmp_path):
    """transformers and PEFT would load them first, or complain of them."""
    older = {"adapter_model.bin", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    kept = {"results.json", "images/plot.png", "heads/x/heads.safetensors"}
    hub.add("org/repo", dict.fromkeys({*older, *kept}, b"old"))
    run(hub, tmp_path / "home", f'push("again", {str(merged)!r}, "org/repo")')
    assert names(hub, "org/repo") == RESULT | kept


def test_what_an_older_result_had_and_this_has_not_goes(hub, merged, tmp_path):
    """The lock in the repository says what was part of the older result; what others put there stays."""
    heads = {}
    for i, name in enumerate("ab"):
        score = {"score.weight": torch.full((2, 8), float(i))}
        heads[name] = write_adapter(tmp_path / f"h{i}", MODULES, seed=i, extra=score, modules_to_save=["score"]).folder
    older = plait.merge(heads, out=tmp_path / "older").folder
    assert (older / "heads").is_dir()
    (older / "notes.txt").write_text("not of the result")
    hub.add("org/repo", {"images/plot.png": b"theirs", "heads/theirs.bin": b"theirs"})
    run(hub, tmp_path / "home", f'push("one", {str(older)!r}, "org/repo", revision="v1")\n')
    mine = {p.relative_to(older).as_posix() for p in older.rglob("*") if p.is_file()} - {"notes.txt"}
    others = {"images/plot.png", "heads/theirs.bin"}
    assert names(hub, "org/repo", "v1") == mine | others
    run(hub, tmp_path / "home", f'push("two", {str(merged)!r}, "org/repo", revision="v1")')
    assert names(hub, "org/repo", "v1") == RESULT | others
    assert names(hub, "org/repo") == others, "the other branch is left alone"


def test_a_model_in_place_of_an_adapter_and_back(hub, merged, tmp_path):
    """Loaders take a repository for what the configurations in it say."""
    from tests.small_models import peft_adapter, save_base

    base = save_base(tmp_path / "base")
    adapter = peft_adapter(tmp_path / "p", 1, target_modules=["q_proj"])
    baked = plait.bake({"a": adapter}, base=base, out=tmp_path / "baked").folder
    hub.add("org/repo", {"adapter_config.json": b"{}", "adapter_model.bin": b"by hand"})
    run(hub, tmp_path / "home", f'push("model", {str(baked)!r}, "org/repo")')
    assert names(hub, "org/repo") == {p.name for p in baked.iterdir()}
    run(hub, tmp_path / "home", f'push("adapter", {str(merged)!r}, "org/repo")')
    assert names(hub, "org/repo") == RESULT


def test_no_folder_of_this_machine_is_published(hub, tmp_path):
    """Whatever the user typed, and wherever things lie; here everything stays as it is."""
    from tests.small_models import peft_adapter, save_base

    base = save_base(tmp_path / "secret" / "base")
    adapter = peft_adapter(tmp_path / "secret" / "a", 1, target_modules=["q_proj"])
    baked = plait.bake({"a": adapter}, base=str(base), out=tmp_path / "elsewhere" / "baked").folder
    before = {p.name: p.read_bytes() for p in baked.iterdir()}
    assert b"secret" in before["merge_metadata.json"]
    run(hub, tmp_path / "home", f'push("model", {str(baked)!r}, "org/repo")')
    for name, data in hub.files("org/repo").items():
        assert b"secret" not in data, name
        assert str(tmp_path).encode() not in data, name
    record = json.loads(hub.files("org/repo")["merge_metadata.json"])
    assert (record["sources"][0]["path"], record["base_model"]) == ("a", "base")
    lock = json.loads(hub.files("org/repo")["plait.lock"])
    assert (lock["inputs"]["a"]["path"], lock["base"]["path"]) == ("a", "base")
    assert lock["outputs"] == json.loads(before["plait.lock"])["outputs"]
    assert {p.name: p.read_bytes() for p in baked.iterdir()} == before
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, data in hub.files("org/repo").items():
        (fetched / name).write_bytes(data)
    assert plait.verify(fetched, inputs={"a": adapter, "base_model": base}).ok


def test_what_the_card_lacks_is_said(hub, merged, tmp_path):
    hub.add("tiny/base", {"README.md": b"---\nlicense: llama3.2\n---\n# base"})
    hub.repos["tiny/base"].card = {"license": "llama3.2"}
    other = write_adapter(tmp_path / "other", MODULES, base="/models/base").folder
    local = plait.merge({"x": other}, out=tmp_path / "local").folder
    found = run(
        hub,
        tmp_path / "home",
        f'push("known", {str(merged)!r}, "org/known")\npush("local", {str(local)!r}, "org/local")',
    )
    (note,) = found["known"][2]
    assert "tiny/base states 'llama3.2'" in note
    (note,) = found["local"][2]
    assert "names no base model on the Hub" in note
    card = hub.files("org/local")["README.md"].decode()
    assert "/models" not in card, "folders of this machine are not published in the card"


def test_a_baked_model(hub, tmp_path):
    from tests.small_models import peft_adapter, save_base

    base = save_base(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base")
    adapter = peft_adapter(tmp_path / "a", 1, target_modules=["q_proj"])
    baked = plait.bake({"a": adapter}, base_model=str(base), out=tmp_path / "baked").folder
    hub.add("org/model", {"model-00001-of-00001.safetensors": b"old", "model.safetensors.index.json": b"{}"})
    found = run(hub, tmp_path / "home", f'push("baked", {str(baked)!r}, "org/model")')
    assert found["baked"][0] == f"{hub.url}/org/model"
    pushed = hub.files("org/model")
    assert pushed["model.safetensors"] == (baked / "model.safetensors").read_bytes()
    assert not [name for name in pushed if name.startswith("model") and name != "model.safetensors"]
    assert "license: apache-2.0" in pushed["README.md"].decode()


def test_the_command_line(hub, merged, tmp_path):
    done = run_forked(PLAIT, "push", str(merged), "org/cli", "--private", environment=hub.env(tmp_path / "home", token=TOKEN))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"pushed to {hub.url}/org/cli\n"
    assert "note: README.md states no license" in " ".join(done.stderr.split())
