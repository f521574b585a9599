"""Texts as tokens, second moments and teachers' answers, beside the plainest way to compute them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from plait.calibration.moments import InputMoments, take_moments
from plait.calibration.passages import Passage, Reader
from plait.calibration.search import _Teacher, search_scale
from plait.calibration.teachers import OutputDistributions, keep_distributions, teacher_distributions
from plait.calibration.texts import generic_lines, read_texts
from plait.errors import PlanError, TaskError
from plait.linalg.inputs import InputRows
from plait.notices import PlaitWarning
from plait.tasks.loading import load_task
from plait.verification.parity import read_prompts
from tests.language_models import language_model, write_task

PASSAGES = [Passage((4, 13, 6), (9,)), Passage((5, 17, 14, 6), (10, 2)), Passage((4, 20), (9, 10, 2))]


def plain_logits(model: Any, passage: Passage) -> torch.Tensor:
    ids = torch.tensor([[*passage.prompt, *passage.answer]])
    found: torch.Tensor = model(input_ids=ids).logits[0, len(passage.prompt) - 1 : -1]
    return found


def test_logits_are_those_of_every_passage_alone() -> None:
    model = language_model()
    found = Reader(model).logits(PASSAGES)
    torch.testing.assert_close(found, torch.cat([plain_logits(model, p) for p in PASSAGES]))


def test_the_output_layer_sees_only_the_answers() -> None:
    model = language_model()
    seen: list[torch.Size] = []
    Reader(model).logits(PASSAGES)  # whether rows can be packed is tried once
    hook = model.lm_head.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape))
    Reader(model).logits(PASSAGES)
    hook.remove()
    assert [tuple(s) for s in seen] == [(1, 6, model.config.vocab_size)]


def test_logits_of_an_encoder_decoder() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    found = Reader(model).logits([Passage((4, 13, 6), (9, 1)), Passage((5, 17), (10,), (7,))])
    one = model(input_ids=torch.tensor([[4, 13, 6]]), decoder_input_ids=torch.tensor([[0, 9]])).logits[0]
    two = model(input_ids=torch.tensor([[5, 17]]), decoder_input_ids=torch.tensor([[0, 7]])).logits[0, 1:]
    torch.testing.assert_close(found, torch.cat([one, two]))


def test_moments_are_the_mean_outer_product_of_the_inputs() -> None:
    model = language_model()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    inputs: dict[str, list[torch.Tensor]] = {n: [] for n in names}
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda m, x, y, n=n: inputs[n].append(x[0].reshape(-1, x[0].shape[-1])))
        for n in names
    ]
    for p in PASSAGES:
        model(input_ids=torch.tensor([[*p.prompt, *p.answer[:-1]]]))
    for hook in hooks:
        hook.remove()
    modules = {n: model.get_submodule(n) for n in names}
    for passages, times in ((PASSAGES, 1), (PASSAGES * 20, 20)):  # fewer tokens than inputs have entries, and more
        found = take_moments(model, modules, passages).found()
        for name, rows in inputs.items():
            x = torch.cat(rows).double()
            torch.testing.assert_close(dense(found[name]), x.T @ x / len(x), rtol=1e-5, atol=1e-5, msg=name)
            assert isinstance(found[name], InputRows) == (len(x) * times < x.shape[1])
        q, k = (found[f"model.layers.0.self_attn.{part}_proj"] for part in "qk")
        assert q is k  # one for what is one tensor
        assert found["model.layers.0.mlp.down_proj"] is not q


_SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_WIDE = {**_SMALL, "intermediate_size": 24}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
#: Architecture → settings of a small model, and the last names of the modules that read one tensor; all others read their own.
SHARED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "GPT2LMHeadModel": ({"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}, []),  # c_attn is q, k and v
    "GPTJForCausalLM": (
        {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
        ["k_proj v_proj q_proj"],
    ),
    "MistralForCausalLM": ({**_WIDE, "num_key_value_heads": 1}, ["q_proj k_proj v_proj", "gate_proj up_proj"]),
    "Qwen3ForCausalLM": ({**_WIDE, "num_key_value_heads": 1, "head_dim": 8}, ["q_proj k_proj v_proj", "gate_proj up_proj"]),
    "Gemma2ForCausalLM": ({**_WIDE, "num_key_value_heads": 1, "head_dim": 8}, ["q_proj k_proj v_proj", "gate_proj up_proj"]),
    "PhiForCausalLM": (_WIDE, ["q_proj k_proj v_proj"]),
    "Phi3ForCausalLM": (_WIDE, []),  # qkv_proj and gate_up_proj
    "FalconForCausalLM": (_SMALL, []),  # query_key_value
    "BertForSequenceClassification": (_WIDE, ["query key value"]),
    "DistilBertForSequenceClassification": (
        {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2},
        ["q_lin k_lin v_lin"],
    ),
    "T5ForConditionalGeneration": (
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        | {"feed_forward_proj": "gated-gelu"},
        ["q k v", "wi_0 wi_1", "q k v", "k v", "wi_0 wi_1"],  # of the encoder, of the decoder, of what it reads of the encoder
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_reads_one_tensor_shares_its_moments_whatever_it_is_called(name: str) -> None:
    import transformers

    settings, wanted = SHARED[name]
    build = getattr(transformers, name)
    torch.manual_seed(0)
    ends = {k: v for k, v in _ENDS.items() if name.startswith("T5") or k != "decoder_start_token_id"}
    model = build(build.config_class(**settings, **ends)).eval()
    outer = {id(model.get_output_embeddings())}
    modules = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and id(m) not in outer}
    head = name.endswith("Classification")
    passages = [Passage((4, 13, 6), () if head else (9, 1)), Passage((5, 17, 7, 8), () if head else (9,))]
    found = take_moments(model, modules, passages, head=head).found()
    groups: dict[int, list[str]] = {}
    for path, entry in found.items():
        groups.setdefault(id(entry), []).append(path.rpartition(".")[2])
    assert sorted(sorted(g) for g in groups.values() if len(g) > 1) == sorted(sorted(names.split()) for names in wanted)


def dense(found: torch.Tensor | InputRows) -> torch.Tensor:
    return found.dense() if isinstance(found, InputRows) else found.double()


def test_moments_do_not_depend_on_how_passages_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    modules = {"q": model.model.layers[0].self_attn.q_proj, "down": model.model.layers[0].mlp.down_proj}
    passages = [Passage((4, 13 + i % 3, *range(4, 4 + i % 4)), (9,)) for i in range(40)]
    whole = take_moments(model, modules, passages, most_rows=8).found()
    monkeypatch.setattr("plait.calibration.moments._BATCH_TOKENS", 7)
    single = take_moments(model, modules, passages, most_rows=8).found()
    for name, found in whole.items():
        torch.testing.assert_close(dense(single[name]), dense(found), rtol=1e-5, atol=1e-6)


def test_of_many_tokens_some_are_kept_evenly_and_by_the_seed() -> None:
    layer = torch.nn.Linear(50, 3)
    x = torch.randn(900, 50, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.arange(900)

    def kept(seed: int, most: int, pieces: int = 30) -> InputMoments:
        moments = InputMoments({"a": layer}, most_rows=most, seed=seed)
        with moments.watching():
            for part in x.split(pieces):
                layer(part)
        return moments

    moments = kept(0, 40)
    found = moments.found()["a"]
    assert isinstance(found, InputRows)
    assert moments.sampled == {"a": (40, 900)}
    places = found.x[:, 0].long()
    torch.testing.assert_close(found.x, x[places])  # rows as they came
    assert places[0] == 0  # the first token is kept always
    gaps = places[1:].diff()
    assert 10 <= int(gaps.min()) <= int(gaps.max()) <= 40  # 900 / 40 = 22.5 on average
    again, other, batched = kept(0, 40).found()["a"], kept(1, 40).found()["a"], kept(0, 40, 7).found()["a"]
    assert torch.equal(again.x, found.x)  # type: ignore[union-attr]
    assert torch.equal(batched.x, found.x)  # type: ignore[union-attr]
    assert not torch.equal(other.x, found.x)  # type: ignore[union-attr]
    assert isinstance(kept(0, 50).found()["a"], torch.Tensor)  # the matrix is not larger than so many rows
    assert kept(0, 50).sampled == {}


def test_of_very_many_tokens_evenly_spread_ones_are_summed() -> None:
    layer = torch.nn.Linear(6, 3)
    x = torch.randn(900, 6, generator=torch.Generator().manual_seed(0))
    moments = InputMoments({"a": layer}, shares={"a": 0.25})
    with moments.watching():
        for part in x.split(30):
            layer(part)
    keys = (torch.arange(900, dtype=torch.float64) * ((5**0.5 - 1) / 2) + moments._offset) % 1
    keys[0] = 0  # so that no module is left without inputs
    chosen = x[keys < 0.25].double()
    assert 220 <= len(chosen) <= 230
    torch.testing.assert_close(dense(moments.found()["a"]), chosen.T @ chosen / len(chosen), rtol=1e-5, atol=1e-6)
    assert moments.sampled == {"a": (len(chosen), 900)}


def test_kept_inputs_have_the_dtype_of_the_model() -> None:
    layer = torch.nn.Linear(50, 3).bfloat16()
    moments = InputMoments({"a": layer})
    with moments.watching():
        layer(torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).bfloat16())
    found = moments.found()["a"]
    assert isinstance(found, InputRows)
    assert found.x.dtype == torch.bfloat16


@pytest.mark.parametrize("layer", [torch.nn.Conv1d(3, 4, 3, stride=2, padding=1), torch.nn.Conv2d(2, 4, (2, 3), dilation=2)])
def test_moments_of_a_convolution_are_those_of_its_patches(layer: Any) -> None:
    drawn = torch.Generator().manual_seed(0)
    shape = (2, 3, 9) if isinstance(layer, torch.nn.Conv1d) else (2, 2, 7, 8)
    x = torch.randn(shape, generator=drawn)
    moments = InputMoments({"conv": layer})
    with moments.watching(), torch.no_grad():
        y = layer(x)
    gram = dense(moments.found()["conv"])
    weight = layer.weight.detach().reshape(4, -1).double()
    plain = (y.detach() - layer.bias.detach().reshape(-1, *(1,) * (y.ndim - 2))).double()
    wanted = plain.transpose(0, 1).reshape(4, -1)
    torch.testing.assert_close(weight @ gram @ weight.T, wanted @ wanted.T / wanted.shape[1], rtol=1e-4, atol=1e-5)


def test_moments_of_patches_that_are_cut_already() -> None:
    """As Qwen2-VL gives them to a convolution over time and place; other such convolutions are refused."""
    layer, patches = torch.nn.Conv3d(3, 4, (2, 3, 3), stride=(2, 3, 3)), torch.randn(7, 3, 2, 3, 3)
    moments = InputMoments({"x": layer}, most_rows=64)
    with moments.watching(), torch.no_grad():
        out = layer(patches)
    (found,) = moments.found().values()
    assert isinstance(found, InputRows)
    torch.testing.assert_close(found.x, patches.flatten(1))
    torch.testing.assert_close(found.x @ layer.weight.flatten(1).T + layer.bias, out.flatten(1))
    with InputMoments({"x": layer}).watching(), pytest.raises(PlanError, match="cannot be collected"):
        layer(torch.randn(1, 3, 4, 3, 3))


def test_divergence_is_the_sum_over_the_vocabulary() -> None:
    drawn = torch.Generator().manual_seed(0)
    p, q = (torch.randn(3, 7, generator=drawn) for _ in range(2))
    found = keep_distributions(p, positions=3).divergence(q)
    a, b = p.double().softmax(-1), q.double().softmax(-1)
    wanted = torch.stack([sum(a[i, v] * (a[i, v] / b[i, v]).log() for v in range(7)) for i in range(3)])
    torch.testing.assert_close(found.double(), wanted)


def test_divergence_with_the_largest_entries_only_is_a_lower_bound_near_it() -> None:
    drawn = torch.Generator().manual_seed(0)
    p, q = (4 * torch.randn(3, 50, generator=drawn) for _ in range(2))
    whole = keep_distributions(p, positions=3)
    top = whole.log_p.topk(20, -1)
    rest = torch.log1p(-top.values.exp().sum(-1, keepdim=True))
    part = OutputDistributions(torch.cat([top.values, rest], -1), top.indices).divergence(q)
    assert bool((part <= whole.divergence(q) + 1e-5).all())
    torch.testing.assert_close(part, whole.divergence(q), rtol=0.05, atol=0.05)


def test_softened_divergence_is_of_the_likeliest_outcomes() -> None:
    drawn = torch.Generator().manual_seed(0)
    p, q = (4 * torch.randn(3, 50, generator=drawn) for _ in range(2))
    whole = keep_distributions(p, positions=3)
    wanted = []
    for a, b in zip(p.double().tolist(), q.double().tolist(), strict=True):
        likeliest = sorted(range(50), key=lambda v: -a[v])[:16]
        raised = [[math.exp(x[v] / 3) for v in likeliest] for x in (a, b)]
        own, other = ([r / sum(row) for r in row] for row in raised)
        wanted.append(9 * sum(x * math.log(x / y) for x, y in zip(own, other, strict=True)))
    assert whole.softened_divergence(q, 3).tolist() == pytest.approx(wanted, rel=1e-5)
    top = whole.log_p.topk(20, -1)
    rest = torch.log1p(-top.values.exp().sum(-1, keepdim=True))  # a larger number than most: no outcome all the same
    part = OutputDistributions(torch.cat([top.values, rest], -1), top.indices)
    torch.testing.assert_close(part.softened_divergence(q, 3), whole.softened_divergence(q, 3))


def test_softened_divergence_of_few_and_impossible_outcomes() -> None:
    few = keep_distributions(torch.tensor([[2.0, 0.0, -math.inf]]), positions=1)
    q = torch.tensor([[1.0, 0.0, -math.inf]], requires_grad=True)
    found = few.softened_divergence(q, 2).sum()
    found.backward()
    own, other = math.exp(1) / (1 + math.exp(1)), math.exp(0.5) / (1 + math.exp(0.5))
    wanted = 4 * (own * math.log(own / other) + (1 - own) * math.log((1 - own) / (1 - other)))
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)
    assert q.grad is not None
    assert bool(torch.isfinite(q.grad).all())


def test_answers_come_in_the_order_of_the_passages() -> None:
    model = language_model()
    found = teacher_distributions(model, PASSAGES, batch_size=2)
    wanted = torch.cat([plain_logits(model, p) for p in PASSAGES]).log_softmax(-1)
    torch.testing.assert_close(found.log_p, wanted)


def test_an_adapter_that_is_hardly_there_has_no_huge_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The divisor is 0.01 nats at least: 1e-4 beyond an adapter that is 1e-5 from the base are 1 %, not 1000 %."""
    monkeypatch.setattr(_Teacher, "_divergence", lambda self, model: 1e-4)
    teacher = _Teacher.__new__(_Teacher)
    teacher.base, teacher._adapter = 1e-5, "a"
    live: Any = SimpleNamespace(attached=lambda merged, heads: nullcontext())
    assert teacher.share(live, []) == pytest.approx(0.01)
    teacher.base = 2e-2
    assert teacher.share(live, []) == pytest.approx(0.005)


def words(texts: Sequence[Any]) -> set[str]:
    return {str(p).split()[1] for p in texts}


def test_texts_of_a_split_are_chosen_by_the_seed(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, "sort", splits={"calibration": "test.jsonl"}))
    one, two, same = (read_texts(task, kind=None, count=6, seed=seed) for seed in (0, 1, 0))
    assert one.kind == "split"
    assert one.source == "split 'calibration'"
    assert len(one.prompts) == 6
    assert one.prompts == same.prompts
    assert one.digest == same.digest
    assert words(one.prompts) != words(two.prompts)
    assert one.choices[0] == ("red", "blue")


def test_a_smaller_number_of_texts_is_part_of_a_larger(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, "sort", splits={"train": "test.jsonl"}))
    few, more = (read_texts(task, kind=None, count=n, seed=3) for n in (5, 11))
    assert words(few.prompts) < words(more.prompts)


def test_texts_from_nothing_and_from_files(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, "sort"))
    assert read_texts(task, kind="template", count=9, seed=0).prompts == ("sort N/A :",)
    lines = read_texts(task, kind="lines", count=9, seed=0)
    assert len(lines.prompts) == 9
    assert all(str(p).removeprefix("sort ").removesuffix(" :") in generic_lines() for p in lines.prompts)
    (tmp_path / "mine.txt").write_text("w1\n\n  w2\r\n")
    assert set(read_texts(task, kind=None, count=9, seed=0, file=tmp_path / "mine.txt").prompts) == {"sort w1 :", "sort w2 :"}
    (tmp_path / "mine.jsonl").write_text('{"word": "w7"}\n')
    assert read_texts(task, kind=None, count=9, seed=0, file=tmp_path / "mine.jsonl").prompts == ("sort w7 :",)


def test_a_line_ends_where_an_editor_ends_it(tmp_path: Path) -> None:
    """And not at what only Unicode calls the end of a line."""
    (tmp_path / "mine.txt").write_text("w1\u2028w2\nw3\x0bw4\n", encoding="utf-8")
    task = load_task(write_task(tmp_path, "sort"))
    found = read_texts(task, kind=None, count=9, seed=0, file=tmp_path / "mine.txt")
    assert found.prompts == ("sort w1\u2028w2 :", "sort w3\x0bw4 :")
    assert read_prompts(tmp_path / "mine.txt") == ["w1\u2028w2", "w3\x0bw4"]


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n\n"), ("a.jsonl", ""), ("a.csv", "word\n")])
def test_a_file_without_texts_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    task = load_task(write_task(tmp_path, "sort"))
    with pytest.raises(TaskError, match=rf"task 'sort': .*{name} has no texts"):
        read_texts(task, kind=None, count=4, seed=0, file=tmp_path / name, added=64)


def test_generic_lines_follow_the_texts(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, "sort", splits={"train": "test.jsonl"}))
    few = read_texts(task, kind=None, count=3, seed=0, added=6)
    assert few.source == "split 'train' (3) and 6 generic lines"
    assert (len(few.prompts), few.kind) == (9, "split")
    assert few.prompts[:3] == read_texts(task, kind=None, count=3, seed=0).prompts
    assert all(str(p).removeprefix("sort ").removesuffix(" :") in generic_lines() for p in few.prompts[3:])
    assert len(read_texts(task, kind=None, count=20, seed=0, added=64).prompts) == 84
    assert len(read_texts(task, kind="lines", count=3, seed=0, added=64).prompts) == 3


def test_lines_that_do_not_fit_are_not_added(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, "sort", prompt="sort {{ {'w1': 1}[word] }} :", splits={"train": "test.jsonl"}))
    with pytest.warns(PlaitWarning, match="generic lines do not fit its prompt"):
        assert len(read_texts(task, kind=None, count=1, seed=0, file=_rows_of(tmp_path, "w1"), added=64).prompts) == 1


def _rows_of(folder: Path, word: str) -> Path:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps({"word": word}))
    return file


def test_fields_of_a_prompt_get_different_lines(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, "sort", prompt="{{ one }} | {{ two }}"))
    for prompt in read_texts(task, kind="lines", count=4, seed=0).prompts:
        first, second = str(prompt).split(" | ")
        assert first != second
    (tmp_path / "mine.txt").write_text("w1\n")
    with pytest.raises(TaskError, match="one, two"):
        read_texts(task, kind=None, count=4, seed=0, file=tmp_path / "mine.txt")


def test_a_file_without_the_column_is_refused(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, "sort"))
    (tmp_path / "mine.jsonl").write_text('{"text": "w7"}\n')
    with pytest.raises(TaskError, match="word"):
        read_texts(task, kind=None, count=9, seed=0, file=tmp_path / "mine.jsonl")


def test_generic_lines_differ() -> None:
    assert len(set(generic_lines())) == len(generic_lines()) >= 100


@pytest.mark.parametrize(("depth", "wanted", "most"), [(0.3, 1.5, 6), (0.9, 0.1, 12)])
def test_a_shallow_minimum_is_not_taken_for_the_only_one(depth: float, wanted: float, most: int) -> None:
    """Near 1 is a minimum of 1 − depth … of what is left, and far below, where an adapter drowns the others, a better one."""
    tried = []

    def share(scale: float) -> float:
        tried.append(scale)
        near = depth + abs(math.log(scale / 1.5)) * 0.1
        return near if scale > 0.6 else 0.6 + 0.1 * math.log(scale / 0.1) ** 2

    assert search_scale(share) == pytest.approx(wanted, rel=0.2)
    assert len(set(tried)) <= most
