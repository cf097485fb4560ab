"""Tokens and text: bytes join to the text, offsets are right, and a stream says what the whole answer says."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_prism.model import load_tokenizer
from moe_prism.model.named import NANO
from moe_prism.serve.http.detokenize import detokenizer
from moe_prism.serve.http.prompts import _begin
from moe_prism.serve.http.refusal import Refusal
from moe_prism.serve.http.vocabulary import PARTIAL, Vocabulary

CASES = int(os.environ.get("TEXT_CASES", "25"))
NANO_WORDS = load_tokenizer(NANO)
MARKS = st.characters(min_codepoint=0x300, max_codepoint=0x36F)
odd = st.text(
    st.sampled_from("🙂👩🏽‍🚀🇨🇭漢字かな한글") | MARKS | st.sampled_from("aeé \n\t") | st.characters(codec="utf-8"),
    max_size=30,
)


def llama_like():
    """A tokenizer that writes spaces as a letter, falls back to bytes, and drops the first space of a text."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdeé漢", "▁a", "ab"]
    made = Tokenizer(
        models.BPE({t: i for i, t in enumerate(letters)}, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def word_pieces():
    """A tokenizer whose tokens' texts depend on their neighbours."""
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "ab": 1, "##c": 2, "d": 3}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


WORDS = {"bytes": NANO_WORDS, "spaces": llama_like(), "pieces": word_pieces()}
LOOKED_UP = {name: Vocabulary(words, len(words) + 3) for name, words in WORDS.items()}


def walk(vocabulary, ids, hide=True):
    made = detokenizer(vocabulary, (), hide=hide)
    steps = [made.push(i) for i in ids]
    return steps, "".join(s.text for s in steps) + made.rest()


@pytest.mark.parametrize("kind", WORDS)
@settings(deadline=None, max_examples=CASES * 4)
@given(st.data())
def test_pieces_join_to_the_decoded_text(kind, data):
    words, vocabulary = WORDS[kind], LOOKED_UP[kind]
    assert vocabulary.exact == (kind != "pieces")
    source = data.draw(odd | st.lists(st.integers(0, len(words) - 1), max_size=40))
    ids = words(source)["input_ids"] if isinstance(source, str) else source
    steps, text = walk(vocabulary, ids)
    whole = words.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if kind != "spaces" or "\ufffd" not in whole:  # tokenizers gives a whole run of bytes up if one of them is wrong
        assert text == whole
    if vocabulary.exact:
        joined = b"".join(s.data for s in steps)
        assert joined.decode("utf-8", "replace") == text
        at = 0
        for step in steps:  # the character that holds its first byte
            if step.data:
                assert step.offset == len((joined[:at] + step.data[:1]).decode("utf-8", "replace")) - 1
            at += len(step.data)


@pytest.mark.parametrize("kind", WORDS)
@settings(deadline=None, max_examples=CASES)
@given(st.data())
def test_a_continuation_is_what_the_whole_has_more(kind, data):
    words, vocabulary = WORDS[kind], LOOKED_UP[kind]
    first, second = (words(data.draw(odd), add_special_tokens=False)["input_ids"] for _ in range(2))
    decode = lambda ids: words.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # noqa: E731
    if not decode(first) or kind == "pieces":
        return
    made = detokenizer(vocabulary, first, hide=True)
    text = "".join(made.push(i).text for i in second) + made.rest()
    assert decode(first) + text == decode([*first, *second])


def test_tokens_have_names_of_their_own():
    names = [LOOKED_UP["bytes"].piece(i).name for i in range(LOOKED_UP["bytes"].size)]
    assert len(set(names)) == len(names)
    assert names[0] == "<|endoftext|>" and names[-1] == f"token_id:{len(names) - 1}"
    half = NANO_WORDS("🙂")["input_ids"]
    assert [LOOKED_UP["bytes"].piece(i).name.startswith(PARTIAL) for i in half] == [len(half) > 1] * len(half)


def test_the_longest_token_bounds_a_prompt():
    vocabulary = LOOKED_UP["bytes"]
    assert vocabulary.longest == max(len(vocabulary.piece(i).data) for i in range(vocabulary.size))


@settings(deadline=None, max_examples=CASES)
@given(odd, odd)
def test_answers_are_right_outside_ascii_streamed_and_whole(served, before, after):
    web, words = served
    ids = words(after, add_special_tokens=False)["input_ids"][:20] or [5]
    body = {
        "prompt": before or "a",
        "temperature": 1.0,
        "seed": 5,
        "max_tokens": len(ids),
        "logprobs": 1,
        "echo": True,
        "ignore_eos": True,
    }
    whole = web.post("/v1/completions", json={**body, "allowed_token_ids": ids}).json()["choices"][0]
    said, streamed = "", {name: [] for name in whole["logprobs"]}
    for line in web.post("/v1/completions", json={**body, "allowed_token_ids": ids, "stream": True}).text.split("\n\n"):
        for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else []:
            said += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                streamed[name] += values
    assert said == whole["text"] and streamed == whole["logprobs"]
    scores = whole["logprobs"]
    joined = b"".join(bytes(data or []) for data in scores["bytes"])
    assert joined.decode("utf-8", "replace") == whole["text"] and whole["text"].startswith(before or "a")
    at = 0
    for data, offset, name in zip(scores["bytes"], scores["text_offset"], scores["tokens"], strict=True):
        if data:
            assert offset == len((joined[:at] + bytes(data[:1])).decode("utf-8", "replace")) - 1
            partial = PARTIAL + "".join(rf"\x{b:02x}" for b in data)
            assert name in (partial, bytes(data).decode("utf-8", "replace"))
        at += len(data or [])


@pytest.fixture(scope="module")
def served(house):
    with httpx2.Client(base_url=house.root, timeout=60) as web:
        yield web, house.built.service.tokenizer


def test_an_empty_prompt_needs_a_token_to_begin_with():
    def service(bos, eos):
        return SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=bos), eos=frozenset(eos), vocabulary=9)

    assert _begin(service(4, {7})) == [4] and _begin(service(None, {7, 5})) == [5]
    with pytest.raises(Refusal, match="the prompt is empty") as found:
        _begin(service(None, ()))
    assert (found.value.status, found.value.param) == (400, "prompt")


def test_chats_say_the_bytes_too(chat_house):
    body = {
        "messages": [{"role": "user", "content": "漢"}],
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 1,
    }
    emoji = chat_house.built.service.tokenizer("🙂", add_special_tokens=False)["input_ids"]
    answer = httpx2.post(
        f"{chat_house.url}/chat/completions", json={**body, "allowed_token_ids": [*emoji, 0], "ignore_eos": True}
    ).json()
    choice = answer["choices"][0]
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(e["bytes"] or []) for e in entries).decode("utf-8", "replace") == choice["message"]["content"]
    assert all(e["bytes"] is None for e in entries if e["token"] == "<|endoftext|>")
