"""`plait eval` with the demo's tasks and adapters on SmolLM2-135M-Instruct, a few examples of each."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import plait

DEMO = Path(__file__).parents[2] / "examples" / "demo"
NAMES = ("sentiment", "supersense", "langid")


@pytest.fixture(scope="module")
def base() -> Path:
    spec = importlib.util.spec_from_file_location("base_model", DEMO / "base_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.base_model()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_demos_adapters_know_their_tasks(base):
    found = plait.evaluate(
        {name: DEMO / "adapters" / name for name in NAMES},
        method="ties",
        space="core",
        density=0.2,
        scale=2,
        tasks=[DEMO / "tasks" / f"{name}.yaml" for name in NAMES],
        subset=20,
        base=base,
        workspace=None,
    )
    assert [t.examples for t in found.tasks] == [20, 20, 20]
    for task in found.tasks:
        assert task.single >= 0.8, "as they were trained: prompt, labels and adapter belong together"
        assert task.single > task.base
    assert sum(t.base for t in found.tasks) / 3 < 0.6
    assert found.mean_recovery > 0.4
