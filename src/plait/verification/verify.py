"""A folder against its lock: its files, its inputs, and the result made again and compared."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

from plait.errors import PlaitError
from plait.records import Record
from plait.results.checks import FileCheck, check_files
from plait.results.lock import LEARNED_RECIPE, Lock, read_lock
from plait.results.progress import Progress, SilentProgress
from plait.results.staging import scratch
from plait.results.versions import library_versions
from plait.verification.inputs import InputCheck, check_inputs
from plait.verification.parity import ParityReport
from plait.verification.rebuild import Rebuilder, RebuiltFile, compare_rebuilt, rebuild
from plait.version import __version__


class Verification(Record):
    """What was found.

    Attributes:
        folder: that was looked at.
        kind: which command made it.
        files: every file of the folder against the lock.
        inputs: every input against the lock.
        rebuilt: every file made again, against the lock; None when nothing was made again.
        not_rebuilt: why; None when it was, or was not to be.
        parity: how it acts against the live merge, where that was asked for.
        versions: what has another version here: name → (in the lock, here).
    """

    folder: str
    kind: str
    files: tuple[FileCheck, ...]
    inputs: tuple[InputCheck, ...]
    rebuilt: tuple[RebuiltFile, ...] | None
    not_rebuilt: str | None
    versions: dict[str, tuple[str, str]]
    parity: ParityReport | None = None

    @property
    def ok(self) -> bool:
        """Whether everything that can be checked is equal; an input that cannot be found matters to a rebuild alone."""
        return (
            all(f.state == "equal" for f in self.files)
            and all(i.state != "changed" for i in self.inputs)
            and all(r.state == "equal" for r in self.rebuilt or ())
            and self.not_rebuilt is None
        )


def verify_folder(
    folder: Path,
    *,
    again: bool = True,
    inputs: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    rebuilders: Mapping[str, Rebuilder] | None = None,
) -> Verification:
    """Check a result against its lock.

    Args:
        folder: of a merge, a bake, a compression or an extraction.
        again: make it again in a temporary folder (of TMPDIR) and compare.
        inputs: name → reference, for inputs that are elsewhere than the lock records.
        workers: as when it was made; never changes a byte.
        progress: receives stages and steps.
        rebuilders: kind of result → what makes it again, of kinds that this package cannot.

    Raises:
        AdapterError: there is no lock that can be read.
        RecipeError: `inputs` names something that is not an input.
    """
    lock = read_lock(folder)
    files = check_files(folder, lock)
    checks, found = check_inputs(folder, lock, inputs or {})
    unchanged = {f.name for f in files if f.state == "equal"}
    rebuilt: tuple[RebuiltFile, ...] | None = None
    reason = None
    if again:
        reason = _obstacle(checks)
    if again and reason is None:
        with scratch("verify") as place:
            out = place / "again"
            try:
                again_by = (rebuilders or {}).get(lock.kind)
                if again_by is None or LEARNED_RECIPE in lock.outputs:
                    rebuild(lock, found, out, workers, progress or SilentProgress(), unchanged)
                else:
                    again_by(lock, folder, found, out, workers, progress or SilentProgress())
                rebuilt = compare_rebuilt(folder, out, lock, unchanged)
            except PlaitError as error:
                reason = f"it cannot be made again: {error}"
    return Verification(
        folder=str(folder),
        kind=lock.kind,
        files=files,
        inputs=checks,
        rebuilt=rebuilt,
        not_rebuilt=reason,
        versions=_versions(lock),
    )


def _obstacle(checks: tuple[InputCheck, ...]) -> str | None:
    missing = [c.name for c in checks if not c.found]
    if missing:
        given = " ".join(f"--input {name}=PATH" for name in missing)
        return f"{', '.join(missing)} cannot be found. Say where: {given}"
    changed = [c.name for c in checks if c.state == "changed"]
    if changed:
        return f"{', '.join(changed)} changed since: what would be made is another result"
    return None


def _versions(lock: Lock) -> dict[str, tuple[str, str]]:
    """Return what differs here of everything that may change how numbers are rounded."""
    then = {"plait": lock.plait, **lock.libraries, "machine": lock.machine}
    now = {"plait": __version__, **library_versions(), "machine": platform.machine()}
    return {name: (then[name], now[name]) for name in then if name in now and then[name] != now[name]}
