"""What a model is asked to read: tokens and calls, for every family of architectures, so that a lost fast way fails here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from plait.evaluation import likelihood
from plait.evaluation.likelihood import log_likelihoods
from plait.libraries.transformers.reading import cache_argument, cache_of
from plait.notices import PlaitWarning
from plait.tasks.encoding import Question
from tests.every import every
from tests.unit.test_likelihood import literal

SMALL = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
PREFIX, RESTS = 11, (5, 1, 9, 3, 3, 7, 2)
ANSWERS = [[5], [6, 7, 8], [9], [6, 7, 9], [10, 11]]  # the second and the fourth begin alike
STEMS = ((6, 7), (10,))


def made(name: str, model: str | None = None, **config: Any) -> nn.Module:
    """Build a small random model by the name of its configuration, and its own where that is another."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Config")
    known = kind()
    settings = {k: v for k, v in SMALL.items() if hasattr(known, k) and not isinstance(getattr(kind, k, None), property)}
    own = getattr(transformers, model or f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    return own(kind(**{**settings, **config})).eval()


# architectures that keep what they have read, and count positions as they are given
PADDED: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: made("Llama"),
    "qwen2": lambda: made("Qwen2"),
    "qwen3": lambda: made("Qwen3"),
    "mistral": lambda: made("Mistral", sliding_window=60),
    "mixtral": lambda: made("Mixtral", num_local_experts=4),
    "gemma2": lambda: made("Gemma2", sliding_window=60),
    "gemma3": lambda: made("Gemma3Text", "Gemma3ForCausalLM", sliding_window=60),
    "phi": lambda: made("Phi"),
    "phi3": lambda: made("Phi3"),
    "gpt2": lambda: made("GPT2"),
    "gpt-j": lambda: made("GPTJ", rotary_dim=4),
    "gpt-neox": lambda: made("GPTNeoX"),
    "opt": lambda: made("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "falcon": lambda: made("Falcon"),
    "falcon with alibi": lambda: made("Falcon", alibi=True),
    "roberta": lambda: made("Roberta", is_decoder=True),
}
# those that take a mask of which token sees which; ALiBi, and RoBERTa in transformers 4, know a mask of padding only
MASKED = PADDED.keys() - {"falcon with alibi", *(["roberta"] if transformers.__version__ < "5" else [])}
# those that count by where a token lies in their memory: prompts of one length at a time
ALIGNED: dict[str, Callable[[], nn.Module]] = {
    "mpt": lambda: made("Mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "bloom": lambda: made("Bloom"),
    "gpt-neo": lambda: made("GPTNeo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=6),
    "mistral, short window": lambda: made("Mistral", sliding_window=8),
    "gemma2, short window": lambda: made("Gemma2", sliding_window=8),
    "bart's decoder": lambda: made("Bart", d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48),
}
# those whose memory is a running state
WHOLE: dict[str, Callable[[], nn.Module]] = {
    "mamba": lambda: made("Mamba", state_size=4),
    "jamba": lambda: made(
        "Jamba",
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "falcon-mamba": lambda: made("FalconMamba", state_size=4),
}


def questions(rests: Sequence[int] = RESTS, prefix: int = PREFIX, answers: Sequence[list[int]] = ANSWERS) -> list[Question]:
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(12, 37, (n,), generator=generator).tolist()

    shared = tokens(prefix)
    return [Question([*shared, *tokens(n)], list(answers)) for n in rests]


@contextmanager
def counted(model: nn.Module, inputs: str = "input_ids") -> Iterator[list[tuple[int, int]]]:
    """Note the shape of the tokens of every call of a model."""
    shapes: list[tuple[int, int]] = []

    def note(_: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        shapes.append(tuple((given[0] if given else keywords[inputs]).shape))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def asked(model: nn.Module, batch_size: int = 16, *, packed: bool = False, **settings: Any) -> list[tuple[int, int]]:
    """Ask a model, compare what it says with what it says alone, and return the shapes that it was given.

    Without `packed` the questions count as too long for packed rows.
    """
    wanted = questions(**settings)
    with pytest.MonkeyPatch.context() as patch, counted(model) as shapes:
        if not packed:
            patch.setattr(likelihood, "_reads_less_packed", lambda questions: False)
        found = log_likelihoods(model, wanted, batch_size=batch_size)
    shapes = list(shapes)
    for question, row in zip(wanted, found, strict=True):
        assert row == pytest.approx(literal(model, question), abs=5e-4)
    return shapes


@pytest.mark.parametrize("name", PADDED)
def test_prefix_once_prompts_once_and_only_longer_answers(name):
    n, width = len(RESTS), max(map(len, STEMS))
    assert asked(PADDED[name]()) == [(1, PREFIX), (n, max(RESTS)), (n * len(STEMS), width)]


@every("name", sorted(MASKED))
def test_short_prompts_and_longer_answers_are_packed_in_rows(name):
    model = PADDED[name]()
    asked(model, packed=True)  # whether it can be read so is tried once
    texts = [[*q.prompt, *stem] for q in questions() for stem in STEMS]
    assert asked(model, packed=True) == [(1, len({tuple(text[: n + 1]) for text in texts for n in range(len(text))}))]


def test_prompts_that_fill_rows_and_many_answers_of_one_token_are_not_packed():
    model = PADDED["llama"]()
    long = [Question([4] * 30 + [n] * 300, [[5], [6]]) for n in (7, 8, 9)]
    answers = [Question([4] * 30 + [n], [[5] * 300]) for n in (7, 8)]
    for asks in (long, answers):
        assert not likelihood._fit_rows(asks)
        assert likelihood._packed_reader(model, asks) is None
    assert likelihood._reads_less_packed(questions())
    assert likelihood._fit_rows(questions())
    assert asked(model, packed=True, rests=(9, 9, 9), prefix=40, answers=[[5], [6]]) == [(1, 40), (3, 9)]


@pytest.mark.parametrize("answers", [ANSWERS, [[5], [6], [7]]])
def test_the_likeliest_answers_and_their_scores_come_from_one_pass(answers):
    model = PADDED["llama"]()
    wanted = questions(answers=answers)
    scores = log_likelihoods(model, wanted, batch_size=16)
    kept: dict[int, torch.Tensor] = {}
    with counted(model) as shapes:
        chosen = likelihood.likeliest_answers(model, wanted, batch_size=16, keep=kept.__setitem__)
    stems = {tuple(a[:-1]) for a in answers}
    texts = [[*q.prompt, *stem] for q in wanted for stem in stems]
    assert shapes == [(1, len({tuple(text[: n + 1]) for text in texts for n in range(len(text))}))]
    assert chosen == [row.index(max(row)) for row in scores]
    for i, q in enumerate(wanted):
        answer = q.answers[chosen[i]]
        alone = model(input_ids=torch.tensor([[*q.prompt, *answer]])).logits[0, len(q.prompt) - 1 : -1]
        torch.testing.assert_close(kept[i], alone, rtol=1e-3, atol=1e-3)


def test_the_likeliest_answers_of_a_model_that_reads_no_packed_rows_are_found_otherwise():
    model = WHOLE["mamba"]()
    with counted(model) as shapes:
        assert likelihood.likeliest_answers(model, questions(), batch_size=16, keep=lambda *_: None) is None
    assert shapes == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_answers_of_one_token_are_not_read(name):
    assert asked(PADDED[name](), answers=[[5], [6], [7]]) == [(1, PREFIX), (len(RESTS), max(RESTS))]
    assert asked(PADDED[name](), answers=[[5], [6]], prefix=0) == [(len(RESTS), max(RESTS))]


@pytest.mark.parametrize("name", ALIGNED)
def test_prompts_of_one_length_at_a_time(name):
    lengths = sorted(set(RESTS))
    rows = [RESTS.count(n) for n in lengths]
    wanted = [pair for n, count in zip(lengths, rows, strict=True) for pair in ((count, n), (count * len(STEMS), 2))]
    assert asked(ALIGNED[name]()) == [(1, PREFIX), *wanted]


@pytest.mark.parametrize("name", WHOLE)
def test_running_states_read_whole_texts_in_batches(name):
    """One row per prompt and beginning of longer answers; answers of one token are read off any of them."""
    model = WHOLE[name]()
    with pytest.warns(PlaitWarning, match=r"evaluated the slower way.*running state|evaluated the slower way.*layers of type"):
        shapes = asked(model, batch_size=4)
    rows = len(RESTS) * len(STEMS)
    assert len(shapes) == -(-rows // 4)
    assert sum(n for n, _ in shapes) == rows
    lengths = sorted(PREFIX + rest + len(stem) for rest in RESTS for stem in STEMS)
    assert shapes == [(len(lengths[i : i + 4]), max(lengths[i : i + 4])) for i in range(0, rows, 4)]


def test_running_states_read_every_prompt_once_for_answers_of_one_token():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked(WHOLE["mamba"](), answers=[[5], [6], [7]], prefix=0) == [(len(RESTS), max(RESTS))]  # nothing is lost


def test_an_encoder_decoder_reads_prompts_once_and_answers_once():
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=37, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ).eval()
    with counted(model.get_encoder()) as read, counted(model, "decoder_input_ids") as message:
        log_likelihoods(model, questions(), batch_size=16)
    assert read == [(len(RESTS), PREFIX + max(RESTS))]
    assert message == [(len(RESTS) * len(STEMS), 3)]
    with counted(model, "decoder_input_ids") as message:
        log_likelihoods(model, questions(answers=[[5], [6], [7]]), batch_size=16)
    assert message == [(len(RESTS), 1)]


def test_the_slower_way_is_announced_once():
    model = WHOLE["mamba"]()
    with pytest.warns(PlaitWarning) as caught:
        log_likelihoods(model, questions(), batch_size=4)
    (warning,) = caught
    assert warning.filename == __file__, "it points at the caller, not into plait"
    log_likelihoods(model, questions(), batch_size=4)  # any warning is an error here


# What a later transformers may do.


class Renamed(transformers.LlamaForCausalLM):
    """Its cache has another name, as an argument and in the output."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, memory=None, use_cache=None, logits_to_keep=0):
        own = cache_argument(transformers.LlamaForCausalLM(self.config))
        out = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{own: memory},
        )
        held = cache_of(out)
        return transformers.utils.ModelOutput(logits=out.logits, **({} if held is None else {"memory": held[1]}))


class Annotated(Renamed):
    """Only its annotation says which argument takes a cache; the output calls it otherwise."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past: transformers.Cache | None = None, **kw):
        return super().forward(input_ids, attention_mask, position_ids, past, **kw)


class Unnamed(transformers.LlamaForCausalLM):
    """Nothing is known of what it takes."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Deaf(transformers.LlamaForCausalLM):
    """Takes a cache, and begins anew all the same."""

    def forward(self, input_ids=None, attention_mask=None, cache=None, use_cache=None, **kwargs):
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        return super().forward(input_ids=input_ids, attention_mask=mask, use_cache=use_cache)


class Forgetful(transformers.LlamaForCausalLM):
    """Gives no cache."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
        return transformers.utils.ModelOutput(logits=out.logits)


class Refusing(transformers.LlamaForCausalLM):
    """Fails on any text that does not begin at the beginning."""

    def forward(self, input_ids=None, attention_mask=None, cache=None, use_cache=None, **kwargs):
        if cache is not None:
            raise RuntimeError("shapes differ")
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


class Uncached(transformers.LlamaForCausalLM):
    """Its forward has neither a cache nor a wish for one."""

    def forward(self, input_ids=None, attention_mask=None):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return transformers.utils.ModelOutput(logits=out.logits)


def of_class(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind(transformers.LlamaConfig(**SMALL)).eval()


@pytest.mark.parametrize("kind", [Renamed, Annotated, Unnamed])
def test_another_name_of_the_cache_is_found(kind):
    shapes = asked(of_class(kind))
    assert shapes[0] == (1, PREFIX)
    assert sum(n * w for n, w in shapes) <= PREFIX + len(RESTS) * (max(RESTS) + 2 * len(STEMS))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Deaf, "takes 'cache' but does not read on from it"),
        (Forgetful, "its output holds no cache"),
        (Refusing, "reading on from what it has read fails .RuntimeError: shapes differ."),
        (Uncached, "its forward takes no cache"),
    ],
)
def test_a_cache_that_cannot_be_continued_is_announced_with_the_reason(kind, reason):
    with pytest.warns(PlaitWarning, match=f"{kind.__name__} is evaluated the slower way.*{reason}"):
        shapes = asked(of_class(kind))
    whole = [w for n, w in shapes if w > PREFIX for _ in range(n)]
    assert len(whole) == len(RESTS) * len(STEMS), "one read per prompt and longer answer"
