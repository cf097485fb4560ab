"""`moe-prism generate`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from .experts import Experts
from .output import emit, note


def generate(
    folder: Path,
    /,
    *,
    prompt: str,
    budget: float = 1.0,
    rule: str | None = None,
    plan: Path | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    experts: Experts = Experts(),  # noqa: B008 - frozen
    json: bool = False,
) -> None:
    """Continue a prompt at a price.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`; with --plan any checkpoint.
    prompt: Text to continue.
    budget: Kept slots / all slots, in (0, 1].
    rule: Selection rule; see `moe-prism ls rules`. Default threshold: the budget is met on average.
    plan: Skip plan written by `moe-prism skip`: only so many of the chosen experts are computed, and a budget is a share of those.
    max_tokens: Tokens to generate.
    temperature: 0 is greedy.
    seed: Seed of sampling.
    json: One JSON object on stdout.
    """
    from ..artefact.load import check_request, load
    from ..artefact.load import generate as run
    from ..errors import UsageError
    from ..routing import SkipPlan

    check_request(prompt, budget, rule, max_tokens, temperature, seed)
    if experts.miss_floor != 1 and experts.miss_floor >= budget:
        raise UsageError(f"--miss-floor {experts.miss_floor:g} is not below --budget {budget:g}", "lower it, or leave it out")
    store, routing = experts.options(), None if plan is None else SkipPlan.load(plan)
    if routing is None or store is not None:
        model, tokenizer = load(folder, store=store)
    else:
        from ..artefact.open import open_model

        opened = open_model(folder)
        model, tokenizer = opened.model, opened.tokenizer
    result = run(
        model,
        tokenizer,
        prompt,
        budget=budget,
        rule=rule,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        routing=routing,
    )
    note(f"budget {budget:g}: {result.tokens} tokens, {result.tokens_per_s:.1f} tokens/s")
    emit({**asdict(result), "tokens_per_s": result.tokens_per_s}, prompt + result.text, json)
