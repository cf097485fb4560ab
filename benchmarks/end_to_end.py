"""Tokens/s end to end where experts dominate: budgets of `generate` and of the serving engine against stock transformers at top-k.

    python benchmarks/end_to_end.py FOLDER [--layers 3] [--batches 1,8,32] [--seconds 40] [--isa avx2] [--only generate,serve,http]

The model is `wide_nano.py`'s, built in FOLDER where it is missing: OLMoE's shape with nano's routing. Three parts:

- generate: `model.generate` in moe-prism at 100, 75, 50 and 25 % of the slots, and in unmodified transformers at 8, 6, 4 and 2 experts per
  token, in a process of its own. Both continue the same held-out text with the same tokens, whatever they would have said.
- serve: decode steps of the embedded engine at the same budgets, a batch at one level, beside the same stock processes.
- http: `moe-prism serve`, that many clients at once, tokens/s by the clock on the wall, prompts included.

All of a batch run in turns. Figures are medians over the rounds, ratios are medians of ratios within a round, and a round's figure is
its median step. `kept`, `of a token` and `bytes`: slots, bytes that a token reads of experts, and distinct bytes of a step, as shares of
full; counted on the same text, selection included. Where a model keeps more than is asked for, `--asked` asks for less. float32, as
moe-prism loads models on a CPU; `--stock-dtype bfloat16` changes the other side. All sides have `--threads` threads but `http`, where
the server decides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import wide_nano
from isa import run_as

BUDGETS = (1.0, 0.75, 0.5, 0.25)
PROMPT, LEAST = 8, 3
Seconds = dict[tuple[str, float], list[float]]
"""(generate, serve or stock; budget) -> seconds per step, of every round; of http tokens/s."""
Clock = Callable[[], float]
Timer = Callable[[int, Any, int], float]
"""(batch, what, turn) -> seconds per step."""


def texts(tokenizer: Any, length: int) -> Callable[[int, int], Any]:
    """(batch, turn) -> [batch, length] of held-out text, other rows in every turn."""
    from moe_prism.data import token_windows

    ids = token_windows(tokenizer, "stdlib", "evaluation", length=length, tokens=length * 512).ids
    return lambda batch, turn: ids[[(i * len(ids) // batch + 7 * turn) % len(ids) for i in range(batch)]]


def forced(ids: Any, clock: Clock) -> tuple[Any, list[float]]:
    """A logits processor that makes `generate` continue with the text ids [B, length], and when it was called."""
    from transformers import LogitsProcessor

    times: list[float] = []

    class Forced(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            times.append(clock())
            scores = scores.new_full(scores.shape, -1e9)
            return scores.scatter_(1, ids[:, input_ids.shape[1], None], 0.0)

    return Forced(), times


def generated(model: Any, ids: Any, steps: int, clock: Clock = time.perf_counter) -> float:
    """Median seconds of a decode step of `model.generate`."""
    import torch

    processor, times = forced(ids, clock)
    with torch.no_grad():
        model.generate(
            input_ids=ids[:, :PROMPT], attention_mask=torch.ones_like(ids[:, :PROMPT]), do_sample=False, logits_processor=[processor],
            max_new_tokens=steps + 1, min_new_tokens=steps + 1, pad_token_id=0,
        )  # fmt: skip
    return statistics.median(b - a for a, b in pairwise(times))


def stock(folder: Path, steps: int, dtype: str) -> Timer:
    """Unmodified transformers; what: experts per token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=getattr(torch, dtype)).eval()
    rows = texts(AutoTokenizer.from_pretrained(folder / "source"), PROMPT + steps + 2)

    def run(batch: int, what: Any, turn: int) -> float:
        for module in model.modules():
            if hasattr(module, "top_k"):
                module.top_k = what
        return generated(model, rows(batch, turn), steps)

    return run


def elastic(
    folder: Path, steps: int, asked: list[float]
) -> tuple[dict[str, Timer], Callable[[int, list[float], int], list[dict[str, float]]]]:
    """moe-prism's `generate` and engine; what: the budget. And what each budget reads."""
    import torch

    from moe_prism import load, operating_point
    from moe_prism.elastic.bind import Step, bind
    from moe_prism.frontier.cost import measured_cost
    from moe_prism.point import FULL

    model, tokenizer = load(folder / "elastic")
    rows = texts(tokenizer, PROMPT + steps + 2)

    def run(batch: int, what: Any, turn: int) -> float:
        with operating_point(model, budget=what):
            return generated(model, rows(batch, turn), steps)

    @torch.no_grad()
    def reads(batch: int, budgets: list[float], turns: int) -> list[dict[str, float]]:
        found = []
        for budget in budgets:
            step = Step(bind(model._moe_prism, [FULL.with_budget(budget)]))
            with model._moe_prism.count():
                for turn in range(1, turns + 1):
                    ids = rows(batch, turn)
                    with model._moe_prism.at(step, counting=False):
                        cache = model(input_ids=ids[:, :PROMPT], use_cache=True).past_key_values
                    with model._moe_prism.at(step):
                        for at in range(PROMPT, PROMPT + steps):
                            model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cost = measured_cost(model._moe_prism, step)
            found.append({"slots": cost.k_slots, "token": cost.active_expert_bytes, "distinct": cost.distinct_expert_bytes})
        return [{name: row[name] / found[0][name] for name in row} for row in found]

    return {"generate": run, "serve": engine(model, rows, steps, sorted(asked))}, reads


def engine(model: Any, rows: Any, steps: int, budgets: list[float], clock: Clock = time.perf_counter) -> Timer:
    """Decode steps of the embedded engine; what: the budget, which every request of the batch has."""
    from moe_prism.elastic.runtime import slots_per_token
    from moe_prism.point import FULL
    from moe_prism.schedule.base import Job, Ladder, Level, Policy, Work
    from moe_prism.serve.engine.engine import Engine
    from moe_prism.serve.engine.size import EngineSize
    from moe_prism.serve.requests import Request, Sampling

    slots = slots_per_token(model._moe_prism)
    levels = [Level(f"{b:g}", FULL.with_budget(b) if b < 1 else FULL, b * slots, b) for b in budgets]

    class Together(Policy):
        """All prompts, one after the other; then everybody decodes."""

        level = 0

        def step(self, now: float, waiting: Any, running: Any, limits: Any) -> list[Work]:
            prompts = [p for p in [*running, *waiting] if p.remaining_prompt > 0]
            if prompts:
                return [Work(p.job.id, p.remaining_prompt, self.level) for p in prompts[:8]]
            return [Work(p.job.id, 1, self.level) for p in running]

    policy, seen, usual = Together(), [], model.config._attn_implementation
    runner = Engine(model, Ladder(tuple(levels)), policy, EngineSize(cache_tokens=8192, prefix_cache=False))
    runner.observer = lambda step, _: seen.append((len(step.parts), sum(p.tokens for p in step.parts), clock()))
    runner.start()
    count, paged = iter(range(1 << 30)), model.config._attn_implementation
    model.config._attn_implementation = usual  # the model is `generate`'s too

    def run(batch: int, what: Any, turn: int) -> float:
        policy.level, model.config._attn_implementation = budgets.index(what), paged
        done = threading.Semaphore(0)
        seen.clear()

        def heard(event: Any) -> None:
            if event.finish is not None or event.error is not None:
                done.release()

        for row in rows(batch, turn)[:, :PROMPT].tolist():
            job = Job(f"r{next(count)}", 0.0, len(row), steps + 1, policy.level, policy.level)
            # at temperature 1: greedy tokens of a model cut short repeat themselves, and would always meet the same experts
            runner.submit(Request(job, row, Sampling(temperature=1.0, seed=1), frozenset(), heard))
        for _ in range(batch):
            done.acquire()
        model.config._attn_implementation = usual
        decoding = [when for parts, tokens, when in seen if parts == tokens == batch]
        return statistics.median(b - a for a, b in pairwise(decoding))

    return run


# -- processes


def answer(arguments: argparse.Namespace) -> None:
    """The child: a line in, [name, batch, what, turn], a line out, the seconds."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.role == "stock":
        runs: dict[str, Any] = {"stock": stock(arguments.folder, arguments.steps, arguments.stock_dtype)}
    else:
        runs, reads = elastic(arguments.folder, arguments.steps, [float(b) for b in arguments.asked.split(",")])
        runs["reads"] = reads
    print("ready", file=reply, flush=True)
    for line in sys.stdin:
        name, *asked = json.loads(line)
        print(json.dumps(runs[name](*asked)), file=reply, flush=True)
    os._exit(0)  # the engine's thread need not be waited for


class Child:
    """A model in a process of its own."""

    def __init__(self, role: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, str(arguments.folder), "--role", role, "--steps", str(arguments.steps)]
        command += ["--threads", str(arguments.threads), "--stock-dtype", arguments.stock_dtype, "--asked", arguments.asked]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process died; its output is above")
        return line

    def ask(self, *asked: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.line())


def steps(kinds: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """`generate` and `serve` beside stock, step by step: rows of every batch."""
    children: dict[str, Child] = {}
    rows = []
    try:
        for role in ("ours", "stock"):  # one after the other: loading takes more memory than running
            children[role] = Child(role, arguments)
            children[role].line()
        print("all ready", file=sys.stderr, flush=True)
        asked = dict(zip(BUDGETS, map(float, arguments.asked.split(",")), strict=True))
        runs = [(kind, b, asked[b]) for kind in kinds for b in BUDGETS]
        runs += [("stock", b, round(b * wide_nano.CHOSEN)) for b in BUDGETS]
        for batch in map(int, arguments.batches.split(",")):
            found: Seconds = {(name, b): [] for name, b, _ in runs}
            until, turn = float("inf"), 0
            while turn <= LEAST or time.monotonic() < until:
                for name, budget, what in runs if turn % 2 else runs[::-1]:
                    seconds = children["stock" if name == "stock" else "ours"].ask(name, batch, what, turn)
                    if turn:
                        found[name, budget].append(seconds)
                turn, until = turn + 1, until if turn else time.monotonic() + arguments.seconds
            reads = children["ours"].ask("reads", batch, [asked[b] for b in BUDGETS], turn - 1)
            for kind in kinds:
                for budget, read in zip(BUDGETS, reads, strict=True):
                    rows.append(row(kind, batch, budget, found, read))
                    show(arguments, rows[-1])
    finally:
        for child in children.values():
            child.process.kill()
    return rows


def row(kind: str, batch: int, budget: float, found: Seconds, read: dict[str, float]) -> dict[str, Any]:
    """Tokens/s, and speed as a ratio: above 1 is faster."""

    def faster(a: tuple[str, float], b: tuple[str, float]) -> float:
        return round(statistics.median(y / x for x, y in zip(found[a], found[b], strict=True)), 3)

    ours, plain = (kind, budget), ("stock", budget)
    return {
        "part": kind, "batch": batch, "budget": budget,
        "tokens/s": round(batch / statistics.median(found[ours]), 2),
        "stock tokens/s": round(batch / statistics.median(found[plain]), 2),
        "of full": faster(ours, (kind, 1.0)),
        f"of stock top-{round(budget * wide_nano.CHOSEN)}": faster(ours, plain),
        "of stock full": faster(ours, ("stock", 1.0)),
        "rounds": len(found[ours]),
        "kept": round(read["slots"], 3), "bytes": round(read["distinct"], 3), "of a token": round(read["token"], 3),
    }  # fmt: skip


def http(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """`moe-prism serve`, and that many clients at once."""
    from http.client import HTTPConnection

    port = 18000 + os.getpid() % 1000
    command = [sys.executable, "-m", "moe_prism", "serve", str(arguments.folder / "elastic"), "--port", str(port)]
    server = subprocess.Popen([*command, "--policy", "fifo", "--probe-seconds", "1"], stdout=subprocess.DEVNULL)
    rows = []

    def post(path: str, body: Any = None) -> Any:
        connection = HTTPConnection("127.0.0.1", port, timeout=600)
        text = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, text, {"content-type": "application/json"})
        return json.loads(connection.getresponse().read())

    try:
        while server.poll() is None:
            try:
                post("/v1/models")
                break
            except OSError:
                time.sleep(0.5)
        print("all ready", file=sys.stderr, flush=True)
        for batch in map(int, arguments.batches.split(",")):
            speeds: Seconds = {("http", b): [] for b in BUDGETS}
            for turn in range(LEAST + 1):  # the first pays for what was never run before
                for budget in BUDGETS if turn % 2 else BUDGETS[::-1]:
                    speed = _clients(post, batch, budget, 2 * arguments.steps)
                    if turn:
                        speeds["http", budget].append(speed)
            for budget in BUDGETS:
                ratio = statistics.median(a / b for a, b in zip(speeds["http", budget], speeds["http", 1.0], strict=True))
                speed = statistics.median(speeds["http", budget])
                found = {"tokens/s": round(speed, 2), "of full": round(ratio, 3)}
                rows.append({"part": "http", "batch": batch, "budget": budget, **found})
                show(arguments, rows[-1])
    finally:
        server.terminate()
        server.wait()
    return rows


def _clients(post: Callable[..., Any], batch: int, budget: float, tokens: int) -> float:
    """Tokens/s of `batch` requests sent together."""
    import argparse as text
    import inspect

    source, counts = inspect.getsource(text), []

    def one(i: int) -> None:
        body = {"prompt": source[900 * i : 900 * i + 60], "max_tokens": tokens, "temperature": 1, "seed": i, "quality": budget}
        counts.append(post("/v1/completions", body)["usage"]["completion_tokens"])

    clients = [threading.Thread(target=one, args=(i,)) for i in range(batch)]
    began = time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return sum(counts) / (time.perf_counter() - began)


def show(arguments: argparse.Namespace, row: dict[str, Any]) -> None:
    if not arguments.json:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=40.0, help="per batch and part, after which no round begins")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="generate,serve,http")
    parser.add_argument(
        "--asked", default="1,0.75,0.5,0.25", help="budgets to ask for, where these keep another share of the slots"
    )
    parser.add_argument("--isa")
    parser.add_argument("--stock-dtype", default="float32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    run_as(arguments.isa)
    if arguments.role:
        return answer(arguments)
    wide_nano.ensure(arguments.folder, arguments.layers)
    kinds = arguments.only.split(",")
    if unknown := set(kinds) - {"generate", "serve", "http"}:
        parser.error(f"--only has no part {sorted(unknown)[0]}")
    stepwise = [kind for kind in kinds if kind != "http"]
    rows = steps(stepwise, arguments) if stepwise else []
    rows += http(arguments) if "http" in kinds else []
    if arguments.json:
        print(json.dumps(rows))
    return None


if __name__ == "__main__":
    main()
