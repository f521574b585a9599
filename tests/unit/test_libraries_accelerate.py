"""What plait expects of accelerate. A test that fails names what a release has changed."""

from __future__ import annotations

import pytest
import transformers

from plait.libraries.accelerate import PLACEMENTS
from tests.language_models import language_model


@pytest.mark.parametrize("word", PLACEMENTS)
def test_words_that_spread_a_model_are_known(word, tmp_path):
    language_model().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=word)
    assert not any(p.is_meta for p in model.parameters())


def test_another_word_is_refused(tmp_path):
    language_model().save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="balanced_high")
