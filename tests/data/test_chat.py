"""Conversations through the chat template of a model, which is somebody's code."""

from __future__ import annotations

import json
import time

import pytest

from moe_prism.data import chat as chat_module
from moe_prism.data import read_documents, token_windows
from moe_prism.data.chat import REFUSED, Chat
from moe_prism.data.fields import LeftOutError, Turns
from moe_prism.data.text import Reading
from moe_prism.errors import UsageError
from moe_prism.tally import TextTally

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('only users and assistants') }}{% endif %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = Turns(({"role": "user", "content": "Hi ü"}, {"role": "assistant", "content": "Yo"}))


class Tokenizer:
    """One id per character; the mark of a document is written "^"."""

    bos_token_id, eos_token_id = 1, None
    special_tokens_map = {"bos_token": "^"}  # noqa: RUF012

    def __init__(self, template=TEMPLATE):
        self.chat_template = template

    def get_chat_template(self):
        if isinstance(self.chat_template, dict):
            raise ValueError("This model has multiple chat templates with no default specified!")
        return self.chat_template

    def __call__(self, text, **_):
        return {"input_ids": [1 if c == "^" else 2 + ord(c) % 90 for c in text]}


@pytest.fixture(scope="module")
def chat():
    with Chat(Tokenizer()) as chat:
        yield chat


def test_turns_are_written_as_the_model_reads_them(chat):
    assert chat.has_template
    assert chat.write(TURNS) == "^<user>Hi ü</><assistant>Yo</>"
    assert chat.write(TURNS.question(), for_answer=True) == "^<user>Hi ü</><assistant>"


def test_what_the_template_refuses_is_left_out_and_the_next_is_written(chat, tmp_path):
    with pytest.raises(LeftOutError, match=REFUSED):
        chat.write(Turns(({"role": "pirate", "content": "Arr"},)))
    assert "only users and assistants" in chat.refusal
    assert chat.write(TURNS).startswith("^<user>")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "pirate", "content": "Arr"}]}))
    with pytest.raises(UsageError, match=r"rows that the chat template refuses 1.*only users and assistants"):
        read_documents(tmp_path / "rows.jsonl", Reading(TextTally("rows"), chat=chat))


def test_without_a_template_the_contents_are_the_text():
    with Chat() as chat:
        assert not chat.has_template and chat.write(TURNS) == "Hi ü\n\nYo"


def test_a_document_has_one_mark_whoever_writes_it(tmp_path):
    row = {"messages": [dict(turn) for turn in TURNS.turns]}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for _ in range(3)))
    ids = token_windows(Tokenizer(), str(tmp_path / "rows.jsonl"), "calibration", length=20, tokens=60).ids.flatten().tolist()
    assert ids.count(1) == 3 and ids[:2] != [1, 1]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "did not end within 1 s of computing"),
        ("{{ 'x' * 9999999999 }}", REFUSED),
    ],
)
def test_a_hostile_template_costs_seconds(template, says, monkeypatch):
    monkeypatch.setattr(chat_module, "SECONDS", 1)
    with Chat(Tokenizer(template)) as chat:
        with pytest.raises((UsageError, LeftOutError), match=says):
            chat.write(TURNS)
        process = chat._process
    assert process is None or process.poll() is not None
    began = time.monotonic()
    chat.close()
    assert time.monotonic() - began < 5


def test_templates_without_a_default_and_huge_ones_are_refused():
    with pytest.raises(UsageError, match="multiple chat templates"):
        Chat(Tokenizer({"a": "x", "b": "y"}))
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        Chat(Tokenizer("x" * (1 << 21)))
