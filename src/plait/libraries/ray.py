"""Uses of Ray, and what plait knows of its inside."""

from __future__ import annotations

import importlib
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def keeping_signals() -> Iterator[None]:
    """Put back how signals are handled after the block: `ray.init` makes SIGTERM end the process without clearing away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


@contextmanager
def quiet_connection(ray: Any, address: str) -> Iterator[None]:
    """Connect this process to a cluster that is there while the block runs, with nothing of Ray's on stdout and stderr.

    Workers' output and Ray's log are left to the cluster's own log files. So are the last lines of the log of a node that is
    lost, which Ray prints to stdout whatever it is asked for.

    Args:
        ray: the module.
        address: `auto`, or `ray://HOST:PORT`.
    """
    worker: Any = importlib.import_module("ray._private.worker")
    before = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *given, **how: None
    try:
        with keeping_signals():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        yield
    finally:
        ray.shutdown()
        worker.print_to_stdstream = before


def is_unstarted_server(error: Exception) -> bool:
    """Return whether a connection failed because the cluster could not start this client's server.

    Ray's proxy forks while other threads of it call gRPC, and the new process dies in about one of ten starts
    (ray-project/ray#63202): the next start is likely to live.
    """
    return isinstance(error, ConnectionAbortedError) and "Initialization failure from server" in str(error)


@contextmanager
def sent_by_value(module: ModuleType) -> Iterator[None]:
    """Send the functions of a module as their code while the block runs, so that a node that lacks the module runs them."""
    cloudpickle: Any = importlib.import_module("ray.cloudpickle")
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def on_node(node: str, *, only: bool) -> Any:
    """Return the strategy that places work on a node.

    Args:
        node: its id.
        only: whether it may be nowhere else.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=node, soft=not only)


def error_of_work(error: Exception) -> Exception | None:
    """Return what was raised by work on a node; None where the work, or its node, was lost."""
    from ray.exceptions import RayTaskError

    if not isinstance(error, RayTaskError):
        return None
    cause: Exception | None = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error
