"""`moe-prism generate`."""

from __future__ import annotations

from pathlib import Path

from ..options.experts import ExpertOptions
from ..options.generate import GenerateOptions, PointOptions
from .experts import store_options
from .output import emit, note


def generate(
    folder: Path,
    /,
    *,
    prompt: str,
    at: PointOptions,
    options: GenerateOptions,
    experts: ExpertOptions,
    verify: bool = False,
    json: bool = False,
) -> None:
    """Continue a prompt at an operating point.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`; with --point any checkpoint that the point fits.
    prompt: Text to continue.
    verify: First compare every file of the folder with its sha256 in prism.json; without, only those that are small.
    json: One JSON object on stdout.
    """
    from ..artefact.load import whole_manifest
    from ..artefact.open import own_point
    from ..errors import UsageError
    from ..jobs.generate import asked_point, check_prompt
    from ..jobs.generate import generate as run
    from ..point import name_within

    options.check()
    check_prompt(prompt)
    if verify:
        whole_manifest(folder, every=True)
    if at.point is not None and at.bytes_per_token is not None:
        raise UsageError("--point and --bytes-per-token both choose a point", "give one of them")
    asked = at.point
    if at.bytes_per_token is not None:
        asked = name_within(at.bytes_per_token, folder)
    named = None if asked is None else own_point(asked, folder).point
    point = asked_point(named, at.budget, at.rule, at.control)
    if experts.miss_floor != 1 and experts.miss_floor >= point.slots.budget:
        raise UsageError(
            f"--miss-floor {experts.miss_floor:g} is not below --budget {point.slots.budget:g}", "lower it, or leave it out"
        )
    store = store_options(experts)
    if named is None or store is not None:
        from ..artefact.load import load

        model, tokenizer = load(folder, store=store)
    else:
        from ..artefact.open import open_model

        opened = open_model(folder)
        model, tokenizer = opened.model, opened.tokenizer
    result = run(model, tokenizer, prompt, point=point, sampling=options)
    note(f"{asked or f'budget {point.slots.budget:g}'}: {result.tokens} tokens, {result.tokens_per_s:.1f} tokens/s")
    if result.whole_experts > 0:
        share = f"{100 * result.whole_experts:.0f} %"
        note(f"in {share} of the layers' calls whole experts took less time than the kept blocks: full price, same result")
    emit(result.to_json(), prompt + result.text, json)
