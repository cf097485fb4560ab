"""`moe-prism generate`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .experts import Experts
from .output import emit, note


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Price:
    """The operating point."""

    point: Annotated[
        str | None,
        Parameter(
            name=("--point", "--plan"),
            help="Operating point to run at: a name in the folder's frontier.json, or a file. Default: the model itself.",
        ),
    ] = None
    budget: Annotated[
        float | None, Parameter(help="Kept slots / all slots, in (0, 1]; with --point, of the slots its routing leaves.")
    ] = None
    rule: Annotated[
        str | None,
        Parameter(help="Selection rule; see `moe-prism ls methods`. Default threshold: the budget is met on average."),
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How tokens are drawn."""

    max_tokens: Annotated[int, Parameter(help="Tokens to generate.")] = 64
    temperature: Annotated[float, Parameter(help="0 is greedy.")] = 0.0
    seed: Annotated[int, Parameter(help="Seed of sampling.")] = 0


def generate(
    folder: Path,
    /,
    *,
    prompt: str,
    price: Price = Price(),
    drawing: Drawing = Drawing(),
    experts: Experts = Experts(),  # noqa: B008 - frozen
    json: bool = False,
) -> None:
    """Continue a prompt at an operating point.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`; with --point any checkpoint that the point fits.
    prompt: Text to continue.
    json: One JSON object on stdout.
    """
    from ..errors import UsageError
    from ..jobs.generate import GenerateOptions, asked_point, check_prompt
    from ..jobs.generate import generate as run
    from ..point import find_point

    sampling = GenerateOptions(max_tokens=drawing.max_tokens, temperature=drawing.temperature, seed=drawing.seed)
    sampling.check()
    check_prompt(prompt)
    named = None if price.point is None else find_point(price.point, folder).point
    point = asked_point(named, price.budget, price.rule)
    if experts.miss_floor != 1 and experts.miss_floor >= point.slots.budget:
        raise UsageError(
            f"--miss-floor {experts.miss_floor:g} is not below --budget {point.slots.budget:g}", "lower it, or leave it out"
        )
    store = experts.options()
    if named is None or store is not None:
        from ..artefact.load import load

        model, tokenizer = load(folder, store=store)
    else:
        from ..artefact.open import open_model

        opened = open_model(folder)
        model, tokenizer = opened.model, opened.tokenizer
    result = run(model, tokenizer, prompt, point=point, sampling=sampling)
    at = price.point or f"budget {point.slots.budget:g}"
    note(f"{at}: {result.tokens} tokens, {result.tokens_per_s:.1f} tokens/s")
    facts = {
        "prompt": prompt,
        "text": result.text,
        "point": point.to_json(),
        "budget": point.slots.budget,
        "rule": point.slots.rule,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_s": result.tokens_per_s,
    }
    emit(facts, prompt + result.text, json)
