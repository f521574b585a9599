"""`plait eval` with the demo's tasks and adapters on SmolLM2-135M-Instruct, a few examples of each."""

from __future__ import annotations

import pytest

import plait
from tests.demo import DEMO, TASKS, base_model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_demos_adapters_know_their_tasks():
    found = plait.evaluate(
        {name: DEMO / "adapters" / name for name in TASKS},
        method="ties",
        space="core",
        density=0.2,
        scale=2,
        tasks=[DEMO / "tasks" / f"{name}.yaml" for name in TASKS],
        subset=8,
        base=base_model(),
        workspace=None,
    )
    assert [t.examples for t in found.tasks] == [8, 8, 8]
    for task in found.tasks:
        assert task.single >= 0.8, "as they were trained: prompt, labels and adapter belong together"
        assert task.single > task.base
    assert sum(t.base for t in found.tasks) / 3 < 0.6
    assert found.mean_recovery > 0.4
