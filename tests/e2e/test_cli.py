"""The command line as people and scripts meet it."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
from rich.cells import cell_len

from plait import __version__
from plait.cli.evaluate import show_evaluation
from plait.cli.main import _join_lists
from plait.evaluation.record import Evaluation
from plait.methods import METHODS
from plait.notices import forget_announcements
from plait.verification.publish import PushResult
from tests.command_line import exit_code
from tests.every import every

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "adapters"
PAIR = [f"sentiment={DEMO / 'sentiment'}", f"langid={DEMO / 'langid'}"]


def run(capsys, *arguments: object, code: int = 0) -> tuple[str, str]:
    left = exit_code(*arguments)
    message = capsys.readouterr()
    assert left == code, message.err
    return message.out, message.err


def test_version(capsys):
    assert run(capsys, "--version")[0] == f"plait {__version__}\n"


@pytest.mark.parametrize("command", [[], ["merge"], ["inspect"], ["compress"], ["methods"], ["recipe"], ["recipe", "migrate"]])
def test_help(capsys, command):
    out, _ = run(capsys, *command, "--help")
    assert "Usage" in out


def test_dry_run_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, _ = run(capsys, "merge", *PAIR, "--method", "ties", "--dry-run", "-o", "out")
    assert "mlp.down_proj" in out
    assert "rank 16 of 576" in out
    assert "210 target modules · truncated to rank 16" in out
    assert "--max-lora-rank 16" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("command", [["methods"], ["methods", "ties"], ["merge", *PAIR, "--method", "ties", "--dry-run"]])
def test_lines_in_a_pipe_fit_and_end_where_their_text_ends(capsys, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", columns)
    lines = run(capsys, *command)[0].splitlines()
    assert max(map(cell_len, lines)) <= int(columns)
    assert not [line for line in lines if line.endswith(" ")]
    assert not [line for line in lines if line.startswith(("j (", "(30)"))], "module names are on one line"


def test_a_path_is_shown_whole_whatever_is_in_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path / "a [bold] folder with a long name"
    assert f" → {folder}\n" in run(capsys, "compress", DEMO / "langid", "--rank", "2", "-o", folder)[0]


def test_compress_takes_a_share_of_the_energy_either_way(capsys, tmp_path):
    for name, flags in (("a", ["--rank", "energy:0.9"]), ("b", ["--energy", "0.9"])):
        run(capsys, "compress", DEMO / "langid", *flags, "-o", tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_dry_run_for_machines(capsys):
    out, _ = run(capsys, "merge", *PAIR, "--weights", "0.7", "-0.3", "--dry-run", "--json")
    plan = json.loads(out)
    assert plan["result"] == "exact"
    assert plan["rank"] == 16
    assert len(plan["modules"]) == 210
    assert plan["modules"][0]["weights"] == {"sentiment": 0.7, "langid": -0.3}
    assert plan["output_bytes"] == 19537920
    assert plan["peak_bytes"] > 0


def test_the_plan_tells_the_size_to_the_byte(capsys, tmp_path):
    out, _ = run(capsys, "merge", *PAIR, "--rank", "4", "--dtype", "bfloat16", "--dry-run", "--json")
    run(capsys, "merge", *PAIR, "--rank", "4", "--dtype", "bfloat16", "-o", tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert json.loads(out)["output_bytes"] == file.stat().st_size - 8 - header


def test_what_is_missing_where(capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "part"
    folder.mkdir()
    tensors = load_file(DEMO / "langid" / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "q_proj" in k}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((DEMO / "langid" / "adapter_config.json").read_text())
    out, _ = run(capsys, "merge", PAIR[0], f"part={folder}", "--dry-run")
    assert "not in part: 180 modules" in " ".join(out.split())
    out, _ = run(capsys, "merge", PAIR[0], f"part={folder}", "--dry-run", "--merge-mode", "common")
    assert "left out (merge_mode common): 180 modules" in " ".join(out.split())


def test_merge_for_people_and_for_machines(capsys, tmp_path):
    out, err = run(capsys, "merge", *PAIR, "-o", tmp_path / "a")
    assert "exact: the factors hold the complete merge" in out
    assert "merge: 210 steps" in err, "no bar where there is no terminal"
    out, _ = run(capsys, "merge", *PAIR, "--method", "svd", "-o", tmp_path / "b", "--json")
    record = json.loads(out)
    assert record["folder"] == str(tmp_path / "b")
    assert record["result"] == "truncated"
    assert 0.5 < record["lowest_kept"] <= record["kept"] < 1
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["energy_kept"] == record["kept"]


def test_list_of_methods(capsys):
    out, _ = run(capsys, "methods")
    assert all(name in out for name in METHODS)
    out, _ = run(capsys, "methods", "--json")
    assert [m["name"] for m in json.loads(out)["methods"]] == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_one_method(capsys, name):
    out, _ = run(capsys, "methods", name)
    assert name in out
    out, _ = run(capsys, "methods", name, "--json")
    described = json.loads(out)
    assert described["summary"]
    assert described["equation"]
    assert all(p["description"] and p["allowed"] for p in described["parameters"])
    assert set(described["exactness"]) == set(described["spaces"])


def test_unknown_method_is_named(capsys):
    _, err = run(capsys, "methods", "tise", code=2)
    assert "Did you mean 'ties'?" in err


def test_recipe_schema_and_check(capsys, tmp_path):
    out, _ = run(capsys, "recipe", "schema")
    assert "$schema" in json.loads(out)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("adapters: [a=./a, b=./b]\nmethod: ties\n")
    out, _ = run(capsys, "recipe", "check", recipe)
    assert "valid. ties of a, b in delta space" in " ".join(out.split())
    out, _ = run(capsys, "recipe", "check", recipe, "--json")
    assert json.loads(out)["method"]["zero_sign"] == "drop"


def test_recipe_migrate(capsys, tmp_path):
    old = tmp_path / "old.yaml"
    old.write_text("adapters: [./a, ./b]\nmethod: ties\nmethod_params: {k: 30, lambda: 1.5}\n")
    out, err = run(capsys, "recipe", "migrate", old)
    assert "density: 0.3" in out
    assert "scale: 1.5" in out
    assert "note" in err
    run(capsys, "recipe", "migrate", old, "-o", tmp_path / "new.yaml")
    assert (tmp_path / "new.yaml").read_text() == out
    _, err = run(capsys, "recipe", "migrate", old, "-o", tmp_path / "new.yaml", code=2)
    assert "exists already" in err


def test_a_bug_of_ours_is_code_1(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plait.merging.pipeline.run_recipe", lambda *a, **k: 1 / 0)
    _, err = run(capsys, "merge", *PAIR, code=1)
    assert "This is a bug in plait" in err
    assert "ZeroDivisionError" in err


@pytest.mark.parametrize("name", ["first/adapter_model.safetensors", b"first/adapter_model.safetensors"])
def test_a_file_that_the_system_fails_at_is_named_and_no_bug_of_ours(capsys, tmp_path, monkeypatch, name):
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plait.merging.pipeline.run_recipe", fail)
    assert run(capsys, "merge", *PAIR, code=2)[1].endswith("\nerror: first/adapter_model.safetensors: Stale file handle.\n")
    assert "in fail" in run(capsys, "merge", *PAIR, "--traceback", code=2)[1]


def test_traceback_on_request(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Traceback" not in run(capsys, "merge", "./nowhere", code=2)[1]
    assert "Traceback" in run(capsys, "merge", "./nowhere", "--traceback", code=2)[1]


@every(
    ("given", "joined"),
    [
        (["a", "--weights", "0.7", "0.3", "-o", "x"], ["a", "--weights", "0.7,0.3", "-o", "x"]),
        (["--weights", "1", "-1"], ["--weights", "1,-1"]),
        (["--weights", "1,2", "a"], ["--weights", "1,2", "a"]),
        (["--weights", "a"], ["--weights", "a"]),
        (["--weights"], ["--weights"]),
        (["--weights", "1e-3", ".5", "--weights", "2", "b"], ["--weights", "1e-3,.5", "--weights", "2", "b"]),
        (["--weights", "1", "2", "--tasks", "a.yaml"], ["--weights", "1,2", "--tasks", "a.yaml"]),
        (["--tasks", "a.yaml", "b,c/d.yaml", "-o", "x"], ["--tasks", "a.yaml", "--tasks", "b,c/d.yaml", "-o", "x"]),
        (["--weights", "1", "--weights", "2", "3"], ["--weights", "1", "--weights", "2,3"]),
        (["x", "--tasks", "a.yaml", ""], ["x", "--tasks", "a.yaml", ""]),
    ],
)
def test_weights_may_stand_apart(given, joined):
    assert _join_lists(given) == joined


def test_a_compression_that_saves_nothing_says_what_would(capsys, tmp_path):
    adapter = DEMO / "sentiment"
    _, err = run(capsys, "compress", adapter, "--energy", "0.99", "-o", tmp_path / "same")
    assert "the adapter is not smaller than it was" in " ".join(err.split())
    assert "--layout pattern" in err
    promised = float(re.search(r"it has ([\d.]+) MB", " ".join(err.split()))[1])
    _, err = run(capsys, "compress", adapter, "--energy", "0.99", "--layout", "pattern", "-o", tmp_path / "less")
    assert "not smaller" not in err
    assert (tmp_path / "less" / "adapter_model.safetensors").stat().st_size / 1e6 == pytest.approx(promised, abs=0.1)
    forget_announcements()
    _, err = run(capsys, "compress", adapter, "--rank", "4", "-o", tmp_path / "half")
    assert "not smaller" not in err


def test_a_dry_run_shows_the_scale(capsys):
    assert "scale 0.5" in run(capsys, "merge", *PAIR, "--method", "linear", "--scale", "0.5", "--dry-run")[0]
    (line,) = (x for x in run(capsys, "merge", *PAIR, "--method", "linear", "--dry-run")[0].splitlines() if "pipeline:" in x)
    assert "scale" not in line


def test_a_pointer_of_git_lfs_is_recognized(capsys, tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9823216\n"
    for name, config in (("adapter_model.safetensors", True), ("adapter_model.bin", True), ("adapter_config.json", False)):
        folder = tmp_path / name
        folder.mkdir()
        if config:
            (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
        (folder / name).write_text(pointer)
        _, err = run(capsys, "inspect", folder, code=2)
        assert f"{folder / name}: a Git LFS pointer" in err
        assert "git lfs pull" in err


def test_an_adapter_alone_has_a_header_without_gaps(capsys):
    found = Evaluation.model_construct(
        name="x", split="test", sources=(), tasks=(), mean_recovery=None, below_base=(), matrix=None
    )
    show_evaluation(found)
    assert capsys.readouterr().out.splitlines()[0] == "x · test"


def test_a_pull_request_that_would_change_nothing_is_not_called_pushed(capsys, monkeypatch):
    for url, expected in (("https://hub/org/x/discussions/3", "pushed to"), ("https://hub/org/x", "no pull request")):
        pushed = PushResult(url=url, left_out=(), notes=())
        monkeypatch.setattr("plait.commands.push.push_result", lambda *_, pushed=pushed, **__: pushed)
        assert run(capsys, "push", "merged", "org/x", "--create-pr")[0].startswith(expected)
    assert run(capsys, "push", "merged", "org/x")[0].startswith("pushed to")
