"""Requests that cannot be met: exit code 2, a message that says where, what and what to do, and nothing written."""

from __future__ import annotations

import json

import pytest

from plait.cli.main import main
from tests.bad_input import adapter, merge, refused, work_in
from tests.command_line import exit_code


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    return work_in(tmp_path, monkeypatch)


def test_missing_module_in_strict_mode(place, capsys):
    adapter(place / "c", modules={"layers.0.q_proj": (8, 6)})
    printed = merge(capsys, "a", "c", "--merge-mode", "strict")
    assert "merge_mode is 'strict' and 1 target modules are not in every adapter: layers.1.q_proj (not in c)" in printed
    assert "'union'" in printed


def test_common_mode_without_common_modules(place, capsys):
    adapter(place / "c", modules={"head": (8, 6)})
    assert "the adapters share none" in merge(capsys, "a", "c", "--merge-mode", "common")


@pytest.mark.parametrize("weights", ["1", "1,2,3"])
def test_weight_count(capsys, weights):
    printed = merge(capsys, "a", "b", "--weights", weights)
    assert f"{weights.count(',') + 1} numbers for 2 adapters" in printed


@pytest.mark.parametrize("density", ["0", "1.1", "-0.2", "nan"])
def test_density(capsys, density):
    printed = merge(capsys, "a", "b", "--method", "ties", "--density", density)
    assert "method.density" in printed
    assert "> 0 and <= 1" in printed


def test_unknown_method(capsys):
    printed = merge(capsys, "a", "b", "--method", "tise")
    assert "'tise'" in printed
    assert "Did you mean 'ties'?" in printed


def test_unknown_key_in_a_recipe(place, capsys):
    (place / "r.yaml").write_text("adapters: [./a, ./b]\nmethod:\n  name: ties\n  densty: 0.3\n")
    printed = merge(capsys, "r.yaml")
    assert "r.yaml:4" in printed
    assert "densty" in printed
    assert "Did you mean 'density'?" in printed


def test_all_problems_of_a_recipe_at_once(place, capsys):
    (place / "r.yaml").write_text("adapters: [./a, ./b]\nmethod: {name: ties, density: 2}\noutput: {rank: 0}\nsede: 1\n")
    printed = merge(capsys, "r.yaml")
    for part in ("method.density", "output.rank", "sede", "'seed'"):
        assert part in printed


def test_parameter_of_another_method(capsys):
    printed = merge(capsys, "a", "b", "--method", "linear", "--density", "0.3")
    assert "method.density: 'density' is not known here" in printed


def test_space_that_a_method_has_not(capsys):
    printed = merge(capsys, "a", "b", "--method", "ties_svd", "--space", "core")
    assert "space" in printed
    assert "'delta'" in printed


def test_factors_space_needs_equal_ranks(place, capsys):
    adapter(place / "c", rank=3)
    printed = merge(capsys, "a", "c", "--space", "factors")
    assert "it adds factors and needs equal ranks, but they differ in 2 modules" in printed
    assert "(a 2, c 3)" in printed
    assert "'delta'" in printed


def test_existing_output(place, capsys):
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("precious")
    assert "out exists already" in merge(capsys, "a", "b")
    assert "was not written by plait" in merge(capsys, "a", "b", "--force")
    assert (place / "out" / "mine.txt").read_text() == "precious"


def test_an_existing_output_hides_nothing_else(place, capsys):
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("precious")
    for more in ([], ["--dry-run"]):
        printed = refused(capsys, "merge", "a", "./nowhere", "-o", "out", *more)
        assert "nowhere" in printed
        assert "out exists already" in printed


def test_force_replaces_an_adapter(place):
    for _ in range(2):
        assert exit_code("merge", "a", "b", "-o", "out", "--force") == 0
    assert json.loads((place / "out" / "summary.json").read_text())["rank"] == 4


def test_output_that_is_an_input(place, capsys):
    with pytest.raises(SystemExit):
        main(["merge", "a", "b", "-o", "first"])
    capsys.readouterr()
    assert "is an input of this merge" in refused(capsys, "merge", "first", "b", "-o", "first", "--force")
    assert "was not written by plait" in refused(capsys, "merge", "a", "b", "-o", "a", "--force")


def test_output_that_is_a_file(place, capsys):
    (place / "out").write_text("x")
    assert "out exists and is not a folder" in merge(capsys, "a", "b")


@pytest.mark.parametrize("subfolder", ["../x", "sub/../../x", "/etc"])
def test_subfolder_that_climbs_out(capsys, subfolder):
    printed = merge(capsys, "a", f"org/repo@main/{subfolder}")
    assert "org/repo@main" in printed


def test_two_adapters_of_one_name(place, capsys):
    printed = merge(capsys, "x=a", "x=b")
    assert "adapters.1.name: adapters.0 is called 'x' too" in printed


def test_two_adapters_whose_files_would_be_one_elsewhere(capsys):
    """As on a Mac's disk: heads and moments are kept under adapters' names."""
    printed = merge(capsys, "xa=a", "Xa=b")
    assert "adapters.1.name: adapters.0 is called 'xa', the same name to some file systems" in printed


def test_policy_for_a_layer_that_is_not_there(capsys):
    printed = merge(capsys, "a", "b", "--set", "weights={policy: per_layer, layers: {7: 0.5}}")
    assert "weights.layers: '7' is not a layer of these adapters" in printed


def test_policy_for_a_layer_in_two_towers(place, capsys):
    modules = {"audio.layers.0.q": (4, 4), "text.layers.0.q": (4, 4)}
    adapter(place / "c", modules=modules)
    adapter(place / "d", modules=modules)
    printed = merge(capsys, "c", "d", "--set", "weights={policy: per_layer, layers: {0: 0.5}}")
    assert "'0' is a layer of 2 towers; name one of audio.layers.0, text.layers.0" in printed


def test_half_precision_that_overflows_or_vanishes(place, capsys):
    assert "overflow in float16" in merge(capsys, "a", "b", "--weights", "1e6", "1e6", "--dtype", "float16")
    assert "too small for float16 and vanish" in merge(capsys, "a", "b", "--weights", "1e-12", "1e-12", "--dtype", "float16")


def test_dense_delta_that_overflows(capsys):
    assert "overflow" in merge(capsys, "a", "b", "--weights", "3e38", "3e38", "--kind", "delta")
    printed = merge(capsys, "a", "b", "--weights", "3e38", "3e38", "--method", "magnitude_prune")
    assert "overflow" in printed


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("x" * 300, "x cannot be written: File name too long"),
        ("a/adapter_config.json/x", "a/adapter_config.json is not a folder. Choose another output."),
    ],
)
def test_outputs_that_cannot_be(capsys, out, message):
    assert message in refused(capsys, "merge", "a", "b", "-o", out)


def test_layers_that_a_method_names(capsys):
    printed = merge(
        capsys, "a", "b", "--method", "weighted_delta_n", "--set", "method.layer_task_coefficients={99: [0.3, 0.7]}"
    )
    assert "method: '99' is not a layer of these adapters; they have layers.0 to layers.1" in printed


def test_a_layer_named_twice(capsys):
    printed = merge(capsys, "a", "b", "--set", "weights={policy: per_layer, layers: {0: 0.5, layers.0: 0.7}}")
    assert "weights.layers: '0' and 'layers.0' both mean layers.0; keep one" in printed


def test_a_rank_for_a_dense_delta(capsys):
    assert "a dense delta has neither rank nor layout" in merge(capsys, "a", "b", "--kind", "delta", "--rank", "4")


def test_private_without_a_push(capsys):
    assert "--private" in merge(capsys, "a", "b", "--private")


def test_all_problems_of_flags_at_once(capsys):
    printed = merge(capsys, "a", "b", "--weights", "0.5", "--method", "tiess", "--dtype", "f32")
    for part in ("1 numbers for 2 adapters", "'tiess'", "f32"):
        assert part in printed


def test_dry_run_says_what_the_run_would(place, capsys):
    (place / "out").mkdir()
    (place / "out" / "x").write_text("x")
    assert "out exists already" in refused(capsys, "merge", "a", "b", "-o", "out", "--dry-run")


def test_weights_that_overflow(capsys):
    assert "overflow" in merge(capsys, "a", "b", "--weights", "3e38", "3e38")


def test_json_keeps_stdout_clean(capsys):
    printed = refused(capsys, "merge", "a", "b", "--method", "nope", "--json")
    assert "nope" in printed


def test_no_arguments_show_the_usage(capsys):
    assert exit_code("merge") == 2
    assert "Usage" in capsys.readouterr().err


def test_compress_needs_one_of_rank_and_energy(capsys):
    assert "either --rank (rank=) or --energy (energy=)" in refused(capsys, "compress", "a", "-o", "out")
    assert "energy" in refused(capsys, "compress", "a", "-o", "out", "--energy", "1.5")


def test_an_evaluation_names_an_output_that_exists_beside_what_else_is_wrong(capsys):
    printed = refused(capsys, "eval", "a", "b", "--tasks", "none.yaml", "--require", "worst>0.5", "-o", "a")
    assert "a exists already" in printed
    assert "worst>0.5" in printed


@pytest.mark.parametrize(
    "text",
    [
        "adapters: [./a, ./b]\n",
        "# what I merge\n---\n\nversion: 1\nadapters:\n- ./a\n",
        "\ufeffmerge_method: ties\n",
        '{"adapters": ["./a"]}',
        '"adapters":\n- ./a\n',
    ],
)
@pytest.mark.parametrize("name", ["recipe.txt", "recipe"])
def test_a_recipe_whose_name_does_not_end_like_one(name, text, place, capsys):
    (place / name).write_text(text, encoding="utf-8")
    printed = merge(capsys, name)
    assert "is taken for an adapter, and is a file of text" in printed
    assert "recipes end in .yaml, .yml or .json" in printed


@pytest.mark.parametrize("data", [b"", b"A note on this.\n", b"PK\x03\x04\0name: x", b"key: \0", b"http://example.org\n"])
def test_a_file_that_is_not_a_recipe(data, place, capsys):
    (place / "notes").write_bytes(data)
    assert "is a file. Give the folder that holds it" in merge(capsys, "notes")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["--weights", "0,0"], "every weight is 0"),
        (["--weights", "0", "-0.0", "--method", "ties"], "every weight is 0"),
        (["--set", "weights={policy: scalar, value: 0}"], "every weight is 0"),
        (["--scale", "0"], "scale is 0"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_merge_of_zeros_is_noted_once(given, what, more, capsys):
    assert exit_code("merge", "a", "b", "-o", "out", *given, *more) == 0
    printed = capsys.readouterr().err
    assert printed.count(f"note: {what}: the merged deltas are zero, and change nothing of the base model.\n") == 1


def test_one_weight_of_zero_is_a_merge_of_the_others(capsys):
    assert exit_code("merge", "a", "b", "-o", "out", "--weights", "0,1") == 0
    assert "deltas are zero" not in capsys.readouterr().err
