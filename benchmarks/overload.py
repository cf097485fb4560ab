"""Three times what the server can do, for ten minutes: does everybody get something, and does the first class keep its targets?

    python benchmarks/overload.py [--folder ELASTIC] [--seconds 600] [--times 3] [--first 0.3] [--json]

A real `moe-prism serve` with its default bounds, policy and classes. Its capacity C is what it finishes per second when it is offered
far too much for a while. Then `times` x C requests/s are offered: the first class (interactive) at `first` x C, the rest to standard and
batch alike. Lengths are drawn alike for all classes, so C is also what the first class alone could have. Bars: every class gets at least
5 % of the tokens and 5 % of its requests are answered; the first class meets its targets in 99 % of its requests; nobody is answered below
the floor.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_prism.bench.load import LoadRun
from moe_prism.bench.outcome import OK, Outcome
from moe_prism.bench.servers import serving
from moe_prism.bench.single import SingleOptions, bench_server
from moe_prism.bench.workload import Offer
from moe_prism.cli.output import note, table
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.point import FULL
from moe_prism.schedule import Ladder, Level
from moe_prism.schedule.classes import default_classes
from moe_prism.schedule.workloads import generate, write_trace

FLOOD = 60.0  # requests/s while the capacity is measured
ONLY_FULL = Ladder((Level("full", FULL, 1.0, 1.0),))  # floors are the classes' own: the trace gives none


def finished(run: LoadRun, start: float, end: float) -> float:
    """Requests that ended whole per second of a part of a run."""
    return sum(o.status == OK and o.end is not None and start <= o.end < end for o in run.outcomes) / (end - start)


def offer(url: str, mix: dict[str, float], rate: float, seconds: float, work: Path) -> LoadRun:
    """Arrivals in these shares, sent by class: the server knows what the classes want."""
    trace = work / "trace.jsonl"
    write_trace(trace, generate("chat", rate, seconds, default_classes(), ONLY_FULL, mix=mix), ONLY_FULL)
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    trace.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "floor"}) + "\n" for line in lines))
    return bench_server(url, Offer(seconds=seconds, trace=trace), SingleOptions(rates=(0.0,), fields="class")).runs[0][1]


def row(kind: str, outcomes: Sequence[Outcome], everyone: int) -> dict[str, Any]:
    """What became of a class. everyone: tokens generated for all classes."""
    done = [o for o in outcomes if o.status == OK]
    floor = default_classes()[kind].min_quality
    return {
        "class": kind,
        "offered": len(outcomes),
        "answered": len(done) / len(outcomes),
        "met": sum(o.met for o in outcomes) / len(outcomes),
        "tokens": sum(o.tokens for o in done) / everyone,
        "quality": sum(o.quality for o in done if o.quality) / max(1, len(done)),
        "below_floor": sum(o.quality is not None and o.quality < floor - 1e-6 for o in done),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an elastic model, instead of refactoring prism-nano")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--times", type=float, default=3.0)
    parser.add_argument("--first", type=float, default=0.3)
    parser.add_argument("--flood", type=float, default=30.0, help="seconds in which the capacity is measured")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = args.folder or work / "elastic"
        if not args.folder:
            refactor("nano", folder, RefactorOptions())
        with serving(folder, {}, [], work, "overload") as server:
            alike = dict.fromkeys(default_classes(), 1.0)
            run = offer(server.url, alike, FLOOD, args.flood, work)
            capacity = finished(run, args.flood / 3, args.flood)
            note(f"capacity {capacity:.1f} requests/s")
            rest = (args.times - args.first) / 2
            mix = {"interactive": args.first, "standard": rest, "batch": rest}
            run = offer(server.url, mix, args.times * capacity, args.seconds, work)
    counted = [o for o in run.outcomes if args.seconds / 10 <= o.job.arrival < 0.9 * args.seconds]
    tokens = sum(o.tokens for o in counted if o.status == OK)
    rows = [row(kind, [o for o in counted if o.job.kind == kind], tokens) for kind in mix]
    if args.json:
        json.dump({"benchmark": "overload", "capacity": capacity, "seconds": args.seconds, "rows": rows}, sys.stdout)
        return
    print(
        f"{args.times:g} times a capacity of {capacity:.1f} requests/s for {args.seconds:g} s; the first class at {args.first:g} of it"
    )
    print(table(list(rows[0]), [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]))


if __name__ == "__main__":
    main()
