"""Log-likelihoods, generation and heads, against a literal reading with the model alone."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForSequenceClassification,
)

from plait.errors import TaskError
from plait.evaluation.generation import generate
from plait.evaluation.heads import head_outputs
from plait.evaluation.likelihood import log_likelihoods
from plait.evaluation.scoring import answer_examples, likeliest
from plait.tasks.encoding import Question
from plait.tasks.examples import read_examples
from plait.tasks.loading import load_task
from tests.language_models import WORDS, language_model, tokenizer, write_task


def gpt2() -> GPT2LMHeadModel:
    """Learned positions: a padded prompt must not shift them."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=37, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4)
    ).eval()


def mistral(window: int) -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=window,
        initializer_range=0.4,
    )
    return MistralForCausalLM(config).eval()


def mpt() -> MptForCausalLM:
    """ALiBi, by where a token lies in the cache: no padding may come between."""
    torch.manual_seed(0)
    return MptForCausalLM(
        MptConfig(vocab_size=37, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, initializer_range=0.4)
    ).eval()


def gpt_neo() -> GPTNeoForCausalLM:
    """Local attention, by where a token lies in the cache."""
    torch.manual_seed(0)
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=37,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=6,
            max_position_embeddings=64,
            initializer_range=0.4,
        )
    ).eval()


def roberta_config() -> RobertaConfig:
    return RobertaConfig(
        vocab_size=37,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=66,
        initializer_range=0.4,
        is_decoder=True,
        pad_token_id=1,
    )


def roberta() -> RobertaForCausalLM:
    """Positions that start behind the padding's."""
    torch.manual_seed(0)
    return RobertaForCausalLM(roberta_config()).eval()


MODELS = {
    "llama": language_model,
    "gpt2": gpt2,
    "short window": lambda: mistral(8),
    "long window": lambda: mistral(60),
    "alibi": mpt,
    "local attention": gpt_neo,
    "positions from behind": roberta,
}


def questions(shared: int, seed: int = 0) -> list[Question]:
    """Prompts of different lengths that begin alike, continuations of one to four tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(4, 37, (n,), generator=generator).tolist()

    prefix = tokens(shared)
    return [Question(prefix + tokens(n), [tokens(1), tokens(3), tokens(1), tokens(4)]) for n in (5, 1, 9, 3, 3, 7, 2)]


def literal(model: torch.nn.Module, question: Question) -> list[float]:
    found = []
    for message in question.answers:
        ids = torch.tensor([question.prompt + message])
        with torch.no_grad():
            logp = model(ids).logits[0].double().log_softmax(-1)
        at = len(question.prompt)
        found.append(sum(float(logp[at + k - 1, token]) for k, token in enumerate(message)))
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shared", [0, 2, 11])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_log_likelihoods_are_the_models_own(name, shared, batch_size):
    model = MODELS[name]()
    asked = questions(shared)
    found = log_likelihoods(model, asked, batch_size=batch_size)
    for question, row in zip(asked, found, strict=True):
        assert row == pytest.approx(literal(model, question), abs=2e-4)


def test_progress_counts_every_question():
    seen: list[int] = []
    log_likelihoods(language_model(), questions(6), batch_size=2, report=seen.append)
    assert sum(seen) == 7


@pytest.mark.parametrize("how", ["likelihood", "generation"])
def test_the_frozen_output_matrix_is_not_copied_for_every_row(how):
    model = language_model().requires_grad_(False)
    with torch.profiler.profile(record_shapes=True) as profile:
        if how == "likelihood":
            log_likelihoods(model, questions(8), batch_size=4)
        else:
            generate(model, tokenizer(), questions(8), max_new_tokens=2, stop=(), batch_size=4)
    made = {event.name for event in profile.events() if any(37 in shape for shape in event.input_shapes)}  # the vocabulary
    assert "aten::mm" in made
    assert "aten::bmm" not in made, "a product with a copy per row"
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_texts_that_do_not_fit():
    with pytest.raises(TaskError, match=r"1 of 8 texts are longer than the model's context of 64 tokens .the longest has 70"):
        log_likelihoods(language_model(), [*questions(0), Question([5] * 68, [[6, 7]])], batch_size=4)


def test_positions_that_no_token_can_have_are_not_counted():
    """Of RoBERTa's 66 positions 64 can be used; one more would be an index error deep in torch."""
    tokens, config = tokenizer(), roberta_config()
    config.is_decoder, config.num_labels = False, 2
    model = RobertaForSequenceClassification(config).eval()
    fits, too_long = " ".join(["w1"] * 64), " ".join(["w1"] * 65)
    assert len(head_outputs(model, tokens, read_texts([fits]), outputs=2, batch_size=1)) == 1
    with pytest.raises(TaskError, match=r"longer than the model's context of 64 tokens .the longest has 65"):
        head_outputs(model, tokens, read_texts([too_long]), outputs=2, batch_size=1)


def test_outputs_that_are_no_numbers_are_no_answers():
    model, tokens = language_model(), tokenizer()
    head = LlamaForSequenceClassification(model.config).eval()
    for broken in (model, head):
        broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(TaskError, match=r"outputs are NaN \(computed in torch.float32\).*--load-dtype"):
        log_likelihoods(model, questions(2), batch_size=4)
    with pytest.raises(TaskError, match="outputs are NaN"):
        head_outputs(head, tokens, read_texts(["w1"]), outputs=2, batch_size=1)


def test_how_length_counts():
    scores, texts, tokens = [-4.0, -5.0, -6.2], ["ab", "abcdef", "é" * 3], [1, 2, 2]
    assert likeliest(scores, texts, tokens, "sum") == 0
    assert likeliest(scores, texts, tokens, "tokens") == 1
    assert likeliest(scores, ["abcdefgh", "abc", "é" * 20], tokens, "bytes") == 2


def test_calibration_takes_off_the_blank_prompt(tmp_path):
    model, tokens = language_model(), tokenizer()
    plain = read_examples(load_task(write_task(tmp_path, "sort")), "test")
    fair = read_examples(load_task(write_task(tmp_path, "sort", calibrated=True)), "test")
    assert fair.blank == "sort N/A :"
    raw = answer_examples(model, tokens, plain, batch_size=8)
    calibrated = answer_examples(model, tokens, fair, batch_size=8)
    labels = [tokens(label)["input_ids"] for label in ("red", "blue")]
    blank = literal(model, Question(tokens("sort N/A :")["input_ids"], labels))
    for one, other in zip(raw, calibrated, strict=True):
        assert one.scores == pytest.approx(other.scores)
        gains = [s - b for s, b in zip(one.scores, blank, strict=True)]
        assert other.given == ("red", "blue")[gains.index(max(gains))]
    assert [a.given for a in raw] != [a.given for a in calibrated], "the base prefers one label, whatever the word"


def test_perplexity_of_texts(tmp_path):
    model, tokens = language_model(), tokenizer()
    task = load_task(
        write_task(tmp_path, "sort", kind="perplexity", labels=None, prompt=None, target="sort {{ word }} : {{ label }}")
    )
    examples = read_examples(task, "test")
    found = answer_examples(model, tokens, examples, batch_size=5)
    for example, one in zip(examples.items, found, strict=True):
        ids = tokens(example.target)["input_ids"]
        assert one.tokens == (4,)
        assert one.scores == pytest.approx(literal(model, Question([tokens.bos_token_id], [ids])), abs=1e-4)


def test_answers_are_what_the_model_says_alone():
    model, tokens = language_model(), tokenizer()
    prompts = [tokens(text)["input_ids"] for text in ("sort w1 :", "w2", "rate w3 : very w4 w5 :")]
    message = generate(model, tokens, [Question(p, []) for p in prompts], max_new_tokens=6, stop=(), batch_size=2)
    for prompt, text in zip(prompts, message, strict=True):
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=6, do_sample=False
            )
        assert text == tokens.decode(out[0, len(prompt) :], skip_special_tokens=True)
    word = message[0].split()[2]
    cut = generate(model, tokens, [Question(prompts[0], [])], max_new_tokens=6, stop=(word,), batch_size=1)
    assert cut == [message[0][: message[0].index(word)]]


def test_answers_are_greedy_whatever_the_model_is_configured_to_do():
    """Many chat models come with a penalty on repetition, some with words that they must not say."""
    tokens, model = tokenizer(), language_model()
    asked = [Question(tokens(text)["input_ids"], []) for text in ("sort w1 :", "w2", "rate w3 : very w4 w5 :")]
    plain = generate(model, tokens, asked, max_new_tokens=8, stop=(), batch_size=2)
    own = model.generation_config
    own.update(
        do_sample=True, repetition_penalty=1.8, no_repeat_ngram_size=2, suppress_tokens=tokens(plain[0])["input_ids"][:2]
    )
    assert generate(model, tokens, asked, max_new_tokens=8, stop=(), batch_size=2) == plain
    assert model.generation_config is own


def test_answers_without_any_special_token():
    model, tokens = language_model(), tokenizer()
    asked = [Question(tokens(text)["input_ids"], []) for text in ("sort w1 :", "w2")]
    tokens.pad_token = tokens.eos_token = model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    together = generate(model, tokens, asked, max_new_tokens=5, stop=(), batch_size=2)
    assert together == generate(model, tokens, asked, max_new_tokens=5, stop=(), batch_size=1)


def test_a_head_says_the_same_in_any_batch():
    torch.manual_seed(0)
    config = language_model().config
    config.num_labels = 3
    model, tokens = LlamaForSequenceClassification(config).eval(), tokenizer()
    texts = ["sort w1 :", "w2", "rate w3 : very w4 w5 :", "w7 w8"]
    found = head_outputs(model, tokens, read_texts(texts), outputs=3, batch_size=3)
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([tokens(text)["input_ids"]])).logits[0].tolist()
        assert row == pytest.approx(alone, abs=1e-5)
    with pytest.raises(TaskError, match="the task has 2 labels"):
        head_outputs(model, tokens, read_texts(texts), outputs=2, batch_size=3)


def read_texts(texts: list[str]) -> list[Question]:
    return [Question(row, []) for row in tokenizer()(texts)["input_ids"]]


def test_words_of_the_model():
    """The tests' tokenizer knows every word that they use."""
    unknown = tokenizer().unk_token_id
    assert unknown not in tokenizer()(" ".join([*WORDS, "sort rate : very red blue good bad N/A"]))["input_ids"]
