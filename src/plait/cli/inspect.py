"""`plait inspect`: the drawing half; every number and sentence comes from `plait.inspection`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from plait.cli.options import Json, Workers
from plait.inspection.wording import below_diagonal, norm_text, span

if TYPE_CHECKING:
    from plait.inspection.comparison import AdapterComparison, LayerComparison
    from plait.inspection.geometry import SymmetricMatrix
    from plait.inspection.report import AdapterReport, Inspection

_BARS = "▁▂▃▄▅▆▇█"
# What a terminal without Unicode shows instead.
_PLAIN = str.maketrans(
    {**dict(zip(_BARS, "_.-:=+*#", strict=True)), "✓": "+", "✗": "x", "·": "*", "‖": "|", "Δ": "d", "×": "x", "√": "sqrt "}
    | {"–": "-", "…": "...", "→": "->"}
)
# Texts of a header that tell what an adapter is for and how it may be used.
_SHOWN = ("ss_base_model_version", "modelspec.title", "modelspec.trigger_phrase", "modelspec.license", "license")
_LABEL = 22  # widest name shown in full


def inspect(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER",
            help=r"\[name=]FOLDER or \[name=]org/repo\[@revision]\[/subfolder].",
            show_default=False,
        ),
    ],
    base_id: Annotated[
        str | None,
        typer.Option("--base-id", help="Base model, when the adapters name it differently.", show_default=False),
    ] = None,
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Report what adapters are, how they relate, and whether they can be merged.

    Example: plait inspect math=./a code=org/repo@main/checkpoint-100

    Example: plait inspect watercolor.safetensors pixelart.safetensors --json
    """
    from plait.cli.console import ProgressBars, out, print_json
    from plait.commands.inspect import InspectOrder

    inspection = InspectOrder(adapters, base_id, workers).run(ProgressBars())
    if json:
        print_json(inspection.model_dump(mode="json"))
    else:
        show(inspection, out())


def show(inspection: Inspection, console: Console) -> None:
    """Print an inspection; without Unicode where the console has none."""
    with console.capture() as captured:
        console.print(_drawing(inspection, console.width))
    text = "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())
    if console.options.ascii_only:
        text = text.translate(_PLAIN).encode(console.encoding, "replace").decode(console.encoding)
    sys.stdout.write(text)


def _drawing(inspection: Inspection, width: int) -> RenderableType:
    parts: list[RenderableType] = [_headline(inspection), Text(), _verdict(inspection)]
    parts += [Text(), *_adapters(inspection.adapters, width)]
    if inspection.comparison and below_diagonal(inspection.comparison.conflict):
        parts += [Text(), *_matrices(inspection.comparison, width)]
    parts += _strips(inspection, width)
    parts += [Text(), _serving(inspection)]
    return Group(*parts)


def _headline(inspection: Inspection) -> Text:
    bases = list(dict.fromkeys(a.base_model for a in inspection.adapters if a.base_model))
    count = len(inspection.adapters)
    line = Text(f"{count} adapter{'s' * (count > 1)} ", "bold")
    if len(bases) == 1:
        return line.append("of ").append(bases[0], "bold")
    return line.append(f"of {len(bases)} base models" if bases else "of an unnamed base model")


def _verdict(inspection: Inspection) -> RenderableType:
    """Report whether, then why: problems, what the numbers mean, what else there is to know."""
    verdict, several = inspection.compatibility, len(inspection.adapters) > 1
    lines = Table.grid(padding=(0, 1))
    lines.add_column(width=1)
    lines.add_column()
    if verdict.can_merge:
        lines.add_row(Text("✓", "bold green"), Text(_merge_verdict(inspection), "bold green"))
    else:
        words = "They cannot be merged as they are." if several else "It cannot be merged as it is."
        lines.add_row(Text("✗", "bold red"), Text(words, "bold red"))
    for problem in verdict.problems:
        lines.add_row(Text("✗", "red"), Text(problem[:1].upper() + problem[1:] + ("" if problem.endswith(".") else ".")))
    for adapter in inspection.adapters:
        for warning in adapter.warnings:
            lines.add_row(Text("!", "bold yellow"), Text(f"{adapter.name}: {warning}"))
    for note in (*(inspection.comparison.findings if inspection.comparison else ()), *verdict.notes):
        lines.add_row(Text("·", "dim"), Text(note))
    return lines


def _merge_verdict(inspection: Inspection) -> str:
    if len(inspection.adapters) == 1:
        return "It can be merged with other adapters of its base model."
    verdict = inspection.compatibility
    if verdict.common == verdict.modules:
        return f"They can be merged: all have the same {verdict.modules} target modules."
    return "They can be merged."


def _adapters(adapters: Sequence[AdapterReport], width: int) -> Iterator[RenderableType]:
    """Draw one row per adapter; columns that do not fit a narrow terminal are left out, the least important first."""
    from plait.cli.console import size

    columns: list[tuple[str, int, Callable[[AdapterReport], str]]] = [
        ("kind", 0, lambda a: a.kind + (" + bias" if a.lora_bias else "")),
        ("rank", 0, lambda a: _listed(a.ranks)),
        ("alpha", 3, lambda a: _listed(a.alphas)),
        ("scaling", 1, lambda a: _listed(a.scalings)),
        ("modules", 1, lambda a: str(a.modules)),
        ("dtype", 2, lambda a: ", ".join(a.dtypes)),
        ("parameters", 4, lambda a: _quantity(a.parameters)),
        ("size", 2, lambda a: size(a.bytes)),
        ("‖ΔW‖", 0, lambda a: norm_text(a.norm)),
        ("stable rank", 1, lambda a: "–" if a.stable_rank is None else f"{a.stable_rank:.1f}"),
        ("rank for 99 %", 3, lambda a: "–" if a.rank_for_99 is None else f"{a.rank_for_99:.1f}"),
    ]
    label = max(min(_LABEL, len(a.name)) + 3 for a in adapters)
    for left_out in (5, 4, 3, 2, 1):
        shown = [(head, cell) for head, priority, cell in columns if priority < left_out]
        if label + sum(2 + max(len(head), *(len(cell(a)) for a in adapters)) for head, cell in shown) <= width:
            break
    table = _table()
    table.add_column("", width=label, no_wrap=True)
    for head, _ in shown:
        table.add_column(head, justify="left" if head in ("kind", "dtype") else "right", no_wrap=True)
    for number, adapter in enumerate(adapters, 1):
        table.add_row(_name(number, adapter.name), *(cell(adapter) for _, cell in shown))
    yield table
    yield from _targets(adapters)


def _targets(adapters: Sequence[AdapterReport]) -> Iterator[RenderableType]:
    """Draw what the adapters adapt: once when it is the same for all."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column()
    targets = [_targets_words(a) for a in adapters]
    if len(set(targets)) == 1:
        lines.add_row("adapts", targets[0])
    else:
        for number, words in enumerate(targets, 1):
            lines.add_row(f"{number} adapts", words)
    for number, adapter in enumerate(adapters, 1):
        if adapter.format != "peft":
            lines.add_row(f"{number} files", _files_words(adapter))
        if adapter.full_tensors:
            tensors = [f"{t.path} {'×'.join(map(str, t.shape))} ({t.role})" for t in adapter.full_tensors]
            lines.add_row(f"{number} also", _listed(tensors, limit=4))
    yield lines


def _targets_words(adapter: AdapterReport) -> str:
    counts: dict[int, list[str]] = {}
    for kind in adapter.module_kinds:
        counts.setdefault(kind.count, []).append(kind.label)
    kinds = "; ".join(f"{count} × {' '.join(names)}" for count, names in counts.items())
    towers = ", ".join(f"{t.layers} layers of {t.name}" for t in adapter.towers)
    return (kinds + (f", in {towers}" if towers else "")) or "no module"


def _files_words(adapter: AdapterReport) -> str:
    words = f"{adapter.format}, written by {adapter.writer}" if adapter.writer else adapter.format
    words += f", of {' and '.join(adapter.components)}" if adapter.components else ""
    shown = [f"{key} {value!r}" for key, value in adapter.metadata.items() if key in _SHOWN]
    others = [key for key in adapter.metadata if key not in _SHOWN]
    return "; ".join([words, *shown, *([f"also has {_listed(others, limit=4)}"] if others else [])])


class _Measure(NamedTuple):
    """One measure between adapters, ready to be drawn.

    Attributes:
        title: the heading.
        rows: the lower triangle, without its first, empty row.
        unrelated: what unrelated adapters would show.
        cell: width of a value.
        width: in columns, in all.
    """

    title: str
    rows: list[list[Text]]
    unrelated: Text
    cell: int
    width: int

    @staticmethod
    def of(title: str, matrix: SymmetricMatrix, unrelated: float | None, write: Callable[[float], Text]) -> _Measure:
        rows = [[_value(x, write) for x in row[:i]] for i, row in enumerate(matrix)][1:]
        cell = max(4, *(len(x) for row in rows for x in row))
        return _Measure(title, rows, _value(unrelated, write), cell, max(len(title), (cell + 1) * len(rows) - 1))

    def line(self, cells: Sequence[Text]) -> Text:
        return Text(" ").join([Text(" " * (self.cell - len(cell))).append_text(cell) for cell in cells])


def _matrices(comparison: AdapterComparison, width: int) -> Iterator[RenderableType]:
    """Draw the lower triangles side by side, as many as fit, each with what unrelated adapters would show."""
    measures = [
        _Measure.of("cosine", comparison.cosine, 0.0, _cosine),
        _Measure.of("overlap of A", comparison.overlap_a, comparison.overlap_a_chance, _overlap),
        _Measure.of("overlap of B", comparison.overlap_b, comparison.overlap_b_chance, _overlap),
        _Measure.of("sign conflict", comparison.conflict, 0.5, _conflict),
        _Measure.of("weighted", comparison.weighted_conflict, 0.5, _conflict),
    ]
    label = max(len("unrelated"), *(min(_LABEL, len(name)) + 2 for name in comparison.names[1:]))
    first = 0
    while first < len(measures):
        end = first + 1
        while end < len(measures) and label + sum(2 + m.width for m in measures[first : end + 1]) <= width:
            end += 1
        if first:
            yield Text()
        yield _side_by_side(comparison.names, measures[first:end], label)
        first = end


def _side_by_side(names: Sequence[str], measures: Sequence[_Measure], label: int) -> Table:
    table = _table()
    table.add_column("", width=label, no_wrap=True)
    for measure in measures:
        table.add_column(measure.title, no_wrap=True)
    if len(names) > 2:
        numbers = [Text(str(j), "dim") for j in range(1, len(names))]
        table.add_row("", *(measure.line(numbers) for measure in measures))
    for i, name in enumerate(names[1:]):
        table.add_row(_name(i + 2, name), *(measure.line(measure.rows[i]) for measure in measures))
    table.add_row(Text("unrelated", "dim"), *(Text(m.line([m.unrelated]).plain, "dim") for m in measures))
    return table


def _value(value: float | None, write: Callable[[float], Text]) -> Text:
    return Text("–", "dim") if value is None else write(value)


def _cosine(value: float) -> Text:
    return Text(f"{round(value, 2) + 0.0:.2f}", _heat(abs(value), 0.1, 0.5))


def _overlap(value: float) -> Text:
    return Text(f"{value:.2f}", _heat(value, 0.5, 0.9))


def _conflict(value: float) -> Text:
    return Text(f"{100 * value:.0f} %", _heat(value, 0.25, 0.55))


def _heat(value: float, warm: float, hot: float) -> str:
    return "bold yellow" if value > hot else "" if value > warm else "cyan"


def _strips(inspection: Inspection, width: int) -> Iterator[RenderableType]:
    """Draw size and disagreement along the layers of every tower; modules outside of layers are listed."""
    layers = inspection.comparison.layers if inspection.comparison else _alone(inspection.adapters[0])
    names = [a.name for a in inspection.adapters]
    for tower in dict.fromkeys(layer.tower for layer in layers if layer.tower):
        yield Text()
        yield _strip(tower, [layer for layer in layers if layer.tower == tower], names, width)
    outside = [layer for layer in layers if layer.tower is None]
    if outside:
        yield Text()
        yield _outside(outside, names)


def _alone(adapter: AdapterReport) -> tuple[LayerComparison, ...]:
    from plait.adapters import layer_key
    from plait.inspection.comparison import LayerComparison

    return tuple(
        LayerComparison(
            layer=layer.layer,
            tower=key.tower if (key := layer_key(layer.layer)) else None,
            index=key.index if key else None,
            norms=(layer.norm,),
            scale_ratio=None,
            cosine=(),
            conflict=(),
            weighted_conflict=(),
        )
        for layer in adapter.layers
    )


def _strip(tower: str, layers: Sequence[LayerComparison], names: Sequence[str], width: int) -> Table:
    label = max(len("sign conflict"), *(min(_LABEL, len(name)) + 3 for name in names))
    width = max(8, width - label - 18)
    table = _table()
    table.add_column("", width=label, no_wrap=True)
    table.add_column(f"layers of {tower}", no_wrap=True)
    table.add_column("", no_wrap=True)
    norms = [[layer.norms[t] for layer in layers] for t in range(len(names))]
    low, high = min((min(row) for row in norms if any(row)), default=0.0), max(max(row) for row in norms)
    for number, (name, row) in enumerate(zip(names, norms, strict=True), 1):
        if any(row):
            bars = Text(_bars(row, low, high, width), "cyan")
            table.add_row(_name(number, name), bars, Text(f"‖ΔW‖ {span([norm_text(min(row)), norm_text(max(row))])}", "dim"))
        else:
            table.add_row(_name(number, name), Text("nothing here", "dim"))
    conflicts = [_mean(below_diagonal(layer.conflict)) for layer in layers]
    known = [100 * c for c in conflicts if c is not None]
    if known:
        bars = Text(_bars(conflicts, min(known) / 100, max(known) / 100, width), "magenta")
        table.add_row("sign conflict", bars, Text(f"{span([f'{min(known):.0f}', f'{max(known):.0f}'])} %", "dim"))
    table.add_row("", Text(_ruler([layer.index or 0 for layer in layers], width), "dim"), "")
    return table


def _bars(values: Sequence[float | None], low: float, high: float, width: int) -> str:
    """Return one to three cells per value, or one per group of neighbors where they do not fit; a blank for None.

    Bars grow from `low` to `high`, or from 0.8 · `high` if that is lower: a difference of a few per cent is none to see.
    """
    repeat, per_cell = _layout(len(values), width)
    low = min(low, 0.8 * high)
    bars = ""
    for i in range(0, len(values), per_cell):
        mean = _mean([value for value in values[i : i + per_cell] if value is not None])
        height = 0.0 if mean is None or high <= low else (mean - low) / (high - low)
        bars += (" " if mean is None else _BARS[min(7, int(8 * height))]) * repeat
    return bars


def _ruler(indices: Sequence[int], width: int) -> str:
    """Return the numbers of some layers, each under the first cell of its bar."""
    repeat, per_cell = _layout(len(indices), width)
    line, last = "", len(indices) - 1
    end = last // per_cell * repeat  # where the last layer's number is written
    for i, index in enumerate(indices):
        at = i // per_cell * repeat
        fits = not line or (at >= len(line) + 2 and at + len(str(index)) + 2 <= end)
        if i == last or (fits and (i == 0 or index % 5 == 0)):
            line = line.ljust(at) + str(index) if at >= len(line) + bool(line) else line
    return line


def _layout(count: int, width: int) -> tuple[int, int]:
    """Return how many cells one value takes, and how many values one cell."""
    return (min(3, width // count), 1) if count <= width else (1, -(-count // width))


def _outside(layers: Sequence[LayerComparison], names: Sequence[str]) -> Table:
    table = _table()
    table.add_column("outside of layers", no_wrap=True)
    for number in range(1, len(names) + 1):
        table.add_column(f"‖ΔW‖ {number}", justify="right", no_wrap=True)
    table.add_column("sign conflict" if len(names) > 1 else "", justify="right", no_wrap=True)
    for layer in layers:
        conflict = _mean(below_diagonal(layer.conflict))
        table.add_row(
            layer.layer,
            *(norm_text(norm) if norm else Text("–", "dim") for norm in layer.norms),
            "" if conflict is None else f"{100 * conflict:.0f} %",
        )
    return table


def _serving(inspection: Inspection) -> RenderableType:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column()
    lines.add_row("vLLM", _serving_words(inspection))
    for one in inspection.serving.adapters:
        if one.refused:
            lines.add_row("", f"Of {one.name} it does not serve: {'; '.join(one.refused)}.")
    return lines


def _serving_words(inspection: Inspection) -> str:
    from plait.errors import join_words

    serving, several = inspection.serving, len(inspection.adapters) > 1
    others = dict.fromkeys(one.other_kind for one in serving.adapters if one.other_kind)
    if others:
        return f"Settings are known for language models that write texts (CAUSAL_LM), not for {join_words([*others], 'or')}."
    wanted = [one.max_lora_rank for one in serving.adapters]
    if None in wanted:
        return "No setting of --max-lora-rank holds all of them: `plait compress` makes them smaller."
    alone = max(w for w in wanted if w is not None)
    words = f"--max-lora-rank {alone} holds {'each adapter' if several else 'it'}"
    if not several or not inspection.compatibility.can_merge:
        return f"{words}."
    words += f"; their exact sum has rank {serving.merged_rank} and "
    if serving.merged_max_lora_rank is None:
        return f"{words}is more than vLLM takes: merge with --rank 512 or less."
    return f"{words}needs {'no more' if serving.merged_max_lora_rank <= alone else serving.merged_max_lora_rank}."


def _table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")


def _name(number: int, name: str) -> Text:
    short = name if len(name) <= _LABEL else f"{name[: _LABEL - 1]}…"
    return Text(f"{number} ", "dim").append(short, "bold")


def _listed(values: Sequence[object], limit: int = 3) -> str:
    words = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    if len(words) > limit and not isinstance(values[0], str):
        return f"{words[0]}–{words[-1]}"
    return ", ".join(words[:limit]) + (f" and {len(words) - limit} more" if len(words) > limit else "") or "–"


def _quantity(number: int) -> str:
    for unit in ("", " k", " M", " G"):
        if number < 1000 or unit == " G":
            break
        number = number / 1000  # type: ignore[assignment]
    return f"{number:.3g}{unit}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
