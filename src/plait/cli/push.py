"""`plait push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.options import Json, Private


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a result: one with a plait.lock.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="org/name, or name for your own account.", show_default=False)],
    private: Private = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to; created when missing.", show_default=False)] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Title of the commit.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Upload a finished result to the Hub; one that is not what its plait.lock says is refused.

    Example: plait push merged me/merged --private

    Example: plait push model me/model --create-pr
    """
    from plait.cli.console import out, print_json, print_notes
    from plait.commands.push import PushOrder

    pushed = PushOrder(folder, repo, private, revision, create_pr, message).run()
    if json:
        print_json({"url": pushed.url, "left_out": pushed.left_out, "notes": pushed.notes})
        return
    if create_pr and "/discussions/" not in pushed.url:
        out().print(f"no pull request: the default branch of {pushed.url} holds these files already", soft_wrap=True)
    else:
        out().print(f"pushed to {pushed.url}", soft_wrap=True)
    if pushed.left_out:
        out().print(f"not uploaded, since they do not belong to the result: {', '.join(pushed.left_out)}", markup=False)
    print_notes(pushed.notes)
