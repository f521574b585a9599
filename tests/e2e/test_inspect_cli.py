"""`plait inspect` as a user runs it: what it prints at every width, as JSON, and when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from plait.adapters import Adapter
from plait.cli.inspect import _bars, _ruler
from plait.inspection.report import inspect_adapters
from tests.command_line import exit_code
from tests.inspected import drawing, key, linear, open_linear, write
from tests.warm import PLAIT, run_forked

SHAPES = {f"model.layers.{i}.self_attn.{m}": (24, 32) for i in range(6) for m in ("q_proj", "v_proj")}


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `plait inspect …` in a terminal of some width; return (exit code, stdout, stderr)."""

    def inspect(*arguments: object, columns: int = 100) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        code = exit_code("inspect", *arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return inspect


@pytest.fixture
def cohort(tmp_path):
    names = ("maths", "code", "law")
    return [open_linear(tmp_path / n, SHAPES, seed=i, task_type="CAUSAL_LM").folder for i, n in enumerate(names)]


def test_the_verdict_comes_first(run, cohort):
    code, out, _ = run(*cohort)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "3 adapters of org/Base"
    assert lines[2] == "✓ They can be merged: all have the same 12 target modules."
    for word in ("1 maths", "2 code", "3 law", "cosine", "overlap of A", "sign conflict", "layers of model.layers"):
        assert word in out
    assert "--max-lora-rank 8 holds each adapter; their exact sum has rank 12 and needs 16." in out


@pytest.mark.parametrize("columns", [60, 80, 100, 140, 200])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_it_fits_the_terminal(run, tmp_path, columns, count):
    names = ["a", "an-adapter-with-a-name-longer-than-any-column", "c", "d", "e", "f"][:count]
    folders = [open_linear(tmp_path / n, SHAPES, seed=i, rank=2 + i).folder for i, n in enumerate(names)]
    code, out, _ = run(*folders, columns=columns)
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= columns
    assert not any(line.endswith(" ") for line in out.splitlines())
    assert "1 a " in out


def test_json_is_one_object_and_nothing_else(run, cohort):
    code, out, _ = run(*cohort, "--json")
    assert code == 0
    adapters = [Adapter.open(folder, folder.name) for folder in cohort]
    assert json.loads(out) == inspect_adapters(adapters).model_dump(mode="json")


def test_names(run, cohort, tmp_path):
    again = open_linear(tmp_path / "again" / "maths", SHAPES, seed=7).folder
    _, out, _ = run(cohort[0], again, f"mine={cohort[1]}", cohort[0], "--json")
    assert json.loads(out)["comparison"]["names"] == ["maths", "maths-2", "mine", "maths-3"]


def test_one_adapter(run, cohort):
    code, out, _ = run(cohort[0])
    assert code == 0
    assert "1 adapter of org/Base" in out
    assert "sign conflict" not in out
    assert "--max-lora-rank 8 holds it." in out


def test_adapters_that_do_not_fit(run, tmp_path):
    one = open_linear(tmp_path / "one", SHAPES, base_model_name_or_path="org/Base").folder
    two = open_linear(tmp_path / "two", {p: (24, 64) for p in SHAPES}, base_model_name_or_path="org/Large").folder
    code, out, _ = run(one, two)
    assert code == 0  # the inspection itself succeeded
    assert "✗ They cannot be merged as they are." in out
    assert "different base models ('one': 'org/Base'; 'two': 'org/Large')" in " ".join(out.split())
    assert "✗ Shapes differ for q_proj in 6 places" in out
    assert "of 2 base models" in out
    same = open_linear(tmp_path / "same", SHAPES, base_model_name_or_path="./local").folder
    assert "They cannot be merged" in run(one, same)[1]
    assert "They can be merged" in run(one, same, "--base-id", "org/Base")[1]


def test_everything_unusual_is_shown(run, tmp_path):
    draw = drawing(0)
    tensors = linear("audio.layers.0.q", 8, 12, 4, draw) | linear("text.layers.0.q", 8, 12, 2, draw)
    tensors |= linear("lm_head", 20, 8, 4, draw) | {
        "base_model.model.score.weight": torch.ones(2, 8),
        key("text.layers.0.q", "lora_magnitude_vector"): torch.ones(8),
    }
    odd = write(tmp_path / "odd", tensors, base_model_name_or_path=None)
    plain = open_linear(tmp_path / "plain", {"text.layers.0.q": (8, 12)}).folder
    code, out, _ = run(odd, plain)
    words = " ".join(out.split())
    assert code == 0
    for word in (
        "layers of audio.layers",
        "layers of text.layers",
        "outside of layers",
        "lm_head",
        "score.weight 2×8 (head)",
        "Space 'factors' cannot be used",
        "2, 4",
        "Of odd it does not serve: DoRA; full tensors (score); scalings of 1 module",
        "1 of 3 target modules are in every adapter",
    ):
        assert word in words, word


def test_an_untrained_adapter(run, cohort):
    tensors = {k: 0 * v for k, v in load_file(cohort[0] / "adapter_model.safetensors").items()}
    fresh = write(cohort[0].parent / "fresh", tensors)
    assert "12 of 12 modules have a zero delta" in " ".join(run(fresh)[1].split())
    code, out, _ = run(fresh, cohort[1])
    assert code == 0
    assert "nothing here" in out


def test_names_are_no_markup(run, tmp_path):
    folder = open_linear(tmp_path / "x", SHAPES, base_model_name_or_path="org/[red]Base[/red]").folder
    assert "org/[red]Base[/red]" in run(folder)[1]


def test_all_references_that_lead_nowhere_are_named(run, cohort, tmp_path):
    code, out, err = run(cohort[0], tmp_path / "no", tmp_path / "nor")
    assert code == 2
    assert out == ""
    assert "2 problems" in err
    assert "/no'" in err
    assert "/nor'" in err
    (cohort[1] / "adapter_model.safetensors").write_bytes(b"short")
    code, out, err = run(*cohort)
    assert code == 2
    assert "not a safetensors file" in err
    assert "Traceback" not in err


def test_a_diverged_adapter(run, tmp_path):
    tensors = {k: v * torch.inf for k, v in linear("layers.0.q", 8, 8, 2, drawing(0)).items()}
    code, out, err = run(write(tmp_path / "bad", tensors, r=2))
    assert code == 2
    assert out == ""
    assert "'bad'" in err


def test_without_unicode(cohort):
    program = f"import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')\n{PLAIT}"
    done = run_forked(program, "inspect", *map(str, cohort), environment={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert "+ They can be merged" in done.stdout
    assert "* They do different things" in done.stdout
    assert "?" not in done.stdout


def test_help_does_not_load_torch():
    code = (
        "import sys; sys.argv = ['plait', 'inspect', '--help']\n"
        "from plait.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'plait.inspection.report' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "COLUMNS": "140"}, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"[name=]FOLDER or [name=]org/repo[@revision][/subfolder]." in done.stdout
    assert done.stderr == b""


class TestStrips:
    def test_heights(self):
        assert _bars([0, 1, 2, 3, 4, 5, 6, 7, 8], 0, 8, 9) == "▁▂▃▄▅▆▇██"

    def test_small_differences_stay_small(self):
        assert _bars([99, 100], 99, 100, 2) == "██"
        assert _bars([50, 100], 50, 100, 2) == "▁█"

    def test_room(self):
        assert _bars([0, 8], 0, 8, 100) == "▁▁▁███"
        assert _bars([0, 8], 0, 8, 5) == "▁▁██"
        assert _bars([0, 8, 8, 8], 0, 8, 2) == "▅█"
        assert _bars([0, None], 0, 8, 2) == "▁ "
        assert _bars([0, 0], 0, 0, 2) == "▁▁"

    @pytest.mark.parametrize(("count", "width"), [(1, 80), (2, 80), (12, 80), (30, 60), (30, 40), (61, 60), (126, 60)])
    def test_ruler(self, count, width):
        line = _ruler(list(range(count)), width)
        numbers = [int(word) for word in line.split()]
        assert numbers[0] == 0
        assert numbers == sorted(numbers)
        assert numbers[-1] == count - 1 or count < 3
        repeat, per_cell = (min(3, width // count), 1) if count <= width else (1, -(-count // width))
        for number in numbers:
            at = f" {line} ".index(f" {number} ")
            assert at == number // per_cell * repeat
