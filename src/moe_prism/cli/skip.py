"""`moe-prism skip`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options.skip import SkipOptions
from .output import note, progress, table, written
from .rehearsal import Rehearsal, show_rehearsal


def skip(
    folder: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))] = Path("plan.json"),
    options: SkipOptions,
    rehearsal: Rehearsal,
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

    check_writable(out)
    from ..checkpoint import put_file
    from ..jobs.skip import make_skip_plan

    if rehearsal.dry_run:
        return show_rehearsal(rehearsal, make_skip_plan, folder, options, as_json=json)
    named = make_skip_plan(folder, options, report=progress)
    (stage,), quality = named.point.routing, named.made["quality"]
    counts = table(("layer", "experts"), list(enumerate(stage.layers)))
    facts = f"{stage.stage}: {quality['experts_per_token']:.2f} of {named.made['experts_per_token']} experts per token, "
    shown = f"{counts}\n\n{facts}KL {quality['kl']:.4f}, perplexity {quality['ppl']:.3f}"
    with written(named.to_json() | {"file": str(out)}, shown, json):
        put_file(out, named.encoded())
    note(f"plan: {out}")
    return None
