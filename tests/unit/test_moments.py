"""Second moments: their files, the ways to give them, and everything that can be wrong with them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import plait
from plait.adapters.adapter import Adapter
from plait.cli.main import app
from plait.errors import AdapterError, OutputError, PlanError, RecipeError
from plait.linalg.inputs import InputRows
from plait.linalg.solve import RidgeSystem
from plait.merging.moments import MomentsFile, MomentsOrigin, write_moments
from plait.recipes.request import read_request
from tests.adapters_on_disk import Embedding, Linear, layers, write_adapter
from tests.every import every

MODULES = layers(2, {"q_proj": (6, 5)})
PATHS = sorted(MODULES)


def gram(seed: int = 0, d_in: int = 5) -> torch.Tensor:
    x = torch.randn(20, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.mT @ x / len(x)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    return {n: write_adapter(tmp_path / n, MODULES, r=2, alpha=4.0, seed=s).folder for s, n in enumerate("ab")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for s, name in enumerate("ab"):
        plait.save_moments(tmp_path / "moments" / f"{name}.safetensors", {m: gram(s) for m in PATHS})
    return tmp_path / "moments"


def change(folder: Path, module: str, value: torch.Tensor | None) -> None:
    """Put something else into a's file, without the checks of `save_moments`."""
    tensors = load_file(folder / "a.safetensors")
    del tensors[module]
    save_file({**tensors, **({} if value is None else {module: value})}, folder / "a.safetensors")


def merge(sources, tmp_path, **settings):
    return plait.merge(sources, out=tmp_path / "out", **{"method": "regmean", **settings})


def weights(result) -> bytes:
    return (result.folder / "adapter_model.safetensors").read_bytes()


def test_a_file_holds_what_was_saved(folder):
    tensors = load_file(folder / "a.safetensors")
    assert sorted(tensors) == PATHS
    assert torch.equal(tensors[PATHS[0]], gram(0).float())


def test_folder_files_function_recipe_and_flag_make_the_same_bytes(sources, folder, tmp_path):
    first = weights(merge(sources, tmp_path, moments=folder))
    files = {n: folder / f"{n}.safetensors" for n in sources}
    assert weights(plait.merge(sources, out=tmp_path / "1", method="regmean", moments=files)) == first

    def function(adapter, module):
        return load_file(files[adapter])[module]

    assert weights(plait.merge(sources, out=tmp_path / "2", method="regmean", moments=function)) == first
    entries = [{"name": n, "path": str(p), "moments": f"moments/{n}.safetensors"} for n, p in sources.items()]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"version": 1, "adapters": entries, "method": "regmean"}))
    assert weights(plait.merge(recipe, out=tmp_path / "3")) == first
    arguments = ["merge", *(f"{n}={p}" for n, p in sources.items()), "--method", "regmean", "--moments", str(folder)]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "4")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "4" / "adapter_model.safetensors").read_bytes() == first


def test_moments_of_a_folder_go_before_those_of_the_recipe(sources, folder, tmp_path, monkeypatch):
    entries = [{"name": n, "path": str(p), "moments": "nowhere"} for n, p in sources.items()]
    (tmp_path / "elsewhere").mkdir()
    recipe = tmp_path / "elsewhere" / "recipe.json"
    recipe.write_text(json.dumps({"version": 1, "adapters": entries, "method": "regmean"}))
    monkeypatch.chdir(tmp_path)
    assert plait.plan(recipe, moments="moments").method == "regmean"


def test_the_lock_holds_their_digests(sources, folder, tmp_path):
    import hashlib

    lock = json.loads((merge(sources, tmp_path, moments=folder).folder / "plait.lock").read_text())
    for name in sources:
        data = (folder / f"{name}.safetensors").read_bytes()
        assert lock["inputs"][name]["moments"]["sha256"] == hashlib.sha256(data).hexdigest()
        assert (tmp_path / "out" / lock["inputs"][name]["moments"]["path"]).resolve() == folder / f"{name}.safetensors"


def test_a_plan_promises_the_same_bytes_for_files_only(sources, folder):
    assert plait.plan(sources, method="regmean", moments=folder).promises["deterministic"]
    assert not plait.plan(sources, method="regmean", moments=lambda adapter, module: gram()).promises["deterministic"]


def test_a_function_is_not_asked_before_it_is_needed_nor_changed(sources, tmp_path):
    asked, given = [], {m: gram() for m in PATHS}

    def function(adapter, module):
        asked.append((adapter, module))
        return given[module]

    plait.plan(sources, method="regmean", moments=function)
    assert not asked
    merge(sources, tmp_path, moments=function, workers=1)
    assert sorted(asked) == sorted((n, m) for n in sources for m in PATHS)
    assert all(torch.equal(x, gram()) for x in given.values())


def test_none_given(sources):
    for method in ("regmean", "ssr"):
        with pytest.raises(PlanError, match=f"{method}.*needs second moments.*--moments FOLDER.*save_moments"):
            plait.plan(sources, method=method)
    assert plait.plan(sources, method="wudi").method == "wudi"


def test_given_for_some_only(sources, folder):
    with pytest.raises(PlanError, match="given for a, not for b; all need them"):
        plait.plan(sources, method="regmean", moments={"a": folder / "a.safetensors"})


def test_given_for_an_adapter_that_is_not_there(sources, folder):
    with pytest.raises(RecipeError, match="moments: 'c' is not an adapter of this merge; there are a, b"):
        plait.plan(sources, method="regmean", moments={"c": folder / "a.safetensors"})


def test_a_recipe_holds_no_function(sources):
    for given in (5, gram):
        with pytest.raises(RecipeError, match=r"moments: .* is neither a folder nor a mapping of names to files"):
            read_request(None, sources, {"moments": given})


def test_missing_and_broken_files_are_named_together(sources, folder):
    (folder / "a.safetensors").unlink()
    (folder / "b.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(AdapterError) as caught:
        plait.plan(sources, method="regmean", moments=folder)
    for words in ("moments of 'a'", "No such file", "moments of 'b'", "save_moments"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "missing"), (torch.eye(4), r"\[4, 4\]"), (torch.ones(5), r"\[5\]"), (torch.ones(5, 6), r"\[5, 6\]")],
)
def test_shapes_are_known_before_running(sources, folder, value, words):
    change(folder, PATHS[1], value)
    with pytest.raises(PlanError, match=rf"a.safetensors: moments of 1 target modules do not fit: .*{words}, needs \[5, 5\]"):
        plait.plan(sources, method="regmean", moments=folder)


BAD = {
    "not finite": torch.eye(5).index_put((torch.tensor([1]), torch.tensor([2])), torch.tensor(torch.nan)),
    "not symmetric": torch.eye(5).index_put((torch.tensor([1]), torch.tensor([2])), torch.tensor(0.5)),
    "negative values on the diagonal": torch.diag(torch.tensor([1.0, 1, 1, 1, -1])),
}


@pytest.mark.parametrize("words", BAD)
def test_values_are_checked_when_they_are_read(sources, folder, tmp_path, words):
    change(folder, PATHS[1], BAD[words])
    with pytest.raises(AdapterError, match=f"moments of 'a', {PATHS[1]}: .*{words}"):
        merge(sources, tmp_path, moments=folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", BAD)
def test_values_are_checked_when_they_are_saved(tmp_path, words):
    with pytest.raises(AdapterError, match=f"moments of q: .*{words}"):
        plait.save_moments(tmp_path / "x.safetensors", {"q": BAD[words]})
    assert not list(tmp_path.iterdir())


def inputs(seed: int, tokens: int, d_in: int = 5) -> InputRows:
    return InputRows(torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@pytest.mark.parametrize("method", ["regmean", "ssr"])
@pytest.mark.parametrize("tokens", [(1, 2), (2, 7)])  # fewer together than inputs have entries, and more
def test_inputs_in_place_of_the_matrix_merge_alike(sources, tmp_path, method, tokens):
    rows = {n: {m: inputs(s, t) for m in PATHS} for (s, n), t in zip(enumerate("ab"), tokens, strict=True)}
    for name, found in rows.items():
        plait.save_moments(tmp_path / "rows" / f"{name}.safetensors", found)
    one = plait.merge(sources, out=tmp_path / "1", method=method, moments=tmp_path / "rows", kind="delta")
    two = plait.merge(sources, out=tmp_path / "2", method=method, moments=lambda a, m: rows[a][m].dense(), kind="delta")
    for name, delta in load_file(one.folder / "delta.safetensors").items():
        torch.testing.assert_close(delta, load_file(two.folder / "delta.safetensors")[name], rtol=1e-5, atol=1e-6)


@every("off_diagonal", [0.0, 0.9, 1.0])
@every("ridge", [0.0, 1e-2, 10.0])
def test_the_solution_from_rows_is_that_from_matrices_to_round_off(off_diagonal, ridge):
    """Woodbury against Cholesky of all n columns, float64."""
    one, two = RidgeSystem(40), RidgeSystem(40)
    for seed, tokens in enumerate((5, 1, 12)):
        rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(9 + seed), dtype=torch.float64)
        found = inputs(seed, tokens, 40)
        gram = found.dense() * off_diagonal
        gram.diagonal().copy_(found.dense().diagonal())
        one.add(rows, found.damped(off_diagonal))
        two.add(rows, gram)
    torch.testing.assert_close(one.solve(ridge), two.solve(ridge), rtol=1e-8, atol=1e-9)


def test_no_square_matrix_is_made_of_few_rows(monkeypatch):
    monkeypatch.setattr(RidgeSystem, "_dense", lambda self: pytest.fail("an n x n matrix was made"))
    system = RidgeSystem(10)
    system.add(torch.ones(2, 10, dtype=torch.float64), inputs(0, 4, 10).damped(0.9))
    system.add(torch.ones(2, 10, dtype=torch.float64), inputs(1, 5, 10).damped(0.9))
    assert system.solve(0.01).shape == (4, 10)


def test_zero_rows_leave_the_mean():
    system = RidgeSystem(10)
    system.add(torch.ones(2, 10, dtype=torch.float64), InputRows(torch.zeros(3, 10)).damped(0.9))
    assert torch.equal(system.solve(0.01), torch.ones(2, 10, dtype=torch.float64))


def test_what_modules_share_is_stored_once(tmp_path):
    shared, own = inputs(0, 3), gram()
    plait.save_moments(tmp_path / "x.safetensors", {"q": shared, "k": shared, "v": own, "o": own})
    assert sorted(load_file(tmp_path / "x.safetensors")) == ["q:rows", "v"]
    file = MomentsFile(tmp_path / "x.safetensors")
    assert torch.equal(file.read("k", None).x, shared.x)
    assert torch.equal(file.read("o", None), own.float())
    assert file.read("up", None) is None


@pytest.mark.parametrize(
    ("rows", "words"),
    [(torch.ones(2, 4), "rows, needs .* or rows of 5"), (torch.ones(0, 5), "rows"), (torch.ones(2, 3, 5), "rows")],
)
def test_rows_of_another_shape_are_refused_before_running(sources, folder, rows, words):
    change(folder, PATHS[1], None)
    save_file({**load_file(folder / "a.safetensors"), f"{PATHS[1]}:rows": rows}, folder / "a.safetensors")
    with pytest.raises(PlanError, match=words):
        plait.plan(sources, method="regmean", moments=folder)


def test_rows_that_are_not_finite_are_refused(sources, folder, tmp_path):
    change(folder, PATHS[1], None)
    rows = torch.full((2, 5), torch.inf)
    save_file({**load_file(folder / "a.safetensors"), f"{PATHS[1]}:rows": rows}, folder / "a.safetensors")
    with pytest.raises(AdapterError, match=f"a.safetensors: moments of 'a', {PATHS[1]}: .*not finite"):
        merge(sources, tmp_path, moments=folder)


def test_moments_of_another_adapter_are_refused(sources, folder):
    origin = MomentsOrigin(adapter="0" * 64, base="b", texts={"t": "d"}, tokens=9, sampled=0, key="k", plait="0")
    write_moments(folder / "b.safetensors", {m: gram() for m in PATHS}, origin)
    with pytest.raises(AdapterError, match=r"moments of 'b': .*b.safetensors was taken of another adapter.*plait calibrate"):
        plait.plan(sources, method="regmean", moments=folder)
    own = origin.model_copy(update={"adapter": Adapter.open(sources["b"], "b").sha256()})
    write_moments(folder / "b.safetensors", {m: gram() for m in PATHS}, own)
    assert plait.plan(sources, method="regmean", moments=folder).method == "regmean"


@pytest.mark.parametrize("metadata", [{"plait.shared": "[1]"}, {"plait.shared": "{"}, {"plait.origin": '{"adapter": 3}'}])
def test_metadata_that_is_not_that_of_moments_is_refused(sources, folder, metadata):
    save_file(load_file(folder / "a.safetensors"), folder / "a.safetensors", metadata)
    with pytest.raises(AdapterError, match=r"a\.safetensors"):
        plait.plan(sources, method="regmean", moments=folder)


def test_memory_of_rows_is_in_the_plan(tmp_path):
    modules = {"layers.0.q_proj": Linear(8, 300)}
    sources = {n: write_adapter(tmp_path / n, modules, r=2, alpha=4.0, seed=s).folder for s, n in enumerate("ab")}
    for name in sources:
        plait.save_moments(tmp_path / "m" / f"{name}.safetensors", {"layers.0.q_proj": inputs(0, 4, 300)})
    with_moments = plait.plan(sources, method="ssr", moments=tmp_path / "m").peak_bytes
    assert with_moments - plait.plan(sources, method="wudi").peak_bytes == 4 * (6 * 8 * 300 + 4 * 8**2)


def test_what_is_no_matrix_is_not_saved(tmp_path):
    for value in (torch.ones(3, 4), torch.ones(3), torch.tensor(1.0)):
        with pytest.raises(AdapterError, match="moments of q: the shape is"):
            plait.save_moments(tmp_path / "x.safetensors", {"q": value})


def test_a_file_is_not_replaced(folder):
    with pytest.raises(OutputError, match=r"a.safetensors exists"):
        plait.save_moments(folder / "a.safetensors", {"q": torch.eye(3)})


@pytest.mark.parametrize("method", ["regmean", "ssr"])
def test_an_indefinite_matrix_is_refused(sources, tmp_path, method):
    negative = torch.eye(5) - torch.ones(5, 5)  # diagonal 0, eigenvalue −4
    with pytest.raises(PlanError, match="not positive semidefinite"):
        merge(sources, tmp_path, method=method, ridge=1e-6, moments=lambda adapter, module: negative)


@pytest.mark.parametrize("method", ["regmean", "ssr"])
def test_an_indefinite_matrix_is_refused_with_its_file(sources, folder, tmp_path, method):
    change(folder, PATHS[0], 1e3 * (torch.eye(5) - torch.ones(5, 5)))
    with pytest.raises(PlanError, match=rf"moments/a\.safetensors: {re.escape(PATHS[0])}: its second moments are not positive"):
        merge(sources, tmp_path, method=method, ridge=1e-6, moments=folder)


def test_a_function_that_has_none_of_a_module_is_refused(sources, tmp_path):
    why = f"moments of 'b', {PATHS[0]}: there are none, and the adapter has the module.*give a task whose texts do"
    with pytest.raises(AdapterError, match=why):
        merge(sources, tmp_path, moments=lambda adapter, module: gram() if adapter == "a" else None)


def test_embeddings_have_no_moments(tmp_path):
    modules = {**MODULES, "embed_tokens": Embedding(9, 5)}
    sources = {n: write_adapter(tmp_path / n, modules, r=2, alpha=4.0, seed=s).folder for s, n in enumerate("ab")}
    with pytest.raises(PlanError, match="embed_tokens: the inputs of an embedding are tokens"):
        plait.plan(sources, method="regmean", moments=lambda adapter, module: gram())


def test_a_method_that_needs_none_says_that_they_change_nothing(sources, folder):
    assert any("no second moments" in note for note in plait.plan(sources, moments=folder).notes)
    assert not any("moments" in note for note in plait.plan(sources, method="regmean", moments=folder).notes)


def test_memory_of_the_matrices_is_in_the_plan(tmp_path):
    modules = {"layers.0.q_proj": Linear(8, 300)}
    sources = {n: write_adapter(tmp_path / n, modules, r=2, alpha=4.0, seed=s).folder for s, n in enumerate("ab")}
    with_moments = plait.plan(sources, method="ssr", moments=lambda adapter, module: gram(0, 300)).peak_bytes
    assert with_moments - plait.plan(sources, method="wudi").peak_bytes == 6 * 4 * 300**2


def test_adapters_of_one_initialisation_are_named_in_the_plan(tmp_path):
    rng = np.random.default_rng(0)
    big = layers(4, {"q_proj": (30, 40)})
    common = {m: rng.normal(size=(2, 40)).astype(np.float32) for m in big}
    sources = {}
    for name in "abc":
        values = {m: Linear(30, 40, values=(common[m], rng.normal(size=(30, 2)).astype(np.float32))) for m in big}
        written = write_adapter(tmp_path / name, values if name != "c" else big, r=2, alpha=2.0, seed=3)
        sources[name] = written.folder
    notes = plait.plan(sources, method="wudi").notes
    assert any("A matrices of a + b span nearly the same space" in note for note in notes)
    assert not any("span nearly" in note for note in plait.plan(sources, method="linear").notes)
    assert not any("span nearly" in note for note in plait.plan({n: sources[n] for n in "bc"}, method="wudi").notes)


def test_a_raised_ridge_is_in_the_run_record(tmp_path):
    rng = np.random.default_rng(0)
    common = rng.normal(size=(2, 12))
    sources = {}
    for name in "ab":
        values = (common + 1e-4 * rng.normal(size=(2, 12)), rng.normal(size=(9, 2)))
        module = Linear(9, 12, values=tuple(v.astype(np.float32) for v in values))
        sources[name] = write_adapter(tmp_path / name, {f"layers.{i}.q_proj": module for i in range(3)}, r=2, alpha=2.0).folder
    raised = merge(sources, tmp_path, method="wudi", ridge=1e-9).record.notes
    assert any("ridge was raised" in note and "3 target modules, such as layers.0.q_proj" in note for note in raised)
    kept = plait.merge(sources, out=tmp_path / "kept", method="wudi", ridge=1.0).record.notes
    assert not any("raised" in note for note in kept)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file({f"{m}.weight": torch.zeros(6, 5) for m in PATHS}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": false}')
    return tmp_path / "base"


def model(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_bake_takes_them_as_a_merge_does(sources, folder, base, tmp_path):
    """On a base of zeros the model is the merged delta; every way to give the moments makes the same bytes."""
    merged = plait.merge(sources, method="regmean", moments=folder, kind="delta", out=tmp_path / "delta").folder
    settings = {"method": "regmean", "base": base}
    baked = plait.bake(sources, **settings, moments=folder, out=tmp_path / "1").folder
    deltas = load_file(merged / "delta.safetensors")
    for name, tensor in model(baked).items():
        delta = next(d for n, d in deltas.items() if n.removesuffix(".weight") == name.removesuffix(".weight"))
        torch.testing.assert_close(tensor, delta, rtol=1e-6, atol=1e-7)
    first = (baked / "model.safetensors").read_bytes()
    files = {n: load_file(folder / f"{n}.safetensors") for n in sources}
    again = plait.bake(sources, **settings, moments=lambda adapter, module: files[adapter][module], out=tmp_path / "2").folder
    arguments = ["bake", *(f"{n}={p}" for n, p in sources.items()), "--method", "regmean", "--moments", str(folder)]
    done = CliRunner().invoke(app, [*arguments, "--base-id", str(base), "-o", str(tmp_path / "3")])
    assert done.exit_code == 0, done.output
    assert [(f / "model.safetensors").read_bytes() for f in (again, tmp_path / "3")] == [first, first]
    plain = plait.bake(sources, base=base, out=tmp_path / "linear").folder
    assert (plain / "model.safetensors").read_bytes() != first


def test_the_lock_of_a_bake_holds_their_digests_and_rebuilds(sources, folder, base, tmp_path):
    import hashlib

    baked = plait.bake(sources, method="regmean", base=base, moments=folder, out=tmp_path / "out").folder
    lock = json.loads((baked / "plait.lock").read_text())
    for name in sources:
        digest = hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()
        assert lock["inputs"][name]["moments"]["sha256"] == digest
    assert plait.verify(baked).ok
    change(folder, PATHS[0], gram(9).float())
    found = plait.verify(baked)
    assert not found.ok
    assert [(i.name, i.state) for i in found.inputs if i.state != "equal"] == [("a", "changed")]


def test_a_bake_without_them_is_refused(sources, base, tmp_path):
    with pytest.raises(PlanError, match="needs second moments"):
        plait.bake(sources, method="regmean", base=base, out=tmp_path / "out")


@pytest.mark.parametrize("by_function", [False, True])
def test_other_moments_do_not_take_up_what_was_baked_with_these(sources, folder, base, tmp_path, monkeypatch, by_function):
    from plait.baking.journal import BakeJournal

    publish = BakeJournal.publish

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    moments = (lambda adapter, module: gram(3)) if by_function else folder
    monkeypatch.setattr(BakeJournal, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plait.bake(sources, method="regmean", base=base, moments=moments, out=tmp_path / "out")
    monkeypatch.setattr(BakeJournal, "publish", publish)
    assert list((tmp_path / ".out.baking" / "model").glob("*.safetensors"))
    for name in PATHS:
        change(folder, name, gram(7).float())
    moments = (lambda adapter, module: gram(4)) if by_function else folder
    result = plait.bake(sources, method="regmean", base=base, moments=moments, out=tmp_path / "out")
    assert result.record.resumed == ()
