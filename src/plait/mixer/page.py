"""The mixer's page, in gradio: controls, and what they lead to. What is computed is `Mixer`'s, what is shown `pieces`'."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from typing import Any, TypeVar

from pydantic import ValidationError

from plait.errors import PlaitError, RecipeError
from plait.evaluation.generation import Sampling
from plait.evaluation.record import TaskResult
from plait.evaluation.replies import Reply
from plait.extras import optional
from plait.methods import METHODS
from plait.mixer import pieces
from plait.mixer.mixer import SUGGESTED, Asked, Mixer, Suggestion
from plait.mixer.parameters import Parameter, parameters_of
from plait.mixer.setting import Band, Setting
from plait.mixer.turns import Latest, Superseded, streamed
from plait.parsing import shown
from plait.recipes.overrides import parse_override

T = TypeVar("T")

_PAUSE = 0.1  # seconds between two states of a reply that are shown
_WEIGHTS, _SCALES, _FACTORS = (-1.0, 2.0), (0.0, 3.0), (0.0, 2.0)  # of the sliders, unless a setting is beyond

CSS = (
    pieces.CSS
    + """
.gradio-container { max-width: 82rem !important; padding-inline: 1rem !important; }
.mixer-head h1 { font-size: 1.25rem; margin: 0; font-weight: 650; }
.mixer-head p { margin: .1rem 0 0; color: var(--body-text-color-subdued); font-size: .85rem; overflow-wrap: anywhere; }
#tokens, #tokens div { overflow: visible !important; }
footer, #status:not(:has(.mixer-note, .mixer-error)) { display: none !important; }
.gradio-container .row { align-items: flex-start; }
"""
)
_LINK = """(query) => { const now = new URLSearchParams(location.search), kept = new URLSearchParams();
for (const key of ["token", "__theme"]) if (now.has(key)) kept.set(key, now.get(key));
const text = [kept.toString(), query].filter(Boolean).join("&");
history.replaceState(null, "", location.pathname + (text ? "?" + text : "")); }"""


@dataclass(eq=False)
class Person:
    """What belongs to one browser window."""

    answers: Latest = field(default_factory=Latest)
    tokens: Latest = field(default_factory=Latest)
    scores: Latest = field(default_factory=Latest)
    suggestions: Latest = field(default_factory=Latest)
    scored: Setting | None = None  # the last setting that was scored completely

    def leave(self) -> None:
        """Let go of what is still computed."""
        for latest in (self.answers, self.tokens, self.scores, self.suggestions):
            latest.begin()


class Page:
    """The page of a mixer.

    Args:
        mixer: opened.
    """

    def __init__(self, mixer: Mixer) -> None:
        self._mixer, self._controls = mixer, mixer.controls
        self._gr = optional("gradio", "mix", "plait mix")
        self._methods = {method.name: method for method in mixer.methods}
        self.blocks = in_event_loop(self._built)

    def setting(self, values: Sequence[Any]) -> Setting:
        """Return what the controls say: method, its parameters, scale, weights, factors of bands.

        Raises:
            RecipeError: a control is empty.
        """
        method, params, scale, *rest = values
        names, bands = self._controls.names, self._controls.bands
        weights, factors = rest[: len(names)], rest[len(names) :]
        found: dict[str, dict[str, float]] = {}
        for place, factor in zip(self._places(), factors, strict=True):
            if factor != 1:
                found.setdefault(place[0], {})[place[1].name] = factor
        own = dict(params.get("values", {})) if params.get("of") == method else {}
        space = own.pop("space", None)
        try:
            return Setting(
                weights=dict(zip(names, weights, strict=True)),
                bands=found if bands else {},
                method=method,
                space=space,
                params=own,
                scale=scale,
            )
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {shown(e['input'])}" for e in error.errors()]
            raise RecipeError(f"the controls hold no setting: {'; '.join(wrong)}.") from None

    def _places(self) -> list[tuple[str, Band]]:
        return [(name, band) for name in self._controls.names for band in self._controls.bands]

    def _values(self, setting: Setting) -> list[Any]:
        """Return the controls' updates for a setting, in the order in which `setting` takes their values."""
        gr = self._gr
        own = {**setting.params, **({} if setting.space is None else {"space": setting.space})}

        def slider(value: float, bounds: tuple[float, float]) -> Any:
            return gr.update(value=value, minimum=min(bounds[0], value), maximum=max(bounds[1], value))

        return [
            setting.method,
            {"of": setting.method, "values": own},
            slider(setting.scale, _SCALES),
            *(slider(setting.weights[name], _WEIGHTS) for name in self._controls.names),
            *(slider(setting.bands.get(name, {}).get(band.name, 1.0), _FACTORS) for name, band in self._places()),
        ]

    def _built(self) -> Any:
        gr, mixer, start = self._gr, self._mixer, self._controls.start
        with gr.Blocks(title="plait mix", analytics_enabled=False) as blocks:
            person = gr.State(Person(), delete_callback=Person.leave)
            redraw, query, link = gr.State(0), gr.Textbox(visible=False), gr.Textbox(visible=False)
            gr.HTML(_head(mixer), elem_classes="mixer-head", padding=False)
            with gr.Row():
                with gr.Column(scale=4, min_width=300):
                    controls = self._setting_controls(start, redraw)
                    with gr.Row():
                        reset = gr.Button("Reset", size="sm")
                        suggest = gr.Button("Suggest", size="sm", visible=bool(mixer.tasks), elem_id="suggest")
                    tried = gr.HTML(visible=bool(mixer.tasks), elem_id="tried", padding=False)
                    with gr.Accordion("Keep", open=False, elem_id="keep"):
                        name = gr.Textbox("mix", label=f"Name, in {mixer.out}", max_lines=1)
                        keep = gr.Button("Keep", variant="primary", size="sm", elem_id="keep-button")
                        kept = gr.HTML(elem_id="kept", padding=False)
                        recipe = gr.Code(label="Recipe", language="yaml", interactive=False, elem_id="recipe", max_lines=20)
                with gr.Column(scale=8, min_width=320):
                    status = gr.HTML(elem_id="status", padding=False)
                    prompt = gr.Textbox(label="Prompt", lines=2, max_lines=8, elem_id="prompt", placeholder="Ask everyone …")
                    asked = [prompt, *self._asking_controls()]
                    ask = gr.Button("Ask", variant="primary", size="md", elem_id="ask")
                    answers = gr.HTML(elem_id="answers", padding=False)
                    with gr.Accordion("Tokens: where adapter and merge disagree", open=True, elem_id="tokens"):
                        versus = gr.Radio(list(self._controls.names), value=self._controls.names[0], label="Adapter")
                        views = gr.HTML(padding=False)
                    with gr.Accordion("Tasks", open=True, visible=bool(mixer.tasks), elem_id="tasks"):
                        bars = gr.HTML(pieces.recoveries([], mixer.tasks), padding=False)
                        flipped = gr.HTML(padding=False)
            quiet: dict[str, Any] = {"show_progress": "hidden"}
            follows = {**quiet, "trigger_mode": "multiple", "concurrency_limit": None}
            everything = [person, versus, *asked, *controls]
            answering = {"fn": self._answers, "inputs": everything, "outputs": [answers, views], **follows}
            scoring = {"fn": self._scores, "inputs": [person, *controls], "outputs": [bars, flipped], **follows}
            opened = blocks.load(self._opened, [query], [status, redraw, *controls], js="() => window.location.search", **quiet)
            changed = gr.on(
                [control.change for control in controls],
                self._changed,
                controls,
                [status, link, recipe],
                trigger_mode="always_last",
                concurrency_limit=None,
                **quiet,
            )
            first = opened.then(self._changed, controls, [status, link, recipe], **quiet)
            for event in (changed, first):
                event.success(None, [link], None, js=_LINK)
                event.success(**answering)
                if mixer.tasks:
                    event.success(**scoring)
            gr.on([ask.click, prompt.submit], **answering)
            versus.change(self._tokens, everything, views, **follows)
            reset.click(lambda: [time.time(), *self._values(start)], None, [redraw, *controls], **quiet)
            suggest.click(self._suggested, [person, *controls], [tried], **follows)
            keep.click(self._kept, [name, *controls], kept, **quiet)
        return blocks

    def _setting_controls(self, start: Setting, redraw: Any) -> list[Any]:
        """Make the controls of the setting; return them in the order in which `setting` takes their values."""
        gr, mixer = self._gr, self._mixer
        weights, factors = [], []
        for name in self._controls.names:
            low, high = _around(start.weights[name], _WEIGHTS)
            weights.append(gr.Slider(low, high, start.weights[name], step=0.01, label=name, elem_id=f"weight-{name}"))
            if self._controls.bands:
                with gr.Accordion(f"Layers of {name}", open=False):
                    for band in self._controls.bands:
                        value = start.bands.get(name, {}).get(band.name, 1.0)
                        low, high = _around(value, _FACTORS)
                        factors.append(gr.Slider(low, high, value, step=0.01, label=f"× {band.name}"))
        low, high = _around(start.scale, _SCALES)
        scale = gr.Slider(low, high, start.scale, step=0.01, label="Scale of the merge", elem_id="scale")
        method = gr.Dropdown([*self._methods], value=start.method, label="Method", elem_id="method")
        own = {**start.params, **({} if start.space is None else {"space": start.space})}
        params = gr.State({"of": start.method, "values": own})
        method.input(lambda name: ({"of": name, "values": {}}, time.time()), method, [params, redraw], show_progress="hidden")

        def parameters(name: str, given: Mapping[str, Any]) -> None:
            gr.HTML(_about(METHODS[name].summary, METHODS[name].equation), padding=False)
            values = given["values"] if given["of"] == name else {}
            offered = parameters_of(METHODS[name])
            numbers = [one for one in offered if one.kind in ("slider", "number", "integer")]
            others = [one for one in offered if one not in numbers]

            def show(one: Parameter) -> None:
                control = self._parameter(one, values.get(one.name, one.default))
                made = one.model_copy(update={"kind": "text"}) if isinstance(control, gr.Textbox) else one
                control.change(partial(self._given, name, made), [params, control], params, show_progress="hidden")

            for one in numbers:
                show(one)
            if others:
                with gr.Accordion(f"More of {name}", open=bool({one.name for one in others} & {*values})):
                    for one in others:
                        show(one)

        gr.render(inputs=[method, params], triggers=[redraw.change], show_progress="hidden")(parameters)
        if not self._controls.bands:
            gr.HTML(
                pieces.note("The recipe's own policy of weights acts on top of these; bands of layers cannot hold it."),
                padding=False,
            )
        if len(mixer.methods) < len(METHODS):
            left = ", ".join(name for name in METHODS if name not in self._methods)
            gr.HTML(
                pieces.note(f"Not offered: {left} (second moments are not given, or they take other numbers of adapters)."),
                padding=False,
            )
        return [method, params, scale, *weights, *factors]

    def _parameter(self, one: Parameter, value: Any) -> Any:
        gr, about = self._gr, {"label": one.name, "info": one.description, "interactive": True}
        match one.kind:
            case "switch":
                return gr.Checkbox(bool(value), **about)
            case "choice":
                return gr.Dropdown([(option or "–", option) for option in one.options], value=value or "", **about)
            case "slider" if isinstance(value, (int, float)):
                return gr.Slider(min(one.low, value), max(one.high, value), value, step=one.step, **about)
            case "slider" if value is None:
                return gr.Number(None, minimum=one.low, maximum=one.high, step=one.step, **about)
            case "number" | "integer" if value is None or isinstance(value, (int, float)):
                return gr.Number(value, precision=0 if one.kind == "integer" else None, **about)
        text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
        return gr.Textbox(text, max_lines=4, **about)

    def _given(self, method: str, one: Parameter, params: Mapping[str, Any], value: Any) -> dict[str, Any]:
        try:
            return _with_value(method, one, params, value)
        except PlaitError as error:
            raise self._refused(error) from None

    def _refused(self, error: PlaitError) -> Exception:
        """Return what shows an error above the page; gradio takes its text for HTML."""
        refused: Exception = self._gr.Error(escape(str(error)), print_exception=False)
        return refused

    def _asking_controls(self) -> list[Any]:
        gr, has_chat = self._gr, self._mixer.has_chat
        with gr.Accordion("How to ask", open=False):
            system = gr.Textbox(label="System message", visible=has_chat, max_lines=4)
            plain = gr.Checkbox(not has_chat, label="Plain text, without the chat template", interactive=has_chat)
            with gr.Row():
                longest = gr.Number(48, label="Longest reply, tokens", precision=0, minimum=1, min_width=120)
                temperature = gr.Number(0, label="Temperature", minimum=0, step=0.1, min_width=120)
                top_p = gr.Number(1, label="Top p", minimum=0, maximum=1, step=0.05, min_width=120)
                seed = gr.Number(0, label="Seed", precision=0, min_width=120)
        return [system, plain, longest, temperature, top_p, seed]

    def _opened(self, query: str) -> list[Any]:
        """Begin for one window: at the setting of its address."""
        try:
            setting, problem = self._controls.read(query), ""
            self._mixer.check(setting)
        except PlaitError as error:
            setting, problem = self._controls.start, pieces.error(f"{error} The mixer begins at its start.")
        notes = "".join(map(pieces.note, self._mixer.notes))
        return [problem + notes, time.time(), *self._values(setting)]

    def _changed(self, *values: Any) -> tuple[Any, ...]:
        """Check a setting; what follows runs only where it can be merged."""
        try:
            setting = self.setting(values)
            self._mixer.check(setting)
        except PlaitError as error:
            raise self._refused(error) from None
        return "", setting.query(), self._mixer.recipe_text(setting)

    def _answers(self, person: Person, versus: str, *values: Any) -> Iterator[tuple[Any, Any]]:
        """Show answers as they are written, the merge's first; then its tokens."""
        asked, names = _asked(values[:_ASKED]), self._mixer.columns()
        stop, other_tokens = person.answers.begin(), person.tokens.begin()
        if not asked.prompt.strip():
            yield pieces.note("Write a prompt, and everyone answers."), ""
            return
        texts: list[str | None] = [None] * len(names)
        states, shown = [""] * len(names), 0.0

        try:
            setting = self.setting(values[_ASKED:])

            def work(report: Any) -> None:
                self._mixer.replies(setting, asked, stop, lambda *one: report(one))

            for place, text, reply in streamed(work):
                texts[place], states[place] = text, _state(reply)
                if reply is not None or time.monotonic() - shown > _PAUSE:
                    shown = time.monotonic()
                    yield pieces.answers(names, texts, states), self._gr.skip()
            views = self._mixer.disagreement(setting, asked, versus, lambda: stop() or other_tokens())
            yield self._gr.skip(), pieces.tokens(views, versus)
        except Superseded:
            return
        except PlaitError as error:
            yield pieces.error(str(error)), ""

    def _tokens(self, person: Person, versus: str, *values: Any) -> Any:
        asked, stop = _asked(values[:_ASKED]), person.tokens.begin()
        if not asked.prompt.strip():
            return ""
        try:
            return pieces.tokens(self._mixer.disagreement(self.setting(values[_ASKED:]), asked, versus, stop), versus)
        except Superseded:
            return self._gr.skip()
        except PlaitError as error:
            return pieces.error(str(error))

    def _scores(self, person: Person, *values: Any) -> Iterator[tuple[str, Any]]:
        """Score the setting in the background, task by task; then show what is answered otherwise than before."""
        stop, tasks, results = person.scores.begin(), self._mixer.tasks, list[TaskResult]()
        try:
            setting = self.setting(values)
            for result in self._mixer.scores(setting, stop):
                results.append(result)
                yield pieces.recoveries(results, tasks), self._gr.skip()
            before, person.scored = person.scored, setting
            if before is not None and before != setting:
                yield pieces.recoveries(results, tasks), pieces.flips(self._mixer.flips(before, setting))
        except Superseded:
            return
        except PlaitError as error:
            yield pieces.recoveries(results, tasks), pieces.error(str(error))

    def _suggested(self, person: Person, *values: Any) -> Iterator[str]:
        found: list[Suggestion] = []
        try:
            yield pieces.suggestions(found, done=False)
            for one in self._mixer.suggest(self.setting(values), SUGGESTED, person.suggestions.begin()):
                found = sorted([*found, one], key=lambda s: (s.worst is not None, s.worst or 0.0, -s.share), reverse=True)
                yield pieces.suggestions(found, done=False)
            yield pieces.suggestions(found, done=True)
        except Superseded:
            return
        except PlaitError as error:
            yield (pieces.suggestions(found, done=True) if found else "") + pieces.error(str(error))

    def _kept(self, name: str, *values: Any) -> str:
        try:
            kept = self._mixer.keep(self.setting(values), name.strip())
        except PlaitError as error:
            return pieces.error(str(error))
        return pieces.kept(kept)


_ASKED = 7  # controls of how to ask


def in_event_loop(work: Callable[[], T]) -> T:
    """Return what some work returns while an event loop runs: gradio makes one wherever none does, and closes none of them."""

    async def working() -> T:
        return work()

    try:
        asyncio.get_running_loop()  # a notebook's
    except RuntimeError:
        return asyncio.run(working())
    return work()


def _head(mixer: Mixer) -> str:
    names = ", ".join(mixer.controls.names)
    return f"<h1>plait mix</h1>{pieces.line(f'{names} on {mixer.base}')}"


def _about(summary: str, equation: str) -> str:
    return pieces.note(f"{summary} {equation}")


def _around(value: float, bounds: tuple[float, float]) -> tuple[float, float]:
    return min(bounds[0], value), max(bounds[1], value)


def _with_value(method: str, one: Parameter, params: Mapping[str, Any], value: Any) -> dict[str, Any]:
    """Return the parameters with another value of one; a default is not given.

    Raises:
        RecipeError: the text is not YAML.
    """
    own = dict(params["values"]) if params["of"] == method else {}
    if one.kind == "text" and value != one.default:
        value = parse_override(f"x={value}")[1] if value else None
    own.pop(one.name, None)
    if value not in (None, "") and value != one.default:
        own[one.name] = value
    return {"of": method, "values": own}


def _asked(values: Sequence[Any]) -> Asked:
    prompt, system, plain, longest, temperature, top_p, seed = values
    return Asked(
        prompt or "", system or "", plain, Sampling(int(longest or 0), temperature or 0.0, top_p or 0.0, int(seed or 0))
    )


def _state(reply: Reply | None) -> str:
    return "…" if reply is None else f"{reply.tokens} tokens{'' if reply.complete else ' …'}"
