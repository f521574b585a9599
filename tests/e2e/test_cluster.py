"""`--cluster ray` on two nodes of this machine, one of which is lost in the middle: what is made is what is made here."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import plait
from plait.cluster.connection import Cluster, Share, connected
from plait.errors import MissingPackageError, OutputError, PlaitError, PlanError, RecipeError
from plait.results.progress import Progress
from plait.search.record import StudyRecord
from plait.training import on_cluster
from plait.version import __version__
from tests.e2e.test_bake_survival import SETTINGS, contents, write_materials
from tests.phase_files import CHECKPOINTS, MERGE, lay_out, rewrite, states, tensors
from tests.ray_nodes import Nodes
from tests.searched import sweep, tried
from tests.warm import check_killed, run_forked

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("ray")]


# Waits when the first of the second batch has been reported, and the second of it has not.
SWEEP_HELD = """
import optuna
from plait.cli.main import main
tell = optuna.Study.tell
known = []
def tell_and_wait(self, *outcome, **settings):
    trial = tell(self, *outcome, **settings)
    known.append(trial)
    if len(known) == 3:
        hold()
    return trial
optuna.Study.tell = tell_and_wait
main()
"""
# Waits when three files are finished, and noted in the journal.
BAKE_HELD = """
from plait.baking.journal import BakeJournal
from plait.cli.main import main
finish = BakeJournal.finish
def finish_and_wait(self, *what):
    finish(self, *what)
    if len(self.finished) == 3:
        hold()
BakeJournal.finish = finish_and_wait
main()
"""
SEARCH = {"seed": 3, "budget": 5, "init_points": 3, "parallel": 2, "space": {"scale": "0.1..3"}}


@pytest.fixture(scope="module")
def earlier(pair: Path) -> Path:
    """Return a study with one candidate that is one of `SEARCH`'s space too."""
    return sweep(pair, pair / "earlier" / "study", {"grid": {"scale": [0.5]}, "race": False}).folder


@pytest.fixture(scope="module")
def here(pair: Path, earlier: Path) -> StudyRecord:
    """Return what `SEARCH` finds in this process, undisturbed."""
    return sweep(pair, pair / "here" / "study", SEARCH, warm_start=[earlier]).record


@pytest.mark.usefixtures("nodes")
def test_a_sweep_whose_driver_and_node_are_killed_ends_as_one_here(
    pair: Path, earlier: Path, here: StudyRecord, tmp_path: Path, losing: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With candidates of an earlier study; begun on one node, which asks those of a batch one after another."""
    line = ["sweep", str(pair / "sort"), str(pair / "rate"), "--tasks", str(pair / "sort.yaml"), str(pair / "rate.yaml")]
    line += ["--base-id", str(pair / "base"), "--seed", "3", "--budget", "5", "--init-points", "3", "--space", "scale=0.1..3"]
    line += ["--method", "linear", "--cluster", "ray", "--parallel", "2", "--warm-start", str(earlier)]
    study = tmp_path / "there" / "study"
    line += ["--workspace", str(tmp_path / "there" / "artifacts"), "-o", str(study)]
    check_killed(run_forked(SWEEP_HELD, *line))
    assert plait.sweep_status(study).trials == 5
    losing()
    monkeypatch.setattr("plait.evaluation.session.answer_examples", None)  # no model is asked here
    wanted = {**SEARCH, "parallel": None}
    with pytest.warns(UserWarning, match=r"a worker was lost, and what it did \(.*\) is done again elsewhere"):
        there = sweep(pair, study, wanted, warm_start=[earlier], cluster="ray").record
    assert [run.phase for run in here.runs] == ["start", "warm_start", *["search"] * 5]
    assert tried(there) == tried(here)
    assert same(there) == same(here)
    monkeypatch.setattr(Cluster, "share", lambda *given, **how: Share(2, 1))  # as many at a time as there are workers
    again = sweep(pair, tmp_path / "there" / "again", wanted, warm_start=[earlier], cluster="ray").record
    assert tried(again) == tried(here), "what was answered is not asked again: no worker is started"
    monkeypatch.undo()
    with pytest.raises(OutputError, match=r"search\.parallel is 3, and the study that is there began with 2"):
        sweep(pair, study, {**SEARCH, "parallel": 3}, warm_start=[earlier])


def test_a_sweep_from_outside_of_the_cluster(
    pair: Path, here: StudyRecord, earlier: Path, tmp_path: Path, nodes: Nodes
) -> None:
    if nodes.client is None:
        pytest.skip("the server of Ray's client needs grpcio: `pip install 'plait[ray]'`")
    there = sweep(pair, tmp_path / "study", SEARCH, warm_start=[earlier], cluster=nodes.client).record
    assert tried(there) == tried(here)


class Failing:
    """Of Ray, a connection that fails so many times in the way that its proxy fails, or in another."""

    def __init__(self, times: int, error: Exception) -> None:
        self._left, self._error = times, error

    def is_initialized(self) -> bool:
        return False

    def init(self, **settings: Any) -> None:
        self._left -= 1
        if self._left >= 0:
            raise self._error

    def shutdown(self) -> None:
        pass


UNSTARTED = ConnectionAbortedError(
    'Initialization failure from server:\nTraceback (most recent call last):\n  File "proxier.py", line 765, in Datapath\n'
    "    raise RuntimeError(\nRuntimeError: Starting Ray client server failed.\n\n"
)


@pytest.mark.parametrize(("times", "error", "warned"), [(2, UNSTARTED, 2), (3, UNSTARTED, 2), (1, ConnectionError("none"), 0)])
def test_a_server_of_a_client_that_does_not_start(
    times: int, error: Exception, warned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr("plait.cluster.connection.optional", lambda *of: Failing(times, error))
    what = "Initialization failure from server: RuntimeError: Starting Ray client server failed" if warned else "none"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if times == warned:
            with connected("ray://127.0.0.1:1") as cluster:
                assert cluster.address == "ray://127.0.0.1:1"
        else:
            with (
                pytest.raises(PlaitError, match=f"no Ray cluster answers \\({what}\\)"),
                connected("ray://127.0.0.1:1"),
            ):
                pass
    assert [str(warning.message) for warning in caught] == [
        f"--cluster ray://127.0.0.1:1: the cluster could not start what serves this process ({what}); asked again."
    ] * warned


def test_an_address_that_needs_grpcio(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setitem(sys.modules, "grpc", None)
    with (
        pytest.raises(MissingPackageError, match=r"--cluster ray://127\.0\.0\.1:1 needs .*grpc.*'plait\[ray\]'"),
        connected("ray://127.0.0.1:1"),
    ):
        pass


def test_a_bake_whose_driver_and_node_are_killed_has_the_bytes_of_one_here(
    tmp_path: Path, losing: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = write_materials(tmp_path)
    pair, base = made.pair, made.base
    here = plait.bake(pair, base=base, out=tmp_path / "here", **SETTINGS).record
    line = ["bake", *map(str, pair), "--base-id", str(base), "-o", str(tmp_path / "there"), "--cluster", "ray"]
    check_killed(run_forked(BAKE_HELD, *line, *(f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items())))
    assert not (tmp_path / "there").exists()
    capfd.readouterr()
    losing()
    monkeypatch.setattr("plait.baking.pipeline.ShardWriter", None)  # no file is made here
    with pytest.warns(UserWarning, match=r"a worker was lost, and what it did \(model-.*\) is done again elsewhere"):
        there = plait.bake(pair, base=base, out=tmp_path / "there", cluster="ray", **SETTINGS).record
    assert capfd.readouterr().out == "", "nothing of Ray's is printed"
    assert len(there.resumed) == 3
    assert there.shards == here.shards
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert len(there.shards) == 12
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    with pytest.raises(PlanError, match="second moments that a function gives are in this process only"):
        plait.bake(
            pair, base=base, out=tmp_path / "other", cluster="ray", method="regmean", moments=lambda *of: torch.eye(32)
        )  # fmt: skip


@pytest.fixture
def phases(tmp_path: Path, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be where two phases are, as `rewrite` changes them."""
    lay_out(tmp_path, pair / "base")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("phases")
def test_a_training_with_a_node_lost_continues_from_its_checkpoint(
    nodes: Nodes, losing: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(CHECKPOINTS, ("max_steps: 10", "max_steps: 40"), MERGE)
    assert plait.train("phases.yaml", out="here").ok
    rewrite(CHECKPOINTS, ("max_steps: 10", "max_steps: 40"))
    losing(at_once=False)

    def receive_and_lose(part: Progress, call: Any) -> None:
        receive(part, call)
        begun = {Path(place).parent for place, _, files in os.walk("out") if "trainer_state.json" in files}
        if nodes.both and len(begun) == 2:
            nodes.lose()

    receive = on_cluster.receive
    monkeypatch.setattr(on_cluster, "receive", receive_and_lose)
    with pytest.warns(UserWarning, match=r"a worker was lost, and what it did \(phase '.*'\) is done again elsewhere"):
        result = plait.train("phases.yaml", out="out", cluster="ray")
    assert states(result) == {"sort": "done", "rate": "done"}
    assert len([phase for phase in result.phases if phase.resumed_from]) == 1
    for name in ("sort", "rate"):
        assert all(tensor.equal(tensors("out", name)[key]) for key, tensor in tensors("here", name).items())
    assert result.merged == "merged"
    rewrite(("[sort.yaml, rate.yaml]", "[{task: sort.yaml, arguments: {max_length: 2}}]"), MERGE)
    result = plait.train("phases.yaml", out="other", cluster="ray")
    assert states(result) == {"sort": "failed"}
    assert "no example is left" in result.failed[0].error


def same(record: StudyRecord) -> dict[str, Any]:
    """Return what of a record depends neither on when nor on where it was made."""
    left_out = {"runs", "timestamp", "seconds", "search", "recipe"}
    found = record.model_dump(exclude=left_out)
    found["post_sweep_eval"].pop("run")
    return found


class Answering:
    """Of Ray, what is asked of it: nodes that answer what they are made to."""

    def __init__(self, *nodes: dict[str, float]) -> None:
        self._nodes = nodes

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": resources} for resources in self._nodes]


def share(*nodes: dict[str, float], workers: int | None = None, gpus: bool = True) -> Share:
    return Cluster(Answering(*nodes), "ray").share(workers, gpus=gpus)


def test_the_share_of_a_worker() -> None:
    assert share({"CPU": 8}, {"CPU": 4}) == Share(2, 4)
    assert share({"CPU": 8}, {"CPU": 8}, workers=4) == Share(4, 4)
    assert share({"CPU": 8, "GPU": 2}) == Share(2, 4, 1)
    assert share({"CPU": 8, "GPU": 2}, gpus=False) == Share(1, 8)
    assert share({"memory": 1}, {"CPU": 4}) == Share(1, 4), "a head node that only manages"


@pytest.mark.parametrize("nodes", [(), ({"memory": 1},), ({"CPU": 0.0},)])
def test_a_cluster_without_a_cpu(nodes: tuple[dict[str, float], ...]) -> None:
    with pytest.raises(PlaitError, match="no node of the Ray cluster offers a CPU, and every worker needs one"):
        share(*nodes)


@pytest.mark.parametrize("address", ["slurm", "ray:", "ray://host", "ray://:1", "10.0.0.1:6379", "ray://host:port"])
def test_addresses_of_other_forms(address: str) -> None:
    with pytest.raises(RecipeError, match=r"--cluster '.*': it must be 'ray' or 'ray://HOST:PORT'"):
        plait.sweep(["a", "b"], out="study", cluster=address, scale=1, search={"space": {"scale": "0..1"}})


def test_nodes_that_cannot_take_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.results.versions import library_versions

    fine = {**library_versions("transformers"), "plait": __version__}
    answers: dict[str, Any] = {"one": {"unseen": [], "versions": fine}, "two": {"unseen": [], "versions": {**fine}}}
    monkeypatch.setattr(Cluster, "_looked", lambda *given: answers)
    cluster = Cluster(None, "ray")
    cluster.check(tmp_path)
    assert not [*tmp_path.iterdir()]
    answers["two"]["versions"] = {**fine, "torch": "1.0", "plait": None}
    answers["three"] = "nothing came within 60 s"
    with pytest.raises(PlaitError) as caught:
        cluster.check(tmp_path)
    message = str(caught.value)
    assert "node three does not answer: nothing came within 60 s" in message
    assert f"node two has torch 1.0 ({fine['torch']} here), plait is missing ({__version__} here)" in message
    answers.clear()
    answers["two"] = {"unseen": ["/base"], "versions": fine}
    with pytest.raises(OutputError, match="/base: node two of the cluster does not see this"):
        cluster.check(tmp_path, [Path("/base")])
