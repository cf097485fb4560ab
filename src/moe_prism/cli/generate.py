"""`moe-prism generate`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from .output import emit, note, store_options


def generate(
    folder: Path,
    /,
    *,
    prompt: str,
    budget: float = 1.0,
    rule: str | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    expert_memory: str | None = None,
    expert_file: Path | None = None,
    json: bool = False,
) -> None:
    """Continue a prompt at a price.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`.
    prompt: Text to continue.
    budget: Kept slots / all slots, in (0, 1].
    rule: Selection rule; see `moe-prism ls rules`. Default threshold: the budget is met on average.
    max_tokens: Tokens to generate.
    temperature: 0 is greedy.
    seed: Seed of sampling.
    expert_memory: Keep the experts on disk and this much of them in memory, for example 200MB; default all of them.
    expert_file: Where they are packed for that, written on first use; default experts.pack in the folder.
    json: One JSON object on stdout.
    """
    from ..api import generate as run
    from ..api import load

    model, tokenizer = load(folder, store=store_options(expert_memory, expert_file))
    result = run(model, tokenizer, prompt, budget=budget, rule=rule, max_tokens=max_tokens, temperature=temperature, seed=seed)
    note(f"budget {budget:g}: {result.tokens} tokens, {result.tokens_per_s:.1f} tokens/s")
    emit({**asdict(result), "tokens_per_s": result.tokens_per_s}, prompt + result.text, json)
