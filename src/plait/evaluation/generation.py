"""Generation: greedy in batches, and one reply at a time as it is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from plait.errors import RecipeError
from plait.evaluation.model_calls import check_lengths, decoder_start, form_of, padded, perceived_of, refused_inputs
from plait.evaluation.output_layer import plain_states
from plait.notices import announce
from plait.tasks.encoding import Question


def generate(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: int,
    report: Callable[[int], object] = lambda done: None,
    unfinished: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Return the greedy answer to every prompt, without special tokens, cut at the first stop text.

    Args:
        model: a causal language model of transformers, or an encoder-decoder model with a language head.
        tokenizer: its tokenizer.
        questions: prompts as tokens; their answers are not looked at.
        max_new_tokens: longest answer.
        stop: texts at which an answer ends.
        batch_size: prompts answered at a time.
        report: called with the number of prompts finished since it was last called.
        unfinished: called with the number of answers that came to no end.

    Raises:
        TaskError: a prompt and its answer may be longer than the model's context.
    """
    answers, ends = [""] * len(questions), end_tokens(model, tokenizer)
    for batch, tokens in _answered(model, tokenizer, questions, max_new_tokens, stop, batch_size):
        for i, text in zip(batch, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            answers[i] = text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
        unfinished(sum(ends.isdisjoint(row) for row in tokens.tolist()))
        report(len(batch))
    return answers


def generate_tokens(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Return the greedy answer to every prompt as tokens, up to and with the end token.

    Args:
        model: as `generate` takes it.
        tokenizer: its tokenizer.
        questions: prompts as tokens; their answers are not looked at.
        max_new_tokens: longest answer.
        batch_size: prompts answered at a time.

    Raises:
        TaskError: as `generate`.
    """
    ends = end_tokens(model, tokenizer)
    answers: list[list[int]] = [[] for _ in questions]
    for batch, rows in _answered(model, tokenizer, questions, max_new_tokens, (), batch_size):
        for i, row in zip(batch, rows.tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
            answers[i] = row[: end + 1]
    return answers


@dataclass(frozen=True)
class Sampling:
    """How a reply is written.

    Attributes:
        max_new_tokens: its longest length.
        temperature: that logits are divided by before tokens are drawn; 0 takes the likeliest token.
        top_p: tokens are drawn among the likeliest that have this probability together.
        seed: of the draws; each reply begins with it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuse values that no reply can be written with.

        Raises:
            RecipeError: with all of them.
        """
        bounds = {
            "--max-new-tokens (max_new_tokens=) must be at least 1": self.max_new_tokens >= 1,
            "--temperature (temperature=) must be 0 or larger": 0 <= self.temperature < float("inf"),
            "--top-p (top_p=) must be a share in (0, 1]": 0 < self.top_p <= 1,
            "--top-p (top_p=) has no effect without --temperature": self.top_p == 1 or self.temperature > 0,
        }
        if broken := [text for text, holds in bounds.items() if not holds]:
            raise RecipeError(f"{'; '.join(broken)}.")


def write_reply(
    model: Any, tokenizer: Any, prompt: Sequence[int], sampling: Sampling, report: Callable[[str], object] = lambda text: None
) -> tuple[str, int, bool]:
    """Return a reply without special tokens, how many tokens it has, and whether it came to its end.

    Args:
        model: as `generate` takes it.
        tokenizer: its tokenizer.
        prompt: tokens.
        sampling: how.
        report: called with the text so far whenever there is more of it.

    Raises:
        TaskError: prompt and reply may be longer than the model's context.
    """
    drawn = {} if sampling.temperature == 0 else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    shorten = "Give a shorter prompt, or a smaller --max-new-tokens (max_new_tokens=)."
    check_lengths(model, _lengths(model, [len(prompt)], sampling.max_new_tokens), advice=shorten)
    config = _config(model, tokenizer, sampling.max_new_tokens, do_sample=bool(drawn), **drawn)
    ids = torch.tensor([list(prompt)], device=model.device)
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    accelerators = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(accelerators),
        torch.inference_mode(),
        plain_states(model),
        configured(model, config),
        announced_rereading(model),
    ):
        torch.manual_seed(sampling.seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=_Stream(tokenizer, report),
        )
    tokens = out[0, start:].tolist()
    return (
        tokenizer.decode(tokens, skip_special_tokens=True),
        len(tokens),
        bool(tokens) and tokens[-1] in end_tokens(model, tokenizer),
    )


class _Stream:
    """Decodes tokens as transformers gives them to a streamer: the prompt first."""

    def __init__(self, tokenizer: Any, report: Callable[[str], object]) -> None:
        self._tokenizer, self._report = tokenizer, report
        self._tokens: list[int] | None = None

    def put(self, value: Tensor) -> None:
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.reshape(-1).tolist()
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose other bytes come with the next token
            self._report(text)

    def end(self) -> None:
        """Nothing is held back."""


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer."""
    # the model's own settings may ask for sampling, or punish repetition; only its end tokens are wanted
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])


def _answered(
    model: Any, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int, stop: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches of questions by their places, with the tokens of their answers, padded on the right."""
    encoder_decoder = bool(model.config.is_encoder_decoder)
    check_lengths(model, _lengths(model, [len(q.prompt) for q in questions], max_new_tokens))
    config = _config(model, tokenizer, max_new_tokens, do_sample=False)
    pad, criteria = config.pad_token_id, import_module("transformers").StoppingCriteriaList
    for batch in _batches(questions, batch_size):
        rows = [questions[i].prompt for i in batch]
        ids, mask = padded(rows, model.device, pad, left=not encoder_decoder)
        perceived = perceived_of([questions[i] for i in batch], model)
        start = 1 if encoder_decoder else ids.shape[1]  # where the generated tokens begin
        with (
            torch.inference_mode(),
            plain_states(model),
            configured(model, config),
            announced_rereading(model),
            refused_inputs(model, perceived),
        ):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=criteria([_StopTexts(tokenizer, stop, start)]),
                **perceived,
            )
        yield batch, out[:, start:]


def _batches(questions: Sequence[Question], batch_size: int) -> Iterator[list[int]]:
    """Group questions of like length; with images or sounds of one length and form, so that nothing is padded."""
    alike: dict[tuple[int, str], list[int]] = defaultdict(list)
    for i in sorted(range(len(questions)), key=lambda i: (len(questions[i].prompt), i)):
        form = form_of(questions[i])
        alike[len(questions[i].prompt) if form else 0, form].append(i)
    for group in alike.values():
        for at in range(0, len(group), batch_size):
            yield group[at : at + batch_size]


def _lengths(model: Any, prompts: Sequence[int], max_new_tokens: int) -> list[int]:
    """Return how many tokens a model may have to read for prompts of these lengths and their answers."""
    apart = bool(model.config.is_encoder_decoder)
    return [max(n, 1 + max_new_tokens) if apart else n + max_new_tokens for n in prompts]


def _config(model: Any, tokenizer: Any, max_new_tokens: int, **how: Any) -> Any:
    """Return transformers' configuration of a generation without beams."""
    encoder_decoder = bool(model.config.is_encoder_decoder)
    begins = {"decoder_start_token_id": decoder_start(model)} if encoder_decoder else {}
    if encoder_decoder and (first := getattr(model.generation_config, "forced_bos_token_id", None)) is not None:
        begins["forced_bos_token_id"] = first  # that some models must begin with
    return import_module("transformers").GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        eos_token_id=sorted(end_tokens(model, tokenizer)) or None,
        pad_token_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,  # masked; any token will do
        **begins,
        **how,
    )


@contextmanager
def announced_rereading(model: Any) -> Iterator[None]:
    """Announce it where a model reads the complete text again for every token that it generates within the block."""
    calls = 0

    def count(_: Any, given: Any, keywords: Mapping[str, Any]) -> None:
        nonlocal calls
        ids = keywords.get("decoder_input_ids")
        ids = keywords.get("input_ids") if ids is None else ids
        calls += 1
        if calls > 1 and ids is not None and ids.shape[1] > 1:
            name = type(model).__name__
            announce(
                f"{name} generates the slower way, the complete text read again for every token: its generation keeps no "
                "cache of what it has read.",
                once=f"rereading {type(model).__qualname__}",
            )

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def configured(model: Any, config: Any) -> Iterator[None]:
    """Replace the model's generation configuration, from which `generate` takes what is not given."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


@dataclass(frozen=True, eq=False)
class _StopTexts:
    """Finds the rows that have generated a stop text; transformers' own criterion accepts some kinds of tokenizer only."""

    tokenizer: Any
    stop: Sequence[str]
    start: int

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = [False] * len(ids)
        if self.stop:
            texts = self.tokenizer.batch_decode(ids[:, self.start :], skip_special_tokens=True)
            done = [any(s in text for s in self.stop) for text in texts]
        return torch.tensor(done, device=ids.device)
