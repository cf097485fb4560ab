"""How many sub-experts an expert can have if none of them may cut a group of the format."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from ..artefact.source import Weights
from ..errors import UsageError
from ..options.refactor import RefactorOptions
from ..partition import refiners


class Aligned(NamedTuple):
    """Options with the number of sub-experts that was taken.

    unit: neurons that move together, 1 where each moves alone. facts: what prism.json says of it, None where nothing was aligned.
    """

    options: RefactorOptions
    unit: int
    facts: dict[str, Any] | None


def align(weights: Weights, options: RefactorOptions) -> Aligned:
    """The largest N up to `n_sub` for which every layer's block width is a multiple of the group. UsageError if there is none."""
    group = weights.neuron_group() if options.align == "auto" or options.keep_codes else None
    if options.align == "auto" and group is None:
        raise UsageError(
            "--align auto takes the group of a quantized source, and this is none", "give --align a number, like 128"
        )
    unit = group if options.keep_codes and group else 1
    wanted = group if options.align == "auto" else int(options.align) if options.align else None
    if wanted is None:
        _check(weights, options, unit)
        return Aligned(options, unit, None)
    widths = {layer.width for layer in weights.layers}
    fitting = [n for n in range(2, max(widths) + 1) if all(w % n == 0 and (w // n) % wanted == 0 for w in widths)]
    taken = max((n for n in fitting if n <= options.n_sub), default=None)
    if taken is None:
        more = f"give --n-sub from {fitting}" if fitting else "use a smaller --align, or none"
        raise UsageError(f"no --n-sub up to {options.n_sub} gives blocks of whole groups of {wanted} neurons", more)
    facts = {"group": wanted, "n_sub_asked": options.n_sub, "block": min(widths) // taken}
    options = replace(options, n_sub=taken, dropped=None if options.dropped is None else min(options.dropped, taken - 1))
    _check(weights, options, unit)
    return Aligned(options, unit, facts)


def _check(weights: Weights, options: RefactorOptions, unit: int) -> None:
    """UsageError where blocks would cut groups whose codes must stay."""
    if unit > 1 and options.objective in refiners.names():
        raise UsageError(
            f"--objective {options.objective} swaps single neurons, --keep-codes moves {unit} together", "choose another"
        )
    for layer in weights.layers:
        if layer.width % options.n_sub == 0 and (layer.width // options.n_sub) % unit:
            block = layer.width // options.n_sub
            raise UsageError(
                f"--keep-codes moves {unit} neurons together, and blocks of {block} neurons of '{layer.name}' would cut them",
                "add --align auto, or leave --keep-codes out for --keep-format",
            )
