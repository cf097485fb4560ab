"""What a token costs over a store as `moe-prism offload` forecasts it, against the run, at five memory sizes.

    python benchmarks/offload_forecast.py [--folder ELASTIC] [--tokens 48] [--rounds 2] [--link MB/s] [--large] [--json]

Measured are single reads and real steps with `lru` on calibration text; forecast is the decoding of held-out text with another
policy, whose misses come from a replay. `from middle` uses what was measured at the middle size for all of them. With --link the run
reads over a link of that bandwidth, of which the forecast knows only the number.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from offload import PROMPT, Config, Run, elastic, expert_bytes, held_out, stored, turn

from moe_prism.artefact.load import load
from moe_prism.data import token_windows
from moe_prism.elastic import operating_point
from moe_prism.offload.cache import cache_policies
from moe_prism.offload.record import TraceRecorder, record
from moe_prism.offload.trace import Trace
from moe_prism.store.pools import Eviction
from moe_prism.store.price_reads import ReadPrices, at_budget, measure_prices, measure_step, replayed

SHARES = (0.4, 0.15, 0.25, 0.6, 0.8)  # of the expert weights; the middle first


def measure(model: Any, text: Any, budget: float, link: float) -> tuple[ReadPrices, float]:
    """ReadPrices of reads, over the link, and seconds of a step apart from them."""
    store = model._moe_prism.store
    prices = measure_prices(store)
    with operating_point(model, budget):
        step = measure_step(model, text, PROMPT, prices)
    return prices.over(store.pack.layout.bytes / (link * 1e6)) if link else prices, step


def compare(
    run: Run, windows: Any, tokens: int, trace: Trace, measured: list[tuple[ReadPrices, float]], policy: str
) -> dict[str, Any]:
    """Decode the windows, the last one twice: the first time warms up."""
    store = run.model._moe_prism.store
    turn(run, windows[-1:], tokens, None)
    run = Run(run.config, run.model, run.point)
    for row in windows:
        turn(run, row[None], tokens, None)
    real, kept = run.row(), at_budget(trace, run.model._moe_prism, run.config.budget)
    misses = replayed(kept, store.space, store.slots, Eviction(cache_policies.get(policy), group=store.group))
    here, middle = (misses.at(*found) for found in measured)
    return {
        "config": run.config.name,
        "ms_per_token": real["ms_per_token"],
        "forecast_ms": here.seconds * 1e3,
        "error": here.seconds * 1e3 / real["ms_per_token"] - 1,
        "from_middle": middle.seconds * 1e3 / real["ms_per_token"] - 1,
        "hit_rate": real["hit_rate"],
        "forecast_hit_rate": here.hit_rate,
        "step_ms": measured[0][1] * 1e3,
    }


def simulate(args: argparse.Namespace, folder: Path, work: Path) -> list[dict[str, Any]]:
    whole, tokenizer = load(folder)
    windows, length = held_out(folder, tokenizer, args), PROMPT + args.tokens
    text = token_windows(tokenizer, "stdlib", "calibration", length=length, tokens=length * 16).ids
    with operating_point(whole):
        trace = record(TraceRecorder(whole, values=True), [("calibration", text)], prompt=PROMPT)
    total = expert_bytes(folder, whole)
    del whole
    middle: dict[float, tuple[ReadPrices, float]] = {}
    rows = []
    direct = argparse.Namespace(**{**vars(args), "link": 0.0})
    for share in SHARES:
        memory = int(share * total)
        for budget in (1.0, args.budget):
            name = f"{share:g} of memory, budget {budget:g}"
            model = stored(folder, work, memory, Config(name, options={"policy": "lru"}), direct)
            found = measure(model, text[:2], budget, args.link)
            middle.setdefault(budget, found)
            model._moe_prism.store.close()
            config = Config(name, budget, options={"policy": args.policy})
            run = Run(config, stored(folder, work, memory, config, args))
            rows.append(compare(run, windows, args.tokens, trace, [found, middle[budget]], args.policy))
            run.model._moe_prism.store.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="an elastic model, instead of refactoring prism-nano")
    parser.add_argument("--work", help="folder for packed files, default a temporary one")
    parser.add_argument("--large", action="store_true", help="a random model of 400 MB of experts")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--link", type=float, default=0.0, help="MB/s, default the disk's own")
    parser.add_argument("--policy", default="lfu")
    parser.add_argument("--text", default="stdlib", help="its evaluation side is decoded")
    parser.add_argument("--budget", type=float, default=0.75, help="beside the full one")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.low = False
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        work = Path(args.work or temporary)
        rows = simulate(args, elastic(args, work), work)
    if args.json:
        json.dump({"benchmark": "offload_forecast", "arguments": vars(args), "rows": rows}, sys.stdout)
        return
    for row in rows:
        print(
            f"{row['config']:32} {row['ms_per_token']:8.2f} ms/token, forecast {row['forecast_ms']:8.2f} ({row['error']:+.1%}, from middle"
            f" {row['from_middle']:+.1%}), hits {row['hit_rate']:.3f} forecast {row['forecast_hit_rate']:.3f}"
        )


if __name__ == "__main__":
    main()
