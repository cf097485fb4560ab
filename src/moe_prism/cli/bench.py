"""`moe-prism bench`"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ..errors import UsageError
from .output import emit, note, table

if TYPE_CHECKING:
    from ..bench import compare as comparison
    from ..bench import single
    from ..bench.workload import Offer


def bench(
    url: str | None = None,
    /,
    *,
    compare: Path | None = None,
    policies: str = "fifo,prism,elastic",
    rate: str = "auto",
    load: float = 1.25,
    workload: str = "classes",
    trace: Path | None = None,
    spread: float = 0.0,
    seconds: float | None = None,
    seed: int = 0,
    repeats: int = 3,
    patience: float = 30.0,
    config: Path | None = None,
    slower: float = 1.0,
    fields: Literal["auto", "none", "targets", "class"] = "auto",
    tokenizer: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
    cost: Path | None = None,
    save_cost: Path | None = None,
    probe_seconds: float = 8.0,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    events: Path | None = None,
    json: bool = False,
) -> None:
    """Offer requests to an OpenAI-compatible server when they are due and measure what becomes of them, or compare scheduling policies.

    Parameters
    ----------
    url: Address of the server, like http://127.0.0.1:8000/v1.
    compare: Elastic model to start servers of, one per policy, instead of an address; the simulator replays the same arrivals.
    policies: With --compare, which; options as in elastic:quality=0.95.
    rate: Requests per second, several with commas; with --compare also auto, near the saturation of fifo.
    load: With --rate auto, the share of fifo's simulated capacity to offer.
    workload: chat (Poisson), burst (gamma), classes (a day with a step to three times), or longtail.
    trace: JSON lines to replay instead, stretched to --rate (auto: as recorded).
    spread: Standard deviation, as a share of the levels, of quality floors drawn per request; 0 keeps the classes'.
    seconds: How long requests are offered, default 60, or all of a trace as recorded; the first and the last tenth do not count.
    seed: Of arrivals and prompts; with --compare, repeat i has seed + i.
    repeats: With --compare, runs of each policy, taken in turn.
    patience: Seconds to wait for answers after the last request; what is unfinished then counts as bad.
    config: qos.yaml with request classes; with --compare also the engine's size.
    slower: Factor on the classes' times, for a machine that is this much slower.
    fields: What requests say: targets (quality, times, priority), class (also the class), none; auto: targets if the server has levels.
    tokenizer: Model folder whose tokenizer cuts prompts exactly; default: by the server's characters per token.
    model: Model name; default: the server's first.
    api_key: Key of the server; default: the variable MOE_PRISM_API_KEY.
    cost: With --compare, cost model to load instead of measuring one.
    save_cost: With --compare, where to save it.
    probe_seconds: With --compare, seconds to measure it.
    out: Where to write the result as JSON.
    events: Where to write every request with its token times, as JSON lines.
    json: One JSON object on stdout.
    """
    from ..bench import compare as comparison
    from ..bench import single
    from ..bench.outcome import write_events
    from ..bench.result import save
    from ..bench.workload import Offer
    from ..files import check_writable

    check_writable(out, events, save_cost)
    if seed < 0:
        raise UsageError(f"--seed {seed} is too small", "give at least 0")
    rates = _rates(rate)
    if seconds is None and rates:
        seconds = 60.0
    offer = Offer(workload, seconds, trace, spread, slower)
    if compare is not None and url is None:
        limits = comparison.CompareOptions(
            policies.split(","), rates, load, repeats, seed, patience, cost, save_cost, probe_seconds, config
        )
        result, runs, text = _policies(compare, offer, limits)
    elif url is not None and compare is None:
        if not rates and trace is None:
            raise UsageError("--rate is missing", "give requests per second; auto needs --compare or --trace")
        key = api_key or os.environ.get("MOE_PRISM_API_KEY") or None
        asked = single.SingleOptions(rates or [0.0], seed, patience, fields, key, model, tokenizer, config)
        result, runs, text = _server(url, offer, asked)
    else:
        raise UsageError("give the address of a server, or --compare FOLDER", "see `moe-prism bench --help`")
    if out is not None:
        save(out, result)
    if events is not None:
        write_events(events, ((name, run.outcomes) for name, run in runs))
    emit(result, text, json)


def _server(url: str, offer: Offer, options: single.SingleOptions) -> tuple[dict[str, Any], Any, str]:
    from ..bench.single import bench
    from ..bench.text import notes, single_rows

    result, runs = bench(url, offer, options)
    lines = notes((f"rate {run['rate']:g}", run) for run in result["runs"])
    return result, runs, "\n".join([table(*single_rows(result)), *lines])


def _policies(folder: Path, offer: Offer, options: comparison.CompareOptions) -> tuple[dict[str, Any], Any, str]:
    from ..bench.compare import compare
    from ..bench.text import compare_notes, compare_rows
    from ..serve.server import check_folder, need_packages

    check_folder(folder)
    need_packages()
    result, runs = compare(folder, offer, options, note)
    parts = []
    for rate in result["rates"]:
        parts += [f"{rate['rate']:g} requests/s", table(*compare_rows(rate)), *compare_notes(rate)]
    return result, runs, "\n".join(parts)


def _rates(text: str) -> list[float]:
    """Empty for auto."""
    if text == "auto":
        return []
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--rate {text} is not a number", "give requests per second, several with commas") from error
    if not all(0 < rate <= 1e5 for rate in rates):
        raise UsageError(f"--rate {text} is out of range", "give requests per second, more than 0")
    return rates
