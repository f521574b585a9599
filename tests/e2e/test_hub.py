"""`plait.hub` with the real `huggingface_hub` against a Hub on 127.0.0.1; every message is read."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from plait.errors import AddressError, OutputError
from plait.hub import parse_reference, push_folder, resolve, resolve_model
from tests.hub_server import TOKEN, Account, HubServer
from tests.warm import run_forked

SRC = Path(__file__).resolve().parents[2] / "src"
ADAPTER = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": b"weights"}
# The Hub's client says this of a second push, and rightly.
NOISE = "No files have been modified since last commit. Skipping to prevent empty commit.\n"
START = """
import json, sys
from pathlib import Path
from plait.errors import PlaitError
from plait.hub import *
out = {}
def attempt(key, call, *args, **kwargs):
    try:
        found = call(*args, **kwargs)
    except PlaitError as error:
        out[key] = f"{type(error).__name__}: {error}"
    else:
        out[key] = json.loads(found.model_dump_json()) if isinstance(found, Located) else found
def at(key, text, **kwargs):
    attempt(key, resolve, parse_reference(text), **kwargs)
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(hub, home, code, *, token=None, offline=False, **env):
    """Run `code` in a process that knows only this Hub; return what it put into `out`."""
    script = START + code + "\nprint(json.dumps(out))"
    env = {**hub.env(home, token=token, offline=offline), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env}
    done = run_forked(script, folder=home.parent, environment=env)
    assert done.returncode == 0, done.stderr
    noted = [line.partition("PlaitWarning: ")[2] for line in done.stderr.splitlines() if "PlaitWarning: " in line]
    assert [line for line in done.stderr.replace(NOISE, "").splitlines() if "PlaitWarning: " not in line] == []
    found = json.loads(done.stdout) | ({"noted": noted} if noted else {})
    assert not [word for word in ("httpx", "Traceback", "RuntimeError") if word in done.stdout]
    return found


@pytest.fixture
def home(tmp_path):
    return tmp_path / "hf"


def names(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def test_adapters_are_found_by_branch_tag_commit_and_subfolder(hub, home):
    waste = {"model.safetensors": b"base", "adapter_model.bin": b"pickle", "optimizer.pt": b"state", "x/README.md": b""}
    beside = {"README.md": b"# card", "tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}"}
    old = hub.add("org/repo", {**ADAPTER, **waste, **beside})
    hub.repos["org/repo"].tags["v1"] = old
    nested = {f"runs/[a]/checkpoint-9/{name}": data + b"9" for name, data in ADAPTER.items()}
    new = hub.add("org/repo", {**nested, "adapter_model.safetensors": b"newer"})
    dev = hub.add("org/repo", {"adapter_model.safetensors": b"dev"}, revision="dev")
    hub.repos["org/repo"].pull_requests["refs/pr/1"] = dev
    found = run(
        hub,
        home,
        f"""
at("default", "a=org/repo")
at("branch", "org/repo@dev")
at("tag", "org/repo@v1")
at("commit", "org/repo@{old}")
at("pr", "org/repo@refs/pr/1")
at("sub", "org/repo/runs/[a]/checkpoint-9")
out["name"] = parse_reference("org/repo/runs/[a]/checkpoint-9").default_name()
""",
    )
    assert names(found["default"]["folder"]) == {**ADAPTER, **beside, "adapter_model.safetensors": b"newer"}
    assert names(found["branch"]["folder"])["adapter_model.safetensors"] == b"dev"
    assert names(found["tag"]["folder"])["adapter_model.safetensors"] == b"weights"
    assert names(found["sub"]["folder"]) == {name: data + b"9" for name, data in ADAPTER.items()}
    assert {key: found[key]["commit"] for key in found if key != "name"} == {
        "default": new,
        "branch": dev,
        "tag": old,
        "commit": old,
        "pr": dev,
        "sub": new,
    }
    assert found["default"]["revision"] is None
    assert found["branch"] == {
        "folder": found["branch"]["folder"],
        "file": None,
        "repo": "org/repo",
        "revision": "dev",
        "commit": dev,
        "subfolder": None,
    }
    assert found["sub"]["subfolder"] == "runs/[a]/checkpoint-9"
    assert found["name"] == "a-checkpoint-9"
    fetched = {request.split("/resolve/")[1].split("/", 1)[1] for request in hub.asked("/resolve/")}
    assert fetched == {*ADAPTER, *beside, *nested}


def test_a_pickled_adapter_is_fetched_only_where_there_is_no_other(hub, home):
    hub.add("org/old", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    found = run(hub, home, 'at("old", "org/old")')
    assert names(found["old"]["folder"]) == hub.files("org/old")


def test_single_files_and_adapters_of_mlx(hub, home):
    """What other programs publish: one file at a place of its own, or mlx-lm's names."""
    commit = hub.add("org/lora", {"v2/style.safetensors": b"lora", "v2/other.safetensors": b"w", "README.md": b"card"})
    hub.add("org/mlx", {"adapter_config.json": b"{}", "adapters.safetensors": b"mlx"})
    code = 'at("one", "org/lora/v2/style.safetensors")\nat("mlx", "org/mlx")'
    found = run(hub, home, code + '\nat("gone", "org/lora/v2/stile.safetensors")')
    assert (found["one"]["file"], found["one"]["commit"]) == ("style.safetensors", commit)
    assert names(found["one"]["folder"]) == {"style.safetensors": b"lora"}
    assert names(found["mlx"]["folder"]) == {"adapter_config.json": b"{}", "adapters.safetensors": b"mlx"}
    assert "there is no such file. Did you mean 'v2/style.safetensors'?" in found["gone"]
    assert run(hub, home, code, offline=True) == {key: found[key] for key in ("one", "mlx")}


def test_the_commit_is_the_one_that_was_looked_at_even_when_the_branch_moves(hub, home):
    before = hub.add("org/repo", ADAPTER)

    def move(request):
        with hub.lock:  # files are asked for side by side
            if len(hub.requests) >= 2 and hub.repos["org/repo"].branches["main"] == before:
                hub.add("org/repo", {"adapter_model.safetensors": b"moved"})

    hub.watch = move
    found = run(hub, home, 'at("repo", "org/repo")')["repo"]
    assert hub.repos["org/repo"].branches["main"] != before
    assert found["commit"] == before
    assert names(found["folder"]) == ADAPTER


def test_places_that_do_not_exist_are_explained(hub, home):
    folders = [f"checkpoint-{n}" for n in (1000, 500)]
    hub.add("org/repo", {f"{folder}/{name}": data for folder in folders for name, data in ADAPTER.items()})
    hub.repos["org/repo"].tags["v1"] = hub.add("org/repo", {"README.md": b"x"})
    hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"x"})
    hub.add("org/half", {"adapter_config.json": b"{}", "notes.txt": b""})
    hub.add("org/empty", {})
    found = run(
        hub,
        home,
        """
at("repo", "org/nope")
at("revision", "org/repo@mian")
at("config", "b=org/repo@v1")
at("subfolder", "org/repo/checkpoint-5")
at("base", "org/base")
at("half", "org/half")
at("empty", "org/empty")
at("word/as/path", "./org/repo")
""",
    )
    assert found["repo"].startswith(f"AddressError: 'org/nope': {hub.url} has no such repository, or it is private.")
    assert "No token is set: log in with `hf auth login`, or set HF_TOKEN." in found["repo"]
    assert f"Nor is there a folder 'org/nope' in {home.parent}." in found["repo"]
    assert found["revision"] == (
        "AddressError: 'org/repo@mian': the repository has no revision 'mian'. Did you mean 'main'? It has: main, v1."
    )
    commit = hub.repos["org/repo"].tags["v1"][:12]
    assert found["config"] == (
        "AddressError: 'org/repo@v1': there is no adapter_config.json at the top of this repository "
        f"(commit {commit}). Give a place that has one: org/repo@v1/checkpoint-500, org/repo@v1/checkpoint-1000."
    )
    assert "no adapter_config.json in this subfolder" in found["subfolder"]
    assert "Give a place that has one: org/repo/checkpoint-500, org/repo/checkpoint-1000." in found["subfolder"]
    assert "It looks like a full model, which plait takes as a base model." in found["base"]
    assert found["half"] == (
        "AddressError: 'org/half' has adapter_config.json, but neither adapter_model.safetensors nor adapter_model.bin. "
        "It holds: adapter_config.json, notes.txt."
    )
    assert found["empty"].endswith("No other folder has one. It holds: nothing.")
    assert found["word/as/path"].endswith("If you mean the repository on the Hub, write 'org/repo'.")


def test_private_and_gated_repositories_say_who_may_read(hub, home):
    hub.add("org/secret", ADAPTER, private=True)
    hub.add("other/secret", ADAPTER, private=True)
    hub.add("other/gated", ADAPTER, gated=True)
    code = """
import os
tried = {}
for token in ("", "hf_stale", "hf_test"):
    os.environ["HF_TOKEN"] = token
    at("mine", "org/secret"), at("theirs", "other/secret"), at("gated", "other/gated")
    tried[token], out = out, {}
out = tried
"""
    anonymous, wrong, right = run(hub, home, code).values()
    for key in ("mine", "theirs"):
        assert "has no such repository, or it is private. No token is set: log in" in anonymous[key]
    assert f"the repository is gated. Ask for access at {hub.url}/other/gated. No token is set" in anonymous["gated"]
    assert f"'org/secret': {hub.url} refuses the token. A token is set (HF_TOKEN, which goes before" in wrong["mine"]
    assert names(right["mine"]["folder"]) == ADAPTER
    assert "or it is private. A token is set (HF_TOKEN" in right["theirs"]
    assert "the repository is gated. Ask for access" in right["gated"]
    assert "A token is set" in right["gated"]


def test_offline_mode_uses_the_cache_and_says_when_it_is_not_enough(hub, home):
    hub.add("org/repo", {**ADAPTER, "README.md": b"card"})
    hub.add("org/part", {**ADAPTER, "README.md": b"card", "sub/adapter_config.json": b"{}"})
    hub.add("org/old", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    hub.add("org/base", {"config.json": b"{}", "model.safetensors": b"w"})
    code = """
at("repo", "org/repo@main"), at("part", "org/part"), at("sub", "org/part/sub"), at("old", "org/old")
attempt("base", resolve_model, "org/base")
attempt("push", push_folder, Path("."), "org/repo", message="x")
"""
    Path(home.parent, "file").write_text("x")
    before = run(hub, home, code, token=TOKEN, offline=True)
    assert before["push"] == "OutputError: cannot push to 'org/repo': offline mode is on. Unset HF_HUB_OFFLINE."
    assert hub.requests == []
    assert before["repo"] == (
        "AddressError: 'org/repo@main': offline mode is on (HF_HUB_OFFLINE), and main of this repository is not complete "
        f"in the cache {home}/hub. Unset HF_HUB_OFFLINE, or fetch it once where there is a network: "
        "`hf download org/repo`."
    )
    assert "offline mode is on (HF_HUB_OFFLINE), and the default branch of" in before["part"]
    # As `hf download org/part adapter_config.json adapter_model.safetensors` leaves a cache: without the card.
    online = run(
        hub,
        home,
        'from huggingface_hub import snapshot_download\nat("repo", "org/repo@main")\n'
        'at("old", "org/old")\nattempt("base", resolve_model, "org/base")\n'
        f'snapshot_download("org/part", allow_patterns={list(ADAPTER)!r})',
    )
    asked = len(hub.requests)
    after = run(hub, home, code, offline=True)
    assert len(hub.requests) == asked
    for key in ("repo", "old", "base"):
        assert "offline mode is on" in before[key]
        assert after[key] == online[key]
        assert after[key]["commit"] == hub.repos[f"org/{key}"].branches["main"]
    assert names(after["part"]["folder"]) == ADAPTER
    assert after["part"]["commit"] == hub.repos["org/part"].branches["main"]
    assert "'org/part/sub': offline mode is on" in after["sub"]


def test_a_hub_that_is_down_or_unreachable_is_told_apart(hub, home):
    for repo in ("org/cached", "org/revoked"):
        hub.add(repo, ADAPTER)
    cached = run(hub, home, 'at("cached", "org/cached")\nat("revoked", "org/revoked")')
    hub.repos["org/revoked"].private = True
    revoked = run(hub, home, 'at("revoked", "org/revoked")')["revoked"]
    assert "has no such repository, or it is private" in revoked
    hub.status = 503
    code = 'at("down", "org/repo")\nattempt("push", push_folder, Path("."), "org/repo", message="x")\n'
    code += 'at("cached", "org/cached")'
    Path(home.parent, "file").write_text("x")
    down = run(hub, home, code, token=TOKEN)
    assert down["down"] == f"AddressError: 'org/repo': {hub.url} answers 503: try again later."
    assert down["push"] == f"OutputError: cannot push to 'org/repo': {hub.url} answers 503: try again later."
    assert down["cached"] == cached["cached"]
    commit = Path(cached["cached"]["folder"]).name
    assert down["noted"] == [
        f"'org/cached' is taken from the cache, as of commit {commit}: {hub.url} answers 503: try again later."
    ]
    with socket.socket() as silent:  # holds a port, and does not listen there
        silent.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{silent.getsockname()[1]}"
        gone = run(hub, home, code, token=TOKEN, HF_ENDPOINT=nowhere)
    assert re.search(rf"{nowhere} cannot be reached, or does not answer as a Hub does \(Connect(ion)?Error: ", gone["down"])
    assert gone["cached"] == cached["cached"]
    assert gone["noted"][0].startswith(
        f"'org/cached' is taken from the cache, as of commit {commit}: {nowhere} cannot be reached"
    )
    assert "Check the network, its proxy and HF_ENDPOINT." in gone["down"]
    assert gone["push"].startswith(f"OutputError: cannot push to 'org/repo': {nowhere} cannot be reached")


def test_a_cache_with_a_link_that_leads_out_is_refused(hub, home):
    hub.add("org/repo", {**ADAPTER, **{f"sub/{name}": data for name, data in ADAPTER.items()}})
    found = run(hub, home, 'at("top", "org/repo")\nat("sub", "org/repo/sub")')
    outside = home.parent / "outside"
    outside.mkdir()
    for name, data in ADAPTER.items():
        Path(outside, name).write_bytes(data)
    top = Path(found["top"]["folder"])
    (top / "adapter_model.safetensors").unlink()
    (top / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (top / "sub").rename(top / "gone")
    (top / "sub").symlink_to(outside)
    after = run(hub, home, 'at("top", "org/repo")\nat("sub", "org/repo/sub")', offline=True)
    assert f"adapter_model.safetensors is a link to {outside}/adapter_model.safetensors, outside" in after["top"]
    assert f"/sub is a link to {outside}, outside the snapshot. Delete " in after["sub"]


def test_base_models_bring_their_weights_and_json_alone(hub, home):
    weights = {"model-1-of-1.safetensors": b"w", "config.json": b"{}", "tokenizer.json": b"{} "}
    text = {"merges.txt": b"a b", "chat_template.jinja": b"{{ x }}"}
    waste = {"pytorch_model.bin": b"w", "consolidated.safetensors": b"w", "onnx/config.json": b"{}", "m.gguf": b"w"}
    commit = hub.add("org/base", {**weights, **text, **waste})
    old = {"config.json": b"{}", "pytorch_model-1-of-1.bin": b"w", "pytorch_model.bin.index.json": b"{}"}
    hub.add("org/old", {**old, "flax_model.msgpack": b"w"})
    hub.add("org/flax", {"config.json": b"{}", "flax_model.msgpack": b"w"})
    found = run(
        hub,
        home,
        """
attempt("base", resolve_model, "org/base@main")
attempt("whole", resolve_model, "org/base", files=MODEL_FILES + COMPANION_FILES)
attempt("old", resolve_model, "org/old")
attempt("flax", resolve_model, "org/flax")
attempt("bare", resolve_model, "gpt2")
attempt("named", resolve_model, "x=org/base")
""",
    )
    assert found["base"]["commit"] == commit
    assert names(found["whole"]["folder"]) == {**weights, **text}
    fetched = {request.split("/resolve/")[1].split("/", 1)[1] for request in hub.asked("GET /org/base/resolve")}
    assert fetched == {*weights, *text}
    assert names(found["old"]["folder"]) == old
    assert found["flax"].startswith(
        "AddressError: 'org/flax' has no *.safetensors. It holds: config.json, flax_model.msgpack. Give a model that"
    )
    offline = run(hub, home, 'attempt("old", resolve_model, "org/old")', offline=True)
    assert names(offline["old"]["folder"]) == old
    assert found["bare"].endswith("(Models of the Hub are called org/name; it has no such model either.)")
    assert "'gpt2': there is no folder '" in found["bare"]
    assert found["named"] == "AddressError: 'x=org/base': a base model has no name. Write 'org/base'."


def fill(folder):
    files = {**ADAPTER, "README.md": b"# card", "heads/a/model.bin": b"head"}
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return files


def test_push_makes_a_private_repository_with_exactly_the_files(hub, home, tmp_path):
    files = fill(tmp_path / "merged")
    found = run(
        hub,
        home,
        """
push = lambda key, repo, **kwargs: attempt(key, push_folder, Path("merged"), repo, message="the merge", **kwargs)
push("new", "org/new", private=True)
push("own", "mine")
push("again", "org/new", private=True)
push("same", "org/new", create_pr=True)
Path("merged", "README.md").write_text("# v2")
push("branch", "org/new", revision="v2")
out["check"] = check_push("mine")
at("back", "org/new@v2")
""",
        token=TOKEN,
    )
    repo = hub.repos["org/new"]
    assert repo.private
    assert hub.files("org/new") == files
    assert hub.files("org/new", "v2") == {**files, "README.md": b"# v2"}
    assert found["new"] == found["again"] == found["same"] == f"{hub.url}/org/new"
    assert found["branch"] == f"{hub.url}/org/new/tree/v2"
    assert found["own"] == f"{hub.url}/tester/mine"
    assert hub.files("tester/mine") == files
    assert not hub.repos["tester/mine"].private
    assert found["check"] == "tester/mine"
    assert found["back"]["commit"] == repo.branches["v2"]


def test_push_opens_a_pull_request_and_uploads_large_files(home, tmp_path):
    fill(tmp_path / "merged")
    big = bytes(range(256)) * 4096 * 3
    Path(tmp_path, "merged", "model.safetensors").write_bytes(big)
    with HubServer(lfs_from=100_000) as hub:
        hub.add("org/repo", {"README.md": b"old"})
        code = 'attempt("pr", push_folder, Path("merged"), "org/repo", create_pr=True, message="the merge")'
        found = run(hub, home, code, token=TOKEN)
        assert found["pr"] == f"{hub.url}/org/repo/discussions/1"
        assert hub.files("org/repo") == {"README.md": b"old"}
        assert hub.files("org/repo", "refs/pr/1")["model.safetensors"] == big
        assert hub.asked("PUT /lfs/")
        model = run(hub, home, 'attempt("model", resolve_model, "org/repo@refs/pr/1")')["model"]
        assert names(model["folder"])["model.safetensors"] == big


def test_push_is_refused_before_anything_is_written(home, tmp_path):
    fill(tmp_path / "merged")
    tokens = {TOKEN: Account("tester", ("org",)), "hf_read": Account("reader", ("org",), role="read")}
    with HubServer(tokens) as hub:
        hub.add("org/public", {})
        code = """
import os
push = lambda key, repo, **kwargs: attempt(key, push_folder, Path("merged"), repo, message="x", **kwargs)
tried = {}
for token in ("hf_stale", "", "hf_read"):
    os.environ["HF_TOKEN"] = token
    push("mine", "org/new"), attempt("check", check_push, "org/new")
    tried[token], out = out, {}
os.environ["HF_TOKEN"] = "hf_test"
Path("void").mkdir()
attempt("void", push_folder, Path("void"), "org/x", message="x")
attempt("check", check_push, "org/new")
push("theirs", "other/new")
push("form", "org/new/deep")
push("public", "org/public", private=True)
push("both", "org/public", revision="v2", create_pr=True)
out = {**tried, "rest": out}
"""
        login = "Log in with `hf auth login --force`, or set a valid HF_TOKEN."
        bad, none, read, rest = run(hub, home, code).values()
        assert bad["mine"] == bad["check"]
        assert bad["mine"] == f"OutputError: cannot push to 'org/new': the Hub does not accept HF_TOKEN. {login}"
        assert none["mine"] == none["check"]
        assert none["mine"] == (
            "OutputError: cannot push to 'org/new'. No token is set: log in with `hf auth login`, or set HF_TOKEN."
        )
        assert read["mine"] == read["check"]
        assert "cannot push to 'org/new': the token of 'reader' may only read. Make one that may write" in read["mine"]
        assert rest["check"] == "org/new"
        assert rest["theirs"] == (
            "OutputError: cannot push to 'other/new': it does not exist, and 'tester' can create repositories only "
            "under: tester, org."
        )
        assert "cannot push: 'org/new/deep' cannot be a repository" in rest["form"]
        assert "cannot push to 'org/public' as private: it exists and is public." in rest["public"]
        assert "a pull request goes to the default branch. Leave out the revision 'v2'" in rest["both"]
        assert rest["void"] == "OutputError: cannot push 'void': it is not a folder with files in it."
        assert list(hub.repos) == ["org/public"]
        assert hub.files("org/public") == {}
        assert hub.asked("^(POST|PUT|DELETE)") == ["POST /api/repos/create"]


def test_local_folders_are_found_without_the_hub(tmp_path, monkeypatch):
    adapter = tmp_path / "recipes" / "adapters" / "code"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (adapter / "notes.txt").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "recipes"))
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "recipes"
    for text, start in (("adapters/code", base), ("./recipes/adapters/code", None), ("~/adapters/code", None)):
        located = resolve(parse_reference(text, base=start), base=start)
        assert located.folder == adapter
        assert (located.repo, located.commit) == (None, None)
    assert resolve_model("adapters/code", base=base).folder == adapter
    single = resolve(parse_reference("./recipes/adapters/code/adapter_model.safetensors"))
    assert (single.folder, single.file) == (adapter, "adapter_model.safetensors")
    (tmp_path / "link").symlink_to(adapter)
    assert resolve(parse_reference("link")).folder == tmp_path / "link"
    for text, message in (
        ("./adapters/cdoe", r"'./adapters/cdoe': there is no folder '.*/adapters/cdoe'. Did you mean 'code'\? If you"),
        ("./nope/code", r"there is no folder .* '.*/nope' does not exist either. If you mean .* write 'nope/code'\."),
        ("./adapters/code/notes.txt", r"is a file. Give the folder that holds it: 'adapters/code'\."),
        ("~nobody-of-that-name/x", r"'~nobody-of-that-name/x': there is no folder .* does not exist either\."),
    ):
        with pytest.raises(AddressError, match=message):
            resolve(parse_reference(text), base=base)


def test_importing_the_package_is_light():
    code = "import sys, plait.hub; print([m for m in ('huggingface_hub', 'torch', 'tqdm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_missing_folder_is_never_pushed(tmp_path):
    with pytest.raises(OutputError, match="is not a folder with files in it"):
        push_folder(tmp_path / "nope", "org/x", message="x")
