"""What `plait report` reads of runs: of adapters, locks and leaderboards, here and from elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket

import pytest

import plait
from plait.errors import ReportError
from plait.evaluation.record import SingleAdapter
from plait.reports.page import render
from plait.reports.reading import read_report
from plait.testing import cohort
from tests.evaluated import WHOLE, Page, board_of, evaluation, leaderboard_on_disk, pair_on_disk, run_folder, task
from tests.every import every
from tests.locks import write_lock


@pytest.fixture
def sweep(tmp_path):
    return leaderboard_on_disk(tmp_path)


def test_adapters_are_compared_where_they_still_are(tmp_path):
    weights = {"policy": "per_layer", "layers": {"1": {"adapter0": 0.25}}}
    run = run_folder(tmp_path / "run", pair_on_disk(tmp_path, weights=weights))
    report = read_report([run])
    assert report.conflict is not None
    assert report.conflict.layers[0].overlap_a[0][1] is not None
    assert report.weights is not None
    assert report.weights.values == ((1.0, 1.0), (0.25, 1.0))
    text = Page(render(report, title="t")).text
    assert "Coefficients Weights. What each adapter is multiplied by" in text
    assert "1 0.25 1.00" in text, "layer 1 among the numbers"
    assert "adapter0 · adapter1" in text
    shutil.rmtree(tmp_path / "adapter0")
    gone = read_report([run])
    assert gone.conflict is None
    assert "adapter0" in gone.notes[0]


def _other_bytes(folder, found):
    return {"sources": (found.sources[0].model_copy(update={"sha256": "0" * 64}), found.sources[1])}


def _no_source(folder, found):
    return {"sources": found.sources[1:]}


def _pipe(folder, found):
    (folder / "adapter0" / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter0" / "adapter_model.safetensors")
    return {}


def _endless(folder, found):
    (folder / "adapter0" / "adapter_model.safetensors").unlink()
    (folder / "adapter0" / "adapter_model.safetensors").symlink_to("/dev/zero")
    return {}


def _neighbor(folder, found):
    recipe = found.recipe | {"adapters": [found.recipe["adapters"][0] | {"path": str(folder / "adapter")}]}
    return {"recipe": recipe, "sources": (found.sources[0].model_copy(update={"path": str(folder / "adapter")}),)}


@every("change", [_other_bytes, _no_source, _pipe, _endless, _neighbor])
def test_a_run_from_elsewhere_shows_nothing_of_a_folder_whose_contents_it_does_not_know(tmp_path, change):
    folder = tmp_path / change.__name__
    found = pair_on_disk(folder)
    found = found.model_copy(update=change(folder, found))
    report = read_report([run_folder(folder / "run", found)])
    assert report.conflict is None
    assert report.weights is None
    (note,) = report.notes
    assert "adapter 'adapter0'" in note
    assert "not on this machine with the bytes that the run was made of" in note
    assert "adapter1" not in note, "no neighbor is named"


def test_a_run_from_elsewhere_asks_no_network(tmp_path, monkeypatch):
    """Neither for adapters, nor for the base of a DoRA merge or second moments."""

    def asked(*args, **kwargs):
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    adapters = [{"name": name, "path": f"stranger/{name}@main", "moments": "/dev/zero"} for name in ("a", "b")]
    recipe = {"adapters": adapters, "base_model": "stranger/base", "method": {"name": "regmean"}}
    sources = [
        SingleAdapter(name=name, path=f"stranger/{name}@main", repo=f"stranger/{name}", commit="0" * 40, sha256="0" * 64)
        for name in ("a", "b")
    ]
    report = read_report([run_folder(tmp_path / "run", evaluation(task("t", 0.9), recipe=recipe, sources=tuple(sources)))])
    assert report.conflict is None
    assert "'stranger/a@main' is not on this machine" in report.notes[0]


def test_an_adapter_of_the_hub_is_compared_from_the_cache(tmp_path, monkeypatch):
    found = pair_on_disk(tmp_path)
    storage = tmp_path / "cache" / "models--org--adapter0"
    commit = "1" * 40
    (storage / "snapshots").mkdir(parents=True)
    (tmp_path / "adapter0").rename(storage / "snapshots" / commit)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    first = {"name": "adapter0", "path": "org/adapter0"}
    source = found.sources[0].model_copy(update={"path": "org/adapter0", "repo": "org/adapter0", "commit": commit})
    recipe = found.recipe | {"adapters": [first, found.recipe["adapters"][1]]}
    found = found.model_copy(update={"recipe": recipe, "sources": (source, found.sources[1])})
    assert read_report([run_folder(tmp_path / "run", found)]).conflict is not None


def test_a_recipe_that_cannot_be_read_costs_only_what_is_drawn_from_it(tmp_path):
    """One of a later version, or of a method that is not installed here."""
    found = read_report([run_folder(tmp_path / "run", WHOLE.model_copy(update={"recipe": {"methd": "ties"}}))])
    assert found.evaluations[0].recipe == {"methd": "ties"}
    (note,) = found.notes
    assert note.startswith("the conflict between the adapters is not shown: recipe: adapters: 'adapters' is missing.")


@pytest.mark.parametrize("entry", ["kws", {"name": "x", "path": "kws"}, {"name": "x", "path": "a=kws"}])
def test_a_word_in_a_recipe_is_not_looked_up(tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts" / "kws" / "adapters" / "secret").mkdir(parents=True)
    (tmp_path / "kwss").mkdir()
    found = read_report([run_folder(tmp_path / "run", WHOLE.model_copy(update={"recipe": {"adapters": [entry]}}))])
    (note,) = found.notes
    assert "is not on this machine with the bytes that the run was made of" in note
    assert not re.search("secret|kwss|artifacts", note)


def test_a_written_merge_brings_its_energy_and_its_lock(tmp_path):
    cohort([(12, 10)], [2, 2], seed=3).save(tmp_path)
    plait.merge([tmp_path / "adapter0", tmp_path / "adapter1"], method="svd", rank=1, out=tmp_path / "merged")
    done = plait.report([tmp_path / "merged"], out=tmp_path / "r.html")
    page = Page(done.page.read_text())
    assert "Energy kept svd at rank 1." in page.text
    assert "plait.lock" in page.text


def test_the_run_record_of_a_bake_is_not_a_merges(tmp_path):
    cohort([(12, 10)], [2, 2], seed=3).save(tmp_path)
    plait.merge([tmp_path / "adapter0", tmp_path / "adapter1"], method="svd", rank=1, out=tmp_path / "made")
    lock, record = tmp_path / "made" / "plait.lock", tmp_path / "made" / "merge_metadata.json"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "kind": "bake"}))
    record.write_text(json.dumps({**json.loads(record.read_text()), "shards": {"model.safetensors": "0"}}))
    page = Page(plait.report([tmp_path / "made"], out=tmp_path / "r.html").page.read_text())
    assert "plait.lock" in page.text
    assert page.text.startswith("Baked model")
    assert "Energy kept" not in page.text


@pytest.mark.parametrize("content", ["[" * 10_000, "{}", "a text", None])
def test_a_lock_that_is_none_is_refused_by_name(tmp_path, content):
    cohort([(12, 10)], [2, 2], seed=3).save(tmp_path)
    plait.merge([tmp_path / "adapter0", tmp_path / "adapter1"], method="svd", rank=1, out=tmp_path / "merged")
    lock = tmp_path / "merged" / "plait.lock"
    lock.unlink()
    if content is None:
        lock.symlink_to(tmp_path / "nowhere")
    else:
        lock.write_text(content)
    with pytest.raises(ReportError, match=re.escape(str(lock))):
        plait.report([tmp_path / "merged"], out=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_weights_that_are_the_same_everywhere_are_said_once(tmp_path):
    found = pair_on_disk(tmp_path, scale=1.5)
    found.recipe["adapters"][0]["weight"] = 0.7
    run = run_folder(tmp_path / "run", found)
    text = Page(render(read_report([run]), title="t")).text
    assert "0.7 × adapter0, 1 × adapter1, the same in all 2 layers; the merged delta is then multiplied by 1.5." in text


def test_an_exact_merge_lost_nothing(tmp_path):
    cohort([(12, 10)], [2, 2], seed=3).save(tmp_path)
    plait.merge([tmp_path / "adapter0", tmp_path / "adapter1"], out=tmp_path / "merged")
    text = Page(plait.report(tmp_path / "merged", out=tmp_path / "r.html").page.read_text()).text
    assert "linear in delta space: nothing was lost. Factors of rank 4 hold the complete merge of 1 modules." in text


def test_a_leaderboard_brings_what_stands_behind_its_places(sweep, tmp_path):
    board, _ = sweep
    report = read_report([board])
    assert [e.name for e in report.evaluations] == ["best!", "other!"]
    text = Page(plait.report(board, out=tmp_path / "r.html").page.read_text()).text
    for message in (
        "What best! kept",
        "best! is the best of 2 merges",
        "Compared with other merges",
        "not done: slerp: takes two",
        "perhaps",
    ):
        assert message in text, message
    assert read_report([board / "leaderboard.json"]) == report
    shutil.copytree(board, tmp_path / "elsewhere")
    alone = read_report([tmp_path / "elsewhere"])
    assert alone.evaluations == ()
    assert "Merges of a" in Page(plait.report(tmp_path / "elsewhere", out=tmp_path / "s.html").page.read_text()).text


def test_a_leaderboard_reads_results_of_its_own_workspace_alone(sweep, tmp_path):
    """Wherever it was unpacked, and whatever the workspace links to."""
    board, _ = sweep
    other = tmp_path / "ws" / "downloads" / "a" / "run_1"
    shutil.copytree(board, other)
    assert read_report([other]).evaluations == (), "the folder is none that plait eval writes"
    (result,) = (tmp_path / "ws").glob("merged/*/*/eval/test/eval_results_ties_1_test.json")
    result.rename(tmp_path / "secret.json")
    result.symlink_to(tmp_path / "secret.json")
    with pytest.raises(ReportError, match="outside the folder"):
        read_report([board])


@every("tag", ["a**b", "[x", "../../../../results", "\0"])
def test_a_leaderboard_from_elsewhere_leads_nowhere_else(tmp_path, tag):
    board = board_of(evaluation(task("a", 0.9)))
    board = board.model_copy(update={"places": (board.places[0].model_copy(update={"tag": tag}),)})
    file = tmp_path / "leaderboard.json"
    file.write_text(json.dumps(board.model_dump(mode="json")))
    if tag in ("a**b", "[x"):  # names of files, which are not there
        assert read_report([file]).evaluations == ()
    else:
        with pytest.raises(ReportError, match=r"leaderboard\.json"):
            read_report([file])


def test_the_run_that_is_named_first_is_what_the_page_is_about(sweep, tmp_path):
    board, other = sweep
    report = read_report([other, board])
    assert [e.tag for e in report.evaluations] == ["ties_2", "ties_1"], "each once"
    text = Page(render(report, title="t")).text
    assert "other is number 2 of 2 merges that were compared; best! is the best." in text


def test_what_layers_have_is_drawn_layer_by_layer(sweep, tmp_path):
    run = run_folder(tmp_path / "run", pair_on_disk(tmp_path, weights={"policy": "lines", "alpha": 0.3, "beta": 0.7}))
    plait.merge([tmp_path / "adapter0", tmp_path / "adapter1"], method="svd", rank=1, out=tmp_path / "merged")
    done = plait.report([run, sweep[0], tmp_path / "merged"], out=tmp_path / "r.html", figures=tmp_path / "figures")
    drawn = {f.stem for f in done.figures}
    layers = {"layers_cosine", "layers_sign_conflict", "layers_overlap_a", "layers_overlap_b"}
    assert drawn == {"recovery", "leaderboard", "weights", "energy", *layers}
    assert "sign conflict" in (tmp_path / "figures" / "layers_sign_conflict.svg").read_text().lower()


def test_what_is_no_run_is_told_all_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "eval_results_test.json"
    broken.write_text(json.dumps({"version": 1}))
    with pytest.raises(ReportError) as caught:
        plait.report([tmp_path / "nowhere", tmp_path / "empty", broken], out=tmp_path / "r.html")
    for message in ("nowhere: is not a file or folder", "empty: holds no run", "not a result that this version of plait wrote"):
        assert message in str(caught.value)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(("kind", "record"), [("merge", "merge_metadata.json"), ("tune", "tuning.json")])
def test_a_result_without_its_record_or_its_lock(tmp_path, kind, record):
    (tmp_path / "out").mkdir()
    write_lock(tmp_path / "out", kind=kind)
    with pytest.raises(ReportError, match=rf"there is no {record}, which says what was done"):
        read_report([tmp_path / "out"])
    (tmp_path / "out" / "plait.lock").rename(tmp_path / "out" / "merge_metadata.json")
    with pytest.raises(ReportError, match=r"holds merge_metadata\.json and no plait\.lock"):
        read_report([tmp_path / "out"])
