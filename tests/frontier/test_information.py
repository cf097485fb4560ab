"""Mutual information of contexts and texts, from a matrix of log-probabilities."""

import math

import pytest
import torch

import moe_prism
from moe_prism.errors import UsageError
from moe_prism.frontier.information import answer_information, log_probabilities, mutual_information
from moe_prism.point import FULL


def test_texts_that_are_as_likely_everywhere_say_nothing():
    rows = torch.randn(7, 1).expand(7, 7)
    assert mutual_information(rows).abs().max() < 1e-12


def test_texts_of_one_context_say_which_it_was():
    log_p = torch.full((9, 9), -1e4).fill_diagonal_(-3.0)
    torch.testing.assert_close(mutual_information(log_p), torch.full((9,), math.log(9), dtype=torch.float64))


def test_it_is_never_above_log_n():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        assert mutual_information(30 * torch.randn(6, 6, generator=generator)).mean() <= math.log(6) + 1e-12


def test_it_is_the_formula():
    log_p = torch.randn(4, 4).double()
    found = [log_p[i, i] - math.log(sum(math.exp(log_p[i, j]) for j in range(4)) / 4) for i in range(4)]
    torch.testing.assert_close(mutual_information(log_p), torch.stack(found))


def test_a_matrix_is_asked_for():
    with pytest.raises(UsageError, match="N, N"):
        mutual_information(torch.zeros(2, 3))


def test_log_probabilities_are_the_models_and_answers_are_judged_by_them(elastic_nano):
    model, tokenizer = moe_prism.load(elastic_nano)
    texts = (
        "import os\nimport sys\nos.path.join(", "class A(Base):\n    def run(self, x):\n",
        "for i in range(10):\n    print(i)\n", "def f(a, b):\n    return a + b\n",
    )  # fmt: skip
    contexts = [torch.tensor(tokenizer(text)["input_ids"][:12]) for text in texts]
    text = torch.tensor([5, 9, 11])
    (row,) = log_probabilities(model, contexts, [text])
    with torch.no_grad():
        p = model(torch.cat([contexts[1], text])[None]).logits[0].log_softmax(-1)
    start = len(contexts[1]) - 1
    assert float(row[1]) == pytest.approx(sum(float(p[start + i, t]) for i, t in enumerate(text.tolist())), abs=1e-4)
    found = answer_information(model, contexts, FULL, 12)
    assert 0 < found.nats <= math.log(4) and found.interval[0] < found.nats < found.interval[1]
