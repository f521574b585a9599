"""`regmean_sequential` beside a literal reading of RegMean++ in float64, and where it is refused."""

from __future__ import annotations

import json
import shutil
import signal
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import plait
from plait.calibration import sequential
from plait.calibration.moments import take_moments
from plait.errors import PlaitError
from plait.merging.moments import MomentsFile
from tests.command_line import exit_code
from tests.language_models import WORDS, language_model, tokenizer, train_pair, write_task
from tests.warm import run_forked

ROOT = Path(__file__).parents[2]
TASKS = ("sort", "rate")
SEEN = WORDS[:16]
Deltas = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, two adapters of it, and their tasks."""
    folder = train_pair(tmp_path_factory.mktemp("sequential"), steps=30)
    for task in TASKS:
        write_task(folder, task, rows=SEEN, splits={"calibration": "test.jsonl"})
    return folder


def deltas(folder: Path) -> Deltas:
    """Return path → ΔW of an adapter, dense, float64."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    names = sorted({name.rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name})
    return {
        name.removeprefix("base_model.model."): config["lora_alpha"]
        / config["r"]
        * tensors[f"{name}.lora_B.weight"].double()
        @ tensors[f"{name}.lora_A.weight"].double()
        for name in names
    }


def inputs_of(acting: Mapping[str, torch.Tensor], wanted: list[str], task: str) -> dict[str, torch.Tensor]:
    """Return path → inputs (tokens, d) of some modules, while some deltas act on the base, one text at a time."""
    model = language_model().double()
    with torch.no_grad():
        for path, delta in acting.items():
            model.get_submodule(path).weight.add_(delta)
    rows = watched(model, wanted)
    with torch.no_grad():
        for word in SEEN:
            model(input_ids=torch.tensor([tokenizer()(f"{task} {word} :")["input_ids"]]))
    return {path: torch.cat(found) for path, found in rows.items()}


def watched(model: Any, paths: list[str]) -> dict[str, list[torch.Tensor]]:
    """Return path → inputs (tokens, d) of every forward pass from now on."""
    rows: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    for path, seen in rows.items():
        hook = lambda m, x, seen=seen: seen.append(x[0].detach().reshape(-1, x[0].shape[-1]))  # noqa: E731
        model.get_submodule(path).register_forward_pre_hook(hook)
    return rows


def solved(own: list[torch.Tensor], grams: list[torch.Tensor], ridge: float, alpha: float) -> torch.Tensor:
    damped = [alpha * g + (1 - alpha) * torch.diag(g.diagonal()) for g in grams]
    total = sum(damped)
    rho = ridge * total.trace() / len(total)
    right = sum(d @ g for d, g in zip(own, damped, strict=True)) + rho * sum(own) / len(own)
    return torch.linalg.solve(total + rho * torch.eye(len(total)).double(), right.mT).mT


def reading(place: Path, *, ridge: float = 1e-2, alpha: float = 0.9) -> Deltas:
    """Merge layer by layer: the layers below are merged, this layer is each adapter's own."""
    own = {task: deltas(place / task) for task in TASKS}
    merged: Deltas = {}
    for layer in (0, 1):
        paths = [path for path in own["sort"] if f"layers.{layer}." in path]
        seen = {t: inputs_of({**merged, **{p: own[t][p] for p in paths}}, paths, t) for t in TASKS}
        merged |= {
            p: solved([own[t][p] for t in TASKS], [seen[t][p].mT @ seen[t][p] / len(seen[t][p]) for t in TASKS], ridge, alpha)
            for p in paths
        }
    return merged


def merge(place: Path, out: Path, **settings: Any) -> plait.MergeResult:
    settings = {"method": "regmean_sequential", "tasks": [place / f"{t}.yaml" for t in TASKS], **settings}
    return plait.merge([place / t for t in TASKS], base_model=str(place / "base"), out=out, **settings)


def apart(one: Deltas, two: Deltas) -> dict[str, float]:
    assert one.keys() == two.keys()
    return {path: float((one[path] - two[path]).norm() / two[path].norm()) for path in two}


@pytest.mark.parametrize("settings", [{}, {"ridge": 0.1, "off_diagonal": 0.5}])
def test_it_is_a_literal_reading_layer_by_layer(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, float]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="second moments of sort, rate, taken now on 16 texts"):
        result = merge(place, tmp_path / "merged", **settings)
    wanted = reading(place, ridge=settings.get("ridge", 1e-2), alpha=settings.get("off_diagonal", 0.9))
    assert max(apart(deltas(result.folder), wanted).values()) < 1e-4
    plain = merge(place, tmp_path / "plain", method="regmean", **settings)
    far = apart(deltas(plain.folder), wanted)
    assert max(v for p, v in far.items() if "layers.0." in p) < 1e-4  # below it nothing is merged
    assert max(v for p, v in far.items() if "layers.1." in p) > 1e-2


def test_its_moments_are_kept_and_the_lock_makes_it_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="taken now"):
        first = merge(place, tmp_path / "first")
    assert plait.verify(first.folder).ok
    store = tmp_path / "artifacts" / "moments"
    kept = sorted(store.iterdir())
    assert [p.name.split("-")[0] for p in kept] == ["rate", "sort"]
    origin = MomentsFile(kept[0]).origin
    assert origin is not None
    assert origin.sequential
    assert len(MomentsFile(kept[0]).entries) == 6  # q shares with v in each layer
    with monkeypatch.context() as patch:
        patch.setattr("plait.mixture.Mixture.load", lambda *a, **k: pytest.fail("the base was loaded"))
        with pytest.warns(UserWarning, match="taken by an earlier run"):
            scaled = merge(place, tmp_path / "scaled", scale=1.4)  # a factor on the result; the moments are the same
    tensor = deltas(first.folder)
    assert max(apart(deltas(scaled.folder), {p: 1.4 * d for p, d in tensor.items()}).values()) < 1e-5
    merge(place, tmp_path / "other", ridge=0.5)  # another merge has other layers below
    assert len(list(store.iterdir())) == 4


@pytest.mark.parametrize("command", ["merge", "tune"])
def test_a_killed_run_is_taken_up_layer_by_layer(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Killed at the third of four passes, the next run makes the two that are missing, and the same bytes."""
    monkeypatch.chdir(tmp_path)
    passes: list[str] = []

    def counted(*given: Any, **more: Any) -> Any:
        passes.append("")
        return take_moments(*given, **more)

    def run(out: str) -> bytes:
        made = merge(place, tmp_path / out) if command == "merge" else tuned(place, tmp_path / out)
        return (made.folder / "adapter_model.safetensors").read_bytes()

    monkeypatch.setattr(sequential, "take_moments", counted)
    ended = run_forked(KILLED, str(place), command, "killed", str(torch.get_num_threads()), folder=tmp_path)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert not (tmp_path / "killed").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        resumed = run("killed")
        assert len(passes) == 2
        shutil.rmtree(tmp_path / "artifacts", ignore_errors=True)
        assert run("plain") == resumed
    assert len(passes) == 2 + 4
    assert not [p.name for p in tmp_path.rglob(".*")]


KILLED = f"""
import os, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from plait.calibration import sequential
from tests.e2e import test_regmean_sequential as here
torch.set_num_threads(int(sys.argv[4]))  # a tuning's state is of a number of threads
take, left = sequential.take_moments, [2]
def take_or_die(*given, **more):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return take(*given, **more)
sequential.take_moments = take_or_die
(here.merge if sys.argv[2] == "merge" else here.tuned)(Path(sys.argv[1]), Path(sys.argv[3]))
"""


def tuned(place: Path, out: Path) -> Any:
    settings: dict[str, Any] = {"tasks": [place / f"{t}.yaml" for t in TASKS], "base_model": str(place / "base")}
    return plait.tune(
        [place / t for t in TASKS],
        method="regmean_sequential",
        tune={"steps": 0, "generic_lines": 0},
        out=out,
        scale=1.0,
        rank=8,
        **settings,
    )


def test_a_scale_is_found_for_it_and_no_ridge(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="second moments"):
        record = merge(place, tmp_path / "merged", scale="auto").record
    assert any("second moments are of 16 texts of split 'calibration' (sort, rate)" in note for note in record.notes)
    with pytest.raises(PlaitError, match="'auto' cannot be found for ridge"):
        merge(place, tmp_path / "no", ridge="auto")


def test_it_is_refused_with_the_reason(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sources, tasks = [place / t for t in TASKS], [place / f"{t}.yaml" for t in TASKS]
    moments = plait.calibrate(sources, tasks=tasks, base_model=str(place / "base"), out=tmp_path / "moments").folder
    with pytest.raises(PlaitError, match=r"those given of sort, rate were taken without a merge. Give --tasks"):
        merge(place, tmp_path / "no", moments=moments)
    with pytest.raises(PlaitError, match="a function cannot give them"):
        merge(place, tmp_path / "no", moments=lambda adapter, module: torch.eye(32))
    with pytest.raises(PlaitError, match=r"takes second moments layer by layer.* give --tasks"):
        plait.merge(sources, method="regmean_sequential", out=tmp_path / "no")
    with pytest.warns(UserWarning, match="second moments"):
        merge(place, tmp_path / "merged")
    for kept in (tmp_path / "artifacts" / "moments").iterdir():
        kept.rename(tmp_path / f"{kept.name.split('-')[0]}.safetensors")
    with pytest.raises(PlaitError, match=r"given of sort, rate were taken by 'regmean_sequential'"):
        plait.merge(sources, method="regmean", moments=tmp_path, out=tmp_path / "no")
    flags = [*map(str, sources), "--tasks", *map(str, tasks), "--method", "regmean_sequential", "--dry-run"]
    flags += ["--base-id", str(place / "base")]
    assert exit_code("merge", *flags) == 0
    assert "second moments are taken first" in capsys.readouterr().out.replace("\n", " ")
    for source in sources:  # nothing names the base
        config = json.loads((source / "adapter_config.json").read_text())
        (tmp_path / source.name).mkdir()
        for file in source.iterdir():
            (tmp_path / source.name / file.name).write_bytes(file.read_bytes())
        (tmp_path / source.name / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(PlaitError, match="base model is not known"):
        plait.merge([tmp_path / t for t in TASKS], method="regmean_sequential", tasks=tasks, out=tmp_path / "no")


def test_a_rank_is_kept(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="second moments"):
        result = merge(place, tmp_path / "merged", rank=4)
    own = PeftModel.from_pretrained(language_model(), result.folder)
    assert result.record.rank == 4
    assert own.peft_config["default"].r == 4


def test_a_tuning_starts_there(place: Path, tmp_path: Path) -> None:
    assert max(apart(deltas(tuned(place, tmp_path / "tuned").folder), reading(place)).values()) < 1e-4


def encoder() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer()), num_labels=2, **size)).eval()


def encoder_decoder() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer()), **size, **ends)).eval()


OTHERS: dict[str, tuple[Any, str, list[str], dict[str, Any], list[str]]] = {
    "encoder with a head": (
        encoder,
        "SEQ_CLS",
        ["query", "value", "intermediate.dense"],
        {"kind": "sequence_classification", "delimiter": None},
        ["encoder.layer.0.", "encoder.layer.1."],
    ),
    "encoder-decoder": (
        encoder_decoder,
        "SEQ_2_SEQ_LM",
        ["q", "v", "wo"],
        {"delimiter": None},
        ["encoder.block.0.", "encoder.block.1.", "decoder.block.0.", "decoder.block.1."],
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_moments_of_other_architectures_are_those_above_the_merged_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    build, task_type, targets, changes, layers = OTHERS[kind]
    monkeypatch.chdir(tmp_path)
    build().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=targets, task_type=task_type, init_lora_weights=False)
        get_peft_model(build(), config).save_pretrained(tmp_path / task)
        write_task(tmp_path, task, rows=SEEN, **{"splits": {"calibration": "test.jsonl"}, **changes})
    with pytest.warns(UserWarning, match="second moments"):
        result = merge(tmp_path, tmp_path / "merged")
    merged = deltas(result.folder)
    stored = {p.name.split("-")[0]: MomentsFile(p) for p in (tmp_path / "artifacts" / "moments").iterdir()}
    for at, layer in enumerate(layers):
        for task in TASKS:
            own = {path: d for path, d in deltas(tmp_path / task).items() if layer in path}
            below = {path: d for path, d in merged.items() if any(lower in path for lower in layers[:at])}
            model = build().double()
            with torch.no_grad():
                for path, delta in {**below, **own}.items():
                    model.get_submodule(path).weight.add_(delta)
            rows = watched(model, list(own))
            with torch.no_grad():
                for word in SEEN:
                    ids = {"input_ids": torch.tensor([tokenizer()(f"{task} {word} :")["input_ids"]])}
                    model(**ids, **({"decoder_input_ids": torch.tensor([[0]])} if kind == "encoder-decoder" else {}))
            assert own
            for path, found in rows.items():
                x = torch.cat(found)
                entry = stored[task].read(path, None)
                assert entry is not None
                dense = entry if isinstance(entry, torch.Tensor) else entry.dense()
                torch.testing.assert_close(dense.double(), x.mT @ x / len(x), rtol=1e-4, atol=1e-5, msg=f"{task} {path}")


def test_layers_above_are_not_read(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass for a layer's moments ends where the next layer begins."""
    monkeypatch.chdir(tmp_path)
    read: list[tuple[bool, int]] = []

    def counted(model: Any, modules: Mapping[str, torch.nn.Module], *rest: Any, **more: Any) -> Any:
        calls: list[None] = []
        hook = model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(lambda *_: calls.append(None))
        found = take_moments(model, modules, *rest, **more)
        hook.remove()
        read.append((any("layers.1." in path for path in modules), len(calls)))
        return found

    monkeypatch.setattr(sequential, "take_moments", counted)
    with pytest.warns(UserWarning, match="taken now"):
        merge(place, tmp_path / "merged")
    assert sorted({last for last, _ in read}) == [False, True]
    assert all((calls > 0) == last for last, calls in read)
