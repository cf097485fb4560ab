"""Which tokens end an answer: all that tokenizer, generation config and config name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moe_prism.model import end_tokens


def model(generation, config, text=None):
    inner = SimpleNamespace(vocab_size=100, eos_token_id=text)
    outer = SimpleNamespace(eos_token_id=config, get_text_config=lambda: inner)
    return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=generation), config=outer)


@pytest.mark.parametrize(
    ("generation", "config", "text", "tokenizer", "expected"),
    [
        (0, 0, None, 7, {0, 7}),  # a chat model whose tokenizer ends a turn with a token of its own
        ([1, 2], 3, 4, None, {1, 2, 3, 4}),
        (None, None, None, None, set()),
        (5, -1, None, 100, {5}),  # what no row of the model can be
    ],
)
def test_end_tokens_are_united(generation, config, text, tokenizer, expected):
    found = end_tokens(model(generation, config, text), SimpleNamespace(eos_token_id=tokenizer))
    assert found == expected


def test_a_model_without_a_tokenizer_has_its_own():
    assert end_tokens(model(3, None)) == {3}
