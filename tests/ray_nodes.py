"""A Ray cluster on this machine, one for all tests of a session: they are in one group of xdist, `ray`."""

from __future__ import annotations

import gc
import importlib.util
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest

from plait.cluster.workers import Workers

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


class Nodes:
    """A head of one CPU, and another node while it is wanted.

    Attributes:
        address: of the head.
        client: of the server for processes outside; None where its package, grpcio, is not installed.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        port = free_port() if importlib.util.find_spec("grpc") else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the server's log files, which Ray does not close
            self._cluster = Cluster(initialize_head=True, head_node_args={**NODE, "ray_client_server_port": port})
            gc.collect()
        self._other: Any = None
        self.address = self._cluster.address
        self.client = None if port is None else f"ray://127.0.0.1:{port}"

    @property
    def both(self) -> bool:
        """Whether there are two."""
        return self._other is not None

    def have_two(self) -> None:
        """Add the other node, where it is not there."""
        if self._other is None:
            self._other = self._cluster.add_node(**NODE)

    def lose(self) -> None:
        """Kill the other, with its workers, which would see it a second later by themselves and work until then."""
        (raylet,) = self._other.all_processes["raylet"]
        workers = psutil.Process(raylet.process.pid).children(recursive=True)
        self._cluster.remove_node(self._other, allow_graceful=False)
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        self._other = None

    def stop(self) -> None:
        """End all."""
        self._cluster.shutdown()


def free_port() -> int:
    """Return the number of a port at which nothing is served."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """Return the cluster; `--cluster ray` finds it."""
    pytest.importorskip("ray", reason="Ray is not installed: `make .venv/.ray` installs it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")  # the other tests would take all time from workers that are nice
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GRPC_ENABLE_FORK_SUPPORT", "0")  # handlers that end one in ten: `is_unstarted_server`
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        found = Nodes()
        patch.setenv("RAY_ADDRESS", found.address)
        yield found
        found.stop()


@pytest.fixture
def losing(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what makes two nodes, one of which is killed as soon as both have a job, or when the test does it.

    Until then no job is given to one alone.
    """

    def soon(*, at_once: bool = True) -> None:
        nodes.have_two()
        assign, give = Workers._assign, Workers._give

        def assign_to_both(self: Workers) -> None:
            if not (nodes.both and self._idle and self._starting):
                assign(self)

        def give_and_lose(self: Workers, *what: Any) -> None:
            give(self, *what)
            if at_once and nodes.both and len(self._running) == 2:
                nodes.lose()

        monkeypatch.setattr(Workers, "_assign", assign_to_both)
        monkeypatch.setattr(Workers, "_give", give_and_lose)

    return soon
