"""`moe-prism route`."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..options.route import RouteOptions
from .output import emit, note


def route(pool: Path, /, *, options: RouteOptions, json: bool = False) -> None:
    """Put several models behind one OpenAI endpoint: each request gets the model and the quality level that meet the limits it names.

    Parameters
    ----------
    pool: A .yaml file: the models, any OpenAI-compatible servers, and who chooses among them (`moe-prism ls choosers`).
    json: With --measure: one JSON object on stdout.
    """
    options.check()
    if options.measure is None or options.out is None:
        if json:
            raise UsageError("--json belongs to --measure", "leave it out: a router answers over HTTP")
        from ..serve import logs
        from ..serve.route.run import route_pool

        logs.set_up(options.debug)
        return route_pool(pool, options)
    from ..serve.route.run import measure_and_write

    facts = measure_and_write(pool, options, note)
    right = ", ".join(f"{name} {share:.3f}" for name, share in facts["quality"].items())
    return emit(facts, f"{facts['record']}: {facts['questions']} questions; share of right answers: {right}", json)
