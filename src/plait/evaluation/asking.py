"""Candidates asked on the nodes of a cluster: each worker loads the base once, and answers what it is given.

What is asked, and what is kept of the answers, is the driver's; so nothing is lost with a worker but what it was answering.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.adapters.adapter import Adapter
from plait.cluster.connection import Cluster
from plait.cluster.host import Send
from plait.cluster.workers import Job, Workers
from plait.errors import OutputError
from plait.evaluation.candidates import Candidate, described_candidate
from plait.evaluation.loaded_base import LoadedBase, placement, with_stored_dtype, with_used_dtype
from plait.evaluation.model_calls import StepListener
from plait.evaluation.scores import adapter_digest, model_digest
from plait.evaluation.scoring import answer_examples
from plait.evaluation.session import Ask
from plait.hub.pretrained import LoadOptions
from plait.results.progress import SilentProgress
from plait.tasks.answers import Answer
from plait.tasks.examples import Examples


@dataclass(frozen=True)
class Inputs:
    """What every worker loads.

    Attributes:
        base: folder.
        digest: hash of its files.
        changed: name → (size, time of change) of its files, as the driver sees them.
        adapters: name → (folder or file, hash of its files).
        load: how the base is loaded.
        device: where it is then, as text.
        workers: modules merged at a time.
    """

    base: str
    digest: str
    changed: dict[str, tuple[int, int]]
    adapters: dict[str, tuple[str, str]]
    load: LoadOptions
    device: str
    workers: int


class ClusterAsking:
    """Asks candidates on a cluster.

    Args:
        cluster: connected.
        base: folder of the base model.
        digest: hash of its files.
        adapters: that can be made active.
        load: how the base is loaded.
        workers: modules merged at a time; the cores that a worker gets when None.

    Attributes:
        placement: where a worker has the base, as answers' keys name it.
        at_once: workers at a time, at most.
        load: how a worker loads the base.
        share: what each worker gets.
    """

    def __init__(
        self,
        cluster: Cluster,
        base: Path,
        digest: str,
        adapters: Sequence[Adapter],
        load: LoadOptions,
        *,
        workers: int | None,
    ) -> None:
        self._cluster = cluster
        self.share = cluster.share(gpus=load.device_map != "cpu")
        self.placement = str({"": "cuda"} if self.share.gpus else None)
        if load.device_map not in ("auto", "cpu"):
            self.placement = str(placement(load.device_map))
        self.at_once = self.share.workers
        # which dtype is slow is measured on this processor, and says nothing of an accelerator
        self.load = with_used_dtype(load, base) if self.placement == "None" else with_stored_dtype(load)
        self._inputs = Inputs(
            base=str(base.absolute()),
            digest=digest,
            changed=_changes(base),
            adapters={a.name: (str(a.place.absolute()), adapter_digest(a)) for a in adapters},
            load=self.load,
            device=self.placement,
            workers=workers or self.share.cpus,
        )
        self._pool: Workers | None = None
        self._report: StepListener = lambda done: None

    @property
    def read(self) -> list[Path]:
        """What workers read."""
        return [Path(self._inputs.base), *(Path(place) for place, _ in self._inputs.adapters.values())]

    def submit(self, ask: Ask) -> None:
        """Have something asked.

        Raises:
            AssertionError: it is something that exists in this process only.
        """
        if ask.candidate.described is None:
            raise AssertionError(f"{ask.candidate.name} cannot be asked elsewhere")
        if self._pool is None:
            share = self._cluster.share(min(self.at_once, self.share.workers), gpus=self.share.gpus > 0)
            self._pool = Workers(
                self._cluster, Answerer, (self._inputs,), share, on_message=lambda _, call: self._report(*call)
            )
            self._cluster.ended_with(self._pool)
        name = f"{ask.candidate.name} · {ask.examples.task.name}"
        given = (ask.candidate.key, ask.candidate.described(), ask.owner, ask.examples, ask.batch_size)
        self._pool.submit(Job(ask, name, "answer", given, near=ask.candidate.key))

    def next(self, report: StepListener) -> tuple[Ask, Sequence[Answer]]:
        """Wait until something is answered; `report` is called with the number of examples meanwhile.

        Raises:
            PlaitError: something cannot be asked.
        """
        if self._pool is None:
            raise AssertionError("nothing was submitted")
        self._report = report
        ended = self._pool.next()
        if ended.error is not None:
            raise ended.error
        return ended.job.about, [Answer.model_validate(answer) for answer in ended.value]


class Answerer:
    """The base with its adapters on a node, loaded once.

    Args:
        given: what to load.

    Raises:
        OutputError: this node sees other files under the same paths.
    """

    def __init__(self, given: Inputs) -> None:
        self._given = given
        base = Path(given.base)
        self._adapters = {name: Adapter.open(place, name) for name, (place, _) in given.adapters.items()}
        others = [name for name, adapter in self._adapters.items() if adapter_digest(adapter) != given.adapters[name][1]]
        if _changes(base) != given.changed and model_digest(base) != given.digest:
            others.append(given.base)
        device = str(placement(given.load.device_map))
        if others:
            raise OutputError(
                f"{', '.join(others)}: a node of the cluster sees other files there. They must be on storage that all nodes "
                "share, or be the same everywhere."
            )
        if device != given.device:
            raise OutputError(
                f"--device-map {given.load.device_map} is {device} on a node of the cluster, and {given.device} was expected: "
                "its accelerator is not seen by torch, or nodes are of different kinds. Give --device-map."
            )
        self._live = LoadedBase(base, [*self._adapters.values()], given.load, SilentProgress())
        self._last: tuple[str, Candidate] | None = None

    def answer(
        self, send: Send, key: str, described: dict[str, Any], owner: str | None, examples: Examples, batch_size: int
    ) -> list[dict[str, Any]]:
        """Return what a candidate answers; the last one is kept, as it is asked several times."""
        if self._last is None or self._last[0] != key:
            self._last = None  # the merge before it is not needed any more, and may be large
            made = described_candidate(described, self._adapters, workers=self._given.workers, progress=SilentProgress())
            self._last = key, made
        readers = self._live.readers(examples.task)
        with self._last[1].act(self._live, owner) as model:
            found = answer_examples(
                model,
                readers.tokenizer,
                examples,
                processor=readers.processor,
                batch_size=batch_size,
                report=lambda done: send((done,)),
                contender=self._last[1].name,
            )
        return [answer.model_dump(mode="json") for answer in found]


def _changes(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of a folder's files, by which the same files differ from a copy of them."""
    return {p.name: (s.st_size, s.st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file() and (s := p.stat())}
