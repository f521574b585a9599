"""`plait train`: phases → adapters → merge, evaluation and report; killed, resumed, side by side, on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import psutil
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import plait
from plait.errors import OutputError, RecipeError
from plait.results.progress import SilentProgress
from plait.training import cohort, on_cluster, processes
from plait.training.phases import phase_seed
from plait.training.preflight import resolve_phases
from plait.training.reading import read_phases
from tests.command_line import exit_code
from tests.language_models import WORDS, label, save_model, tokenizer, write_task
from tests.warm import PLAIT, check_killed, killed_at_a_checkpoint, run_forked

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = {"train": "test.jsonl", "test": "test.jsonl"}
PHASES = """\
base_model: base
lora: {r: 4, alpha: 8, dropout: 0, targets: all-linear}
arguments: {learning_rate: 1e-2, lr_scheduler_type: constant, max_steps: 10, save_strategy: 'no'}
phases: [sort.yaml, rate.yaml]
merge: {method: {name: ties, space: core, density: 0.5}}
"""
#: A checkpoint takes as long as several steps.
CHECKPOINTS = (", save_strategy: 'no'", "")
#: Phases, and no merge of them.
MERGE = ("merge: {method: {name: ties, space: core, density: 0.5}}\n", "")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def place(tmp_path, model, monkeypatch):
    (tmp_path / "base").symlink_to(model)
    for task in ("sort", "rate"):
        write_task(tmp_path, task, splits=SPLITS)
    (tmp_path / "phases.yaml").write_text(PHASES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rewrite(*changes: tuple[str, str]) -> None:
    text = PHASES
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    Path("phases.yaml").write_text(text)


def tensors(out: str | Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "phases" / name / "adapter" / "adapter_model.safetensors")


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    code = exit_code("train", *arguments)
    message = capsys.readouterr()
    return code, message.out, message.err


def states(result) -> dict[str, str]:
    return {p.name: p.state for p in result.phases}


def test_from_data_to_report(place):
    rewrite(("max_steps: 10", "max_steps: 40"), ("base_model: base", "base_model: base\nbase_name: org/tiny"))
    result = plait.train("phases.yaml", out="out", matrix=True)
    assert result.ok
    config = json.loads(Path("out/phases/sort/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert len(config["target_modules"]) > 2
    assert config["target_modules"] == sorted(config["target_modules"]), "PEFT writes a set"
    assert "org/tiny" in Path("out/phases/sort/adapter/README.md").read_text()
    assert plait.verify("out/phases/sort/adapter", rebuild=False).ok
    assert states(result) == {"sort": "done", "rate": "done"}
    assert [p.steps for p in result.phases] == [40, 40]
    found = result.evaluation
    assert {t.task: t.adapter for t in found.tasks} == {"sort": "sort", "rate": "rate"}
    assert all(t.single > t.base + 0.2 for t in found.tasks)
    assert found.matrix.adapters == ("sort", "rate")
    # the adapter that was judged is the one that PEFT loads
    tokens = tokenizer()
    texts = [tokens(f"sort {word} :", return_tensors="pt") for word in WORDS]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "out/phases/sort/adapter").eval()
    labels = tokens(["red", "blue"], add_special_tokens=False)["input_ids"]
    scores = [adapted(**text).logits[0, -1, [row[0] for row in labels]] for text in texts]
    right = [["red", "blue"][int(s.argmax())] == label("sort", word) for s, word in zip(scores, WORDS, strict=True)]
    assert sum(right) / len(right) == next(t.single for t in found.tasks if t.task == "sort")
    # the merge is that of the recipe beside it
    again = plait.merge("out/recipe.yaml", out="again").folder
    merged = load_file("out/merged/adapter_model.safetensors")
    assert all(torch.equal(merged[key], tensor) for key, tensor in load_file(again / "adapter_model.safetensors").items())
    assert plait.verify("out/merged").ok
    assert "## Results" in Path("out/merged/README.md").read_text()
    page = Path("out/report.html").read_text()
    assert "How the adapters were trained" in page
    assert "<polyline" in page
    assert "Where the adapters collide" in page
    # what only an unfinished run needs is gone
    assert sorted(p.name for p in Path("out/phases/sort").iterdir()) == ["adapter", "job.json", "training.json"]


def test_phases_begin_with_matrices_of_their_own(place):
    """With a learning rate of 0 what is saved is the beginning: B is 0, and A is the seed's."""
    rewrite(("learning_rate: 1e-2", "learning_rate: 0.0"), ("max_steps: 10", "max_steps: 1"))
    plait.train("phases.yaml", out="own")
    rewrite(
        ("learning_rate: 1e-2", "learning_rate: 0.0"), ("max_steps: 10", "max_steps: 1"), ("{r: 4,", "{r: 4, init_seed: 5,")
    )
    shared = plait.train("phases.yaml", out="shared")
    assert "begin with one A" in shared.notes[0]
    own, one = ([tensors(out, name) for name in ("sort", "rate")] for out in ("own", "shared"))
    for key in own[0]:
        assert torch.equal(one[0][key], one[1][key])
        if "lora_A" in key:
            cosine = torch.nn.functional.cosine_similarity(own[0][key].flatten(), own[1][key].flatten(), dim=0)
            assert abs(cosine) < 0.5, key
    assert phase_seed(0, "sort") != phase_seed(0, "rate")


def test_what_is_done_is_found(place):
    first = plait.train("phases.yaml", out="out")
    before = {p: p.stat().st_mtime_ns for p in Path("out/phases").rglob("*") if p.is_file()}
    merged = Path("out/merged/adapter_model.safetensors").stat().st_mtime_ns
    Path("out/phases/rate/checkpoint-10").mkdir()  # killed after the last step
    Path("out/phases/rate/checkpoint-10/trainer_state.json").write_text("{}")
    second = plait.train("phases.yaml", out="out")
    assert states(second) == {"sort": "found", "rate": "found"}
    assert {p: p.stat().st_mtime_ns for p in Path("out/phases").rglob("*") if p.is_file()} == before
    assert Path("out/merged/adapter_model.safetensors").stat().st_mtime_ns == merged
    assert second.run == first.run
    assert len(list(Path("out/evaluation/merged").rglob("run_*"))) == 1
    # an adapter that is not what was written any more is trained again, and so is the merge
    Path("out/phases/rate/adapter/adapter_model.safetensors").write_bytes(b"broken")
    third = plait.train("phases.yaml", out="out")
    assert states(third) == {"sort": "found", "rate": "done"}
    assert third.evaluation.tasks == first.evaluation.tasks


def test_other_settings_put_an_adapter_aside_and_find_it_again(place):
    plait.train("phases.yaml", out="out")
    wanted = tensors("out", "sort")
    rewrite(("[sort.yaml,", "[{task: sort.yaml, arguments: {max_steps: 2}},"))
    changed = plait.train("phases.yaml", out="out")
    assert states(changed) == {"sort": "done", "rate": "found"}
    assert "an adapter with other settings was there" in changed.notes[0]
    assert len(list(Path("out/earlier").iterdir())) == 1
    rewrite()
    back = plait.train("phases.yaml", out="out")
    assert states(back) == {"sort": "found", "rate": "found"}
    assert all(torch.equal(tensors("out", "sort")[key], tensor) for key, tensor in wanted.items())


def test_killed_and_run_again(place):
    """Killed in the first phase, then in the second; the end is that of a run that nobody disturbed."""
    rewrite(CHECKPOINTS, ("max_steps: 10", "max_steps: 20"), ("dropout: 0,", "dropout: 0.1,"))
    for watched in ("sort", "rate"):
        killed_at_a_checkpoint(["train", "phases.yaml", "-o", "out"], f"/phases/{watched}/")
        assert not Path("out/phases", watched, "adapter").exists()
        assert not Path("out/merged").exists()
    ended = plait.train("phases.yaml", out="out")
    assert states(ended) == {"sort": "found", "rate": "done"}
    assert [p.resumed_from is not None for p in ended.phases] == [True, True]
    assert not list(Path("out").rglob("checkpoint-*"))
    calm = plait.train("phases.yaml", out="calm")
    for name in ("sort", "rate"):
        assert all(torch.equal(tensors("out", name)[key], tensor) for key, tensor in tensors("calm", name).items())
    assert ended.evaluation.tasks == calm.evaluation.tasks


def test_a_phase_that_fails_does_not_stop_the_others(place, capsys):
    rewrite(("[sort.yaml,", "[{task: sort.yaml, arguments: {max_length: 2}},"))
    code, out, message = command(capsys, "phases.yaml", "-o", "out", "--json")
    assert code == 1
    result = json.loads(out)
    assert [(p["name"], p["state"]) for p in result["phases"]] == [("sort", "failed"), ("rate", "done")]
    assert (result["merged"], result["evaluation"]) == (None, None)
    assert not Path("out/merged").exists()
    assert "failed: sort: task 'sort' (train): no example is left" in message
    assert "plait train phases.yaml -o out" in message
    rewrite()
    code, out, message = command(capsys, "phases.yaml", "-o", "out")
    assert code == 0
    assert "rate   found" in out
    assert "worst (" in out


class Killer(SilentProgress):
    """Kills the worker of a phase when it begins to train."""

    def __init__(self, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.message: dict[str, str] = {}
        self._phase = phase
        self._children = {}
        start = processes._start

        def noted(phase, *rest):
            return self._children.setdefault(phase.name, start(phase, *rest))

        monkeypatch.setattr(processes, "_start", noted)

    def part(self, name: str) -> Part:
        return Part(self, name)

    def began(self, phase: str) -> None:
        if phase == self._phase:
            self._children[phase].process.kill()


class Part(SilentProgress):
    """Tells the killer what a phase does."""

    def __init__(self, killer: Killer, name: str) -> None:
        self._killer, self._name = killer, name

    def start(self, stage: str, total: int, unit: str = "steps") -> None:
        if total:
            self._killer.began(self._name)
        else:
            self._killer.message[self._name] = stage


def test_side_by_side_is_as_in_turn(place, monkeypatch):
    rewrite(("[sort.yaml,", "[{task: sort.yaml, arguments: {max_steps: 100000}},"))  # it does not end before it is killed
    with monkeypatch.context() as patch:
        result = plait.train("phases.yaml", out="killed", workers=2, progress=(killer := Killer("sort", patch)))
    assert states(result) == {"sort": "failed", "rate": "done"}
    assert killer.message == {"sort": "failed", "rate": "done"}
    assert "was killed by signal 9" in result.failed[0].error
    assert "logs/sort.txt" in result.failed[0].error
    rewrite()
    together = plait.train("phases.yaml", out="killed", workers=2)
    in_turn = plait.train("phases.yaml", out="calm")
    assert states(together) == {"sort": "done", "rate": "found"}
    assert [p.digest for p in together.phases] == [p.digest for p in in_turn.phases]
    for name in ("sort", "rate"):  # each on its share of the cores: sums in another order
        for key, tensor in tensors("calm", name).items():
            torch.testing.assert_close(tensors("killed", name)[key], tensor, rtol=1e-3, atol=1e-4)


def test_a_worker_killed_in_the_middle_of_a_line():
    events: SimpleQueue = SimpleQueue()
    message = '["advance", 1]\n["adv'
    with subprocess.Popen([sys.executable, "-c", f"print({message!r}, end='')"], stdout=subprocess.PIPE, text=True) as process:
        processes._read(processes._Child(None, process, slot=0), events)
    assert [events.get_nowait()[1] for _ in range(2)] == [["advance", 1], None]


def test_a_worker_that_never_read_its_request():
    process = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    process.wait()
    process.stdin.write(b"{}\n")
    with pytest.raises(BrokenPipeError):
        process.stdin.flush()
    processes._Child(None, process, slot=0).stop()
    assert process.stdin.closed


# Waits when the first phase begins to train, and does so in the middle of its loop: signals find it there.
HELD_PARENT = """
from plait.cli.main import main
from plait.training import processes
receive = processes.receive
def receive_and_wait(part, event):
    receive(part, event)
    if event[:2] == ["start", "train"]:
        hold()
processes.receive = receive_and_wait
main()
"""


def test_workers_leave_with_their_parent(place):
    rewrite(("max_steps: 10", "max_steps: 100000"))
    workers = []

    def kill(parent: int) -> None:
        workers.extend(psutil.Process(parent).children())
        with pytest.raises(OutputError, match=rf"out is in use by process {parent} on"), ShortPatience():
            plait.train("phases.yaml", out="out")
        os.kill(parent, signal.SIGKILL)

    check_killed(run_forked(HELD_PARENT, "train", "phases.yaml", "-o", "out", "--workers", "2", when_held=kill))
    assert len(workers) == 3, "two phases, and the process that renders templates"
    wait_for_the_end(workers)


# Imported by every Python; workers wait behind their first checkpoint, so that a signal finds them there on any machine.
HELD_WORKERS = """
import sys, time
if "plait.training.worker" in sys.orig_argv:
    from transformers import TrainerState
    save = TrainerState.save_to_json
    def save_and_wait(self, path):
        save(self, path)
        time.sleep(600)
    TrainerState.save_to_json = save_and_wait
"""


def test_sigterm_ends_the_worker_too_and_the_same_command_continues(place, capsys):
    rewrite(CHECKPOINTS)
    (place / "held").mkdir()
    (place / "held" / "sitecustomize.py").write_text(HELD_WORKERS)
    words = ["phases.yaml", "-o", "out", "--only", "sort"]
    program = f"import os, pathlib; pathlib.Path('pid').write_text(str(os.getpid()))\n{PLAIT}"
    environment = {**os.environ, "PYTHONPATH": str(place / "held")}
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(run_forked, program, "train", *words, "--workers", "2", environment=environment)
        while not Path("out/phases/sort/checkpoint-1/trainer_state.json").exists():
            assert not run.done(), run.result().stderr
            time.sleep(0.1)
        parent = psutil.Process(int(Path("pid").read_text()))
        workers = parent.children()
        parent.terminate()
    done = run.result()
    assert done.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM\n0 of 2 phases are finished and kept in" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(workers) == 2, "a phase, and the process that renders templates"
    wait_for_the_end(workers)
    code, _, _ = command(capsys, *words)
    assert code == 0
    phase = json.loads(Path("out/train.json").read_text())["phases"][0]
    assert (phase["state"], phase["resumed_from"], phase["steps"]) == ("done", 1, 10)


def wait_for_the_end(workers: list[psutil.Process]) -> None:
    end = time.monotonic() + 240
    while any(map(alive, workers)):
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(process: psutil.Process) -> bool:
    """A process that has ended stays as a zombie where nobody waits for orphans, as in a container without an init."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class ShortPatience:
    """Do not wait for another run."""

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr("plait.training.cohort._PATIENCE", 0.2)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def test_one_phase_only(place, capsys):
    code, _, message = command(capsys, "phases.yaml", "-o", "out", "--only", "rate", "--set", "seed=0")
    assert code == 0
    assert (
        "Nothing is merged yet (sort to do); this command does the rest: plait train phases.yaml -o out --set seed=0\n"
        in message
    )
    assert not Path("out/merged").exists()
    assert not Path("out/phases/sort").exists()
    result = plait.train("phases.yaml", out="out")
    assert states(result) == {"sort": "done", "rate": "found"}
    assert result.merged == "merged"
    code, _, message = command(capsys, "phases.yaml", "-o", "out", "--only", "rate")
    assert (code, "Nothing is merged yet" in message) == (0, False)
    assert json.loads(Path("out/train.json").read_text())["report"] == "report.html"


def test_what_would_happen(place, capsys):
    Path("base").unlink()
    save_model(Path("base"))
    code, out, _ = command(capsys, "phases.yaml", "--dry-run", "--json", "--set", "arguments.num_train_epochs=2",
                           "--set", "arguments.max_steps=-1")  # fmt: skip
    assert code == 0
    sort, rate = json.loads(out)["phases"]
    # <s>? no: 3 words, the answer, the end
    assert (sort["state"], sort["examples"], sort["steps"]) == ("to do", 24, 6)
    assert sort["tokens"] == 24 * 5 * 2
    shapes = sum(t.numel() for t in lora_of("base", r=4).values())
    assert sort["parameters"] == rate["parameters"] == shapes
    assert sort["init_seed"] == phase_seed(0, "sort")
    assert not Path("artifacts").exists()
    code, out, _ = command(capsys, "phases.yaml", "--dry-run")
    assert code == 0
    assert "then: merge by ties in core, evaluate on 2 tasks" in out


def lora_of(base: str, r: int) -> dict[str, torch.Tensor]:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model = AutoModelForCausalLM.from_pretrained(base)
    return get_peft_model_state_dict(get_peft_model(model, LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")))


def test_what_is_wrong_is_said_before_anything_is_trained(place, capsys):
    (place / "rows.jsonl").write_text('{"nothing": 1}\n')
    text = PHASES.replace("phases: [sort.yaml, rate.yaml]", """\
phases:
  - {task: sort.yaml, arguments: {learning_rat: 1}}
  - {task: rate.yaml, arguments: {seed: 1}}
  - {name: rows, data: rows.jsonl}
  - {name: gone, data: ./gone.jsonl}""")  # fmt: skip
    Path("phases.yaml").write_text(text)
    code, _, message = command(capsys, "phases.yaml", "-o", "out")
    assert code == 2
    assert "4 problems" in message
    assert "phases.yaml:6: phases.1.arguments: arguments: seed: a key of its own, not one of 'arguments'." in message
    assert "phases.yaml:5: phases.0.arguments: arguments: learning_rat: SFTConfig has none of that name." in message
    assert "phases.yaml:7: phases.2.data:" in message
    assert "phases.yaml:8: phases.3.data:" in message
    assert "gone.jsonl: there is no such file" in message
    assert not Path("out").exists()
    rewrite(("all-linear", "nowhere"))
    code, _, message = command(capsys, "phases.yaml", "-o", "out")
    assert code == 2
    assert "cannot be trained so" in message
    with pytest.raises(RecipeError, match="--cluster 'slurm': it must be 'ray'"):
        plait.train("phases.yaml", out="out", cluster="slurm")
    with pytest.raises(RecipeError, match="--workers 0"):
        plait.train("phases.yaml", out="out", workers=0)


def test_what_is_in_the_way_is_said_before_anything_is_trained(place, capsys):
    Path("out/merged").mkdir(parents=True)
    Path("out/merged/mine.txt").write_text("mine")
    for words in ([], ["--dry-run"]):
        code, _, message = command(capsys, "phases.yaml", "-o", "out", *words)
        assert code == 2
        assert "out/merged was not written by plait (it has no plait.lock)" in message
    assert not Path("out/phases").exists()


def test_a_template_is_tried_before_anything_is_trained(place, capsys):
    Path("chat.jinja").write_text("{{ raise_exception('not this') }}")
    Path("chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    rewrite(("rate.yaml]", "{name: chats, data: chats.jsonl, arguments: {chat_template_path: chat.jinja}}]"))
    (place / "elsewhere").mkdir()
    os.chdir("elsewhere")
    code, _, message = command(capsys, "../phases.yaml", "-o", "out")
    assert code == 2
    assert "phases.1.arguments: " in message
    assert f"{Path('../chat.jinja').absolute()}: the chat template: it refuses this chat: not this" in message
    assert not Path("out").exists()


def test_stopped_by_hand(place, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cohort, "run_sequentially", stop)
    code, _, message = command(capsys, "phases.yaml", "-o", "out")
    assert code == 130
    assert "stopped\n0 of 2 phases are finished and kept in" in message
    assert "the same command continues with the others." in " ".join(message.split())


@pytest.mark.parametrize(("workers", "enough"), [(None, True), (2, False)])
def test_checkpoints_need_room_only_while_their_phase_is_trained(place, monkeypatch, workers, enough):
    rewrite(CHECKPOINTS)
    phases = resolve_phases(read_phases("phases.yaml", out=Path("out")))
    found = cohort.estimate(phases[0], Path("out"), examples=24)
    free = cohort._SPARE + 2 * (found.bytes - found.passing) + found.passing
    monkeypatch.setattr(cohort, "estimate", lambda *_, **__: replace(found, free=free))
    with nullcontext() if enough else pytest.raises(OutputError, match=r"are needed \(2 adapters and their checkpoints\)"):
        cohort._check_space(Path("out"), phases, cohort.Scheduling(workers))


def test_rslora_and_dora(place):
    rewrite(("{r: 4,", "{r: 4, rslora: true, dora: true,"), ("{name: ties, space: core, density: 0.5}", "linear"))
    result = plait.train("phases.yaml", out="out")
    assert result.ok
    config = json.loads(Path("out/phases/sort/adapter/adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"]) == (True, True)
    assert any("lora_magnitude_vector" in key for key in tensors("out", "sort"))
    assert result.evaluation.mean_recovery is not None or result.evaluation.undefined


@pytest.mark.parametrize("whole", [True, False], ids=["with a pooler", "without one"])
def test_encoders_with_heads(tmp_path, monkeypatch, whole):
    """A head per task, saved with the adapter; what a checkpoint lacks besides is trained and saved too, never left random."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    words = tokenizer()
    config = BertConfig(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=32, pad_token_id=0, initializer_range=0.2)  # fmt: skip
    encoder = BertForMaskedLM(config)
    if whole:
        encoder.bert.pooler = type(BertForMaskedLM(config).bert)(config).pooler
    encoder.save_pretrained("base")
    words.save_pretrained("base")
    for task in ("sort", "rate"):
        write_task(
            tmp_path, task, splits=SPLITS, kind="sequence_classification", delimiter=None, prompt=f"{task} {{{{ word }}}}"
        )
    rewrite(("max_steps: 10", "max_steps: 40"))
    result = plait.train("phases.yaml", out="out")
    assert result.ok, result.failed
    assert all(t.single > t.base for t in result.evaluation.tasks)
    held = {key.removeprefix("base_model.model.") for key in tensors("out", "sort") if "lora_" not in key}
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    lora = {key for key in tensors("out", "sort") if "lora_" in key}
    assert lora
    assert not [key for key in lora if "pooler" in key and not whole]
    assert held == {"classifier.weight", "classifier.bias"} | (set() if whole else pooler)
    # adapter and base give the answers that were judged
    model = AutoPeftModelForSequenceClassification.from_pretrained("out/phases/rate/adapter", num_labels=2).eval()
    right = [
        ["good", "bad"][int(model(**words(f"rate {w}", return_tensors="pt")).logits.argmax())] == label("rate", w)
        for w in WORDS
    ]
    assert sum(right) / len(right) == next(t.single for t in result.evaluation.tasks if t.task == "rate")
    assert plait.train("phases.yaml", out="out").evaluation.tasks == result.evaluation.tasks


@pytest.mark.xdist_group("ray")
def test_on_ray_with_a_node_lost_it_continues_from_its_checkpoint(place, nodes, losing, monkeypatch):
    rewrite(CHECKPOINTS, ("max_steps: 10", "max_steps: 40"), MERGE)
    assert plait.train("phases.yaml", out="here").ok
    rewrite(CHECKPOINTS, ("max_steps: 10", "max_steps: 40"))
    losing(at_once=False)

    def receive_and_lose(part, call):
        receive(part, call)
        begun = {file.parents[1] for file in Path("out").rglob("trainer_state.json")}
        if nodes.both and len(begun) == 2:
            nodes.lose()

    receive = on_cluster.receive
    monkeypatch.setattr(on_cluster, "receive", receive_and_lose)
    with pytest.warns(UserWarning, match=r"a worker was lost, and what it did \(phase '.*'\) is done again elsewhere"):
        result = plait.train("phases.yaml", out="out", cluster="ray")
    assert states(result) == {"sort": "done", "rate": "done"}
    assert len([phase for phase in result.phases if phase.resumed_from]) == 1
    for name in ("sort", "rate"):
        assert all(tensor.equal(tensors("out", name)[key]) for key, tensor in tensors("here", name).items())
    assert result.merged == "merged"
    rewrite(("[sort.yaml, rate.yaml]", "[{task: sort.yaml, arguments: {max_length: 2}}]"), MERGE)
    result = plait.train("phases.yaml", out="other", cluster="ray")
    assert states(result) == {"sort": "failed"}
    assert "no example is left" in result.failed[0].error
