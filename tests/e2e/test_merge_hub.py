"""From the Hub and to the Hub, through the command line, against a local server that has the Hub's API."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.hub_server import HubServer
from tests.warm import PLAIT, run_forked

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "adapters"
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def hub():
    with HubServer() as server:
        for name in ("sentiment", "langid"):
            files = {f"checkpoint-10/{f}": (DEMO / name / f).read_bytes() for f in FILES}
            server.add(f"org/{name}", {**files, "README.md": b"# x", "checkpoint-10/optimizer.pt": b"not needed"})
        yield server


def plait(hub: HubServer, home: Path, *arguments: object, token: str | None = None) -> subprocess.CompletedProcess[str]:
    return run_forked(PLAIT, *map(str, arguments), folder=home.parent, environment=hub.env(home, token=token))


def test_merge_from_the_hub_and_push(hub, tmp_path):
    references = ["org/sentiment@main/checkpoint-10", "other=org/langid/checkpoint-10"]
    out = tmp_path / "out"
    push = ["--push-adapter-repo", "tester/merged", "--private"]
    done = plait(hub, tmp_path / "home", "merge", *references, "-o", out, *push, token="hf_test")
    assert done.returncode == 0, done.stderr
    assert "pushed to" in done.stdout
    lock = json.loads((out / "plait.lock").read_text())
    assert set(lock["inputs"]) == {"sentiment-checkpoint-10", "other"}
    assert all(len(source["commit"]) == 40 for source in lock["inputs"].values())
    assert not [path for path in hub.asked(r"^GET") if "optimizer.pt" in path], "only what is needed is fetched"
    pushed = hub.files("tester/merged", "main")
    expected = {p.name for p in out.iterdir()}
    assert not [n for n in pushed if str(tmp_path).encode() in pushed[n]], "no folder of this machine is published"
    assert set(pushed) - {".gitattributes"} == expected
    assert pushed["adapter_model.safetensors"] == (out / "adapter_model.safetensors").read_bytes()
    assert hub.repos["tester/merged"].private
    local = plait(hub, tmp_path / "home", "merge", DEMO / "sentiment", DEMO / "langid", "-o", tmp_path / "local")
    assert local.returncode == 0, local.stderr
    assert (tmp_path / "local" / FILES[1]).read_bytes() == (out / FILES[1]).read_bytes()


def test_a_push_that_cannot_work_is_refused_before_the_merge(hub, tmp_path):
    pair = (DEMO / "sentiment", DEMO / "langid")
    done = plait(hub, tmp_path / "home", "merge", *pair, "-o", tmp_path / "out", "--push-adapter-repo", "a/b")
    assert done.returncode == 2
    assert "log in" in done.stderr or "token" in done.stderr
    assert not (tmp_path / "out").exists()
    assert "a/b" not in hub.repos
