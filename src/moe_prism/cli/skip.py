"""`moe-prism skip`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from .output import note, progress, table, written


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Plan:
    """The skip plan."""

    method: Annotated[str, Parameter(help="How it is made; see `moe-prism ls methods` (those that act on routing).")] = (
        "sensitivity"
    )
    mean: Annotated[
        float | None,
        Parameter(help="Experts per token and layer that are left on average; naee and pattern-skip:b-h-e-p do without."),
    ] = None
    keep_mass: Annotated[
        bool | None,
        Parameter(
            help="Scale what is left of a token's routing weights up to their full sum; default: as the model's own router does it."
        ),
    ] = None
    rounding: Annotated[
        Literal["half-up", "floor", "ceil", "budget"] | None,
        Parameter(
            help="Of pattern-skip: half-up (default), floor, ceil, or budget (largest remainders; always so where --mean is given)."
        ),
    ] = None
    index_over: Annotated[
        Literal["moe", "all"] | None,
        Parameter(help="Of pattern-skip: whether its layers are the MoE layers (moe, default) or all layers (all)."),
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FitText:
    """Text."""

    text: Annotated[
        str,
        Parameter(
            help="stdlib, topics, a file, a folder, a .jsonl file or a saved dataset: one side to fit on, the other to measure on."
        ),
    ] = "stdlib"
    tokens: Annotated[int, Parameter(help="Tokens to fit on, and as many to measure on.")] = 8_192
    length: Annotated[int, Parameter(help="Tokens per window.")] = 512


def skip(
    folder: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))] = Path("plan.json"),
    plan: Plan = Plan(),
    text: FitText = FitText(),
    json: bool = False,
) -> None:
    """Make a skip plan, which computes fewer of the experts a token chose, and measure what it costs in quality.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`, or any checkpoint of a model with experts.
    out: The plan as an operating point, for `moe-prism generate --point` and `moe-prism frontier --points`.
    json: One JSON object on stdout.
    """
    from ..files import check_writable
    from ..jobs.skip import SkipOptions, make_plan
    from ..point import write_point

    check_writable(out)
    own = {"rounding": plan.rounding, "index_over": plan.index_over}
    parameters = {name: value for name, value in own.items() if value is not None}
    options = SkipOptions(
        mean=plan.mean, keep_mass=plan.keep_mass, parameters=parameters, text=text.text, tokens=text.tokens, length=text.length
    )
    named = make_plan(folder, plan.method, options, report=progress)
    (stage,), quality = named.point.routing, named.made["quality"]
    counts = table(("layer", "experts"), list(enumerate(stage.layers)))
    facts = f"{stage.stage}: {quality['experts_per_token']:.2f} of {named.made['experts_per_token']} experts per token, "
    shown = f"{counts}\n\n{facts}KL {quality['kl']:.4f}, perplexity {quality['ppl']:.3f}"
    with written(named.to_json() | {"file": str(out)}, shown, json):
        write_point(out, named)
    note(f"plan: {out}")
