"""Two workers of the real engine that share every block. `make test-vllm`; skipped where vLLM is missing."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.vllm.prompts import PROMPTS, SHORT, engine, tokens

NAMES = ["quarter", "half", "most"]


@pytest.fixture(scope="module")
def one(nano_levels):
    """Tokens of one worker at every level."""
    llm = engine(str(nano_levels))
    found = {name: tokens(llm, SHORT, [{"quality": name}] * len(SHORT)) for name in [*NAMES, "full"]}
    llm.llm_engine.engine_core.shutdown()
    return found


@pytest.fixture(scope="module")
def two(nano_levels, one):
    llm = engine(str(nano_levels), tensor_parallel_size=2)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def test_full_budget_is_stock(two, stock):
    assert tokens(two, PROMPTS, [None] * len(PROMPTS)) == stock


@pytest.mark.parametrize("name", NAMES)
def test_less_is_what_one_worker_gives(two, one, name):
    assert tokens(two, SHORT, [{"quality": name}] * len(SHORT)) == one[name]
    assert one[name] != one["full"]


def test_a_mixed_batch_is_every_request_alone(two, one):
    names = ["full", "half", "quarter", "most"] * 2
    assert tokens(two, SHORT, [{"quality": name} for name in names]) == [one[name][i] for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_expert_parallel": True}, "expert parallelism"),
        (
            {
                "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3},
                "async_scheduling": False,
            },
            "speculative decoding",
        ),
    ],
)
def test_what_runs_whole_only_refuses_less(nano_levels, stock, options, words):
    from vllm.exceptions import VLLMValidationError

    llm = engine(str(nano_levels), **options)
    assert tokens(llm, SHORT, [{"quality": 1}] * len(SHORT)) == stock[: len(SHORT)]
    with pytest.raises(VLLMValidationError, match=f"full quality only: .*{words}"):
        tokens(llm, SHORT[:1], [{"quality": "half"}])
    llm.llm_engine.engine_core.shutdown()
