"""Phases on an existing Ray cluster: one whose node is lost continues elsewhere from its last checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.cluster.connection import connected, in_short
from plait.cluster.host import Send
from plait.cluster.workers import Job, Workers
from plait.errors import PlaitError
from plait.results.progress import Progress
from plait.training.job import PACKAGES, TrainingJob
from plait.training.phases import PlannedPhase
from plait.training.runners import PhaseStatus, SentProgress, receive, run_phase


def run_on_cluster(
    phases: Sequence[PlannedPhase], parts: Mapping[str, Progress], *, address: str, workers: int | None
) -> Iterator[PhaseStatus]:
    """Train phases on a cluster, all at once as far as it has capacity; yield them as they end.

    Args:
        phases: what is trained.
        parts: name of a phase → what receives its progress.
        address: of the cluster; see `connected`.
        workers: at most so many phases at a time; a node each (or a GPU each, where there are some) when None.

    Raises:
        MissingPackageError: Ray is not installed.
        PlaitError: no cluster answers, or its nodes cannot take part.
        OutputError: a node does not see the output folder.
    """
    with connected(address) as cluster:
        share = cluster.share(workers)
        cluster.check(phases[0].folder.parent, packages=PACKAGES)

        def on_message(phase: PlannedPhase, call: tuple[Any, ...]) -> None:
            receive(parts[phase.name], call)

        with Workers(
            cluster, PhaseTrainer, (), share, fresh=True, on_message=on_message
        ) as pool:  # a trainer leaves memory behind
            for phase in phases:
                places = (str(phase.folder), str(phase.log))
                given = (phase.name, phase.job.model_dump(mode="json"), *places)
                pool.submit(Job(phase, f"phase {phase.name!r}", "train", given))
            while pool.open:
                ended = pool.next()
                yield _status(ended.job.about.name, ended.value, ended.error)


class PhaseTrainer:
    """Trains one phase, on a node; plain data goes in and out."""

    def train(self, send: Send, name: str, job: dict[str, Any], folder: str, log: str) -> dict[str, Any]:
        """Train a phase or continue it; return its status."""
        found = run_phase(name, TrainingJob.model_validate(job), Path(folder), Path(log), SentProgress(send))
        return found.to_json()


def _status(name: str, value: Any, error: Exception | None) -> PhaseStatus:
    if error is None:
        return PhaseStatus.from_json(name, value)
    return PhaseStatus(name, error=str(error) if isinstance(error, PlaitError) else in_short(error))
