"""A Ray cluster: found by its address, and looked at, node by node, before anything is computed there."""

from __future__ import annotations

import math
import re
import secrets
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.cluster import probe
from plait.errors import OutputError, PlaitError, RecipeError, collect
from plait.extras import optional
from plait.libraries.ray import error_of_work, is_unstarted_server, on_node, quiet_connection, sent_by_value
from plait.results.versions import library_versions
from plait.version import __version__

_ADDRESS = re.compile(r"ray|ray://[^/\s]+:\d+")
_ANSWER = 60.0  # seconds in which a node must answer
_STARTS = 3  # how often a connection is tried that fails because the cluster could not start what serves it
_PAUSE = 0.5  # seconds before a node is asked again that the scheduler does not know
_SHARED = "Base model, adapters, data and output must be on storage that all nodes share, under the same paths."


def check_address(address: str | None) -> None:
    """Refuse what is not the address of a cluster.

    Args:
        address: None for this machine.

    Raises:
        RecipeError: it is none.
    """
    if address is not None and not _ADDRESS.fullmatch(address):
        raise RecipeError(f"--cluster {address!r}: it must be 'ray' or 'ray://HOST:PORT'.")


@dataclass(frozen=True)
class Share:
    """What each of several workers gets.

    Attributes:
        workers: how many there are at a time.
        cpus: of each.
        gpus: of each, 0 or 1.
    """

    workers: int
    cpus: int
    gpus: int = 0


class Cluster:
    """A cluster that this process is connected to; see `connected`.

    Args:
        ray: the module, connected.
        address: as it was given.
    """

    def __init__(self, ray: Any, address: str) -> None:
        self.ray, self.address = ray, address
        self._ending = ExitStack()

    def ended_with(self, work: AbstractContextManager[Any]) -> None:
        """Leave a context when the connection ends."""
        self._ending.enter_context(work)

    def close(self) -> None:
        """Leave what `ended_with` was given."""
        self._ending.close()

    @property
    def here(self) -> str:
        """Id of the node on which this process is; of the cluster's head for one that is outside."""
        return str(self.ray.get_runtime_context().get_node_id())

    def share(self, workers: int | None = None, *, gpus: bool = True) -> Share:
        """Return what each of some workers gets: a node's cores, or a GPU where there are some.

        Args:
            workers: at most so many at a time; one per GPU, or per node, when None.
            gpus: whether GPUs are of use.

        Raises:
            PlaitError: no node offers a CPU.
        """
        nodes = [node["Resources"] for node in self._nodes()]
        if not nodes:
            raise PlaitError(
                "--cluster: no node of the Ray cluster offers a CPU, and every worker needs one. Add a node that does "
                "(`ray start --address=… --num-cpus=N`), or work here, without --cluster."
            )
        found = int(sum(node.get("GPU", 0) for node in nodes)) if gpus else 0
        at_once = workers or found or len(nodes)
        cores = min(node["CPU"] for node in nodes)
        return Share(at_once, max(1, int(cores // math.ceil(at_once / len(nodes)))), int(found > 0))

    def check(self, folder: Path | None = None, inputs: Iterable[Path] = (), packages: Sequence[str] = ()) -> None:
        """Look at every node before any work: it must have this plait and these libraries, and see the same files.

        Args:
            folder: to which they write, where they do; a file that is made there now must be seen by all.
            inputs: files and folders that are read.
            packages: further ones that the work needs.

        Raises:
            PlaitError: a node has other versions, or does not answer.
            OutputError: a node does not see a file.
        """
        wanted = {**library_versions("transformers", *packages), "plait": __version__}
        with _mark(folder) as mark:
            seen = [*([] if mark is None else [str(mark)]), *(str(path) for path in inputs)]
            found = self._looked(seen, [name for name in wanted if name != "plait"])
        silent = [f"node {name} does not answer: {why}" for name, why in found.items() if isinstance(why, str)]
        answers = {name: answer for name, answer in found.items() if not isinstance(answer, str)}
        others = {
            name: [
                f"{package} {answer['versions'].get(package) or 'is missing'} ({here} here)"
                for package, here in wanted.items()
                if answer["versions"].get(package) != here
            ]
            for name, answer in answers.items()
        }
        where = f"--cluster {self.address}"
        problems = [f"node {name} has {', '.join(words)}" for name, words in others.items() if words]
        if problems or silent:
            advice = " Install the same versions on all nodes." if problems else ""
            collect(PlaitError, [f"{where}: {text}.{advice}" for text in [*silent, *problems]], "these nodes cannot take part")
        unseen = [
            f"{folder if path == str(mark) else path}: node {name} of the cluster does not see this. {_SHARED}"
            for name, answer in answers.items()
            for path in answer["unseen"]
        ]
        collect(OutputError, unseen, "the nodes of the cluster do not see what they need")

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]

    def _looked(self, files: Sequence[str], packages: Sequence[str]) -> dict[str, dict[str, Any] | str]:
        """Return what every node has; of one that does not answer, why."""
        ray = self.ray
        with sent_by_value(probe):
            remote = ray.remote(num_cpus=0, max_retries=0)(probe.look)

            def ask(node: str) -> Any:
                return remote.options(scheduling_strategy=on_node(node, only=True)).remote(files, packages)

            names = {node["NodeID"]: f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})" for node in self._nodes()}
            asked = {node: ask(node) for node in names}
            found: dict[str, dict[str, Any] | str] = {}
            end = time.monotonic() + _ANSWER
            while asked:
                node, reference = asked.popitem()
                try:
                    found[names[node]] = ray.get(reference, timeout=max(0.0, end - time.monotonic()))
                except ray.exceptions.GetTimeoutError:
                    found[names[node]] = f"nothing came within {_ANSWER:.0f} s"
                except ray.exceptions.TaskUnschedulableError as error:  # it has just come, or is just leaving
                    if node not in [known["NodeID"] for known in self._nodes()]:
                        continue
                    if time.monotonic() > end:
                        found[names[node]] = in_short(error)
                        continue
                    time.sleep(_PAUSE)
                    asked[node] = ask(node)
                except ray.exceptions.RayError as error:
                    found[names[node]] = in_short(error_of_work(error) or error)
        return found


@contextmanager
def _mark(folder: Path | None) -> Iterator[Path | None]:
    """Make a file in a folder while the block runs.

    Raises:
        OutputError: it cannot be written.
    """
    if folder is None:
        yield None
        return
    mark = folder / f".seen-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}.") from None
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """Be connected to a cluster that is there while the block runs; a connection that this process has is used and kept.

    Args:
        address: `ray` for the cluster of this machine or of RAY_ADDRESS, or `ray://HOST:PORT`.

    Warns:
        UserWarning: the cluster could not start the server of `ray://`; it is asked again.

    Raises:
        MissingPackageError: Ray is not installed.
        PlaitError: no cluster answers.
    """
    check_address(address)
    ray = optional("ray", "ray", f"--cluster {address}")
    if address != "ray":
        optional("grpc", "ray", f"--cluster {address}")
    with ExitStack() as stack:
        if not ray.is_initialized():
            _connect(ray, address, stack)
        cluster = Cluster(ray, address)
        stack.callback(cluster.close)
        yield cluster


def _connect(ray: Any, address: str, stack: ExitStack) -> None:
    """Connect, until a stack is closed."""
    for start in range(1, _STARTS + 1):
        try:
            stack.enter_context(quiet_connection(ray, "auto" if address == "ray" else address))
            return
        except Exception as error:  # Ray raises many classes
            why = in_short(error)
            if start < _STARTS and is_unstarted_server(error):
                warnings.warn(
                    f"--cluster {address}: the cluster could not start what serves this process ({why}); asked again.",
                    UserWarning,
                    stacklevel=2,
                )
                continue
            raise PlaitError(
                f"--cluster {address}: no Ray cluster answers ({why}). Start one with `ray start --head`, or name one: "
                "--cluster ray://HOST:10001."
            ) from None


def in_short(error: Exception) -> str:
    """Return what an error says as a few words; of a traceback in it, the last line."""
    message, traceback, frames = str(error).partition("Traceback (most recent call last):")
    if traceback:
        message += frames.strip().rpartition("\n")[2]
    return " ".join(message.split())[:300].rstrip(".")
