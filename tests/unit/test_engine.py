"""How modules are spread over threads, and how often their factors are read."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from plait.adapters.adapter import Adapter
from plait.errors import PlanError
from plait.merging.adapter_output import MergedAdapter
from plait.merging.combine import Combiner
from plait.merging.engine import Engine, MergedModule
from plait.merging.inventory import take_inventory
from plait.merging.plan import make_plan
from plait.recipes.request import read_request
from plait.results.progress import SilentProgress
from plait.testing import cohort


def prepared(folder: Path, **settings: object) -> tuple[Engine, Combiner]:
    cohort([(12, 8)] * 5, [3, 3], dtype=torch.float32).save(folder)
    recipe, _ = read_request(None, [folder / "adapter0", folder / "adapter1"], settings)
    inventory = take_inventory(recipe)
    engine = Engine(inventory, make_plan(inventory, workers=2), workers=2, progress=SilentProgress())
    return engine, engine.prepare()


def test_what_follows_a_module_is_done_in_its_worker(tmp_path, four_threads):
    """Rounding to the output's dtype must not wait for the thread that writes, nor start more threads beside the workers."""
    engine, combiner = prepared(tmp_path)
    main = threading.get_ident()

    def where(merged: MergedModule) -> tuple[str, bool, int]:
        return merged.target, threading.get_ident() == main, torch.get_num_threads()

    targets = [m.target for m in engine.run(combiner, engine.ranks(combiner))]
    assert len(targets) == 5
    assert list(engine.each(combiner, engine.ranks(combiner), where)) == [(t, False, 1) for t in targets]


def test_the_writing_thread_computes_alone_and_gets_its_threads_back(tmp_path, four_threads):
    """Blocks of a large dense delta are computed while they are written: their bits must not depend on the cores there."""
    engine, combiner = prepared(tmp_path)
    modules = engine.run(combiner, engine.ranks(combiner))
    next(modules)
    assert torch.get_num_threads() == 1
    modules.close()
    assert torch.get_num_threads() == 4
    assert len(list(engine.run(combiner, engine.ranks(combiner)))) == 5
    assert torch.get_num_threads() == 4


def test_an_error_in_what_follows_names_the_module(tmp_path, four_threads):
    engine, combiner = prepared(tmp_path)
    with pytest.raises(ZeroDivisionError) as caught:
        list(engine.each(combiner, engine.ranks(combiner), lambda merged: 1 // 0))
    assert "while merging target module" in caught.value.__notes__[0]
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, 1),
        ({"method": "linear", "space": "factors"}, 1),
        ({"method": "ties", "space": "factors"}, 1),  # PEFT's TIES, whose threshold is each module's own
        ({"method": "ties", "space": "delta"}, 3),  # the survey's two, and the merge
        ({"method": "ties", "space": "delta", "rank": "energy:0.9"}, 4),
        ({"method": "ties", "space": "core", "rank": "energy:0.9"}, 1),  # what was made of them is kept
        ({"method": "tsv"}, 1),
    ],
    ids=str,
)
def test_factors_are_read_once_a_pass(settings, passes, tmp_path, monkeypatch):
    reads: Counter[tuple[str, str]] = Counter()
    read = Adapter.read

    def counted(self, path, dtype=torch.float32):
        reads[self.name, path] += 1
        return read(self, path, dtype)

    monkeypatch.setattr(Adapter, "read", counted)
    engine, combiner = prepared(tmp_path, **settings)
    list(engine.run(combiner, engine.ranks(combiner)))
    assert set(reads.values()) == {passes}
    assert len(reads) == 10


@pytest.mark.parametrize(("scale", "dtype", "word"), [(1e6, "float16", "overflow"), (1e-12, "float16", "vanish")])
def test_a_dtype_that_is_too_narrow_is_refused_by_the_worker(scale, dtype, word, tmp_path):
    engine, combiner = prepared(tmp_path, scale=scale, dtype=dtype)
    ranks = engine.ranks(combiner)
    adapter = MergedAdapter(combiner.prepared._inventory, ranks)
    with pytest.raises(PlanError, match=word):
        list(engine.each(combiner, ranks, adapter.tensors))
