"""What the mixer shows, as HTML: answers side by side, tokens, recoveries, changed answers, suggestions.

All text of models and tasks is escaped; colors are the page's own, light or dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from plait.evaluation.record import TaskResult
from plait.mixer.disagreement import TokenView
from plait.mixer.mixer import Flip, Kept, Suggestion

_STRONGEST = 2.0  # nats, from which on a token has the strongest color
_FLIPS = 12  # of a task that are shown

CSS = """
.mixer-answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .75rem; }
.mixer-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .6rem .8rem; min-width: 0; }
.mixer-card.merge { border-color: var(--color-accent); border-width: 2px; grid-column: 1 / -1; }
.mixer-card h4 { margin: 0 0 .3rem; font-size: .8rem; font-weight: 600; color: var(--body-text-color-subdued);
  display: flex; justify-content: space-between; gap: .5rem; }
.mixer-card p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; min-height: 1.5em; }
.mixer-note { color: var(--body-text-color-subdued); font-size: .85rem; margin: .3rem 0; }
.mixer-error { border-left: 3px solid #c2410c; padding: .4rem .7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.mixer-tokens { line-height: 2; overflow-wrap: anywhere; white-space: pre-wrap; }
.mixer-tokens > span { position: relative; border-radius: 3px; padding: .1rem 0; cursor: help; }
.mixer-tokens > span:focus { outline: 2px solid var(--color-accent); }
.mixer-tokens .tops { display: none; position: absolute; left: 0; top: 1.9em; z-index: 30; width: max-content;
  max-width: min(20rem, 80vw); padding: .5rem .7rem; border: 1px solid var(--border-color-primary); border-radius: 6px;
  background: var(--background-fill-primary); box-shadow: 0 4px 12px rgb(0 0 0 / .25); line-height: 1.4; font-size: .8rem; }
.mixer-tokens > span:hover .tops, .mixer-tokens > span:focus .tops { display: block; }
.mixer-tokens .tops table { border-collapse: collapse; }
.mixer-tokens .tops td, .mixer-tokens .tops th { padding: 0 .6rem 0 0; text-align: left; font-weight: 400; }
.mixer-tokens .tops th { color: var(--body-text-color-subdued); }
.mixer-task { display: grid; grid-template-columns: minmax(5rem, 9rem) 1fr 3.5rem; gap: .2rem .7rem; align-items: center;
  margin: .35rem 0; }
.mixer-task .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.mixer-task .track { position: relative; height: .9rem; border-radius: 4px; background: var(--border-color-primary); }
.mixer-task .fill { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--color-accent); }
.mixer-task .fill.below { background: #c2410c; }
.mixer-task .interval { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: var(--body-text-color); }
.mixer-task .number { text-align: right; font-variant-numeric: tabular-nums; }
.mixer-task .detail { grid-column: 2 / -1; color: var(--body-text-color-subdued); font-size: .78rem; }
@media (max-width: 40rem) {
  .mixer-task { grid-template-columns: 1fr 3.5rem; }
  .mixer-task .name { grid-column: 1 / -1; }
  .mixer-task .detail { grid-column: 1 / -1; }
}
.mixer-scroll { overflow-x: auto; }
.mixer-table { border-collapse: collapse; font-size: .85rem; width: 100%; }
.mixer-table th { text-align: left; font-weight: 600; color: var(--body-text-color-subdued); }
.mixer-table td, .mixer-table th { padding: .25rem .7rem .25rem 0 !important; vertical-align: top; word-break: normal;
  border: solid var(--border-color-primary) !important; border-width: 0 0 1px !important; overflow-wrap: normal; }
.mixer-table, .mixer-table tr, .mixer-tokens .tops table, .mixer-tokens .tops tr { border: 0 !important; }
.mixer-tokens .tops td, .mixer-tokens .tops th { border: 0 !important; padding: 0 .6rem 0 0 !important; }
.mixer-table .prompt { min-width: 14rem; overflow-wrap: anywhere; }
.mixer-table .right { color: var(--color-accent); } .mixer-table .wrong { color: #c2410c; }
.dark .mixer-table .wrong { color: #fb923c; }
"""


def note(text: str) -> str:
    """Return a line for people."""
    return f'<p class="mixer-note">{escape(text)}</p>'


def error(text: str) -> str:
    """Return what was wrong."""
    return f'<div class="mixer-error" role="alert">{escape(text)}</div>'


def line(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{escape(text)}</p>"


def kept(found: Kept) -> str:
    """Return what was written, and what makes a model of it."""
    rows = "".join(f"<li><code>{escape(place)}</code></li>" for place in (found.adapter, found.recipe))
    return (
        f"{note('Written: the adapter with its lock and card, and the recipe.')}<ul>{rows}</ul><pre>{escape(found.bake)}</pre>"
    )


def answers(names: Sequence[str], texts: Sequence[str | None], states: Sequence[str]) -> str:
    """Return everyone's answer, the merge first.

    Args:
        names: who answers, the merge last.
        texts: so far; None where nothing was begun.
        states: of each: how many tokens, or that it is written.
    """
    order = [len(names) - 1, *range(len(names) - 1)]
    cards = (
        f'<section class="mixer-card{" merge" * (i == len(names) - 1)}"><h4><span>{escape(names[i])}</span>'
        f"<span>{escape(states[i])}</span></h4><p>{escape((texts[i] or '').strip())}</p></section>"
        for i in order
    )
    return f'<div class="mixer-answers">{"".join(cards)}</div>'


def tokens(views: Sequence[TokenView], adapter: str) -> str:
    """Return a reply of the merge, each token colored by how far the adapter is from it."""
    if not views:
        return note("the merge has written nothing.")
    mean = sum(view.kl for view in views) / len(views)
    head = f"KL({adapter} ‖ merge) over the merge's reply: {mean:.3f} nats per token, at most {max(v.kl for v in views):.2f}."
    return note(head) + f'<div class="mixer-tokens">{"".join(_token(view, adapter) for view in views)}</div>'


def _token(view: TokenView, adapter: str) -> str:
    share = min(1.0, view.kl / _STRONGEST)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(_visible(text))}</td><td>{p:.0%}</td>' for text, p in pair)}</tr>"
        for pair in zip(view.adapter, view.merge, strict=True)
    )
    head = f"<tr><th colspan=2>{escape(adapter)}</th><th colspan=2>merge</th></tr>"
    return (
        f'<span tabindex="0" data-kl="{view.kl:.4f}" style="background: rgb(234 88 12 / {0.7 * share:.2f})">{escape(view.text)}'
        f'<span class="tops">KL {view.kl:.3f}<table>{head}{rows}</table></span></span>'
    )


def _visible(text: str) -> str:
    """Return a token in which blanks and line ends are seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def recoveries(results: Sequence[TaskResult], tasks: Sequence[str]) -> str:
    """Return a bar per task; those that are not scored yet are empty."""
    known = {result.task: result for result in results}
    return "".join(_bar(task, known.get(task)) for task in tasks)


def _bar(task: str, result: TaskResult | None) -> str:
    name = f'<span class="name" title="{escape(task)}">{escape(task)}</span>'
    if result is None:
        return f'<div class="mixer-task">{name}<span class="track"></span><span class="number">…</span></div>'
    value = result.recovery
    detail = f"{result.metric}: base {result.base:.3g} · adapter {_number(result.single)} · merge {result.merged:.3g}"
    detail += f" · {result.examples} examples" + (f" · {result.undefined}" if result.undefined else "")
    fill, number = "", "–"
    if value is not None:
        width = min(1.0, abs(value))
        fill = f'<span class="fill{" below" * (value < 0)}" style="width: {width:.1%}"></span>'
        number = f"{value:.0%}"
        if result.recovery_interval is not None:
            low, high = (min(1.0, max(0.0, bound)) for bound in result.recovery_interval)
            fill += f'<span class="interval" style="left: {low:.1%}; width: {high - low:.1%}"></span>'
    return (
        f'<div class="mixer-task" data-task="{escape(task)}">{name}<span class="track">{fill}</span>'
        f'<span class="number">{number}</span><span class="detail">{escape(detail)}</span></div>'
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def flips(found: Sequence[Flip]) -> str:
    """Return the examples that are answered otherwise than at the setting before."""
    if not found:
        return note("no example is answered otherwise than at the setting before.")
    better, worse = (sum(flip.better is kind for flip in found) for kind in (True, False))
    shown = [flip for i, flip in enumerate(found) if sum(f.task == flip.task for f in found[:i]) < _FLIPS]
    rows = "".join(
        f'<tr><td>{escape(flip.task)}</td><td class="prompt">{escape(flip.prompt[-160:])}</td><td>{escape(flip.target)}</td>'
        f'<td>{escape(flip.before or "–")}</td><td class="{_kind(flip)}">{escape(flip.now or "–")}</td></tr>'
        for flip in shown
    )
    head = f"{better} became right, {worse} wrong, {len(found) - better - worse} changed otherwise, since the setting before."
    cells = "".join(f"<th>{name}</th>" for name in ("task", "prompt", "target", "before", "now"))
    return note(head) + f'<div class="mixer-scroll"><table class="mixer-table"><tr>{cells}</tr>{rows}</table></div>'


def _kind(flip: Flip) -> str:
    return {True: "right", False: "wrong", None: ""}[flip.better]


def suggestions(found: Sequence[Suggestion], *, done: bool) -> str:
    """Return what was tried, with the address of each setting."""
    cells = "".join(f"<th>{name}</th>" for name in ("method", "scale", "worst", "mean", "distance", ""))
    rows = "".join(
        f"<tr><td>{escape(one.setting.method)}</td><td>{one.setting.scale:.3g}</td><td>{_share(one.worst)}</td>"
        f'<td>{_share(one.mean)}</td><td>{one.share:.1%}</td><td><a href="?{escape(one.setting.query())}">open</a></td></tr>'
        for one in found
    )
    head = (
        "Scales are nearest to the adapters' own answers on the tasks' texts (no label read); recoveries are of the subset. "
        "Distance: KL from the adapters, in shares of the base's."
    )
    state = "" if done else note("trying …")
    return note(head) + f'<div class="mixer-scroll"><table class="mixer-table"><tr>{cells}</tr>{rows}</table></div>{state}'


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
