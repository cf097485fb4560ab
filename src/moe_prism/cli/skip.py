"""`moe-prism skip`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from .output import note, progress, table, written


def skip(
    folder: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))] = Path("plan.json"),
    method: str = "sensitivity",
    mean: float | None = None,
    keep_mass: bool | None = None,
    rounding: Literal["half-up", "floor", "ceil", "budget"] = "half-up",
    index_over: Literal["moe", "all"] = "moe",
    text: str = "stdlib",
    tokens: int = 8_192,
    length: int = 512,
    json: bool = False,
) -> None:
    """Make a plan that computes fewer of the experts a token chose, and measure what it costs in quality.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`, or any checkpoint of a model with experts.
    out: The plan, for `moe-prism generate --plan` and `moe-prism frontier --plan`.
    method: How it is made; see `moe-prism ls methods` (those of expert skipping).
    mean: Experts per token and layer that are left on average; naee and pattern-skip:b-h-e-p do without.
    keep_mass: Scale what is left of a token's routing weights up to their full sum; default: as the model's own router does it.
    rounding: Of pattern-skip: half-up, floor, ceil, or budget (largest remainders; always so where --mean is given).
    index_over: Of pattern-skip: whether its layers are the MoE layers (moe) or all layers (all).
    text: stdlib, topics, a file, a folder, a .jsonl file or a saved dataset: one side to calibrate on, the other to measure the plan.
    tokens: Calibration tokens, and as many for the measurement.
    length: Tokens per window.
    json: One JSON object on stdout.
    """
    from ..files import check_writable
    from ..jobs.skip import SkipOptions, make_plan

    check_writable(out)
    options = SkipOptions(rounding, index_over, keep_mass)
    plan = make_plan(folder, method, mean, options, text=text, tokens=tokens, length=length, report=progress)
    quality = plan.made["quality"]
    counts = table(("layer", "experts"), list(enumerate(plan.layers)))
    facts = f"{plan.policy}: {quality['experts_per_token']:.2f} of {plan.made['experts_per_token']} experts per token, "
    shown = f"{counts}\n\n{facts}KL {quality['kl']:.4f}, perplexity {quality['ppl']:.3f}"
    with written(plan.to_json() | {"plan": str(out)}, shown, json):
        plan.save(out)
    note(f"plan: {out}")
