"""The plug-in inside the real engine, on prism-nano in float32. `make test-vllm`; skipped where vLLM is missing."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("vllm")

from moe_prism.point import FULL
from tests.serve.test_ladder import row, write
from tests.vllm.prompts import LONG, NEW_TOKENS, PROMPTS, SEATS, SHORT, engine, generate, tokens

NAMES = ["quarter", "half", "most"]


@pytest.fixture(scope="module")
def llm(nano_levels):
    """Nothing is said about schedulers or workers: the plug-in finds out by itself."""
    return engine(str(nano_levels))


@pytest.fixture(scope="module")
def alone(llm):
    """Tokens of every short prompt at every level, all requests of a batch at the same one."""
    return {name: tokens(llm, SHORT, [{"quality": name}] * len(SHORT)) for name in [*NAMES, "full"]}


def test_full_budget_is_stock(llm, stock):
    assert tokens(llm, PROMPTS, [None] * len(PROMPTS)) == stock


def test_stock_reads_the_artefact_as_the_source_model(nano_levels, stock):
    """prism.safetensors lies beside the weights and is not read as such: transformers gets the same tokens from the weights alone."""
    import torch

    from moe_prism.model import load_model, load_tokenizer

    model, tokenizer = load_model(nano_levels, torch.float32), load_tokenizer(nano_levels)
    row = tokenizer(SHORT[0], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**row, max_new_tokens=8, do_sample=False)
    assert ids[0, row["input_ids"].shape[1] :].tolist() == stock[0][:8]


def test_less_changes_tokens(alone):
    """Guards the other tests against passing because nothing happens."""
    different = {name: sum(a != b for a, b in zip(alone[name], alone["full"], strict=True)) for name in NAMES}
    assert different["quarter"] >= 2 and different["half"] >= 1, different


def test_every_request_of_a_mixed_batch_is_as_alone(llm, alone, stock):
    names = ["full", "half", "quarter", "most"] * 2
    mixed = tokens(llm, SHORT, [{"quality": name} for name in names])
    assert mixed == [alone[name][i] for i, name in enumerate(names)]
    assert [mixed[0], mixed[4]] == [stock[0], stock[4]]


def test_quality_is_the_cheapest_level_that_reaches_it(llm, alone):
    found = tokens(llm, SHORT[:4], [{"quality": q} for q in (0.7, 0.71, 0.96, 1)])
    assert found == [alone[name][i] for i, name in enumerate(["quarter", "half", "full", "full"])]


def test_a_prefix_computed_for_less_does_not_serve_more(llm, stock, nano_levels):
    low, full = {"quality": 0.7}, {"quality": 1}
    llm.reset_prefix_cache()
    first, again = generate(llm, [LONG], [low])[0], generate(llm, [LONG], [low])[0]
    more = generate(llm, [LONG], [full])[0]
    assert first.num_cached_tokens == 0 and again.num_cached_tokens > 0 and more.num_cached_tokens == 0
    assert list(again.outputs[0].token_ids) == list(first.outputs[0].token_ids) != stock[-1]
    assert list(more.outputs[0].token_ids) == stock[-1]


def test_load_lowers_to_the_floor_and_not_below(llm, alone):
    """Three times as many requests as run at once: those with a floor are lowered while others wait, those without are not."""
    rounds = 3 * SEATS // len(SHORT)
    free = tokens(llm, SHORT * rounds, [{"quality": 1, "min_quality": 0.7}] * len(SHORT) * rounds)
    firm = tokens(llm, SHORT * rounds, [{"quality": 1}] * len(SHORT) * rounds)
    assert free[: len(SHORT)] != alone["full"]
    assert firm == alone["full"] * rounds


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quality": 2}, "from 0 to 1"),
        ({"quality": "best"}, "quarter, half, most, full"),
        ({"quality": [0.5]}, "from 0 to 1"),
        ({"quality": 0.7, "min_quality": 0.9}, "above quality"),
        ({"ttft_ms": 100}, "not available"),
    ],
)
def test_bad_fields_are_refused(llm, fields, words):
    from vllm.exceptions import VLLMValidationError  # the server answers it with 400

    with pytest.raises(VLLMValidationError, match=words):
        generate(llm, SHORT[:1], [fields])


def test_fields_of_others_pass(llm, alone):
    assert tokens(llm, SHORT[:1], [{"something": "else"}]) == alone["full"][:1]


def test_rows_that_choose_together_are_served_where_they_are_named(nano_levels, tmp_path):
    """A request alone, one row per step, has the tokens of `threshold`; a batch has others; a prompt of many rows runs too."""
    half, shared = (FULL.with_budget(0.4, rule) for rule in ("threshold", "batch-blocks"))
    folder = shutil.copytree(nano_levels, tmp_path / "elastic")
    write(folder, row("half", half, 6.4, 0.2), row("together", shared, 6.5, 0.1))
    llm = engine(str(folder), enable_prefix_caching=False, additional_config={"moe_prism": {"points": ["half", "together"]}})
    word = ["def"]
    assert len(llm.get_tokenizer()(word[0]).input_ids) == 1
    assert tokens(llm, word, [{"quality": "together"}]) == tokens(llm, word, [{"quality": "half"}])
    many = [tokens(llm, PROMPTS, [{"quality": name}] * len(PROMPTS)) for name in ("half", "together")]
    assert many[0] != many[1] and {len(found) for found in many[1]} == {NEW_TOKENS}


@pytest.mark.slow
def test_compiled_mode_does_not_freeze_budgets(nano_levels, alone):
    """torch.compile must not keep the budgets it saw while tracing."""
    from vllm.config import CompilationMode

    compiled = engine(str(nano_levels), enforce_eager=False, additional_config={"moe_prism": {"quality": 0.85}})
    assert compiled.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
    for name in ("quarter", "full", "most"):
        assert tokens(compiled, SHORT, [{"quality": name}] * len(SHORT)) == alone[name]
    assert tokens(compiled, SHORT, [None] * len(SHORT)) == alone["half"]  # the default of the configuration
