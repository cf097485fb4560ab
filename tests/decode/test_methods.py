"""Self-contrast, search over experts, early stopping: what their papers say of them, on the shipped models."""

import random

import pytest
import torch

import moe_prism
from moe_prism.errors import UsageError
from moe_prism.frontier.measure import measure
from moe_prism.jobs.generate import generate
from moe_prism.methods.decode.concise import Concise, ConciseParameters, confidence
from moe_prism.methods.decode.des import Des, DesParameters, with_experts
from moe_prism.methods.decode.run import Through, decoder_of
from moe_prism.methods.decode.scmoe import ScmoeParameters, contrast, rank_alone
from moe_prism.methods.decode.sequence import Sequence, Spent
from moe_prism.options.generate import GenerateOptions
from moe_prism.point import FULL, OperatingPoint
from tests.tiers import by_night

from .common import PROMPTS, decoded, texts


@pytest.fixture(scope="module")
def nano(elastic_nano):
    return moe_prism.load(elastic_nano)


@pytest.fixture(scope="module")
def plain(nano):
    return texts(nano, FULL)[0]


# -- SCMoE


@pytest.mark.parametrize("beta", by_night([0.3, 0.9], 0.9))
def test_equal_routings_contrast_to_nothing(nano, plain, beta):
    assert texts(nano, decoded("scmoe", beta=beta, budget=1.0))[0] == plain


def test_a_contrast_changes_tokens_and_reads_both_forwards(nano, plain):
    found, _ = texts(nano, decoded("scmoe", beta=0.9))
    assert found != plain
    model, tokenizer = nano
    elastic, ids = model._moe_prism, tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    read = {}
    for point in (decoded("self-draft", length=0), decoded("scmoe", beta=0.0)):
        through = Through(decoder_of(elastic, point), tokenizer, elastic, FULL, counting=True)
        model.generate(ids, max_new_tokens=16, custom_generate=through, do_sample=False, eos_token_id=None, pad_token_id=0)
        read[point.decoding.method] = through.spent
    one, two = read["self-draft"], read["scmoe"]
    assert two.forwards == 2 * one.forwards and two.rows == 2 * one.rows
    steps = one.expert_bytes
    assert 1.2 * steps < two.expert_bytes < 1.45 * steps  # the weak forward has one of four experts, and the same prompt


def test_contrasted_logits_are_the_papers(nano):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        s, w = torch.randn(40, generator=generator), torch.randn(40, generator=generator)
        found = contrast(s, w, ScmoeParameters(beta=0.5, alpha=0.1))
        inside = s >= s.max() + torch.log(torch.tensor(0.1))
        torch.testing.assert_close(found[inside], 1.5 * s[inside] - 0.5 * w[inside])
        assert torch.isinf(found[~inside]).all() and bool(inside[s.argmax()])
        assert torch.equal(contrast(s, w, ScmoeParameters(beta=0.0))[inside], s[inside])


def test_kl_to_the_strong_forward_grows_with_the_rank(nano):
    model, tokenizer = nano
    text = "import os\nimport sys\n\n\ndef main(argv):\n    for name in argv:\n        print(name)\n" * 16
    ids = torch.tensor(tokenizer(text)["input_ids"][:256]).view(2, 128)
    points = [OperatingPoint(routing=(rank_alone(model._moe_prism, rank),)) for rank in (2, 3, 4)]
    kl = [one.quality.kl for one in measure(model, ids, points)]
    assert kl == sorted(kl) and kl[0] > 0.1


def test_a_rank_keeps_one_expert_with_the_weight_of_all(nano):
    model, _ = nano
    elastic = model._moe_prism
    layer, x = elastic.layers[2], torch.randn(6, 128)
    index, weight = torch.stack([torch.randperm(32)[:4] for _ in range(6)]), torch.rand(6, 4).sort(1, descending=True).values
    from moe_prism.routing import stage_class

    stage = stage_class("rank")([rank_alone(elastic, 2)])
    after = stage(layer.routed(x, index, weight, {}), 0)
    assert after.index[:, 1].equal(index[:, 1]) and (after.index[:, [0, 2, 3]] == -1).all()
    torch.testing.assert_close(after.weight.sum(1), weight.sum(1))


def test_ranks_that_a_token_does_not_have_are_refused(nano):
    for settings in ({"rank": 5}, {"rank": 0}, {"beta": -1.0}, {"alpha": 0.0}, {"budget": 2.0}):
        with pytest.raises(UsageError):
            generate(*nano, "x", point=decoded("scmoe", **settings))


# -- DES


def test_experts_per_token_are_spread_around_the_models_own():
    des = Des("des", DesParameters(beams=5, keep=1, spread=0.5))
    assert des.numbers(4, 32) == [2, 3, 4, 5, 6]
    assert des.numbers(8, 9) == [4, 5, 6, 8, 9]
    assert Des("des", DesParameters(beams=1, keep=1)).numbers(4, 32) == [4]


@torch.no_grad()
@pytest.mark.parametrize("n", [2, 6])
def test_a_number_of_experts_is_computed_and_paid_for(nano, n):
    """More than the router's k too; k itself is the model."""
    model, _ = nano
    elastic, ids = model._moe_prism, torch.arange(40, 72)[None]
    assert with_experts(elastic, FULL, 4) is FULL
    own, other = (one.cost for one in measure(model, ids, [FULL, with_experts(elastic, FULL, n)]))
    assert other.active_expert_bytes == pytest.approx(own.active_expert_bytes * n / 4)


def test_the_best_text_wins_and_its_number_is_inherited(nano):
    """A verifier that likes one letter: the answer has more of it than plain drawing."""
    seen = []

    def verifier(prompt, text):
        seen.append((prompt, text))
        return text.count("s") / max(1, len(text))

    sampling = GenerateOptions(max_tokens=40, temperature=1.0, seed=1)
    point = decoded("des", beams=6, keep=2, spread=0.5)
    made = generate(*nano, PROMPTS[0], point=point, sampling=sampling, verifier=verifier)
    assert made.decoding["experts"] in (2, 3, 4, 5, 6) and all(prompt == PROMPTS[0] for prompt, _ in seen)
    assert made.decoding["score"] >= 0.9 * max(text.count("s") / max(1, len(text)) for _, text in seen[-6:])
    assert made.decoding["written"] > made.tokens
    again = generate(*nano, PROMPTS[0], point=point, sampling=sampling, verifier=verifier)
    assert again.text == made.text


def test_a_beam_alone_draws_what_plain_decoding_draws(nano):
    hot = {"temperature": 0.9, "seed": 3}
    assert texts(nano, decoded("des", beams=1, keep=1), **hot)[0] == texts(nano, FULL, **hot)[0]


def test_beams_without_a_verifier_are_refused(nano):
    with pytest.raises(UsageError, match="needs a verifier"):
        generate(*nano, "x", point=decoded("des"))
    for settings in ({"beams": 2, "keep": 3}, {"spread": 1.0}, {"steps": 0}, {"end": ""}):
        with pytest.raises(UsageError):
            generate(*nano, "x", point=decoded("des", **settings))


# -- ConCISE


ASKED = {"end": ",", "sure": "def", "unsure": "class", "close": "\nimport"}


def test_lengths_fall_with_the_threshold(nano, plain):
    lengths, probes = [], []
    for threshold in (1.01, 0.9, 0.5, 0.1, 0.0):
        made, facts = texts(nano, decoded("concise", threshold=threshold, **ASKED))
        lengths.append([f["stopped_at"] or 99 for f in facts])
        probes.append([f["probes"] for f in facts])
        if threshold > 1:
            assert made == plain and all(f["probes"] == 0 for f in facts)
    for row in zip(*lengths, strict=True):
        assert list(row) == sorted(row, reverse=True)
    assert lengths[-1] != lengths[0]


def test_the_closing_text_follows_where_it_stops(nano):
    made = generate(*nano, PROMPTS[0], point=decoded("concise", threshold=0.0, **ASKED), sampling=GenerateOptions(max_tokens=60))
    stop = made.decoding["stopped_at"]
    assert stop is not None
    assert ",\nimport" in made.text


@torch.no_grad()
def test_a_probe_leaves_the_cache_to_the_bit(nano):
    model, tokenizer = nano
    elastic = model._moe_prism
    from moe_prism.elastic.bind import Step, bind

    step = Step(bind(elastic, [FULL]))
    sequence = Sequence(model, elastic, tokenizer(PROMPTS[1])["input_ids"], Spent())
    sequence.forward(step)
    sequence.ids.append(5)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in sequence.cache.layers]
    random.seed(0)
    share = confidence(sequence, step, [7, 8, 9], [3], [4])
    assert 0 <= share <= 1 and sequence.ids[-1] == 5
    for (keys, values), layer in zip(before, sequence.cache.layers, strict=True):
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)


def test_words_are_asked_for(nano):
    with pytest.raises(UsageError, match="was not told 'sure'"):
        generate(*nano, "x", point=decoded("concise", unsure="b"))
    with pytest.raises(UsageError, match="threshold"):
        Concise("concise", ConciseParameters(threshold=float("nan"), sure="a", unsure="b"))
