"""One adapter more: an earlier merge and its lock give what merging all at once gives, or say that they cannot."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import plait
from tests.adapters_on_disk import layers, read_deltas
from tests.command_line import exit_code
from tests.reference.harness import MODULES, SHAPES, adapters, assert_equal, stacks

TENSORS = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with adapters ./a … ./d, where commands run."""
    adapters(tmp_path, 4, ranks=(2, 3, 1, 2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int | str | None:
    """Run `plait merge` and return its exit code."""
    return exit_code("merge", *arguments)


def three(method, **settings):
    return plait.merge({n: f"./{n}" for n in "abc"}, method=method, out="earlier", **settings)


METHODS = {
    "linear": ("linear", {"weights": {"a": 0.7, "b": -0.2}, "scale": 1.5}),
    "uniform": ("uniform", {}),
    "ties": ({"name": "ties", "space": "core", "density": 0.4}, {"scale": 2.0}),
    "dare": ({"name": "dare_linear", "density": 0.5, "space": "knots"}, {"seed": 3}),
    "transformed": (
        "linear",
        {"transforms": ["layer_l2_normalize"], "weights": {"policy": "lines", "alpha": 0.2, "beta": 0.4}},
    ),
    "truncated": ("magmax", {"rank": 2, "dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_from_the_sources_it_is_the_merge_of_all(place, name):
    method, settings = METHODS[name]
    three(method, **settings)
    at_once = dict(settings)
    if isinstance(settings.get("weights"), dict) and "policy" not in settings["weights"]:
        at_once["weights"] = {**settings["weights"], "d": 0.5}
        more = {"weights": {"d": 0.5}}
    else:
        more = {}
    plait.merge("earlier", add={"d": "./d"}, out="more", **more)
    plait.merge({n: f"./{n}" for n in "abcd"}, method=method, out="all", **at_once)
    for file in TENSORS:
        assert (place / "more" / file).read_bytes() == (place / "all" / file).read_bytes(), file


def test_the_command_line_says_the_same_and_makes_the_same_bytes(place):
    three("ties", space="core")
    plait.merge("earlier", add={"d": "./d"}, weights=[0.5], density=0.3, out="python")
    assert run("earlier", "--add", "d=./d", "--weights", "0.5", "--density", "0.3", "-o", "shell") == 0
    for file in (*TENSORS, "plait.lock"):
        assert (place / "python" / file).read_bytes() == (place / "shell" / file).read_bytes(), file


def test_it_can_be_added_to_again_and_verified(place):
    three("linear")
    plait.merge("earlier", add=["./d"], out="more")
    adapters(place / "fifth", 1)
    plait.merge("more", add={"e": "./fifth/a"}, out="last")
    assert json.loads((place / "last" / "plait.lock").read_text())["inputs"].keys() == set("abcde")
    assert plait.verify("last").ok


def test_no_path_from_the_root_is_published(place):
    three("linear")
    plait.merge("earlier", add=["./d"], out="more")
    assert str(place) not in (place / "more" / "plait.lock").read_text()
    plait.merge("earlier", add=["./d"], from_merged=True, out="more still")
    assert str(place) not in (place / "more still" / "plait.lock").read_text()


def test_the_tree_may_move(place):
    three("ties", space="core")
    (place / "moved").mkdir()
    for name in ("a", "b", "c", "earlier"):
        shutil.move(place / name, place / "moved" / name)
    plait.merge("moved/earlier", add={"d": "./d"}, out="more")
    there = {n: f"./moved/{n}" for n in "abc"}
    plait.merge({**there, "d": "./d"}, method="ties", space="core", out="all")
    assert (place / "more" / TENSORS[0]).read_bytes() == (place / "all" / TENSORS[0]).read_bytes()


def test_sources_that_are_gone_or_changed_are_told(place, capsys):
    three("ties", space="core")
    shutil.move(place / "a", place / "elsewhere")
    config = json.loads((place / "b" / "adapter_config.json").read_text())
    (place / "b" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    assert run("earlier", "--add", "./d", "-o", "out") == 2
    message = capsys.readouterr().err
    assert "earlier: 2 of 3 sources of this merge are not what they were:" in message
    assert "- a: " in message
    assert "has other files than then (adapter_config.json)" in message
    assert (
        "Give their present places (--input a=PATH --input b=PATH), or add to the merged adapter itself (--from-merged):"
        in message
    )
    assert "with 'ties' another result than merging all at once" in message
    assert not (place / "out").exists()


def test_a_source_that_moved_is_found_where_it_is_said_to_be(place):
    three("ties", space="core")
    shutil.move(place / "a", place / "elsewhere")
    assert run("earlier", "--add", "./d", "--input", "a=elsewhere", "-o", "more") == 0
    shutil.move(place / "elsewhere", place / "a")
    plait.merge({n: f"./{n}" for n in "abcd"}, method="ties", space="core", out="all")
    assert (place / "more" / TENSORS[0]).read_bytes() == (place / "all" / TENSORS[0]).read_bytes()


@pytest.mark.parametrize("name", ["linear", "uniform", "layers", "scheduled"])
def test_from_the_merged_adapter_linear_methods_are_exact(place, name):
    method, settings = {
        **METHODS,
        "layers": ("linear", {"weights": {"policy": "per_layer", "layers": {"0": 0.5, "1": 2.0}}}),
        "scheduled": ("uniform", {"weights": {"policy": "schedule", "first": 0.5, "last": 2.0}, "scale": 0.5}),
    }[name]
    three(method, **settings)
    for gone in "abc":
        shutil.rmtree(place / gone)
    named = isinstance(settings.get("weights"), dict) and "policy" not in settings["weights"]
    result = plait.merge(
        "earlier", add={"d": "./d"}, from_merged=True, out="more", **({"weights": {"d": 0.5}} if named else {})
    )
    adapters(place / "again", 4, ranks=(2, 3, 1, 2))
    at_once = {**settings, "weights": {**settings["weights"], "d": 0.5}} if named else settings
    plait.merge({n: f"./again/{n}" for n in "abcd"}, method=method, out="all", **at_once)
    assert_equal(read_deltas(place / "more", MODULES), read_deltas(place / "all", MODULES))
    assert f"the same as merging all 4 adapters at once: {method!r} is linear." in result.record.notes


def test_from_the_merged_adapter_other_methods_say_what_they_are(place, capsys):
    three("ties", space="core")
    assert run("earlier", "--add", "d=./d", "--from-merged", "-o", "more") == 0
    message = " ".join(capsys.readouterr().err.split())
    assert (
        "note: this is 'ties' of the earlier merge and what is added, another result than that of all 4 adapters at once"
        in message
    )
    plait.merge({"earlier": "earlier", "d": "./d"}, method="ties", space="core", out="by hand")
    assert (place / "more" / TENSORS[0]).read_bytes() == (place / "by hand" / TENSORS[0]).read_bytes()


def test_what_a_truncation_lost_is_said(place):
    three("linear", rank=2)
    result = plait.merge("earlier", add=["./d"], from_merged=True, rank="auto", out="more")
    assert any("the earlier merge was truncated: what it lost is missing here too" in n for n in result.record.notes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("merge_metadata.json", lambda text: text[:-9], r"merge_metadata\.json \(damaged\): not what plait\.lock says"),
        (
            "merge_metadata.json",
            lambda text: text.replace(b'"exact"', b'"fine"'),
            r"result: 'fine' must be one of exact, trunc",
        ),
        ("adapter_model.safetensors", lambda text: text[:-1] + b"?", r"adapter_model\.safetensors \(changed\): not what"),
    ],
)
def test_a_merged_adapter_that_is_not_what_was_written_is_refused(place, name, change, message):
    three("linear")
    file = place / "earlier" / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(plait.AdapterError, match=message):
        plait.merge("earlier", add=["./d"], from_merged=True, out="more")
    assert not (place / "more").exists()


def test_a_merged_adapter_without_its_record_may_have_been_truncated(place):
    three("linear", rank=2)
    (place / "earlier" / "merge_metadata.json").unlink()
    result = plait.merge("earlier", add=["./d"], from_merged=True, rank="auto", out="more")
    assert any("whether the earlier merge was truncated is not known" in n for n in result.record.notes)


def test_weights_that_change_against_each_other_are_refused(place):
    three("linear", weights={"policy": "per_adapter", "adapters": {"a": 0.5}})
    with pytest.raises(plait.PlanError, match=r"weigh differently against each other.* Merge from the sources"):
        plait.merge(
            "earlier",
            add=["./d"],
            from_merged=True,
            out="more",
            **{"weights": {"policy": "per_adapter", "adapters": {"b": 2.0}}},
        )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a", "--add", "./d"], "a: there is no plait.lock"),
        (["nowhere", "--add", "./d"], "nowhere: there is no such folder"),
        (["a", "b", "--add", "./d"], "--add (add=) takes one earlier merge, a folder with its plait.lock; got a b"),
        (["a", "--from-merged"], "--from-merged (from_merged=) and --input (inputs=) are for --add NEW (add=)"),
        (["earlier", "--add", "d=./d", "--input", "x"], "--input x: write NAME=PATH"),
        (["earlier", "--add", "d=./d", "--input", "x=./d"], "--input x: no such input"),
        (["earlier", "--add", "a=./d"], "is called 'a' too; give names"),
        (["earlier", "--add", "./d", "--weights", "1,2"], "weights: 2 numbers for 1 adapters"),
        (["earlier", "--add", "./d", "--set", "method.densty=1"], "'densty' is not known here"),
    ],
)
def test_what_is_wrong_is_told(place, capsys, arguments, text):
    three("ties", space="core")
    assert run(*arguments, "-o", "out") == 2
    assert text in " ".join(capsys.readouterr().err.split())
    assert not (place / "out").exists()


def test_a_dry_run_tells_and_writes_nothing(place, capsys):
    three("linear")
    assert run("earlier", "--add", "d=./d", "--dry-run") == 0
    assert "--max-lora-rank 8" in capsys.readouterr().out
    assert {p.name for p in place.iterdir()} == {*"abcd", "earlier"}


def test_an_adapter_is_forgotten_by_a_negative_weight(place):
    """base + merge(+a, −b) is base + ΔWₐ − ΔW_b; adding b again gives a back."""
    plait.merge({"a": "./a", "b": "./b"}, weights=[1, -1], out="forgotten")
    deltas = stacks(adapters(place / "again", 2, ranks=(2, 3)))
    found = read_deltas(place / "forgotten", MODULES)
    assert_equal(found, {m: x[0] - x[1] for m, x in deltas.items()})
    plait.merge("forgotten", add={"again": "./b"}, from_merged=True, out="restored")
    restored = read_deltas(place / "restored", layers(2, SHAPES))
    for module, x in restored.items():
        np.testing.assert_allclose(x, deltas[module][0], atol=1e-5)
