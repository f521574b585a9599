"""What `import plait` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import plait
from plait.recipes.writing import to_yaml
from plait.testing import cohort


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_public_names() -> None:
    assert plait.__all__ == [
        "METHODS", "SPACES", "Adapter", "AdapterError", "AddressError", "Evaluation", "Inspection", "LowRank", "MergePlan",
        "MergeResult", "MissingPackageError", "NotebookProgress", "OutputError", "PlaitError", "PlanError", "Recipe",
        "RecipeError", "ReportError", "Session", "TaskError", "ask", "bake", "calibrate", "check_tasks", "compress",
        "convert", "evaluate", "evaluator", "extract", "inspect", "load_recipe", "merge", "migrate_recipe", "mix", "plan",
        "plan_bake", "push", "report", "save_moments", "sft", "sweep", "sweep_status", "train", "tune", "unbake", "verify",
        "__version__",
    ]  # fmt: skip
    for name in plait.__all__:
        assert getattr(plait, name) is not None
    assert set(dir(plait)) == set(plait.__all__)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mrege'"):
        plait.mrege  # noqa: B018


def test_importing_plait_imports_no_torch() -> None:
    assert run("import plait, sys; print({'numpy', 'torch'} & {*sys.modules})") == "set()\n"


def test_commands_that_compute_nothing_import_neither_torch_nor_numpy(tmp_path) -> None:
    """torch takes a second and 200 MB."""
    cohort([(6, 4)], [2, 2]).save(tmp_path)
    sources = [str(tmp_path / name) for name in ("adapter0", "adapter1")]
    recipe, merged = str(tmp_path / "recipe.yaml"), str(tmp_path / "merged")
    plait.merge(sources, out=merged)
    Path(recipe).write_text(to_yaml({"adapters": sources, "method": "ties"}), encoding="utf-8")
    commands = [
        ["--help"],
        ["merge", "--help"],
        ["methods"],
        ["methods", "ties"],
        ["recipe", "schema"],
        ["recipe", "check", recipe],
        ["recipe", "migrate", recipe],
        ["merge", "--dry-run", *sources, "--method", "ties"],
        ["merge", "--dry-run", recipe],
        ["verify", merged, "--no-rebuild"],
    ]
    code = (
        "import sys\nfrom plait.cli.main import main\n"
        f"for words in {commands!r}:\n"
        "    try: main(words)\n"
        "    except SystemExit as left:\n"
        "        print(f'left {words[:2]}', left.code, sorted({'numpy', 'torch'} & {*sys.modules}))"
    )
    left = [line for line in run(code).splitlines() if line.startswith("left ")]
    assert left == [f"left {words[:2]} 0 []" for words in commands]


def test_a_merge_imports_no_package_above_its_own_and_mixture_is_imported_on_first_use(tmp_path) -> None:
    """A merge is over in a second or two, and every package that is imported costs a part of that."""
    cohort([(6, 4)], [2, 2]).save(tmp_path)
    adapters = [str(tmp_path / name) for name in ("adapter0", "adapter1")]
    code = f"import plait, sys; plait.merge({adapters!r}, out={str(tmp_path / 'out')!r}); print(*sys.modules)"
    modules, used = run(f"{code}; print(plait.mixture.load.__module__, plait.mixture.Mixture.__name__)").splitlines()
    imported = {name.split(".")[1] for name in modules.split() if name.startswith("plait.")}
    assert {"merging", "recipes", "methods"} <= imported
    assert used.startswith("plait.mixture")
    assert not imported & {"baking", "verification", "mixture", "tasks", "evaluation", "reports", "training", "cli", "testing"}


def test_the_error_tree_is_documented() -> None:
    from plait import errors

    for name in ("AdapterError", "AddressError", "MissingPackageError", "OutputError", "PlanError", "RecipeError"):
        assert issubclass(getattr(errors, name), errors.PlaitError)
        assert name in (errors.__doc__ or "")


def test_garbage_is_looked_for_but_while_libraries_are_imported() -> None:
    """Training that leaves cycles behind would fill the memory."""
    code = (
        "import gc, sys\nimport plait.cli.main as cli\nfrom plait.__main__ import main\nfrom plait.deferred import torch\n"
        "cli.main = lambda: print(gc.isenabled(), gc.get_freeze_count() > 0, torch.float32, gc.isenabled())\nmain()"
    )
    assert run(code) == "True True torch.float32 True\n"
    assert run("import gc\nfrom plait.deferred import torch\ngc.disable()\ntorch.float32\nprint(gc.isenabled())") == "False\n"
