"""`plait ask`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.options import Json, Keys, Loading, MergeOrResult, Moments, Workers, with_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from plait.evaluation.replies import AskedPrompt

_NARROWEST = 24  # characters of a column


@with_options("ask")
def ask(
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT|FILE",
            help="Text; or a file: a prompt per line (.txt), or rows with `prompt` or `messages` (.jsonl, .csv, .parquet).",
            show_default=False,
        ),
    ],
    inputs: MergeOrResult,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest reply.")] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="NUMBER", help="Of the tokens' draws; 0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="SHARE", help="Draw among the likeliest tokens that have this probability together.")
    ] = 1.0,
    sampling_seed: Annotated[int, typer.Option(metavar="N", help="Of the draws.")] = 0,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="First message of every chat.", show_default=False)] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Read prompts as they are, without the chat template.")] = False,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A single adapter, for one adapter or model.", show_default=False),
    ] = None,
    moments: Moments = None,
    workers: Workers = None,
    json: Json = False,
    *,
    loading: Loading,
    keys: Keys,
) -> None:
    """Ask base, single adapters and their merge the same prompts, side by side. Nothing is written.

    Example: plait ask "Which language is this? Guten Tag" ./intent ./langid --method ties

    Example: plait ask prompts.txt merged --max-new-tokens 64 --json
    """
    from plait.cli.arguments import named_paths
    from plait.cli.console import ProgressBars, print_json, print_notes, warnings_as_notes
    from plait.commands.ask import AskOrder
    from plait.commands.request import Request
    from plait.evaluation.generation import Sampling
    from plait.hub.pretrained import LoadOptions

    base = keys.settings.get("base_model")
    settings = {key: value for key, value in keys.settings.items() if key != "base_model"}
    order = AskOrder(
        prompt,
        Request(inputs if len(inputs) > 1 else inputs[0], settings, keys.sets, moments, tasks=keys.tasks),
        Sampling(max_new_tokens, temperature, top_p, sampling_seed),
        system=system,
        plain=plain,
        sources=named_paths("--source", source or []),
        load=LoadOptions(*loading, base),
        workers=workers,
    )
    with warnings_as_notes():
        order.check()
        with _Screen() as screen:
            found = order.run(ProgressBars(), None if json else screen)
    if json:
        print_json(found.model_dump(mode="json"))
        return
    print_notes(found.notes)


class _Screen:
    """Replies side by side: as they are written on a terminal, one below the other where it is narrow and in a pipe."""

    def __init__(self) -> None:
        from plait.cli.console import out

        self._console = out()
        self._texts: dict[str, str] = {}
        self._live: Any = None

    def __enter__(self) -> _Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        """Take away what is not finished, and give the terminal its cursor back."""
        if self._live is not None:
            self._live.stop()
        self._live, self._texts = None, {}

    def writing(self, name: str, text: str) -> None:
        """Show what someone has written so far."""
        from rich.live import Live

        self._texts[name] = text.strip()
        if not self._console.is_terminal:
            return
        if self._live is None:
            self._live = Live(console=self._console, transient=True, refresh_per_second=8, redirect_stderr=False)
            self._live.start()
        self._live.update(self._laid_out(self._texts))

    def replied(self, asked: AskedPrompt) -> None:
        """Show a prompt with all replies, which stay."""
        self._stop()
        prompt = asked.prompt if isinstance(asked.prompt, str) else "\n".join(f"{role}: {text}" for role, text in asked.prompt)
        self._console.print(prompt.strip(), style="bold", markup=False)
        texts = {name: r.text.strip() + ("" if r.complete else " …") for name, r in asked.replies.items()}
        self._console.print(self._laid_out(texts))
        self._console.print()

    def _laid_out(self, texts: Mapping[str, str]) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        if not self._console.is_terminal or self._console.width < _NARROWEST * len(texts):
            return Group(
                *(Text(line, style) for name, text in texts.items() for line, style in ((f"{name}:", "dim"), (text, "")))
            )
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), expand=True)
        for name in texts:
            table.add_column(Text(name), ratio=1, overflow="fold")
        table.add_row(*map(Text, texts.values()))
        return table
