"""What --text, --text-field and --domain name, and how a manifest remembers it."""

from __future__ import annotations

import json

import pytest

from moe_prism.errors import UsageError
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.frontier import FrontierOptions
from moe_prism.options.speed import SpeedOptions
from moe_prism.options.text import TextSource, named_parts, other_source, source_in, text_source

SOURCES = [
    TextSource.of("stdlib"),
    text_source("rows.jsonl", ["question", "answer"]),
    text_source(None, [], ["code=a/b", "prose=c=d.txt"]),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.label)
def test_a_manifest_says_what_was_read(source):
    facts = json.loads(json.dumps(source.facts()))
    assert source_in(facts) == source and facts["text"] == source.label
    assert other_source(facts, None, []) == source
    assert other_source(facts, "other.txt", ["body"]) == TextSource((("", "other.txt"),), ("body",))
    assert other_source(facts, None, ["body"]) == TextSource(source.parts, ("body",))


def test_a_plain_source_is_remembered_as_before():
    assert TextSource.of("stdlib").facts() == {"text": "stdlib"}


@pytest.mark.parametrize("given", ["code", "=path", "code=", "a/b=path", "-x=path", "a b=path", "ü=path"])
def test_domains_need_a_name_and_a_path(given):
    with pytest.raises(UsageError, match=r"--domain .* is not NAME=PATH"):
        named_parts([given], "--domain")


@pytest.mark.parametrize("kind", [CalibrateOptions, FrontierOptions])
def test_what_cannot_be_meant_together_is_refused(kind):
    with pytest.raises(UsageError, match="exclude each other"):
        kind(text="topics", domains=["a=b"]).check()
    with pytest.raises(UsageError, match="names 'a' twice"):
        kind(domains=["a=b", "a=c"]).check()
    kind(domains=["a=topics", "b=topics"]).check()
    with pytest.raises(UsageError, match="text source 'nowhere' does not exist"):
        kind(domains=["a=topics", "b=nowhere"]).check()


def test_nothing_that_is_asked_for_is_ignored():
    with pytest.raises(UsageError, match="belong to --tasks"):
        CalibrateOptions(answer_tokens=9).check()
    with pytest.raises(UsageError, match="--text-field belongs to --text"):
        SpeedOptions(text_field=["body"]).check()
