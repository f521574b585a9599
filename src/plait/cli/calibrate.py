"""`plait calibrate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.cli.options import DryRun, Force, Json, Keys, Loading, MaybeOut, RecipeOrSeveral, with_options

if TYPE_CHECKING:
    from plait.calibration.pipeline import CalibrateResult
    from plait.calibration.record import CalibratedTexts, CalibrationPlan


@with_options("calibrate")
def calibrate(
    inputs: RecipeOrSeveral,
    out: MaybeOut = None,
    dry_run: DryRun = False,
    json: Json = False,
    force: Force = False,
    *,
    loading: Loading,
    keys: Keys,
) -> None:
    """Take the second moments that regmean and ssr need: each adapter reads its own task's texts. No label is read.

    Example: plait calibrate ./intent ./langid --tasks tasks/intent.yaml tasks/langid.yaml -o moments

    Example: plait calibrate ./intent ./langid --tasks tasks/intent.yaml tasks/langid.yaml --texts lines --dry-run -o moments
    """
    from plait.cli.console import ProgressBars, print_json, warnings_as_notes
    from plait.commands.calibrate import CalibrateOrder
    from plait.hub.pretrained import LoadOptions

    request = keys.request(inputs, mixed=False)
    order = CalibrateOrder(request=request, out=out, options=LoadOptions(*loading), force=force)
    with warnings_as_notes():
        if dry_run:
            plan = order.plan()
            print_json(plan.model_dump(mode="json")) if json else _show_plan(plan)
            return
        result = order.run(ProgressBars())
    if json:
        print_json({"folder": str(result.folder), **result.record.model_dump(mode="json")})
    else:
        _show(result)


def _show_plan(plan: CalibrationPlan) -> None:
    from plait.cli.console import out, size

    _show_texts(plan.texts)
    modules = next(iter(plan.adapters.values()))
    out().print(f"{modules} modules of {len(plan.adapters)} adapters · at most {size(plan.bytes)} to write")
    if plan.left_out:
        out().print(f"left out, since their inputs cannot be collected: {', '.join(plan.left_out)}", markup=False)


def _show(result: CalibrateResult) -> None:

    from plait.cli.console import new_table, out, print_notes, size

    record = result.record
    _show_texts(record.texts)
    table = new_table(("moments", "tokens", "modules", "matrices", "as rows", "size", ""), left=("moments", ""))
    for a in record.adapters:
        counts = (a.tokens, a.modules, a.stored - a.rows, a.rows)
        table.add_row(a.file, *map(str, counts), size(a.bytes), "of an earlier run" if a.reused else "")
    out().print(table)
    out().print(f"{result.folder} · {size(record.bytes)} · {record.seconds:.1f} s", soft_wrap=True)
    print_notes(record.notes)


def _show_texts(texts: tuple[CalibratedTexts, ...]) -> None:
    from plait.cli.console import out

    for t in texts:
        out().print(f"{t.task}: {t.count} texts, {t.source}, read by {t.adapter}, such as", markup=False)
        for text in t.shown:
            out().print(f"  {text.strip()[-110:]!r}", style="dim", markup=False)
