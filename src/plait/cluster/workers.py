"""Worker processes on the nodes of a cluster, and jobs for them.

A job is a function of its arguments: where its worker or node is lost, it is done again by another. Ray places the workers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from plait.cluster.connection import Cluster, Share, in_short
from plait.cluster.host import Host, Mailbox
from plait.errors import PlaitError
from plait.libraries.ray import error_of_work, on_node
from plait.notices import announce

_POLL = 0.5  # seconds between looks at what workers report
_LOST = 3  # how often a job is begun again elsewhere
_PATIENCE = 120.0  # seconds before it is announced that nothing has begun


@dataclass(eq=False)
class Job:
    """One call on a worker.

    Attributes:
        about: what it is about, for the one who gave it.
        name: of it, for people.
        method: of what the worker has made.
        arguments: plain data.
        near: jobs that share this go to the worker that did the last of them, where it is free.
        lost: how often its worker was lost.
    """

    about: Any
    name: str
    method: str
    arguments: Sequence[Any]
    near: str | None = None
    lost: int = 0


@dataclass(eq=False)
class _Worker:
    actor: Any
    near: str | None = None


@dataclass(frozen=True, eq=False)
class Ended:
    """A job that has ended.

    Attributes:
        job: which.
        value: what its method returned; None where it failed.
        error: what its method raised, or that its worker was lost too often; None where it did not fail.
    """

    job: Job
    value: Any = None
    error: Exception | None = None


@dataclass(eq=False)
class Workers:
    """Processes on the nodes; leave the block to end them all.

    Attributes:
        cluster: on which.
        make: what makes the object that does the work, on every worker; by reference.
        arguments: of it; plain data.
        share: how many workers there are at most, and what each gets.
        fresh: whether a worker does one job only.
        on_message: gets what a job sends, with `about` of the job.
    """

    cluster: Cluster
    make: Callable[..., Any]
    arguments: Sequence[Any]
    share: Share
    fresh: bool = False
    on_message: Callable[[Any, tuple[Any, ...]], object] = lambda about, call: None
    _waiting: deque[Job] = field(default_factory=deque)
    _starting: dict[Any, _Worker] = field(default_factory=dict)
    _idle: list[_Worker] = field(default_factory=list)
    _running: dict[Any, tuple[_Worker, Job]] = field(default_factory=dict)
    _numbers: Any = field(default_factory=count)
    _jobs: dict[int, Job] = field(default_factory=dict)
    _box: Any = None
    _failed_starts: int = 0
    _quiet_since: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def open(self) -> bool:
        """Whether a job has not ended."""
        return bool(self._waiting or self._running)

    def submit(self, job: Job) -> None:
        """Have a job done."""
        self._waiting.append(job)

    def next(self) -> Ended:
        """Wait until a job ends.

        Raises:
            PlaitError: a worker cannot begin.
        """
        ray = self.cluster.ray
        while self.open:
            self._assign()
            ready, _ = ray.wait([*self._running, *self._starting], num_returns=1, timeout=_POLL)
            self._deliver()
            for reference in ready:
                if reference in self._starting:
                    self._begun(reference)
                elif (ended := self._ended(reference)) is not None:
                    return ended
            self._announce_waiting()
        raise AssertionError("no job was given")

    def close(self) -> None:
        """End all workers; what they do is not waited for."""
        for worker in [*self._starting.values(), *self._idle, *(worker for worker, _ in self._running.values())]:
            self._end(worker)
        if self._box is not None:
            with suppress(Exception):  # the cluster itself may be gone
                self.cluster.ray.kill(self._box)
        for places in (self._starting, self._idle, self._running, self._waiting):
            places.clear()
        self._box = None

    def _assign(self) -> None:
        """Give jobs to idle workers, and start as many workers as are wanted."""
        for worker in [*self._idle]:
            if job := next((j for j in self._waiting if j.near is not None and j.near == worker.near), None):
                self._give(worker, job)
        while self._idle and self._waiting:
            self._give(self._idle[0], self._waiting[0])
        while len(self._starting) < len(self._waiting) and len(self._starting) + len(self._running) < self.share.workers:
            self._start()

    def _give(self, worker: _Worker, job: Job) -> None:
        self._idle.remove(worker)
        self._waiting.remove(job)
        worker.near = job.near
        number = next(self._numbers)
        self._jobs[number] = job
        self._running[worker.actor.run.remote(number, job.method, job.arguments)] = (worker, job)

    def _start(self) -> None:
        ray, share = self.cluster.ray, self.share
        if self._box is None:
            place = on_node(self.cluster.here, only=False)
            self._box = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=place).remote()
        resources = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_restarts": 0, "max_task_retries": 0}
        actor = ray.remote(**resources)(Host).options(scheduling_strategy="SPREAD").remote(self.make, self.arguments, self._box)
        self._starting[actor.begin.remote()] = _Worker(actor)

    def _begun(self, reference: Any) -> None:
        """Take a worker that has begun among those that are idle; start another in place of one that was lost.

        Raises:
            PlaitError: it cannot begin.
        """
        worker = self._starting.pop(reference)
        try:
            self.cluster.ray.get(reference)
        except self.cluster.ray.exceptions.RayError as error:
            self._end(worker)
            if (cause := error_of_work(error)) is not None:
                raise cause from None
            self._failed_starts += 1
            if self._failed_starts > _LOST * self.share.workers:
                raise PlaitError(f"{self._where}: no worker can be started ({in_short(error)}).") from None
        else:
            self._failed_starts = 0
            self._idle.append(worker)

    def _ended(self, reference: Any) -> Ended | None:
        """Return how a job ended; None where its worker was lost and it is done again."""
        worker, job = self._running.pop(reference)
        try:
            value = self.cluster.ray.get(reference)
        except self.cluster.ray.exceptions.RayError as error:
            cause = error_of_work(error)
            if cause is None:
                return self._lost(worker, job, error)
            self._free(worker)
            return Ended(job, error=cause)
        self._deliver()  # what it reported before it ended
        self._free(worker)
        return Ended(job, value)

    def _lost(self, worker: _Worker, job: Job, error: Exception) -> Ended | None:
        self._end(worker)
        job.lost += 1
        if job.lost > _LOST:
            return Ended(
                job,
                error=PlaitError(
                    f"{self._where}: {job.name}: its worker was lost {job.lost} times, the last time because: "
                    f"{in_short(error)}. A lack of memory on the nodes is a common reason."
                ),
            )
        announce(
            f"{self._where}: a worker was lost, and what it did ({job.name}) is done again elsewhere. Further losses are not "
            "announced.",
            once="a worker of the cluster was lost",
        )
        self._waiting.appendleft(job)
        return None

    def _free(self, worker: _Worker) -> None:
        if self.fresh:
            self._end(worker)
        else:
            self._idle.append(worker)

    def _end(self, worker: _Worker) -> None:
        with suppress(Exception):  # it may be gone, and the cluster with it
            self.cluster.ray.kill(worker.actor)

    def _deliver(self) -> None:
        if self._box is None:
            return
        try:
            found = self.cluster.ray.get(self._box.take.remote())
        except self.cluster.ray.exceptions.RayError:  # its node was lost; later workers get another box
            self._box = None
            return
        for number, call in found:
            if number is None:
                announce(*call)
                continue
            self.on_message(self._jobs[number].about, call)

    def _announce_waiting(self) -> None:
        if self._running or self._idle or not self._starting:
            self._quiet_since = time.monotonic()
        elif time.monotonic() - self._quiet_since > _PATIENCE:
            gpus = f" and {self.share.gpus} GPU" if self.share.gpus else ""
            announce(
                f"{self._where}: no worker has begun for {_PATIENCE:.0f} s; each needs {self.share.cpus} CPUs{gpus} that are "
                "free on one node. It is waited for.",
                once="waiting for the cluster",
            )

    @property
    def _where(self) -> str:
        return f"--cluster {self.cluster.address}"
