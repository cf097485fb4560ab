"""`moe-prism bench`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..options import Options, option
from ..options.bench import CompareOptions, Offer, SingleOptions
from .output import emit, note, table


@dataclass(frozen=True, kw_only=True)
class Results(Options):
    """Where results go."""

    out: Path | None = option(None, "Where to write the result as JSON.", short=("-o",))
    events: Path | None = option(None, "Where to write every request with its token times, as JSON lines.")
    json: bool = option(False, "One JSON object on stdout.")


def bench(
    url: str | None = None,
    /,
    *,
    compare: Path | None = None,
    offer: Offer,
    server: SingleOptions,
    policies: CompareOptions,
    results: Results,
) -> None:
    """Offer requests to an OpenAI-compatible server when they are due and measure what becomes of them, or compare scheduling policies.

    Parameters
    ----------
    url: Address of the server, like http://127.0.0.1:8000/v1.
    compare: Elastic model to start servers of, one per policy, instead of an address; the simulator replays the same arrivals.
    """
    from ..files import check_writable

    if (url is None) == (compare is None):
        raise UsageError("give the address of a server, or --compare FOLDER", "see `moe-prism bench --help`")
    check_writable(results.out, results.events, policies.save_cost)
    from ..bench.outcome import write_events
    from ..bench.result import save

    if offer.seconds is None and server.rates:
        offer = replace(offer, seconds=60.0)
    if compare is not None:
        result, runs, text = _policies(compare, offer, policies)
    elif url is not None:
        key = server.api_key or os.environ.get("MOE_PRISM_API_KEY") or None
        result, runs, text = _server(url, offer, replace(server, api_key=key))
    if results.out is not None:
        save(results.out, result)
    if results.events is not None:
        write_events(results.events, ((name, run.outcomes) for name, run in runs))
    emit(result, text, results.json)


def _server(url: str, offer: Offer, options: SingleOptions) -> tuple[dict[str, Any], Any, str]:
    from ..bench.single import bench_server
    from ..bench.text import notes, single_rows

    found = bench_server(url, offer, options)
    result = found.to_json()
    lines = notes((f"rate {run['rate']:g}", run) for run in result["runs"])
    return result, found.runs, "\n".join([table(*single_rows(result)), *lines])


def _policies(folder: Path, offer: Offer, options: CompareOptions) -> tuple[dict[str, Any], Any, str]:
    from ..bench.compare import bench_policies
    from ..bench.text import compare_notes, compare_rows

    found = bench_policies(folder, offer, options, note)
    result = found.to_json()
    parts = []
    for rate in result["rates"]:
        parts += [f"{rate['rate']:g} requests/s", table(*compare_rows(rate)), *compare_notes(rate)]
    return result, found.runs, "\n".join(parts)
