"""`plait verify`: a result against its lock, and made again."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import plait
from plait.baking.journal import BakeJournal
from tests.adapters_on_disk import layers, write_adapter
from tests.command_line import exit_code
from tests.hub_server import HubServer
from tests.warm import PLAIT, run_forked

MODULES = layers(2, {"q_proj": (12, 8), "v_proj": (8, 8)})
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def pair(tmp_path):
    return {name: write_adapter(tmp_path / "in" / name, MODULES, seed=i, r=3).folder for i, name in enumerate(("a", "b"))}


@pytest.fixture
def merged(pair, tmp_path):
    return plait.merge(pair, method="ties", density=0.5, rank=2, out=tmp_path / "out" / "merged").folder


def states(rows: object) -> dict[str, str]:
    return {row.name: row.state for row in rows}  # type: ignore[attr-defined]


def cli(capsys, *arguments: object) -> tuple[int, str, str]:
    code = exit_code(*arguments)
    printed = capsys.readouterr()
    return code, " ".join(printed.out.split()), " ".join(printed.err.split())


def test_what_was_just_made_is_verified(merged):
    found = plait.verify(merged)
    assert found.ok
    assert states(found.files) == {"README.md": "equal", "adapter_config.json": "equal", WEIGHTS: "equal"}
    assert states(found.inputs) == {"a": "equal", "b": "equal"}
    assert states(found.rebuilt) == {"adapter_config.json": "equal", WEIGHTS: "equal"}


def test_tensor_files_are_hashed_once(merged, monkeypatch):
    """Of the result and of the inputs, by which the rebuilt result is known too."""
    hashed: Counter[str] = Counter()
    digest = hashlib.file_digest

    def counted(file, kind):
        place = Path(file.name) if isinstance(file.name, str) else Path(f"/proc/self/fd/{file.fileno()}").readlink()
        hashed[str(place.resolve())] += place.name == WEIGHTS
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    assert plait.verify(merged).ok
    assert sorted(count for count in hashed.values() if count) == [1, 1, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "linear", "kind": "delta"},
        {"method": "dare_ties", "density": 0.4, "space": "core", "seed": 5, "scale": 0.3},
        {"method": "linear", "weights": {"policy": "per_layer", "layers": {"1": 0.5}}, "dtype": "bfloat16"},
    ],
    ids=["delta", "random", "policy"],
)
def test_every_kind_of_merge_is_made_again(pair, tmp_path, settings):
    assert plait.verify(plait.merge(pair, out=tmp_path / "out", **settings).folder).ok


def test_a_compressed_adapter_and_an_extraction(pair, tmp_path):
    small = plait.compress(pair["a"], rank=1, out=tmp_path / "small").folder
    assert plait.verify(small).ok
    for name, offset in (("base", 0.0), ("tuned", 0.1)):
        (tmp_path / name).mkdir()
        values = torch.arange(96.0).reshape(12, 8).sin() + offset * torch.arange(96.0).reshape(12, 8).cos()
        save_file({"model.q_proj.weight": values}, tmp_path / name / "model.safetensors")
    extracted = plait.extract(tmp_path / "base", tmp_path / "tuned", rank=2, out=tmp_path / "extracted").folder
    assert plait.verify(extracted).ok
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    assert not plait.verify(extracted).ok
    assert plait.verify(extracted, inputs={"base": tmp_path / "elsewhere"}).ok


def test_dora_needs_its_base_again_and_finds_it(tmp_path):
    from tests.small_models import peft_adapter, save_base

    base = save_base(tmp_path / "base")
    dora = peft_adapter(tmp_path / "dora", 1, target_modules=["q_proj"], use_dora=True)
    merged = plait.merge({"d": dora}, base_model=str(base), weights=[0.5], out=tmp_path / "out").folder
    assert plait.verify(merged).ok
    shutil.move(base, tmp_path / "moved")
    found = plait.verify(merged)
    assert states(found.inputs) == {"d": "equal", "base_model": "unknown"}
    assert "--input base_model=PATH" in (found.not_rebuilt or "")
    assert plait.verify(merged, inputs={"base_model": tmp_path / "moved"}).ok


def test_a_baked_model_is_made_again(tmp_path):
    from tests.small_models import peft_adapter, save_base

    base = save_base(tmp_path / "base")
    adapter = peft_adapter(tmp_path / "a", 1, target_modules=["q_proj", "v_proj"])
    baked = plait.bake({"a": adapter}, base_model=str(base), weights=[0.5], out=tmp_path / "baked").folder
    assert plait.verify(baked).ok
    tensors = load_file(baked / "model.safetensors")
    tensors["layers.0.q_proj.weight"][0, 0] += 0.25
    save_file(tensors, baked / "model.safetensors")
    found = plait.verify(baked)
    assert not found.ok
    (row,) = [r for r in found.rebuilt if r.name == "model.safetensors"]
    assert (row.tensors, row.where) == (1, "layers.0.q_proj.weight")
    assert row.difference == pytest.approx(0.25)


def test_of_a_baked_model_few_files_are_on_the_disk_at_a_time(tmp_path, monkeypatch):
    """Only those that come out otherwise than the lock has them are kept, to say how far they are."""
    from tests.small_models import peft_adapter, save_base

    base = save_base(tmp_path / "base")
    adapter = peft_adapter(tmp_path / "a", 1, target_modules=["q_proj", "v_proj"])
    settings = {"base_model": str(base), "weights": [0.5], "shard_size": "1KB"}
    baked = plait.bake({"a": adapter}, out=tmp_path / "baked", **settings).folder
    shards = sorted(baked.glob("*.safetensors"))
    sizes, finish = list[int](), BakeJournal.finish

    def finishing(journal: BakeJournal, *finished: Any) -> None:
        finish(journal, *finished)
        sizes.append(sum(p.stat().st_size for p in journal.model.glob("*.safetensors")))

    monkeypatch.setattr(BakeJournal, "finish", finishing)
    assert plait.verify(baked, workers=1).ok
    assert len(sizes) == len(shards) > 5
    assert max(sizes) <= 2 * max(p.stat().st_size for p in shards)
    changed = next(p for p in shards if "layers.0.q_proj.weight" in load_file(p))
    tensors = load_file(changed)
    tensors["layers.0.q_proj.weight"][0, 0] += 0.25
    save_file(tensors, changed, metadata={"format": "pt"})
    lock = json.loads((baked / "plait.lock").read_text())
    lock["outputs"][changed.name] = hashlib.sha256(changed.read_bytes()).hexdigest()
    (baked / "plait.lock").write_text(json.dumps(lock))
    found = plait.verify(baked, workers=1)
    assert {row.name for row in found.rebuilt if row.state != "equal"} == {changed.name}
    (row,) = [row for row in found.rebuilt if row.name == changed.name]
    assert (row.state, row.tensors, row.difference) == ("differs", 1, pytest.approx(0.25))


def test_changed_missing_and_extra_files_are_named(merged):
    tensors = load_file(merged / WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name][0, 0] += 0.5
    save_file(tensors, merged / WEIGHTS)
    (merged / "README.md").unlink()
    (merged / "notes").mkdir()
    (merged / "notes" / "x.txt").write_text("x")
    (merged / ".gitattributes").write_text("left by the Hub's tools")
    found = plait.verify(merged)
    assert not found.ok
    assert states(found.files) == {
        "README.md": "missing",
        "adapter_config.json": "equal",
        WEIGHTS: "changed",
        "notes/x.txt": "extra",
    }
    (row,) = [r for r in found.rebuilt if r.name == WEIGHTS]
    assert row.state == "equal", "what is made again is what the lock says; it is the folder's own file that is off"
    assert (row.tensors, row.where) == (1, name)
    assert row.difference == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("record", ["merge_metadata.json", "summary.json"])
@pytest.mark.parametrize("text", ["", "[]", '{"result": "exact"', "[" * 5000])
def test_a_record_that_cannot_be_read_is_named(merged, capsys, record, text):
    (merged / record).write_text(text)
    found = plait.verify(merged, rebuild=False)
    assert not found.ok
    assert {name: state for name, state in states(found.files).items() if state != "equal"} == {record: "damaged"}
    code, printed, _ = cli(capsys, "verify", merged, "--no-rebuild")
    assert code == 2
    assert f"{record}: a record that cannot be read" in printed


def test_a_changed_input_is_named_and_not_rebuilt_from(merged, pair):
    config = json.loads((pair["b"] / "adapter_config.json").read_text())
    (pair["b"] / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    found = plait.verify(merged)
    assert states(found.inputs) == {"a": "equal", "b": "changed"}
    assert found.inputs[1].detail == "adapter_config.json"
    assert found.rebuilt is None
    assert "b changed since" in (found.not_rebuilt or "")
    assert not plait.verify(merged, rebuild=False).ok


def test_a_tree_may_move_and_an_input_may_be_given(merged, pair, tmp_path, monkeypatch):
    """Local inputs are found from the lock's own folder, wherever the command is run."""
    shutil.move(tmp_path / "in", tmp_path / "new" / "in")
    shutil.move(tmp_path / "out", tmp_path / "new" / "out")
    monkeypatch.chdir("/")
    moved = tmp_path / "new" / "out" / "merged"
    assert plait.verify(moved).ok
    shutil.move(tmp_path / "new" / "in" / "b", tmp_path / "b")
    found = plait.verify(moved)
    assert states(found.inputs) == {"a": "equal", "b": "unknown"}
    assert "--input b=PATH" in (found.not_rebuilt or "")
    assert plait.verify(moved, rebuild=False).ok, "hashes of what is there are right"
    assert plait.verify(moved, inputs={"b": tmp_path / "b"}).ok
    with pytest.raises(plait.RecipeError, match=r"no such input.*There are: a, b"):
        plait.verify(moved, inputs={"c": tmp_path / "b"})


def test_the_lock_names_no_folder_of_this_machine(merged, tmp_path):
    lock = json.loads((merged / "plait.lock").read_text())
    assert {name: entry["path"] for name, entry in lock["inputs"].items()} == {"a": "../../in/a", "b": "../../in/b"}


def test_numbers_that_come_out_otherwise_are_measured(merged, capsys):
    """As on a machine that rounds otherwise: the lock and the folder agree, what is made again does not."""
    from plait.results.digests import sha256

    tensors = load_file(merged / WEIGHTS)
    name = sorted(tensors)[-1]
    tensors[name][1, 1] += 0.125
    save_file(tensors, merged / WEIGHTS)
    lock = json.loads((merged / "plait.lock").read_text())
    lock["outputs"][WEIGHTS] = sha256(merged / WEIGHTS)
    lock["libraries"]["torch"] = "1.0"
    (merged / "plait.lock").write_text(json.dumps(lock))
    found = plait.verify(merged)
    assert not found.ok
    assert states(found.files)[WEIGHTS] == "equal"
    (row,) = [r for r in found.rebuilt if r.state != "equal"]
    assert (row.name, row.state, row.tensors, row.where) == (WEIGHTS, "differs", 1, name)
    assert row.difference == pytest.approx(0.125, rel=1e-5)
    assert found.versions["torch"][0] == "1.0"
    code, message, _ = cli(capsys, "verify", merged)
    assert code == 2
    assert f"comes out with 1 other tensors, off by at most 0.125 ({name})" in message
    assert "versions torch 1.0 →" in message
    assert "may round otherwise" in message


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "plait.lock").unlink(), "no plait.lock, so this is not a complete result of plait"),
        (lambda d: (d / "plait.lock").write_text("{"), "plait.lock:1: this is not JSON"),
        (lambda d: (d / "plait.lock").write_text('{"version": 99}'), "a lock of version 99"),
        (lambda d: (d / "plait.lock").write_text('{"version": 1}'), "not a lock that can be read"),
        (lambda d: shutil.rmtree(d), "there is no such folder"),
    ],
)
def test_folders_without_a_lock_that_can_be_read(merged, break_it, message):
    break_it(merged)
    with pytest.raises(plait.AdapterError, match=message):
        plait.verify(merged)


def test_a_recipe_of_another_version_is_no_crash(merged):
    lock = json.loads((merged / "plait.lock").read_text())
    lock["recipe"]["unheard_of"] = 1
    (merged / "plait.lock").write_text(json.dumps(lock | {"plait": "9.9"}))
    found = plait.verify(merged)
    assert not found.ok
    assert "cannot read its recipe, written by plait 9.9" in (found.not_rebuilt or "")


def test_the_command_line(merged, capsys):
    code, message, _ = cli(capsys, "verify", merged)
    assert code == 0
    assert "verified: files, inputs and the rebuilt result are what plait.lock says" in message
    code, message, _ = cli(capsys, "verify", merged, "--no-rebuild", "--json")
    assert code == 0
    assert json.loads(message)["ok"] is True
    assert json.loads(message)["rebuilt"] is None
    (merged / "adapter_config.json").write_text("{}")
    code, message, _ = cli(capsys, "verify", merged, "--no-rebuild")
    assert code == 2
    assert "adapter_config.json: changed since it was written" in message
    code, _, message = cli(capsys, "verify", merged, "--input", "a")
    assert code == 2
    assert "NAME=PATH" in message


def test_inputs_on_the_hub_are_found_by_their_commit(pair, tmp_path):
    with HubServer() as hub:
        files = {f"sub/{p.name}": p.read_bytes() for p in pair["a"].iterdir()}
        hub.add("org/a", files)
        env = hub.env(tmp_path / "home")

        def run(*arguments: object) -> subprocess.CompletedProcess[str]:
            return run_forked(PLAIT, *map(str, arguments), environment=env)

        done = run("merge", "a=org/a/sub", pair["b"], "-o", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        hub.add("org/a", {f"sub/{WEIGHTS}": b"another"})  # the branch moves on; the commit stays
        done = run("verify", tmp_path / "out")
        assert done.returncode == 0, done.stdout + done.stderr
