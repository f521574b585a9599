"""Phases on an existing Ray cluster. Nothing of a scheduler is here: Ray places the phases and starts lost ones again.

Every node must see the output folder, the base model and the data under the same paths, and have plait installed.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.errors import OutputError, PlaitError
from plait.extras import optional
from plait.results.progress import Progress
from plait.training.job import TrainingJob
from plait.training.phases import PlannedPhase
from plait.training.runners import PhaseStatus, SentProgress, receive, run_phase

_POLL = 0.5  # seconds between looks at the cluster
_LOST_NODES = 3  # how often a phase is begun again elsewhere; it continues from its last checkpoint


def run_on_ray(
    phases: Sequence[PlannedPhase], parts: Mapping[str, Progress], *, address: str, workers: int | None
) -> Iterator[PhaseStatus]:
    """Train phases on a cluster, all at once as far as it has capacity; yield them as they end.

    Args:
        phases: what is trained.
        parts: name of a phase → what receives its progress.
        address: `ray` for the cluster of this machine or of RAY_ADDRESS, or `ray://HOST:PORT`.
        workers: at most so many phases at a time; a node each (or a GPU each, where there are some) when None.

    Raises:
        MissingPackageError: Ray is not installed.
        PlaitError: no cluster answers.
        OutputError: a node does not see the output folder.
    """
    ray = _connected(address)
    from ray.util.queue import Queue

    at_once, resources = _shares(ray, workers)
    queue = Queue()
    remote = ray.remote(max_retries=_LOST_NODES, **resources)(_train)
    waiting = list(phases)
    running: dict[Any, PlannedPhase] = {}
    seen = phases[0].folder.parent / f".seen-{secrets.token_hex(4)}"  # by a node that shares the output folder
    seen.parent.mkdir(parents=True, exist_ok=True)
    seen.touch()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                phase = waiting.pop(0)
                places = (str(phase.folder), str(phase.log), str(seen))
                running[remote.remote(phase.name, phase.job.model_dump(mode="json"), places, queue)] = phase
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_POLL)
            for name, call in (queue.get() for _ in range(queue.qsize())):
                receive(parts[name], call)
            for reference in ready:
                yield _status(ray, reference, running.pop(reference))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        queue.shutdown()
        seen.unlink(missing_ok=True)


def _connected(address: str) -> Any:
    ray = optional("ray", "ray", f"--cluster {address}")
    if not ray.is_initialized():
        try:
            ray.init(address="auto" if address == "ray" else address, log_to_driver=False)
        except Exception as error:  # Ray raises many classes
            words = " ".join(str(error).split())
            raise PlaitError(
                f"--cluster {address}: no Ray cluster answers ({words[:300]}). Start one with `ray start --head`, or name one: "
                "--cluster ray://HOST:10001."
            ) from None
    return ray


def _shares(ray: Any, workers: int | None) -> tuple[int, dict[str, float]]:
    """Return how many phases run at a time, and what each of them gets: a node's cores, or a GPU."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not nodes:
        raise PlaitError(
            "--cluster: no node of the Ray cluster offers a CPU, and every phase needs one. Add a node that does "
            "(`ray start --address=… --num-cpus=N`), or train here, without --cluster."
        )
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    at_once = workers or gpus or len(nodes)
    cores = min(node["CPU"] for node in nodes)
    share = max(1, int(cores // math.ceil(at_once / len(nodes))))
    return at_once, {"num_cpus": share, **({"num_gpus": 1} if gpus else {})}


def _train(name: str, job: dict[str, Any], places: tuple[str, str, str], queue: Any) -> dict[str, Any]:
    """Train on a node; what comes back is plain data, so that no node needs the driver's classes."""
    folder, log, beacon = map(Path, places)
    if not beacon.is_file():
        return {"unseen": True}
    send = SentProgress(lambda call: queue.put((name, call)))
    return run_phase(name, TrainingJob.model_validate(job), folder, log, send).to_json()


def _status(ray: Any, reference: Any, phase: PlannedPhase) -> PhaseStatus:
    try:
        found = ray.get(reference)
    except ray.exceptions.RayError as error:  # the node is lost too often, or out of memory
        return PhaseStatus(phase.name, error=" ".join(str(error).split())[:500])
    if "unseen" in found:
        raise OutputError(
            f"{phase.folder.parent}: a node of the cluster does not see this folder. Base model, data and output must be on "
            "storage that all nodes share, under the same paths."
        )
    return PhaseStatus.from_json(phase.name, found)
