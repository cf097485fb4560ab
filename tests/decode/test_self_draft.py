"""Drafts of the model itself: the answer is the one of plain decoding, whatever was guessed."""

import pytest
import torch

import moe_prism
from moe_prism.artefact.open import open_to_write
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs.generate import generate
from moe_prism.methods.decode.run import Through, asked_decoding, decoder_of
from moe_prism.options.generate import GenerateOptions
from moe_prism.point import FULL, OperatingPoint, RoutingStage

from .common import PROMPTS, decoded, texts


@pytest.fixture(scope="module")
def nano(elastic_nano):
    return moe_prism.load(elastic_nano)


@pytest.fixture(scope="module")
def mix():
    """nano-mix as it is shipped: it drafts with fewer experts."""
    return open_to_write("nano-mix")


@pytest.mark.parametrize(
    ("which", "temperature"),
    [("nano", 0.8), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("nano", 0.0), ("mix", 0.0), ("mix", 0.8)))],
)
def test_tokens_are_those_of_plain_decoding(request, which, temperature):
    opened = request.getfixturevalue(which)
    plain, _ = texts(opened, FULL, temperature=temperature, seed=5)
    for budget, length, adapt in ((0.25, 4, False), (0.5, 1, False), (0.5, 3, True)):
        found, facts = texts(
            opened, decoded("self-draft", budget=budget, length=length, adapt=adapt), temperature=temperature, seed=5
        )
        assert found == plain
        assert adapt or sum(f["drafted"] for f in facts) > 0


def test_guesses_drawn_with_the_same_random_numbers_are_mostly_right(nano):
    _, facts = texts(nano, decoded("self-draft", budget=0.5, length=2, adapt=False), temperature=0.8, max_tokens=40)
    assert sum(f["kept"] for f in facts) > 0.6 * sum(f["drafted"] for f in facts)


def test_a_draft_at_full_budget_is_always_right(nano):
    """In fewer passes of the model: 24 tokens in rounds of 4."""
    _, facts = texts(nano, decoded("self-draft", budget=1.0, length=3, adapt=False))
    for f in facts:
        assert f["kept"] >= f["drafted"] - 2  # the answer may end within the last draft


def test_a_draft_of_no_tokens_is_plain_decoding(nano):
    plain, _ = texts(nano, FULL)
    found, facts = texts(nano, decoded("self-draft", length=0))
    assert found == plain and all(f["drafted"] == 0 for f in facts)


def test_the_streamed_text_is_the_answer(nano):
    heard = []
    made = generate(*nano, PROMPTS[0], point=decoded("self-draft", adapt=False), heard=heard.append)
    assert "".join(heard) == made.text


def test_it_verifies_at_the_points_own_routing(nano):
    """Fewer experts in the check than the model has: the answer of those."""
    fewer = OperatingPoint(routing=(RoutingStage(layers=(3,) * 6),))
    plain, _ = texts(nano, fewer)
    found, _ = texts(nano, decoded("self-draft", fewer, adapt=False))
    assert found == plain != texts(nano, FULL)[0]


@torch.no_grad()
def test_bytes_count_each_expert_of_a_check_once(nano):
    """A check of four tokens reads less than four steps, and more than one."""
    model, tokenizer = nano
    elastic = model._moe_prism
    read = {}
    for length in (0, 3):
        point = decoded("self-draft", budget=1.0, length=length, adapt=False)
        through = Through(decoder_of(elastic, point), tokenizer, elastic, FULL, counting=True)
        ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
        model.generate(ids, max_new_tokens=21, custom_generate=through, do_sample=False, eos_token_id=None, pad_token_id=0)
        read[length] = through.spent.expert_bytes
        assert through.spent.forwards == 21  # a draft at full budget costs a pass per guess
    steps = read[0] / 21
    assert read[0] + steps < read[3] < 2 * read[0]


def test_json_of_a_point_survives_and_settings_are_checked(nano):
    point = decoded("self-draft", budget=0.5, length=2)
    assert OperatingPoint.from_json(point.to_json()) == point
    elastic = nano[0]._moe_prism
    for settings, said in (
        ({"budgets": 0.5}, "no setting 'budgets'"), ({"budget": "much"}, "is no float"), ({"length": True}, "is no int"),
        ({"length": 99}, "give 0 to 16"), ({"budget": 0.0}, "outside"),
    ):  # fmt: skip
        with pytest.raises((UsageError, CorruptError), match=said):
            decoder_of(elastic, decoded("self-draft", **settings))
    assert asked_decoding("self-draft:0.5").settings["budget"] == 0.5
    with pytest.raises(UsageError, match="unknown decoding method"):
        asked_decoding("speculate")


def test_a_held_budget_is_refused(nano):
    with pytest.raises(UsageError, match="control 'none'"):
        generate(*nano, "x", point=decoded("self-draft", FULL.with_budget(0.5)))
    loose = FULL.with_budget(0.5, "threshold", "none")
    plain, _ = texts(nano, loose)
    assert texts(nano, decoded("self-draft", loose, adapt=False))[0] == plain


def test_single_forwards_refuse_a_point_that_decodes(nano):
    with pytest.raises(UsageError, match="decodes a request"), moe_prism.operating_point(nano[0], point=decoded("self-draft")):
        pass


def test_more_than_one_prompt_is_refused(nano):
    model, tokenizer = nano
    elastic, point = model._moe_prism, decoded("self-draft")
    through = Through(decoder_of(elastic, point), tokenizer, elastic, FULL)
    with pytest.raises(UsageError, match="2 prompts at once"):
        model.generate(torch.zeros(2, 3, dtype=torch.long), custom_generate=through, max_new_tokens=2, pad_token_id=0)


def test_options_of_a_request_are_kept(nano):
    made = generate(*nano, PROMPTS[0], point=decoded("self-draft", adapt=False), sampling=GenerateOptions(max_tokens=7))
    assert made.tokens == 7
