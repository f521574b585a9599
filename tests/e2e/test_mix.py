"""`plait mix`: what is answered, scored and kept at a setting; and the page in a real browser."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch

import plait
from plait.commands.mix import MixOrder
from plait.commands.request import Request
from plait.errors import AdapterError, OutputError, RecipeError
from plait.evaluation.generation import Sampling
from plait.evaluation.replies import Reply
from plait.mixer.mixer import Asked, Mixer
from plait.mixer.setting import Setting
from plait.mixer.turns import Superseded
from plait.notices import PlaitWarning
from tests.command_line import exit_code
from tests.language_models import LABELS, tokenizer, train_pair, write_task
from tests.ray_nodes import free_port

# gradio does not close the sockets on which it looks for a free port
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket.socket .*family=2:ResourceWarning")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ["Chromium"] * (BROWSER is None)
PROMPT = "sort w3 :"
ASKED = Asked(PROMPT, sampling=Sampling(5))
WANTED = lambda: False  # noqa: E731 (a callable that never stops)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train_pair(tmp_path_factory.mktemp("mixed"), steps=20)
    for name in LABELS:
        write_task(folder / "tasks", name)
    return folder


def order(place: Path, *, tasks: bool = True, source: Any = None, **how: Any) -> MixOrder:
    files = [place / "tasks" / f"{name}.yaml" for name in LABELS] if tasks else None
    adapters = {name: place / name for name in LABELS} if source is None else source
    settings = {"base_model": str(place / "base"), **how.pop("settings", {})}
    return MixOrder(request=Request(adapters, settings, tasks=files), **how)


@pytest.fixture(scope="module")
def mixer(place: Path) -> Mixer:
    found = order(place, out=place / "mixes").plan()
    found.open()
    return found


def answers(mixer: Mixer, setting: Setting, asked: Asked = ASKED) -> dict[str, str]:
    """Return who → complete reply."""
    found: dict[str, Reply] = {}

    def report(column: int, text: str, reply: Reply | None) -> None:
        if reply is not None:
            found[mixer.columns()[column]] = reply

    mixer.replies(setting, asked, WANTED, report)
    return {name: reply.text for name, reply in found.items()}


def settings(mixer: Mixer) -> dict[str, Setting]:
    start = mixer.controls.start
    return {
        "linear": start.model_copy(update={"weights": {"sort": 0.7, "rate": 0.6}, "scale": 1.5}),
        "bands": start.model_copy(update={"bands": {"sort": {"model.layers.1": 0.0}, "rate": {"model.layers.0": 1.7}}}),
        "ties": start.model_copy(update={"method": "ties", "space": "core", "params": {"density": 0.4}, "scale": 1.3}),
    }


def logits(mixer: Mixer, setting: Setting) -> torch.Tensor:
    ids = tokenizer()([PROMPT, "rate w8 :"], return_tensors="pt").input_ids
    with mixer._candidate(setting).act(mixer._evaluator.session.live, None) as model, torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["linear", "bands", "ties"])
def test_what_is_kept_is_what_was_answered(place: Path, mixer: Mixer, name: str) -> None:
    setting = settings(mixer)[name]
    assert (mixer._coefficients(mixer._of(setting)) is not None) is (name != "ties")
    kept = mixer.keep(setting, name)
    session = plait.mixture.load([kept.adapter], base=place / "base")
    with session:
        ids = tokenizer()([PROMPT, "rate w8 :"], return_tensors="pt").input_ids
        with torch.no_grad():
            written = session.model(input_ids=ids).logits
    assert torch.allclose(logits(mixer, setting), written, atol=1e-4)
    others = [logits(mixer, s) for other, s in settings(mixer).items() if other != name]
    assert not any(torch.allclose(other, written, atol=1e-2) for other in others)
    assert answers(mixer, setting)["merge"] == plait.ask(
        PROMPT, kept.adapter, base=place / "base", max_new_tokens=5
    ).prompts[0].replies[name].text  # fmt: skip
    for file in (Path(kept.recipe), *Path(kept.adapter).iterdir()):
        assert b"subset" not in file.read_bytes(), f"{file.name}: the mixer's own subset is nobody's setting"
    again = plait.merge(kept.recipe, out=place / f"again-{name}")
    same = "adapter_model.safetensors"
    assert (again.folder / same).read_bytes() == (Path(kept.adapter) / same).read_bytes()
    assert order(place, tasks=False, source=[kept.adapter]).plan().controls.start == setting, "its folder opens at the setting"
    assert exit_code(*kept.bake.split()[1:], "--dry-run") == 0


def test_base_and_adapters_are_asked_once(mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = settings(mixer)["linear"], settings(mixer)["ties"]
    replies = answers(mixer, first, Asked("rate w5 :", sampling=Sampling(3)))
    asked: list[str] = []
    write = plait.evaluation.replies.write_reply
    monkeypatch.setattr("plait.evaluation.replies.write_reply", lambda *a: asked.append("x") or write(*a))
    other = answers(mixer, second, Asked("rate w5 :", sampling=Sampling(3)))
    assert len(asked) == 1, "the merge alone"
    assert {k: v for k, v in replies.items() if k != "merge"} == {k: v for k, v in other.items() if k != "merge"}
    with pytest.raises(Superseded):
        mixer.replies(first, Asked("rate w1 :"), lambda: True, lambda *a: None)


def test_tokens_say_where_an_adapter_is_elsewhere(mixer: Mixer) -> None:
    alone = mixer.controls.start.model_copy(update={"weights": {"sort": 1.0, "rate": 0.0}})
    views = mixer.disagreement(alone, ASKED, "sort", WANTED)
    assert max(view.kl for view in views) < 1e-4, "the merge is that adapter"
    assert views[0].adapter[0][0] == views[0].text, "greedily, the likeliest token is written"
    assert "".join(view.text for view in views) == answers(mixer, alone)["merge"]
    other = mixer.disagreement(alone, ASKED, "rate", WANTED)
    assert max(view.kl for view in other) > 0.1
    ids = tokenizer()(PROMPT, return_tensors="pt").input_ids
    with mixer._candidate(alone).act(mixer._evaluator.session.live, None) as model, torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].softmax(-1).topk(5)
    assert [text for text, _ in other[0].merge] == [tokenizer().decode([t]) for t in expected.indices.tolist()]
    assert [p for _, p in other[0].merge] == pytest.approx(expected.values.tolist(), abs=1e-4)


def test_scores_are_those_of_an_evaluation(place: Path, mixer: Mixer) -> None:
    found = settings(mixer)
    for name in ("linear", "ties"):
        kept = plait.evaluate(
            mixer.controls.recipe_of(found[name]), tasks=[place / "tasks" / f"{t}.yaml" for t in LABELS], workspace=None
        )
        assert [(r.task, r.recovery, r.merged) for r in mixer.scores(found[name], WANTED)] == [
            (r.task, r.recovery, r.merged) for r in kept.tasks
        ]
    flips = mixer.flips(found["linear"], found["ties"])
    back = mixer.flips(found["ties"], found["linear"])
    assert len(flips) == len(back) > 0
    for task in LABELS:
        right = sum({True: 1, False: -1, None: 0}[flip.better] for flip in flips if flip.task == task)
        values = [next(r.merged for r in mixer.scores(found[n], WANTED) if r.task == task) for n in ("linear", "ties")]
        assert right == round(24 * (values[1] - values[0]))


def test_a_suggestion_is_a_setting_with_its_scores(mixer: Mixer) -> None:
    with pytest.warns(PlaitWarning, match="has no texts of its own"):
        (one,) = mixer.suggest(mixer.controls.start, [], WANTED)
    assert one.setting.weights == mixer.controls.start.weights
    assert 0 < one.share < 1
    assert one.worst == min(r.recovery for r in mixer.scores(one.setting, WANTED) if r.recovery is not None)


def test_runs_open_and_what_is_wrong_is_refused(place: Path, mixer: Mixer, tmp_path: Path) -> None:
    tasks = [place / "tasks" / "sort.yaml"]
    pair = {name: place / name for name in LABELS}
    plait.evaluate(pair, tasks=tasks, base=place / "base", workspace=tmp_path / "ws", method="ties", density=0.3)
    results = next((tmp_path / "ws").rglob("eval_results_*.json"))
    opened = order(place, tasks=False, source=results.parent).plan()
    assert (opened.controls.start.method, opened.controls.start.params, opened.tasks) == ("ties", {"density": 0.3}, ())
    shutil.copytree(place / "sort", tmp_path / "sort")
    merged = plait.merge({**pair, "sort": tmp_path / "sort"}, out=tmp_path / "merged", base_model=str(place / "base")).folder
    with pytest.raises(RecipeError, match=r"opens as it was made.*these are for adapters: scale"):
        order(place, tasks=False, source=[merged], settings={"scale": 2}).check()
    for moments in ("moments.safetensors", lambda name: {}):
        with pytest.raises(RecipeError, match=r"these are for adapters: moments\.$"):
            MixOrder(request=Request([merged], {}, moments=moments)).check()
    (tmp_path / "sort" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(AdapterError, match="1 of the adapters that it was made of are not what they were"):
        order(place, tasks=False, source=[merged]).check()
    for name in ("", "a/b", "..", "mix\0"):
        with pytest.raises(OutputError, match="cannot be a folder's name"):
            mixer.keep(mixer.controls.start, name)
    (mixer.out / "taken").mkdir(parents=True)
    with pytest.raises(OutputError, match="there is something already"):
        mixer.keep(mixer.controls.start, "taken")
    with pytest.raises(RecipeError, match="'auto' is what the mixer's Suggest finds"):
        order(place, settings={"scale": "auto"}).check()
    with pytest.raises(RecipeError, match=r"--port .* must be a number from 1 to 65535; got 0"):
        order(place, port=0).check()
    assert not {method.name for method in mixer.methods} & {"regmean", "regmean_sequential", "ssr"}


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (plait[mix,test]; apt-get install chromium)")
class TestPage:
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, mixer: Mixer) -> Iterator[Any]:
        from plait.mixer.server import Server

        connect, elsewhere = socket.socket.connect, list[Any]()

        def watched(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
                elsewhere.append(address)
            return connect(self, address)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "connect", watched)
            # Not gradio's first: where two look for it at the same time, one of them fails in a thread.
            with Server(mixer, port=free_port()) as found:
                yield found
        assert not elsewhere, "the server asked somebody else"

    @pytest.fixture(scope="class")
    @classmethod
    def window(cls, server: Any) -> Iterator[Any]:
        """A browser; what it logs and asks for is looked at in the end."""
        from playwright.sync_api import sync_playwright

        logged, asked = list[str](), list[str]()
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])

            def opened(query: str = "", width: int = 1280) -> Any:
                context = browser.new_context(viewport={"width": width, "height": 900})
                page = context.new_page()
                page.set_default_timeout(30000)
                page.on("console", lambda m: logged.append(m.text) if m.type in ("error", "warning") else None)
                page.on("pageerror", lambda e: logged.append(str(e)))
                page.on("request", lambda r: asked.append(r.url))
                page.goto(server.url + query)
                page.wait_for_function("location.search.includes('scale=')")
                return page

            yield opened
            browser.close()
        host = server.url.partition("?")[0]
        assert not [url for url in asked if not url.startswith((host, "data:", "blob:"))]
        assert logged == []

    def test_a_slider_changes_the_answer_and_keep_writes_what_is_answered(self, place: Path, mixer: Mixer, window: Any) -> None:
        page, other = window(), window("&weight=sort:0&weight=rate:1&scale=1", width=390)
        merge = "#answers .merge p"

        def answered(page: Any, setting: Setting) -> None:
            replies = answers(mixer, setting, Asked(PROMPT, plain=True, sampling=Sampling(48)))["merge"]
            page.wait_for_function(
                "([at, text]) => document.querySelector(at)?.textContent === text && !!document.querySelector('.mixer-tokens')",
                arg=[merge, replies.strip()],
            )

        start = mixer.controls.start
        apart = start.model_copy(update={"weights": {"sort": 0.0, "rate": 1.0}})
        moved = start.model_copy(update={"weights": {"sort": 0.25, "rate": 1.0}, "scale": 1.5})
        for one, setting in ((page, start), (other, apart)):
            one.fill("#prompt textarea", PROMPT)
            one.click("#ask")
            answered(one, setting)
        before = page.text_content(merge)
        for at, value in (("weight-sort", "0.25"), ("scale", "1.5")):
            page.fill(f"#{at} input[type=number]", value)
            page.press(f"#{at} input[type=number]", "Tab")
        page.wait_for_function("location.search.includes('scale=1.5') && location.search.includes('sort:0.25')")
        answered(page, moved)
        assert page.text_content(merge) != before
        assert mixer.controls.read(page.evaluate("location.search")) == moved, "the address holds the setting"
        page.wait_for_selector("#tasks .mixer-task[data-task=rate] .detail")
        page.click("#method input")
        page.fill("#method input", "ties")
        page.press("#method input", "Enter")
        page.fill("input[aria-label*=density]", "0.5")
        page.press("input[aria-label*=density]", "Tab")
        page.wait_for_function("location.search.includes('method=ties') && location.search.includes('density:0.5')")
        moved = moved.model_copy(update={"method": "ties", "params": {"density": 0.5}})
        answered(page, moved)
        assert other.text_content(merge) != page.text_content(merge), "another window has its own sliders"
        assert mixer.controls.read(other.evaluate("location.search")) == apart
        assert other.evaluate("document.documentElement.scrollWidth") <= 390
        page.click("#keep button")
        page.fill("#keep input, #keep textarea >> nth=0", "kept-here")
        page.click("#keep-button")
        page.wait_for_selector("#kept code")
        ids = tokenizer()([PROMPT, "rate w8 :"], return_tensors="pt").input_ids
        with plait.mixture.load([mixer.out / "kept-here"], base=place / "base") as live, torch.no_grad():
            assert torch.allclose(live.model(input_ids=ids).logits, logits(mixer, moved), atol=1e-4)

    def test_an_empty_control_is_an_error_that_is_shown(self, mixer: Mixer) -> None:
        from plait.mixer.page import Page, Person

        page, start = Page(mixer), mixer.controls.start
        rest = [1.0] * (len(LABELS) * (1 + len(mixer.controls.bands)))
        params = {"of": start.method, "values": {}}
        asking = [PROMPT, "", True, 3, 0, 1, 0]
        assert page.setting([start.method, params, 1.0, *rest]) == start
        for empty in ([start.method, params, None, *rest], [start.method, params, 1.0, *rest[:-1], None]):
            with pytest.raises(RecipeError, match=r"no setting: .*got None"):
                page.setting(empty)
            (shown, _), *_ = page._answers(Person(), "sort", *asking, *empty)
            (_, scored), *_ = page._scores(Person(), *empty)
            for text in (shown, scored, page._tokens(Person(), "sort", *asking, *empty)):
                assert "got None" in text

    def test_another_adapter_leaves_answers_alone(self, mixer: Mixer) -> None:
        from plait.mixer.page import Page, Person

        page, person, start = Page(mixer), Person(), mixer.controls.start
        answers, tokens = person.answers.begin(), person.tokens.begin()
        rest = [1.0] * (len(LABELS) * (1 + len(mixer.controls.bands)))
        values = [PROMPT, "", True, 3, 0, 1, 0, start.method, {"of": start.method, "values": {}}, 1.0, *rest]
        assert "data-kl" in page._tokens(person, "rate", *values)
        assert (answers(), tokens()) == (False, True)
        person.leave()
        assert answers()

    def test_a_suggestion_that_fails_leaves_the_others(self, mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> None:
        from plait.mixer.mixer import Suggestion
        from plait.mixer.page import Page, Person

        def suggest(*_: Any) -> Iterator[Suggestion]:
            yield Suggestion(setting=mixer.controls.start, share=0.25, worst=None, mean=None)
            raise RecipeError("no scale is nearest")

        monkeypatch.setattr(mixer, "suggest", suggest)
        rest = [1.0] * (len(LABELS) * (1 + len(mixer.controls.bands)))
        *_, last = Page(mixer)._suggested(Person(), "linear", {"of": "linear", "values": {}}, 1.0, *rest)
        assert "25.0%" in last
        assert "no scale is nearest" in last

    def test_a_public_address_that_cannot_be_had_is_an_error(self, mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> None:
        import gradio

        from plait.mixer.server import Server

        def refused(*_: Any, **__: Any) -> str:
            raise RuntimeError("no tunnel")

        closed: list[Any] = []
        close = gradio.Blocks.close
        monkeypatch.setattr(gradio.networking, "setup_tunnel", refused)
        monkeypatch.setattr(gradio.Blocks, "close", lambda self, *a, **how: closed.append(self) or close(self, *a, **how))
        with pytest.raises(OutputError, match="a public address could not be had"):
            Server(mixer, share=True)
        assert closed

    def test_without_the_token_there_is_nothing(self, server: Any) -> None:
        with pytest.raises(HTTPError, match="401") as refused:
            urlopen(re.sub("token=.", "token=", server.url))
        assert b"plait mix" in refused.value.read()
        refused.value.close()
