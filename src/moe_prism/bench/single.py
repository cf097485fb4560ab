"""Load on one running server."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..options.bench import Offer, SingleOptions
from ..schedule.classes import default_classes, load_classes
from .environment import environment, load
from .load import Fields, LoadRun, bodies, drive, warm_up
from .prompts import Cut, cut_characters, cut_tokens, prompts, sample_text
from .result import Benchmark, run_result
from .target import Target, find_target
from .workload import Workload, fingerprint

UNLOADED = 96  # prompt tokens of the requests that warm up
SAMPLE = 2000  # characters with which a server's tokens are measured


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How requests of a workload are made and sent. patience: seconds to wait for answers after the last one."""

    workload: Workload
    cut: Cut
    fields: Fields
    patience: float


def bench_server(url: str, offer: Offer, options: SingleOptions) -> Benchmark:
    """Offer requests to an OpenAI-compatible server at each rate, when they are due, and measure what becomes of them.

    Raises UsageError for bad options, and where no server answers.

    >>> import subprocess, sys, moe_prism
    >>> command = [sys.executable, "-m", "moe_prism", "serve", "elastic", "--port", "8127"]
    >>> server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    >>> ready = next(line for line in server.stderr if "ready" in line)
    >>> offer, asked = moe_prism.Offer(name="chat", seconds=4), moe_prism.SingleOptions(rates=(2.0,))
    >>> moe_prism.bench_server("http://127.0.0.1:8127/v1", offer, asked).to_records()[0]["rate"]
    2.0
    >>> server.terminate()
    """
    options.check()
    workload = Workload.of(offer, load_classes(options.config) if options.config else default_classes())
    if not options.rates and offer.trace is None:
        raise UsageError("--rate is missing", "give requests per second; auto needs --compare or --trace")
    return Benchmark(*asyncio.run(_bench(url, workload, options)))


async def _bench(url: str, workload: Workload, options: SingleOptions) -> tuple[dict[str, Any], list[tuple[str, LoadRun]]]:
    target = await find_target(url, options.api_key, options.model)
    cut = cut_tokens(options.tokenizer) if options.tokenizer else cut_characters(await characters_per_token(target))
    fields: Fields = ("targets" if target.elastic else "none") if options.fields == "auto" else options.fields
    before = environment()
    unloaded = await warm_up(target, cut(UNLOADED, random.Random(0)))  # noqa: S311
    runs, results = [], []
    asked = Asked(workload=workload, cut=cut, fields=fields, patience=options.patience)
    for rate in options.rates or (0.0,):  # 0: a trace as recorded
        run, about = await offered(target, asked, rate, options.seed)
        runs.append((f"rate {rate:g}", run))
        results.append({**about, **run_result(run, target.ladder)})
    return {
        "kind": "server",
        "environment": before,
        "load_after": load(),
        "server": {"url": target.address.url, "model": target.model, "software": target.software, "context": target.context},
        "operating_points": [level.to_json() for level in target.ladder.levels],
        "workload": workload.described(),
        "fields": fields,
        "unloaded": unloaded,
        "runs": results,
    }, runs


async def offered(target: Target, asked: Asked, rate: float, seed: int) -> tuple[LoadRun, dict[str, Any]]:
    """One run, and what was offered in it."""
    workload = asked.workload
    arrivals = workload.arrivals(rate, seed, target.ladder, target.context)
    made = prompts(arrivals, asked.cut, f"{workload.name} {rate:g} {seed}")
    run = await drive(target, arrivals, bodies(target, arrivals, made, asked.fields), workload.seconds, asked.patience)
    return run, {"rate": rate, "seed": seed, "arrivals_sha256": fingerprint(arrivals)}


async def characters_per_token(target: Target) -> float:
    """Of this server's tokenizer on our text."""
    text = sample_text(SAMPLE)
    answer = await target.complete({"prompt": text, "max_tokens": 1, "temperature": 0})
    try:
        return max(0.25, len(text) / int(answer["usage"]["prompt_tokens"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError("the server does not count prompt tokens in `usage`", "give --tokenizer FOLDER") from error
