"""The mixer's parts that need no model: settings and addresses, turns, controls of methods, the gate, what is shown."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from urllib.parse import parse_qs

import pytest

from plait.errors import RecipeError
from plait.methods import METHODS
from plait.mixer import pieces
from plait.mixer.disagreement import TokenView, _pieces
from plait.mixer.gate import Gate
from plait.mixer.mixer import Flip
from plait.mixer.page import _with_value
from plait.mixer.parameters import Parameter, parameters_of
from plait.mixer.setting import Controls, Setting, bands_of
from plait.mixer.turns import GiveWay, Latest, Superseded, Turns, streamed
from plait.recipes.loading import build_recipe
from plait.recipes.writing import recipe_json
from tests.evaluated import HOSTILE, Page, task

MODULES = [f"model.layers.{i}.q_proj" for i in range(7)] + [f"vision.blocks.{i}.fc" for i in range(2)] + ["lm_head"]


def controls(**recipe: Any) -> Controls:
    adapters = [{"name": "a", "path": "./a", "weight": 0.7}, {"name": "b", "path": "./b"}]
    return Controls(build_recipe({"adapters": adapters, **recipe}), MODULES)


def test_towers_are_cut_into_bands() -> None:
    assert [band.name for band in bands_of(MODULES)] == [
        "model.layers.0-1", "model.layers.2-3", "model.layers.4-6", "vision.blocks.0", "vision.blocks.1",
    ]  # fmt: skip
    assert bands_of(["lm_head"]) == ()


def test_an_address_holds_a_setting() -> None:
    found = controls(method={"name": "ties", "density": 0.4, "space": "core"}, scale=1.25)
    start = found.start
    assert (start.weights, start.method, start.params, start.space) == ({"a": 0.7, "b": 1.0}, "ties", {"density": 0.4}, "core")
    moved = start.model_copy(
        update={"weights": {"a": 1 / 3, "b": -0.5}, "bands": {"b": {"model.layers.2-3": 0.25}}, "scale": 2.0, "space": None}
    )
    for setting in (start, moved):
        assert found.read("?token=x&" + setting.query()) == setting
    assert found.read("token=x") == start, "an address without a setting"
    assert found.read("scale=2") == start.model_copy(update={"scale": 2.0}), "the others are as they were"
    assert found.read("method=linear").params == {}, "parameters belong to their method"
    with pytest.raises(RecipeError, match=r"weight='a:x' is not a value; scale='' is not a value"):
        found.read("weight=a:x&scale=")
    with pytest.raises(RecipeError, match="not a finite number"):
        found.read("scale=nan")
    with pytest.raises(RecipeError, match=r"param='x:\[+.* is not a value"):
        found.read("param=x:" + "[" * 100_000)
    for name in ("name", "space"):
        with pytest.raises(RecipeError, match=f"{name} is not a parameter of a method"):
            found.read(f'param={name}:"ties"')
    with pytest.raises(RecipeError, match=r"'c' is not an adapter here; there are a, b; 'no\.band' is not a band"):
        found.read("weight=c:1&band=a:no.band:1")


def test_a_setting_is_a_recipe_and_a_recipe_a_setting() -> None:
    found = controls(seed=3, transforms=["layer_l2_normalize"])
    moved = found.start.model_copy(
        update={"bands": {"b": {"vision.blocks.1": 0.5}}, "method": "ties", "params": {"density": 0.4}}
    )
    recipe = found.recipe_of(moved)
    data = recipe_json(recipe)
    assert [(e["name"], e["path"], e["weight"]) for e in data["adapters"]] == [("a", "./a", 0.7), ("b", "./b", 1.0)]
    assert data["weights"]["layers"] == {"vision.blocks.1": {"b": 0.5}}
    assert (data["seed"], data["method"]["density"], len(data["transforms"])) == (3, 0.4, 1)
    assert Controls(recipe, MODULES).start == moved
    with pytest.raises(RecipeError, match=r"density.*less than or equal to 1|density"):
        found.recipe_of(moved.model_copy(update={"params": {"density": 7}}))
    assert found.recipe_of(found.start).weights is None


def test_a_policy_that_bands_cannot_hold_acts_on_top() -> None:
    for policy in ({"policy": "lines", "alpha": 0.5, "beta": 1.0}, {"policy": "per_layer", "layers": {"model.layers.0": 0.5}}):
        found = controls(weights=policy)
        assert found.bands == ()
        assert recipe_json(found.recipe_of(found.start))["weights"]["policy"] == policy["policy"]
    layers = {f"model.layers.{i}": 0.5 for i in (0, 1)}
    assert controls(weights={"policy": "per_layer", "layers": layers}).start.bands == {
        name: {"model.layers.0-1": 0.5} for name in "ab"
    }


def test_methods_become_controls() -> None:
    found = {one.name: one for one in parameters_of(METHODS["ties"])}
    density = found["density"]
    assert (density.kind, density.default, density.high) == ("slider", METHODS["ties"].params().density, 1.0)
    assert 0 < density.low < 0.05, "0 itself is not allowed"
    assert found["space"].options == METHODS["ties"].spaces
    assert (found["flavor"].kind, found["flavor"].options[0], found["flavor"].default) == ("choice", "", None)
    assert found["weighted_vote"].kind == "switch"
    for method in METHODS.values():
        for one in parameters_of(method):
            assert one.description, f"{method.name}.{one.name}"


def test_what_is_out_of_date_lets_go() -> None:
    latest, turns = Latest(), Turns()
    stop = latest.begin()
    with turns.turn(stop):
        turns.start("merge", 2)
        turns.advance()
        latest.begin()
        with pytest.raises(Superseded):
            turns.advance()
        turns.finish()
    with pytest.raises(Superseded), turns.turn(stop):
        pytest.fail("began what nobody wants")


def test_what_is_out_of_date_stops_waiting() -> None:
    latest, turns, left = Latest(), Turns(), threading.Event()
    stop = latest.begin()

    def wait() -> None:
        with pytest.raises(Superseded), turns.turn(stop):
            pytest.fail("the turn is another's")
        left.set()

    with turns.turn(lambda: False):
        threading.Thread(target=wait, daemon=True).start()
        assert not left.wait(0.05)
        latest.begin()
        assert left.wait(5), "while the other still has its turn"
    with turns.turn(lambda: False):
        turns.check()


def test_the_background_gives_way_to_who_waits() -> None:
    turns, order = Turns(), list[str]()
    inside, asked = threading.Event(), threading.Event()

    def ask() -> None:
        inside.wait(5)
        asked.set()
        with turns.turn(lambda: False):
            order.append("asked")

    thread = threading.Thread(target=ask)
    thread.start()
    while "scored" not in order:
        try:
            with turns.turn(lambda: False, behind=True):
                inside.set()
                asked.wait(5)
                while "asked" not in order:  # until the other is known to wait
                    turns.advance()
                order.append("scored")
        except GiveWay:
            continue
    thread.join(5)
    assert order == ["asked", "scored"]


def test_what_a_thread_reports_is_streamed() -> None:
    def work(report: Any) -> None:
        report(1)
        report(None)
        raise RecipeError("no more")

    found = streamed(work)
    assert [next(found), next(found)] == [1, None]
    with pytest.raises(RecipeError, match="no more"):
        next(found)
    assert [*streamed(lambda report: report(2))] == [2]


def test_a_character_of_several_tokens_is_the_last_ones() -> None:
    class Bytes:
        def decode(self, tokens: list[int]) -> str:
            return bytes(tokens).decode("utf-8", "replace")

    text = "né 語🙂"
    assert _pieces(Bytes(), [*text.encode()]) == ["n", "", "é", " ", "", "", "語", "", "", "", "🙂"]
    assert _pieces(Bytes(), [*text.encode()][:-1])[-1] == "\ufffd", "a reply may end within one"


def test_a_number_that_may_be_none_stays_a_number() -> None:
    number = Parameter(name="x", kind="slider", default=None)
    params = {"of": "m", "values": {}}
    assert _with_value("m", number, params, 0.5)["values"] == {"x": 0.5}
    assert _with_value("m", number, {"of": "m", "values": {"x": 0.5}}, None)["values"] == {}
    text = number.model_copy(update={"kind": "text"})
    assert _with_value("m", text, params, "0.5")["values"] == {"x": 0.5}
    with pytest.raises(RecipeError):
        _with_value("m", text, params, "[")


def answer(gate: Gate, path: str = "/", query: str = "", cookie: str = "", kind: str = "http") -> tuple[Any, dict[str, str]]:
    """Return status (or kind of message) and headers of what a request is answered."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {}

    scope = {"type": kind, "path": path, "query_string": query.encode(), "headers": [(b"cookie", cookie.encode())]}
    asyncio.run(gate(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0].get("headers", ())}
    return sent[0].get("status", sent[0]["type"]), headers


def test_the_token_opens_the_page_and_nothing_else_does() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    gate = Gate(app, "secret")
    for how in (
        {},
        {"query": "token=other"},
        {"cookie": "plait_mix=x"},
        {"path": "/gradio_api/queue/join"},
        {"query": "token="},
    ):
        status, headers = answer(gate, **how)
        assert status == 401
        assert "set-cookie" not in headers
    assert answer(gate, kind="websocket")[0] == "websocket.close"
    status, headers = answer(gate, query="token=secret&scale=2")
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert {"HttpOnly", "SameSite=Strict"} <= {*headers["set-cookie"].split("; ")}
    assert answer(gate, "/gradio_api/queue/join", cookie="other=1; " + headers["set-cookie"].split(";")[0])[0] == 200
    own = headers["set-cookie"].split(";")[0]
    for others in ('a={"x": 1}; ', "b=a,b=c@é; ", "bad name=1;"):
        assert answer(gate, cookie=others + own)[0] == 200, f"behind {others}"
    assert answer(Gate(app, "another"), cookie=headers["set-cookie"].split(";")[0])[0] == 401


def test_texts_of_models_and_tasks_are_shown_as_they_are() -> None:
    view = TokenView(text=HOSTILE, kl=1.0, adapter=((HOSTILE, 0.5),), merge=(("\n", 0.5),))
    flip = Flip(task=HOSTILE, prompt=HOSTILE, target=HOSTILE, before=None, now=HOSTILE, better=False)
    shown = [
        pieces.note(HOSTILE), pieces.error(HOSTILE), pieces.answers(["base", HOSTILE], [HOSTILE, None], ["", HOSTILE]),
        pieces.tokens([view], HOSTILE),
        pieces.recoveries([task(HOSTILE, -0.5), task("none", None)], [HOSTILE, "none", "later"]),
        pieces.flips([flip]),
    ]  # fmt: skip
    page = Page("".join(shown))
    assert not {"script"} & {*page.tags}
    for text in ("-50%", "1 wrong", "0 became right", "1.000 nats"):
        assert text in page.text, text
    setting = Setting(weights={"a": 1.0}, params={"x": '"><script>'})
    assert parse_qs(setting.query())["param"] == ['x:"\\"><script>"']
