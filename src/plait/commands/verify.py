"""`plait verify`, `plait.verify`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.results.progress import Progress
from plait.results.threads import worker_count
from plait.verification.parity import check_parity, check_parity_request
from plait.verification.verify import Verification, verify_folder


@dataclass(frozen=True)
class VerifyOrder:
    """A verification that is asked for; see `plait.verify`."""

    folder: Path
    rebuild: bool = True
    inputs: Mapping[str, str | Path] = field(default_factory=dict)
    prompts: Path | None = None
    base_model: str | None = None
    device: str = "cpu"
    workers: int | None = None

    def run(self, progress: Progress | None = None) -> Verification:
        """Compare the folder with its lock, then its logits with those of the live merge.

        Raises:
            PlaitError: there is no lock that can be read, or parity cannot be measured.
        """
        worker_count(self.workers)
        if self.prompts is not None:
            check_parity_request(self.prompts, self.device)
        places = {name: str(path) for name, path in self.inputs.items()}
        found = verify_folder(
            self.folder,
            again=self.rebuild,
            inputs=places,
            workers=self.workers,
            progress=progress,
            rebuilders={"calibrate": _calibrate_again, "tune": _tune_again},
        )
        if self.prompts is None:
            return found
        report = check_parity(
            self.folder, self.prompts, base_model=self.base_model, inputs=places, device=self.device, progress=progress
        )
        return found.model_copy(update={"parity": report})


def _calibrate_again(*request: Any) -> None:
    from plait.calibration.rebuilding import rebuild_calibration  # which needs torch and transformers

    rebuild_calibration(*request)


def _tune_again(*request: Any) -> None:
    from plait.tuning.pipeline import rebuild_tuning

    rebuild_tuning(*request)
