"""A Ray cluster of two nodes on this machine, one for all tests of a session: they are in one group of xdist, `ray`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest

from plait.cluster.workers import Workers

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


class Nodes:
    """Two nodes of one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args=NODE)
        self._other = self._cluster.add_node(**NODE)
        self.address = self._cluster.address

    @property
    def both(self) -> bool:
        """Whether none is lost."""
        return self._other is not None

    def lose(self) -> None:
        """Kill one, with its workers, which would see it a second later by themselves and work until then."""
        (raylet,) = self._other.all_processes["raylet"]
        workers = psutil.Process(raylet.process.pid).children(recursive=True)
        self._cluster.remove_node(self._other, allow_graceful=False)
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        self._other = None

    def restore(self) -> None:
        """Have two again."""
        if self._other is None:
            self._other = self._cluster.add_node(**NODE)

    def stop(self) -> None:
        """End both."""
        self._cluster.shutdown()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Nodes]:
    """Return the cluster; `--cluster ray` finds it."""
    pytest.importorskip("ray", reason="Ray is not installed: `make .venv/.ray` installs it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")  # the other tests would take all time from workers that are nice
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        found = Nodes()
        patch.setenv("RAY_ADDRESS", found.address)
        yield found
        found.stop()


@pytest.fixture
def nodes(ray_cluster: Nodes) -> Nodes:
    """Return it with both nodes."""
    ray_cluster.restore()
    return ray_cluster


@pytest.fixture
def losing(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what has a node killed as soon as a worker on each has a job; until then none is given to one alone."""

    def soon() -> None:
        assign, give = Workers._assign, Workers._give

        def assign_to_both(self: Workers) -> None:
            if not (nodes.both and self._idle and self._starting):
                assign(self)

        def give_and_lose(self: Workers, *what: Any) -> None:
            give(self, *what)
            if nodes.both and len(self._running) == 2:
                nodes.lose()

        monkeypatch.setattr(Workers, "_assign", assign_to_both)
        monkeypatch.setattr(Workers, "_give", give_and_lose)

    return soon
