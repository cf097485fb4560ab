"""Routers that look at earlier tokens, in the packed batches of the engine."""

from __future__ import annotations

import pytest
import torch

from moe_prism.architectures.base import routers
from moe_prism.elastic import attach
from moe_prism.errors import UsageError
from moe_prism.point import FULL
from moe_prism.schedule.base import Ladder, Level
from moe_prism.serve.requests import Sampling
from tests.architectures.small import VOCABULARY, example, model_of
from tests.serve.test_engine import Waves

FULL_ALONE = Ladder((Level("full", FULL, 2, 1.0),))
LOOKING = [
    ("graph-of-tokens", {}), ("graph-of-tokens", {"by": "attention"}),
    ("union-of-experts", {"heads": None}), ("union-of-experts", {}), ("union-of-experts", {"selection": "data"}),
    ("read-me", {}),
]  # fmt: skip
LENGTHS = (40, 1, 23, 33)  # above, at and below what a step and a block of the cache take


def looking(name, settings, **kind):
    """A model whose experts are far apart, and whose choices turn on little."""
    model = model_of(example(name, **settings)).to(**kind)
    with torch.no_grad():
        for router in routers(model):
            router.weight.mul_(30)
        for parameter in (p for n, p in model.named_parameters() if "experts" in n):
            parameter.mul_(10)
    attach(model, 1)
    return model


def drawn(length, seed):
    return torch.randint(1, VOCABULARY.size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(("name", "settings"), LOOKING)
@torch.no_grad()
def test_d02_what_came_before_is_a_request_s_own_in_chunks_and_in_mixed_batches(name, settings):
    model, prompts = looking(name, settings), [drawn(length, seed) for seed, length in enumerate(LENGTHS)]
    wanted = [model(input_ids=torch.tensor([p]), use_cache=False).logits[0].log_softmax(-1) for p in prompts]
    greedy = [
        model.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(p) :]
        for p in prompts
    ]
    waves = Waves(model, FULL_ALONE, step_tokens=16)
    try:
        told = waves.run(prompts, [0] * 4, new=6, samplings=[Sampling(prompt_logprobs=1)] * 4)
        for prompt, logs, (_, events, _) in zip(prompts, wanted, told, strict=True):
            found = [entry.logprob for event in events for entry in event.prompt][1:]
            torch.testing.assert_close(
                torch.tensor(found, dtype=torch.float32), logs[range(len(prompt) - 1), prompt[1:]], atol=1e-4, rtol=1e-4
            )
        for _ in range(2):  # the second time behind a prefix that is found again
            assert waves.tokens(prompts, [0] * 4, new=6) == [row.tolist() for row in greedy]
        assert waves.run([prompts[0]], [0])[0][2].cached_tokens
    finally:
        waves.engine.stop()
    after = model(input_ids=torch.tensor([prompts[2]]), use_cache=False).logits[0].log_softmax(-1)
    torch.testing.assert_close(after, wanted[2])  # nothing of the engine is left in the routers


def test_routers_that_look_back_are_refused_where_nobody_shows_them_what_came_before():
    with pytest.raises(UsageError, match="float32 on a CPU"):
        Waves(looking("graph-of-tokens", {}, dtype=torch.bfloat16), FULL_ALONE)
