"""One corruption, or one failure of the system: a fresh world, one command, and whether what came of it is right."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from unittest import mock

import numpy as np
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from plait.cli.main import main
from tests.fuzz.corruptions import corrupt
from tests.fuzz.faults import failing
from tests.fuzz.formats import deltas_of
from tests.fuzz.world import COMMANDS, Command

_FAULTS = 0.15  # share of attempts in which files are whole, and the system fails
_NAMELESS = "a refusal that names no file"
_AT = re.compile(
    r"model\.layers\.|(weights|method|output|transforms)\.|the weights or the scale|there is no folder|GB are needed"
)
_UNWRITTEN = re.compile(r"\bs?ws/\S+ cannot be written")
LIMIT = 60  # seconds of one command: a busy machine is slow
_MOST_MEMORY = 1 << 30  # bytes that one command may add to the largest size of the process
_LEFTOVERS = re.compile(r"(^|/)\.(?!out\.baking|scores|index\.json\.lock)[^/]*(staging|baking|tmp|old)")


#: Refusals that are right without a file's name: what comes after the files were read.
_SAID = {
    "push": ("HF_HUB_OFFLINE", "No token is set"),
    "verify": ("not verified",),
    "sft": (
        "cannot be a repository",
        "HF_HUB_OFFLINE",
        "OfflineModeIsEnabled",
        "--",
        "./base",
        "./rows.",
        "there is no such file or folder",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What became of one corruption.

    Attributes:
        seed: from which everything was drawn.
        what: command, file and change, for people.
        code: of the exit.
        finding: what is wrong with the outcome; None when it is right.
        shown: the last that was printed.
    """

    seed: int
    what: str
    code: int | str | None
    finding: str | None
    shown: str


class _TooLong(BaseException):
    """Passes whatever catches exceptions."""


def attempt(seed: int, world: Path, scratch: Path) -> Outcome:
    """Damage one file, or have the system fail at one, and run one command.

    Args:
        seed: from which command, file and damage are drawn.
        world: the whole one (`tests.fuzz.world.build`).
        scratch: a folder for the damaged one; emptied before.
    """
    chosen = random.Random(seed)
    command = chosen.choices(COMMANDS, [c.share for c in COMMANDS])[0]
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name in command.needs:
        source = world / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, scratch / name)
    target = chosen.choice(sorted(scratch.glob(chosen.choice(command.files))))
    before = _names(scratch)
    fault = chosen.random() < _FAULTS
    out = scratch / command.words[command.words.index("-o") + 1] if "-o" in command.words else None
    with contextlib.ExitStack() as stack:
        if fault:
            change, place = stack.enter_context(failing(chosen, target, out))
        else:
            change, place = corrupt(chosen, target), target
        what = f"plait {' '.join(command.words)}   [{target.relative_to(scratch)}: {change}]"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code, shown = run(command.words, scratch)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    finding = judge(command, scratch, place, code, shown, before)
    if finding == _NAMELESS and (change.startswith("values") or target.suffix in (".yaml", ".json")) and _AT.search(shown):
        finding = None  # numbers that can be read, and lead to a result that cannot be written
    if finding == _NAMELESS and place != target and _UNWRITTEN.search(shown):
        finding = None  # nor can what the command writes elsewhere, such as a workspace
    if finding is None and code in (0, None) and command.exact:
        finding = _compare(command, world if fault else scratch, world, scratch / "out")
    if finding is None and grown > _MOST_MEMORY:
        finding = f"it took {grown >> 20} MB of memory"
    return Outcome(seed, what, code, finding, shown[-1500:])


def run(words: tuple[str, ...], folder: Path) -> tuple[int | str | None, str]:
    """Run a command in a folder within this process; return exit code (or what happened in its place) and what was printed."""
    printed = io.StringIO()
    with _inside(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), _alone(), _limited(LIMIT):
        try:
            main(words)
            code: int | str | None = 0
        except SystemExit as leave:
            code = leave.code
        except _TooLong:
            code = "hung"
            traceback.print_exc()
        except BaseException as error:
            code = type(error).__name__
            traceback.print_exc()
    return code, printed.getvalue()


def judge(command: Command, folder: Path, target: Path, code: int | str | None, shown: str, before: set[str]) -> str | None:
    """Return what is wrong with an outcome; None when nothing is."""
    if code not in (0, None, 2):
        return f"exit {code!r}"
    if "Traceback" in shown or "bug in plait" in shown:
        return "a traceback"
    new = _names(folder) - before
    if left := sorted(name for name in new if _LEFTOVERS.search(name)):
        return f"left behind: {left[:3]}"
    if code == 2:
        if partial := sorted(name for name in new if name.startswith(("out/", "page.html"))):
            return f"refused, and written all the same: {partial[:3]}"
        if any(words in shown for words in _SAID.get(command.words[0], ())):
            return None
        named = target.suffix == ".yaml" or target.name in command.words  # tasks and adapters are spoken of by their names
        stem = [target.stem] if named else []
        above = [target.parent.name] if target.parent != folder else []
        here = {target.name, str(target.relative_to(folder)), *above, *stem}
        return None if any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", shown) for name in here) else _NAMELESS
    return None


def _compare(command: Command, folder: Path, world: Path, out: Path) -> str | None:
    """Compare a merge with the sum of what an independent reader finds in its sources."""
    names = command.words[1 : 2 if command.words[0] == "convert" else 3]
    weights = [float(w) for w in command.words[4:6]] if "--weights" in command.words else [1.0] * len(names)
    try:
        parts = [(w, _source(folder / name, world / name)) for w, name in zip(weights, names, strict=True)]
    except Exception as error:
        return f"accepted, and no independent reader can read it ({type(error).__name__}: {error})"
    found = _by_flat_name(out)
    if set(found) != set().union(*(deltas for _, deltas in parts)):
        return "accepted, with other modules than an independent reader finds"
    for module, delta in found.items():
        terms = [w * deltas[module] for w, deltas in parts if module in deltas]
        size = sum(float(np.abs(t).max()) for t in terms)
        if not np.abs(delta - sum(terms)).max() <= 1e-4 * size + 1e-30:
            return f"accepted, and {module} is not what an independent reader finds"
    return None


def _source(folder: Path, whole: Path) -> dict[str, np.ndarray]:
    """Read a source. Of an archive torch refuses more than it needs; where it does, what was saved is the measure."""
    try:
        return _by_flat_name(folder)
    except RuntimeError:
        if not (folder / "adapter_model.bin").exists():
            raise
        return _by_flat_name(whole)


def _by_flat_name(place: Path) -> dict[str, np.ndarray]:
    """Read an adapter of any format; kohya's names have underscores for dots, and so have all here."""
    if place.is_dir() and [*place.glob("adapter_model*")]:
        return {path.replace(".", "_"): delta for path, delta in _deltas(place).items()}
    return deltas_of(place)


def _deltas(folder: Path) -> dict[str, np.ndarray]:
    """Read an adapter with the libraries alone: module → s · B A in float64."""
    config = json.loads((folder / "adapter_config.json").read_bytes())
    files = sorted(folder.glob("adapter_model*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if not files:
        tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    found = {}
    for name, a in tensors.items():
        if not (match := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", name)):
            continue
        module, b = match[1], tensors[name.replace(".lora_A.", ".lora_B.")]
        patterns = (config.get("alpha_pattern") or {}).items()
        alpha = next((v for p, v in patterns if re.match(rf"(.*\.)?({p})$", module)), config.get("lora_alpha", 8))
        scaling = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        found[module] = scaling * b.detach().double().numpy() @ a.detach().double().numpy()
    return found


def _names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Reach no other machine; the libraries have read their environment long ago."""
    with (
        mock.patch.object(constants, "HF_HUB_OFFLINE", new=True),
        mock.patch.object(constants, "ENDPOINT", new="http://127.0.0.1:9"),
    ):
        yield


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
