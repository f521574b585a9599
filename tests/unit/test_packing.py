"""Texts in one row, beside each alone; and how much is read, for every family of architectures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from plait.calibration.moments import without_padding
from plait.calibration.passages import Passage, Reader
from plait.evaluation import packing
from plait.evaluation.packing import PackedRows, pack_apart, pack_shared
from plait.notices import PlaitWarning
from tests.every import every
from tests.unit.test_likelihood_reads import ALIGNED, MASKED, PADDED, WHOLE, counted

PREFIX = [20, 21, 22, 23, 24, 25, 26]
PASSAGES = [
    Passage((*PREFIX, *rest), answer) for rest, answer in (((12,), (5, 6)), ((13, 14, 15), (7,)), ((12, 16), (5, 8, 9)))
]


def seen_by(text: Sequence[int], packed: PackedRows, at: int) -> list[list[int]]:
    """Return, per token of a packed text, what it sees, in the order of positions."""
    row, columns = packed.places[at]
    ids, positions, seen = packed.ids[row], packed.positions[row], packed.seen[row]
    assert ids[list(columns)].tolist() == list(text)
    assert positions[list(columns)].tolist() == list(range(len(text)))
    found = []
    for column in columns:
        others = seen[column].nonzero()[:, 0]
        found.append(ids[others[positions[others].argsort()]].tolist())
    return found


def test_every_token_sees_its_own_text_up_to_itself_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(1, 9, (7,), generator=generator).tolist()
        texts = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in lengths]
        for packed in (pack_shared(texts, most=12), pack_apart(texts), pack_shared(texts)):
            for i, text in enumerate(texts):
                assert seen_by(text, packed, i) == [text[: k + 1] for k in range(len(text))]


def test_common_beginnings_are_one_path_and_rows_are_filled_up_to_a_limit():
    texts = [[1, 2, 3, 4], [9, 9], [1, 2, 3, 5, 6], [1, 2, 3, 4]]
    assert pack_shared(texts).ids.shape == (1, 8)
    assert pack_apart(texts).ids.shape == (1, 15)
    assert pack_shared(texts, most=6).ids.shape == (2, 6)
    assert pack_shared([[n, n, n] for n in range(5)], most=12).ids.shape == (2, 9)  # not 12 and 3
    assert pack_shared([[1] * 9, [2]], most=9).ids.shape == (2, 9)  # a longer text has a row of its own


def alone(model: nn.Module, passage: Passage) -> torch.Tensor:
    ids = torch.tensor([[*passage.prompt, *passage.answer[:-1]]])
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, -len(passage.answer) :]
    return found


@every("name", sorted(MASKED))
def test_rows_read_as_texts_alone_and_hold_every_token_once(name):
    model = PADDED[name]()
    reader = Reader(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", PlaitWarning)
        reader.logits(PASSAGES)
        with counted(model) as shapes:
            found = reader.logits(PASSAGES)
    wanted = torch.cat([alone(model, p) for p in PASSAGES])
    torch.testing.assert_close(found, wanted, atol=5e-5, rtol=5e-4)
    assert shapes == [(1, len(PREFIX) + 2 + 3 + 3)]  # 12 is read once, by two texts


@every("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_gradients_are_those_of_the_texts_alone(name):
    model = PADDED[name]()
    weight = next(p for p in model.parameters() if p.ndim == 2)
    Reader(model).logits(PASSAGES).log_softmax(-1)[:, 3].sum().backward()
    found = weight.grad.clone()
    model.zero_grad()
    torch.cat([alone(model, p) for p in PASSAGES]).log_softmax(-1)[:, 3].sum().backward()
    torch.testing.assert_close(found, weight.grad, atol=2e-4, rtol=2e-3)


@every("name", [*ALIGNED, *WHOLE, *(PADDED.keys() - MASKED)])
def test_models_that_see_by_place_or_keep_a_state_are_padded_and_that_is_announced(name):
    model = (PADDED | ALIGNED | WHOLE)[name]()
    with torch.no_grad(), counted(model) as shapes, pytest.warns(PlaitWarning, match="reads every text completely"):
        Reader(model).logits(PASSAGES)
    assert shapes[-1] == (3, len(PREFIX) + 4)


def test_a_model_that_ignores_the_mask_is_found_out(monkeypatch):
    model = PADDED["llama"]()
    forward = model.forward

    def ignoring(attention_mask=None, position_ids=None, **keywords):
        return forward(**keywords)

    model.forward = ignoring
    monkeypatch.setattr(packing.reading, "why_not_packed", lambda model, longest: None)
    with pytest.warns(PlaitWarning, match="in one row, they are not what they are alone"):
        assert not Reader(model).reads_in_one_row(PASSAGES[:1])  # one text alone would not show it
    with torch.no_grad():
        found = Reader(model).logits(PASSAGES)
    torch.testing.assert_close(found, torch.cat([alone(model, p) for p in PASSAGES]))


def test_texts_without_a_common_beginning_and_of_one_length_are_not_packed():
    model = PADDED["llama"]()
    with torch.no_grad(), counted(model) as shapes:
        Reader(model).logits([Passage((12, 13, 14), (5,)), Passage((15, 16, 17), (5,))])
    assert shapes == [(2, 3)]


def test_batches_without_padding_hold_short_texts_of_several_lengths():
    model = PADDED["llama"]()
    texts = [Passage(tuple(range(12, 12 + n)), (5,)) for n in (3, 4, 5, 4)]
    batches = list(without_padding(Reader(model), texts))
    assert [len(p.prompt) for batch in batches for p in batch] == [3, 4, 4, 5]
    assert len(batches) == 1
    with torch.no_grad(), counted(model) as shapes:
        Reader(model).read(batches[0])
    assert shapes == [(1, 16)]
    with pytest.warns(PlaitWarning, match="running state"):
        assert [len(b) for b in without_padding(Reader(WHOLE["mamba"]()), texts)] == [1, 2, 1]
