"""Every slice against its definition, by loops over a model's own forward."""

from __future__ import annotations

import ast
import math

import pytest
import torch

from moe_prism.artefact.open import open_model
from moe_prism.data import token_windows
from moe_prism.errors import UsageError
from moe_prism.frontier.judge import slices
from moe_prism.frontier.judge.base import Material, NoQuestionsError, Slice, Spans, clustered_error, greedy, score
from moe_prism.frontier.judge.cloze import COMMON, CONTEXT, LETTERS, Cloze
from moe_prism.frontier.judge.continuation import NEW, PROMPT, Continuation
from moe_prism.frontier.judge.copied import FILLER, LENGTH, Copy
from moe_prism.frontier.judge.rare import SHARE, Rare
from moe_prism.frontier.judge.routing import RoutingAgreement, jaccard
from moe_prism.frontier.judge.run import Judge
from moe_prism.frontier.judge.syntax import Syntax, reads, whole_lines
from moe_prism.frontier.judge.words import words
from moe_prism.model import find_layers
from moe_prism.point import FULL, OperatingPoint, RoutingStage


@pytest.fixture(scope="module")
def nano():
    return open_model("nano")


@pytest.fixture(scope="module")
def material(nano):
    ids = token_windows(nano.tokenizer, "stdlib", "evaluation", length=256, tokens=1024).ids
    return Material(nano.model, nano.tokenizer, ids)


@pytest.fixture(scope="module")
def half(nano):
    return OperatingPoint(routing=(RoutingStage(layers=(2,) * 6, keep_mass=False),))


@torch.no_grad()
def best(model, row, place: int) -> int:
    """The most likely token at a place, from the tokens before it alone."""
    return int(model(input_ids=row[None, :place]).logits[0, -1].argmax())


def test_an_answer_is_right_where_every_token_of_it_is_the_most_likely_one(nano, material, half):
    spans = torch.tensor([(0, 5, 6), (0, 9, 12), (1, 1, 2), (1, 30, 32), (2, 250, 254), (3, 255, 256)])
    asked = Spans(material.ids, spans)
    with nano.elastic.at([half]):
        found = asked.verdicts(nano.model)
        rows = material.ids
        expected = [
            all(best(nano.model, rows[r], place) == rows[r, place] for place in range(a, b)) for r, a, b in spans.tolist()
        ]
    assert found.tolist() == expected


def test_words_are_the_runs_of_letters_in_the_text(nano):
    ids = nano.tokenizer("def read_lines(self):\n    return Wellformed  x9 naïve", add_special_tokens=False)["input_ids"]
    found = words(nano.tokenizer, ids)
    texts = [word.text for word in found]
    assert {"def", "read", "lines", "self", "return", "Wellformed"} <= set(texts) and "na" not in texts
    for word in found:
        assert nano.tokenizer.decode(ids[word.first : word.stop]).strip() == word.text


def test_cloze_asks_for_words_that_are_not_in_sight(nano, material):
    cloze = Cloze(material)
    every = [word.text.lower() for row in material.words for word in row]
    common = sorted(set(every), key=lambda text: -every.count(text))[:COMMON]
    assert len(cloze.asked.spans) > 20
    for row, first, stop in cloze.asked.spans.tolist():
        context = nano.tokenizer.decode(cloze.asked.rows[row, :first]).lower()
        word = nano.tokenizer.decode(cloze.asked.rows[row, first:stop]).strip().lower()
        assert first == CONTEXT and len(word) >= LETTERS and word not in context
        assert every.count(word) <= every.count(common[-1])
        window = material.ids[cloze.groups[row]].tolist()
        asked = cloze.asked.rows[row].tolist()
        assert any(window[i : i + len(asked)] == asked for i in range(len(window)))


def test_a_key_stands_twice_and_its_second_half_is_asked(material):
    copy = Copy(material)
    for row, first, stop in copy.asked.spans.tolist():
        tokens = copy.asked.rows[row].tolist()
        key = tokens[FILLER : FILLER + LENGTH]
        assert tokens[-LENGTH:] == key and len(set(key)) == LENGTH
        assert stop == first + 1 and first >= len(tokens) - LENGTH // 2
    assert len(copy.asked.spans) == len(copy.asked.rows) * LENGTH // 2


def test_rare_tokens_are_those_that_occur_least(material):
    rare = Rare(material)
    targets = [token for row in material.ids.tolist() for token in row[1:]]
    limit = next(c for c in range(1, len(targets)) if sum(targets.count(t) <= c for t in targets) > SHARE * len(targets))
    expected = [
        (r, p, p + 1) for r, row in enumerate(material.ids.tolist()) for p in range(1, len(row)) if targets.count(row[p]) <= limit
    ]
    assert sorted(map(tuple, rare.asked.spans.tolist())) == sorted(expected)


def test_greedy_tokens_are_those_of_generate(nano, material):
    rows = material.ids[:2, :20]
    expected = nano.model.generate(rows, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)[:, 20:]
    assert torch.equal(greedy(nano.model, rows, 6), expected)


def test_a_continuation_is_exact_where_generating_gives_the_same_tokens(nano, material, half):
    made = Continuation(Material(nano.model, nano.tokenizer, material.ids[:2, :PROMPT]))
    assert made.verdicts(nano.model).tolist() == [1.0, 1.0]
    with nano.elastic.at([half]):
        prompts, answers = made.asked.rows.split([PROMPT, NEW], 1)
        expected = (greedy(nano.model, prompts, NEW) == answers).all(1)
        assert made.verdicts(nano.model).tolist() == expected.double().tolist()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("def f(x):\n    return x\n", True),
        ("def f(x):\n    return g(x,\n", True),
        ("def f(x):\n", True),
        ('def f(x):\n    """Open\n', True),
        ("def f(x):\n    return x)\n", False),
        ("def f(x):\n  a = 1\n      b = 2\n", False),
        ("def f(x) return\n", False),
        ("", True),
    ],
)
def test_an_end_in_the_middle_of_a_statement_is_no_mistake(text, right):
    assert reads(text) == right


def test_syntax_asks_for_functions_that_python_can_read(nano, material):
    syntax = Syntax(material)
    for row in syntax.prompts.tolist():
        text = nano.tokenizer.decode(row)
        assert text.startswith(("def ", "class ", "async def ")) and reads(whole_lines(text))
    with nano.elastic.at([FULL]):
        found = syntax.verdicts(nano.model)
        made = greedy(nano.model, syntax.prompts, 64)
    for verdict, prompt, new in zip(found, syntax.prompts, made, strict=True):
        lines = whole_lines(nano.tokenizer.decode(torch.cat([prompt, new])))
        try:
            ast.parse(lines)
        except SyntaxError:
            continue
        assert verdict == float(len(lines) > len(nano.tokenizer.decode(prompt)))


def test_routing_is_the_jaccard_index_of_what_the_routers_choose(nano, half):
    ids = torch.arange(40).reshape(2, 20) + 100
    made = RoutingAgreement(Material(nano.model, nano.tokenizer, ids))
    layers = find_layers(nano.model)

    def chosen() -> list[list[set[int]]]:
        seen: list[list[set[int]]] = []
        with torch.no_grad():
            for own, layer in zip(nano.elastic.layers, layers, strict=True):

                def observe(x, index, weight, own=own):
                    seen.append([set(row) for row in index.tolist()])
                    return own(x, index, weight)

                layer.install(observe)
            nano.model(input_ids=ids)
            for own, layer in zip(nano.elastic.layers, layers, strict=True):
                layer.install(own)
        return seen

    with nano.elastic.at([FULL]):
        full = chosen()
    with nano.elastic.at([half]):
        found, other = made.verdicts(nano.model), chosen()
    for t in range(40):
        expected = sum(len(a[t] & b[t]) / len(a[t] | b[t]) for a, b in zip(full, other, strict=True)) / 6
        assert float(found[t]) == pytest.approx(expected)
    assert 0.5 < float(found.mean()) < 1  # top-2 of the same routers: what they are fed has changed, not how many they choose


def test_sets_that_are_empty_agree():
    none, one = torch.zeros(1, 4, dtype=torch.bool), torch.tensor([[True, False, False, False]])
    assert jaccard(none, none).tolist() == [1.0] and jaccard(none, one).tolist() == [0.0]


class Fixed(Slice):
    name = "fixed"

    def __init__(self, groups):
        self.groups = torch.tensor(groups)

    def verdicts(self, model):
        raise NotImplementedError


def test_a_score_counts_what_is_kept_and_what_flips():
    full = torch.tensor([1.0, 1, 1, 0, 0, 1], dtype=torch.float64)
    found = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64)
    made = score(Fixed([0, 0, 1, 1, 2, 2]), full, found)
    assert (made.kept, made.right, made.full, made.flips, made.items) == (3 / 4, 4 / 6, 4 / 6, 2 / 6, 6)


def test_standard_errors_are_those_of_groups():
    values = torch.tensor([1.0, 1, 0, 1, 0, 0], dtype=torch.float64)
    alone = clustered_error(values, torch.arange(6))
    assert alone == pytest.approx(float(values.std()) / math.sqrt(6))
    doubled = clustered_error(values.repeat(2), torch.arange(6).repeat(2))
    assert doubled == pytest.approx(alone)  # each asked twice says nothing more
    assert clustered_error(values, torch.zeros(6, dtype=torch.long)) == pytest.approx(alone)
    assert clustered_error(values[:1], torch.zeros(1)) == 0.0


@pytest.mark.parametrize("asked", [["routing", "copy"], pytest.param(["all"], marks=pytest.mark.slow)], ids=" ".join)
def test_the_model_itself_keeps_everything_and_fewer_experts_do_not(nano, material, half, asked):
    judge = Judge(nano.model, nano.tokenizer, material.ids, asked)
    full, less = judge.ask([FULL, half]).points
    wanted = set(slices.names()) if asked == ["all"] else set(asked)
    assert set(full) <= wanted and set(full) | set(judge.left_out) == wanted
    for found in full.values():
        assert (found.kept, found.stderr, found.flips) == (1.0, 0.0, 0.0) and found.right == found.full
    assert less["routing"].kept < 1 and ("continuation" not in wanted or less["continuation"].kept < 0.5)


@pytest.mark.slow
def test_what_has_no_questions_is_left_out_of_all_and_refused_by_name(nano):
    prose = token_windows(nano.tokenizer, "domains/web", "evaluation", length=64, tokens=256).ids
    judge = Judge(nano.model, nano.tokenizer, prose, ["all"])
    assert "syntax" in judge.left_out
    with pytest.raises(UsageError, match="slice 'syntax' cannot be judged"):
        Judge(nano.model, nano.tokenizer, prose, ["syntax"])


def test_a_text_without_words_or_with_short_windows_has_no_questions(nano):
    short = Material(nano.model, nano.tokenizer, torch.full((2, 16), 5))
    for made in (Cloze, Copy, Continuation, Rare):
        with pytest.raises(NoQuestionsError):
            made(short)


def test_a_dense_model_has_no_routers(tiny_dense):
    opened = open_model(tiny_dense)
    with pytest.raises(NoQuestionsError, match="no routers"):
        RoutingAgreement(Material(opened.model, opened.tokenizer, torch.ones(2, 80, dtype=torch.long)))
