"""A gate before retrieval: what it costs is the formula, and what it adds stands before the prompt."""

import pytest
import torch

import moe_prism
from moe_prism.errors import UsageError
from moe_prism.jobs.generate import generate
from moe_prism.methods.decode.expert_rag import entropy_share, expected_cost, router_entropy
from moe_prism.methods.decode.run import Through, decoder_of, function_of
from moe_prism.options.generate import GenerateOptions
from moe_prism.point import FULL

from .common import PROMPTS, decoded

FOUND = "# helpers of this file\nimport json\n"


@pytest.fixture(scope="module")
def nano(elastic_nano):
    return moe_prism.load(elastic_nano)


def test_even_routing_has_entropy_one_and_certain_routing_none():
    assert entropy_share(torch.ones(3, 8)) == pytest.approx(1.0)
    assert entropy_share(torch.eye(8)) == pytest.approx(0.0, abs=1e-9)


def test_the_answer_is_that_of_the_longer_prompt(nano):
    sampling = GenerateOptions(max_tokens=12)
    asked = []

    def retriever(prompt):
        asked.append(prompt)
        return FOUND

    made = generate(*nano, PROMPTS[1], point=decoded("expert-rag", threshold=0.0), sampling=sampling, retriever=retriever)
    assert asked == [PROMPTS[1]] and made.decoding["retrieved"] and made.tokens == 12
    tokenizer = nano[1]
    ids = tokenizer(FOUND)["input_ids"] + tokenizer(PROMPTS[1])["input_ids"]
    with torch.no_grad():
        plain = nano[0].generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(ids) :]
    assert made.text == tokenizer.decode(plain, skip_special_tokens=True)


def test_the_cost_of_a_trace_is_the_formula(nano):
    """Rows that the model computed: at the threshold that retrieves for half of the prompts."""
    model, tokenizer = nano
    elastic, shares, rows = model._moe_prism, [], {}
    for prompt in PROMPTS:
        with router_entropy(elastic) as seen, torch.no_grad():
            model(torch.tensor([tokenizer(prompt)["input_ids"]]))
        shares.append(sum(seen) / len(seen))
    middle = sorted(shares)[1]
    for threshold in (1.0, middle):
        point, rows[threshold] = decoded("expert-rag", threshold=threshold), []
        for prompt in PROMPTS:
            through = Through(decoder_of(elastic, point), tokenizer, elastic, FULL, retriever=lambda _: FOUND)
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            model.generate(ids, max_new_tokens=5, custom_generate=through, do_sample=False, eos_token_id=None, pad_token_id=0)
            rows[threshold].append((through.spent.rows, through.facts["retrieved"]))
    extra = len(tokenizer(FOUND)["input_ids"])
    experts = sum(r for r, _ in rows[1.0]) / 4
    hits = [i for i, (_, retrieved) in enumerate(rows[middle]) if retrieved]
    assert len(hits) == 2 and not any(retrieved for _, retrieved in rows[1.0])
    retrieval = sum(extra + len(tokenizer(PROMPTS[i])["input_ids"]) for i in hits) / len(hits)  # the prompt runs again behind it
    assert sum(r for r, _ in rows[middle]) / 4 == pytest.approx(expected_cost(experts, len(hits) / 4, retrieval))


def test_nobody_to_ask_is_said(nano, tmp_path):
    with pytest.raises(UsageError, match="needs a retriever"):
        generate(*nano, "x", point=decoded("expert-rag", threshold=0.0))
    file = tmp_path / "mine.py"
    file.write_text("def found(prompt):\n    return 'x'\n")
    assert function_of(f"{file}:found")("y") == "x"
    for wrong in ("found", f"{file}:other", f"{tmp_path}/none.py:found"):
        with pytest.raises(UsageError, match=r"FILE\.py:FUNCTION"):
            function_of(wrong)
