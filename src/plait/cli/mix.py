"""`plait mix`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.options import Keys, Loading, Moments, Workers, with_options


@with_options("mix")
def mix(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|ADAPTER...|RUN",
            help="A recipe or adapters; or the folder of a merge, a search or an evaluation.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PATH", help="Folder that Keep writes into.")] = Path("mixes"),
    port: Annotated[
        int | None, typer.Option(metavar="N", help="Of the page; the first free one from 7860.", show_default=False)
    ] = None,
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            help="Serve the page at a public address too, through gradio's server; gradio fetches a program for the tunnel, "
            "and writes .gradio/certificate.pem.",
        ),
    ] = False,
    moments: Moments = None,
    workers: Workers = None,
    *,
    loading: Loading,
    keys: Keys,
) -> None:
    """Mix adapters live in the browser: move weights, scale and method, and read what everyone answers.

    The page is served to this machine alone, at an address with a token. Nothing is written but by its Keep.

    Example: plait mix ./intent ./langid --tasks tasks/intent.yaml tasks/langid.yaml --base-id ./base

    Example: plait mix artifacts/merged/ties/intent_langid/runs/run_20260102_030405 --out kept
    """
    from plait.cli.console import ProgressBars, warnings_as_notes
    from plait.cli.console import out as console
    from plait.commands.mix import MixOrder
    from plait.hub.pretrained import LoadOptions

    order = MixOrder(
        request=keys.request(inputs, moments),
        eval=keys.of("eval"),
        out=out,
        port=port,
        share=share,
        load=LoadOptions(*loading),
        workers=workers,
    )
    with warnings_as_notes():
        order.check()
    with order.run(ProgressBars()) as server:
        console().print(f"[bold]{server.url}[/bold]", soft_wrap=True)
        if server.share_url is not None:
            console().print(f"public, for a week: [bold]{server.share_url}[/bold]", soft_wrap=True)
        console().print("[dim]Ctrl-C ends it.[/dim]")
        server.wait()
