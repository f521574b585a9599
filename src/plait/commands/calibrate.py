"""`plait calibrate`, `plait.calibrate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from plait.calibration.pipeline import CalibrateResult, run_calibrate
from plait.calibration.record import CalibrationPlan
from plait.calibration.request import read_calibration
from plait.commands.request import WritingOrder
from plait.errors import RecipeError
from plait.hub.pretrained import LoadOptions
from plait.merging.pipeline import input_folders
from plait.results.disk import check_not_an_input
from plait.results.progress import Progress
from plait.results.staging import checking_output


@dataclass(frozen=True, kw_only=True)
class CalibrateOrder(WritingOrder):
    """A calibration that is asked for; see `plait.calibrate`."""

    options: LoadOptions = field(default_factory=LoadOptions)

    def plan(self) -> CalibrationPlan:
        """Return texts and sizes; loads no model.

        Raises:
            PlaitError: as `plait.calibrate`, before a model is loaded.
        """
        with checking_output(self.out, force=self.force):
            request = read_calibration(*self.request.resolved, self.options)
        check_not_an_input(self.out, input_folders(request.inventory), command="calibration")
        return request.plan()

    def run(self, progress: Progress | None = None) -> CalibrateResult:
        """Take the moments.

        Raises:
            PlaitError: anything wrong with what was given; nothing is left at the output then.
        """
        if self.out is None:
            raise RecipeError("--out FOLDER (-o, out=) is missing: where should the moments be written?")
        recipe, folder = self.request.resolved
        return run_calibrate(recipe, folder=folder, out=self.out, force=self.force, options=self.options, progress=progress)
