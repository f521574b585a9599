"""Whatever happens while baking, the final name holds a complete model or nothing, and the same command continues."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import plait
from plait.errors import AdapterError, OutputError
from plait.notices import PlaitWarning
from plait.tensorfiles import flushing
from tests.adapters_on_disk import layers, write_adapter
from tests.locks import write_lock

MODULES = {"q_proj": (24, 32), "up_proj": (48, 32)}
SETTINGS = {"shard_size": "20KB", "method": "ties", "density": 0.5}
STEPS = 38  # of a whole bake: 24 tensors, 12 files, the publication
# Imports everything once and forks a bake per line of its input. A bake waits, and says so, before the step that the line
# names, until it may continue: a signal finds it there, however busy the machine is. Steps are tensors written, files
# noted as finished, and the two ends of the publication.
NURSERY = """
import json, os, resource, signal, sys, threading
from collections import Counter
import torch, plait, plait.commands.bake
from plait.baking import journal, writing
one_at_a_time, steps = threading.Lock(), Counter()
def step(name):
    with one_at_a_time:
        for counted in (name, "any"):
            steps[counted] += 1
            if [counted, steps[counted]] == order["hold"]:
                print("held", flush=True)
                os.read(0, 1)
def stepping(name, do):
    def done(*rest, **more):
        step(name)
        do(*rest, **more)
    return done
journal.BakeJournal.finish = stepping("finish", journal.BakeJournal.finish)
writing.write_at = stepping("write", writing.write_at)
publish = journal.publish
def publish_in_two_steps(*rest, **more):
    step("publish")
    publish(*rest, **more)
    step("publish")
journal.publish = publish_in_two_steps
print("ready", flush=True)
pid = 0
for line in sys.stdin:
    if pid:
        os.waitpid(pid, 0)
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        print("pid", os.getpid(), flush=True)
        if order["limit"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"],) * 2)
        try:
            plait.bake(order["pair"], base=order["base"], out=order["out"], workers=order["workers"], **order["settings"])
        except plait.PlaitError as error:
            print("error", type(error).__name__, str(error).splitlines()[0], flush=True)
            os._exit(2)
        os._exit(0)
    # Not reaped before the next order: a signal that comes after the end still finds its process.
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    print("ended", -end.si_status if end.si_code == os.CLD_KILLED else end.si_status, flush=True)
"""


class Nursery:
    """Bakes in forked processes, one at a time."""

    def __init__(self, materials: SimpleNamespace) -> None:
        self.materials = materials
        command = [sys.executable, "-c", NURSERY]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.wait_for("ready")

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def start(
        self,
        out: Path,
        *,
        workers: int = 1,
        limit: int | None = None,
        base: Path | None = None,
        hold: tuple[str, int] | None = None,
    ) -> int:
        """Begin a bake that waits before its n-th step of a kind (`hold`); return its process."""
        order = {
            "pair": [str(p) for p in self.materials.pair], "base": str(base or self.materials.base), "out": str(out),
            "workers": workers, "limit": limit, "settings": SETTINGS, "hold": hold,
        }  # fmt: skip
        self.say(json.dumps(order))
        return int(self.wait_for("pid"))

    def read(self) -> tuple[str, str]:
        assert self.process.stdout is not None
        word, _, rest = self.process.stdout.readline().strip().partition(" ")
        return word, rest

    def wait_for(self, wanted: str) -> str:
        while True:
            word, rest = self.read()
            if word == wanted:
                return rest
            assert word, "the nursery has died"
            assert word != "ended", f"it ended ({rest}) before it was {wanted}"

    def kill(self, pid: int) -> None:
        """Kill a bake that is held."""
        self.wait_for("held")
        os.kill(pid, signal.SIGKILL)
        assert self.wait_for("ended") == str(-signal.SIGKILL)

    def interrupt(self, out: Path, *, base: Path | None = None) -> Path:
        """Kill a bake when two of its files are finished; return the folder that it left."""
        self.kill(self.start(out, base=base, hold=("finish", 3)))
        return out.with_name(f".{out.name}.baking")


@pytest.fixture(scope="module")
def nursery(materials):
    nursery = Nursery(materials)
    yield nursery
    nursery.process.communicate()


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return write_materials(tmp_path_factory.mktemp("materials"))


def write_materials(folder: Path) -> SimpleNamespace:
    """Write a base of 12 layers in one file (several when baked), and two adapters."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{i}.{name}.weight": torch.randn(shape, generator=generator)
        for i in range(12)
        for name, shape in {**MODULES, "norm": (32,), "untouched": (40, 32)}.items()
    }
    (folder / "base").mkdir()
    save_file(tensors, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text('{"tie_word_embeddings": false}')
    pair = [write_adapter(folder / f"adapter{s}", layers(12, MODULES), seed=s).folder for s in (1, 2)]
    return SimpleNamespace(base=folder / "base", pair=pair)


@pytest.fixture(scope="module")
def undisturbed(materials, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    plait.bake(materials.pair, base=materials.base, out=out, workers=1, **SETTINGS)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file that is a function of the inputs; the lock names its inputs from where it is."""
    skipped = ("merge_metadata.json", "summary.json", "plait.lock")
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in skipped}


def test_killed_at_random_points_then_resumed(materials, nursery, undisturbed, tmp_path):
    """Every bake is killed up to five times, twenty times in all; then it ends with the bytes of an undisturbed one."""
    rng = random.Random(0)
    kills = resumed = number = 0
    while kills < 20:
        number += 1
        out = tmp_path / f"out{number}"
        for turn in range(rng.randint(2, 5)):
            # first when two files are finished, which a slow disk may be long after all is written
            hold = ("any", rng.randint(1, STEPS)) if turn or number % 2 else ("finish", 3)
            pid = nursery.start(out, workers=rng.choice((1, 3)), hold=hold)
            word, _ = nursery.read()
            if word == "ended":  # less was left to do
                break
            assert word == "held"
            os.kill(pid, signal.SIGKILL)
            assert nursery.wait_for("ended") == str(-signal.SIGKILL)
            kills += 1
            if out.exists():  # it was killed behind its publication
                break
        if not out.exists():
            result = plait.bake(materials.pair, base=materials.base, out=out, workers=2, **SETTINGS)
            resumed += len(result.record.resumed)
            assert not (tmp_path / f".out{number}.baking").exists()
        assert contents(out) == undisturbed
    assert resumed, "the test is about finished files that are taken up again"


@pytest.mark.parametrize("which", [1, 2], ids=["before", "behind"])
def test_killed_around_the_publication(materials, nursery, undisturbed, tmp_path, which):
    out = tmp_path / "out"
    nursery.kill(nursery.start(out, hold=("publish", which)))
    assert out.exists() == (which == 2)
    if which == 1:
        result = plait.bake(materials.pair, base=materials.base, out=out, **SETTINGS)
        assert len(result.record.resumed) == len(list(out.glob("*.safetensors")))
    assert contents(out) == undisturbed


def test_another_recipe_throws_finished_files_away(materials, nursery, tmp_path):
    left = nursery.interrupt(tmp_path / "out")
    assert len(list((left / "model").glob("*.safetensors"))) >= 2
    result = plait.bake(materials.pair, base=materials.base, out=tmp_path / "out", shard_size="20KB", weights=[1, 2])
    assert result.record.resumed == ()
    fresh = plait.bake(materials.pair, base=materials.base, out=tmp_path / "fresh", shard_size="20KB", weights=[1, 2])
    assert contents(result.folder) == contents(fresh.folder)


def test_a_changed_base_throws_finished_files_away(materials, nursery, tmp_path):
    base = Path(shutil.copytree(materials.base, tmp_path / "base"))
    nursery.interrupt(tmp_path / "out", base=base)
    os.utime(base / "model.safetensors", ns=(1, 1))
    result = plait.bake(materials.pair, base=base, out=tmp_path / "out", workers=1, **SETTINGS)
    assert result.record.resumed == ()


def test_a_damaged_finished_file_is_made_again(materials, nursery, undisturbed, tmp_path):
    left = nursery.interrupt(tmp_path / "out")
    first = sorted((left / "model").glob("*.safetensors"))[0]
    with first.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.warns(PlaitWarning, match=rf"^{first.name} is made again: what an earlier run finished has been changed since"):
        plait.bake(materials.pair, base=materials.base, out=tmp_path / "out", **SETTINGS)
    assert contents(tmp_path / "out") == undisturbed


def test_a_torn_journal_is_read_up_to_its_tear(materials, nursery, undisturbed, tmp_path):
    left = nursery.interrupt(tmp_path / "out")
    journal = left / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-10])
    with pytest.warns(PlaitWarning, match=rf"{journal} is used up to its entry \d+; what was finished after it is made again"):
        plait.bake(materials.pair, base=materials.base, out=tmp_path / "out", **SETTINGS)
    assert contents(tmp_path / "out") == undisturbed


def test_the_second_of_two_runs_is_told(materials, nursery, undisturbed, tmp_path):
    out = tmp_path / "out"
    pid = nursery.start(out, hold=("finish", 1))
    nursery.wait_for("held")
    with pytest.raises(OutputError, match=rf"\.out\.baking is in use by process {pid} on .* this model is being baked"):
        plait.bake(materials.pair, base=materials.base, out=out)
    nursery.say("")  # go on
    assert nursery.wait_for("ended") == "0"
    assert contents(out) == undisturbed


def test_another_bake_that_ends_takes_its_folder_along(materials, undisturbed, tmp_path, monkeypatch):
    """Between the making of the folder and its locking, twice."""
    make, gone = Path.mkdir, []

    def mkdir(self: Path, *rest: object, **more: object) -> None:
        make(self, *rest, **more)
        if self.name == ".out.baking" and len(gone) < 2:
            gone.append(self.rmdir())

    monkeypatch.setattr(Path, "mkdir", mkdir)
    plait.bake(materials.pair, base=materials.base, out=tmp_path / "out", **SETTINGS)
    assert gone
    assert contents(tmp_path / "out") == undisturbed


def test_full_disk(materials, nursery, undisturbed, tmp_path):
    """A limit on file sizes makes the kernel refuse to write on, as a full disk does."""

    out = tmp_path / "out"
    nursery.start(out, limit=15_000)
    assert nursery.wait_for("error").startswith(f"OutputError {out} cannot be written: File too large.")
    assert nursery.wait_for("ended") == "2"
    assert not out.exists()
    left = list((tmp_path / ".out.baking").rglob("*.safetensors"))
    assert all(p.stat().st_size <= 15_000 for p in left), "an unfinished file gives its space back"
    plait.bake(materials.pair, base=materials.base, out=out, **SETTINGS)
    assert contents(out) == undisturbed


def test_too_little_space_is_said_before_any_work(materials, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000, total=2000))
    with pytest.raises(OutputError, match=r"needs .* free"):
        plait.bake(materials.pair, base=materials.base, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_ends_early_while_it_is_read(materials, tmp_path, monkeypatch):
    from plait.baking import journal

    base = Path(shutil.copytree(materials.base, tmp_path / "base"))
    finish = journal.BakeJournal.finish

    def cut(self: journal.BakeJournal, shard: str, size: int, sha256: str) -> None:
        finish(self, shard, size, sha256)
        os.truncate(base / "model.safetensors", 40_000)

    monkeypatch.setattr(journal.BakeJournal, "finish", cut)
    with pytest.raises(AdapterError, match=r"model\.safetensors: the file was changed while it was read") as caught:
        plait.bake(materials.pair, base=base, out=tmp_path / "out", shard_size="20KB", workers=1)
    assert not (tmp_path / "out").exists()
    assert "the same command continues from there" in "".join(caught.value.__notes__)


def test_a_model_whose_place_was_taken_is_kept_and_named(materials, tmp_path, monkeypatch):
    from plait.baking import journal

    def taken(*_: object, **__: object) -> None:
        raise OutputError("out was written by another process in the meantime.")

    monkeypatch.setattr(journal, "publish", taken)
    with pytest.raises(OutputError, match="in the meantime") as caught:
        plait.bake(materials.pair, base=materials.base, out=tmp_path / "out")
    model = tmp_path / ".out.baking" / "model"
    assert caught.value.__notes__ == [f"The finished model is {model}. Move it to another place, and delete {model.parent}."]
    assert (model / "plait.lock").is_file()


def test_a_disk_that_fails_while_files_are_made(materials, tmp_path, monkeypatch):
    """What cannot be flushed in between is an error, though it could be at the end."""
    monkeypatch.setattr(flushing, "_STEP", 4096)
    fsync, flushed = os.fsync, []

    def fail(handle: int) -> None:
        if os.fstat(handle).st_size > 20_000:
            flushed.append(handle)
            if len(flushed) == 1:
                raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="out cannot be written: Input/output error"):
        plait.bake(materials.pair, base=materials.base, out=tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    plait.bake(materials.pair, base=materials.base, out=tmp_path / "out", workers=1)
    assert len(flushed) > 2, "the file is flushed more than once"


def test_a_failure_before_a_file_is_finished_leaves_nothing(materials, tmp_path, monkeypatch):
    from plait.baking.tensors import ShardTensorBuilder

    def broken(*_: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(ShardTensorBuilder, "make", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        plait.bake(materials.pair, base=materials.base, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_killed_while_replacing_keeps_one_of_the_two(materials, tmp_path, monkeypatch):
    """Between the two renames of a replacement the old model is next to its place; the next run puts it back first."""
    out = tmp_path / "out"
    before = plait.bake(materials.pair, base=materials.base, out=out).folder
    expected = contents(before)
    out.rename(tmp_path / ".out.staging-99999999-abcdef.old")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1, total=2))
    with pytest.raises(OutputError, match="needs"):
        plait.bake(materials.pair, base=materials.base, out=out, force=True)
    assert contents(out) == expected


def test_force_replaces_and_nothing_else_does(materials, tmp_path):
    out = tmp_path / "out"
    plait.bake(materials.pair, base=materials.base, out=out)
    with pytest.raises(OutputError, match="exists already"):
        plait.bake(materials.pair, base=materials.base, out=out)
    result = plait.bake(materials.pair, base=materials.base, out=out, weights=[2, 2], force=True)
    assert json.loads((out / "plait.lock").read_text())["recipe"]["adapters"][0]["weight"] == 2
    assert result.folder == out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_the_base_is_never_the_output(materials, tmp_path):
    base = write_lock(Path(shutil.copytree(materials.base, tmp_path / "base")))
    with pytest.raises(OutputError, match=r"is an input of this bake \(the base model\)"):
        plait.bake(materials.pair, base=base, out=base, force=True)
